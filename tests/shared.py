"""What tests share: a tokenizer small enough to train within a test, on the embedded VFM, and photographs."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torchvision.models import vgg16

from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.discriminators.projected import ProjectedDiscriminator
from vfm_vae.losses.objective import Objective
from vfm_vae.losses.reconstruction import VFMPerceptualLoss
from vfm_vae.module import TokenizerModule
from vfm_vae.modules.adapter import Adapter
from vfm_vae.modules.decoder import Decoder
from vfm_vae.modules.equivariance import EquivarianceRegularizer
from vfm_vae.tokenizer import VFMVAE
from vfm_vae.types import Batch
from vfm_vae.vfm import FrozenVFM

VFM = "vit_photos_patch8_64"


@pytest.fixture(autouse=True)
def matmul_precision() -> Iterator[None]:
    """Undoes what a command line that ran within a test set for the whole process."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = convolutions


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    """A folder of 24 pictures as a camera leaves it: without classes, and none of them square."""
    folder, generator = tmp_path / "Pictures", np.random.default_rng(0)
    folder.mkdir()
    for number in range(24):
        pixels = generator.integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((140, 100)).save(folder / f"IMG_{number:04d}.jpg")
    return folder


@pytest.fixture(autouse=True, scope="session")
def copies_of_the_vfm() -> Iterator[None]:
    """Copies the embedded VFM where it was made before from the same random numbers, which go on as they would.

    Tests make it thousands of times, and most of them do less with it than that takes.
    """
    made: dict[tuple[Any, ...], tuple[torch.nn.Module, torch.Tensor]] = {}
    create, plain = timm.create_model, {"dynamic_img_size": True, "pretrained": True, "num_classes": 0}

    def create_or_copy(name: str, **options: Any) -> torch.nn.Module:
        if name != VFM or options != plain or torch.is_inference_mode_enabled():
            return create(name, **options)
        numbers = torch.get_rng_state().numpy().tobytes()
        key = numbers, torch.get_default_device(), torch.get_default_dtype()
        if key not in made:
            if len(made) == 16:
                del made[next(iter(made))]
            network = create(name, **options)
            made[key] = copy.deepcopy(network), torch.get_rng_state()
            return network
        network, state = made[key]
        torch.set_rng_state(state)
        return copy.deepcopy(network)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", create_or_copy)
        yield


@pytest.fixture
def tiny_model() -> Callable[..., VFMVAE]:
    """Builds a VFMVAE for 64 px images with latents `[B, 4, 8, 8]`; arguments are the VFM's."""

    def build(**vfm) -> VFMVAE:
        torch.manual_seed(0)
        adapter = Adapter(
            feature_channels=[128, 128],
            layer_channels=[8, 8],
            latent_channels=4,
            unshuffle=1,
            decoded_channels=16,
            alignment_channels=128,
        )
        decoder = Decoder(
            in_channels=16,
            channels=[16, 16, 16, 16, 8],
            route_channels=[16, 16, 16],
            attention_depths=[1],
            num_res_blocks=0,
            w_channels=16,
        )
        return VFMVAE(adapter, decoder, FrozenVFM(VFM, layers=[0, -1], **vfm))

    return build


@pytest.fixture
def tiny_module(tiny_model: Callable[..., VFMVAE]) -> Callable[..., TokenizerModule]:
    """Builds a TokenizerModule; arguments go to it, `objective` to its Objective, `vfm` to its VFM."""

    def build(objective: dict | None = None, vfm: dict | None = None, **kwargs) -> TokenizerModule:
        model = tiny_model(**(vfm or {}))
        losses = {"perceptual": 0.1, "adversarial": 0.1, "perceptual_loss": VFMPerceptualLoss({"name": VFM})}
        optimizer = partial(torch.optim.Adam, lr=2e-3, betas=(0.0, 0.99))
        return TokenizerModule(
            model=model,
            discriminator=ProjectedDiscriminator(VFM, size=64, layers=(2,)),
            objective=Objective(**losses | (objective or {})),
            **{"optimizer": optimizer, "discriminator_optimizer": optimizer}
            | {"equivariance": EquivarianceRegularizer()}
            | kwargs,
        )

    return build


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few of the embedded photographs."""
    root = tmp_path_factory.mktemp("data") / "photos"
    ImageNetDataModule(
        root, source="photos", photos={"size": 64, "train_per_class": 4, "val_per_class": 2}
    ).prepare_data()
    return root


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with random weights for LPIPS' network."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in vgg16().state_dict().items() if name.startswith("features")}
    path = tmp_path_factory.mktemp("hub") / "vgg16.pth"
    torch.save({name: torch.randn(shape) / max(shape[1:].numel(), 1) ** 0.5 for name, shape in shapes.items()}, path)
    return str(path)


@pytest.fixture
def vgg(vgg_file: str) -> list[str]:
    """Options that take LPIPS' network from a file with random weights."""
    return [f"--model.objective.init_args.perceptual_loss.init_args.weights={vgg_file}"]


@pytest.fixture
def data(photos: Path) -> Callable[..., ImageNetDataModule]:
    """Builds the DataModule over `photos`: 52 images for training, 26 for validation."""

    def build(**kwargs) -> ImageNetDataModule:
        return ImageNetDataModule(photos, image_size=64, **{"batch_size": 8, "num_workers": 0} | kwargs)

    return build


@pytest.fixture
def batch(data: Callable[..., ImageNetDataModule]) -> Batch:
    """Eight training images."""
    datamodule = data()
    datamodule.setup("fit")
    return next(iter(datamodule.train_dataloader()))


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """Builds a silent Trainer on the CPU; arguments go to it."""

    def build(**kwargs) -> Trainer:
        silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        defaults = {"max_epochs": -1, "num_sanity_val_steps": 0, "enable_checkpointing": False, "log_every_n_steps": 1}
        return Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **silent | defaults | kwargs)

    return build
