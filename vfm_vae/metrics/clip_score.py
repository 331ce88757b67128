"""CLIP score: how well images fit their captions (Hessel et al. 2021, arXiv 2104.08718)."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from vfm_vae.checkpoints import few
from vfm_vae.frozen import Frozen, device_of
from vfm_vae.metrics.features import float32_arithmetic
from vfm_vae.pretrained import model_folder
from vfm_vae.tower_weights import quiet


class CLIP(Frozen):
    """A CLIP of the library transformers, which compares images with captions, in float32.

    Args:
        name: Folder that the library's `save_pretrained` wrote, with the tokenizer and the image processor in it; or
            `owner/model` on the Hugging Face hub.

    Attributes:
        max_tokens: The most tokens of a caption, 77 for OpenAI's models; what lies behind is cut off.
        num_cut: How many captions were cut so far.

    Raises:
        ValueError: if there is no such model, or it is no CLIP.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoConfig, CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

        folder = model_folder(name, {"allow_patterns": ["*.json", "merges.txt"]})
        try:
            with quiet():
                config = AutoConfig.from_pretrained(folder)
                if not isinstance(config, CLIPConfig):
                    raise ValueError(f"it is {config.model_type!r}")
                self._tokenizer = CLIPTokenizer.from_pretrained(folder)
                self._processor = CLIPImageProcessor.from_pretrained(folder)
                network, found = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
            if len(self._tokenizer) < config.text_config.vocab_size:  # the library takes an empty one, if there is none
                raise ValueError("its tokenizer is missing")
            if found["missing_keys"]:  # the library draws them at random
                raise ValueError(f"it lacks weights, {few(found['missing_keys'])}")
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"name: {name!r} can't be loaded as a CLIP of transformers: {reason}") from error
        super().__init__(network)
        self.max_tokens = int(config.text_config.max_position_embeddings)
        self.num_cut = 0

    def forward(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Scores, 100 · max(cosine of the embeddings, 0) each, `[B]`.

        Args:
            images: uint8 images `[B, 3, H, W]` in 0..255, which are resized and cropped as the model's processor says.
            captions: A caption for each of them.
        """
        device = device_of(self)
        with float32_arithmetic(device):
            pixels = self._processor(images=images.to(device), return_tensors="pt")["pixel_values"]
            # All are filled up to the same length, so that a score does not depend on the other captions.
            tokens = self._tokenizer(
                list(captions),
                padding="max_length",
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(device)
            self._note_cut(captions)
            embedded = self.network(pixel_values=pixels.to(device), **tokens)
            cosines = (embedded.image_embeds * embedded.text_embeds).sum(1)
        return 100 * cosines.clamp(min=0)

    def _note_cut(self, captions: Sequence[str]) -> None:
        counts = [len(tokens) for tokens in self._tokenizer(list(captions), verbose=False)["input_ids"]]
        cut = [caption for caption, count in zip(captions, counts, strict=True) if count > self.max_tokens]
        if cut and not self.num_cut:
            warnings.warn(  # on each rank, as others may have none that is too long
                f"CLIP score: a caption has more than the {self.max_tokens} tokens that CLIP reads, and is cut behind "
                f"them: {cut[0][:60]!r}…; further ones are counted only",
                stacklevel=2,
            )
        self.num_cut += len(cut)
