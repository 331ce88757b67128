"""What the site does beyond MkDocs: links into the repository, a page for each module, formulas as MathML."""

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PACKAGES = {"vfm_vae": "Tokenizers", "ldm": "Diffusion", "callbacks": "Callbacks"}
# Pages that lie at the top of the repository, where people look for them.
ELSEWHERE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
WIDE = {"index.md", "start.md", "formulas.md"}  # alone in their tab: no column of pages beside them
LETTERS = {"cal L": "\u2112", "cal N": "\U0001d4a9", "bb E": "\U0001d53c"}  # browsers show no other way of writing them
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")
FILE = re.compile(r"\[([\w./]+\.md)\]\(([^()\s]+)\)")  # links that show the name of a file, as they read on GitHub
FENCE = re.compile(r"^( *)(```+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
SOURCE = '<details class="mkdocstrings-source"'
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".cfg": "ini", ".toml": "toml", ".md": "markdown"}


def modules() -> dict[str, Path]:
    """Files of all public modules by name, `vfm_vae.tokenizer`; packages by theirs."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            if not any(part.startswith("__") and part != "__init__" for part in parts):
                found[".".join(part for part in parts if part != "__init__")] = file
    return found


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the modules to the navigation: a section for each package, and for each package within."""
    (api,) = [entry["API"] for entry in config.nav or [] if "API" in entry]
    sections: dict[str, list[Any]] = {}
    for name, file in modules().items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        sections.setdefault(package, []).append({name.rpartition(".")[2]: f"api/{name}.md"})
    api += [{PACKAGES.get(package, package): pages} for package, pages in sections.items()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that nobody writes: of modules, of what lies elsewhere, and of files that pages link to."""
    for name in modules():
        files.append(File.generated(config, f"api/{name}.md", content=f"---\ntitle: {name}\n---\n\n::: {name}\n"))
    for place, source in ELSEWHERE.items():
        unsearched = "---\nsearch:\n  exclude: true\n---\n\n" if place == "changelog.md" else ""  # it has every word
        files.append(File.generated(config, place, content=unsearched + (ROOT / source).read_text()))
    linked = set()
    for page in files.documentation_pages():
        for target in _links(page.content_string):
            path = _in_repository(page.src_uri, target)
            if path is not None and _place(path) == _source_page(path):
                linked.add(path)
    for path in sorted(linked):
        files.append(File.generated(config, _source_page(path), content=_shown(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links that leave the folder of the documentation to pages of the site."""
    own = page.file.src_uri
    if own in WIDE:
        page.meta["hide"] = ["navigation"]

    def rewritten(match: re.Match[str]) -> str:
        anchor = match[1].partition("#")[2]
        path = _in_repository(own, match[1])
        if path is None:
            return match[0]
        place = _place(path)
        name = _name_before(match)
        if place.startswith("api/") and name.startswith(place.removeprefix("api/").removesuffix(".md")):
            anchor = name
        relative = posixpath.relpath(place, posixpath.dirname(own) or ".")
        return f"]({relative}{'#' + anchor if anchor else ''})"

    titles = _titles(config.nav or [])

    def called(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(own), match[2].partition("#")[0]))
        return f"[{titles.get(path, match[1])}]({match[2]})"

    return _outside_of_code(markdown, lambda text: FILE.sub(called, LINK.sub(rewritten, text)))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts MathML in the place of formulas, and leaves source code out of what search finds."""

    def rendered(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        source = re.sub(r"\\math(cal \w|bb \w)", lambda letter: LETTERS[letter[1]], html.unescape(match[2]).strip())
        formula = convert(source.replace(r"\Vert", "\u2016"), display=display)
        return f'<{match[1]} class="formula">{formula}</{match[1]}>'

    return FORMULA.sub(rendered, content).replace(SOURCE, f"{SOURCE} data-search-exclude")


def _titles(nav: list[Any]) -> dict[str, str]:
    """What the navigation calls each page."""
    found: dict[str, str] = {}
    for entry in nav:
        for title, value in entry.items() if isinstance(entry, dict) else ():
            found |= {value: title} if isinstance(value, str) else _titles(value)
    return found


def _links(markdown: str) -> Iterator[str]:
    """Targets of links and images outside of code."""
    return (match[1] for match in LINK.finditer(FENCE.sub("", markdown)))


def _outside_of_code(markdown: str, change: Any) -> str:
    parts, last = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [change(markdown[last : fence.start()]), fence[0]]
        last = fence.end()
    return "".join([*parts, change(markdown[last:])])


def _name_before(match: re.Match[str]) -> str:
    """The text of a link that is one name in code, such as [`ldm.path.score`](…); else nothing."""
    found = re.search(r"\[`([\w.]+)`$", match.string[max(0, match.start() - 120) : match.start()])
    return found[1] if found else ""


def _in_repository(page: str, target: str) -> str | None:
    """The path, from the top of the repository, of what a page links to outside of docs; None for all other links."""
    if re.match(r"[a-z]+:|#|/", target):
        return None
    folder = "" if page in ELSEWHERE else posixpath.join("docs", posixpath.dirname(page))
    path = posixpath.normpath(posixpath.join(folder, target.partition("#")[0]))
    if page not in ELSEWHERE and path.startswith("docs/"):
        return None
    return path if (ROOT / path).exists() else None


def _place(path: str) -> str:
    """The page of the site that shows a path of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    known = {source: place for place, source in ELSEWHERE.items()} | {"README.md": "index.md"}
    if path in known:
        return known[path]
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"api/{name}.md" if path.endswith(".py") and name in modules() else _source_page(path)


def _source_page(path: str) -> str:
    return f"source/{path}/index.md" if (ROOT / path).is_dir() else f"source/{path}.md"


def _shown(path: str) -> str:
    """A page that shows a file of the repository, or lists a folder."""
    head = f"---\ntitle: {path}\nsearch: {{exclude: true}}\nhide: [navigation]\n---\n\n# {path}\n\n"
    place = ROOT / path
    if place.is_dir():
        names = sorted(f"{file.name}/" if file.is_dir() else file.name for file in place.iterdir())
        shown = [name for name in names if not name.startswith((".", "__"))]
        return head + "In the repository, this folder holds\n\n" + "".join(f"- `{name}`\n" for name in shown)
    return head + f"````{LANGUAGES.get(place.suffix, 'text')}\n{place.read_text()}\n````\n"
