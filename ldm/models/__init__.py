"""Denoisers."""

from ldm.models.lightningdit import LightningDiT
from ldm.models.sit import SiT

__all__ = ["LightningDiT", "SiT"]
