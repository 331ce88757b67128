"""The page on a run: its numbers are those of metrics.json, whatever kind of run it is."""

import html
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from run_folders import (
    KINDS,
    NASTY,
    TOKENIZER,
    curve,
    former,
    interrupted,
    log,
    picture,
    session,
    tokenizer,
    write_metrics,
    write_run,
)

from vfm_vae.report import changes, page
from vfm_vae.report.__main__ import main, write_report
from vfm_vae.report.charts import axes_of
from vfm_vae.report.folders import read_subjects


@pytest.fixture(autouse=True)
def shipped(monkeypatch: pytest.MonkeyPatch):
    """The programs' parsers take a second; the shipped config is known here."""
    monkeypatch.setattr(changes, "parsed", lambda program, configs: TOKENIZER)


class Cells(HTMLParser):
    """The cells of numbers, each with its attributes and what it shows; and all tags and settings."""

    def __init__(self, text: str):
        super().__init__()
        self.numbers, self.settings, self.tags, self._open = [], Counter(), set(), None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attributes = dict(attrs)
        self._open = attributes if {"data-value", "data-setting"} & attributes.keys() else None
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:", "#")), value  # nothing from elsewhere

    def handle_data(self, data):
        if self._open is not None and "data-value" in self._open:
            self.numbers.append((self._open, data))
        elif self._open is not None:
            self.settings[self._open["data-setting"], data] += 1
        self._open = None


def made(*folders: Path) -> str:
    return write_report([str(folder) for folder in folders], str(folders[0].parent / "out.html")).read_text()


def check_numbers(text: str, *folders: Path) -> Cells:
    """Every number of the folders' metrics is on the page, and none else."""
    cells = Cells(text)
    shown = {
        (cell["data-subject"], cell["data-file"], cell["data-entry"], cell["data-metric"]): json.loads(
            cell["data-value"]
        )
        for cell, _ in cells.numbers
    }
    there = {}
    for folder in folders:
        for file in folder.rglob("metrics.json"):
            for name, entry in json.loads(file.read_text()).items():
                numbers = {key: entry[key] for key in ("epoch", "step", "images_seen")} | entry["metrics"]
                place = (folder.name, str(file.relative_to(folder)), name)
                there |= {(*place, metric): value for metric, value in numbers.items()}
                for key, value in entry["settings"]["CKNNACallback"].items():
                    assert cells.settings[f"CKNNACallback.{key}", json.dumps(value)]
    assert shown == there
    for cell, told in cells.numbers:
        value = json.loads(cell["data-value"])
        if value is None:
            assert told == "not finite"
        else:
            assert math.isclose(float(told.replace(",", "")), value, rel_tol=6e-4, abs_tol=1e-12), (cell, told)
    return cells


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_that_of_the_metrics(tmp_path: Path, kind: str):
    KINDS[kind](tmp_path / kind)
    text = made(tmp_path / kind)
    cells = check_numbers(text, tmp_path / kind)
    assert "script" not in cells.tags and "link" in cells.tags and len(text.encode()) < 10_000_000
    assert NASTY not in text and "{{" not in text and "None" not in text
    known = {"What was trained", "along training", "Skipped, damaged, interrupted"}
    assert all(title in text for title in known)


def test_what_a_tokenizer_s_page_tells(tmp_path: Path):
    tokenizer(tmp_path / "demo")
    text = html.unescape(made(tmp_path / "demo"))
    assert (
        "VFMVAE on vit_small, images in data/photos at 64 px; in 2 stages, strong → weak: 1,600 images, finished."
        in text
    )
    assert "Stages follow one another: strong to 800, then weak to 1,600" in text
    assert "python -m vfm_vae fit -c demo/tokenizer.yaml -c demo/strong.yaml --model.seed=1" in text
    for told in ("8 x NVIDIA H100 80GB HBM3, bf16-mixed", "41.25 GB", "1 h 30 min", "0123456789 with changes"):
        assert told in text
    assert "weak, session 1: stopped by a signal at 1,200 images" in text
    assert "weak, session 2: 2 steps refused" in text and "weak, session 2: 3 damaged images left out" in text
    assert "weak_test: not finite: test/ssim" in text
    assert text.count("model.max_images") and "<td><code>800</code></td><td><code>1600</code></td>" in text
    assert len(re.findall("<img ", text)) == 2 and "Standard deviation of the noise" in text
    assert "<h3>Learning rate and gradients</h3>" in text and "val/psnr" in text
    assert "what it is, and what it can be compared with" in text and "published PSNR on the same images" in text


