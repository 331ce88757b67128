"""Latent diffusion as a pipeline of the library diffusers."""

from collections.abc import Sequence
from copy import copy
from typing import Any, Self

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from ldm.compatibility import check_tokenizer
from ldm.condition import Condition, Labels
from ldm.pipeline import LatentDiffusion
from vfm_vae.diffusers import AutoencoderVFM, WholeModel, build_described, described, half_precision
from vfm_vae.finite import check_finite
from vfm_vae.options import at_least

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class LatentDiffusionModel(WholeModel, ModelMixin, ConfigMixin):  # by which name pipelines look for it
    """A LatentDiffusion without its tokenizer, as a model of diffusers; made by `from_model` or `from_pretrained`.

    Args:
        description: Denoiser, sampler, guidance and the latents' tokenizer, as the `config.json` of a LatentDiffusion
            says them.
        in_channels: Channels C of the latent.
        sample_size: Sides (h, w) of the latent.
        num_classes: Number of classes; one more label stands for none. None where samples are not of classes.

    Attributes:
        diffusion: The LatentDiffusion.

    Raises:
        ValueError: if the description is in a format that is not this version's, or does not fit.
    """

    diffusion: LatentDiffusion

    @register_to_config
    def __init__(
        self,
        description: dict[str, Any],
        in_channels: int = 32,
        sample_size: Sequence[int] = (16, 16),
        num_classes: int | None = 1000,
    ):
        super().__init__()
        self.diffusion = build_described(LatentDiffusion, description).completed(description)

    @classmethod
    def from_model(cls, model: LatentDiffusion) -> "LatentDiffusionModel":
        """Wraps a model as it is now; its denoiser and statistics are not copied.

        Raises:
            ValueError: if the statistics of latents are not known.
        """
        # A new one, for the model may have been given another sampler or guidance than it was made with.
        diffusion = LatentDiffusion(model.model, model.sampler, model.guidance, model.conditioning)
        diffusion.normalization, diffusion.latent_source = model.normalization, model.latent_source
        description = described(diffusion)
        with torch.device("meta"):  # the structure alone, in which the model takes its place
            wrapped = cls(
                description=description,
                in_channels=model.model.in_channels,
                sample_size=list(model.model.input_size),
                num_classes=model.model.num_classes,
            )
        wrapped.diffusion = diffusion
        return wrapped.train(model.training)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, class_labels: Condition | Tensor, return_dict: bool = True
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Velocity of noisy latents.

        Args:
            hidden_states: Normalised latents, `[B, C, h, w]`; with a class token, `[B, C · h · w + cls_channels]`, as
                `Denoiser` says.
            timestep: Times in [0, 1], 0 being noise and 1 data, `[B]`.
            class_labels: int64 `[B]`, `num_classes` for none; or a condition.
            return_dict: Whether not to return a tuple.

        Returns:
            `sample`, like `hidden_states`.
        """
        condition = class_labels
        if not isinstance(condition, Condition):
            condition = Labels(condition, self.diffusion.conditioning.num_classes or 0)
        with half_precision(self):
            velocity = self.diffusion.model(hidden_states, timestep, condition).velocity
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    @apply_forward_hook
    def sample(
        self,
        class_labels: Sequence[Any] | Tensor,
        seed: int,
        guidance_scale: float | None = None,
        index: Tensor | None = None,
        num_inference_steps: int | None = None,
    ) -> Tensor:
        """Latents `[B, C, h, w]` as the tokenizer decodes them, of labels or prompts; arguments as of the pipelines."""
        diffusion = self.diffusion if num_inference_steps is None else self._with_steps(num_inference_steps)
        with half_precision(self):
            return diffusion.sample(class_labels, seed, guidance_scale, index).latents

    def _with_steps(self, steps: int) -> LatentDiffusion:
        sampler = self.diffusion.sampler
        if "steps" not in sampler.arguments:
            raise ValueError(f"num_inference_steps: {type(sampler).__name__} chooses its steps itself; leave it out")
        diffusion = copy(self.diffusion)
        diffusion.sampler = type(sampler)(**sampler.arguments | {"steps": steps})
        return diffusion


class SamplingPipeline(DiffusionPipeline):
    """The base class of pipelines, with the samplers and the guidance of this project.

    Args:
        transformer: Makes latents.
        vae: Decodes them.

    Raises:
        ValueError: if the latents are another tokenizer's.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(self, transformer: LatentDiffusionModel, vae: AutoencoderVFM):
        super().__init__()
        # A fingerprint is of weights in float32.
        if vae.dtype == torch.float32:
            check_tokenizer(transformer.diffusion.latent_source, vae.network.latent_identity(), "vae: it is")
        self.register_modules(transformer=transformer, vae=vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=vae.network.compression)

    @classmethod
    def from_model(cls, model: LatentDiffusion) -> Self:
        """Wraps a model and its tokenizer, which are not copied.

        Raises:
            ValueError: if it has no tokenizer, or the statistics of latents are not known.
        """
        if model.tokenizer is None:
            raise ValueError("tokenizer: the model has none to decode with; give it one with use_tokenizer")
        transformer, tokenizer = LatentDiffusionModel.from_model(model), model.tokenizer.network
        mean, std = model.normalization.mean, model.normalization.std
        size = max(model.model.input_size) * tokenizer.compression
        return cls(transformer, AutoencoderVFM.from_tokenizer(tokenizer, mean, std, size))

    @torch.no_grad()
    def _images(
        self,
        values: Sequence[Any] | Tensor,
        guidance_scale: float | None,
        generator: torch.Generator | None,
        seed: int | None,
        index: Tensor | None,
        num_inference_steps: int | None,
        output_type: str,
        return_dict: bool,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws an image for each label or prompt."""
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: one of {', '.join(OUTPUT_TYPES)}, given {output_type!r}")
        if seed is not None and generator is not None:
            raise ValueError("seed, generator: give one of the two")
        if seed is None:
            device = None if generator is None else generator.device
            seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
        images = self.transformer.sample(values, seed, guidance_scale, index, num_inference_steps)
        if output_type != "latent":
            images = self.vae.decode(images).sample.clamp(-1, 1)
            check_finite("images", images)
        images = self.image_processor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class LatentDiffusionPipeline(SamplingPipeline):
    """From labels to images, by the samplers and the guidance of this project.

    Args:
        transformer: Makes latents.
        vae: Decodes them.

    Raises:
        ValueError: if the latents are another tokenizer's.
    """

    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        index: Tensor | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws an image for each label.

        Args:
            class_labels: Classes, `[B]`.
            guidance_scale: Instead of the model's; 1 is no guidance.
            generator: A seed is drawn from it; from torch's own one if neither is given.
            seed: Seed of the noise, as for `LatentDiffusion.sample`, which gives the same images.
            index: Numbers of the samples, int64 `[B]`; from 0 on if not given.
            num_inference_steps: The sampler's option `steps`, instead of the model's.
            output_type: `pil`, `np` (`[B, H, W, 3]` in [0, 1]), `pt` (`[B, 3, H, W]` in [0, 1]) or `latent` (as the
                VAE decodes it).
            return_dict: Whether not to return a tuple.

        Returns:
            `images`.

        Raises:
            ValueError: if a label is no class, an option is out of its range, or what comes out is not finite.
        """
        labels = torch.as_tensor(class_labels).reshape(-1)
        return self._images(
            labels, guidance_scale, generator, seed, index, num_inference_steps, output_type, return_dict
        )


class TextToImagePipeline(SamplingPipeline):
    """From prompts to images, by the samplers and the guidance of this project.

    The text encoder is not saved along: folders say which it is, and its weights are read for the first prompt.

    Args:
        transformer: Makes latents.
        vae: Decodes them.

    Raises:
        ValueError: if the latents are another tokenizer's, or the model takes no prompts.
    """

    def __init__(self, transformer: LatentDiffusionModel, vae: AutoencoderVFM):
        if transformer.diffusion.conditioning.text_encoder is None:
            raise ValueError("transformer: this model takes no prompts; use LatentDiffusionPipeline")
        super().__init__(transformer, vae)

    def __call__(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        index: Tensor | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws images for prompts.

        Args:
            prompt: A text, or several.
            num_images_per_prompt: How many images of each; they follow each other.
            guidance_scale: Instead of the model's; 1 is no guidance.
            generator: A seed is drawn from it; from torch's own one if neither is given.
            seed: Seed of the noise, as for `LatentDiffusion.sample`, which gives the same images.
            index: Numbers of the samples, int64 `[B]`; from 0 on if not given.
            num_inference_steps: The sampler's option `steps`, instead of the model's.
            output_type: `pil`, `np` (`[B, H, W, 3]` in [0, 1]), `pt` (`[B, 3, H, W]` in [0, 1]) or `latent` (as the
                VAE decodes it).
            return_dict: Whether not to return a tuple.

        Returns:
            `images`.

        Raises:
            ValueError: if there is no prompt, an option is out of its range, or what comes out is not finite.
        """
        at_least(1, num_images_per_prompt=num_images_per_prompt)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        repeated = [text for text in prompts for _ in range(num_images_per_prompt)]
        return self._images(
            repeated, guidance_scale, generator, seed, index, num_inference_steps, output_type, return_dict
        )
