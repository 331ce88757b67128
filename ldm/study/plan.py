"""What a study trains and measures, and the parts that this takes."""

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from vfm_vae.cli import find_config

Kind = Literal["tokenizer", "latents", "test", "denoiser", "guided"]
LAST = "checkpoints/last.ckpt"
ENTRY = "test"  # of what is measured after training, in a run's metrics.json


@dataclass(frozen=True)
class TokenizerPlan:
    """A tokenizer of the study.

    Attributes:
        title: What tables and figures call it.
        stages: Configs of each stage of its training, by the stage's name. A stage begins from the one before.
        latents: Configs of caching its latents, beside that of its last stage.
        test: Configs of measuring it, likewise; none if it is not measured.
    """

    title: str
    stages: dict[str, list[str]]
    latents: list[str]
    test: list[str]


@dataclass(frozen=True)
class DenoiserPlan:
    """A diffusion model of the study.

    Attributes:
        title: What tables and figures call it.
        tokenizer: Name of the tokenizer whose latents it is trained on.
        configs: Configs of its training.
    """

    title: str
    tokenizer: str
    configs: list[str]


@dataclass(frozen=True)
class GuidedPlan:
    """Samples of a trained diffusion model under a guidance, measured at several scales.

    Attributes:
        title: What tables call it.
        denoiser: Name of the diffusion model whose samples are guided.
        configs: Configs that choose the guidance, beside that of the diffusion model's training.
        scales: Scales of the guidance.
        partner: Name of the diffusion model that samples are guided away from, for autoguidance.
    """

    title: str
    denoiser: str
    configs: list[str]
    scales: list[float]
    partner: str | None = None


@dataclass(frozen=True)
class Distance:
    """A Fréchet distance, by the names that runs log it under.

    Attributes:
        samples: Name for a diffusion model's samples.
        reconstructions: Name for a tokenizer's reconstructions.
    """

    samples: str
    reconstructions: str


@dataclass(frozen=True)
class Question:
    """Which diffusion models the study's answer compares.

    Attributes:
        ours: Name of the one in question.
        others: Names of those that it is compared with, which differ in the tokenizer alone.
    """

    ours: str
    others: list[str]


@dataclass(frozen=True)
class Ablation:
    """What is added to a diffusion model, one thing at a time.

    Attributes:
        baseline: Name of the diffusion model that has no addition.
        additions: Names of diffusion models and guided samples that have one addition each, in the table's order.
    """

    baseline: str
    additions: list[str]


@dataclass(frozen=True)
class Plan:
    """A study.

    What it reports follows from what it has: the answer to its question, or the table of an ablation, or both.

    Attributes:
        folder: Folder of all that it writes.
        tokenizers: Its tokenizers by name.
        denoisers: Its diffusion models by name.
        distances: The distances that are reported, by what they are called; the last one has the last word.
        data: What the data is and how it is split, for the table of the tokenizers.
        question: What the answer is about; None if no tokenizers are compared.
        alignment: Names of diffusion models on the same latents that differ in alignment alone, plain one first.
        seeds: Seeds; the whole chain is run for each.
        guided: Guided samples of its diffusion models by name.
        ablation: Which of these are compared as additions to one; None if none are.
    """

    folder: str
    tokenizers: dict[str, TokenizerPlan]
    denoisers: dict[str, DenoiserPlan]
    distances: dict[str, Distance]
    data: str
    question: Question | None = None
    alignment: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    guided: dict[str, GuidedPlan] = field(default_factory=dict)
    ablation: Ablation | None = None

    def tokenizer_run(self, name: str, seed: int) -> Path:
        """Folder of a tokenizer's last stage."""
        return Path(self.folder, f"seed{seed}", name, list(self.tokenizers[name].stages)[-1])

    def denoiser_run(self, name: str, seed: int) -> Path:
        """Folder of a diffusion model's run."""
        return Path(self.folder, f"seed{seed}", "ldm", name)

    def guided_run(self, name: str, scale: float, seed: int) -> Path:
        """Folder of what guided samples at one scale were measured to be."""
        return Path(self.folder, f"seed{seed}", "guided", f"{name}_{scale:g}")


