"""REPA and REG: the terms themselves, on either denoiser, in training, and what does not fit."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file

from ldm.alignment import REG, REPA, alignment_error
from ldm.condition import Labels
from ldm.models.ditdh import DiTDH
from ldm.models.lightningdit import LightningDiT
from ldm.models.sit import SiT
from ldm.module import DiffusionModule
from ldm.objective import denoising_errors
from ldm.samplers import EulerMaruyama
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import STATISTICS, ShardPlan, measure_shards
from vfm_vae.tokenizer import FrozenTokenizer
from vfm_vae.types import Batch
from vfm_vae.vfm import FrozenVFM

VFM = "vit_photos_patch8_64"
WIDTH = 8  # of the features
ALIGNED = {
    "repa": {"align_channels": WIDTH, "cls_channels": 0},
    "reg": {"align_channels": WIDTH, "cls_channels": WIDTH},
}
MODELS = {
    "lightningdit": LightningDiT,
    "sit": SiT,
    "ditdh": partial(DiTDH, head_depth=1, head_width=48, head_num_heads=2),
}
every_model = pytest.mark.parametrize(
    "model", ["lightningdit", *(pytest.param(model, marks=pytest.mark.slow) for model in ("sit", "ditdh"))]
)
ALIGNMENTS = {"repa": REPA, "reg": REG}


def write_split(folder: Path, size: int) -> None:
    """Moments of latents 4x4x4 whose mean tells the class, and features that tell it, too."""
    folder.mkdir(parents=True)
    plan, generator = ShardPlan(folder, size, size), torch.Generator().manual_seed(size)
    labels = torch.arange(size) % 3
    mean = 0.3 * torch.randn(size, 4, 4, 4, generator=generator) + 2 * labels[:, None, None, None]
    features = torch.randn(3, 17, WIDTH, generator=torch.Generator().manual_seed(1))[labels]
    tensors = {"moments": torch.cat([mean, torch.full_like(mean, 0.1)], 1), "features": features.bfloat16()}
    save_file(tensors | {"labels": labels}, plan.path(0))
    measure_shards(plan).compute().write(folder / STATISTICS)


@pytest.fixture(scope="module")
def aligned_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("aligned") / "cache"
    write_split(root / "train", 48)
    write_split(root / "val", 13)
    return root


@pytest.fixture
def features(aligned_cache):
    """Builds the DataModule over the cache."""

    def build(**kwargs) -> ImageNetDataModule:
        options = {"source": "latents", "batch_size": 16, "val_batch_size": 5, "num_workers": 0}
        return ImageNetDataModule(**{"root": aligned_cache} | options | kwargs)

    return build


def module_of(model: str, alignment: str | None, parts: dict | None = None, **kwargs) -> DiffusionModule:
    """`parts` are further options of the denoiser."""
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "input_size": 4, "depth": 3, "width": 32, "num_heads": 2, "num_classes": 3}
    aligned_parts = ALIGNED[alignment] if alignment else {"align_channels": 0, "cls_channels": 0}
    network = MODELS[model](**sizes, **aligned_parts, align_depth=2, projector_width=16, **parts or {})
    options = {"predict": "latents", "seed": 1, "sampler": EulerMaruyama(10)} | kwargs
    aligned = ALIGNMENTS[alignment]() if alignment else None
    return DiffusionModule(network, partial(torch.optim.AdamW, lr=2e-3), alignment=aligned, **options)


def test_the_error_is_minus_the_mean_cosine():
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [1.0, 1.0]]])
    b = torch.tensor([[[5.0, 0.0], [0.0, -1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    assert torch.allclose(alignment_error(a, b), torch.tensor([0.0, -(1 + 0.5**0.5) / 2]))


@pytest.mark.parametrize("alignment", [pytest.param(None, marks=pytest.mark.slow), *ALIGNED])
@every_model
def test_every_combination_learns_samples_and_is_watched(model, alignment, features, trainer):
    module = module_of(model, alignment)
    first, last = [], []

    def log(name, value, **_):
        if name == "train/loss":
            (first if len(first) < 5 else last).append(float(value))

    module.log = log
    module.log_dict = lambda *_, **__: None
    trainer(max_steps=60, limit_val_batches=0, log_every_n_steps=1).fit(module, features())
    assert sum(last[-5:]) < 0.7 * sum(first), "the loss has to fall by a third at least"
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.model.parameters())
    samples = module.draw(torch.arange(4), torch.tensor([0, 1, 2, 0]), decode=False)
    assert samples.latents.shape == (4, 4, 4, 4)
    batch = next(iter(features_ready(features).val_dataloader()[0]))
    watched = module.alignment_features(batch)
    widths = {"block_01": 32, "block_02": 32, "block_03": 32} | ({"block_04": 48} if model == "ditdh" else {})
    assert {name: values.shape for name, values in watched.items()} == {
        n: (len(batch.labels), w) for n, w in widths.items()
    }


def features_ready(features) -> ImageNetDataModule:
    datamodule = features()
    datamodule.setup("fit")
    loaders = datamodule.val_dataloader()
    datamodule.val_dataloader = lambda: loaders if isinstance(loaders, list) else [loaders]
    return datamodule


def test_all_parameters_get_a_gradient_from_reg():
    module = module_of("sit", "reg")
    for parameter in module.model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    state, noise = torch.randn(2, 2, *module.model.state_shape)
    features, condition = torch.randn(2, 17, WIDTH), Labels(torch.tensor([0, 3]), 3)
    errors = denoising_errors(module.model, module.alignment, state, features, noise, torch.rand(2), condition)
    assert set(errors) == {"mse", "cosine", "align", "cls"} == set(module.weights)
    sum(module.weights[name] * error.mean() for name, error in errors.items()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.model.parameters())


def test_repa_leaves_the_class_token_of_features_alone():
    module = module_of("lightningdit", "repa")
    x, features = torch.randn(2, 4, 4, 4), torch.randn(2, 17, WIDTH)
    arguments = (
        (module.model, module.alignment, x),
        torch.randn_like(x),
        torch.rand(2),
        Labels(torch.tensor([0, 1]), 3),
    )
    plain = denoising_errors(*arguments[0], features, *arguments[1:])
    features[:, 0] = 100.0
    changed = denoising_errors(*arguments[0], features, *arguments[1:])
    assert all(torch.equal(changed[name], error) for name, error in plain.items())


def test_validation_logs_the_whole_objective(features, trainer):
    module = module_of("sit", "reg")
    (first,) = trainer().validate(module_ready(module, features), features())
    (second,) = trainer().validate(module, features(val_batch_size=13))
    assert first["val/loss"] == pytest.approx(second["val/loss"], rel=1e-5)


def module_ready(module: DiffusionModule, features) -> DiffusionModule:
    datamodule = features()
    datamodule.setup("fit")
    module.normalization.take(datamodule.latent_statistics)
    return module


@pytest.mark.parametrize(
    ("model", "alignment", "parts"),
    [
        ("sit", "reg", {}),
        ("sit", "reg", {"base_depth": 1, "predicts": "data", "projector": "conv"}),
        ("ditdh", "repa", {}),
        pytest.param("ditdh", "reg", {"base_depth": 1, "predicts": "data"}, marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_uninterrupted(model, alignment, parts, features, trainer, tmp_path):
    """Noise of the class token and fresh samples of the cached posterior included."""
    whole, begun, resumed = (module_of(model, alignment, parts) for _ in range(3))
    trainer(max_steps=6, limit_val_batches=0).fit(whole, features())
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True)  # one batch before an epoch's end
    trainer(max_steps=2, limit_val_batches=0, enable_checkpointing=True, callbacks=[checkpoint]).fit(begun, features())
    trainer(max_steps=6, limit_val_batches=0).fit(
        resumed, features(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    for (name, expected), actual in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(actual, expected), name


def test_bf16_mixed_keeps_losses_and_weights_finite(features, trainer):
    module = module_of("sit", "reg")
    trainer(max_steps=3, limit_val_batches=1, precision="bf16-mixed").fit(module, features())
    assert module.skipped_steps == 0
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in module.parameters())


def test_features_of_images_are_class_and_patch_tokens():
    vfm = FrozenVFM(VFM, input_scale=0.5)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    features = REG(vfm).features(Batch(images, torch.zeros(2).long(), torch.arange(2)))
    expected = vfm(images.float() / 127.5 - 1)
    assert features.shape == (2, 17, 128)
    assert torch.equal(features[:, 0], expected.pooled)
    assert torch.equal(features[:, 1:], expected.tokens)


def test_what_does_not_fit_is_named(features, latents, trainer, tmp_path):
    for parts, alignment, message in (
        ({"align_channels": 0, "cls_channels": 0}, REPA(), r"model\.align_channels: alignment needs the width"),
        ({"align_channels": 8, "cls_channels": 0}, REG(), r"model\.cls_channels: REG goes with the width"),
        ({"align_channels": 8, "cls_channels": 8}, REPA(), r"model\.cls_channels: REPA goes with 0, given 8"),
        ({"align_channels": 8, "cls_channels": 0}, None, r"model\.alignment: the denoiser's align_channels"),
        ({"align_channels": 8, "cls_channels": 0}, REPA(FrozenVFM(VFM)), r"gives 128 channels, but model\.align_ch"),
    ):
        with pytest.raises(ValueError, match=message):
            network = SiT(4, 4, 1, 3, 32, 2, 3, align_depth=2, **parts)
            DiffusionModule(network, partial(torch.optim.AdamW, lr=1e-3), alignment=alignment)
    with pytest.raises(ValueError, match=r"data\.root: .* holds no VFM features to align to"):
        trainer(max_steps=1).fit(module_of("sit", "reg"), latents())
    wide = module_of("sit", "reg")
    wide.model.grid = (2, 2)
    with pytest.raises(ValueError, match=r"have 16 patch tokens, but the denoiser has 4"):
        trainer(max_steps=1).fit(wide, features())


def test_features_of_another_vfm_are_named():
    vfm = FrozenVFM(VFM, input_scale=0.5)
    model = SiT(4, 4, 1, 1, 32, 2, 3, align_depth=1, align_channels=128, cls_channels=128)
    REG(vfm).check_features((17, 128), vfm.source(), model, "'cache'")
    REG().check_features((17, 128), vfm.source() | {"name": "another"}, model, "'cache'")
    with pytest.raises(ValueError, match=r"'cache' are of another VFM than model.alignment.vfm: \['input_scale'\]"):
        REG(vfm).check_features((17, 128), vfm.source() | {"input_scale": 1.0}, model, "'cache'")


@every_model
def test_trainings_differ_in_their_alignment_alone(model, features, trainer, monkeypatch):
    """The same seed gives the same first weights, noise, times and dropped labels, whatever the alignment."""
    seen = {}

    def watch(network, alignment, state, targets, noise, t, condition, weights):
        (latents, _), (noise_of_latents, _) = network.split(state), network.split(noise)
        seen[alignment and type(alignment)] = latents, noise_of_latents, t, condition.labels
        return denoising_errors(network, alignment, state, targets, noise, t, condition, weights)

    monkeypatch.setattr("ldm.module.denoising_errors", watch)
    modules = {name: module_of(model, name, label_drop=0.5) for name in (None, *ALIGNED)}
    plain = {name: tensor.clone() for name, tensor in modules[None].model.named_parameters()}
    for module in modules.values():
        others = dict(module.model.named_parameters())
        assert all(torch.equal(others[name], tensor) for name, tensor in plain.items())
        trainer(max_steps=1, limit_val_batches=0).fit(module, features())
    assert set(seen) == {None, REPA, REG}
    for drawn in (seen[REPA], seen[REG]):
        assert all(torch.equal(*pair) for pair in zip(drawn, seen[None], strict=True))


@pytest.mark.parametrize("alignment", [pytest.param("repa", marks=pytest.mark.slow), "reg"])
def test_features_are_computed_on_the_fly(alignment, tiny_model, data, trainer, tmp_path):
    """Of images that a frozen tokenizer encodes: 8x8 latents, and 8x8 tokens of the VFM."""
    tiny_model().save_pretrained(tmp_path / "tokenizer")
    cls_channels = 128 if alignment == "reg" else 0
    network = SiT(4, 8, 1, 2, 32, 2, 13, cls_channels=cls_channels, align_channels=128, align_depth=1)
    tokenizer = FrozenTokenizer(str(tmp_path / "tokenizer"))
    optimizer = partial(torch.optim.AdamW, lr=2e-3)

    def module(vfm: FrozenVFM | None) -> DiffusionModule:
        aligned = ALIGNMENTS[alignment](vfm)
        return DiffusionModule(network, optimizer, EulerMaruyama(3), tokenizer=tokenizer, alignment=aligned)

    trained = module(FrozenVFM(VFM))
    run = trainer(max_steps=2, limit_val_batches=1, log_every_n_steps=1)
    run.fit(trained, data(crop="centre"))
    assert -1 <= run.callback_metrics["train/loss_align"] <= 1
    (metrics,) = run.validate(trained, data(crop="centre"), verbose=False)
    assert metrics["val/loss"] > 0
    assert trained.draw(torch.arange(2)).images.shape == (2, 3, 64, 64)
    with pytest.raises(ValueError, match=r"model\.alignment\.vfm: training on images needs the VFM"):
        trainer(max_steps=1).fit(module(None), data(crop="centre"))
    with pytest.raises(ValueError, match=r"gives 16 patch tokens, but the denoiser has 64"):
        trainer(max_steps=1).fit(module(FrozenVFM(VFM, input_scale=0.5)), data(crop="centre"))


def test_a_checkpoint_says_which_vfm_images_were_aligned_to(tiny_model, data, trainer, tmp_path):
    """What was trained before positions were resampled as published goes on by timm's way; another VFM is refused."""
    tiny_model().save_pretrained(tmp_path / "tokenizer")
    tokenizer = FrozenTokenizer(str(tmp_path / "tokenizer"))

    def module(**vfm) -> DiffusionModule:
        network = SiT(4, 8, 1, 2, 32, 2, 13, cls_channels=0, align_channels=128, align_depth=1)
        aligned = REPA(FrozenVFM(VFM, **vfm))
        return DiffusionModule(network, partial(torch.optim.AdamW, lr=2e-3), tokenizer=tokenizer, alignment=aligned)

    path = tmp_path / "last.ckpt"
    trained, run = module(), trainer(max_steps=1, limit_val_batches=0)
    run.fit(trained, data())
    run.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)
    assert stored["aligned_to"] == trained.alignment.identity()
    with pytest.raises(ValueError, match="other weights of 'vit_photos_patch8_64'"):
        trainer(max_steps=2).fit(module(pretrained=False), data(), ckpt_path=path, weights_only=True)

    stored.pop("aligned_to")
    torch.save(stored, path)
    resumed = module()
    assert not resumed.alignment.vfm.antialias_positions
    with pytest.warns(UserWarning, match=r"model\.alignment\.vfm: .* resampled with antialias, and goes on so"):
        trainer(max_steps=2, limit_val_batches=0).fit(resumed, data(), ckpt_path=path, weights_only=True)
    assert resumed.alignment.vfm.antialias_positions
