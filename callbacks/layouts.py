"""How the images of samples lie in a folder: numbered, or as suites for text to image read them."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from callbacks.writers import numbered
from vfm_vae.data.prompts import SamplePrompts
from vfm_vae.data.samples import SampleNumbers
from vfm_vae.writing import write_picture, write_text

GRIDS = "grids"
GRID_SIDE = 2  # DPG-Bench's images in a row, and rows


class Numbers:
    """`00000042.png` for sample 42, whatever it is of.

    Args:
        samples: The samples.

    Attributes:
        pattern: Finds the images of samples in a folder.

    Raises:
        ValueError: if they can't be laid out like this.
    """

    pattern = "*.png"

    def __init__(self, samples: SampleNumbers) -> None:
        pass

    def file(self, number: int) -> str:
        """Where the image of a sample lies in the folder."""
        return numbered(number)

    def begin(self, folder: Path) -> None:
        """Writes what is known before there are images; one rank does it."""

    def finish(self, folder: Path, part: slice) -> None:
        """Writes what is made of images that are there; a part of it, so that ranks share the work."""


class GenEval(Numbers):
    """`00010/samples/00002.png` for image 2 of prompt 10, and `00010/metadata.jsonl` with that prompt's line.

    This is how GenEval's `evaluate_images.py` reads images (github.com/djghosh13/geneval).
    """

    pattern = "*/samples/*.png"

    def __init__(self, samples: SampleNumbers) -> None:
        self.prompted = prompted(samples, "geneval")
        if not all({"prompt", "tag"} <= (prompt.record or {}).keys() for prompt in self.prompted.prompts):
            raise ValueError(
                "layout: 'geneval' takes prompts with what is to be found in their images ('prompt', 'tag', …); give "
                "GenEval's evaluation_metadata.jsonl as data.prompts"
            )

    def file(self, number: int) -> str:
        """Where the image of a sample lies in the folder."""
        prompt, image = divmod(number, self.prompted.images_per_prompt)
        return f"{prompt:05d}/samples/{image:05d}.png"

    def begin(self, folder: Path) -> None:
        """Writes the prompts' lines."""
        for number, prompt in enumerate(self.prompted.prompts):
            write_text(folder / f"{number:05d}/metadata.jsonl", json.dumps(prompt.record))


class DPG(Numbers):
    """Numbered images, and `grids/<name>.png` with the four images of a prompt, two in a row.

    The folder of grids is what DPG-Bench's `compute_dpg_bench.py` reads, with `--pic-num 4` and the side of one image
    as `--resolution` (github.com/TencentQQGYLab/ELLA).
    """

    def __init__(self, samples: SampleNumbers) -> None:
        self.prompted = prompted(samples, "dpg")
        if any(prompt.name is None for prompt in self.prompted.prompts):
            raise ValueError(
                "layout: 'dpg' names images after the files of their prompts; give DPG-Bench's folder of <name>.txt as "
                "data.prompts"
            )
        if (given := self.prompted.images_per_prompt) != GRID_SIDE**2:
            raise ValueError(
                f"layout: 'dpg' takes {GRID_SIDE**2} images of each prompt; data.images_per_prompt is {given}"
            )

    def finish(self, folder: Path, part: slice) -> None:
        """Writes the grids of prompts all of whose images are there."""
        for number in range(len(self.prompted.prompts))[part]:
            first = number * GRID_SIDE**2
            files = [folder / self.file(image) for image in range(first, first + GRID_SIDE**2)]
            grid = folder / GRIDS / f"{self.prompted.prompts[number].name}.png"
            if not grid.is_file() and all(file.is_file() for file in files):
                images = np.stack([np.asarray(Image.open(file)) for file in files])  # [4, H, W, 3]
                rows = [np.concatenate(list(row), axis=1) for row in np.split(images, GRID_SIDE)]
                write_picture(grid, np.concatenate(rows))


LAYOUTS = {"numbers": Numbers, "geneval": GenEval, "dpg": DPG}


def prompted(samples: SampleNumbers, layout: str) -> SamplePrompts:
    """Samples of prompts, for a layout that needs such.

    Raises:
        ValueError: if they are not.
    """
    if not isinstance(samples, SamplePrompts):
        raise ValueError(f"layout: {layout!r} is for images of prompts; give data.prompts")
    return samples
