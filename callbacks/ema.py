"""Exponential moving average of the trained weights, counted in images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from callbacks.averaged import check_modules, parameters_of, placed_like, precise, whole
from vfm_vae.contracts import CountsImages
from vfm_vae.options import positive
from vfm_vae.schema import AVERAGE, write_average


class EMA(Callback):
    """Keeps an exponential moving average of the weights, and lets validation, test and prediction use it.

    After every optimiser step that covered `n` images, `average = beta * average + (1 - beta) * weights` with
    `beta = 0.5^(n / min(half_life_images, ramp_up * images_seen))` (Karras et al. 2020, StyleGAN2, as StyleGAN-T runs
    it). Averaged are the parameters that train, and those that a former stage averaged; everything else, buffers
    included, is taken as the module has it. The average is held in float32 or better.

    A checkpoint holds it as `checkpoint["ema"] = {"weights": {parameter name: tensor}, "images_seen": int}`, while
    `checkpoint["state_dict"]` always holds the weights in training, also when it is saved during a validation. So the
    averaged model is `checkpoint["state_dict"] | checkpoint["ema"]["weights"]`. (Lightning calls no callback for
    checkpoints with `save_weights_only`: these hold no average.)

    Lightning's own `WeightAveraging` is no base for it: it copies the whole module, discriminators and frozen networks
    included, can't be sharded, knows steps but no images, leaves `test` and `predict` to the weights in training, and
    puts the average where checkpoints hold those.

    Args:
        half_life_images: After so many images, a weight's share in the average has halved.
        ramp_up: Limits the half-life to this fraction of the images seen so far; null for no limit.
        decay: A constant `beta` for every optimizer step, instead of a half-life in images.
        modules: The parts of the LightningModule whose parameters are averaged, such as `model`.

    Raises:
        ValueError: if an option lies outside of its range; when training starts, if the module lacks one of `modules`
            or does not count its images, or an average that was loaded does not fit the module.
    """

    def __init__(
        self,
        half_life_images: float = 160_000,
        ramp_up: float | None = 0.05,
        decay: float | None = None,
        modules: Sequence[str] = ("model",),
    ) -> None:
        positive(half_life_images=half_life_images, ramp_up=ramp_up)
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"decay: must be in [0, 1), or null to use half_life_images, given {decay}")
        self.half_life_images, self.ramp_up, self.decay = half_life_images, ramp_up, decay
        self.modules = (modules,) if isinstance(modules, str) else tuple(modules)
        self.weights: dict[str, Tensor] = {}
        self.images_seen = 0
        self._trained: dict[str, Tensor] = {}  # weights in training, put aside while the average stands in for them
        self._step = 0

    def load_average(self, state: Mapping[str, Any]) -> None:
        """Continues from `state`, as a checkpoint holds it under the key `ema`."""
        self.weights = {name: precise(tensor).clone() for name, tensor in state["weights"].items()}
        self.images_seen = int(state["images_seen"])

    def beta(self, num_images: int) -> float:
        """The share of the old average in the new one.

        Args:
            num_images: Images that the step covered, over all ranks.
        """
        if self.decay is not None:
            return self.decay
        half_life = self.half_life_images
        if self.ramp_up is not None:
            half_life = min(half_life, self.ramp_up * self.images_seen)
        return 0.5 ** (num_images / max(half_life, 1e-8))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks whether the module has what is needed, before anything is loaded."""
        check_modules(pl_module, self.modules)
        if stage == "fit" and self.decay is None and not isinstance(pl_module, CountsImages):
            raise ValueError(
                f"half_life_images counts images, but {type(pl_module).__name__} has no images_seen; give `decay`."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts at the present weights, or where the loaded average ended."""
        started = bool(self.weights)
        for name, parameter in self._parameters(pl_module).items():
            if parameter.requires_grad and name not in self.weights:
                self.weights[name] = precise(parameter).clone()
        if not self.weights:
            raise ValueError(f"modules: nothing in {list(self.modules)} trains, so there is nothing to average.")
        self._match(pl_module)
        if not started:
            self.images_seen = getattr(pl_module, "images_seen", 0)
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Updates the average if the optimiser stepped; a skipped or accumulating batch waits for the next step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        images_seen = getattr(pl_module, "images_seen", 0)
        if self.decay is None and images_seen <= self.images_seen:
            raise ValueError(
                f"the module's images_seen ({images_seen}) did not advance beyond the average's ({self.images_seen})."
            )
        self._update(pl_module, self.beta(images_seen - self.images_seen))
        self.images_seen = images_seen

    @torch.no_grad()
    def _update(self, pl_module: LightningModule, beta: float) -> None:
        parameters = self._parameters(pl_module)
        averages = list(self.weights.values())
        torch._foreach_lerp_(averages, [precise(parameters[name]) for name in self.weights], 1 - beta)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The average stands in for the weights."""
        self._swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The weights return."""
        self._swap_out(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The weights return also when an evaluation breaks off."""
        self._swap_out(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the average; in the module's state, puts the weights in training where it stands in for them."""
        checkpoint["state_dict"].update(whole(self._trained))
        if self.weights:
            write_average(checkpoint, whole(self.weights), self.images_seen)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restores the average, for training and for evaluation."""
        if AVERAGE in checkpoint:
            self.load_average(checkpoint[AVERAGE])
        else:
            rank_zero_warn("The checkpoint holds no averaged weights (key 'ema'): its trained weights are used.")

    def _parameters(self, pl_module: LightningModule) -> dict[str, nn.Parameter]:
        return parameters_of(pl_module, self.modules)

    def _match(self, pl_module: LightningModule) -> None:
        """Brings the average to the module's device; checks that they belong together."""
        parameters = self._parameters(pl_module)
        for name, average in self.weights.items():
            if name not in parameters or parameters[name].shape != average.shape:
                found = tuple(parameters[name].shape) if name in parameters else "no such parameter"
                raise ValueError(f"ema: the average of {name!r}, {tuple(average.shape)}, does not fit: {found} here.")
            self.weights[name] = placed_like(parameters[name], average)

    @torch.no_grad()
    def _swap_in(self, pl_module: LightningModule) -> None:
        if self._trained or not self.weights:
            return
        self._match(pl_module)
        parameters = self._parameters(pl_module)
        self._trained = {name: parameters[name].detach().clone() for name in self.weights}
        for name, average in self.weights.items():
            parameters[name].copy_(average)

    @torch.no_grad()
    def _swap_out(self, pl_module: LightningModule) -> None:
        parameters = self._parameters(pl_module) if self._trained else {}
        for name, trained in self._trained.items():
            parameters[name].copy_(trained)
        self._trained = {}
