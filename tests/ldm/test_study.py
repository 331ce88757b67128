"""A study: which parts it has, and how they are run and gone on with."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import building
import pytest
import torch
import yaml
from building import CONFIGS, Build, build, build_ldm, count
from rich.console import Console

from ldm.study import runner as runner_module
from ldm.study.__main__ import main
from ldm.study.plan import Part, keys_of, parts_of, read_plan
from ldm.study.runner import Marks, Runner

PHOTOS = "study/photos.yaml"
IMAGENET = "study/imagenet/plan.yaml"


def words_of(plan: str, name: str, **options) -> str:
    (part,) = [part for part in parts_of(read_plan(plan), **options) if part.name == name]
    return " ".join(part.words)


# Plans


def test_a_plan_has_the_whole_chain_for_every_seed():
    parts = parts_of(read_plan(PHOTOS))
    names = [part.name for part in parts]
    assert len(names) == len(set(names)) == 3 * (5 + 4 + 4 + 6)
    known = set()
    for part in parts:  # each behind what it needs
        assert known.issuperset(part.needs)
        known.add(part.name)
    needs = {part.name: part.needs for part in parts}
    assert needs["seed1/ldm/reg"] == ("seed1/vfm_vae/latents",)
    assert needs["seed1/vfm_vae/latents"] == needs["seed1/vfm_vae/test"] == ("seed1/vfm_vae/weak",)
    assert needs["seed1/vfm_vae/weak"] == ("seed1/vfm_vae/strong",) and needs["seed1/vfm_vae/strong"] == ()


def test_commands_name_folders_seeds_and_what_they_begin_from():
    weak = words_of(PHOTOS, "seed2/vfm_vae/weak")
    assert weak.startswith("vfm_vae fit -c study/tokenizer.yaml -c study/vfm_vae.yaml --run.name=weak")
    assert "--run.folder=runs/study/seed2/vfm_vae --seed_everything=2 --model.seed=2 --data.seed=2" in weak
    assert "--model.init_from=runs/study/seed2/vfm_vae/strong/checkpoints/last.ckpt" in weak
    latents = words_of(PHOTOS, "seed2/vfm_vae/latents", of_tokenizers=["-c", "mine.yaml"])
    assert "-c runs/study/seed2/vfm_vae/weak/config.yaml -c study/latents_reg.yaml" in latents
    assert latents.endswith("--run.output=runs/study/seed2/vfm_vae/latents -c mine.yaml --trainer.precision=32-true")
    repa = words_of(PHOTOS, "seed2/ldm/repa", of_tokenizers=["no"], of_denoisers=["--trainer.devices=8"])
    assert "--data.root=runs/study/seed2/vfm_vae/latents" in repa and repa.endswith(" --trainer.devices=8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, "seeds: give at least one"),
        ({"seeds": [1, 1]}, "seeds: give at least one, and each once"),
        ({"question": {"ours": "mine", "others": []}}, "question: there is no 'mine'; the plan has aligned, conv"),
        (
            {"denoisers": {"a": {"title": "A", "tokenizer": "b", "configs": []}}},
            "denoisers.a.tokenizer: there is no 'b'",
        ),
    ],
)
def test_plans_that_make_no_study_are_refused(change, message, tmp_path):
    plan = yaml.safe_load((CONFIGS / PHOTOS).read_text()) | change
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(ValueError, match=message):
        read_plan(str(tmp_path / "plan.yaml"))


def test_a_mistake_in_a_plan_takes_one_line(tmp_path, capsys):
    for name in ("none.yaml", "none"):
        with pytest.raises(SystemExit):
            main([str(tmp_path / name)])
        assert f"there is no file '{tmp_path / name}'" in capsys.readouterr().err
    (tmp_path / "plan.yaml").write_text("folder: a\nsteps: 3\n")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "plan.yaml")])
    assert "steps" in capsys.readouterr().err


def test_keys_follow_configs_and_former_parts(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: 1")
    parts = [
        Part("first", "tokenizer", ("fit",), (str(file),), None),
        Part("second", "test", ("test",), (), None, ("first",)),
        Part("other", "test", ("test",), (), None),
    ]
    before = keys_of(parts)
    file.write_text("a: 2")
    after = keys_of(parts)
    assert before["first"] != after["first"] and before["second"] != after["second"]
    assert before["other"] == after["other"] != after["second"]
    file.unlink()
    with pytest.raises(ValueError, match="there is no file"):
        keys_of(parts)


# Configs


@pytest.fixture
def here(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/photos").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_tokenizers_differ_in_themselves_alone(here):
    """Same grid, images, batches and rates, and trained parameters within 10 %."""
    plan, counts, seen = read_plan(PHOTOS), {}, set()
    for name, tokenizer in plan.tokenizers.items():
        cli = build(*list(tokenizer.stages.values())[-1])
        model, options = cli.model.model, cli.config.fit
        counts[name] = sum(each.numel() for each in model.parameters() if each.requires_grad)
        assert model.compression == 16 and model.latent_channels == (128 if name == "rae" else 32)
        objective = (
            options.model.objective.init_args if "init_args" in options.model.objective else options.model.objective
        )
        same = (objective.l1, objective.l2, objective.perceptual, objective.adversarial, objective.adversarial_from)
        seen.add((options.model.max_images, options.data.batch_size, options.model.optimizer.init_args.lr, *same))
        assert model.decode(model.encode(torch.zeros(1, 3, 64, 64)).mode()).image.shape == (1, 3, 64, 64)
    assert len(seen) == 1
    assert max(counts.values()) <= 1.1 * min(counts.values()), counts


def test_denoisers_differ_in_latents_and_alignment_alone(here):
    denoisers, sizes = read_plan(PHOTOS).denoisers, {}
    assert denoisers["conv"].configs == denoisers["aligned"].configs == denoisers["vfm_vae"].configs
    for name in ("conv", "rae", "repa", "reg"):
        with torch.device("meta"):
            cli = build_ldm(*denoisers[name].configs, options=["--trainer.callbacks=null"])
        assert cli.model.model.grid == (4, 4) and cli.trainer.max_steps % 6 == 0
        assert cli.trainer.max_steps // cli.config.fit.trainer.val_check_interval >= 5
        assert set(cli.model.weights) == {"mse", "cosine"} | {"repa": {"align"}, "reg": {"align", "cls"}}.get(
            name, set()
        )
        sizes[name] = count(cli.model.model)
    assert sizes["rae"] <= 1.05 * sizes["conv"]


@pytest.mark.parametrize("name", [pytest.param("latents", marks=pytest.mark.slow), "latents_reg"])
def test_configs_of_caches_build(name, here):
    cli = build(
        "study/tokenizer.yaml", "study/rae.yaml", f"study/{name}.yaml", options=["--run.output=x"], command="predict"
    )
    assert cli.model.predict == "moments" and (cli.model.features is not None) == (name == "latents_reg")


def test_config_of_tests_builds(here):
    cli = build("study/tokenizer.yaml", "study/conv.yaml", "study/test.yaml", command="test")
    names = [name for each in cli.trainer.callbacks if hasattr(each, "names") for name in each.names()]
    assert {"fd_vit_photos_patch8_64", "fd_judge_photos"} <= set(names)


class Parse(Build):
    def instantiate_classes(self) -> None:
        self.trainer = None  # what is built would be downloaded


def test_configs_of_imagenet_exist():
    plan = read_plan(IMAGENET, seeds=[0])
    assert len(keys_of(parts_of(plan))) == 3 + 3 + 6 + 3 + 6  # three tokenizers of one stage, one of four; denoisers


@pytest.mark.slow
def test_configs_of_imagenet_parse(monkeypatch):
    """Every command line of one seed, with the files of data and trainer that `make` adds."""
    monkeypatch.setattr(building, "Build", Parse)
    plan = read_plan(IMAGENET, seeds=[0])
    data, trainer = "data/imagenet.yaml", "trainer/ddp8.yaml"
    for tokenizer in plan.tokenizers.values():
        *former, last = tokenizer.stages.values()
        for stage in former:
            build(*stage, data, trainer)
        build(*last, data, trainer)
        for command, configs in (("predict", tokenizer.latents), ("test", tokenizer.test)):
            found = build(*last, data, trainer, *configs, trainer, command=command).config[command]
            assert command == "test" or found.model.predict == "moments"
    for configs in {tuple(denoiser.configs): None for denoiser in plan.denoisers.values()}:
        cli = build_ldm(*configs, "trainer/ddp8_ldm.yaml")
        assert cli.config.fit.trainer.max_steps == 80_000


# Running


def script(text: str) -> tuple[str, ...]:
    """Words that make `python -m …` run a script; `timeit` runs its argument once."""
    return ("timeit", "-n1", "-r1", text)


def part(name: str, text: str = "pass", needs: tuple[str, ...] = (), output: Path | None = None, **changes) -> Part:
    return Part(name, changes.pop("kind", "tokenizer"), script(text), (), output, needs)


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs parts in a folder; returns the runner, whether all is done, and what it said."""
    monkeypatch.setattr(runner_module, "INTERVAL", 0.01)

    def run(*parts: Part, jobs: int = 1) -> tuple[Runner, bool, str]:
        console = Console(file=(tmp_path / "said").open("w"), width=200)
        runner = Runner(parts, tmp_path, jobs, console)
        done = runner.run()
        console.file.close()
        return runner, done, (tmp_path / "said").read_text()

    return run


