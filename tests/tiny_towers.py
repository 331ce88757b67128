"""Small random vision towers in folders, as transformers writes them."""

from pathlib import Path

import torch
from torch import nn

DEPTH, WIDTH = 3, 32
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 2}
ViT = SIZES | {"intermediate_size": 48, "image_size": 64, "patch_size": 16}
DINO = SIZES | {"image_size": 56, "patch_size": 14, "mlp_ratio": 2}
QWEN = {"depth": DEPTH, "hidden_size": WIDTH, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 24}
CONFIGS = {
    "siglip_vision_model": ViT,
    "clip_vision_model": ViT,
    "vit_mae": ViT,
    "vit": ViT,
    "dinov2": DINO,
    "dinov2_with_registers": DINO,
    "dinov3_vit": ViT | {"num_register_tokens": 4},
    "qwen2_5_vl_vision": QWEN | {"window_size": 56, "fullatt_block_indexes": [1]},
}
PREFIX = {"siglip_vision_model": 0, "dinov2_with_registers": 5, "dinov3_vit": 5}  # others have the class token alone
PLAIN = [name for name in CONFIGS if not name.startswith("qwen")]
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}


def randomised(network):
    """Weights all of which matter; the library leaves tokens at zero and norms without effect."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return network


class Folders:
    """Makes folders with a model; each once.

    Args:
        root: Where they are made.
    """

    configs = CONFIGS

    def __init__(self, root: Path):
        self.root = root

    def __call__(self, kind: str, name: str | None = None, seed: int = 0, shards: str = "5GB", **options) -> str:
        from transformers import AutoConfig, AutoModel

        place = self.root / (name or kind)
        if not place.exists():
            torch.manual_seed(seed)
            config = AutoConfig.for_model(kind, **(self.configs.get(kind, {}) | options))
            randomised(AutoModel.from_config(config)).save_pretrained(place, max_shard_size=shards)
        return str(place)

    def two_towers(self) -> str:
        """SigLIP with its text tower."""
        vision = {"model_type": "siglip_vision_model"} | ViT
        text = {"model_type": "siglip_text_model", "max_position_embeddings": 8, "projection_size": 16} | TEXT
        return self("siglip", vision_config=vision, text_config=text)


def check_close(found, expected, tolerance=1e-6):
    """Whether tokens differ by no more than a share of the largest value."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * max(1, expected.abs().max())


def library(folder):
    """The library's own model, in its own way."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder).eval()


def images_of(vfm, rows, columns, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, rows * vfm.patch_size, columns * vfm.patch_size, generator=generator) * 2 - 1
