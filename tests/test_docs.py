"""What the pages show is what there is: links, names, files, options, examples and commands."""

import argparse
import ast
import importlib
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import told
import yaml
from pages import ROOT, Fence, commands, fences, pages, prose

PAGES = pages()
COMMANDS = [(fence, command) for page in PAGES for fence in fences(page) if fence.language == "bash"
            for command in commands(fence.text)]  # fmt: skip
# A title over a block that no test can run says why.
ITEM = r"(?:a GPU|GPUs|ImageNet|captioned images|a data set|a network|an account|published weights)"
MARK = re.compile(rf"Needs {ITEM}(?:(?:, {ITEM})* and {ITEM})?")
OWN_IMAGES = "tests/test_tutorials.py::test_your_own_images_by_the_commands_of_the_page"
# How commands of all other blocks begin, and the test that runs such a command, or the file that does.
RUN_BY = {
    "make demo": "tests/test_demo.py::metrics_of",
    "make demo-text": "tests/test_demo.py::metrics_of",
    "make test": ".github/workflows/ci.yml::make lint test",
    "make lint test": ".github/workflows/ci.yml::make lint test",
    "make install": "Makefile::test: install",
    ".venv/bin/pre-commit install": ".pre-commit-config.yaml::ruff",
    "make app": "tests/ldm/test_app_page.py::Served",
    "python -m vfm_vae app": "tests/ldm/test_app_page.py::Served",
    "make report": "tests/report/test_report_page.py::test_the_page_goes_beside_what_it_is_of",
    "make tensorboard": "tests/callbacks/test_board.py::test_a_run_has_a_page_of_charts_and_a_card_for_each_start",
    "python -m vfm_vae.report": "tests/report/test_report_page.py::test_the_page_goes_beside_what_it_is_of",
    "make tokenizer-study": "tests/ldm/test_study.py::test_a_miniature_study_runs_stops_and_goes_on",
    "make ablation": "tests/ldm/test_study_ablation.py::test_a_miniature_ablation_runs",
    "python -m vfm_vae.convert runs/": "tests/test_convert.py::test_our_own_checkpoint_is_shared_as_a_folder",
    "python -m ldm.convert runs/": "tests/test_demo.py::metrics_of",
    "python -m vfm_vae.compare": "tests/test_compare.py::test_the_command_line",
    "python -m vfm_vae.average": "tests/callbacks/test_post_hoc_ema.py::test_a_checkpoint_with_another_average",
    "python -m vfm_vae.embedded.photos": "tests/embedded/test_photos.py::test_command_line",
    "python -m vfm_vae.embedded.pretrain": "tests/embedded/test_embedded_vit.py::test_pretraining_learns",
    "python -m ldm sweep -c runs/demo/": "tests/ldm/test_sweep.py::test_by_the_command_line",
    "python -m ldm predict -c runs/demo/ldm/config.yaml -c runs/demo/ldm/sweep/best.yaml": (
        "tests/ldm/test_sweep.py::test_the_best_setting_is_an_overlay_that_predict_takes"
    ),
    "python -m vfm_vae fit -c configs/demo/tokenizer.yaml -c configs/own_images/": OWN_IMAGES,
    "python -m vfm_vae predict -c runs/own_images/": OWN_IMAGES,
    "python -m ldm fit -c configs/demo/ldm.yaml -c configs/own_images/": OWN_IMAGES,
    "python -m ldm predict -c runs/own_images/ldm/": OWN_IMAGES,
    "python -m ldm predict -c configs/demo/text.yaml": (
        "tests/ldm/test_prompt_cli.py::test_prompts_are_drawn_as_the_model_draws_them"
    ),
}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def is_part(command: list[str]) -> bool:
    """Whether it is no command but options to go behind one, or has an ellipsis in the place of some."""
    return command[0].startswith("--") or "…" in command


