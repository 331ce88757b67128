"""TokenizerModule, which trains a tokenizer, stage by stage."""

from collections.abc import Mapping
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from vfm_vae import schema
from vfm_vae.checkpoints import check_state
from vfm_vae.compilation import Compile, should_compile
from vfm_vae.contracts import VFM, MeasuresLatents, Tokenizer, WeightAverage
from vfm_vae.data.sampling import seed_of
from vfm_vae.derived import fill, options_of, shape_of
from vfm_vae.discriminators.patchgan import PatchGAN
from vfm_vae.discriminators.projected import ProjectedDiscriminator
from vfm_vae.gan_losses import GANLosses, check_opponents
from vfm_vae.images import Rounding, from_uint8
from vfm_vae.lightning_private import has_trainer, logs_now, undeclared
from vfm_vae.losses.alignment import settle
from vfm_vae.losses.guard import NonFiniteGuard
from vfm_vae.losses.objective import Objective
from vfm_vae.metrics.reconstruction import PSNR, ReconstructionMetrics
from vfm_vae.modules.equivariance import EquivarianceRegularizer, Transform
from vfm_vae.modules.latent_noise import noised
from vfm_vae.optimization import check_trainer, log_where_due, try_optimizers
from vfm_vae.options import at_least
from vfm_vae.reconstructing import Reconstructing
from vfm_vae.schedules import SCHEDULES, check_schedules, kinds_of, try_schedules, with_schedules
from vfm_vae.schema import TOKENIZER
from vfm_vae.stages import begin, check_optimizers, freeze_all_but, measure_latents, read_stage
from vfm_vae.timeline import log_by_images
from vfm_vae.two_players import TwoPlayers
from vfm_vae.types import Batch, Decoded, Posterior, VFMFeatures
from vfm_vae.vfm import check_source, check_vfm, vfm_identity

OPPONENTS = ("discriminator.", "patchgan.")
PASSING = (*OPPONENTS, "model.alignment.")  # what one stage may have and another not, by the beginnings of names


class Reconstruction(NamedTuple):
    """What the generator makes of a batch.

    Attributes:
        features: The VFM's, where the tokenizer has one.
        posterior: The posterior of the untransformed images.
        z: Latents drawn from it, `[B, C, h, w]`.
        decoded: The decoder's images.
        target: What they should be, `[B, 3, H, W]` in [-1, 1].
    """

    features: VFMFeatures | None
    posterior: Posterior
    z: Tensor
    decoded: Decoded
    target: Tensor


