"""Two whole training steps of the public implementation, by TokenizerModule in the published order, in float32."""

import copy
import json
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from reference import DATA, load_reference
from torch import Tensor, nn

from vfm_vae.description import class_path
from vfm_vae.discriminators import projected
from vfm_vae.discriminators.projected import ProjectedDiscriminator
from vfm_vae.losses.objective import Objective
from vfm_vae.module import TokenizerModule
from vfm_vae.modules.posterior import DiagonalGaussian
from vfm_vae.published import opponents_from_published, tokenizer_from_published, tokenizer_to_published
from vfm_vae.published_files import to_published
from vfm_vae.published_names import discriminator_names
from vfm_vae.tokenizer import VFMVAE
from vfm_vae.types import Batch, VFMFeatures
from vfm_vae.vit import create_vit

TENSORS = load_reference("step_a")
INFO = json.loads((DATA / "step_a.json").read_text())
STEPS = range(2)
NOISE = 1e-5  # gradients up to this norm are rounding noise, which Adam without momentum scales up to whole steps
LOSSES = {
    "D": {"real_loss": "loss_discriminator_real", "gen_loss": "loss_discriminator_generated"}
    | {"real_scores": "logits_real", "fake_scores": "logits_generated"},
    "G": {"l1_pixel_loss": "loss_l1", "l2_pixel_loss": "loss_l2", "ssim_loss": "loss_ssim"}
    | {"multiscale_pixel_loss": "loss_multi_resolution", "loss": "loss_adversarial", "vf_loss": "alignment"}
    | {"kl_loss": "loss_kl"},
}


def select(prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in TENSORS.items() if name.startswith(prefix)}


def norms(step: int, player: str, kind: str) -> dict[str, float]:
    """Published norms by the parameter's name."""
    return dict(zip(INFO["parameters"][player], TENSORS[f"step{step}/{player}/{kind}"].tolist(), strict=True))


class GivenFeatures(nn.Module):
    """Stands for the VFM: the features of each forward, one after the other."""

    target_interpolation = "bilinear"

    def __init__(self, features: Iterable[VFMFeatures]):
        super().__init__()
        self._features = iter(features)

    def forward(self, images: Tensor) -> VFMFeatures:
        return next(self._features)

    def source(self) -> dict[str, object]:
        named = {"class_path": class_path(type(self)), "name": "given", "layers": [], "fingerprint": ""}
        return named | {"features": []}


def features_of(step: int) -> VFMFeatures:
    layers = tuple(TENSORS[f"step{step}/features.{i}"] for i in range(3))
    return VFMFeatures(layers, layers[-1], layers[-1].mean(1), (8, 8))


class Norms:
    """Norms of gradients and of changes of one player, step by step, under published names."""

    def __init__(self, published: Callable[[dict[str, Tensor]], dict[str, Tensor]]):
        self.published = published
        self.module: nn.Module | None = None
        self.gradients: list[dict[str, Tensor]] = []
        self.changes: list[dict[str, Tensor]] = []
        self._before: dict[str, Tensor] = {}

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Adam:
        """Adam as published, watched."""
        optimizer = torch.optim.Adam(parameters, **INFO["optimizer"])
        optimizer.register_step_pre_hook(self._look)
        optimizer.register_step_post_hook(self._compare)
        return optimizer

    def _look(self, *_: object) -> None:
        parameters = dict(self.module.named_parameters())
        self._before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.gradients.append(
            self._norms({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in parameters.items()})
        )

    def _compare(self, *_: object) -> None:
        now = self.module.named_parameters()
        self.changes.append(self._norms({name: parameter.detach() - self._before[name] for name, parameter in now}))

    def _norms(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.norm() for name, tensor in self.published(tensors).items()}


class Remember(Callback):
    """All that was logged, batch by batch."""

    def __init__(self):
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Run:
    """Both steps: what was logged, the norms of both players, and the module after."""

    def __init__(self, module: TokenizerModule, generator: Norms, discriminator: Norms):
        self.module = module
        self.norms = {"G": generator, "D": discriminator}
        generator.module, discriminator.module = module.model, module.discriminator
        remember = Remember()
        batches = [_batch(TENSORS[f"step{step}/images"]) for step in STEPS]
        silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        options = {"max_steps": 2, "log_every_n_steps": 1, "enable_checkpointing": False}
        trainer = Trainer(accelerator="cpu", devices=1, callbacks=[remember], **options, **silent)
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
        self.logged = remember.logged


def _batch(images: Tensor) -> Batch:
    """A batch of images in [0, 1]; not rounded to whole numbers, as files would be."""
    return Batch(images * 255, torch.zeros(len(images), dtype=torch.int64), torch.arange(len(images)))


