"""The lower bounds of requirements, which hosted tests install."""

from importlib.metadata import version
from pathlib import Path

import pytest
from oldest_versions import lower_bounds
from packaging.version import Version

SETUP = Path(__file__).parents[1] / "setup.cfg"


def test_every_requirement_has_a_lower_bound_that_this_environment_meets():
    bounds = dict(line.split("==") for line in lower_bounds(str(SETUP)))
    assert {"torch", "lightning", "diffusers", "transformers", "pytest"} <= bounds.keys()
    assert all(Version(version(name)) >= Version(bound) for name, bound in bounds.items())


def test_a_requirement_without_one_is_named(tmp_path):
    config = "[options]\ninstall_requires =\n    torch>=2\n    timm\n[options.extras_require]\ndev =\n    ruff<1\n"
    (tmp_path / "setup.cfg").write_text(config)
    with pytest.raises(SystemExit, match="no lower bound: ruff<1, timm"):
        lower_bounds(str(tmp_path / "setup.cfg"))


def test_an_extra_may_name_others_of_the_package_itself(tmp_path):
    config = "[metadata]\nname = mine\n[options]\ninstall_requires =\n    torch>=2\n"
    config += "[options.extras_require]\napp =\n    gradio>=6\ndev =\n    mine[app,docs]\n    mine-too>=1\n"
    (tmp_path / "setup.cfg").write_text(config)
    assert lower_bounds(str(tmp_path / "setup.cfg")) == ["gradio==6", "mine-too==1", "torch==2"]
