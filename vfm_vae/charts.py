"""Which charts TensorBoard's first page shows, by what they answer."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple


class Chart(NamedTuple):
    """A chart of several curves.

    Attributes:
        title: What it shows.
        tags: Names of its curves, as regular expressions that fit them from the first letter to the last.
    """

    title: str
    tags: tuple[str, ...]

    def shows(self, tag: str) -> bool:
        """Whether a curve is among them."""
        return any(re.fullmatch(pattern, tag) for pattern in self.tags)


DISTANCES = r"val/(?:r?s?fid|gfid|fd_.+)"
CHARTS = {
    "Quality": (
        Chart("PSNR in dB (higher is better)", ("val/psnr", "val/psnr_thumbnail")),
        Chart("SSIM (higher is better)", ("val/ssim",)),
        Chart("Perceptual distance (lower is better)", (r"val/(?:lpips|perceptual).*",)),
        Chart("Fréchet distance (lower is better)", (DISTANCES,)),
        Chart("Class accuracy of samples (higher is better)", ("val/class_accuracy",)),
        Chart("CLIP score (higher is better)", ("val/clip_score",)),
        Chart("Inception Score (higher is better)", ("val/(?:inception_score|ris)",)),
        Chart("Precision and recall (higher is better)", ("val/(?:precision|recall).*",)),
        Chart("Linear probe (higher is better)", ("val/probe/.+",)),
        Chart("Loss of validation and training", ("val/loss", "train/loss")),
    ),
    "Losses": (
        Chart("Reconstruction", (r"train/loss_(?:l1|l2|perceptual|ssim|multi_resolution)",)),
        Chart("Latent", (r"train/loss_(?:kl|quantization|entropy)",)),
        Chart("Share of the codebook in use", (r"train/codebook_usage.*",)),
        Chart("Parts of the diffusion loss", (r"train/loss_(?:mse|cosine|base|cls)",)),
    ),
    "Game balance": (
        Chart("Generator against the discriminators", (r"train/loss_(?:adversarial.*|feature_matching)",)),
        Chart("Losses of the discriminators", (r"train/loss_(?:discriminator|patchgan)_.+",)),
        Chart("Logits of real and generated images", (r"train/.*logits_.+",)),
        Chart("Adaptive weights of the adversarial losses", (r"train/adversarial.*_weight",)),
    ),
    "Alignment": (
        Chart("CKNNA of the latent (higher is better)", (r"val/cknna/latent.*",)),
        Chart("CKNNA of blocks (higher is better)", (r"val/cknna/block_.+",)),
        Chart("SE-CKNNA, mean (higher is better)", (r"val/se_cknna/[^/]+/mean.*",)),
        Chart("SE-CKNNA by transformation", (r"val/se_cknna/[^/]+/(?!mean).+",)),
        Chart("Robustness (higher is better)", (r"val/robustness/.+",)),
        Chart("Alignment loss", ("train/alignment", "train/loss_align(?:ment)?")),
        Chart("Similarity to the VFM", (r"train/alignment_(?:cosine|distance)",)),
        Chart("Weight of the alignment loss", ("train/alignment_weight",)),
    ),
    "Optimisation": (
        Chart("Learning rate", (r"train/lr.*",)),
        Chart("Gradient norm before clipping", (r"train/grad_norm.*",)),
        Chart("Share of clipped steps", (r"train/clip_share.*",)),
        Chart("Skipped steps", ("train/skipped_steps",)),
    ),
    "Speed and memory": (
        Chart("Images per second", (r"train/(?:device/)?samples_per_sec",)),
        Chart("Share of the device's peak", ("train/device/mfu",)),
        Chart("Peak memory in GB", ("train/device/memory_gb",)),
        Chart("Operations per second", (r"train/(?:device/)?flops_per_sec",)),
    ),
    "Loss by time": (
        Chart("Validation, from noise (0) to data (1)", (r"loss_by_time/val_.+",)),
        Chart("Training, from noise (0) to data (1)", (r"loss_by_time/train_.+",)),
    ),
}
OTHERS = "Other numbers"  # in charts of their own
# What says nothing that a chart does not.
LEFT_OUT = re.compile(
    r"train/(?:time|batches|samples|(?:device/)?batches_per_sec)|validate/.*|test/.*|.*/test_.*|epoch"
)
# Final numbers that come first, in tables of several runs as well.
MAIN = ("val/psnr", "val/ssim", "val/loss", "val/class_accuracy", "val/clip_score")


def layout_of(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """A layout with those charts that have curves, in the form that torch's `add_custom_scalars` takes.

    A chart is the same whichever of its curves there are: TensorBoard merges the layouts of several runs.

    Args:
        tags: Names of all curves.
    """
    tags, layout = set(tags), {}
    for category, charts in CHARTS.items():
        if shown := [chart for chart in charts if any(map(chart.shows, tags))]:
            layout[category] = {chart.title: ["Multiline", [f"{tag}$" for tag in chart.tags]] for chart in shown}
    known = [chart for charts in CHARTS.values() for chart in charts]
    others = sorted(tag for tag in tags if not LEFT_OUT.fullmatch(tag) and not any(c.shows(tag) for c in known))
    if others:
        layout[OTHERS] = {tag: ["Multiline", [f"{re.escape(tag)}$"]] for tag in others}
    return layout


def final_numbers(tags: Iterable[str]) -> list[str]:
    """The names of a run's final numbers, the main ones first, each with that of its test behind all of validation.

    Those that only other kinds of runs have come last, as TensorBoard takes the columns of a table from one of several.

    Args:
        tags: Names of all curves.
    """
    measured = [tag for tag in tags if tag.startswith("val/")]
    main = [tag for tag in MAIN if tag in measured] + sorted(tag for tag in measured if re.fullmatch(DISTANCES, tag))
    ordered = [*main, *sorted(measured)]
    return list(dict.fromkeys([*ordered, *(tag.replace("val/", "test/", 1) for tag in ordered), *MAIN]))
