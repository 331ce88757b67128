"""The offline default: a data set of photographs, a small vision foundation model that knows them, and a judge.

Importing the package registers `vit_photos_patch8_64` with timm, and lets configs name `Judge` without its module.
"""

from vfm_vae.embedded import judge, vit

__all__ = ["judge", "vit"]
