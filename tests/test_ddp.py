"""Two processes against one: the same validation metrics, the same weights on both ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from callbacks.cknna import CKNNACallback
from callbacks.ema import EMA
from callbacks.fid import FrechetDistanceCallback
from vfm_vae.data.datamodule import ImageNetDataModule
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
torch.manual_seed(0)
adapter = Adapter([128], [8], 4, 1, 16, 128)
decoder = Decoder(16, [16, 16, 16, 16, 8], [16], [], 0, w_channels=16)
optimizer = partial(torch.optim.Adam, lr=1e-3)
module = TokenizerModule(
    VFMVAE(adapter, decoder, FrozenVFM(name)),
    ProjectedDiscriminator(name, size=64, layers=(1,)),
    Objective(),
    optimizer,
    optimizer,
    EquivarianceRegularizer(),
    accumulate_grad_batches=2,
)
trainer = Trainer(
    accelerator="cpu",
    devices=devices,
    strategy="ddp_find_unused_parameters_true" if devices > 1 else "auto",
    max_steps=3,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    num_sanity_val_steps=0,
    limit_val_batches=1.0,
    callbacks=[EMA(), CKNNACallback([FrozenVFM(name)], k=5), FrechetDistanceCallback(FrozenVFM(name))],
)
data = ImageNetDataModule(photos, image_size=64, batch_size=8, val_batch_size=6, num_workers=0)
metrics = trainer.validate(module, datamodule=data, verbose=False)[0]
trainer.fit(module, datamodule=data)
weights = {key: tensor for key, tensor in module.state_dict().items()}
result = {"metrics": metrics, "weights": weights, "images_seen": module.images_seen}
torch.save(result, out / f"{devices}_{trainer.global_rank}.pt")
"""


def launch(folder: Path, photos: Path, devices: int) -> list[dict]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    process = subprocess.run(
        [sys.executable, str(script), str(devices), str(photos), str(folder)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    results = sorted(folder.glob(f"{devices}_*.pt"))
    assert len(results) == devices, process.stderr[-3000:]  # the files count: a crash at teardown would not matter
    return [torch.load(path, weights_only=True) for path in results]


def test_two_processes_validate_as_one_and_train_alike(tmp_path: Path, photos: Path):
    (one,) = launch(tmp_path, photos, 1)
    first, second = launch(tmp_path, photos, 2)
    assert first["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-6)
    assert second["metrics"] == first["metrics"]
    assert first["images_seen"] == one["images_seen"] == 48
    assert first["weights"].keys() == second["weights"].keys()
    local = ("average", "weight_u", "weight_v")  # statistics of each rank's own batches
    for name, tensor in first["weights"].items():
        if not name.endswith(local):
            assert torch.equal(tensor, second["weights"][name]), name
