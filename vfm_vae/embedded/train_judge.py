"""Train the judge on the training crops of the `photos` data set, on one CPU core in a few minutes.

    python -m vfm_vae.embedded.train_judge

Every crop is turned by a multiple of 90 degrees. From its pooled feature, two linear readouts predict which photograph
it is of and by how much it was turned (Gidaris et al., "Unsupervised representation learning by predicting image
rotations", 2018). No pixel is reconstructed and no place is predicted, as the embedded ViT does.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from vfm_vae.embedded import evaluate, photos
from vfm_vae.embedded.judge import WEIGHTS, WIDTH, Judge, judge_network
from vfm_vae.embedded.pretrain import CropSampler, fit
from vfm_vae.writing import write_tensors

LOSSES = {"class": 1.0, "turn": 1.0}  # and their weights


class Judging(nn.Module):
    """The network and its two linear readouts.

    Args:
        num_classes: Number of photographs.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.network = judge_network().to(memory_format=torch.channels_last)
        self.to_class = nn.Linear(WIDTH, num_classes)
        self.to_turn = nn.Linear(WIDTH, 4)

    def forward(self, images: Tensor, labels: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            images: `[B, 3, H, H]` in [-1, 1].
            labels: int64 `[B]`.
            boxes: Places of the crops, of which the judge learns nothing.
        """
        flip = torch.rand(len(images), 1, 1, 1) < 0.5
        images = torch.where(flip, images.flip(3), images)
        turns = torch.randint(4, (len(images),))
        images = torch.stack([torch.rot90(image, int(turn), (1, 2)) for image, turn in zip(images, turns, strict=True)])
        pooled = self.network(images.contiguous(memory_format=torch.channels_last)).float().mean((2, 3))  # [B, C]
        return {
            "class": functional.cross_entropy(self.to_class(pooled), labels, label_smoothing=0.1),
            "turn": functional.cross_entropy(self.to_turn(pooled), turns, label_smoothing=0.1),
        }


def train(steps: int, batch_size: int, learning_rate: float, seed: int) -> nn.Sequential:
    """Train a new judge; prints the losses as it goes.

    Returns:
        The network in eval mode.
    """
    torch.manual_seed(seed)
    model = Judging(len(photos.PHOTOS))
    print(f"{sum(p.numel() for p in model.network.parameters()) / 1e6:.2f} M parameters, {steps} steps of {batch_size}")
    fit(model, CropSampler(seed=seed), LOSSES, steps, batch_size, learning_rate)
    return model.network.eval()


def main() -> None:
    """Command line: train, save the weights in half precision, and report what the features hold."""
    parser = argparse.ArgumentParser(description="Train the judge, judge_photos.")
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="crops per step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the cosine (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="file to write (%(default)s)")
    arguments = parser.parse_args()
    network = train(arguments.steps, arguments.batch_size, arguments.learning_rate, arguments.seed)
    state = network.state_dict()
    write_tensors(arguments.weights, {n: t.half() if t.is_floating_point() else t for n, t in state.items()})
    judge = Judge(str(arguments.weights))
    evaluate.report(lambda images: judge(images).tokens)


if __name__ == "__main__":
    main()
