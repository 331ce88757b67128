"""Checkpoints name classes: what could not be found or made again is refused before training, not after it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training import repeat

from vfm_vae.description import Described, class_at, class_path, describe, is_imported
from vfm_vae.pretrained import build
from vfm_vae.vfm import FrozenVFM, check_source, vfm_from

NAME = "vit_photos_patch8_64"


class Told(FrozenVFM):
    """Says of itself what a test wants."""

    def __init__(self, shift: float = 0.0, **others: Any) -> None:
        super().__init__(NAME, **others)
        self.shift = shift
        self.told: dict[str, Any] = {}

    def source(self) -> dict[str, Any]:
        return {name: value for name, value in (super().source() | self.told).items() if value is not ...}


class Outer:
    class Inner(Described):
        """A class inside another one."""

        def __init__(self, size: int = 1) -> None:
            self.size = size


class Deep:
    class Within:
        class Part(Described):
            """A class that the parser does not find."""


def local() -> type[Described]:
    class Local(Described):
        pass

    return Local


@pytest.mark.parametrize(
    ("told", "fault"),
    [
        ({"name": ...}, r"lacks \['name'\]"),
        ({"layers": ..., "fingerprint": ...}, r"lacks \['fingerprint', 'layers'\]"),
        ({"class_path": ...}, r"needs the class_path \['\S*\.Told'\]"),
        ({"shift": torch.zeros(1)}, r"has what is no plain data: \['shift'\]"),
        ({"weights": Path("here")}, r"has what is no plain data: \['weights'\]"),
        ({"shfit": 1.0}, r"has what its __init__ does not take: \['shfit'\]"),
    ],
)
def test_a_vfm_that_could_not_be_made_again_is_refused(told, fault):
    vfm = Told()
    check_source(vfm)
    vfm.told = told
    with pytest.raises(ValueError, match=rf"^\S*\.Told: .* {fault}; see vfm_vae") as raised:
        check_source(vfm)
    assert "\n" not in str(raised.value)


def test_it_is_refused_before_training(tiny_module, trainer, batch):
    module = tiny_module()
    module.model.vfm = Told(layers=module.model.vfm.layers)
    module.model.vfm.told = {"name": ...}
    with pytest.raises(ValueError, match=r"Told: no checkpoint could make it again"):
        trainer(max_steps=1).fit(module, repeat(batch))


def test_arguments_that_are_handed_on_come_back():
    again = vfm_from(Told(0.5, layers=(2, -1)).source())
    assert type(again) is Told and again.shift == 0.5 and again.layers == (2, -1)


def test_a_class_inside_another_comes_back():
    description = describe(Outer.Inner(3))
    assert class_at(class_path(Outer.Inner)) is Outer.Inner
    assert build(Described, description).size == 3
    assert is_imported(class_path(Outer.Inner)) and not is_imported(f"{__name__}.Other.Inner")
    with pytest.raises(ValueError, match=r"^there is no class '\S*\.Outer\.Other': "):
        class_at(f"{__name__}.Outer.Other")


@pytest.mark.parametrize("kind", [local(), Deep.Within.Part])
def test_a_class_that_is_not_found_again_is_refused(kind):
    with pytest.raises(ValueError, match=r"\.(Local|Part): a class that is defined inside a function, or deep inside"):
        describe(kind())


def test_a_class_that_was_replaced_is_refused(monkeypatch):
    former = Outer.Inner()
    monkeypatch.setattr(Outer, "Inner", type("Inner", (Described,), {}))
    with pytest.raises(ValueError, match=r"Outer\.Inner: there is another class of that name now"):
        describe(former)


def test_a_class_of_a_script_is_warned_of():
    script = type("Script", (Described,), {"__module__": "__main__"})
    with pytest.warns(UserWarning, match=r"^__main__\.Script: its checkpoints can be read only where") as warned:
        describe(script())
        describe(script())
    assert len(warned) == 1


def test_a_module_that_is_not_there_is_asked_for():
    with pytest.raises(ValueError) as raised:
        class_at("not_there.parts.Mixer")
    advice = "put the folder of module 'not_there' on PYTHONPATH, or install its package"
    assert str(raised.value) == f"there is no class 'not_there.parts.Mixer': {advice}"
