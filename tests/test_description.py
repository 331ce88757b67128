"""Objects say what they were made of, whoever wrote their class."""

import copy
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ldm.samplers import Euler, Sampler
from vfm_vae.description import Described, describe
from vfm_vae.modules.adapter import Adapter
from vfm_vae.pretrained import build


class Constant(Sampler):
    """A third party's sampler, which does nothing to be described."""

    def __init__(self, value: float, *, steps: int = 4):
        self.value = value

    def __call__(self, field, noise, fresh_noise):
        return noise


class Layer(nn.Module, Described):
    def __init__(self, width, sampler=None, **options):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))


class Deeper(Layer):
    def __init__(self, depth=2):
        super().__init__(width=depth + 1)


def test_a_class_need_not_know_of_it():
    assert describe(Constant(0.5)) == {
        "class_path": f"{__name__}.Constant",
        "init_args": {"value": 0.5, "steps": 4},
    }


def test_arguments_of_the_outermost_class_count():
    assert Deeper(3).arguments == {"depth": 3}


def test_parts_paths_and_further_options_are_plain_data():
    described = describe(Layer((1, 2), Euler(3), weights=Path("a/b"), names={"x": [None, True]}))
    assert described["init_args"] == {
        "width": [1, 2],
        "sampler": {"class_path": "ldm.samplers.Euler", "init_args": {"steps": 3, "shift": 1.0, "end": 1.0}},
        "weights": "a/b",
        "names": {"x": [None, True]},
    }
    assert describe(Layer(1, Euler()), without=["sampler"])["init_args"] == {"width": 1, "sampler": None}


def test_what_is_built_is_what_was_described():
    again = build(Sampler, describe(Euler(7, shift=0.3)))
    assert type(again) is Euler and again.arguments == {"steps": 7, "shift": 0.3, "end": 1.0}


def test_copies_and_signatures_are_as_without_it():
    layer = copy.deepcopy(Layer(3, steps=2))
    assert layer.arguments == {"width": 3, "sampler": None, "steps": 2}
    assert list(inspect.signature(Adapter).parameters) == list(inspect.signature(Adapter.__init__).parameters)[1:]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'width'"):
        Layer()


def test_a_model_that_is_sharded_is_described_as_before():
    layer = Deeper()
    layer.__class__ = type("FSDPDeeper", (FSDPModule, Deeper), {})  # as `fully_shard` does
    assert describe(layer)["class_path"] == f"{__name__}.Deeper"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (nn.Linear(1, 1), r"^Linear can't be described, .* derive its class from vfm_vae.description.Described"),
        (Layer(1, nn.Linear(1, 1)), r"^Layer.sampler: a Linear can't be described"),
        (Layer(1, options=[{1: torch.ones(2)}]), r"^Layer.options.1: a Tensor can't be described"),
    ],
)
def test_what_can_not_be_described_is_named(part, message):
    with pytest.raises(ValueError, match=message):
        describe(part)
