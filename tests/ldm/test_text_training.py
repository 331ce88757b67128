"""Training on captions: the same losses from a cache as from images, and what holds of all training holds here."""

import json

import numpy as np
import pytest
import torch
from captioned import SUBJECTS, WIDTH, cached, captioner, captions_of, words, write_captioned
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from test_skipped_steps import NoGPU, NothingIsRead, Step, adamw
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from training import same, weights

from callbacks.ema import EMA
from callbacks.throughput import Throughput
from callbacks.writers import LatentWriter
from ldm.models.text_lightningdit import TextLightningDiT
from ldm.text import Text
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.frozen import Frozen
from vfm_vae.images import from_uint8
from vfm_vae.text import TextEncoder
from vfm_vae.types import Encoded

IDENTITY = {"tokenizer": "pools", "fingerprint": "pools", "vfm": None, "channels": 3, "compression": 4}


@pytest.fixture(scope="session")
def captions(tmp_path_factory):
    """A cache with captions."""
    return write_captioned(tmp_path_factory.mktemp("captions") / "cache", words())


def transformer(width: int = WIDTH) -> TextLightningDiT:
    torch.manual_seed(0)
    return TextLightningDiT(width, 4, 4, depth=2, width=32, num_heads=2)


class Losses(Callback):
    """The loss of each step, and what it was of."""

    def __init__(self):
        self.steps: list[float] = []
        self.texts: list[tuple[str, ...]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append(outputs["loss"].item())
        self.texts.append(batch.text.captions)


# Images with captions, encoded on the fly or beforehand


class Pools(Frozen):
    """A tokenizer whose latents are means of parts of the image, which leave nothing to chance."""

    identity = IDENTITY

    class Certain:
        def __init__(self, mean: Tensor):
            self.mean = mean

        def sample(self, noise: Tensor | None = None) -> Tensor:
            return self.mean

    def __init__(self):
        super().__init__(nn.Identity())
        self.network.check_image_size = lambda _: None

    def encode(self, images: Tensor) -> "Pools.Certain":
        return self.Certain(avg_pool2d(images, 4))


class Encoder(LightningModule):
    """Writes such latents."""

    predict, seed = "latents", 0

    def latent_identity(self):
        return IDENTITY

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return Encoded({"latents": avg_pool2d(from_uint8(batch.images), 4)}, batch.labels, batch.index)


@pytest.fixture
def images(tmp_path):
    """Builds the DataModule of images with captions, each its own mirror image, or of their cache."""
    generator = np.random.default_rng(0)
    for split, size in (("train", 24), ("val", 6)):
        (tmp_path / split).mkdir()
        half = generator.integers(0, 256, (size, 16, 8, 3), np.uint8)
        for number, pixels in enumerate(np.concatenate([half, half[:, :, ::-1]], axis=2)):
            Image.fromarray(pixels).save(tmp_path / split / f"{number}.png")
        said = [captions_of(number % 3) if number else [] for number in range(size)]  # of one, nothing is said
        lines = [{"file_name": f"{number}.png", "text": texts} for number, texts in enumerate(said)]
        (tmp_path / split / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def build(**options) -> ImageNetDataModule:
        options = {"image_size": 16, "batch_size": 8, "val_batch_size": 6, "num_workers": 0} | options
        return ImageNetDataModule(tmp_path, captions="text", crop="centre", **options)

    return build


def losses_from_images_and_from_a_cache(images, trainer, encoder: TextEncoder, folder) -> list[tuple]:
    """Losses of steps over two epochs and of validation, and the weights in the end, of either."""
    writer = LatentWriter(str(folder), shard_size=10, text=encoder)
    trainer(callbacks=[writer]).predict(Encoder(), datamodule=images(predict=("train", "val")))
    results = []
    for data, tokenizer in ((images(), Pools()), (cached(folder, val_batch_size=6), None)):
        torch.manual_seed(0)
        network = TextLightningDiT(encoder.width, 3, 4, depth=1, width=32, num_heads=2)
        module, losses = captioner(network, encoder, tokenizer=tokenizer), Losses()
        module.normalization.take(LatentStatistics.read(folder / "train"))
        run = trainer(max_steps=5, callbacks=[losses], check_val_every_n_epoch=1, limit_val_batches=1)
        run.fit(module, datamodule=data)
        results.append((losses.texts, losses.steps, run.callback_metrics["val/loss"].item(), weights(module.model)))
    return results


def test_images_and_their_cache_train_alike(images, trainer, tmp_path):
    """Bit for bit: the same captions of each image and epoch, the same embeddings, the same noise."""
    from_images, from_cache = losses_from_images_and_from_a_cache(images, trainer, words(), tmp_path / "z")
    assert from_images[:3] == from_cache[:3] and same(from_images[3], from_cache[3])
    texts = [text for step in from_images[0] for text in step]
    assert len({*texts}) == 1 + 2 * len(SUBJECTS) and "" in texts


# What a step does


def test_prompts_are_learned(captions, trainer):
    """The mean of an image's latent follows from its class, which its caption tells."""
    module = captioner(label_drop=0.0)
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=3e-2)
    trainer(max_steps=40, limit_val_batches=0).fit(module, datamodule=cached(captions, batch_size=24))
    drawn = module.draw(torch.arange(30), [captions_of(number % 3)[0] for number in range(30)], decode=False)
    means = drawn.latents.mean(dim=(1, 2, 3))
    levels = torch.stack([means[label::3].mean() for label in range(3)])
    assert torch.allclose(levels, 2.0 * torch.arange(3) + 0.375, atol=0.8), levels


def told_in_training(module, trainer, data, steps: int = 3) -> list[Text]:
    """The conditions of steps."""
    seen: list[Text] = []
    handle = module.model.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    trainer(max_steps=steps, limit_val_batches=0).fit(module, datamodule=data)
    handle.remove()
    return seen


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_captions_are_dropped_to_the_empty_one(captions, trainer, share):
    losses, module = Losses(), captioner(label_drop=share)
    fit = trainer
    seen = told_in_training(module, lambda **options: fit(callbacks=[losses], **options), cached(captions))
    empty, dropped = words().encode([""]), 0
    for condition, texts in zip(seen, losses.texts, strict=True):
        plain = words().encode(texts)
        is_empty = (condition.embeddings == empty.embeddings.float()).flatten(1).all(dim=1)
        assert torch.equal(condition.mask.sum(1) == 1, is_empty)
        assert torch.equal(condition.embeddings[~is_empty], plain.embeddings.float()[~is_empty])
        assert torch.equal(condition.mask[~is_empty], plain.mask[~is_empty])
        dropped += int(is_empty.sum())
    assert dropped / 24 == pytest.approx(share, abs=0.15 if 0 < share < 1 else 0)


def test_a_step_does_not_wait_to_see_what_was_dropped(captions, trainer):
    step = Step(NothingIsRead())
    module = captioner(transformer())
    module.optimizer = adamw(fused=True)
    run = trainer(max_steps=4, limit_val_batches=0, callbacks=[EMA(decay=0.9), step], log_every_n_steps=100)
    run.fit(module, datamodule=cached(captions))
    assert step.steps == 3


@pytest.mark.gpu
def test_a_step_waits_for_no_gpu(captions, tmp_path):
    module, step = captioner(transformer()), Step(NoGPU())
    module.optimizer = adamw(fused=True)
    options = {"logger": False, "enable_model_summary": False, "enable_checkpointing": False, "precision": "bf16-mixed"}
    run = Trainer(accelerator="gpu", devices=1, max_steps=5, log_every_n_steps=100, limit_val_batches=0,
                  callbacks=[step], default_root_dir=tmp_path, **options)  # fmt: skip
    run.fit(module, datamodule=cached(captions))
    assert step.steps == 4


def test_a_step_in_bfloat16_is_close(captions, trainer):
    """Autocast reaches the denoiser; embeddings are stored in that precision anyway."""
    found = []
    for precision in ("32-true", "bf16-mixed"):
        losses = Losses()
        trainer(max_steps=3, limit_val_batches=0, callbacks=[losses], precision=precision).fit(
            captioner(transformer()), datamodule=cached(captions)
        )
        found.append(losses.steps)
    assert found[0] == pytest.approx(found[1], rel=0.03) and found[0] != found[1]


def test_a_step_that_is_not_finite_is_left_out(captions, trainer):
    module = captioner()
    module.model.leave.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = weights(module.model)
    trainer(max_steps=2, limit_val_batches=0).fit(module, datamodule=cached(captions))
    assert same(before, weights(module.model)) and module.skipped_steps == 2


def test_operations_are_counted_without_a_step(captions, trainer):
    """The number is that of a step that is watched."""
    counted = []
    for rehearses in (True, False):
        module = captioner()
        if not rehearses:
            module.rehearse = lambda _: False
        trainer(max_steps=1, limit_val_batches=0, callbacks=[Throughput()]).fit(module, datamodule=cached(captions))
        counted.append(module.flops_per_batch)
    assert counted[0] == counted[1] > 0


def test_evaluation_draws_for_the_first_caption_of_each_image(captions, trainer):
    module, seen = captioner(), []
    module.model.register_forward_pre_hook(lambda _, args: seen.append(args[2].plain()))
    trainer().validate(module, datamodule=cached(captions), verbose=False)
    assert [text for texts in seen for text in texts][:4] == [captions_of(number % 3)[0] for number in range(4)]


# Going on


def test_resumed_equals_uninterrupted(captions, trainer, tmp_path):
    """Killed in the middle of an epoch: the same captions afterwards, and the same weights, bit for bit."""
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_last=True)
    begun = trainer(max_steps=4, limit_val_batches=0, enable_checkpointing=True, callbacks=[checkpoint, EMA(decay=0.9)])
    begun.fit(captioner(transformer()), datamodule=cached(captions))
    results, texts = [], []
    for path in (None, tmp_path / "last.ckpt"):
        module, average, losses = captioner(transformer()), EMA(decay=0.9), Losses()
        run = trainer(max_steps=9, limit_val_batches=0, callbacks=[average, losses])
        run.fit(module, datamodule=cached(captions), ckpt_path=path, weights_only=True)
        results.append((weights(module), average.weights))
        texts.append(losses.texts)
    (whole, average), (resumed, resumed_average) = results
    assert same(whole, resumed) and same(average, resumed_average)
    assert texts[0][4:] == texts[1] and len(texts[1]) == 5


# A large text encoder


@pytest.mark.slow
def test_qwen_trains_alike_from_images_and_from_a_cache(images, trainer, tmp_path):
    """Padded to other lengths in other batches, its embeddings differ by rounding."""
    from tiny_readers import Readers

    from vfm_vae.transformers_text import TransformersText

    encoder = TransformersText(Readers(tmp_path)("qwen2_5_vl"), max_tokens=48)
    from_images, from_cache = losses_from_images_and_from_a_cache(images, trainer, encoder, tmp_path / "z")
    assert from_images[0] == from_cache[0]
    assert from_images[1] == pytest.approx(from_cache[1], rel=1e-3)
    assert from_images[2] == pytest.approx(from_cache[2], rel=1e-3)
