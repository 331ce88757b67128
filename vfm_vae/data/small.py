"""The list of training images that are too small, kept in a file so that they are looked for once."""

from collections.abc import Callable
from pathlib import Path

from vfm_vae.data.identity import names_digest
from vfm_vae.data.images import ImageDataset
from vfm_vae.data.shard_index import shard_index
from vfm_vae.writing import write_text

TITLE = "# under "  # begins a list that is made here, and says of which images


class SmallImages:
    """Names of the images whose short side is under a size.

    Args:
        min_size: Size in pixels; with 0, no image is small and there is no file.
        cache_dir: Folder for what is found out about the images: for the list, and for the index of tar shards, after
            which a list there is made again.
        path: File of the list, one name a line; by default in that folder.
        captions: The captions of tar shards that are looked for, as `CaptionMembers.of` takes them.
    """

    def __init__(self, min_size: int, cache_dir: Path, path: str | None = None, captions: str | None = None) -> None:
        self.min_size = min_size
        self.path = Path(path) if path else cache_dir / f"train_under_{min_size}px.txt"
        self._index = shard_index(cache_dir, "train", captions)

    def names(self) -> list[str]:
        """The names; the file is there by now."""
        lines = self.path.read_text().splitlines() if self.min_size else []
        return [line for line in lines if not line.startswith(TITLE)]

    def find(self, images: Callable[[], ImageDataset]) -> None:
        """Makes the file where it is missing, or was made here of other images.

        Args:
            images: Gives the images; small ones are among them.
        """
        if self.min_size and not self._is_new(images):
            dataset = images()
            lines = [self._title(dataset), *dataset.small(self.min_size)]
            write_text(self.path, "".join(f"{line}\n" for line in lines), "small_list")

    def _is_new(self, images: Callable[[], ImageDataset]) -> bool:
        """Whether it is there; one that was made here must be of these images, and as new as the index of shards."""
        if not self.path.is_file():
            return False
        with open(self.path) as file:
            title = file.readline().strip()
        if title.startswith(TITLE) and title != self._title(images()):
            return False
        is_ours = self.path.parent == self._index.parent and self._index.is_file()
        return not is_ours or self.path.stat().st_mtime >= self._index.stat().st_mtime

    def _title(self, dataset: ImageDataset) -> str:
        return f"{TITLE}{self.min_size} px, of {len(dataset)} images: {names_digest(dataset)}"