def test_every_command_is_run_by_a_test_or_marked():
    wrong = [f"{fence.page}: title={fence.title!r}" for page in PAGES for fence in fences(page)
             if fence.title.startswith("Needs") and not MARK.fullmatch(fence.title)]  # fmt: skip
    for fence, command in COMMANDS:
        told_of = shlex.join(command) if "'" in " ".join(command) else " ".join(command)
        if not MARK.fullmatch(fence.title) and not is_part(command) and runner(told_of) is None:
            wrong.append(f"{fence.page}: {told_of}")
    hint = 'Name the test that runs it in RUN_BY, or put a title over the block: ```bash title="Needs a GPU"'
    assert not wrong, "\n".join([*wrong, hint])


def runner(command: str) -> str | None:
    """The test that runs a command: of the longest beginning that is known."""
    known = [start for start in RUN_BY if f"{command} ".startswith(start if start.endswith("/") else f"{start} ")]
    return RUN_BY[max(known, key=len)] if known else None


@pytest.mark.parametrize("start", RUN_BY)
def test_what_runs_them_is_there(start: str):
    place, _, name = RUN_BY[start].partition("::")
    assert name in (ROOT / place).read_text()
    assert any(" ".join(command).startswith(start) for _, command in COMMANDS), "no page tells of it any more"


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_programs_options_and_configs_that_there_are(page: str, monkeypatch: pytest.MonkeyPatch):
    """Values, and options of classes within configs, are for `test_every_command_is_taken_by_its_program`."""
    for fence, command in COMMANDS:
        if fence.page == page and command[0] != ".venv/bin/pre-commit":
            check(command, monkeypatch)


