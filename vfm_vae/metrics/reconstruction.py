"""Reconstruction metrics: means of scores over images."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.image import structural_similarity_index_measure

from vfm_vae.finite import not_finite
from vfm_vae.images import quantised, to_uint8


class _Mean(Metric):
    """Mean of one number per image, the same however the images are spread over batches and ranks.

    Attributes:
        may_be_infinite: Whether an infinite mean is allowed.
    """

    full_state_update = False
    may_be_infinite = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Adds one number for each image, `[B]`."""
        self.total += values.detach().double().sum()
        self.count += len(values)

    def compute(self) -> Tensor:
        """The mean, a float32 scalar; nan if no image was seen.

        Raises:
            ValueError: if there were images and the mean is not finite; raised on all ranks.
        """
        if self.total.isnan() or (self.total.isinf() and not self.may_be_infinite):
            raise not_finite(f"{type(self).__name__}: over {int(self.count)} images it is {float(self.total)}")
        return (self.total / self.count).float()


class MeanOverImages(_Mean):
    """Mean of numbers that are given for each image."""

    def update(self, values: Tensor) -> None:
        """Adds images.

        Args:
            values: A number for each image, `[B]`.

        Raises:
            ValueError: if `values` is no vector.
        """
        if values.ndim != 1:
            raise ValueError(f"values must hold one number per image, [B]; got shape {tuple(values.shape)}.")
        self.add(values)


class PSNR(_Mean):
    """Peak signal-to-noise ratio in dB of each image, averaged over images, which go through 8 bits first.

    The score of an image that is reproduced exactly is inf, and so is the mean then.
    """

    higher_is_better = True
    may_be_infinite = True

    def update(self, reconstructions: Tensor, images: Tensor) -> None:
        """Adds images.

        Args:
            reconstructions: `[B, 3, H, W]`, nominally in [-1, 1].
            images: The originals, alike.
        """
        difference = to_uint8(reconstructions).double() - to_uint8(images).double()
        self.add(10 * torch.log10(255**2 / difference.square().mean(dim=(1, 2, 3))))


class SSIM(_Mean):
    """Structural similarity (Wang et al. 2004) of each image, averaged over images, which go through 8 bits first.

    The window is a Gaussian of 11x11 pixels with σ = 1.5.
    """

    higher_is_better = True

    def update(self, reconstructions: Tensor, images: Tensor) -> None:
        """Adds images.

        Args:
            reconstructions: `[B, 3, H, W]`, nominally in [-1, 1]; height and width above 5.
            images: The originals, of the same shape.
        """
        if not len(images):
            return
        with torch.autocast(images.device.type, enabled=False):
            similarity = structural_similarity_index_measure(
                quantised(reconstructions), quantised(images), data_range=2.0, reduction="none"
            )
        assert isinstance(similarity, Tensor)
        self.add(similarity.reshape(-1))


class PerceptualDistance(_Mean):
    """Mean of a network's distance between image and reconstruction (LPIPS, or features of a VFM).

    Args:
        distance: Takes reconstructions and images, `[B, 3, H, W]` in [-1, 1] after 8 bits, and returns the distance
            of each pair, `[B]`, or its mean over the batch, as losses do. The metric does not own its weights, so
            whoever does must move them to the device.
    """

    higher_is_better = False

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._distance = (distance,)  # in a tuple, a module is no submodule: it enters no state_dict

    def update(self, reconstructions: Tensor, images: Tensor) -> None:
        """Adds images.

        Args:
            reconstructions: `[B, 3, H, W]`, nominally in [-1, 1].
            images: The originals, alike.
        """
        if not len(images):
            return
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            distance = self._distance[0](quantised(reconstructions), quantised(images))
        self.add(distance.expand(len(images)))


class ReconstructionMetrics(MetricCollection):
    """PSNR (`psnr`), SSIM (`ssim`) and perceptual distances by their own names, updated together.

    `update(reconstructions, images)` takes tensors `[B, 3, H, W]`, nominally in [-1, 1], without padding samples.

    Args:
        perceptual: Distances by name, as `PerceptualDistance` takes them, such as `{"lpips": network}`.
    """

    def __init__(self, perceptual: dict[str, Callable[[Tensor, Tensor], Tensor]] | None = None) -> None:
        metrics: dict[str, Metric | MetricCollection] = {"psnr": PSNR(), "ssim": SSIM()}
        metrics |= {name: PerceptualDistance(distance) for name, distance in (perceptual or {}).items()}
        super().__init__(metrics, compute_groups=False)
