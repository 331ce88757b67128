"""Captions and their embeddings in a cache: one behind the other, because they differ in length.

Beside the latents of n images, a shard holds

- `text`, the embeddings of all their captions, bfloat16 `[tokens, D]`;
- `text_ends`, where those of each caption end, int64 `[captions]`;
- `captions` and `captions_ends`, the captions themselves in UTF-8, uint8 `[bytes]`, and where each ends;
- `image_ends`, where the captions of each image end among those of the shard, int64 `[n]`.

`text_empty.pt` has what does not differ between images: the embeddings of the empty caption, `tokens` `[E, D]`, and
`length`, the most tokens of a caption.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from vfm_vae.checkpoints import read_weights
from vfm_vae.types import Caption
from vfm_vae.writing import write_torch

EMPTY = "text_empty.pt"
ENDS = {"image_ends": "text_ends", "text_ends": "text", "captions_ends": "captions"}
"""Positions by name, and what they are positions in."""


class EmptyCaption(NamedTuple):
    """What all images of a cache share.

    Attributes:
        tokens: Embeddings of the empty caption, bfloat16 `[E, D]`.
        length: L, the most tokens of a caption.
    """

    tokens: Tensor
    length: int

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads a split's `text_empty.pt`.

        Raises:
            ValueError: there is no such file, or it holds something else.
        """
        stored = read_weights(folder / EMPTY, "root")
        if not isinstance(stored, Mapping) or not {"tokens", "length"} <= stored.keys():
            raise ValueError(f"root: {str(folder / EMPTY)!r} holds no 'tokens' and 'length'; make the cache again")
        return cls(stored["tokens"], int(stored["length"]))

    def write(self, folder: Path) -> None:
        """Writes it, at once."""
        write_torch(folder / EMPTY, {"tokens": self.tokens.cpu().clone(), "length": self.length})


def pack_texts(images: Sequence[Sequence[Caption]], width: int) -> dict[str, Tensor]:
    """What a shard holds of the captions of its images, with their embeddings.

    Args:
        images: All captions of each image.
        width: D.
    """
    captions = [caption for image in images for caption in image]
    tokens = [caption.tokens for caption in captions if caption.tokens is not None]
    texts = [caption.text.encode() for caption in captions]
    return {
        "text": torch.cat([torch.empty(0, width, dtype=torch.bfloat16), *tokens]),
        "text_ends": _ends(map(len, tokens)),
        "captions": torch.from_numpy(np.frombuffer(b"".join(texts), np.uint8).copy()),
        "captions_ends": _ends(map(len, texts)),
        "image_ends": _ends(map(len, images)),
    }


def _ends(sizes: Iterable[int]) -> Tensor:
    return torch.tensor(list(accumulate(sizes)), dtype=torch.int64)


class ShardTexts:
    """Where the captions of a shard lie: 16 bytes of memory for each caption, and 8 for each image.

    Args:
        file: The open shard, whose texts stay on disk.
        path: Where it lies, for messages.
        num_images: n.

    Raises:
        ValueError: if the positions don't fit what they are positions in.
    """

    def __init__(self, file: Any, path: Path, num_images: int) -> None:
        missing = {*ENDS, *ENDS.values()} - set(file.keys())
        if missing:
            raise ValueError(f"root: the texts in {str(path)!r} lack {sorted(missing)}; make the cache again")
        self._bounds = {name: np.append(0, file.get_tensor(name).numpy()) for name in ENDS}
        for name, what in ENDS.items():
            bounds, size = self._bounds[name], file.get_slice(what).get_shape()[0]
            least = 0 if what == "captions" else 1  # of the empty caption, there are tokens
            if bounds[-1] != size or (np.diff(bounds) < least).any():
                raise _misfit(path, f"{name!r} does not divide {what!r}, which has {size} rows")
        if len(self._bounds["image_ends"]) - 1 != num_images:
            raise _misfit(path, f"they are of {len(self._bounds['image_ends']) - 1} images instead of {num_images}")
        if len(self._bounds["text_ends"]) != len(self._bounds["captions_ends"]):
            raise _misfit(path, "captions and embeddings differ in number")

    def of_image(self, row: int) -> range:
        """Numbers of an image's captions within the shard."""
        return range(*self._part("image_ends", row))

    def caption(self, file: Any, number: int) -> str:
        """A caption."""
        start, end = self._part("captions_ends", number)
        text: bytes = file.get_slice("captions")[start:end].numpy().tobytes()
        return text.decode()

    def tokens(self, file: Any, number: int) -> Tensor:
        """A caption's embeddings, bfloat16 `[n, D]`; no others are read."""
        start, end = self._part("text_ends", number)
        tokens: Tensor = file.get_slice("text")[start:end]
        return tokens

    def _part(self, name: str, number: int) -> tuple[int, int]:
        start, end = self._bounds[name][number : number + 2].tolist()
        return start, end


def _misfit(path: Path, found: str) -> ValueError:
    return ValueError(f"root: the texts in {str(path)!r} don't fit together: {found}; make the cache again")