def check(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if command[0].startswith("--"):
        assert any(known(program, "fit", command) for program in told.PROGRAMS), command
        return
    program, arguments = told.program_of(command)
    if program not in told.PROGRAMS or arguments[0] not in (*told.SUBCOMMANDS, "sweep"):
        told.take(command, monkeypatch)
        return
    told.completed(program, arguments)
    assert known(program, arguments[0], arguments), command


def known(program: str, subcommand: str, arguments: list[str]) -> bool:
    """Whether all options are a program's, or those of classes that its options name."""
    options = told.options_of(program, subcommand)
    groups = {option.rpartition(".")[0] for option in options if not option.endswith(".help")}
    names = [word.partition("=")[0].rstrip("+") for word in arguments if re.match(r"--?[a-z]", word)]
    classes = tuple(f"{option}." for option in options - groups)
    return all(name in options or name.startswith(classes) for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_taken_by_its_program(page: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    for command in [command for fence, command in COMMANDS if fence.page == page]:
        if command[0] == ".venv/bin/pre-commit":
            continue
        take = told.take_options if command[0].startswith("--") else told.take
        try:
            take(command, monkeypatch)
        except argparse.ArgumentError as error:  # classes in files of a reader's own
            assert re.search("No module named '(?:my_file|my_package|colours)'", str(error)), (command, error)


@cache
def anchors(page: str) -> set[str]:
    """What links can lead to within a page, as GitHub and the site name headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|`", r"\1", heading).lower()
        found.add(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain)))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            if not re.fullmatch(r"https?://[\w.-]+(/[\w.%~&?=#+,/-]*)?", target):
                wrong.append(target)
            continue
        path, _, anchor = target.partition("#")
        place = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if (
            not place.exists()
            or not place.is_relative_to(ROOT)
            or (anchor and place.suffix == ".md" and anchor not in anchors(str(place.relative_to(ROOT))))
        ):
            wrong.append(target)
    assert not wrong


FOLDERS = "(?:configs|tests|docs|vfm_vae|ldm|callbacks|notebooks)"


@pytest.mark.parametrize("page", PAGES)
def test_files_and_targets_that_are_named_exist(page: str):
    text = (ROOT / page).read_text()
    named = re.findall(
        r"(?<![\w/.-])((?:configs|tests|docs|vfm_vae|ldm|callbacks|notebooks)/[\w/.-]+\.(?:py|yaml|md|cfg))\b", text
    )
    wrong = [path for path in named if not any((ROOT / place / path).exists() for place in ("", "configs", "tests"))]
    shown = re.findall(r"`make ([a-z][a-z-]*)", text)
    assert not [*wrong, *(target for target in shown if target not in TARGETS)]


DOTTED = re.compile(r"`((?:vfm_vae|ldm|callbacks)(?:\.\w+)+)(?:\([^`]*\))?`")


@pytest.mark.parametrize("page", PAGES)
def test_objects_that_are_named_exist(page: str):
    assert not [name for name in sorted(set(DOTTED.findall(prose(page)))) if not is_there(name)]


def is_there(name: str) -> bool:
    """Whether a module, or what it defines, has this name; modules are read, and imported only where that won't do."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
            file = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
            return end == len(parts) or defines(body_of(file), parts[end:]) or has(parts, end)
    return False


@cache
def body_of(file: Path) -> list[ast.stmt]:
    """The statements of a module."""
    return ast.parse(file.read_text()).body


def defines(body: list[ast.stmt], names: list[str]) -> bool:
    """Whether statements define a name, and what is within it."""
    if not names:
        return True
    for node in body:
        if getattr(node, "name", None) == names[0]:
            return defines(getattr(node, "body", []), names[1:]) or not names[1:]
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if any(isinstance(target, ast.Name) and target.id == names[0] for target in targets):
            return not names[1:]
    return False


def has(parts: list[str], end: int) -> bool:
    """Whether an imported module has what it does not define itself, such as what a class inherits."""
    if "diffusers" in parts:  # takes seconds; tests/test_diffusers.py calls all of it
        return True
    found = importlib.import_module(".".join(parts[:end]))
    for part in parts[end:]:
        found = getattr(found, part, None)
    return found is not None


def test_formulas_are_computed_where_the_page_says():
    """Each link of the page of formulas is to the file of the object that it names."""
    links = re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/.]+)\)", prose("docs/formulas.md"))
    assert len(links) > 60
    for name, path in links:
        assert name.startswith(path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") + "."), name
        assert is_there(name), name


@pytest.mark.parametrize("page", PAGES)
def test_blocks_of_code_are_what_they_say(page: str):
    for fence in fences(page):
        if fence.language == "python":
            compile(fence.text, fence.page, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            check_imports(fence)
        elif fence.language == "yaml":
            yaml.safe_load(fence.text)


def check_imports(fence: Fence) -> None:
    """Checks that what an example imports of ours is there, and what it takes of the classes, too."""
    origin: dict[str, str] = {}
    tree = ast.parse(fence.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in ("vfm_vae", "ldm", "callbacks"):
            origin |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    taken = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    names = [f"{origin[node.value.id]}.{node.attr}" for node in taken if node.value.id in origin]
    assert not [name for name in [*origin.values(), *names] if not is_there(name)], fence.page


def test_every_module_is_reached_from_the_api(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(ROOT / "docs/theme")
    hooks = pytest.importorskip("hooks")
    documented = hooks.modules()
    files = [path for name in hooks.PACKAGES for path in (ROOT / name).rglob("*.py")]
    assert set(documented.values()) == {path for path in files if path.name != "__main__.py"}
    assert "vfm_vae.tokenizer" in documented and "callbacks" in documented


def test_every_page_is_in_the_navigation():
    settings = (ROOT / "mkdocs.yml").read_text()
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    named = set(re.findall(r"[\w/]+\.md", settings.partition("\nnav:")[2]))
    assert there == named - {"contributing.md", "changelog.md"}


def test_a_wrong_command_is_found(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(AssertionError):
        check(
            ["python", "-m", "ldm", "fit", "-c", "configs/ldm/lightningdit.yaml", "--trainer.max_step", "1"],
            monkeypatch,
        )
    with pytest.raises(AssertionError):
        check(["python", "-m", "ldm", "fit", "-c", "configs/ldm/lightningdot.yaml"], monkeypatch)
    with pytest.raises(AssertionError, match="No rule"):
        check(["make", "dimo"], monkeypatch)
    assert runner("make demo-txt") is None and runner("make demo ARGS=1") == RUN_BY["make demo"]
