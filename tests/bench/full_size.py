"""The full-size models by the published configs, with random weights, and what one image costs to train on.

    python tests/bench/full_size.py tokenizer --count               # strong stage: FLOPs and activations of one image
    python tests/bench/full_size.py diffusion --count               # LightningDiT-XL/1; or reg, ditdh

This needs no GPU; `gpu.py` measures one. Random weights cost the same as trained ones.
"""

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from step import CONFIGS, Build
from timing import table
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.models.vgg import cfgs, make_layers

from callbacks.throughput import flop_counter
from ldm.module import DiffusionModule
from vfm_vae.data.datamodule import ImageNetDataModule
from vfm_vae.data.latents import LatentStatistics
from vfm_vae.module import TokenizerModule
from vfm_vae.types import Batch, LatentBatch

NONE = "trainer: {accelerator: cpu, callbacks: [], logger: false, enable_checkpointing: false}"
TOY = {"depth": 2, "width": 48, "num_heads": 4}
TOY_DITDH = {"in_channels": 32, **TOY, "head_depth": 1, "head_width": 64, "head_num_heads": 4}
TOY_REG = TOY | {"cls_channels": 24, "align_channels": 24, "align_depth": 1, "projector_width": 32}


def build(
    module: type[LightningModule], folder: str, configs: list[str], options: list[str], device: str = "cpu"
) -> LightningModule:
    """What configs describe, without callbacks, made on the device, which draws weights faster than the host."""
    (Path(folder) / "none.yaml").write_text(NONE)
    arguments = [f"--config={CONFIGS / name}" for name in configs] + [f"--config={folder}/none.yaml", *options]
    plain = {"auto_configure_optimizers": False, "save_config_callback": None}
    with torch.device(device):
        return Build(module, ImageNetDataModule, args=["fit", *arguments], **plain).model


def tokenizer(
    folder: str, batch_size: int, more: list[str], device: str = "cpu", toy: bool = False
) -> tuple[TokenizerModule, Batch]:
    """The strong stage, which leaves latents alone, and a batch of noise; as a toy, the demo's."""
    configs = ["demo/tokenizer.yaml", "demo/strong.yaml"] if toy else ["vfm_vae/base.yaml", "vfm_vae/strong.yaml"]
    return _tokenizer(
        folder, configs, batch_size, [*_random("model.init_args.vfm", "discriminator"), *more], device, toy
    )


def vavae(
    folder: str, batch_size: int, more: list[str], device: str = "cpu", toy: bool = False
) -> tuple[TokenizerModule, Batch]:
    """VA-VAE's training, the PatchGAN included, and a batch of noise; as a toy, the study's."""
    configs = [f"vfm_vae/{name}.yaml" for name in ("base", "baselines/sdvae", "baselines/vavae")]
    options = _random("model.init_args.vfm")
    if toy:
        configs = [f"study/{name}.yaml" for name in ("tokenizer", "conv", "aligned")]
        options += _random("discriminator")
    return _tokenizer(folder, configs, batch_size, [*options, *more], device, toy)


def rae(
    folder: str, batch_size: int, more: list[str], device: str = "cpu", toy: bool = False
) -> tuple[TokenizerModule, Batch]:
    """RAE's training once the discriminator plays, and a batch of noise; as a toy, the study's."""
    configs = ["study/tokenizer.yaml", "study/rae.yaml"] if toy else ["vfm_vae/base.yaml", "vfm_vae/baselines/rae.yaml"]
    options = _random("model.init_args.vfm", "discriminator")
    options += ["--model.model.init_args.statistics_images=0", "--model.objective.init_args.adversarial_from=0"]
    return _tokenizer(folder, configs, batch_size, [*options, "--model.discriminate_from=0", *more], device, toy)


def _random(*parts: str) -> list[str]:
    return [f"--model.{part}.init_args.pretrained=false" for part in parts]


def _tokenizer(
    folder: str, configs: list[str], batch_size: int, options: list[str], device: str, toy: bool
) -> tuple[TokenizerModule, Batch]:
    if not toy:
        configs = [*configs, "data/imagenet.yaml"]
        vgg16 = make_layers(cfgs["D"], batch_norm=False).state_dict()
        torch.save({f"features.{name}": tensor for name, tensor in vgg16.items()}, f"{folder}/vgg16.pth")
        options = [*options, f"--model.objective.init_args.perceptual_loss.init_args.weights={folder}/vgg16.pth"]
    module = build(TokenizerModule, folder, configs, options, device)
    module.equivariance.probability = module.equivariance.prior_probability = 0.0  # every step at full size
    side = 64 if toy else 256
    images = torch.randint(256, (batch_size, 3, side, side), dtype=torch.uint8, device=device)
    index = torch.arange(batch_size, device=device)
    return module, Batch(images, torch.zeros_like(index), index)


def diffusion(
    folder: str, batch_size: int, more: list[str], device: str = "cpu", toy: bool = False
) -> tuple[DiffusionModule, LatentBatch]:
    """LightningDiT-XL/1, and a batch of noise."""
    configs = ["ldm/lightningdit.yaml", "ldm/epochs64.yaml", "data/latents.yaml"]
    return _diffusion(folder, configs, batch_size, [*_sizes(TOY if toy else {}), *more], device)


