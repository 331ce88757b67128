"""A small vision foundation model that comes with the package, for trying everything without a download.

Importing this module registers `vit_photos_patch8_64` with timm, so that
`timm.create_model("vit_photos_patch8_64", pretrained=True)` takes the same way as any other model.
"""

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

WEIGHTS = Path(__file__).with_name("vit_photos_patch8_64.safetensors")

default_cfgs = generate_default_cfgs(
    {
        "vit_photos_patch8_64.photos": {
            "file": str(WEIGHTS),
            "num_classes": 0,
            "input_size": (3, 64, 64),
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
    }
)


@register_model
def vit_photos_patch8_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """ViT of 1.2 M parameters for 64 px images, pretrained on the training crops of the `photos` data set.

    Six blocks of width 128 on patches of 8 px, without a class token; the final norm acts on the patch tokens, whose
    mean is the pooled feature.

    Args:
        pretrained: Load the weights that come with the package; they are stored in half precision, the parameters
            are float32.
        kwargs: Anything timm's `VisionTransformer` takes, `dynamic_img_size=True` for one.
    """
    architecture: dict[str, Any] = {
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 128,
        "depth": 6,
        "num_heads": 4,
        "num_classes": 0,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,  # with a mean pool timm would norm the pooled feature and leave the tokens without
    }
    return build_model_with_cfg(
        VisionTransformer,
        "vit_photos_patch8_64",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **(architecture | kwargs),
    )
