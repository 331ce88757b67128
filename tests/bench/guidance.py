"""What guidance costs: in an interval of time, by an internal head, by a small partner."""

from tempfile import TemporaryDirectory

import torch
from timing import best_times, table
from torch import Tensor

from ldm.condition import Labels
from ldm.guidance import Autoguidance, Guidance, InternalGuidance
from ldm.models.lightningdit import LightningDiT
from ldm.pipeline import LatentDiffusion
from ldm.samplers import Euler, VelocityField
from vfm_vae.data.latents import LatentStatistics

SCALE, START, BATCH, STEPS = 4.0, 0.125, 8, 21


def always_both(model: LightningDiT, labels: Labels) -> VelocityField:
    """Guidance as public code has it: two halves everywhere, of which one is thrown away outside the interval."""
    both = labels.cat(labels.null())

    def field(x: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = model(x.repeat(2, 1, 1, 1), t.expand(2 * len(x)), both).velocity.chunk(2)
        guided = unconditional + SCALE * (conditional - unconditional)
        return torch.where(t < START, conditional, guided)

    return field


def denoiser(depth: int, width: int, num_heads: int) -> LightningDiT:
    """One that is not trained, but whose output is not zero either."""
    torch.manual_seed(0)
    model = LightningDiT(
        input_size=8, depth=depth, width=width, num_heads=num_heads, num_classes=13, base_depth=depth // 2
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def autoguidance() -> Autoguidance:
    """With a partner of an eighth of the parameters."""
    weak = LatentDiffusion(denoiser(depth=4, width=96, num_heads=3))
    weak.normalization.take(LatentStatistics(torch.zeros(1, 32, 1, 1), torch.ones(1, 32, 1, 1)))
    with TemporaryDirectory() as folder:
        weak.save_pretrained(folder)
        guidance = Autoguidance(folder, SCALE)
        guidance.prepare(weak)
    return guidance


@torch.no_grad()
def main() -> None:
    """Prints the ratios, after a look whether the samples are the same where they should be."""
    model = denoiser(depth=8, width=192, num_heads=6)
    noise, labels = torch.randn(BATCH, *model.latent_shape), Labels(torch.arange(BATCH) % 13, 13)
    sampler = Euler(STEPS, shift=0.3)
    kinds = {
        "plain": Guidance(),
        "interval": Guidance(SCALE, START),
        "classifier-free": Guidance(SCALE),
        "internal": InternalGuidance(SCALE),
        "autoguidance": autoguidance(),
    }
    fields = {name: guidance.field(model, labels) for name, guidance in kinds.items()}
    fields["both"] = always_both(model, labels)
    difference = (sampler(fields["interval"], noise) - sampler(fields["both"], noise)).abs().max().item()
    assert difference < 1e-4, f"the samples differ by {difference:.1e}"
    times = best_times(3, **{name: lambda field=field: sampler(field, noise) for name, field in fields.items()})
    outside = (sampler.times[:-1] < START).float().mean().item()
    small = sum(p.numel() for p in denoiser(4, 96, 3).blocks.parameters())
    share = small / sum(p.numel() for p in model.blocks.parameters())

    def row(what: str, name: str, other: str, count: float) -> tuple[str, str, str]:
        return what, f"{times[name] / times[other]:.2f}x", f"{count:.2f}x"

    rows = [
        row(f"two halves everywhere over guidance in [{START}, 1]", "both", "interval", 2 / (2 - outside)),
        row("internal guidance over none", "internal", "plain", 1),
        row("autoguidance over none", "autoguidance", "plain", 1 + share),
        row("autoguidance over classifier-free guidance", "autoguidance", "classifier-free", (1 + share) / 2),
        ("largest difference of the samples of the first row", f"{difference:.0e}", ""),
    ]
    title = f"Euler, {STEPS} points with shift 0.3, {BATCH} samples, CPU: times of sampling"
    table(title, rows, "", "measured", "by count")


if __name__ == "__main__":
    main()
