"""What the demo found, once as text for a terminal and once as a self-contained HTML page."""

import base64
import html
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """A header and rows of cells, all text; the first column is aligned to the left, the others to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A PNG image, the file name it is saved under, and a sentence that says what it shows."""

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, tables and figures below it, in this order."""

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = field(default=(), repr=False)


def as_text(title: str, sections: Sequence[Section]) -> str:
    """The sections without their figures, in lines of about 100 characters; those of figures alone are left out.

    Examples
    --------
    >>> table = Table(("fit", "error"), [("average", "1.04"), ("learned", "0.09")])
    >>> print(as_text("Demo", [Section("Test error", tables=[table])]))
    Demo
    <BLANKLINE>
    Test error
      fit      error
      average   1.04
      learned   0.09
    """
    lines = [title]
    for section in sections:
        if not (section.paragraphs or section.tables):
            continue
        lines += ["", section.title]
        for paragraph in section.paragraphs:
            lines += textwrap.wrap(paragraph, 98, initial_indent="  ", subsequent_indent="  ")
        for table in section.tables:
            lines += _aligned(table)
    return "\n".join(lines)


def _aligned(table: Table) -> list[str]:
    rows = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .9rem .2rem 0; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem 2rem; }
figure { margin: 0; flex: 1 1 24rem; max-width: 44rem; }
img { max-width: 100%; height: auto; } figcaption { font-size: .9rem; color: #555; }
"""


def as_html(title: str, sections: Sequence[Section]) -> str:
    """A page that needs no other file: the figures are in it as base64, all text is escaped."""
    body = [f"<h1>{html.escape(title)}</h1>", *map(_section, sections)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in section.paragraphs]
    for table in section.tables:
        parts.append("<table>" + _row("th", table.header))
        parts += [_row("td", row) for row in table.rows]
        parts.append("</table>")
    if section.figures:
        parts += ['<div class="figures">', *map(_figure, section.figures), "</div>"]
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode("ascii")
    caption = html.escape(figure.caption)
    image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
