"""Descriptions of options and arguments are phrases that stand alone: `--help` prints them."""

import ast
import re
from pathlib import Path

import pytest

PACKAGES = ("vfm_vae", "ldm", "callbacks")
SECTIONS = re.compile(r"^(?:Args|Attributes):\n((?:(?: .*)?\n)*)", re.M)
ENTRY = re.compile(r"^    \*{0,2}(\w+): (.*(?:\n     .*)*)", re.M)
# What only makes sense after the name has been read: "Of the denoiser."
FRAGMENT = re.compile(r"(?i:of|whose|that|in which|as of|with|in)\b")


def descriptions(source: str) -> dict[str, str]:
    """Descriptions of arguments and attributes by name, of all docstrings in a file."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.Module):
            for section in SECTIONS.findall((ast.get_docstring(node) or "") + "\n"):
                found |= {f"{getattr(node, 'name', '')}.{name}": text for name, text in ENTRY.findall(section)}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_descriptions_are_phrases_that_end(package):
    root = Path(__file__).parents[1] / package
    wrong = [
        f"{file.relative_to(root.parent)}: {name}: {text}"
        for file in sorted(root.rglob("*.py"))
        for name, text in descriptions(file.read_text()).items()
        if FRAGMENT.match(text) or not text.endswith((".", "…"))
    ]
    assert not wrong, "\n".join(wrong)


def test_fragments_are_found():
    found = descriptions(
        'class A:\n    """B.\n\n    Args:\n        c: Of the\n            denoiser.\n        d: A width.\n    """\n'
    )
    assert found == {"A.c": "Of the\n        denoiser.", "A.d": "A width."}
    assert [name for name, text in found.items() if FRAGMENT.match(text)] == ["A.c"]