def appending(file: Path, text: str) -> str:
    return f"open({str(file)!r}, 'a').write({text!r})"


def test_parts_wait_for_what_they_need_and_are_done_once(study, tmp_path):
    log = tmp_path / "log"
    parts = [
        part("a/one", appending(log, "1")),
        part("a/two", appending(log, "2"), ("a/one",), kind="latents"),
        part("b/one", appending(log, "3")),
    ]
    assert study(*parts)[1] and log.read_text() == "123"  # caches before further trainings
    _, done, said = study(*parts)
    assert done and log.read_text() == "123" and "3 of 3 parts are done already" in said
    assert Marks(tmp_path).read(parts[0])["done"] and (tmp_path / "parts/a.one.log").is_file()


def test_a_changed_part_is_done_anew_with_all_that_need_it(study, tmp_path):
    log, output = tmp_path / "log", tmp_path / "run"
    parts = [part("one", appending(log, "1"), output=output), part("two", appending(log, "2"), ("one",)), part("three")]
    study(*parts)
    output.mkdir()
    (output / "last.ckpt").touch()
    changed = [replace(parts[0], words=script(appending(log, "4"))), *parts[1:]]
    _, done, said = study(*changed)
    assert done and log.read_text() == "1242" and not output.exists()
    assert re.findall(r"(\w+): its command, its configs or what it needs changed", said) == ["one", "two"]


