"""Builds what configs describe, and runs nothing."""

from pathlib import Path

import torch
from lightning.pytorch import Callback

from ldm.module import DiffusionModule
from vfm_vae.cli import CLI
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.module import TokenizerModule

CONFIGS = Path(__file__).parents[1] / "configs"
OFFLINE = [
    "--model.model.init_args.vfm.init_args.pretrained=false",
    "--model.discriminator.init_args.pretrained=false",
]


class Build(CLI):
    """Parses and instantiates, and stops there."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def build(*configs: str | Path, options: list[str] = (), module: type = TokenizerModule, command: str = "fit") -> Build:
    arguments = [command]
    for config in configs:
        arguments += ["--config", str(config if isinstance(config, Path) else CONFIGS / config)]
    others = {name: {"passed_over": name != command} for name in Build.subcommands()}
    plain = {"auto_configure_optimizers": False, "save_config_callback": None, "load_from_checkpoint_support": False}
    return Build(module, ImageNetDataModule, args=[*arguments, *options], parser_kwargs=others, **plain)


def build_ldm(*configs: str, options: list[str] = (), command: str = "fit") -> Build:
    """A diffusion model without the tokenizer's checkpoint, which is a former command's."""
    return build(*configs, options=["--model.tokenizer=null", *options], module=DiffusionModule, command=command)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def callback(cli: Build, name: str) -> Callback:
    (found,) = [callback for callback in cli.trainer.callbacks if type(callback).__name__ == name]
    return found
