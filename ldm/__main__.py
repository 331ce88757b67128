"""`python -m ldm fit|validate|test|predict|sweep`: the diffusion models' command line."""

from ldm.cli import DiffusionCLI
from ldm.module import DiffusionModule
from ldm.sweep.trainer import SweepingTrainer
from vfm_vae.cli import run
from vfm_vae.data.datamodule import ImageNetDataModule


def main() -> None:
    """Runs the command line of this process."""
    description = "Trains diffusion models on a tokenizer's latents, measures them, and draws samples."
    run(DiffusionModule, ImageNetDataModule, DiffusionCLI, SweepingTrainer, description)


if __name__ == "__main__":
    main()
