"""DiffusionModule: how a denoiser is trained on a tokenizer's latents, and how it samples."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ldm import path
from ldm.alignment import REPA
from ldm.compatibility import (
    DIFFUSION,
    begin_from,
    check_checkpoint,
    check_data,
    check_meaning,
    check_parts,
    check_untrained,
)
from ldm.condition import Conditioning, LabelMode
from ldm.drawing import Content, DrawingModule
from ldm.guidance import Guidance
from ldm.metrics import LossByTime
from ldm.models.denoiser import Denoiser
from ldm.objective import block_features, denoising_errors, rehearse, weighted_sum
from ldm.pipeline import LatentDiffusion, class_labels
from ldm.samplers import Sampler
from ldm.skipping import SkippedSteps
from ldm.text_checks import check_prompts
from vfm_vae import schema
from vfm_vae.checkpoints import check_state
from vfm_vae.compilation import Compile, should_compile
from vfm_vae.contracts import VFM
from vfm_vae.data.latents import RunningStatistics
from vfm_vae.data.sampling import IndexedNoise, seed_of
from vfm_vae.images import Rounding, from_uint8
from vfm_vae.joined import join, matrices_of, number_as_in, rates
from vfm_vae.lightning_private import has_trainer, logs_now, undeclared
from vfm_vae.metrics.reconstruction import MeanOverImages
from vfm_vae.optimization import ClipShare, check_trainer, log_where_due, try_optimizers
from vfm_vae.options import at_least, within
from vfm_vae.schedules import SCHEDULES, check_schedules, kinds_of, try_schedules, with_schedules
from vfm_vae.timeline import log_by_images
from vfm_vae.tokenizer import FrozenTokenizer
from vfm_vae.types import Batch, LatentBatch
from vfm_vae.vfm import check_source


class DiffusionModule(DrawingModule):
    """Trains a denoiser by flow matching, on cached latents or on images that a frozen tokenizer encodes.

    Args:
        model: The denoiser to train.
        optimizer: Optimizer of the denoiser.
        matrix_optimizer: Optimizer of the matrices within the denoiser's blocks, such as `torch.optim.Muon`; all other
            weights are left to `optimizer`. Null leaves it all weights.
        sampler: Draws latents from noise in validation and prediction; null for the default, Euler.
        guidance: How samples are guided, by `Guidance` (classifier-free), `Autoguidance` or `InternalGuidance`; null
            for no guidance.
        tokenizer: Decodes samples, and encodes images if the data has no latents; null if neither is needed.
        times: Distribution of training times: `uniform`, or `lognormal` to favour the middle of the path.
        cosine_weight: Weight of the velocity's cosine error, which is added to its squared error.
        base_weight: Weight of the whole loss of the internal head's velocity, where the denoiser has such a head
            (`base_depth`).
        alignment: Aligns the denoiser's features to a VFM's; null for no alignment.
        label_drop: Fraction of training labels (or other conditions) that are dropped, so that samples can be guided.
        label_mode: How samples' classes are chosen: `random`, as for published numbers, or `balanced`, equally many of
            each.
        conditioning: Where the denoiser's conditions come from; null for class labels, which `label_mode` chooses for
            samples. A conditioning that is given chooses by itself, such as `ClassLabels` by its `mode`.
        shift: Warps the times of training and validation: below 1 there are more near noise. `auto` takes
            `sqrt(4096 / (C·h·w))` for latents of that shape, null is no shift. Published shifts of noise
            levels, as RAE's 6.93, are 1 / shift. The sampler has a `shift` of its own.
        lr_scheduler: Changes the learning rates after every step, such as `vfm_vae.schedules.WarmupDecay`; null for
            constant ones.
        predict: What prediction returns: decoded `images`, or `latents`.
        rounding: How samples are converted to 8 bits: `round` to the nearest level, or `truncate` as for published
            numbers.
        statistics_images: How many training images the statistics for normalizing latents are computed from, if the
            data is images.
        init_from: Checkpoint whose weights training starts from, averaged ones if it has them. Its optimizer and
            counters are not used.
        torch_compile: Whether to compile the denoiser's blocks; `auto` compiles on GPUs unless the model is small.
        seed: Seed of all random numbers in training, and of samples.

    Raises:
        ValueError: if an option lies outside its range, or does not fit another.
    """

    flops_per_batch: float | None = None  # counted by callbacks.throughput.Throughput, in `rehearse`

    def __init__(
        self,
        model: Denoiser,
        optimizer: OptimizerCallable,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        tokenizer: FrozenTokenizer | None = None,
        times: path.Times = "lognormal",
        cosine_weight: float = 1.0,
        alignment: REPA | None = None,
        label_drop: float = 0.1,
        label_mode: LabelMode = "random",
        predict: Content = "images",
        rounding: Rounding = "round",
        statistics_images: int = 10_000,
        init_from: str | None = None,
        torch_compile: Compile = "auto",
        seed: int = 0,
        conditioning: Conditioning | None = None,
        shift: path.Shift = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        matrix_optimizer: OptimizerCallable | None = None,
        base_weight: float = 1.0,
    ):
        if conditioning is not None and label_mode != "random":
            raise ValueError(
                f"model.label_mode: {label_mode!r} would change nothing, as model.conditioning chooses what samples "
                "are drawn for; leave it at 'random', and set the choice there"
            )
        pipeline = LatentDiffusion(model, sampler, guidance, conditioning or class_labels(model, label_mode))
        super().__init__(pipeline, tokenizer, predict, rounding, seed)
        path.check_shift(shift)
        at_least(0, cosine_weight=cosine_weight, base_weight=base_weight)
        at_least(1, statistics_images=statistics_images)
        within(0, 1, label_drop=label_drop)
        try_optimizers(optimizer=optimizer)
        self.schedules = try_schedules(lr_scheduler=(lr_scheduler, optimizer))
        try_optimizers(1, 1, matrix_optimizer=matrix_optimizer)
        pipeline.guidance.check_model(model)
        self.optimizer, self.matrix_optimizer = optimizer, matrix_optimizer
        self.times: path.Times = times
        self.shift = path.shift_for(shift, model.latent_shape)
        self.alignment = alignment
        self.weights = {"mse": 1.0, "cosine": cosine_weight} | (alignment.weights if alignment else {})
        self.weights |= {"base": base_weight} if model.base_depth else {}
        self.label_drop = label_drop
        self.statistics_images = statistics_images
        self.init_from = init_from
        self.torch_compile: Compile = torch_compile
        self.skipped, self.clip_share = SkippedSteps(), ClipShare("train/clip_share")
        self.train_loss_by_time, self.val_loss_by_time = LossByTime(), LossByTime()
        self.val_loss = MeanOverImages()
        self._losses: dict[str, Tensor] = {}
        self._grad_norm = torch.zeros(())
        check_parts(model, alignment, tokenizer)
        if matrix_optimizer is not None and not matrices_of(model.blocks):
            raise ValueError(f"matrix_optimizer: {type(model).__name__} has no matrices in its blocks; leave it null")

    # Training

    def training_step(self, batch: Batch | LatentBatch, batch_idx: int) -> Tensor:
        """One step of flow matching with velocity direction loss (LightningDiT, section 3)."""
        torch.manual_seed(seed_of(self.seed, self.global_rank, self.images_seen))  # a resumed run draws the same
        latents, features = self._latents(batch), self._features(batch)  # [B, C, h, w], [B, 1 + N, D]
        noise = torch.randn_like(latents)
        t = path.times(self.times, torch.randn(len(noise), device=noise.device), self.shift)  # [B]
        dropped = torch.rand(len(noise), device=noise.device) < self.label_drop
        condition = self.conditioning.of_batch(batch).drop(dropped)
        noise_token = torch.randn(len(noise), self.model.cls_channels, device=noise.device)  # empty without one
        state, noise = self._state(latents, features), self.model.join(noise, noise_token)

        errors = denoising_errors(self.model, self.alignment, state, features, noise, t, condition, self.weights)
        loss = weighted_sum(self.weights, {name: error.mean() for name, error in errors.items()})

        self.images_seen += len(t) * self.trainer.world_size
        self.train_loss_by_time.update(errors["mse"], t)
        self._losses = {"train/loss": loss.detach()}
        self._losses |= {f"train/loss_{name}": error.detach().mean() for name, error in errors.items()}
        return loss

    def _features(self, batch: Batch | LatentBatch) -> Tensor | None:
        """The VFM's features of a batch, where the denoiser is aligned to them."""
        return None if self.alignment is None else self.alignment.features(batch)

    def _state(self, latents: Tensor, features: Tensor | None) -> Tensor:
        """The state to diffuse: normalised latents, with the VFM's class token if the denoiser has one."""
        token = features[:, 0] if features is not None and self.model.cls_channels else None
        return self.model.join(self.normalization(latents), token)

    def _latents(self, batch: Batch | LatentBatch, noise: Tensor | None = None) -> Tensor:
        """Latents of a batch as the tokenizer gives them, a sample of the posterior where it holds images."""
        if isinstance(batch, LatentBatch):
            return batch.latents
        assert self.tokenizer is not None  # `check_images` has seen to it
        return self.tokenizer.encode(from_uint8(batch.images)).sample(noise)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leaves out a step whose gradients are not finite, all ranks having the same ones, and logs where it is time.

        Raises:
            ValueError: where a step logs, if none of the last 100 was taken.
        """
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self._grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.skipped.judge(optimizer, self._grad_norm)
        self.clip_share.note(self._grad_norm, self.trainer.gradient_clip_val, ~self._grad_norm.isfinite())
        if logs_now(self.trainer):
            numbers = self._losses | {"train/grad_norm": self._grad_norm, "train/skipped_steps": self.skipped.total}
            log_where_due(self, numbers | rates(optimizer) | self.clip_share.taken(), shown="train/loss")
            self.skipped.check()

    @property
    def skipped_steps(self) -> int:
        """Steps that were left out because a gradient was not finite; asking waits for the device."""
        return int(self.skipped.total)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, *_: Any, **__: Any
    ) -> None:
        """Clips by the norm that is known already; Lightning's way would refuse fused optimisers under bf16-mixed.

        A norm that is not finite spoils gradients of a step that is left out anyway.
        """
        if gradient_clip_val:  # 0 is off, too
            clip_grads_with_norm_(self.model.parameters(), gradient_clip_val, self._grad_norm)

    def rehearse(self, batch: Batch | LatentBatch) -> bool:
        """Runs a step on the meta device, where its operations can be counted; returns whether that is possible."""
        if isinstance(batch, LatentBatch):
            rehearse(self.model, self.alignment, self.conditioning.of_batch(batch))
        return isinstance(batch, LatentBatch)

    def on_train_epoch_end(self) -> None:
        """Logs the losses by time."""
        self.log_dict(self.train_loss_by_time.named("train"), rank_zero_only=False)
        self.train_loss_by_time.reset()

    # Evaluation

    def on_validation_start(self) -> None:
        """Checks that latents can be normalised.

        Raises:
            ValueError: if neither data nor a checkpoint brought their statistics.
        """
        if not self.normalization.is_known:
            raise ValueError("ckpt_path: the statistics of latents are unknown without a checkpoint; give one")

    on_test_start = on_validation_start

    def validation_step(self, batch: Batch | LatentBatch, batch_idx: int) -> None:
        """Measures the loss at one time for each latent, always the same."""
        numbers = IndexedNoise("validation", self.seed, batch.index, self.device)
        shape = self.model.latent_shape
        t, noise = path.times(self.times, numbers.normal(), self.shift), numbers.normal(*shape)
        features = self._features(batch)
        state = self._state(self._latents(batch, numbers.normal(*shape)), features)
        noise = self.model.join(noise, numbers.normal(self.model.cls_channels))
        condition = self.conditioning.of_batch(batch)
        errors = denoising_errors(self.model, self.alignment, state, features, noise, t, condition, self.weights)
        self.val_loss.update(weighted_sum(self.weights, errors)[batch.real])
        self.val_loss_by_time.update(errors["mse"][batch.real], t[batch.real])

    def test_step(self, batch: Batch | LatentBatch, batch_idx: int) -> None:
        """Measures the loss, but where the batch only numbers samples, which the callbacks look at."""
        if isinstance(batch, LatentBatch) or batch.has_images:
            self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs over all ranks, unless there was nothing but numbers of samples."""
        stage = "test" if self.trainer.testing else "val"
        if stage == "test" and getattr(undeclared(self.trainer).datamodule, "samples", None) is not None:
            return
        values = {f"{stage}/loss": self.val_loss.compute()} | self.val_loss_by_time.named(stage)
        self.log_dict(values, rank_zero_only=False)
        with torch.inference_mode(False):  # or training after `validate` could not go on with these states
            self.val_loss.reset()
            self.val_loss_by_time.reset()

    on_test_epoch_end = on_validation_epoch_end

    @property
    def vfm(self) -> VFM | None:
        """The VFM that is at hand: the tokenizer's, or the one that the denoiser is aligned to."""
        vfm = None if self.tokenizer is None else self.tokenizer.network.vfm
        return self.alignment.vfm if vfm is None and self.alignment is not None else vfm

    @torch.no_grad()
    def alignment_features(self, batch: Batch | LatentBatch, time: float | None = None) -> dict[str, Tensor]:
        """Patch tokens after every block, averaged, `[B, D]`, as `block_01`, `block_02` and so on.

        Args:
            batch: Latents or images.
            time: Time of the noisy latents, 0 to 1; 0.5 if not given.
        """
        noise = IndexedNoise("alignment", self.seed, batch.index, self.device)
        latents = self._latents(batch, noise.normal(*self.model.latent_shape))
        state = self._state(latents, self._features(batch) if self.model.cls_channels else None)
        condition = self.conditioning.null_of_batch(batch)
        features = block_features(self.model, state, condition, noise, 0.5 if time is None else time)
        return {f"block_{number:02d}": values for number, values in enumerate(features, start=1)}

    # Optimiser, data, checkpoints

    def configure_optimizers(self) -> Any:
        """The denoiser's, and the schedule of its learning rates."""
        model = self.model
        optimizer = join(model.parameters(), self.optimizer, matrices_of(model.blocks), self.matrix_optimizer)
        self.skipped.watch(optimizer)
        return with_schedules(self.schedules, lr_scheduler=optimizer) if self.schedules else optimizer

    def configure_model(self) -> None:
        """Shards the denoiser over the ranks, block by block, where a ModelParallelStrategy has a mesh for that."""
        if self.device_mesh is not None:
            self.model.shard(self.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Checks that data, tokenizer and denoiser fit each other, before anything is computed; compiles."""
        check_trainer(self.trainer)
        log_by_images(self.trainer)
        if stage == "fit":
            if self.alignment is not None and self.alignment.vfm is not None:
                check_source(self.alignment.vfm)
            self.pipeline.described()  # what can't be described must not fail only when the first checkpoint is written
        if self.trainer.gradient_clip_algorithm == "value":
            raise ValueError("trainer.gradient_clip_algorithm: only 'norm' is supported")
        if should_compile(self.torch_compile, self.trainer.strategy.root_device, self.model):
            self.model.compile_regions()
            if self.tokenizer is not None:
                self.tokenizer.compile_regions()
            self.pipeline.guidance.compile_regions()
        data, pipeline = undeclared(self.trainer).datamodule, self.pipeline
        if data is not None and stage in ("test", "predict"):
            check_prompts(data, self.conditioning)
        if stage != "predict" and data is not None:
            known, conditioning = pipeline.latent_source, self.conditioning
            pipeline.latent_source = check_data(data, self.model, self.tokenizer, self.alignment, known, conditioning)
            if data.latent_statistics is not None and not self.normalization.is_known:
                self.normalization.take(data.latent_statistics)
            if stage == "fit" and self.init_from is not None and self.trainer.ckpt_path is None:
                known = pipeline.latent_source
                pipeline.latent_source = begin_from(self.init_from, self, known, self.normalization, conditioning)
        pipeline.guidance.prepare(pipeline)

    def on_fit_start(self) -> None:
        """Checks that all classes are trained; measures the latents' statistics if they are unknown."""
        if undeclared(self.trainer).datamodule is not None:
            begins = self.init_from is None and self.trainer.ckpt_path is None
            check_untrained(undeclared(self.trainer).datamodule, self.num_classes, begins)
        if not self.normalization.is_known:
            self._measure_latents()
            self.pipeline.guidance.prepare(self.pipeline)  # whose partner has statistics of its own

    @torch.no_grad()
    def _measure_latents(self) -> None:
        """Measures statistics on `statistics_images` training images, spread over the data set and all ranks."""
        running, strategy = RunningStatistics(self.model.in_channels, self.device), self.trainer.strategy
        for batch in undeclared(self.trainer).datamodule.spread_dataloader(self.statistics_images):
            batch = strategy.batch_to_device(batch, self.device)
            noise = IndexedNoise("posterior", self.seed, batch.index, self.device)
            running.add(self._latents(batch, noise.normal(*self.model.latent_shape))[batch.real])
        running.sums = strategy.reduce(running.sums, reduce_op="sum")
        self.normalization.take(running.compute())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds how to make the model again, counters, whose latents these are, and to which VFM it is aligned."""
        schema.write(
            checkpoint,
            DIFFUSION,
            self.pipeline.described(),
            images_seen=self.images_seen,
            skipped_steps=self.skipped_steps,
            clip_share=self.clip_share.state(),
            tokenizer=self.pipeline.latent_source,
            aligned_to=None if self.alignment is None else self.alignment.identity(),
            **{SCHEDULES: kinds_of(self.schedules)},
        )
        if states := checkpoint.get("optimizer_states"):
            number_as_in(self, self.trainer.optimizers[0], states[0])

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Restores them.

        Raises:
            ValueError: if the checkpoint is of another model, belongs to another tokenizer's latents than the data or
                the tokenizer at hand, or to another text encoder, or was aligned to another VFM.
        """
        stored = schema.take(checkpoint, DIFFUSION, "ckpt_path: the checkpoint")
        known = self.pipeline.latent_source
        check_checkpoint(stored, known, self.normalization, self.conditioning, "ckpt_path")
        check_state(self, checkpoint, "ckpt_path")
        check_meaning(stored, self.model, "ckpt_path")
        if has_trainer(self) and self.trainer.state.fn == TrainerFn.FITTING:
            check_schedules(self.schedules, checkpoint)
        if self.alignment is not None:
            self.alignment.go_on_as(checkpoint.get("aligned_to"))
        self.images_seen = stored.images_seen
        self.skipped.total = torch.tensor(checkpoint["skipped_steps"])
        self.clip_share.go_on(checkpoint.get("clip_share"))
        self.pipeline.latent_source = self.pipeline.latent_source or checkpoint["tokenizer"]
