"""HTML pages that open from disk, without network, on a phone, light or dark."""

import base64
import shlex
import sys
from html import escape
from pathlib import Path

from jinja2 import Template

from common.data import DataError

# Figures are drawn on white; on a dark page they stand on white cards.
STYLE = """:root{color-scheme:light dark}
body{margin:0 auto;padding:1rem;max-width:1280px;background:Canvas;color:CanvasText;
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.2rem;margin-top:2rem}
div{overflow-x:auto;margin:1rem 0}
img{display:block;height:auto;background:#fff;border-radius:6px}
table{border-collapse:collapse;overflow-wrap:normal}
th,td{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px solid #8888;
font-variant-numeric:tabular-nums}
pre{white-space:pre-wrap;border:1px solid #8888;border-radius:6px;padding:.7rem}"""


# Jinja: a table, which a narrow screen scrolls sideways.
TABLE = """<div><table>{% for row in rows %}{% set cell = "th" if loop.first else "td" %}
<tr>{% for text in row %}<{{ cell }}>{{ text }}</{{ cell }}>{% endfor %}</tr>{% endfor %}
</table></div>"""


def table_html(rows):
    """A table of texts and numbers; rows[0] is its head."""
    return Template(TABLE, autoescape=True).render(rows=rows)


def columns_html(columns):
    """table_html() of columns {name of the row: cell}, "–" where one lacks a row; "" for a head."""
    names = {}
    for column in columns:
        names |= column
    rows = []
    for name in names:
        rows.append([name, *[column.get(name, "–") for column in columns]])
    return table_html(rows) if len(rows) > 1 else ""


def page_path(output):
    """Path of a page, whose folder is made: what fails should fail before anything slow begins."""
    output = Path(output)
    if output.suffix != ".html":
        raise DataError(f"--output {output} must end in .html; PNG and SVG are written beside it")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output


def write_page(output, heading, body, figures, end=""):
    """Write a page, and its figures as PNG and SVG beside it.

    Args:
        output: path of page_path().
        body: HTML between the heading and the figures.
        figures: {what to add to the page's name: figure}.
        end: HTML below the figures.
    Returns:
        The path of the page.
    """
    # The page holds its figures, so that it can be sent alone.
    parts = [body]
    for name, figure in figures.items():
        file = output.with_name(f"{output.stem}{name}.png")
        figure.savefig(file)
        # Without a date, the same figure gives the same file.
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
        content = base64.b64encode(file.read_bytes()).decode()
        # Half its pixels, for sharp screens; wide ones scroll.
        width = int(figure.get_figwidth() * figure.dpi / 2)
        alt = escape(figure.get_label())
        parts.append(
            f'<div><img src="data:image/png;base64,{content}" width="{width}" alt="{alt}"></div>'
        )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(heading)}</title><style>{STYLE}</style></head>
<body><h1>{escape(heading)}</h1>
{"".join(parts)}
{end}
<h2>Made by</h2><pre>python {escape(shlex.join(sys.argv))}</pre></body></html>
"""
    output.write_text(page, encoding="utf-8")
    return output
