"""A denoiser sharded over two processes (FSDP2) trains, saves and goes on as one that each process holds whole.

Compiled by parts, too, with activation checkpointing; the compiler's last step, which makes kernels, is left out. And
with Muon, which needs whole matrices, and would magnify the rounding of a norm that gradients are clipped by.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from captioned import words, write_captioned

from vfm_vae.post_hoc import find, reconstruct, snapshots

ROOT = Path(__file__).parents[2]

SCRIPT = """
import os
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from callbacks.ema import EMA
from callbacks.images import SampleImages
from callbacks.post_hoc_ema import PostHocEMA
from ldm.guidance import Guidance, InternalGuidance
from ldm.models.ditdh import DiTDH
from ldm.models.lightningdit import LightningDiT
from ldm.models.lumina import LuminaNextDiT
from ldm.models.text_lightningdit import TextLightningDiT
from ldm.module import DiffusionModule
from ldm.samplers import Euler
from ldm.text import Captions
from vfm_vae.compilation import is_compiled
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.saving import WholeCheckpoints
from vfm_vae.schedules import WarmupDecay
from vfm_vae.frozen import Frozen
from vfm_vae.text import HashedWords

cache, out, compiled = sys.argv[1], Path(sys.argv[2]), sys.argv[3] in ("compiled", "base", "ditdh", "lumina")
parts, inner = ({"base_depth": 1, "predicts": "data"}, InternalGuidance(1.5)) if sys.argv[3] == "base" else ({}, None)
matrices, clip = (partial(torch.optim.Muon, lr=2e-2), None) if sys.argv[3] == "muon" else (None, 0.5)
told, shown = None, SampleImages([0, 1], 2)
if sys.argv[3] in ("text", "lumina"):
    told, shown = Captions(HashedWords(8, 6)), SampleImages(prompts=["a cat", "a rocket"], num_images=2)
KINDS = {
    "ditdh": partial(DiTDH, head_depth=1, head_width=48, head_num_heads=2, num_classes=3),
    "text": partial(TextLightningDiT, 8),
    "lumina": partial(LuminaNextDiT, num_kv_heads=1, text_channels=8, multiple_of=8),
}
kind = KINDS.get(sys.argv[3], partial(LightningDiT, num_classes=3))
torch.compile = partial(torch.compile, backend="eager")


class Colours(Frozen):  # shows latents as they are
    identity = {"channels": 4, "compression": 16, "vfm": "none", "fingerprint": "none"}

    def compile_regions(self):
        pass  # there is nothing to compile

    def decode(self, z):
        return z[:, :3].clamp(-1, 1)


def fit(name, strategy, max_steps):
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "input_size": 4, "patch_size": 2, "depth": 2, "width": 32, "num_heads": 2}
    denoiser = kind(**sizes, activation_checkpointing=compiled, **parts)
    for parameter in filter(lambda p: p.requires_grad, denoiser.parameters()):  # many begin at zero
        torch.nn.init.normal_(parameter, std=0.05)
    if sys.argv[3] == "ditdh":  # frequencies that each rank has drawn for itself, as those of rank zero
        denoiser.time_embed.frequencies += int(os.environ.get("LOCAL_RANK", 0))
    optimizer, decoder = partial(torch.optim.AdamW, lr=1e-3, fused=True), Colours(torch.nn.Identity())
    module = DiffusionModule(denoiser, optimizer, Euler(4), Guidance(2.0, inner=inner), decoder,
                             torch_compile=compiled, matrix_optimizer=matrices, conditioning=told,
                             lr_scheduler=partial(WarmupDecay, warmup_steps=4))
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy, precision="bf16-mixed", gradient_clip_val=clip,
        max_steps=max_steps, max_epochs=-1, check_val_every_n_epoch=None, val_check_interval=2, num_sanity_val_steps=0,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=out / name,
        callbacks=[WholeCheckpoints(), EMA(decay=0.9), PostHocEMA(), shown, ModelCheckpoint(
            out / name, save_last=True, save_top_k=0, every_n_train_steps=1, enable_version_counter=False)],
    )
    data = ImageNetDataModule(cache, source="latents", batch_size=4, val_batch_size=2, num_workers=0)
    trainer.fit(module, datamodule=data, ckpt_path="last", weights_only=True)
    losses = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    parameter = next(module.model.blocks.parameters())
    local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    assert all(is_compiled(block) == compiled for block in module.model.blocks)
    return losses, local.numel() / parameter.numel()


def sharded():
    return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)


results = {"whole": fit("whole", "ddp", 5)}
fit("sharded", sharded(), 3)
results |= {"sharded": fit("sharded", sharded(), 5)}
fit("begun_whole", "ddp", 3)
fit("begun_whole", sharded(), 5)
torch.save(results, out / f"rank{torch.distributed.get_rank()}.pt")
"""


def close(ours: object, theirs: object) -> bool:
    """Equal but for the order in which a norm is summed: gradients are clipped by it."""
    if isinstance(ours, torch.Tensor):
        return type(ours) is torch.Tensor and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(close(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(close, ours, theirs))
    return ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("how", ["eager", "compiled", "muon", "base", "ditdh", "text", "lumina"])
def test_sharded_and_resumed_equals_whole(tmp_path: Path, cache: Path, how: str):
    if how in ("text", "lumina"):
        cache = write_captioned(tmp_path / "cache", words())
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(cache), str(tmp_path), how],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    ranks = sorted(tmp_path.glob("rank*.pt"))
    assert len(ranks) == 2, process.stderr[-3000:]
    for (losses, share), (sharded_losses, sharded_share) in (torch.load(rank).values() for rank in ranks):
        assert sharded_losses == pytest.approx(losses, rel=1e-5) and losses
        assert (share, sharded_share) == (1, 0.5)
    names = ("whole", "sharded", "begun_whole")
    pictures = [(tmp_path / name / "images/samples_guidance_1.png").read_bytes() for name in names[:2]]
    assert len(pictures) == 2  # all ranks draw, or a sharded model would wait for ever
    whole, *others = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in names)
    assert whole["global_step"] == 5
    for part in ("state_dict", "ema", "optimizer_states", "lr_schedulers", "images_seen", "global_step"):
        assert all(close(other[part], whole[part]) for other in others), part
    kept, *kept_by_others = (one["callbacks"]["PostHocEMA"]["tracks"] for one in (whole, *others))
    assert kept[0].keys() == whole["ema"]["weights"].keys() and all(close(tracks, kept) for tracks in kept_by_others)
    for name in names:
        assert [one.step for one in snapshots(find(tmp_path / name))] == [1, 2, 3, 4, 5]
        average = reconstruct(tmp_path / name, 0.05)
        assert all(torch.allclose(average[key], tensor, atol=1e-3) for key, tensor in kept[0].items())