def test_a_part_that_fails_stops_the_study_after_others_have_finished(study, tmp_path):
    fails = part("fails", "print('why it failed'); raise SystemExit")
    slow = part("slow", f"import time; time.sleep(0.5); {appending(tmp_path / 'log', 'slow')}")
    runner, done, said = study(fails, slow, part("later", appending(tmp_path / "log", "later")), jobs=2)
    assert not done and [each.name for each in runner.failed] == ["fails"]
    assert (tmp_path / "log").read_text() == "slow"
    assert "fails: failed with exit code 1" in said and "why it failed" in said and "parts/fails.log" in said
    assert study(slow)[1]  # and is done


def test_what_was_stopped_is_not_done_though_it_ends_with_code_0(study, tmp_path):
    """As trainings do that save and end on SIGTERM."""
    ends = "import signal, time; signal.signal(15, lambda *_: exit(0))"
    text = f"{ends}; {appending(tmp_path / 'log', 'x')}; time.sleep(20)"
    output = tmp_path / "run"
    output.mkdir()
    waiting = part("waiting", text, output=output)

    def stop() -> None:
        while not (tmp_path / "log").exists():
            time.sleep(0.02)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    runner, done, _ = study(waiting, part("later"))
    thread.join()
    assert not done and runner.stopped_by == signal.SIGINT and not runner.failed
    assert not Marks(tmp_path).read(waiting)["done"] and output.is_dir()  # from which it goes on
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_two_studies_do_not_share_a_folder(study, tmp_path):
    (tmp_path / "parts").mkdir()
    with (tmp_path / "parts/lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="folder: a study is running in"):
            study(part("one"))


def test_the_end_is_expected_by_what_alike_parts_took(tmp_path):
    parts = [
        part(f"seed{seed}/{name}", kind=kind) for seed in (0, 1) for name, kind in (("a", "tokenizer"), ("b", "test"))
    ]
    runner = Runner(parts, tmp_path, 2, Console())
    assert runner.seconds_left() is None
    runner._seconds = {"seed0/a": 100.0}
    assert runner.seconds_left() == pytest.approx((100 + 20 + 20) / 2)  # tests by their weight
    runner._seconds |= {"seed0/b": 50.0}
    assert runner.seconds_left() == pytest.approx((100 + 50) / 2)


# The whole


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_miniature_study_runs_stops_and_goes_on(tmp_path):
    plan = miniature(tmp_path)
    command = [sys.executable, "-m", "ldm.study", str(plan), "--jobs=2"]
    environment = os.environ | {"PYTHONPATH": str(CONFIGS.parent)}
    first = subprocess.Popen(command, env=environment, cwd=tmp_path)
    mark = tmp_path / "runs/parts/seed0.vfm_vae.strong.json"
    while not (mark.is_file() and json.loads(mark.read_text())["done"]):
        assert first.poll() is None
        time.sleep(0.5)
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 128 + signal.SIGTERM
    strong = mark.stat().st_mtime
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    assert mark.stat().st_mtime == strong  # was not done again
    report = (tmp_path / "runs/report.md").read_text()
    assert report.startswith("**Not decided.**") and "By the judge, FD is" in report
    assert len(list((tmp_path / "runs").glob("*.png"))) == 5


def miniature(folder: Path) -> Path:
    """A plan of two tokenizers and three diffusion models, with a few steps each."""
    plan = yaml.safe_load((CONFIGS / PHOTOS).read_text())
    few = {
        "strong": {"model": {"max_images": 16, "objective": {"adversarial_from": 16}}},
        "last": {"model": {"max_images": 32, "objective": {"adversarial_from": 16}}},
        "ldm": {"trainer": {"max_steps": 4, "val_check_interval": 2}},
    }
    for name, options in few.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(options))
    plan["tokenizers"] = {name: plan["tokenizers"][name] for name in ("rae", "vfm_vae")}
    plan["denoisers"] = {name: plan["denoisers"][name] for name in ("rae", "vfm_vae", "reg")}
    for tokenizer in plan["tokenizers"].values():
        for stage, configs in tokenizer["stages"].items():
            configs.append(str(folder / ("strong.yaml" if stage == "strong" else "last.yaml")))
    for denoiser in plan["denoisers"].values():
        denoiser["configs"].append(str(folder / "ldm.yaml"))
    plan |= {"seeds": [0], "folder": str(folder / "runs"), "alignment": ["vfm_vae", "reg"]}
    plan["question"]["others"] = ["rae"]
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return folder / "plan.yaml"
