"""LatentDiffusion: from labels or other conditions to images, without Lightning."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ldm.compatibility import DIFFUSION, check_tokenizer, name_of
from ldm.condition import ClassLabels, Condition, Conditioning, LabelMode
from ldm.guidance import Guidance
from ldm.models.denoiser import Denoiser
from ldm.normalization import LatentNormalization
from ldm.samplers import Euler, Sampler
from ldm.text_checks import check_text_encoder, check_texts
from vfm_vae.data.sampling import IndexedNoise
from vfm_vae.description import describe
from vfm_vae.finite import check_finite
from vfm_vae.frozen import Frozen
from vfm_vae.options import at_least, named_as
from vfm_vae.pretrained import Pretrained
from vfm_vae.pretrained_tokenizer import PretrainedTokenizer
from vfm_vae.schema import Kind
from vfm_vae.tokenizer import read_tokenizer
from vfm_vae.types import Samples

STREAM = "sample"  # names the random numbers of samples

CARD = """# {name} on latents of {channels} channels, {height}x{width}

A diffusion model on the latents of {source}, with the statistics that normalise them, conditioned on {told}.

```python
from ldm.pipeline import LatentDiffusion

model = LatentDiffusion.from_pretrained("this folder, or owner/model on the hub", tokenizer="the tokenizer's")
images = model.sample({asked}).images  # [B, 3, H, W] in [-1, 1]
```
"""


class LatentDiffusion(nn.Module, Pretrained):
    """A denoiser with all that makes images of noise.

    Args:
        model: The denoiser.
        sampler: From noise to latents.
        guidance: How samples are guided.
        conditioning: What the denoiser is told; class labels, as many as the denoiser knows, if not given.

    Attributes:
        normalization: Statistics of the latents that the denoiser was trained on.
        tokenizer: Holds the tokenizer that decodes; None where latents are enough. It is not saved along.
        latent_source: Which tokenizer's latents these are, see `Tokenizer.latent_identity`; None where it is not known.
        class_names: What the classes are called, by their numbers; None where nobody has said it.

    Raises:
        ValueError: if denoiser and conditioning do not fit.
    """

    kind: ClassVar[Kind] = DIFFUSION

    def __init__(
        self,
        model: Denoiser,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        conditioning: Conditioning | None = None,
    ):
        super().__init__()
        self.model = model
        self.sampler, self.guidance = sampler or Euler(), guidance or Guidance()
        self.conditioning = conditioning or class_labels(model)
        check_texts(model, self.conditioning)
        if self.conditioning.num_classes != model.num_classes:
            raise ValueError(
                f"model.num_classes: the denoiser has {model.num_classes}, but its conditioning has "
                f"{self.conditioning.num_classes}; give both the same, null where nothing is a class"
            )
        self.normalization = LatentNormalization(model.in_channels)
        self.tokenizer: Frozen | None = None
        self.latent_source: dict[str, Any] | None = None
        self.class_names: list[str] | None = None

    @classmethod
    def from_pretrained(
        cls, name: str | Path, tokenizer: str | Path | PretrainedTokenizer | None = None, **hub: Any
    ) -> Self:
        """Loads a folder that `save_pretrained` wrote, or a model of the Hugging Face hub.

        Args:
            name: The folder, or the hub's `owner/model`.
            tokenizer: Decodes latents: a model, or where to load one, see `use_tokenizer`.
            **hub: Options of `huggingface_hub.snapshot_download`: `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`, …

        Returns:
            The model, in eval mode.

        Raises:
            ValueError: if there is no such model, it is in a format that is not this version's, or the tokenizer is
                another than that of its latents.
        """
        return super().from_pretrained(name, **hub).use_tokenizer(tokenizer)

    @classmethod
    def from_checkpoint(cls, path: str | Path, tokenizer: str | Path | PretrainedTokenizer | None = None) -> Self:
        """Loads a checkpoint of training; its averaged weights where it has them.

        Args:
            path: File that training wrote.
            tokenizer: As for `from_pretrained`.

        Returns:
            The model, in eval mode.

        Raises:
            ValueError: if the file is no diffusion model's checkpoint, or the tokenizer is another than that of its
                latents.
        """
        return super().from_checkpoint(path).use_tokenizer(tokenizer)

    def completed(self, config: Mapping[str, Any]) -> Self:
        """Notes whose latents it makes, what its classes are called, and of which text encoder it takes texts."""
        self.latent_source = config["tokenizer"]
        self.name_classes(config.get("class_names"))
        check_text_encoder(self.conditioning, config.get("text"), "name: the model")
        return self

    def name_classes(self, names: Sequence[str] | None) -> None:
        """Says what the classes are called, by their numbers; folders note it. None forgets it.

        Raises:
            ValueError: if there are not as many names as classes.
        """
        if names is not None and len(names) != self.conditioning.num_classes:
            raise ValueError(
                f"class_names: {len(names)} names, but the model has {self.conditioning.num_classes} classes"
            )
        self.class_names = None if names is None else [str(name) for name in names]

    def use_tokenizer(self, tokenizer: str | Path | PretrainedTokenizer | None) -> Self:
        """Sets what decodes, and returns the model.

        Args:
            tokenizer: A tokenizer; or where to load one: a checkpoint of its training, a folder that `save_pretrained`
                wrote, or `owner/model` on the hub. Its VFM is not loaded, for decoding takes none.

        Raises:
            ValueError: if it can't be had, or is another than that of the latents.
        """
        if isinstance(tokenizer, str | Path):
            with named_as(name="tokenizer", checkpoint="tokenizer"):
                tokenizer = read_tokenizer(tokenizer, vfm=False)
        if tokenizer is not None:
            check_tokenizer(self.latent_source, tokenizer.latent_identity(), "tokenizer: it is")
        self.tokenizer = None if tokenizer is None else Frozen(tokenizer)
        return self

    def compile_regions(self) -> Self:
        """Compiles the denoiser block by block, in place, and returns the model; worth it for many samples on a GPU.

        The first samples wait for the compiler. With guidance inside an interval there are two sizes of batches, each
        with code of its own, and all further sizes share the second's. Samples change by rounding. The partner of
        autoguidance is compiled, too.
        """
        self.model.compile_regions()
        self.guidance.compile_regions()
        return self

    @torch.no_grad()
    def sample(
        self,
        labels: Condition | Sequence[Any] | Tensor | None = None,
        seed: int = 0,
        guidance_scale: float | None = None,
        index: Tensor | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Samples:
        """Draws a sample for each label or prompt; each depends on the seed, its number and that alone.

        They are those that `python -m ldm predict` draws by the same seed, numbers and labels or prompts, but not yet
        in 8 bits.

        Args:
            labels: Classes, `[B]`; or whatever values the model's conditioning takes, or a condition.
            seed: Seed of the noise.
            guidance_scale: Instead of the model's; 1 is no guidance.
            index: Numbers of the samples, int64 `[B]`; from 0 on if not given.
            prompts: Texts, B of them, instead of labels; for a model of text to image.

        Returns:
            Latents, and images where there is a tokenizer.

        Raises:
            ValueError: if a label is no class, the model takes no prompts, the seed is negative, the statistics of
                latents are not known, guidance does not fit the denoiser, or what comes out is not finite.
        """
        at_least(0, seed=seed)
        condition = self._asked_for(labels, prompts)
        index = torch.arange(len(condition)) if index is None else index
        samples = self.draw(index, seed, condition, guidance_scale)
        if self.tokenizer is None:
            return samples
        images = self.tokenizer.network.decode(samples.latents).image.clamp(-1, 1)
        check_finite("images", images)
        return samples._replace(images=images)

    @torch.no_grad()
    def draw(
        self,
        index: Tensor,
        seed: int,
        condition: Condition | None = None,
        guidance_scale: float | None = None,
    ) -> Samples:
        """Draws latents as the tokenizer decodes them; each depends on the seed, its number and condition alone.

        Args:
            index: Numbers of the samples, int64 `[B]`.
            seed: Seed of all that is random.
            condition: What they are drawn for; what `sample_condition` says if not given.
            guidance_scale: Instead of the model's; 1 is no guidance.

        Raises:
            ValueError: if the statistics of latents are not known, guidance does not fit the denoiser, or samples are
                not finite.
        """
        if not self.normalization.is_known:
            raise ValueError(
                "the statistics of latents are unknown: only a trained model can sample; load its checkpoint"
            )
        device = self.normalization.mean.device
        index = index.to(device)
        noise = IndexedNoise(STREAM, seed, index, device)
        # Comes first in any case: so a sample's noise is the same, whoever says what it is drawn for.
        if condition is None or self.conditioning.is_random:
            own = self.conditioning.of_samples(index, noise)
            condition = own if condition is None else condition
        condition = condition.to(device)
        guidance = self.guidance if guidance_scale is None else self.guidance.with_scale(guidance_scale)
        if guidance.acts:
            guidance.prepare(self)
        field, shape = guidance.field(self.model, condition), self.model.state_shape
        sampler = self.sampler.fitted_to(self.model.latent_shape)
        state = sampler(field, noise.normal(*shape), lambda: noise.normal(*shape))
        latents = self.normalization.inverse(self.model.split(state)[0].float())
        check_finite("samples", latents)
        return Samples(None, latents, condition, index)

    def sample_condition(self, index: Tensor, seed: int) -> Condition:
        """The condition of samples by their numbers, int64 `[B]`, if none is given."""
        return self.conditioning.of_samples(index, IndexedNoise(STREAM, seed, index, index.device))

    def condition(self, values: Condition | Sequence[Any] | Tensor) -> Condition:
        """A condition as it is, or the one that plain values stand for.

        Raises:
            ValueError: if there is none for a value.
        """
        return values if isinstance(values, Condition) else self.conditioning.of_values(values)

    def _asked_for(self, labels: Any, prompts: Sequence[str] | None) -> Condition:
        if (labels is None) == (prompts is None):
            raise ValueError("labels, prompts: give one of the two, what the samples are to be of")
        if prompts is not None and self.conditioning.text_encoder is None:
            raise ValueError(f"prompts: this model takes none, as it is conditioned on {self._told}; give labels")
        return self.condition(labels if prompts is None else prompts)

    def settings(self) -> dict[str, Any]:
        """All that samples depend on besides weights and seed, as plain data."""
        return {
            "sampler": self.sampler.fitted_to(self.model.latent_shape).settings(),
            "guidance": self.guidance.settings(),
            **self.conditioning.settings(),
            "tokenizer": self.latent_source,
        }

    def described(self) -> dict[str, Any]:
        """How to make the model again, whose latents it makes, and whose texts it takes, if any, as plain data."""
        model = describe(self)
        # These may be others than the model was made with.
        parts = {name: describe(getattr(self, name)) for name in ("sampler", "guidance", "conditioning")}
        model["init_args"] |= parts
        encoder = self.conditioning.text_encoder
        text = {} if encoder is None else {"text": encoder.source()}
        return {"model": model, "tokenizer": self.latent_source, **text}

    def pretrained_config(self) -> dict[str, Any]:
        """The config of a folder: what `described` says, and the names of classes where they are known.

        Raises:
            ValueError: if the statistics of latents are not known, without which the weights are worth nothing.
        """
        if not self.normalization.is_known:
            raise ValueError("normalization: the statistics of latents are unknown; take those of training")
        return self.described() | ({} if self.class_names is None else {"class_names": self.class_names})

    def model_card(self) -> str:
        """The text of the model card."""
        channels, height, width = self.model.latent_shape
        if self.latent_source is None:
            source = "a tokenizer that is not known"
        else:
            name = name_of(self.latent_source)
            source = name if "tokenizer" in self.latent_source else f"a VFM-VAE (arXiv 2510.18457) with {name}"
        return CARD.format(
            name=type(self.model).__name__,
            channels=channels,
            height=height,
            width=width,
            told=self._told,
            source=source,
            asked="labels=[0, 1]" if self.conditioning.text_encoder is None else 'prompts=["a red fox in the snow"]',
        )

    @property
    def _told(self) -> str:
        """What the denoiser is told, in words."""
        conditioning = self.conditioning
        if conditioning.text_encoder is not None:
            return f"texts that {conditioning.text_encoder.name} embeds"
        classes = conditioning.num_classes
        return type(conditioning).__name__ if classes is None else f"{classes} classes"


def class_labels(model: Denoiser, mode: LabelMode = "random") -> ClassLabels:
    """The conditioning of a denoiser that is told a class.

    Raises:
        ValueError: if it is told something else.
    """
    if model.num_classes is None:
        told = "ldm.text.Captions with a text encoder, as it takes texts" if model.text_channels else "what it is told"
        raise ValueError(f"model.conditioning: {type(model).__name__} knows no classes; give {told}")
    return ClassLabels(model.num_classes, mode)
