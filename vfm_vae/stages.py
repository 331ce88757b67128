"""Goes from one stage of training to the next."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from vfm_vae.checkpoints import fill
from vfm_vae.contracts import VFM, MeasuresLatents
from vfm_vae.finite import not_finite
from vfm_vae.images import from_uint8
from vfm_vae.lightning_private import undeclared
from vfm_vae.schema import TOKENIZER, Stored, read
from vfm_vae.vfm import check_vfm


def read_stage(path: str, vfm: VFM | None, encodes: bool = True) -> Stored:
    """Reads the checkpoint of a former stage.

    Args:
        path: The checkpoint.
        vfm: What it has to be trained with.
        encodes: Whether latents depend on the VFM. Where they are but aligned to it, one stage may have it and another
            not.

    Returns:
        The checkpoint.

    Raises:
        ValueError: if there is no such file, it is none of a tokenizer, or it belongs to another VFM.
    """
    if not Path(path).exists():
        raise ValueError(f"init_from: there is no checkpoint '{path}'; train the previous stage first")
    stored = read(path, "init_from", TOKENIZER)
    if encodes or (vfm is not None and stored.content.get("vfm") is not None):
        check_vfm(vfm, stored.content)
    return stored


@torch.no_grad()
def begin(module: nn.Module, stored: Stored, passing: Sequence[str]) -> Mapping[str, Any] | None:
    """Loads the weights of the previous stage; parts that are not trained get its averages.

    Args:
        module: What is trained.
        stored: The former stage's checkpoint.
        passing: Beginnings of the names of parts that come and go with stages: the checkpoint may lack one, and one
            that the module lacks is left out.

    Returns:
        The averages that the former stage ended with, of what the module has; None where there are none.

    Raises:
        ValueError: if the checkpoint holds another model.
    """
    weights = dict(stored.content["state_dict"])
    for part in passing:
        ours = {name: tensor for name, tensor in module.state_dict().items() if name.startswith(part)}
        others = {name: tensor for name, tensor in weights.items() if not name.startswith(part)}
        if not ours or len(others) == len(weights):
            weights = others | ours
    fill(module, weights, f"{stored.place} holds another model")
    if stored.average is None:
        return None
    parameters = dict(module.named_parameters())
    averages = {name: tensor for name, tensor in stored.average["weights"].items() if name in parameters}
    for name, average in averages.items():
        if not parameters[name].requires_grad:
            parameters[name].copy_(average)
    return {**stored.average, "weights": averages}


@torch.no_grad()
def measure_latents(tokenizer: MeasuresLatents, trainer: Trainer) -> None:
    """Has a tokenizer normalise its latents by statistics of training images, spread over the data set and all ranks.

    Args:
        tokenizer: Is about to be trained for the first time; where it asks for more images than there are, it gets all.
        trainer: Its trainer, whose data module has the images.

    Raises:
        ValueError: if there is no such data module, or latents hold nan or inf.
    """
    images_of = getattr(undeclared(trainer).datamodule, "spread_dataloader", None)
    if images_of is None:
        raise ValueError(
            f"model.statistics_images: {tokenizer.statistics_images} images are to be measured, but training has no "
            "ImageNetDataModule to take them from; give one, or set 0"
        )
    strategy = trainer.strategy
    # Number of images, sum and sum of squares at each position.
    sums = torch.zeros(3, *tokenizer.latent_shape, dtype=torch.float64, device=strategy.root_device)
    for batch in images_of(tokenizer.statistics_images):
        images = from_uint8(strategy.batch_to_device(batch, strategy.root_device).images)
        z = tokenizer.raw_latents(images).double()  # [B, C, h, w]
        sums += torch.stack([torch.full_like(z[0], len(z)), z.sum(0), z.square().sum(0)])
    count, total, squares = strategy.reduce(sums, reduce_op="sum")
    mean = total / count
    variance = squares / count - mean.square()
    if not variance.isfinite().all():
        raise not_finite("model.statistics_images: latents of training images hold nan or inf")
    tokenizer.take_statistics(mean.float(), variance.clamp(min=0).sqrt().float())


def check_optimizers(trained: Sequence[Sequence[nn.Parameter]], checkpoint: Mapping[str, Any]) -> None:
    """Checks that a checkpoint has the optimizers' states, for as many parameters as are trained now.

    Args:
        trained: What each optimiser trains.
        checkpoint: A training checkpoint.

    Raises:
        ValueError: if not.
    """
    states = checkpoint.get("optimizer_states")
    if not states:
        raise ValueError(
            "ckpt_path: a checkpoint of weights alone can't be resumed; give it to model.init_from instead"
        )
    counts = [sum(len(group["params"]) for group in state["param_groups"]) for state in states]
    before = [*counts, 0][: len(trained)]  # without discriminators there is no optimizer of theirs
    now = [len(parameters) for parameters in trained]
    if before != now:
        raise ValueError(
            f"ckpt_path: the run trained {before[0]} tensors of the generator and {before[1]} of discriminators so "
            f"far, but would train {now[0]} and {now[1]} from now on; give model.train_only, model.discriminator and "
            "model.patchgan as its config.yaml has them (a PatchGAN stage of former versions: "
            "--model.train_only='[decoder.blocks.3,decoder.blocks.4,decoder.blocks.5]')"
        )


def freeze_all_but(model: nn.Module, parts: Sequence[str] | None) -> None:
    """Freezes every parameter outside of some parts.

    Args:
        model: The model.
        parts: Names of modules or parameters in it that go on training; None leaves all as they are.

    Raises:
        ValueError: if a name matches nothing that trains.
    """
    if parts is None:
        return
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    chosen = {part: [name for name in trained if f"{name}.".startswith(f"{part}.")] for part in parts}
    if not parts or not all(chosen.values()):
        missing = [part for part, names in chosen.items() if not names]
        known = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in trained))
        raise ValueError(f"train_only: {missing or 'an empty list'} matches nothing that trains; there is {known}")
    kept = set().union(*chosen.values())
    for name, parameter in trained.items():
        parameter.requires_grad_(name in kept)