def generator_state(model: VFMVAE) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors of the model's parameters under published names."""
    holder = copy.deepcopy(model)

    def published(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        holder.load_state_dict(tensors, strict=False)
        return tokenizer_to_published(holder)

    return published


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield both_steps(monkeypatch)


def both_steps(monkeypatch: pytest.MonkeyPatch) -> Run:
    model = tokenizer_from_published(select("generator/"), INFO["config"])
    generator = Norms(generator_state(model))
    model.train().vfm = GivenFeatures(features_of(step) for step in STEPS for _ in "DG")
    noises = iter([TENSORS[f"step{step}/noise_{phase}"] for step in STEPS for phase in "DG"])
    plain = DiagonalGaussian.sample
    monkeypatch.setattr(DiagonalGaussian, "sample", lambda self: plain(self, next(noises)))

    vit = create_vit("vit_small_patch16_224.dino", pretrained=False, **INFO["discriminator"]["vit"])
    vit.load_state_dict(select("discriminator/dino.model.model."))
    monkeypatch.setattr(projected, "create_vit", lambda *_, **__: vit)
    discriminator = ProjectedDiscriminator(size=64, crop_probability=0.0, augmentation=nn.Identity())
    heads = {f"heads.{name}": tensor for name, tensor in select("discriminator/heads.").items()}
    weights = opponents_from_published(heads)
    discriminator.load_state_dict({name.removeprefix("discriminator."): tensor for name, tensor in weights.items()})
    opponent = Norms(lambda tensors: to_published(tensors, discriminator_names(len(discriminator.heads)), {}))

    losses = INFO["losses"]
    objective = Objective(
        l1=losses["l1_pixel_loss_weight"],
        l2=losses["l2_pixel_loss_weight"],
        ssim=losses["ssim_loss_weight"],
        multi_resolution=losses["multiscale_pixel_loss_weights"][0],
        kl=losses["kl_loss_weight"],
        alignment=losses["vf_loss_weight"],
        adversarial=losses["stylegan_t_discriminator_loss_weight"],
    )
    module = TokenizerModule(
        model, discriminator, objective, generator.optimizer, opponent.optimizer, order="published"
    )
    return Run(module, generator, opponent)


def test_losses_and_the_adaptive_weight(run: Run):
    for step in STEPS:
        logged, published = run.logged[step], INFO["steps"][step]
        for player, prefix in (("D", "Loss/D/stylegan_t/"), ("G", "Loss/G/")):
            for name, ours in LOSSES[player].items():
                value = logged[f"train/{ours}"] * (0.1 if ours == "loss_multi_resolution" else 1)
                expected = published[player]["losses"].get(prefix + name)
                expected = published[player]["losses"]["Loss/G/stylegan_t/loss"] if expected is None else expected
                assert value == pytest.approx(expected, rel=1e-5), (step, name)
        weight = INFO["losses"]["vf_loss_weight"] * logged["train/alignment_weight"]
        assert weight == pytest.approx(published["G"]["adaptive_weight_times_5"], rel=1e-4)


@pytest.mark.parametrize("player", "GD")
def test_gradients_and_changes(run: Run, player: str):
    for step in STEPS:
        ours = run.norms[player]
        published, changes = norms(step, player, "grad_norms"), norms(step, player, "change_norms")
        compared = 0
        for name, expected in published.items():
            if expected <= NOISE:
                continue
            compared += 1
            assert ours.gradients[step][name].item() == pytest.approx(expected, rel=1e-3), (step, name)
            assert ours.changes[step][name].item() == pytest.approx(changes[name], rel=1e-3), (
                step,
                name,
            )
        assert compared > 0.7 * len(published)


def test_weights_after_both_steps(run: Run):
    state = tokenizer_to_published(run.module.model)
    heads = run.module.discriminator.state_dict()
    opponents = to_published(heads, discriminator_names(len(run.module.discriminator.heads)), {})
    gradients = [norms(step, player, "grad_norms") for step in STEPS for player in "GD"]
    small = {name for of in gradients for name, norm in of.items() if norm <= NOISE}
    after = select("after/generator/") | select("after/discriminator/")
    compared = 0
    for name, expected in after.items():
        if name in small:
            continue
        compared += 1
        before = TENSORS.get(f"generator/{name}", TENSORS.get(f"discriminator/{name}"))
        change, expected = (state | opponents)[name] - before, expected - before
        assert (change - expected).norm() <= 1e-3 * expected.norm(), name
    assert compared > 0.8 * len(after)
