"""Denoisers."""

from ldm.models.ditdh import DiTDH
from ldm.models.lightningdit import LightningDiT
from ldm.models.sit import SiT

__all__ = ["DiTDH", "LightningDiT", "SiT"]
