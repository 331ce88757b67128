"""From stage to stage: which weights train, which come from where, and the second opponent."""

import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from test_cli import DEMO, SMALL
from torch.utils.data import DataLoader, Dataset
from training import changed, repeat, weights

from callbacks.ema import EMA
from vfm_vae.cli import run as run_cli
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.discriminators.patchgan import PatchGAN
from vfm_vae.module import TokenizerModule
from vfm_vae.types import Batch

FINE = ["decoder.blocks.3", "decoder.blocks.4"]
PATCHGAN_STAGE = {"l1": 0, "perceptual": 0, "multi_resolution": 0, "kl": 0, "alignment": 0}
PATCHGAN_STAGE |= {"adversarial_patch": 1, "feature_matching": 10}


@pytest.fixture
def patchgan_module(tiny_module):
    def build(**kwargs):
        torch.manual_seed(1)
        return tiny_module(objective=PATCHGAN_STAGE, patchgan=PatchGAN(base_channels=4), train_only=FINE, **kwargs)

    return build


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the former stage's checkpoint lies."""
    return tmp_path_factory.mktemp("former")


@pytest.fixture
def former(tiny_module, trainer, batch, folder, tmp_path) -> Path:
    """A checkpoint of a stage without a PatchGAN, whose averages differ from its weights: trained once, then copied."""
    whole, own = folder / "last.ckpt", tmp_path / "former/last.ckpt"
    if not whole.exists():
        checkpoint = ModelCheckpoint(folder, save_last=True, every_n_train_steps=3)
        trainer(max_steps=3, enable_checkpointing=True, callbacks=[checkpoint, EMA()]).fit(tiny_module(), repeat(batch))
    own.parent.mkdir()
    return Path(shutil.copy(whole, own))


@pytest.mark.parametrize("parts", [["decoder", "adapter.widen"], FINE])
def test_only_what_is_named_trains(tiny_module, trainer, batch, parts):
    objective = {"kl": 0, "alignment": 0, "ssim": 1}
    module = tiny_module(objective=objective, train_only=parts)
    before = weights(module.model)
    trainer(max_steps=2).fit(module, repeat(batch))
    moved = changed(before, module.model.state_dict())
    named = {name for name in before if name.startswith(tuple(f"{part}." for part in parts))}
    assert moved == named
    (generator, _) = module.configure_optimizers()
    assert sum(p.numel() for group in generator.param_groups for p in group["params"]) == sum(
        parameter.numel() for name, parameter in module.model.named_parameters() if name in named
    )


@pytest.mark.parametrize("parts", [[], ["decoder", "decodr.blocks"], ["decoder.blocks.33"], ["vfm"]])
def test_a_name_that_matches_nothing_is_refused(tiny_module, parts):
    with pytest.raises(ValueError, match=r"train_only: .* matches nothing that trains; there is .*decoder\.blocks"):
        tiny_module(train_only=parts)


def test_both_opponents_learn_and_the_generator_takes_no_gradient_into_them(patchgan_module, trainer, batch):
    module = patchgan_module()
    before = weights(module)
    run = trainer(max_steps=1)
    run.fit(module, repeat(batch))
    moved = changed(before, module.state_dict())
    opponents = {name for name, _ in module.named_parameters() if name.startswith(("discriminator.", "patchgan."))}
    assert opponents <= moved
    assert {name for name in moved if name.startswith("model.")} <= {
        name for name in before if name.startswith(tuple(f"model.{part}." for part in FINE))
    }
    assert run.callback_metrics["train/loss_feature_matching"] > 0
    assert run.callback_metrics["train/loss_patchgan_real"] > 0


def test_the_opponents_gradients_are_those_of_their_own_losses(patchgan_module, trainer, batch):
    """Real patches are judged once, for feature matching and for the PatchGAN's loss: neither may disturb the other."""
    gradients = {}
    module = patchgan_module()
    learn = module.learn

    def watch(player, loss, step_ends):
        if player == 1:
            tensors = list(module.patchgan.parameters())
            assert all(tensor.grad is None for tensor in tensors)
            gradients["expected"] = torch.autograd.grad(loss, tensors, retain_graph=True)
        learn(player, loss, step_ends)
        if player == 1:
            gradients["given"] = [tensor.grad.clone() for tensor in module.patchgan.parameters()]

    module.learn = watch
    trainer(max_steps=1).fit(module, repeat(batch))
    assert all(torch.allclose(x, y, atol=1e-7) for x, y in zip(gradients["expected"], gradients["given"], strict=True))


def test_real_images_pass_the_patchgan_once_a_step(patchgan_module, trainer, batch):
    module = patchgan_module()
    calls = []
    module.patchgan.register_forward_hook(lambda *_: calls.append(1))
    trainer(max_steps=2).fit(module, repeat(batch))
    assert len(calls) == 2 * 3  # real, generated for the generator, generated for itself


def test_a_stage_takes_weights_and_leaves_frozen_ones_at_their_averages(patchgan_module, trainer, batch, former):
    stored = torch.load(former, weights_only=True)
    module = patchgan_module(init_from=str(former))
    fresh = weights(module.patchgan)
    latents = {}
    module.on_train_start = lambda: latents.update(weights=weights(module))
    average = EMA()
    trainer(max_steps=2, callbacks=[average]).fit(module, repeat(batch))
    begun, averages = latents["weights"], stored["ema"]["weights"]
    for name, tensor in stored["state_dict"].items():
        trains = name.startswith(tuple(f"model.{part}." for part in FINE)) or not name.startswith("model.")
        assert torch.equal(begun[name], tensor if trains or name not in averages else averages[name]), name
    assert not changed({f"patchgan.{name}": tensor for name, tensor in fresh.items()}, begun)
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad and name in averages}
    assert frozen and all(torch.allclose(average.weights[name], averages[name], atol=1e-7) for name in frozen)
    assert module.images_seen == stored["images_seen"] + 16


