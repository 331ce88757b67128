"""Reference tensors that public code computed, from tests/parity/data."""

import lzma
from pathlib import Path

from safetensors.torch import load, load_file
from torch import Tensor

DATA = Path(__file__).parent / "parity" / "data"


def load_reference(name: str) -> dict[str, Tensor]:
    """The tensors of `<name>.safetensors`, which may be packed: `xz -9e --lzma2=lp=2,lc=2,pb=2` saves a sixth."""
    packed = DATA / f"{name}.safetensors.xz"
    return load(lzma.decompress(packed.read_bytes())) if packed.exists() else load_file(DATA / f"{name}.safetensors")
