"""All numbers of the ADM protocol from one pass of Inception, against torchmetrics' metrics one by one.

Those see the same images and the same random weights, and each runs the network on its own, as metrics there do. They
have no precision and recall on Inception's features, so these are measured on one side alone; the second row has the
kernel distance in their place.
"""

import sys
import tempfile
from pathlib import Path

import torch
from timing import best_times, table
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.inception import InceptionScore as TheirInceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from vfm_vae.metrics.inception import Inception, InceptionNetwork
from vfm_vae.metrics.suite import DistributionSuite

IMAGES, BATCH, SIDE, TARGET = 96, 16, 64, 2.5


class Spatial(nn.Module):
    """Torch-fidelity's network with the output that sFID takes, by a hook."""

    num_features = 2023

    def __init__(self, weights: str) -> None:
        super().__init__()
        self.network = NoTrainInceptionV3("spatial", ["2048"], weights, antialias=False)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.kept = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Features `[B, 2023]`."""
        self.network(images)
        return self.kept


def save_random_weights(path: Path) -> None:
    """Saves weights whose features differ between images."""
    network = InceptionNetwork()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)


def random_images(contrast: float) -> Tensor:
    """Smooth uint8 images."""
    grid = torch.rand(IMAGES, 3, 4, 4) * contrast
    return (nn.functional.interpolate(grid, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)


def single_pass(weights: str, real: Tensor, generated: Tensor) -> dict[str, Tensor]:
    """Everything with one look at each image."""
    suite, index = DistributionSuite(Inception(weights), IMAGES, precision_recall=True), torch.arange(IMAGES)
    for images, is_real in ((real, True), (generated, False)):
        for batch, numbers in zip(images.split(BATCH), index.split(BATCH), strict=True):
            suite.update(batch, numbers, real=is_real)
    values = suite.compute()
    return {"fid": values["rfid"], "sfid": values["rsfid"], "inception_score": values["ris"]}


def one_by_one(weights: str, real: Tensor, generated: Tensor) -> dict[str, Tensor]:
    """The same with a metric, and a network, for each."""
    networks = {"fid": NoTrainInceptionV3("fid", ["2048"], weights, antialias=False), "sfid": Spatial(weights)}
    values = {}
    for name, network in networks.items():
        network.num_features = 2048 if name == "fid" else 2023
        metric = FrechetInceptionDistance(feature=network)
        feed_both(metric, real, generated)
        values[name] = metric.compute()
    metric = TheirInceptionScore(NoTrainInceptionV3("score", ["logits_unbiased"], weights, antialias=False), splits=1)
    for batch in generated.split(BATCH):
        metric.update(batch)
    values["inception_score"] = metric.compute()[0]
    return values


def kernel_distance(weights: str, real: Tensor, generated: Tensor) -> dict[str, Tensor]:
    """One more, alike."""
    network = NoTrainInceptionV3("kernel", ["2048"], weights, antialias=False)
    metric = KernelInceptionDistance(feature=network, subset_size=IMAGES // 2)
    feed_both(metric, real, generated)
    return {"kid": metric.compute()[0]}


def feed_both(metric: nn.Module, real: Tensor, generated: Tensor) -> None:
    """Shows a metric all images."""
    for images, is_real in ((real, True), (generated, False)):
        for batch in images.split(BATCH):
            metric.update(batch, real=is_real)


@torch.no_grad()
def main() -> None:
    """Prints the ratios, after a look whether the numbers are the same."""
    torch.manual_seed(0)
    real, generated = random_images(1.0), random_images(0.7)
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder) / "inception.pth")
        save_random_weights(Path(weights))
        ours, theirs = single_pass(weights, real, generated), one_by_one(weights, real, generated)
        forms = {"single": single_pass, "one_by_one": one_by_one, "kernel": kernel_distance}
        seconds = best_times(
            1, **{name: lambda form=form: form(weights, real, generated) for name, form in forms.items()}
        )
    ratio = seconds["one_by_one"] / seconds["single"]
    with_kernel = (seconds["one_by_one"] + seconds["kernel"]) / seconds["single"]
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].double(), value.double(), rtol=1e-3, atol=1e-4)
    title = f"{IMAGES} real and {IMAGES} generated images of {SIDE} pixels, CPU: time over that of a single pass"
    rows = [("FID, sFID, Inception Score", f"{ratio:.1f}x"), ("and KID", f"{with_kernel:.1f}x")]
    table(title, rows, "one by one", "ratio")
    if ratio < TARGET:
        sys.exit(f"a single pass is {ratio:.2f}x faster than metric by metric; the target is {TARGET}x")


if __name__ == "__main__":
    main()
