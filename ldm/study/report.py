"""The report of a study: tables, figures and the answer in plain words."""

from pathlib import Path

from ldm.study.ablation import ablation_sections
from ldm.study.figures import draw_figures
from ldm.study.plan import Plan, Question
from ldm.study.results import ACCURACY, CERTAIN, Comparison, Results, compare, facts_of, pm
from ldm.study.tables import listed, table
from vfm_vae.writing import write_text

MEASURES = {
    "PSNR": "test/psnr",
    "SSIM": "test/ssim",
    "CKNNA with the VFM": "test/cknna/latent",
    "SE-CKNNA, mean": "test/se_cknna/latent/mean",
    "robustness, mean": "test/robustness/latent/mean",
    "linear probe": "test/probe/latent",
}
SE_CKNNA = "test/se_cknna/latent/"


def write_report(plan: Plan) -> Path:
    """Writes `report.md` and its figures into the study's folder; returns the former's path.

    Raises:
        ValueError: if a part of the study is not done.
    """
    results, folder = Results(plan), Path(plan.folder)
    figures = [f"![{title}]({file.name})" for title, file in draw_figures(results, folder).items()]
    sections: list[str] = []
    if plan.question is not None:
        sections += question_sections(results, plan.question, figures)
    if plan.ablation is not None:
        sections += ablation_sections(results, plan.ablation)
    if plan.question is None:
        sections += ["### Figures", *figures]
    report = folder / "report.md"
    write_text(report, "\n\n".join(sections) + "\n")
    return report


def question_sections(results: Results, question: Question, figures: list[str]) -> list[str]:
    """The answer to a study's question, and all that it rests on."""
    plan = results.plan
    sections = [
        answer(results, question),
        rule(),
        *figures,
        "## Diffusion models at the end of training",
        final_table(results),
        *(
            text
            for name in plan.distances
            for text in (f"### FD by the {name} along training", curve_table(results, name))
        ),
        "## Tokenizers",
        tokenizer_table(results),
        "### SE-CKNNA by transformation",
        transformation_table(results),
        "### How they were trained",
        table(["", *(each.title for each in plan.tokenizers.values())], _columns(plan)),
    ]
    if plan.alignment:
        sections += ["## Alignment of the diffusion model", alignment_table(results)]
    return sections


def answer(results: Results, question: Question) -> str:
    """The plain answer, followed by what it rests on."""
    plan = results.plan
    ours, last = plan.denoisers[question.ours].title, _steps(results)[-1]
    verdicts = {
        distance: {other: comparison_at(results, question, distance, other, -1) for other in question.others}
        for distance in plan.distances
    }
    found = [comparison.verdict for each in verdicts.values() for comparison in each.values()]
    others = listed([plan.denoisers[name].title for name in question.others], "or")
    if len(plan.seeds) < 2:
        head = f"**Not decided.** One seed can't tell whether differences between {ours} and {others} are chance."
    elif set(found) == {"lower"}:
        head = f"**Yes.** The same diffusion model reaches lower FD on latents of {ours} than on those of {others}"
        head += f" after {last} steps, by every network."
    elif "lower" not in found:
        head = f"**No.** After {last} steps, the same diffusion model does not reach lower FD on latents of {ours}"
        head += f" than on those of {others}, by any network."
    else:
        head = (
            f"**Not in every case.** After {last} steps, whether the same diffusion model reaches lower FD on latents"
        )
        head += f" of {ours} depends on the tokenizer it is compared with, or on the network that measures."
    return " ".join([head, *(_sentence(results, question, distance, each) for distance, each in verdicts.items())])


def _sentence(results: Results, question: Question, distance: str, comparisons: dict[str, Comparison]) -> str:
    """What one network says of all pairs."""
    plan = results.plan
    texts = []
    for other, comparison in comparisons.items():
        title, value = plan.denoisers[other].title, pm(results.samples(other, distance).values[:, -1], 2)
        points = [comparison_at(results, question, distance, other, point) for point in range(len(_steps(results)))]
        lower = sum(point.verdict == "lower" for point in points)
        verdict = f"{comparison.verdict} {'from that' if comparison.verdict == 'not told apart' else 'than'}"
        texts.append(f"{verdict} on {title} ({value}; lower at {lower} of {len(points)} points of training)")
    own = pm(results.samples(question.ours, distance).values[:, -1], 2)
    return f"By the {distance}, FD is {own}: {listed(texts, 'and')}."


