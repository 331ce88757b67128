"""How well images are reconstructed: means over images of what each one scores."""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.image import structural_similarity_index_measure

from vfm_vae.finite import not_finite
from vfm_vae.images import quantised, to_uint8


class MeanOverImages(Metric):
    """Mean of one number per image, the same however the images are spread over batches and ranks.

    Attributes:
        may_be_infinite: whether that is a value like others.
    """

    full_state_update = False
    may_be_infinite = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Adds images.

        Args:
            values: a number for each image, `[B]`.

        Raises:
            ValueError: if `values` is no vector.
        """
        if values.ndim != 1:
            raise ValueError(f"values must hold one number per image, [B]; got shape {tuple(values.shape)}.")
        self.total += values.detach().double().sum()
        self.count += len(values)

    def compute(self) -> Tensor:
        """The mean, a float32 scalar; nan if no image was seen.

        Raises:
            ValueError: if it is not finite although some were; on all ranks.
        """
        if self.total.isnan() or (self.total.isinf() and not self.may_be_infinite):
            raise not_finite(f"{type(self).__name__}: over {int(self.count)} images it is {float(self.total)}")
        return (self.total / self.count).float()


class PSNR(MeanOverImages):
    """Peak signal-to-noise ratio in dB of each image, then the mean; images go through 8 bits first.

    An image that is reproduced exactly scores inf, and so does the mean then.
    """

    higher_is_better = True
    may_be_infinite = True

    def update(self, reconstructions: Tensor, images: Tensor) -> None:
        """Adds images.

        Args:
            reconstructions: `[B, 3, H, W]`, nominally in [-1, 1].
            images: the originals, alike.
        """
        difference = to_uint8(reconstructions).double() - to_uint8(images).double()
        super().update(10 * torch.log10(255**2 / difference.square().mean(dim=(1, 2, 3))))


class SSIM(MeanOverImages):
    """Structural similarity (Wang et al. 2004) of each image, then the mean; images go through 8 bits first.

    Gaussian window of 11 with sigma 1.5, data range 2.
    """

    higher_is_better = True

    def update(self, reconstructions: Tensor, images: Tensor) -> None:
        """Adds images.

        Args:
            reconstructions: `[B, 3, H, W]`, nominally in [-1, 1], sides above 5.
            images: the originals, alike.
        """
        if not len(images):
            return
        with torch.autocast(images.device.type, enabled=False):
            similarity = structural_similarity_index_measure(
                quantised(reconstructions), quantised(images), data_range=2.0, reduction="none"
            )
        super().update(similarity.reshape(-1))


class PerceptualDistance(MeanOverImages):
    """Mean of a network's distance between image and reconstruction (LPIPS, or features of a VFM).

    Args:
        distance: takes reconstructions and images, `[B, 3, H, W]` in [-1, 1] after 8 bits, and returns the distance
            of each pair, `[B]`, or its mean over the batch, as losses do. It is only called, not owned: whoever owns
            its weights moves them.
    """

    higher_is_better = False

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._distance = (distance,)  # in a tuple, a module is no submodule: it enters no state_dict

    def update(self, reconstructions: Tensor, images: Tensor) -> None:
        """Adds images.

        Args:
            reconstructions: `[B, 3, H, W]`, nominally in [-1, 1].
            images: the originals, alike.
        """
        if not len(images):
            return
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            distance = self._distance[0](quantised(reconstructions), quantised(images))
        super().update(distance.expand(len(images)))


class ReconstructionMetrics(MetricCollection):
    """PSNR (`psnr`), SSIM (`ssim`) and perceptual distances by their own names, updated together.

    `update(reconstructions, images)` takes tensors `[B, 3, H, W]`, nominally in [-1, 1], without padding samples.

    Args:
        perceptual: for each name the distance as `PerceptualDistance` takes it, such as `{"lpips": network}`.
    """

    def __init__(self, perceptual: dict[str, Callable[[Tensor, Tensor], Tensor]] | None = None) -> None:
        metrics: dict[str, Metric] = {"psnr": PSNR(), "ssim": SSIM()}
        metrics |= {name: PerceptualDistance(distance) for name, distance in (perceptual or {}).items()}
        super().__init__(metrics, compute_groups=False)
