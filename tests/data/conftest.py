import numpy as np
import pytest
from PIL import Image


def write_tree(root, train=6, val=3, classes=("apple", "pear"), size=(20, 16)):
    """A small data set: every image differs from all others."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:03d}.JPEG", quality=95)
    return root


@pytest.fixture(scope="session")
def make_tree_in():
    return write_tree


@pytest.fixture
def make_tree(tmp_path):
    return lambda **kwargs: write_tree(tmp_path / "images", **kwargs)


@pytest.fixture
def tree(make_tree):
    return make_tree()
