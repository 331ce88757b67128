"""The report of a study, which is Markdown, as HTML: headings, tables, pictures, paragraphs, bold and code."""

import re

from markupsafe import Markup, escape

PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")


def pictures_in(text: str) -> list[tuple[str, str]]:
    """The pictures that a report shows: title and file."""
    return PICTURE.findall(text)


def as_html(text: str) -> Markup:
    """The report without its pictures, which the page shows by itself."""
    blocks = [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]
    return Markup("\n").join(_block(block) for block in blocks if not PICTURE.fullmatch(block))


def _block(block: str) -> Markup:
    lines = block.splitlines()
    if heading := re.match(r"(#+) (.*)", block):
        return Markup("<h{0}>{1}</h{0}>").format(min(len(heading[1]) + 2, 6), _inline(heading[2]))
    if len(lines) > 1 and lines[0].startswith("|") and set(lines[1]) <= set("|-: "):
        head = Markup("").join(Markup("<th>{}</th>").format(_inline(cell)) for cell in _cells(lines[0]))
        rows = Markup("").join(
            Markup("<tr>{}</tr>").format(
                Markup("").join(Markup("<td>{}</td>").format(_inline(cell)) for cell in _cells(line))
            )
            for line in lines[2:]
        )
        return Markup('<div class="wide"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>').format(
            head, rows
        )
    return Markup("<p>{}</p>").format(_inline(" ".join(lines)))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _inline(text: str) -> Markup:
    """Bold and code; all else is text."""
    safe = str(escape(text))
    safe = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", safe)
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", safe))
