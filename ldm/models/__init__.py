"""Denoisers."""

from ldm.models.ditdh import DiTDH
from ldm.models.lightningdit import LightningDiT
from ldm.models.lumina import LuminaNextDiT
from ldm.models.sit import SiT
from ldm.models.text_lightningdit import TextLightningDiT

__all__ = ["DiTDH", "LightningDiT", "LuminaNextDiT", "SiT", "TextLightningDiT"]
