"""Pretrain `vit_photos_patch8_64` on the training crops of the `photos` data set, on a CPU in a quarter of an hour.

    python -m vfm_vae.embedded.pretrain

Three tasks keep the final tokens informative at once about *what*, *where* and *how it looks*:

- pixels: each token predicts its own patch, some patches being masked (He et al., "Masked autoencoders", 2022, with the
  mask token in the encoder, as in Xie et al., "SimMIM", 2022);
- place: each token predicts where in the photograph its patch lies, and the scale of the crop;
- class: the mean of the tokens predicts which photograph the crop is of.

Every readout is linear, so what the tasks ask for is in the features themselves and not in a head.
"""

import argparse
import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from vfm_vae.embedded import evaluate, photos
from vfm_vae.embedded.vit import WEIGHTS, vit_photos_patch8_64
from vfm_vae.writing import write_tensors

LOSSES = {"pixels": 1.0, "place": 1.0, "class": 0.2}  # and their weights


class CropSampler:
    """Draws training crops from the photographs on the fly; held-out tiles are never touched.

    Args:
        size: Side of the crops, in pixels.
        seed: The same seed draws the same crops.
    """

    def __init__(self, size: int = 64, seed: int = 0):
        self.photos = [photos.load_photo(name) for name in photos.PHOTOS]
        self.size = size
        self.generator = np.random.default_rng(seed)

    def __call__(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a batch.

        Returns:
            images uint8 `[B, 3, H, W]`, labels int64 `[B]` and `evaluate.relative_box` of each crop, float32 `[B, 4]`.
        """
        labels = self.generator.integers(len(self.photos), size=batch_size)
        images, boxes = [], []
        for label in labels:
            photo = self.photos[label]
            width, height = photo.size
            box = photos.sample_box(self.generator, width, height, "train")
            images.append(np.asarray(photos.crop(photo, box, self.size)))
            boxes.append(evaluate.relative_box(box, *photo.size))
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return batch, torch.from_numpy(labels), torch.tensor(boxes)


def jitter(images: Tensor) -> Tensor:
    """Change contrast, saturation and brightness of each image at random.

    Args:
        images: `[B, 3, H, W]` in [-1, 1].
    """

    def factor(low: float, high: float) -> Tensor:
        return torch.empty(len(images), 1, 1, 1).uniform_(low, high)

    mean = images.mean((1, 2, 3), keepdim=True)  # [B, 1, 1, 1]
    images = mean + (images - mean) * factor(0.8, 1.25)
    grey = images.mean(1, keepdim=True)  # [B, 1, H, W]
    images = grey + (images - grey) * factor(0.7, 1.3)
    return (images + factor(-0.15, 0.15)).clamp(-1, 1)


def patch_places(boxes: Tensor, grid: int, flip: Tensor) -> Tensor:
    """Where in the photograph the patches of each crop lie.

    Args:
        boxes: `evaluate.relative_box` of the crops, `[B, 4]`.
        grid: Number of patches along each side.
        flip: Which crops are mirrored, bool `[B]`.

    Returns:
        Centre x and centre y of the patch and scale of the crop, `[B, N, 3]` in raster order.
    """
    low, high = boxes[:, None, :2], boxes[:, None, 2:]  # [B, 1, 2]
    steps = (torch.arange(grid)[:, None] + 0.5) / grid  # [grid, 1]
    x, y = (low + (high - low) * steps).unbind(-1)  # [B, grid] each
    x = torch.where(flip[:, None], x.flip(1), x)
    scale = evaluate.place_of(boxes)[:, 2, None, None]  # [B, 1, 1]
    where = torch.broadcast_tensors(x[:, None, :], y[:, :, None], scale)  # [B, grid, grid] each
    return torch.stack(where, -1).flatten(1, 2)


class Pretraining(nn.Module):
    """The network and its three linear readouts.

    Args:
        vit: The network to train.
        num_classes: Number of photographs.
    """

    def __init__(self, vit: VisionTransformer, num_classes: int):
        super().__init__()
        self.vit = vit
        assert isinstance(vit.patch_embed, PatchEmbed) and vit.patch_embed.grid_size is not None
        self.patch = vit.patch_embed.patch_size[0]
        self.grid = vit.patch_embed.grid_size[0]
        self.mask_token = nn.Parameter(torch.zeros(vit.embed_dim))
        self.to_pixels = nn.Linear(vit.embed_dim, 3 * self.patch**2)
        self.to_place = nn.Linear(vit.embed_dim, 3)
        self.to_class = nn.Linear(vit.embed_dim, num_classes)

    def tokens(self, images: Tensor, mask: Tensor) -> Tensor:
        """Final tokens `[B, N, C]` of images `[B, 3, H, W]`, the patches in `mask`, bool `[B, N]`, being hidden."""
        x = self.vit.patch_embed(images)  # [B, N, C]
        x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)
        x = self.vit._pos_embed(x)
        return self.vit.norm(self.vit.blocks(x))

    def forward(self, images: Tensor, labels: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            images: `[B, 3, H, W]` in [-1, 1].
            labels: int64 `[B]`.
            boxes: `evaluate.relative_box` of the crops, `[B, 4]`.
        """
        flip = torch.rand(len(images)) < 0.5
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
        mask = torch.rand(len(images), self.grid**2) < torch.rand(len(images), 1) * 0.6  # [B, N]
        tokens = self.tokens(images, mask).float()  # [B, N, C]
        patches = functional.pixel_unshuffle(images, self.patch).flatten(2).mT  # [B, N, 3 P²]
        where = patch_places(boxes, self.grid, flip)  # [B, N, 3]
        return {
            "pixels": functional.mse_loss(self.to_pixels(tokens), patches),
            "place": functional.smooth_l1_loss(self.to_place(tokens), where, beta=0.1),
            "class": functional.cross_entropy(self.to_class(tokens.mean(1)), labels, label_smoothing=0.1),
        }


def pretrain(steps: int, batch_size: int, learning_rate: float, seed: int) -> VisionTransformer:
    """Train a new network; prints the losses as it goes.

    Returns:
        The network in eval mode.
    """
    torch.manual_seed(seed)
    sampler = CropSampler(seed=seed)
    model = Pretraining(vit_photos_patch8_64(), len(photos.PHOTOS))
    print(
        f"{sum(p.numel() for p in model.vit.parameters()) / 1e6:.2f} M parameters, {steps} steps of {batch_size} crops"
    )
    fit(model, sampler, LOSSES, steps, batch_size, learning_rate)
    return model.vit.eval()


def fit(
    model: nn.Module,
    sampler: CropSampler,
    weights: Mapping[str, float],
    steps: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    """Train a network together with its readouts; prints the losses as it goes.

    Args:
        model: Gives losses by name of jittered crops, their labels and their boxes, as `Pretraining` does.
        sampler: Draws the crops.
        weights: Weight of each loss by its name.
        steps: Optimizer steps.
        batch_size: Crops per step.
        learning_rate: Peak of the cosine.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.95),
    )
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    start = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        images, labels, boxes = sampler(batch_size)
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(jitter(images / 127.5 - 1), labels, boxes)
        loss = sum((weights[name] * value for name, value in losses.items()), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            terms = "  ".join(f"{name} {value.item():.4f}" for name, value in losses.items())
            print(f"{step:5d}/{steps}  {terms}  {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    """Command line: pretrain, save the weights in half precision, and report what the features hold."""
    parser = argparse.ArgumentParser(description="Pretrain vit_photos_patch8_64.")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="crops per step (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="peak of the cosine (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="file to write (%(default)s)")
    parser.add_argument("--picture", type=Path, help="file for the picture of the features, PNG")
    arguments = parser.parse_args()
    vit = pretrain(arguments.steps, arguments.batch_size, arguments.learning_rate, arguments.seed)
    write_tensors(arguments.weights, {name: tensor.half() for name, tensor in vit.state_dict().items()})
    evaluate.report(evaluate.vit_tokens(arguments.weights), arguments.picture)


if __name__ == "__main__":
    main()