class TokenizerModule(TwoPlayers, Reconstructing):
    """Trains a tokenizer against one discriminator or two, or against none.

    Args:
        model: The tokenizer to train.
        discriminator: The discriminator that it is trained against; null for none, or for a PatchGAN alone.
        objective: The tokenizer's losses.
        optimizer: Optimizer of the tokenizer; in a VFMVAE, adapter and decoder are trained.
        discriminator_optimizer: Optimizer of the discriminators; null where there are none.
        patchgan: A discriminator of patches, beside the other one or alone. The same optimizer trains both.
        equivariance: Transforms latents or input images in training; null for no transforms.
        guard: Skips training steps that would ruin the weights; null takes every step.
        max_images: Training stops after so many images, counted over all stages; -1 for no limit.
        init_from: Checkpoint of the previous stage. Training continues from its weights, averages and image counter;
            optimizers start fresh.
        train_only: Names of the parts to train, such as `decoder` or `decoder.blocks.5`; null trains all. The other
            parts take the previous stage's averaged weights and keep them, so that latents stay the same when only the
            decoder is trained.
        torch_compile: Whether to compile the tokenizer's layers; `auto` compiles on GPUs unless the model is small.
        evaluate: Which latents evaluation decodes: the posterior's `mode`, or a `sample` as for published numbers.
        rounding: How reconstructions are converted to 8 bits before they are measured: `round` to the nearest level, or
            `truncate` as for published numbers.
        predict: What prediction returns: `reconstructions`; `latents`, a sample of the posterior for each image and for
            its mirror image; or `moments`, the posterior's mean and standard deviation.
        features: A VFM whose features are cached beside the latents, for diffusion models that are aligned to it.
        seed: Seed of all random numbers in training.
        accumulate_grad_batches: Number of batches whose gradients make one step. Leave it at 1 with
            `data.micro_batch_size`, which sets it.
        gradient_clip_val: Gradients of the tokenizer and of the discriminators are clipped to this norm; null or 0 for
            no clipping.
        order: How tokenizer and discriminators take turns. `simultaneous`: both learn from the same forward pass, first
            the tokenizer. `published`: the discriminators learn first, from a forward pass and random draws of their
            own; the tokenizer then learns from a second one.
        latent_noise: Largest standard deviation of the noise on the latents that the decoder sees in training, in their
            own units; each image's is drawn between 0 and this. Losses on latents see them without noise.
        discriminate_from: The discriminators learn after so many training images, over all stages; null for
            `objective.adversarial_from`, so that tokenizer and discriminators begin the game together.
        lr_scheduler: Changes the learning rate of `optimizer` after every step, such as
            `vfm_vae.schedules.WarmupDecay`; null for a constant rate. It counts the steps of this stage.
        discriminator_lr_scheduler: Changes that of `discriminator_optimizer`, counting the discriminators' own steps;
            null for a constant rate.

    Raises:
        ValueError: if an option lies outside its range, or does not fit another.

    Attributes:
        images_seen: How many images were trained on, over all ranks and stages.
    """

    flops_per_batch: float | None = None  # counted by callbacks.throughput.Throughput

    def __init__(
        self,
        model: Tokenizer,
        discriminator: ProjectedDiscriminator | None,
        objective: Objective,
        optimizer: OptimizerCallable,
        discriminator_optimizer: OptimizerCallable | None,
        patchgan: PatchGAN | None = None,
        equivariance: EquivarianceRegularizer | None = None,
        guard: NonFiniteGuard | None = None,
        max_images: int = -1,
        init_from: str | None = None,
        train_only: list[str] | None = None,
        torch_compile: Compile = "auto",
        evaluate: Literal["mode", "sample"] = "mode",
        rounding: Rounding = "round",
        predict: Literal["reconstructions", "latents", "moments"] = "reconstructions",
        seed: int = 0,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        features: VFM | None = None,
        order: Literal["simultaneous", "published"] = "simultaneous",
        latent_noise: float = 0.0,
        discriminate_from: int | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        discriminator_lr_scheduler: LRSchedulerCallable | None = None,
    ):
        super().__init__(guard, accumulate_grad_batches, gradient_clip_val)
        at_least(-1, max_images=max_images)
        at_least(0, seed=seed, latent_noise=latent_noise, discriminate_from=discriminate_from)
        try_optimizers(optimizer=optimizer, discriminator_optimizer=discriminator_optimizer)
        self.schedules = try_schedules(
            lr_scheduler=(lr_scheduler, optimizer),
            discriminator_lr_scheduler=(discriminator_lr_scheduler, discriminator_optimizer),
        )
        check_opponents(objective, discriminator, patchgan, discriminator_optimizer is not None, discriminate_from)
        if order not in ("simultaneous", "published"):
            raise ValueError(f"order: 'simultaneous' or 'published', given {order!r}")
        if features is not None and predict != "moments":
            raise ValueError(f"model.predict: features are cached only with 'moments', given {predict!r}")
        self.model = model
        freeze_all_but(self.model, train_only)
        objective.check_tokenizer(model)
        self.discriminator, self.patchgan = discriminator, patchgan
        self.objective = objective
        self.optimizer, self.discriminator_optimizer = optimizer, discriminator_optimizer
        self.equivariance = equivariance or EquivarianceRegularizer(probability=0.0, prior_probability=0.0)
        self.order, self.latent_noise = order, latent_noise
        self.discriminate_from = objective.adversarial_from if discriminate_from is None else discriminate_from
        self.max_images = max_images
        self.init_from = init_from
        self.torch_compile = torch_compile
        self.evaluate, self.rounding = evaluate, rounding
        self.predict, self.features = predict, features
        self.seed = seed
        self.interpolation = model.interpolation
        self._waiting: list[tuple[Tensor, int]] = []  # batches that the generator is still to learn from
        self._terms: dict[str, dict[str, Tensor]] = {}  # of each player's last turn
        self._average: Mapping[str, Any] | None = None
        perceptual = objective.perceptual_loss
        self.val_metrics = ReconstructionMetrics({perceptual.name: perceptual} if perceptual is not None else None)
        self.val_thumbnail = PSNR()

    @classmethod
    def complete(cls, init_args: Mapping[str, Any]) -> dict[str, Any]:
        """Lets the discriminator resize images as the tokenizer's VFM has its targets, see `vfm_vae.derived`."""
        opponent = init_args.get("discriminator")
        shape = None
        if options_of(opponent).get("interpolation", "its own") is None:
            shape = shape_of(options_of(init_args["model"]).get("vfm"))
        if shape is None:
            return dict(init_args)
        return {**init_args, "discriminator": fill(opponent, interpolation=shape.target_interpolation)}

    # Training

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step of both players (VFM-VAE, section 3.4)."""
        # A function of seed, rank and images seen, so that a resumed run draws the same.
        torch.manual_seed(seed_of(self.seed, self.global_rank, self.images_seen))
        step_ends = self.completes_step(batch_idx)
        if self.order == "simultaneous":
            made = self._reconstruct(batch.images, self._draw(batch.images, self.images_seen))
            gan = GANLosses(self.discriminator, self.patchgan, made.target)
            self._train_generator(made, gan, step_ends)
            if self._opponents_learn():
                self._train_discriminators(made, gan, step_ends)
        else:
            self._take_turns(batch.images, step_ends)
        self.finish_batch(len(batch.images), step_ends)
        self._log_step()

    def _take_turns(self, images: Tensor, step_ends: bool) -> None:
        """The published order: the generator waits until the discriminators have learnt from all batches of a step."""
        if self._opponents_learn():
            with torch.no_grad():
                made = self._reconstruct(images, self._draw(images, self.images_seen, "discriminator"))
            self._train_discriminators(made, GANLosses(self.discriminator, self.patchgan, made.target), step_ends)
        self._waiting.append((images, self.images_seen))
        while step_ends and self._waiting:
            images, images_seen = self._waiting.pop(0)
            made = self._reconstruct(images, self._draw(images, images_seen, "generator"))
            self._train_generator(made, GANLosses(self.discriminator, self.patchgan, made.target), not self._waiting)

    def _opponents_learn(self) -> bool:
        """Whether there are discriminators, and they learn by now."""
        return bool(self._trained()[1]) and self.images_seen >= self.discriminate_from

    def _draw(self, images: Tensor, images_seen: int, phase: str = "") -> Transform:
        """This rank's transform of a batch."""
        grid = [side // self.model.compression for side in images.shape[2:]]
        multiple = self.model.side_multiple
        return self.equivariance.draw(images_seen, grid, rank=self.global_rank, phase=phase, side_multiple=multiple)

    def _reconstruct(self, images: Tensor, transform: Transform) -> Reconstruction:
        """Encodes uint8 images `[B, 3, H, W]`, and decodes a transformed sample of their latents."""
        images = transform.shrink(from_uint8(images), self.interpolation)
        posterior, features = self.model.encode_with_features(images)
        z = posterior.sample()  # [B, C, h, w]
        # Noised when transformed: so it is as strong, and as white, whatever the transform.
        decoded = self.model.decode(noised(transform.latent(z), self.latent_noise))
        return Reconstruction(features, posterior, z, decoded, transform.image(images, self.interpolation))

    def _train_generator(self, made: Reconstruction, gan: GANLosses, step_ends: bool) -> None:
        """Reconstruction, alignment and prior against the discriminators as they are."""
        decoded = made.decoded
        rec = self.objective.reconstruction(decoded, made.target, self.interpolation, self.images_seen)
        total = settle(self.objective.total(rec), [decoded.image, *decoded.multiscale])  # two passes follow
        latent, scalars = self.objective.latent(made.posterior, made.z, made.features, self.model, total)
        plays = self.images_seen >= self.objective.adversarial_from
        against = gan.generator_terms(decoded.image, alone=self.order == "published") if plays else {}
        balanced, ratios = self.objective.balanced(against, decoded.image, self.model, total)
        self.judge(reconstruction=rec, adversarial=against, others=latent | ratios)
        self.learn(self.GENERATOR, total + self.objective.total(latent | balanced), step_ends)
        self._remember("generator", rec | latent | against, scalars | ratios)

    def _train_discriminators(self, made: Reconstruction, gan: GANLosses, step_ends: bool) -> None:
        """Telling reconstructions, through which no gradient goes, from their targets."""
        terms = gan.discriminator_terms(made.decoded.image)
        self.judge(adversarial=terms)
        self.learn(self.DISCRIMINATOR, reduce(torch.add, terms.values()), step_ends)
        self._remember("discriminators", terms, gan.logits)

    def _remember(self, player: str, losses: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
        terms = {f"train/loss_{name}": loss.detach() for name, loss in losses.items()}
        self._terms[player] = terms | {f"train/{name}": value for name, value in others.items()}

    def _log_step(self) -> None:
        if logs_now(self.trainer):
            numbers: dict[str, Tensor | float] = {"train/loss_l1": 0.0}
            numbers |= self._terms.get("generator", {}) | self._terms.get("discriminators", {})
            log_where_due(self, numbers | self.numbers_of_steps(), shown="train/loss_l1")
            self.guard.check()

    def on_train_batch_end(self, *_: Any) -> None:
        """Ends training once `max_images` were seen; Lightning then validates and saves once more."""
        self._stop_when_done()

    def _stop_when_done(self) -> None:
        if 0 <= self.max_images <= self.images_seen:
            self.trainer.should_stop = True

    # Optimisers, stages, checkpoints

    def configure_optimizers(self) -> Any:
        """The generator's optimiser, then the discriminators' where there are any; and schedules of their rates."""
        generator, opponents = self._trained()
        optimizers = {"lr_scheduler": self.optimizer(generator)}
        if opponents:
            assert self.discriminator_optimizer is not None  # `check_opponents` was asked
            optimizers["discriminator_lr_scheduler"] = self.discriminator_optimizer(opponents)
        return with_schedules(self.schedules, **optimizers) if self.schedules else list(optimizers.values())

    def _trained(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What trains of the generator, and the discriminators' parameters."""
        generator = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        opponents = [part for part in (self.discriminator, self.patchgan) if part is not None]
        return generator, [parameter for part in opponents for parameter in part.parameters()]

    def setup(self, stage: str) -> None:
        """Checks that the images fit; starts from the previous stage, unless a run of this stage is resumed.

        Raises:
            ValueError: if samples are to be drawn in the place of images, among others.
        """
        check_trainer(self.trainer)
        log_by_images(self.trainer)
        if stage == "fit":
            if self.vfm is not None:
                check_source(self.vfm)
            self.model.described()  # what can't be described must not fail only when the first checkpoint is written
        data = undeclared(self.trainer).datamodule
        if stage in ("test", "predict") and getattr(data, "samples", None) is not None:
            raise ValueError("data.num_samples, data.prompts: a tokenizer draws no samples; leave them out")
        image_size = getattr(data, "image_size", None)
        if image_size is not None:
            self.model.check_image_size(image_size)
        device = self.trainer.strategy.root_device
        if device.type == "cuda" and self.vfm is not None:
            self.vfm.hold_products_in(torch.bfloat16)  # in which it runs there
        if should_compile(self.torch_compile, device, self.model):
            self.model.compile_regions()
            if stage == "fit" and self.discriminator is not None:
                self.discriminator.compile_regions()
        if stage == "fit":
            if self.trainer.precision == "bf16-mixed" and self.discriminator is not None:
                self.discriminator.backbone.hold_products_in(torch.bfloat16)
            if self.init_from is not None and self.trainer.ckpt_path is None:
                self._begin_from(self.init_from)

    def _begin_from(self, path: str) -> None:
        """Carries over weights, discriminator, averages and the image counter; optimisers start fresh."""
        stored = read_stage(path, self.vfm, encodes=getattr(self.model, "encodes_with_vfm", True))
        self._average = begin(self, stored, passing=PASSING)
        self.images_seen = stored.images_seen

    def on_fit_start(self) -> None:
        """Hands the former stage's averages to whoever averages; a finished stage that is resumed ends here."""
        self._waiting, self._refused = [], None  # of a run that was cut short amid a step
        average, self._average = self._average, None
        for callback in undeclared(self.trainer).callbacks:
            if average is not None and isinstance(callback, WeightAverage):
                callback.load_average(average)
        begins = self.images_seen == 0 and self.init_from is None
        if begins and isinstance(self.model, MeasuresLatents) and self.model.statistics_images:
            measure_latents(self.model, self.trainer)
        self._stop_when_done()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds how to make the model again, the image counter, the guard's memory, and which VFM it belongs to."""
        schema.write(
            checkpoint,
            TOKENIZER,
            self.model.described(),
            images_seen=self.images_seen,
            guard=self.guard.state_dict(),
            clip_shares=[share.state() for share in self.clip_shares],
            alignment=self.objective.progress(),
            vfm=vfm_identity(self.vfm),
            **{SCHEDULES: kinds_of(self.schedules)},
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores them.

        Evaluation asks nothing of discriminators, which published weights may lack.

        Raises:
            ValueError: if the weights are of another model or VFM, or training is to go on and lacks optimisers.
        """
        stored = schema.take(checkpoint, TOKENIZER, "ckpt_path: the checkpoint")
        check_vfm(self.vfm, checkpoint)
        self._average = None  # a run that goes on has averages of its own
        fitting = has_trainer(self) and self.trainer.state.fn == TrainerFn.FITTING
        if fitting:
            check_optimizers(self._trained(), checkpoint)
            check_schedules(self.schedules, checkpoint)
        if not fitting:
            state = {n: w for n, w in checkpoint["state_dict"].items() if not n.startswith(OPPONENTS)}
            checkpoint["state_dict"] = state | {n: w for n, w in self.state_dict().items() if n.startswith(OPPONENTS)}
        check_state(self, checkpoint, "ckpt_path")
        self.images_seen = stored.images_seen
        self.guard.load_state_dict(checkpoint["guard"])
        for share, state in zip(self.clip_shares, checkpoint.get("clip_shares", ()), strict=False):
            share.go_on(state)
        self.objective.go_on(checkpoint.get("alignment", {}))