def test_stages_are_one_line_and_several_runs_lie_over_one_another(tmp_path: Path):
    tokenizer(tmp_path / "a")
    (axis,) = axes_of(read_subjects([tmp_path / "a"]), points=100)
    (panel,) = [panel for group in axis.groups for panel in group.panels if panel.name == "train/loss_l1"]
    assert panel.drawing.count("<polyline") == 1 and panel.drawing.count('class="mark"') == 1 and not axis.labels
    tokenizer(tmp_path / "b")
    (axis,) = axes_of(read_subjects([tmp_path / "a", tmp_path / "b"]), points=100)
    (panel,) = [panel for group in axis.groups for panel in group.panels if panel.name == "train/loss_l1"]
    assert [label.text for label in axis.labels] == ["a: strong → weak", "b: strong → weak"]
    assert panel.drawing.count('class="c0"') >= 1 and panel.drawing.count('class="c1"') >= 1


def test_runs_side_by_side(tmp_path: Path):
    for name, lr, psnr in (("a", 0.002, 20.0), ("b", 0.004, 21.0)):
        optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": lr}}
        config = TOKENIZER | {"model": TOKENIZER["model"] | {"optimizer": optimizer}, "run": {"name": name}}
        write_run(tmp_path / name, config, {"train/loss_l1": curve(1.0)}, [session()])
        write_metrics(tmp_path / name / "metrics.json", run={"val/psnr": psnr, "val/unknown": psnr})
    text = made(tmp_path / "a", tmp_path / "b")
    cells = check_numbers(text, tmp_path / "a", tmp_path / "b")
    best = [(cell["data-subject"], cell["data-metric"]) for cell, _ in cells.numbers if "best" in cell["class"]]
    assert best == [("b", "val/psnr")]  # of others no better way is known
    section = text[text.index('id="differences"') : text.index('id="trained"')]
    assert re.findall(r"<code>(.*?)</code>", section) == ["model.optimizer.lr", "0.002", "0.004"]


def test_the_page_goes_beside_what_it_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    former(tmp_path / "runs/a b")
    former(tmp_path / "runs/c")
    monkeypatch.chdir(tmp_path)
    main(["runs/a b"])
    assert (tmp_path / "runs/a b/report.html").is_file()
    main(["runs/a b", "runs/c"])
    assert (tmp_path / "runs/report.html").is_file()
    assert "Report: runs/a b/report.html (" in capsys.readouterr().out


def test_a_run_whose_numbers_lie_in_a_file_that_others_share(tmp_path: Path):
    tokenizer(tmp_path / "demo")
    text = made(tmp_path / "demo/weak")
    entries = {cell["data-entry"] for cell, _ in Cells(text).numbers}
    assert entries == {"weak"}


def test_a_former_version_s_steps_become_images(tmp_path: Path):
    former(tmp_path)
    (subject,) = read_subjects([tmp_path])
    curves = subject.runs[0].curves
    assert curves.values["train/loss_l1"].at.tolist() == list(range(80, 801, 80))
    assert curves.values["val/psnr"].at.tolist() == [800] and "hp_metric" not in curves.values
    assert "no history.json" in made(tmp_path)
    (tmp_path / "by_steps").mkdir()  # where they move to once such a run goes on
    for file in tmp_path.glob("events*"):
        file.rename(tmp_path / "by_steps" / file.name)
    log(tmp_path, {"train/loss_l1": {880: 0.5}, "val/psnr": {880: 21.0}})
    (subject,) = read_subjects([tmp_path])
    assert len(subject.runs) == 1
    assert subject.runs[0].curves.values["train/loss_l1"].at.tolist() == list(range(80, 881, 80))