@dataclass(frozen=True)
class Part:
    """One command of a study.

    Attributes:
        name: What it is called, such as `seed0/vfm_vae/strong`; the same for all seeds but for its beginning.
        kind: What it does.
        words: The command line behind `python -m`.
        configs: Those of its configs that come with the study; others are made by parts before it.
        output: Folder that is its own, and that is emptied before it is done anew; None if there is none.
        needs: Names of the parts that come before it.
    """

    name: str
    kind: Kind
    words: tuple[str, ...]
    configs: tuple[str, ...]
    output: Path | None
    needs: tuple[str, ...] = ()


def read_plan(file: str, **changes: object) -> Plan:
    """Reads a plan.

    Args:
        file: A YAML file, or the name of one that comes with the package, such as `study/photos.yaml`.
        **changes: Options that are other than in the file; None leaves one as it is.

    Raises:
        ValueError: if it is not a plan, or names what it does not have.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Plan)
    if not Path(found := find_config(file)).is_file():
        raise ValueError(f"plan: there is no file {file!r}; give a YAML file, such as study/photos.yaml")
    options = parser.instantiate_classes(parser.parse_path(found)).as_dict()
    plan = Plan(**options | {name: value for name, value in changes.items() if value is not None})
    if not plan.seeds or len(set(plan.seeds)) < len(plan.seeds):
        raise ValueError(f"seeds: give at least one, and each once; given {plan.seeds}")
    for name, denoiser in plan.denoisers.items():
        _check_names(f"denoisers.{name}.tokenizer", [denoiser.tokenizer], plan.tokenizers)
    if bare := [name for name, tokenizer in plan.tokenizers.items() if not tokenizer.stages]:
        raise ValueError(f"tokenizers.{bare[0]}.stages: give at least one stage to train")
    if plan.question is not None:
        _check_names("question", [plan.question.ours, *plan.question.others], plan.denoisers)
    _check_names("alignment", plan.alignment, plan.denoisers)
    _check_guided(plan)
    if plan.ablation is not None:
        _check_names("ablation.baseline", [plan.ablation.baseline], plan.denoisers)
        _check_names("ablation.additions", plan.ablation.additions, [*plan.denoisers, *plan.guided])
    return plan


def _check_guided(plan: Plan) -> None:
    for name, guided in plan.guided.items():
        _check_names(f"guided.{name}.denoiser", [guided.denoiser], plan.denoisers)
        _check_names(f"guided.{name}.partner", [guided.partner] if guided.partner else [], plan.denoisers)
        if name in plan.denoisers:
            raise ValueError(f"guided.{name}: a diffusion model has this name, too; choose another")
        if not guided.scales:
            raise ValueError(f"guided.{name}.scales: give at least one")
        if len(guided.scales) > 1 and len(plan.seeds) < 2:
            raise ValueError(
                f"seeds: give at least two, as the scale of guided.{name} is chosen for each by the others; or give "
                "it a single scale"
            )


def _check_names(option: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: there is no {name!r}; the plan has {', '.join(known)}")


def parts_of(plan: Plan, of_tokenizers: Iterable[str] = (), of_denoisers: Iterable[str] = ()) -> list[Part]:
    """The parts of a study, each behind those that it needs.

    Args:
        plan: The study.
        of_tokenizers: Further words of all commands of tokenizers.
        of_denoisers: Further words of all commands of diffusion models.
    """
    parts: list[Part] = []
    for seed in plan.seeds:
        for name in plan.tokenizers:
            parts += _tokenizer_parts(plan, name, seed, tuple(of_tokenizers))
        for name, denoiser in plan.denoisers.items():
            run = plan.denoiser_run(name, seed)
            former = f"seed{seed}/{denoiser.tokenizer}"
            options = (
                f"--data.root={_latents(plan, denoiser.tokenizer, seed)}",
                f"--model.tokenizer.checkpoint={plan.tokenizer_run(denoiser.tokenizer, seed) / LAST}",
            )
            words = ("ldm", "fit", *_of_run(denoiser.configs, run, seed), *options, *of_denoisers)
            needs = (f"{former}/latents",)
            parts.append(Part(f"seed{seed}/ldm/{name}", "denoiser", words, tuple(denoiser.configs), run, needs))
        for name in plan.guided:
            parts += _guided_parts(plan, name, seed, tuple(of_denoisers))
    return parts


def _guided_parts(plan: Plan, name: str, seed: int, further: tuple[str, ...]) -> list[Part]:
    """Measurements of a trained diffusion model's guided samples, one for each scale."""
    guided = plan.guided[name]
    run, needs = plan.denoiser_run(guided.denoiser, seed), [f"seed{seed}/ldm/{guided.denoiser}"]
    begins = ["ldm", "validate", "-c", f"{run}/config.yaml", *_named(guided.configs), f"--ckpt_path={run / LAST}"]
    if guided.partner is not None:
        begins.append(f"--model.guidance.partner={plan.denoiser_run(guided.partner, seed) / LAST}")
        needs.append(f"seed{seed}/ldm/{guided.partner}")
    parts = []
    for scale in guided.scales:
        output = plan.guided_run(name, scale, seed)
        place = (f"--run.name={output.name}", f"--run.folder={output.parent}", f"--run.entry={ENTRY}")
        words = (*begins, f"--model.guidance.scale={scale:g}", *place, *further, "--trainer.precision=32-true")
        title = f"seed{seed}/guided/{output.name}"
        parts.append(Part(title, "guided", words, tuple(guided.configs), output, tuple(needs)))
    return parts


