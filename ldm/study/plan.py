"""What a study trains and measures, and the parts that this takes."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from vfm_vae.cli import find_config

Kind = Literal["tokenizer", "latents", "test", "denoiser"]
LAST = "checkpoints/last.ckpt"


@dataclass(frozen=True)
class TokenizerPlan:
    """A tokenizer of the study.

    Attributes:
        title: What tables and figures call it.
        stages: Configs of each stage of its training, by the stage's name. A stage begins from the one before.
        latents: Configs of caching its latents, beside that of its last stage.
        test: Configs of measuring it, likewise.
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
class Plan:
    """A study.

    Attributes:
        folder: Folder of all that it writes.
        tokenizers: Its tokenizers by name.
        denoisers: Its diffusion models by name.
        distances: The distances that are reported, by what they are called; the last one has the last word.
        question: What the answer is about.
        data: What the data is and how it is split, for the table of the tokenizers.
        alignment: Names of diffusion models on the same latents that differ in alignment alone, plain one first.
        seeds: Seeds; the whole chain is run for each.
    """

    folder: str
    tokenizers: dict[str, TokenizerPlan]
    denoisers: dict[str, DenoiserPlan]
    distances: dict[str, Distance]
    question: Question
    data: str
    alignment: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def tokenizer_run(self, name: str, seed: int) -> Path:
        """Folder of a tokenizer's last stage."""
        return Path(self.folder, f"seed{seed}", name, list(self.tokenizers[name].stages)[-1])

    def denoiser_run(self, name: str, seed: int) -> Path:
        """Folder of a diffusion model's run."""
        return Path(self.folder, f"seed{seed}", "ldm", name)


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
    options = parser.instantiate_classes(parser.parse_path(find_config(file))).as_dict()
    plan = Plan(**options | {name: value for name, value in changes.items() if value is not None})
    if not plan.seeds or len(set(plan.seeds)) < len(plan.seeds):
        raise ValueError(f"seeds: give at least one, and each once; given {plan.seeds}")
    for name, denoiser in plan.denoisers.items():
        _check_names(f"denoisers.{name}.tokenizer", [denoiser.tokenizer], plan.tokenizers)
    compared = [plan.question.ours, *plan.question.others]
    _check_names("question", compared, plan.denoisers)
    _check_names("alignment", plan.alignment, plan.denoisers)
    if bare := [name for name, tokenizer in plan.tokenizers.items() if not tokenizer.stages]:
        raise ValueError(f"tokenizers.{bare[0]}.stages: give at least one stage to train")
    return plan


def _check_names(option: str, names: Iterable[str], known: Mapping[str, object]) -> None:
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
    tested = ("vfm_vae", "test", *trained, *_named(tokenizer.test), *checkpoint, "--run.entry=test", *exact)
    caching = Part(f"{title}/latents", "latents", cached, tuple(tokenizer.latents), latents, former)
    return [*parts, caching, Part(f"{title}/test", "test", tested, tuple(tokenizer.test), None, former)]


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
