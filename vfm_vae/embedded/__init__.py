"""The offline default: a data set of photographs and a small vision foundation model that knows them.

Importing the package registers `vit_photos_patch8_64` with timm.
"""

from vfm_vae.embedded import vit

__all__ = ["vit"]