def test_a_run_that_goes_on_from_an_older_checkpoint_shows_each_position_once(tmp_path: Path):
    write_run(
        tmp_path, TOKENIZER, {"train/loss_l1": {100: 1.0, 200: 2.0, 300: 3.0}, "val/psnr": {200: 20.0, 300: 30.0}}
    )
    (first,) = tmp_path.glob("events*")
    first.rename(tmp_path / "events.out.tfevents.1.a")
    log(tmp_path, {"train/loss_l1": {250: 5.0, 350: 6.0}})
    curves = read_subjects([tmp_path])[0].runs[0].curves.values
    assert dict(zip(curves["train/loss_l1"].at.tolist(), curves["train/loss_l1"].values, strict=True)) == {
        100: 1.0, 200: 2.0, 250: 5.0, 350: 6.0,
    }  # fmt: skip
    assert curves["val/psnr"].at.tolist() == [200]


@pytest.mark.parametrize("damage", ["cut", "garbage", "no number"])
def test_damaged_event_files(tmp_path: Path, damage: str):
    values = curve(1.0) | ({800: math.nan} if damage == "no number" else {})
    write_run(tmp_path, TOKENIZER, {"train/loss_l1": values})
    (file,) = tmp_path.glob("events*")
    content = file.read_bytes()
    if damage != "no number":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + (b"garbage" * 9 + content[middle:] if damage == "garbage" else b""))
    found = read_subjects([tmp_path])[0].runs[0].curves.values["train/loss_l1"]
    assert len(found.at) == 19 if damage == "no number" else 5 < len(found.at) < 20
    text = made(tmp_path)
    assert ("train/loss_l1 was not finite at 1 of 20 points" in text) == (damage == "no number")


def test_what_others_chose_is_text(tmp_path: Path):
    config = TOKENIZER | {"data": {"root": NASTY, "image_size": 64}, NASTY: 1}
    sessions = [session(command=NASTY, error=NASTY, outcome="failed", device=NASTY, options=[NASTY])]
    write_run(tmp_path, config, {"train/loss_l1": curve(1.0), f"val/{NASTY}": {8: 1.0}}, sessions)
    write_metrics(tmp_path / "metrics.json", **{NASTY: {f"val/{NASTY}": 1.0}})
    cells = Cells(text := made(tmp_path))
    assert "script" not in cells.tags and "<script" not in text.lower()
    assert any(cell["data-entry"] == NASTY and cell["data-metric"] == f"val/{NASTY}" for cell, _ in cells.numbers)


def test_numbers_that_no_float_holds(tmp_path: Path):
    write_run(tmp_path, TOKENIZER, {}, [session()])
    write_metrics(tmp_path / "metrics.json", run={"val/psnr": 20.5})
    text = (tmp_path / "metrics.json").read_text()
    for written in ("NaN", "-Infinity", "1e999", "9" * 400):
        (tmp_path / "metrics.json").write_text(text.replace("20.5", written))
        page_text = made(tmp_path)
        assert "run: not finite: val/psnr" in page_text
        assert {told for cell, told in Cells(page_text).numbers if cell["data-metric"] == "val/psnr"} == {"not finite"}


