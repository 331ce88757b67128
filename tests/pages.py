"""Pages of the documentation, taken apart: fences with their language and mark, prose, links, headings."""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>```+)(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)(?P=ticks) *$", re.M | re.S
)


class Fence(NamedTuple):
    """A block of code: its language, the title over it, its text, and where it stands."""

    language: str
    title: str
    text: str
    page: str


def pages() -> list[str]:
    """All pages that people read, by their paths in the repository."""
    return ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]


def fences(page: str) -> list[Fence]:
    """All blocks of code of a page."""
    found = []
    for match in FENCE.finditer((ROOT / page).read_text()):
        title = re.search(r'title="([^"]*)"', match["info"])
        text = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.M)
        language = re.match(r"[\w-]*", match["info"].strip())[0]
        found.append(Fence(language, title[1] if title else "", text, page))
    return found


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", (ROOT / page).read_text())


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell's block, as words: variables filled in, loops unrolled, comments and setting left out."""
    variables: dict[str, str] = {}
    lines = text.replace("\\\n", " ").splitlines()
    loops: list[tuple[str, Sequence[str], list[str]]] = []
    for line in lines:
        if loop := re.match(r"\s*for (\w+) in (.*); do$", line):
            loops.append((loop[1], shlex.split(loop[2]), []))
        elif line.strip() == "done":
            name, values, body = loops.pop()
            for value in values:
                for inner in body:
                    yield from _words(inner, variables | {name: value})
        elif loops:
            loops[-1][2].append(line)
        elif setting := re.fullmatch(r"([A-Z]+)=\"([^\"]*)\"", line.strip()):
            variables[setting[1]] = setting[2]
        else:
            yield from _words(line, variables)


def _words(line: str, variables: dict[str, str]) -> Iterator[list[str]]:
    line = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line)
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    if words:
        yield words