def rule() -> str:
    """How the answer is found."""
    return (
        f"A difference counts if the means over all seeds of the whole chain, tokenizer and "
        f"diffusion model, differ by more than {CERTAIN:g} standard deviations of the difference between two single "
        "runs, √(s₁² + s₂²). “Yes” takes a lower FD than each of the others by every network at the last point; “no” "
        "means that it is not lower than any of them by any network. Numbers are mean ± standard deviation over seeds."
    )


def comparison_at(results: Results, question: Question, distance: str, other: str, point: int) -> Comparison:
    """The model in question against another one, at a point of training."""
    ours = results.samples(question.ours, distance).values[:, point]
    return compare(ours, results.samples(other, distance).values[:, point])


def final_table(results: Results) -> str:
    """Each diffusion model at the last point of training."""
    plan = results.plan
    rows = []
    for name, denoiser in plan.denoisers.items():
        distances = [pm(results.samples(name, distance).values[:, -1], 2) for distance in plan.distances]
        rows.append([denoiser.title, *distances, pm(results.curves[name][ACCURACY].values[:, -1])])
    return table(["latents of", *(f"FD by the {name}" for name in plan.distances), "class accuracy"], rows)


def curve_table(results: Results, distance: str) -> str:
    """A distance of each diffusion model at all points of training."""
    plan = results.plan
    rows = []
    for name, denoiser in plan.denoisers.items():
        values = results.samples(name, distance).values
        rows.append([denoiser.title, *(pm(values[:, point], 2) for point in range(values.shape[1]))])
    return table(["latents of", *(f"step {step}" for step in _steps(results))], rows)


def tokenizer_table(results: Results) -> str:
    """Reconstruction and latents of each tokenizer."""
    distances = {f"FD by the {name}": each.reconstructions for name, each in results.plan.distances.items()}
    return _measured(results, MEASURES | distances)


def transformation_table(results: Results) -> str:
    """SE-CKNNA of each tokenizer under each transformation."""
    first = next(iter(results.tokenizers.values()))
    return _measured(results, {tag.removeprefix(SE_CKNNA).replace("_", " "): tag for tag in first if SE_CKNNA in tag})


def alignment_table(results: Results) -> str:
    """Diffusion models on the same latents that differ in their alignment: distances, accuracy, CKNNA of blocks."""
    names, plan = results.plan.alignment, results.plan
    rows = [
        [f"FD of samples by the {distance}", *(pm(results.samples(name, distance).values[:, -1], 2) for name in names)]
        for distance in plan.distances
    ]
    rows.append(["class accuracy", *(pm(results.curves[name][ACCURACY].values[:, -1]) for name in names)])
    blocks = {name: results.blocks(name) for name in names}
    for number in blocks[names[0]]:
        values = [pm(blocks[name][number].values[:, -1]) if number in blocks[name] else "" for name in names]
        rows.append([f"CKNNA of block {number}", *values])
    return table(["", *(plan.denoisers[name].title for name in names)], rows)


def _measured(results: Results, measures: dict[str, str]) -> str:
    rows = []
    for title, tag in measures.items():
        rows.append([title, *(pm(each[tag]) if tag in each else "" for each in results.tokenizers.values())])
    return table(["", *(each.title for each in results.plan.tokenizers.values())], rows)


def _columns(plan: Plan) -> list[list[str]]:
    """The facts of all tokenizers, a row for each fact."""
    facts = [facts_of(plan, name) for name in plan.tokenizers]
    return [[fact, *(each[fact] for each in facts)] for fact in facts[0]]


def _steps(results: Results) -> list[int]:
    return results.samples(next(iter(results.plan.denoisers)), next(iter(results.plan.distances))).steps