def test_pictures_fit_into_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    interrupted(tmp_path)
    for number in range(4):
        picture(tmp_path / f"images/samples_guidance_{number}.png", 160, 120, noise=True)
    (tmp_path / "images/samples_guidance_9.png").write_bytes(b"no picture")
    whole = made(tmp_path)
    bare = len(re.sub(r'src="data:image/webp;base64,[^"]*"', "", whole))
    assert whole.count("<img ") == 4 and "samples_guidance_9.png of" in whole
    monkeypatch.setattr(page, "ROOM", 0)
    monkeypatch.setattr(page, "LARGEST", bare + 16_000)
    monkeypatch.setattr(page, "FOR_PICTURES", 0)
    assert made(tmp_path).count("<img ") == 4 and len(made(tmp_path)) <= bare + 18_000 < len(whole)
    monkeypatch.setattr(page, "LARGEST", bare + 500)
    assert "is left out, as the page would become too large" in made(tmp_path)
    monkeypatch.setattr(page, "LARGEST", 1000)
    with pytest.raises(ValueError, match=r"folders: the page would have .* MB, .*; give fewer folders"):
        made(tmp_path)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("nothing", r"folders: give the folder of a run"),
        ("no folder", r"folders: there is no folder '.*nowhere'"),
        ("no run", r"folders: no run lies in '.*empty': no config.yaml"),
        ("twice", r"folders: give each folder once"),
        ("no json", r"metrics.json' is no file of metrics"),
        ("no numbers", r"metrics.json' is no file of metrics: those of 'run' are no numbers"),
        ("no place", r"out: can't write '.*'.*; give another place"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys, case: str, said: str):
    former(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    run, metrics = str(tmp_path / "run"), tmp_path / "run/metrics.json"
    arguments = {
        "nothing": [],
        "no folder": [str(tmp_path / "nowhere")],
        "no run": [str(tmp_path / "empty")],
        "twice": [run, run],
        "no place": [run, "--out", str(metrics / "report.html")],
    }.get(case, [run])
    if case.startswith("no json"):
        metrics.write_text("{")
    elif case == "no numbers":
        metrics.write_text(json.dumps({"run": {"metrics": {"val/psnr": "high"}}}))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(lines) == 2 and re.search(said, lines[0]), lines


def test_configs_that_can_t_be_read(tmp_path: Path):
    interrupted(tmp_path)
    (tmp_path / "config.yaml").write_text("a: [")
    (tmp_path / "history.json").write_text("{")
    text = html.unescape(made(tmp_path))
    assert "config.yaml can't be read" in text and "is no history of a run" in text


def test_where_options_differ():
    def config(callbacks: list, **model: object) -> dict:
        return {"trainer": {"callbacks": callbacks}, "model": model}

    def part(name: str, **options: object) -> dict:
        return {"class_path": f"some.{name}", "init_args": options}

    ours = config([part("EMA", decay=0.9), part("EMA", decay=0.5)], optimizer=part("Adam", lr=1e-3, eps=1.0), seed=0)
    same = yaml.safe_load(yaml.safe_dump(ours))
    assert changes.differences([ours, same]) == []
    theirs = config([part("EMA", decay=0.9), part("EMA", decay=0.6), part("Report")], optimizer=part("SGD", lr=0.1))
    assert {change.option: change.values for change in changes.differences([ours, theirs])} == {
        "trainer.callbacks[EMA]'.decay": ["0.5", "0.6"],
        "trainer.callbacks[Report]": ["—", "Report()"],
        "model.optimizer": ["Adam(lr=0.001, eps=1.0)", "SGD(lr=0.1)"],
        "model.seed": ["0", "—"],
    }


OWN = {
    "vfm_vae": (
        "model: {seed: 3}\ndata: {root: mine}\n",
        {"model.seed": ["0", "3"], "data.root": ["data/photos", "mine"]},
    ),
    "ldm": ("model: {shift: 0.5}\n", {"model.shift": ["null", "0.5"]}),
}
SHIPPED = {
    "vfm_vae": ["configs/demo/tokenizer.yaml", "demo/strong.yaml"],
    "ldm": ["demo/ldm.yaml", "demo/ldm_train.yaml"],
}


@pytest.mark.slow
@pytest.mark.parametrize("program", OWN)
def test_the_shipped_configs_are_read_by_the_program_itself(tmp_path: Path, monkeypatch, program: str):
    monkeypatch.undo()
    own = tmp_path / "own.yaml"
    own.write_text(OWN[program][0])
    found = changes.read_shipped(session(program=program, configs=[*SHIPPED[program], str(own)]))
    assert (found.names, found.own, found.reason) == (SHIPPED[program], [str(own)], "")
    whole = changes.parsed(program, [*SHIPPED[program], str(own)])
    assert {each.option: each.values for each in changes.differences([found.config, whole])} == OWN[program][1]


@pytest.mark.slow
def test_shipped_configs_that_are_not_complete_alone(tmp_path: Path, monkeypatch):
    monkeypatch.undo()
    found = changes.read_shipped(session(configs=["configs/trainer/cpu.yaml", "own.yaml"]))
    assert found.config is None and "without configs of one's own they are not complete" in found.reason
    assert changes.read_shipped(session(configs=["own.yaml"])).reason == "the command names none of the shipped configs"