def _tokenizer_parts(plan: Plan, name: str, seed: int, further: tuple[str, ...]) -> list[Part]:
    tokenizer, title = plan.tokenizers[name], f"seed{seed}/{name}"
    folder = Path(plan.folder, title)
    parts: list[Part] = []
    former: tuple[str, ...] = ()
    for stage, configs in tokenizer.stages.items():
        begins = [f"--model.init_from={folder / Path(name).name / LAST}" for name in former]
        words = ("vfm_vae", "fit", *_of_run(configs, folder / stage, seed), *begins, *further)
        parts.append(Part(f"{title}/{stage}", "tokenizer", words, tuple(configs), folder / stage, former))
        former = (f"{title}/{stage}",)
    run, latents = plan.tokenizer_run(name, seed), _latents(plan, name, seed)
    trained = ("-c", f"{run}/config.yaml")
    checkpoint = (f"--ckpt_path={run / LAST}",)
    exact = (*further, "--trainer.precision=32-true")  # a GPU's trainer file may have another one, for training
    cached = (
        "vfm_vae",
        "predict",
        *trained,
        *_named(tokenizer.latents),
        *checkpoint,
        f"--run.output={latents}",
        *exact,
    )
    parts.append(Part(f"{title}/latents", "latents", cached, tuple(tokenizer.latents), latents, former))
    if tokenizer.test:
        tested = ("vfm_vae", "test", *trained, *_named(tokenizer.test), *checkpoint, f"--run.entry={ENTRY}", *exact)
        parts.append(Part(f"{title}/test", "test", tested, tuple(tokenizer.test), None, former))
    return parts


def _latents(plan: Plan, tokenizer: str, seed: int) -> Path:
    return Path(plan.folder, f"seed{seed}", tokenizer, "latents")


def _named(configs: Iterable[str]) -> list[str]:
    return [word for config in configs for word in ("-c", config)]


def _of_run(configs: Iterable[str], run: Path, seed: int) -> list[str]:
    """The words of a training: configs, then where it goes and all seeds that it has."""
    seeds = [f"--{option}={seed}" for option in ("seed_everything", "model.seed", "data.seed")]
    return [*_named(configs), f"--run.name={run.name}", f"--run.folder={run.parent}", *seeds]


def keys_of(parts: Iterable[Part]) -> dict[str, str]:
    """A hash of everything that each part depends on, by name: its command, its configs and the parts before it.

    Args:
        parts: The parts, each behind those that it needs.

    Raises:
        ValueError: if a config is missing.
    """
    keys: dict[str, str] = {}
    for part in parts:
        known = hashlib.sha256("\0".join([*part.words, *(keys[name] for name in part.needs)]).encode())
        for config in part.configs:
            if not Path(file := find_config(config)).is_file():
                raise ValueError(f"{part.name}: there is no config {config!r}")
            known.update(Path(file).read_bytes())
        keys[part.name] = known.hexdigest()
    return keys