def reg(
    folder: str, batch_size: int, more: list[str], device: str = "cpu", toy: bool = False
) -> tuple[DiffusionModule, LatentBatch]:
    """SiT-XL/1 with a class token and the projector, and a batch of noise."""
    configs = ["ldm/reg.yaml", "ldm/reg80.yaml"]
    return _diffusion(folder, configs, batch_size, [*_sizes(TOY_REG if toy else {}), *more], device)


def ditdh(
    folder: str, batch_size: int, more: list[str], device: str = "cpu", toy: bool = False
) -> tuple[DiffusionModule, LatentBatch]:
    """DiTDH-XL/1, and a batch of noise as large as RAE's latents."""
    configs = ["ldm/ditdh.yaml", "ldm/rae_ditdh_xl.yaml"]
    return _diffusion(folder, configs, batch_size, [*_sizes(TOY_DITDH if toy else {}), *more], device)


def _sizes(sizes: dict[str, int]) -> list[str]:
    return [f"--model.model.init_args.{name}={value}" for name, value in sizes.items()]


def _diffusion(
    folder: str, configs: list[str], batch_size: int, more: list[str], device: str
) -> tuple[DiffusionModule, LatentBatch]:
    module = build(DiffusionModule, folder, configs, ["--model.tokenizer=null", *more], device)
    model, index = module.model, torch.arange(batch_size, device=device)
    channels = 1, model.in_channels, 1, 1
    module.normalization.take(LatentStatistics(torch.zeros(channels), torch.ones(channels)))
    latents = torch.randn(batch_size, *model.latent_shape, device=device)
    shape = batch_size, 1 + model.input_size[0] * model.input_size[1], model.align_channels
    features = torch.randn(shape, device=device, dtype=torch.bfloat16) if model.align_channels else None
    return module, LatentBatch(latents, index % model.num_classes, index, features)


DENOISERS = {"diffusion": diffusion, "reg": reg, "ditdh": ditdh}
MODELS = {"tokenizer": tokenizer, "vavae": vavae, "rae": rae, **DENOISERS}


class FlopCount(Callback):
    """Counts the FLOPs of one training step, forward and backward, of all networks; that step is not compiled.

    Args:
        batch_idx: which step.
        recomputing: whether layers compute again in it what they are told to; what that costs is counted, too.

    Attributes:
        flops: of the step, once it is over.
    """

    def __init__(self, batch_idx: int = 0, recomputing: bool = True) -> None:
        self.flops, self.batch_idx, self.recomputing = 0, batch_idx, recomputing
        self._counting = ExitStack()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        """Starts the counter."""
        if batch_idx != self.batch_idx:
            return
        for layer in () if self.recomputing else module.modules():
            for name in {"recompute", "activation_checkpointing"} & vars(layer).keys():
                setattr(layer, name, False)
        self._counting.enter_context(torch.compiler.set_stance("force_eager"))
        self._counter = self._counting.enter_context(flop_counter())

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *args: object) -> None:
        """Stops it."""
        if args[-1] == self.batch_idx:
            self._counting.close()
            self.flops = self._counter.get_total_flops()


@contextmanager
def saved_bytes() -> Iterator[Callable[[], int]]:
    """Bytes that autograd keeps for the backward pass, each storage once, weights left out."""
    seen: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            kept.append(tensor.detach())  # its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(seen.values())


def count(what: str, batch_size: int, more: list[str], toy: bool = False) -> tuple[int, int]:
    """FLOPs of a training step on the CPU, and bytes that autograd keeps in it."""
    gc.collect()  # what a former count left
    optimizers = ("optimizer", *(() if what in DENOISERS else ("discriminator_optimizer",)))
    stateless = [f"--model.{name}={{class_path: torch.optim.SGD, init_args: {{lr: 0.0}}}}" for name in optimizers]
    with tempfile.TemporaryDirectory() as folder:
        module, batch = MODELS[what](folder, batch_size, [*stateless, *more], toy=toy)
    counter = FlopCount()
    trainer = Trainer(
        accelerator="cpu", devices=1, precision="bf16-mixed", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[counter],
    )  # fmt: skip
    with saved_bytes() as saved:
        trainer.fit(module, DataLoader([batch], batch_size=None))
        return counter.flops, saved()


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=list(MODELS))
    parser.add_argument("--option", action="append", default=[], help="any of the command line, as --option=--a.b=c")
    parser.add_argument("--count", action="store_true", help="FLOPs and activations of one image, on the CPU")
    options = parser.parse_args()
    if not options.count:
        parser.error("give --count; gpu.py measures speed and memory on a GPU")
    (flops, one), (_, two) = (count(options.what, size, options.option) for size in (1, 2))
    rows = [
        ("FLOPs of an image, forward and backward", f"{flops / 1e12:.2f} T"),
        ("what autograd keeps for each image", f"{(two - one) / 2**20:.0f} MiB"),
    ]
    table(f"{options.what}, bf16-mixed, counted on the CPU", rows, "", "")


if __name__ == "__main__":
    main()
