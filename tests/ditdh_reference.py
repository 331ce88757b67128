"""A small DiTDH of public code and one to guide it, with what they computed. Its times are public: 1 is noise."""

import json
from functools import cache
from typing import Any

from reference import DATA, load_reference
from torch import Tensor

from ldm.condition import Labels
from ldm.models.ditdh import DiTDH
from ldm.published import ditdh_from_published

SETTINGS: dict[str, Any] = json.loads((DATA / "ditdh_a.json").read_text())


@cache
def reference() -> dict[str, Tensor]:
    """All tensors, by name."""
    return load_reference("ditdh_a")


def published_weights(prefix: str) -> dict[str, Tensor]:
    """Those of the model, `weights/`, or of the one that guides it, `guide/`, under published names."""
    return {name.removeprefix(prefix): tensor for name, tensor in reference().items() if name.startswith(prefix)}


def ditdh_a() -> DiTDH:
    """The model, for this project's times."""
    return ditdh_from_published(published_weights("weights/"), SETTINGS["config"])


def guide() -> DiTDH:
    """The one that guides it."""
    return ditdh_from_published(published_weights("guide/"), SETTINGS["guide_config"])


def labels(name: str) -> Labels:
    """Labels of the reference, as a condition."""
    return Labels(reference()[name], SETTINGS["config"]["num_classes"])
