"""The tables of an ablation: what each addition does to a diffusion model."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ldm.study.costs import Costs, costs_of
from ldm.study.plan import Ablation
from ldm.study.results import ACCURACY, CERTAIN, Comparison, Results, compare, pm
from ldm.study.tables import listed, table

ACCURACY_TITLE = "class accuracy"
VERDICTS = {
    "lower": "Lower FD than the baseline by every network",
    "higher": "Higher FD by every network",
    "not told apart": "Not told apart from the baseline by any network",
    "": "Told apart by one network and not, or otherwise, by another",
}


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        title: What was added.
        numbers: Distances and class accuracy over seeds, `[seeds]`, by the title of their column.
        costs: What it costs; None where that is not known any more.
    """

    title: str
    numbers: dict[str, NDArray[np.float64]]
    costs: Costs | None

    def against(self, baseline: "Row") -> dict[str, Comparison]:
        """Its numbers against the baseline's."""
        return {title: compare(values, baseline.numbers[title]) for title, values in self.numbers.items()}


def ablation_sections(results: Results, ablation: Ablation) -> list[str]:
    """What differs from the baseline, the table, and the same along training and at every scale of guidance."""
    baseline, *additions = [row_of(results, name) for name in (ablation.baseline, *ablation.additions)]
    sections = [summary(baseline, additions), rule(len(results.plan.seeds)), ablation_table(baseline, additions)]
    for title in results.plan.distances:
        sections += [f"### FD by the {title} along training", along_training(results, ablation, title)]
    if results.guided:
        sections += ["### Guided samples at every scale", scale_table(results)]
    return sections


def row_of(results: Results, name: str) -> Row:
    """A diffusion model at the end of its training, or guided samples at the scales that are chosen for them."""
    plan, tags = results.plan, _tags(results)
    if name in plan.denoisers:
        curves = results.curves[name]
        numbers = {title: curves[tag].values[:, -1] for title, tag in tags.items()}
        return Row(plan.denoisers[name].title, numbers, costs_of(plan, name))
    measured, scales = results.guided[name], chosen_scales(results, name)
    numbers = {
        title: np.array([measured[scale][tag][place] for place, scale in enumerate(scales)])
        for title, tag in tags.items()
    }
    said = " and ".join(f"{scale:g}" for scale in dict.fromkeys(scales))
    return Row(f"{plan.guided[name].title} (scale {said})", numbers, costs_of(plan, name))


def chosen_scales(results: Results, name: str) -> list[float]:
    """For each seed, the scale of guided samples with the lowest last distance on the other seeds.

    So no number takes part in its own choice, and guidance of all kinds is chosen alike.
    """
    measured = results.guided[name]
    tag = list(results.plan.distances.values())[-1].samples
    values = np.array([each[tag] for each in measured.values()])  # [scales, seeds]
    if len(values) == 1:
        return list(measured) * values.shape[1]
    of_others = (values.sum(1, keepdims=True) - values).argmin(0)  # [seeds]
    return [list(measured)[place] for place in of_others]


def summary(baseline: Row, additions: list[Row]) -> str:
    """Which additions made a difference to distances, in words."""
    found: dict[str, list[str]] = {}
    for row in additions:
        verdicts = {each.verdict for title, each in row.against(baseline).items() if title != ACCURACY_TITLE}
        found.setdefault(verdicts.pop() if len(verdicts) == 1 else "", []).append(row.title)
    return "\n".join(f"- **{said}:** {listed(found[kind], 'and')}." for kind, said in VERDICTS.items() if kind in found)


def rule(seeds: int) -> str:
    """How the table is read."""
    text = (
        "Each row adds one thing to the baseline, alone; steps, latents, seeds and measures are the same. A difference "
        f"counts if the means over seeds differ by more than {CERTAIN:g} standard deviations of the difference between "
        "two single runs, √(s₁² + s₂²), and the table says which way. "
    )
    if seeds == 2:
        # 2 √(s₁² + s₂²) is 2.83 standard errors of a t distribution with two degrees of freedom.
        text += (
            "Two seeds are few: of ten rows that do nothing, one would count by chance, and what is not told apart may "
            "still differ. "
        )
    return text + (
        "Guided samples are measured at several scales; each seed takes the one with the lowest FD by the last network "
        "on the other seeds. Numbers are mean ± standard deviation over seeds; costs are the first seed's."
    )


def ablation_table(baseline: Row, additions: list[Row]) -> str:
    """All rows, with what they cost, and the way in which numbers differ from the baseline's."""
    head = ["", *baseline.numbers, "parameters", "seconds of training", "GFLOP per sample"]
    rows = [[baseline.title, *map(pm_of, baseline.numbers, baseline.numbers.values()), *_costs(baseline.costs)]]
    for row in additions:
        cells = []
        for title, comparison in row.against(baseline).items():
            said = "" if comparison.verdict == "not told apart" else f", {comparison.verdict}"
            cells.append(pm_of(title, row.numbers[title]) + said)
        rows.append([row.title, *cells, *_costs(row.costs)])
    return table(head, rows)


def pm_of(title: str, values: NDArray[np.float64]) -> str:
    """A column's number as text."""
    return pm(values, 3 if title == ACCURACY_TITLE else 2)


def along_training(results: Results, ablation: Ablation, distance: str) -> str:
    """A distance of the trained rows at all points of training."""
    steps = results.samples(ablation.baseline, distance).steps
    rows = []
    for name in (ablation.baseline, *ablation.additions):
        if name in results.curves:
            values = results.samples(name, distance).values
            rows.append([results.plan.denoisers[name].title, *(pm(each, 2) for each in values.T)])
    return table(["", *(f"step {step}" for step in steps)], rows)


def scale_table(results: Results) -> str:
    """Guided samples at all scales, and where no guidance is, at scale 1."""
    rows = []
    for name, guided in results.plan.guided.items():
        for scale, measured in results.guided[name].items():
            cells = [pm_of(title, measured[tag]) for title, tag in _tags(results).items()]
            rows.append([guided.title, f"{scale:g}", *cells])
    return table(["", "scale", *_tags(results)], rows)


def _tags(results: Results) -> dict[str, str]:
    """The names under which the numbers of the table's columns are logged."""
    distances = {f"FD by the {title}": each.samples for title, each in results.plan.distances.items()}
    return distances | {ACCURACY_TITLE: ACCURACY}


def _costs(costs: Costs | None) -> list[str]:
    if costs is None:
        return ["", "", ""]
    return [f"{costs.parameters / 1e6:.2f} M", f"{costs.seconds:.0f}", f"{costs.gflops:.2f}"]
