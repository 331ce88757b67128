"""Programs that are run by one process and by two: each leaves what its ranks found in files."""

TOKENIZER = """
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from callbacks.cknna import CKNNACallback
from callbacks.ema import EMA
from callbacks.distribution import DistributionCallback
from callbacks.probe import LinearProbeCallback
from callbacks.robustness import RobustnessCallback
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.discriminators.patchgan import PatchGAN
from vfm_vae.discriminators.projected import ProjectedDiscriminator
from vfm_vae.losses.objective import Objective
from vfm_vae.module import TokenizerModule
from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.modules.equivariance import EquivarianceRegularizer
from vfm_vae.tokenizer import VFMVAE
from vfm_vae.vfm import FrozenVFM

devices, photos, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
name = "vit_photos_patch8_64"
optimizer = partial(torch.optim.Adam, lr=1e-3)


class Draws(EquivarianceRegularizer):
    # Remembers what it drew.

    def __init__(self):
        super().__init__()
        self.history = []

    def draw(self, *args, **kwargs):
        transform = super().draw(*args, **kwargs)
        self.history.append(str(transform))
        return transform


def build(**kwargs):
    torch.manual_seed(0)
    adapter = Adapter([128], [8], 4, 1, 16, 128)
    decoder = Decoder(16, [16, 16, 16, 16, 8], [16], [], 0, w_channels=16)
    return TokenizerModule(
        VFMVAE(adapter, decoder, FrozenVFM(name)),
        ProjectedDiscriminator(name, size=64, layers=(1,)),
        Objective(adversarial_patch=0.1, feature_matching=0.1),
        optimizer,
        optimizer,
        PatchGAN(base_channels=4),
        Draws(),
        **kwargs,
    )


def trainer(*callbacks, **kwargs):
    return Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_find_unused_parameters_true" if devices > 1 else "auto",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **kwargs,
    )


watch = [
    EMA(),
    CKNNACallback([FrozenVFM(name)], k=5, num_images=17, se_cknna="each"),
    DistributionCallback(FrozenVFM(name), precision_recall=True),
    RobustnessCallback([FrozenVFM(name)], num_images=11),
    LinearProbeCallback([FrozenVFM(name)]),
]
parts = {"batch_size": 8, "micro_batch_size": 4 // devices, "val_batch_size": 6}  # two batches make a step
data = ImageNetDataModule(photos, image_size=64, num_workers=0, **parts)
module, run = build(), trainer(EMA(), limit_val_batches=1)
metrics = trainer(*watch).validate(module, datamodule=data, verbose=False)[0]
run.fit(module, datamodule=data)
turns = build(order="published")
trainer(limit_val_batches=0).fit(turns, datamodule=data)
weights = {f"{order}.{key}": t for order, m in (("simultaneous", module), ("published", turns))
           for key, t in m.state_dict().items()}
result = {"metrics": metrics, "weights": weights, "images_seen": module.images_seen}
draws = {"simultaneous": module.equivariance.history, "published": turns.equivariance.history}
torch.save(result | {"draws": draws}, out / f"{devices}_{run.global_rank}.pt")
"""
# What both programs of diffusion models begin with.
LATENTS = """
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from callbacks.cknna import CKNNACallback
from callbacks.ema import EMA
from callbacks.post_hoc_ema import PostHocEMA
from callbacks.distribution import DistributionCallback
from callbacks.probe import ClassAccuracyCallback, LinearProbeCallback
from callbacks.samples import SampleWriter
from callbacks.writers import LatentWriter
from ldm.alignment import REG
from ldm.guidance import Guidance
from ldm.models.ditdh import DiTDH
from ldm.models.lightningdit import LightningDiT
from ldm.models.sit import SiT
from ldm.module import DiffusionModule
from ldm.samplers import Euler, EulerMaruyama
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.discriminators.projected import ProjectedDiscriminator
from vfm_vae.frozen import Frozen
from vfm_vae.losses.objective import Objective
from vfm_vae.module import TokenizerModule
from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.post_hoc import find, reconstruct, snapshots
from vfm_vae.tokenizer import VFMVAE
from vfm_vae.vfm import FrozenVFM

devices, photos, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
name = "vit_photos_patch8_64"


def trainer(*callbacks, **kwargs):
    return Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=list(callbacks), **kwargs,
    )


torch.manual_seed(0)
tokenizer = VFMVAE(Adapter([128], [8], 4, 1, 16, 128), Decoder(16, [16, 16, 16, 16, 8], [16], [], 0, w_channels=16),
                   FrozenVFM(name))
optimizer = partial(torch.optim.Adam, lr=1e-3)
opponent = ProjectedDiscriminator(name, size=64, layers=(1,))
images = ImageNetDataModule(photos, image_size=64, val_batch_size=6, num_workers=0, predict=["train", "val"])
cache = out / f"cache{devices}"
"""
DIFFUSION = (
    LATENTS
    + """
class Tokenizer(Frozen):
    def __init__(self, model):
        super().__init__(model)
        self.identity = model.latent_identity()

    def decode(self, z):
        return self.network.decode(z).image.clamp(-1, 1)


encoder = TokenizerModule(tokenizer, opponent, Objective(), optimizer, optimizer, predict="latents")
trainer(LatentWriter(str(cache), shard_size=10)).predict(encoder, datamodule=images)

torch.manual_seed(0)
denoiser = LightningDiT(4, 8, 2, 2, 32, 2, num_classes=13)
frozen = Tokenizer(tokenizer)
module = DiffusionModule(denoiser, partial(torch.optim.AdamW, lr=1e-3), Euler(4), Guidance(2.0), frozen)
data = ImageNetDataModule(cache, source="latents", batch_size=8, val_batch_size=6, num_workers=0, num_samples=10)
statistics = str(out / f"statistics{devices}.npz")
watch = [DistributionCallback(FrozenVFM(name), 20, f"{photos}/val", 64, statistics, True)]
watch += [ClassAccuracyCallback(f"{photos}/train", FrozenVFM(name), 64)]
watch += [CKNNACallback([FrozenVFM(name)], k=5, times=[0.3, 0.5], images=f"{photos}/val", image_size=64)]
watch += [LinearProbeCallback()]
metrics = trainer(*watch).validate(module, datamodule=data, verbose=False)[0]
samples = out / f"samples{devices}"
trainer(SampleWriter(str(samples))).predict(module, datamodule=data)
for cached in (3, 0):  # what is missing is less than there are ranks, then nothing
    shard = cache / f"train/latents_shard{cached:05d}.safetensors"
    if cached and module.global_rank == 0:
        shard.unlink()
    images.trainer = None
    trainer(LatentWriter(str(cache), shard_size=10)).predict(encoder, datamodule=images)
    assert shard.is_file()
data.num_samples = 11  # one more than there are
trainer(SampleWriter(str(samples), npz=True)).predict(module, datamodule=data)
stored = out / f"stored{devices}"
run = trainer(EMA(decay=0.9), PostHocEMA(), max_steps=3, limit_val_batches=0, default_root_dir=stored)
run.fit(module, datamodule=data)
result = {"metrics": metrics, "weights": dict(module.state_dict()), "images_seen": module.images_seen}
torch.manual_seed(0)
wide = DiTDH(4, 8, 2, 2, 32, 2, 1, 48, 2, num_classes=13)
module = DiffusionModule(wide, partial(torch.optim.AdamW, lr=1e-3), predict="latents", shift="auto")
result["metrics"] |= {f"wide/{key}": value for key, value in trainer().validate(module, datamodule=data)[0].items()}
trainer(EMA(decay=0.9), max_steps=3, limit_val_batches=0).fit(module, datamodule=data)
result["weights"] |= {f"wide.{key}": weight for key, weight in module.state_dict().items()}
result |= {"stored": [one.images for one in snapshots(find(stored))], "average": reconstruct(stored, 0.05)}
torch.save(result, out / f"{devices}_{run.global_rank}.pt")
"""
)
ALIGNED = (
    LATENTS
    + """
encoder = TokenizerModule(tokenizer, opponent, Objective(), optimizer, optimizer, predict="moments",
                          features=FrozenVFM(name, input_scale=0.5))
trainer(LatentWriter(str(cache), shard_size=10)).predict(encoder, datamodule=images)
torch.manual_seed(0)
denoiser = SiT(4, 8, 2, 2, 32, 2, 13, cls_channels=128, align_channels=128, align_depth=1, base_depth=1,
               predicts="data", projector="conv")
module = DiffusionModule(denoiser, partial(torch.optim.AdamW, lr=1e-3), EulerMaruyama(4), Guidance(2.0, cls_scale=2.0),
                         alignment=REG(spatial_norm=1.0), times="uniform", cosine_weight=0.0, predict="latents")
data = ImageNetDataModule(cache, source="latents", batch_size=8, val_batch_size=6, num_workers=0)
metrics = trainer().validate(module, datamodule=data, verbose=False)[0]
run = trainer(EMA(decay=0.9), max_steps=3, limit_val_batches=0, gradient_clip_val=1.0)
run.fit(module, datamodule=data)
result = {"metrics": metrics, "weights": dict(module.state_dict()), "images_seen": module.images_seen}
torch.save(result, out / f"{devices}_{run.global_rank}.pt")
"""
)
TEXTS = """
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from callbacks.samples import SampleWriter
from captioned import cached, captioner, words, write_captioned
from ldm.guidance import Guidance
from ldm.models.text_lightningdit import TextLightningDiT

devices, out = int(sys.argv[1]), Path(sys.argv[3])


def trainer(*callbacks, **kwargs):
    return Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=list(callbacks), **kwargs,
    )


root = write_captioned(out / f"cache{devices}" / os.environ.get("LOCAL_RANK", "0"), words())
torch.manual_seed(0)
module = captioner(TextLightningDiT(8, 4, 4, depth=1, width=32, num_heads=2), guidance=Guidance(2.0, start=0.3))
for parameter in module.model.parameters():  # many begin at zero
    torch.nn.init.normal_(parameter, std=0.1)
prompts = ["a cat", "a rocket", "photograph of cup of coffee", "", "a cat on a rocket"]
data = cached(root, val_batch_size=4, prompts=prompts, images_per_prompt=2)
metrics = trainer().validate(module, datamodule=data, verbose=False)[0]
trainer(SampleWriter(str(out / f"samples{devices}"))).predict(module, datamodule=data)
run = trainer(max_steps=3, limit_val_batches=0)
run.fit(module, datamodule=data)
torch.save({"metrics": metrics, "weights": dict(module.state_dict())}, out / f"{devices}_{run.global_rank}.pt")
"""
POISON = """
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer

from ldm.models.lightningdit import LightningDiT
from ldm.module import DiffusionModule
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.discriminators.projected import ProjectedDiscriminator
from vfm_vae.losses.objective import Objective
from vfm_vae.module import TokenizerModule
from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.tokenizer import VFMVAE
from vfm_vae.types import Batch, LatentBatch
from vfm_vae.vfm import FrozenVFM

out, name, optimizer = Path(sys.argv[3]), "vit_photos_patch8_64", partial(torch.optim.AdamW, lr=1e-3)
labels = torch.zeros(2, dtype=torch.int64)
history = {"tokenizer": [], "diffusion": []}


class Watch(Callback):
    def __init__(self, name, part):
        self.history, self.part, self.hook = history[name], part, None

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before = [p.detach().clone() for p in module.parameters()]
        if batch_idx == 1 and module.global_rank == 1:  # one rank alone, in its second batch
            self.hook = self.part.register_forward_hook(lambda *args: args[-1] * float("nan"))

    def on_train_batch_end(self, trainer, module, *args):
        if self.hook is not None:
            self.hook.remove()
        same = all(torch.equal(a, b) for a, b in zip(self.before, module.parameters()))
        skipped = getattr(module, "skipped_steps", None)
        self.history.append((same, int(module.guard.num_skipped if skipped is None else skipped)))


def fit(module, batch, watch, strategy):
    run = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, limit_train_batches=3, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[watch],
    )
    run.fit(module, torch.utils.data.DataLoader([batch] * 6, batch_size=None))
    return run


torch.manual_seed(0)
model = VFMVAE(Adapter([128], [8], 4, 1, 16, 128), Decoder(16, [16, 16, 16, 16, 8], [16], [], 0, w_channels=16),
               FrozenVFM(name))
opponent = ProjectedDiscriminator(name, size=64, layers=(1,))
tokenizer = TokenizerModule(model, opponent, Objective(), optimizer, optimizer)
images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
fit(tokenizer, Batch(images, labels, labels), Watch("tokenizer", model.adapter.widen),
    "ddp_find_unused_parameters_true")
denoiser = LightningDiT(4, 8, 2, 2, 32, 2, num_classes=13)
diffusion = DiffusionModule(denoiser, optimizer)
diffusion.normalization.take(LatentStatistics(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1)))
run = fit(diffusion, LatentBatch(torch.randn(2, 4, 8, 8), labels, labels), Watch("diffusion", denoiser.blocks[0]),
          "ddp")
weights = {f"{name}.{key}": p.detach() for name, m in (("t", tokenizer), ("d", diffusion))
           for key, p in m.named_parameters()}
torch.save({"history": history, "weights": weights}, out / f"2_{run.global_rank}.pt")
"""
SCRIPTS = {"tokenizer": TOKENIZER, "diffusion": DIFFUSION, "aligned": ALIGNED, "texts": TEXTS, "poison": POISON}


# One program, so that ranks are started once.
ALL = """
import sys
from pathlib import Path

for name in sys.argv[4:]:
    sys.argv[3] = name
    exec(compile(Path(f"{name}.py").read_text(), name, "exec"), {"__name__": "__main__"})
"""
