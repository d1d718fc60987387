"""Build a self-contained HTML page: it contains its styles and figures, and no scripts.

Text is escaped where it enters an element (`tag`); only values of type `Html` are inserted unchanged. The content of
the pages is decided in `pretraining_report.py`, `finetuning_report.py` and `evaluation_report.py`.
"""

import base64
import html
import io
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from scgpt_hf.publishing.run_summary import Code
from scgpt_hf.reporting.plots import DPI

_PIXELS_PER_INCH = 100  # of a figure on screen: its text, 7 to 9 points, is then as large as that of the page
_NARROW_INCHES = 5.5  # figures up to this width stay readable when shrunk to the screen of a phone
_MIN_PIXELS = 640  # wider figures are not shrunk below this width; they scroll
_VOID = {"img", "meta", "br"}

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #5c6670; --page: #ffffff; --card: #f4f6f8; --line: #dde2e7;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a3adb8; --page: #15181c; --card: #20252b;
  --line: #343b43; --accent: #63b8ea; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1.1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { margin: .5rem 0; max-width: 46rem; }
.lead, figcaption, .label, th, summary { color: var(--soft); }
.key-numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.2rem, 1fr)); gap: .7rem;
  margin: 1.2rem 0; }
.key-number { background: var(--card); border-radius: .6rem; padding: .7rem .9rem; }
.key-number b { display: block; font-size: 1.45rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.label { font-size: .82rem; line-height: 1.35; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .6rem 0; }
th, td { text-align: left; vertical-align: top; padding: .32rem .9rem .32rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 500; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.number { text-align: right; }
td.long { min-width: 9rem; overflow-wrap: anywhere; }
.bar { display: block; height: .5rem; min-width: 6rem; margin-top: .45rem; background: var(--card); }
.bar span { display: block; height: 100%; background: var(--accent); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: .8rem 0 0; min-width: 0; max-width: 100%; }
.image { background: #ffffff; border-radius: .6rem; padding: .6rem; overflow-x: auto; border: 1px solid var(--line); }
.image img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: .85rem; margin-top: .35rem; width: 0; min-width: 100%; }
pre { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; overflow-x: auto; font-size: .84rem; }
details { margin: .5rem 0; } summary { cursor: pointer; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media print { body { max-width: none; } h2 { break-after: avoid; } figure { break-inside: avoid; } }
"""


class Html(str):
    """Text that is HTML, with special characters already escaped."""


def tag(name: str, /, *children: str | Iterable[str], **attributes: str) -> Html:
    """Return an element; children are escaped unless they are `Html`.

    Args:
        name: name of the element.
        children: texts and elements inside it.
        attributes: escaped; `class_` stands for `class`, which is a keyword of Python.

    Example:
        >>> tag("p", "a < b", class_="lead")
        '<p class="lead">a &lt; b</p>'
    """
    opening = "".join(f' {key.strip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{opening}>")
    inside = "".join(to_html(child) for child in children)
    return Html(f"<{name}{opening}>{inside}</{name}>")


def to_html(children: str | Iterable[str]) -> Html:
    """Join texts and elements to HTML. Text is escaped unless it is `Html`, and `Code` becomes an element."""
    if isinstance(children, Code):
        return tag("code", str(children))
    if isinstance(children, str):
        return children if isinstance(children, Html) else Html(html.escape(children))
    return Html("".join(to_html(child) for child in children))


def page(title: str, lead: str, *sections: Html) -> str:
    """Return an HTML document.

    Args:
        title: heading of the page, and title of its window.
        lead: introduction below the heading.
        sections: see `section`.
    """
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    ]
    body = [tag("h1", title), tag("p", lead, class_="lead"), *sections]
    return f"<!doctype html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


def section(heading: str, *blocks: str | Iterable[str]) -> Html:
    """Return a section with a heading, or nothing if all blocks are empty."""
    inside = to_html([to_html(block) for block in blocks])
    return tag("section", tag("h2", heading), inside) if inside else Html("")


def paragraph(text: str) -> Html:
    """Return a paragraph."""
    return tag("p", text)


def key_numbers(numbers: Mapping[str, str]) -> Html:
    """Return the most important numbers as a row of cards: label → number; nothing without numbers."""
    if not numbers:
        return Html("")
    cards = [
        tag("div", tag("b", number), tag("span", label, class_="label"), class_="key-number")
        for label, number in numbers.items()
    ]
    return tag("div", cards, class_="key-numbers")


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), numeric_columns: Sequence[int] = ()) -> Html:
    """Return a table; one that is wider than the page scrolls.

    Args:
        rows: texts of each row.
        header: names of the columns.
        numeric_columns: positions of the columns that hold numbers, which are aligned right.
    """

    def cells(name: str, texts: Sequence[str]) -> list[Html]:
        return [
            tag(name, text, class_="number" if column in numeric_columns else "long" if column else "name")
            for column, text in enumerate(texts)
        ]

    top = tag("thead", tag("tr", cells("th", header))) if header else Html("")
    body = tag("tbody", [tag("tr", cells("td", row)) for row in rows])
    return tag("div", tag("table", top, body), class_="wide")


def format_value(value: object) -> str:
    """Return a value of JSON or YAML as text, the items of a list separated by commas."""
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def bar(share: float) -> Html:
    """Return a horizontal bar that fills a share, between 0 and 1, of a table cell."""
    return tag("span", tag("span", "", style=f"width:{100 * min(max(share, 0.0), 1.0):.1f}%"), class_="bar")


def collapsed(summary: str, *blocks: Html) -> Html:
    """Return blocks that are hidden until the reader clicks on the summary."""
    return tag("details", tag("summary", summary), *blocks)


def code_block(text: str) -> Html:
    """Return lines of code."""
    return tag("pre", tag("code", text))


def figures(*blocks: Html) -> Html:
    """Return figures, side by side where there is room."""
    return tag("div", blocks, class_="figures") if any(blocks) else Html("")


def inline_svg(figure: Figure, caption: str) -> Html:
    """Return a figure as an SVG image inside the page.

    Letters are saved as outlines, so the figure looks the same whatever fonts are installed. There is no date and no
    random id in it, so the same figure gives the same bytes.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "scgpt_hf"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _figure(buffer.getvalue(), "svg+xml", float(figure.get_figwidth()), caption)


def inline_png(path: Path, caption: str) -> Html:
    """Return a PNG file as an image inside the page, or nothing if the file does not exist.

    Raises:
        ValueError: the file is not a PNG.
    """
    if not path.is_file():
        return Html("")
    content = path.read_bytes()
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{path} is not a PNG file; delete it, or write it again")
    (width,) = struct.unpack(">I", content[16:20])  # the header of a PNG starts with its width
    return _figure(content, "png", width / DPI, caption)


def _figure(content: bytes, kind: str, inches: float, caption: str) -> Html:
    """Return an image with its caption; wide figures keep a minimum width, and scroll on narrow screens."""
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    pixels = inches * _PIXELS_PER_INCH
    style = {"style": f"min-width:{min(pixels, _MIN_PIXELS):.0f}px"} if inches > _NARROW_INCHES else {}
    image = tag("img", src=source, alt=caption, width=f"{pixels:.0f}", **style)
    return tag("figure", tag("div", image, class_="image"), tag("figcaption", caption))