def test_fine_tuning_leaves_the_latents_identity(patchgan_module, trainer, batch, former):
    module = patchgan_module(init_from=str(former))
    average = EMA()
    run = trainer(max_steps=1, callbacks=[average])
    run.fit(module, repeat(batch))
    average.on_test_start(run, module)
    after = module.latent_identity()
    average.on_test_end(run, module)
    averages = torch.load(former, weights_only=True)["ema"]["weights"]
    module.load_state_dict(averages, strict=False)
    assert after == module.latent_identity()


class Sizes(Dataset):
    """Batches of several sizes, one of them not square."""

    sizes = ((64, 64), (128, 128), (64, 96))

    def __len__(self) -> int:
        return 2 * len(self.sizes)

    def __getitem__(self, index: int) -> Batch:
        size = self.sizes[index % len(self.sizes)]
        images = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        return Batch(images, torch.zeros(2, dtype=torch.int64), torch.arange(2))


def test_one_model_trains_on_every_size(tiny_module, trainer):
    objective = {"alignment": 1, "ssim": 1, "adversarial_patch": 0.1, "feature_matching": 0.1}
    module = tiny_module(objective=objective, patchgan=PatchGAN(base_channels=4))
    sides = []
    module.model.decoder.register_forward_hook(lambda *args: sides.append(tuple(args[-1].image.shape[2:])))
    run = trainer(max_epochs=1)
    run.fit(module, DataLoader(Sizes(), batch_size=None))
    assert run.global_step == 6 and module.guard.num_skipped == 0
    assert {side for pair in sides for side in pair} > {64, 96, 128}


def test_a_weight_without_a_patchgan_is_refused(tiny_module):
    with pytest.raises(ValueError, match=r"objective\.adversarial_patch: 1 needs a PatchGAN"):
        tiny_module(objective=PATCHGAN_STAGE)


def test_another_model_is_refused(patchgan_module, tiny_module, trainer, batch, former):
    checkpoint = torch.load(former, weights_only=True)
    del checkpoint["state_dict"]["model.adapter.alignment.weight"]
    torch.save(checkpoint, former)
    with pytest.raises(ValueError, match=r"(?s)init_from: .* holds another model: .*alignment"):
        trainer(max_steps=1).fit(patchgan_module(init_from=str(former)), repeat(batch))


def test_a_run_that_would_train_other_parts_is_refused_in_one_line(tiny_module, trainer, batch, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=1)
    run = trainer(max_steps=1, enable_checkpointing=True, callbacks=[checkpoint])
    objective = {"kl": 0, "alignment": 0}
    run.fit(tiny_module(objective, train_only=["decoder.blocks.3", "decoder.blocks.4"]), repeat(batch))
    other = tiny_module(objective, train_only=["decoder.blocks.4"])
    with pytest.raises(ValueError, match=r"ckpt_path: the run trained \d+ tensors .* as its config.yaml has them"):
        trainer(max_steps=2).fit(other, repeat(batch), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_a_stage_that_goes_on_keeps_its_own_averages(tiny_module, trainer, batch, former, tmp_path):
    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            self.averages = {name: weight.clone() for name, weight in average.weights.items()}

    begun = trainer(max_steps=2, callbacks=[EMA()])
    begun.fit(tiny_module(init_from=str(former)), repeat(batch))
    begun.save_checkpoint(path := tmp_path / "begun.ckpt")
    average, start = EMA(), Start()
    run = trainer(max_steps=3, callbacks=[average, start])
    run.fit(tiny_module(init_from=str(former)), repeat(batch), ckpt_path=path, weights_only=True)
    stored, others = (torch.load(file, weights_only=True)["ema"]["weights"] for file in (path, former))
    assert start.averages.keys() == stored.keys()
    assert all(torch.equal(start.averages[name], stored[name]) for name in stored)
    assert any(not torch.equal(stored[name], others[name]) for name in stored)


@pytest.mark.slow
def test_a_stage_that_goes_on_needs_the_former_no_more(tmp_path, photos, monkeypatch):
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "photos").symlink_to(photos)
    monkeypatch.chdir(tmp_path)

    def fit(name: str, max_images: int, *options: str) -> Path:
        where = [f"--trainer.logger.init_args.name={name}", f"--model.max_images={max_images}", "--ckpt_path=last"]
        arguments = ["fit", *DEMO, "-c", "small.yaml", *where, *options]
        monkeypatch.setattr("sys.argv", ["vfm_vae", *arguments])
        run_cli(TokenizerModule, ImageNetDataModule)
        return tmp_path / f"runs/{name}/checkpoints/last.ckpt"

    former = fit("former", 8)
    begun = [f"--model.init_from={former}"]
    assert torch.load(fit("stage", 16, *begun), weights_only=True)["images_seen"] == 16
    former.unlink()
    assert torch.load(fit("stage", 24, *begun), weights_only=True)["images_seen"] == 24
