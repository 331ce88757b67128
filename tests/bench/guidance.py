"""Sampling with guidance in an interval of time against computing both halves at every step."""

import torch
from timing import best_times, table
from torch import Tensor

from ldm.condition import Labels
from ldm.guidance import Guidance
from ldm.models.lightningdit import LightningDiT
from ldm.samplers import Euler, VelocityField

SCALE, START, BATCH, STEPS = 4.0, 0.125, 16, 51


def always_both(model: LightningDiT, labels: Labels) -> VelocityField:
    """Guidance as public code has it: two halves everywhere, of which one is thrown away outside the interval."""
    both = labels.cat(labels.null())

    def field(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = model(x.repeat(2, 1, 1, 1), t.expand(2 * len(x)), both).velocity.chunk(2)
        guided = unconditional + SCALE * (conditional - unconditional)
        return torch.where(t < START, conditional, guided)

    return field


@torch.no_grad()
def main() -> None:
    """Prints the ratio, after a look whether the samples are the same."""
    torch.manual_seed(0)
    model = LightningDiT(input_size=8, depth=8, width=192, num_heads=6, num_classes=13).eval()
    for parameter in model.parameters():  # an untrained output is zero
        torch.nn.init.normal_(parameter, std=0.05)
    noise, labels = torch.randn(BATCH, *model.latent_shape), Labels(torch.arange(BATCH) % 13, 13)
    sampler, guidance = Euler(STEPS, shift=0.3), Guidance(SCALE, START)
    fields = {"interval": guidance.field(model, labels), "both": always_both(model, labels)}
    samples = {name: sampler(field, noise) for name, field in fields.items()}
    difference = (samples["interval"] - samples["both"]).abs().max().item()
    assert difference < 1e-4, f"the samples differ by {difference:.1e}"
    times = best_times(3, **{name: lambda field=field: sampler(field, noise) for name, field in fields.items()})
    outside = (sampler.times[:-1] < START).float().mean().item()
    title = f"Euler, {STEPS} points with shift 0.3, guidance in [{START}, 1], {BATCH} samples, CPU"
    row = (
        "time with two halves everywhere over that with the interval",
        f"{times['both'] / times['interval']:.2f}x",
        f"{2 / (2 - outside):.2f}x",
    )
    table(title, [row, ("largest difference of the samples", f"{difference:.0e}", "")], "", "measured", "by count")


if __name__ == "__main__":
    main()
