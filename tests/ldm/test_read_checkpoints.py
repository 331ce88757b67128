"""Whatever is given as a checkpoint of training, to either program and by whatever option, is named for what it is."""

import pytest
import torch

from ldm.compatibility import begin_from
from ldm.models.lightningdit import LightningDiT
from ldm.normalization import LatentNormalization
from ldm.pipeline import LatentDiffusion
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.saving import WholeCheckpoints
from vfm_vae.stages import read_stage
from vfm_vae.tokenizer import VFMVAE, FrozenTokenizer


class Foreign:
    """Stands for a class of somebody else's project."""


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1200000000\n"

# What lies at the path → what is said of it.
FILES = {
    "nothing": "there is no checkpoint",
    "empty": "is empty (0 bytes)",
    "pointer": "is a Git LFS pointer",
    "cut": "is cut short",
    "foreign class": "is refused: reading it would run code",
    "tensors": "holds tensors alone, and is no checkpoint of training",
    "folder": "is a folder, not a file",
    "of something else": "checkpoint",
}


@pytest.fixture(params=FILES)
def given(request, tmp_path):
    """A path, and what has to be said of what lies there."""
    path = tmp_path / "given.ckpt"
    if request.param in ("cut", "tensors", "foreign class"):
        torch.save({"net": Foreign()} if request.param == "foreign class" else {"a": torch.ones(2000)}, path)
    if request.param == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    if request.param == "of something else":
        torch.save({"state_dict": {"layer.weight": torch.ones(3)}, "epoch": 3, "hyper_parameters": {"lr": 1}}, path)
    if request.param in ("empty", "pointer"):
        path.write_bytes(POINTER if request.param == "pointer" else b"")
    if request.param == "folder":
        path.mkdir()
    return str(path), FILES[request.param]


def check(error, path, said, option):
    message = str(error.value)
    assert said in message and "\n" not in message and "weights_only" not in message
    if said != "checkpoint":
        assert message.startswith(f"{option}: ") and repr(path) in message


@pytest.mark.parametrize(
    ("program", "stage"),
    [
        ("tokenizer", "fit"),
        *(pytest.param("tokenizer", stage, marks=pytest.mark.slow) for stage in ("validate", "predict")),
        *(("diffusion", stage) for stage in ("fit", "validate", "predict")),
    ],
)
def test_a_checkpoint_to_go_on_from(given, program, stage, tiny_module, data, diffusion, latents, trainer):
    path, said = given
    run = trainer(max_steps=1, callbacks=[WholeCheckpoints()])
    module, datamodule = (tiny_module(), data()) if program == "tokenizer" else (diffusion(), latents())
    with pytest.raises(ValueError) as error:
        getattr(run, stage)(module, datamodule=datamodule, ckpt_path=path)
    check(error, path, said, "ckpt_path")


READERS = {
    "init_from of the tokenizer": ("init_from", lambda path, vfm: read_stage(path, vfm)),
    "init_from of diffusion": ("init_from", lambda path, _: begin_from(path, None, None, LatentNormalization(4), None)),
    "tokenizer of diffusion": ("checkpoint", lambda path, _: FrozenTokenizer(path)),
    "tokenizer": ("checkpoint", lambda path, _: VFMVAE.from_checkpoint(path)),
    "tokenizer of a denoiser": (
        "tokenizer",
        lambda path, _: LatentDiffusion(LightningDiT(4, 4, 1, 1, 8, 2)).use_tokenizer(path),
    ),
    "denoiser": ("checkpoint", lambda path, _: LatentDiffusion.from_checkpoint(path)),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_checkpoint_to_begin_from(given, reader, tiny_module):
    path, said = given
    option, read = READERS[reader]
    with pytest.raises(ValueError) as error:
        read(path, tiny_module().model.vfm)
    if not reader.startswith("tokenizer of") or said not in (FILES["nothing"], FILES["folder"]):
        check(error, path, said, option)
    else:  # where a folder or a name on the hub would do, too
        assert str(error.value).startswith(f"{option}: ")
    assert ("\n" not in str(error.value) and repr(path) in str(error.value)) or said == "checkpoint"


def test_statistics_of_latents(given):
    path, said = given
    with pytest.raises(ValueError) as error:
        LatentStatistics.read(path)
    assert "\n" not in str(error.value) and path in str(error.value)
    if said in (FILES["empty"], FILES["pointer"], FILES["cut"], FILES["foreign class"]):
        check(error, path, said, "statistics")


# What a checkpoint's weights become → what is said of them.
OTHERS = {
    "half": (lambda state: dict(list(state.items())[::2]), "missing ["),
    "but one": (lambda state: dict(list(state.items())[1:]), "1 missing ["),
    "unrelated": (lambda _: {"model.something.else": torch.ones(3)}, "missing ["),
    "other sizes": (lambda state: {name: tensor[..., None] for name, tensor in state.items()}, "of another shape ["),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Checkpoints of both programs, each written, and read as it is, once: by name."""
    return {}


def checkpoint_of(module, datamodule, trainer):
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(module, datamodule=datamodule)
    return run._checkpoint_connector.dump_checkpoint()


OTHERS_IN_TIME = [
    ("tokenizer", "but one"),
    ("tokenizer", "other sizes"),
    *(pytest.param("tokenizer", kind, marks=pytest.mark.slow) for kind in ("half", "unrelated")),
    *(("diffusion", kind) for kind in OTHERS),
]


@pytest.mark.parametrize(("program", "kind"), OTHERS_IN_TIME)
def test_weights_of_another_model(kind, program, trained, tiny_module, data, diffusion, latents, trainer, tmp_path):
    """By every option that takes a checkpoint; no tensor is left as it was initialised."""
    change, said = OTHERS[kind]
    build, datamodule = (tiny_module, data) if program == "tokenizer" else (diffusion, latents)
    path, short = tmp_path / "other.ckpt", {"max_steps": 1, "limit_val_batches": 1}
    readers = {
        "ckpt_path": lambda: trainer(**short).validate(build(), datamodule=datamodule(), ckpt_path=path),
        "checkpoint": lambda: (VFMVAE if program == "tokenizer" else LatentDiffusion).from_checkpoint(path),
        "init_from": lambda: trainer(**short).fit(build(init_from=str(path)), datamodule=datamodule()),
    }
    if program not in trained:
        trained[program] = checkpoint_of(build(), datamodule(), trainer)
        torch.save(trained[program], path)
        for read in readers.values():
            read()
    whole = trained[program]
    torch.save(whole | {"state_dict": change(whole["state_dict"])}, path)
    for option, read in readers.items():
        with pytest.raises(ValueError, match=rf"^{option}: .*another model") as error:
            read()
        message = str(error.value)
        assert said in message and "\n" not in message and len(message) < 600
