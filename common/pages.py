"""HTML pages that open from disk, without network, on a phone, light or dark."""

import os
from html import escape
from pathlib import Path

import matplotlib

from common.data import DataError
from common.plots import RC, data_url

# Charts are drawn on white; on a dark page they stand on white cards.
STYLE = """:root{color-scheme:light dark}
body{margin:0 auto;padding:1rem;max-width:1280px;background:Canvas;color:CanvasText;
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.2rem;margin-top:2rem}
ul{display:flex;flex-wrap:wrap;gap:.3rem 1.5rem;padding:.3rem .7rem;list-style:none;
background:#fff;color:#000;border-radius:6px}
li i{display:inline-block;width:40px;vertical-align:middle;border-top:3px solid}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));
gap:1.2rem .8rem}
figure{margin:0}figcaption{font-size:.9rem;padding:0 .5rem}
img{display:block;height:auto;background:#fff;border-radius:6px}
.panels img{width:100%}.wide{overflow-x:auto}
table{border-collapse:collapse}tbody th{font-weight:normal}
th,td{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px solid #8888;
font-variant-numeric:tabular-nums}
pre,.text{white-space:pre-wrap;border:1px solid #8888;border-radius:6px;padding:.7rem}
@media(max-width:640px){thead{display:none}table,tbody,tr,th,td{display:block}
tr{border-bottom:1px solid #8888;padding:.4rem 0}th,td{border:0;padding:.1rem 0}
tbody th{font-weight:600}td::before{content:attr(data-label) ": "}}"""


def picture_html(pixels, alt, caption="", kind="png"):
    """A picture (H, W, 3) uint8 with its alt text and caption. kind: png or jpeg."""
    height, width = pixels.shape[:2]
    return (
        f'<figure><img src="{data_url(pixels, kind)}" width="{width // 2}" height="{height // 2}" '
        f'alt="{escape(alt)}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


def wide_html(pixels, alt):
    """A picture with frames, which a narrow screen scrolls sideways."""
    return f'<div class="wide">{picture_html(pixels, alt, kind="jpeg")}</div>'


def panels_html(panels, keys=()):
    """Drawn panels (plots.draw_panels) as a grid under their legend (list of plots.Key)."""
    # The legend, whose lines CSS draws.
    parts = []
    for key in keys:
        line = f'<i style="border-top-style:{key.style};border-color:{key.colour}"></i>'
        parts.append(f"<li>{line} {escape(key.name)}</li>")
    if keys:
        parts = ["<ul>", *parts, "</ul>"]
    parts.append('<div class="panels">')
    parts += [picture_html(panel.picture, panel.alt, panel.caption) for panel in panels]
    return "\n".join([*parts, "</div>"])


def table_html(head, rows):
    """A table. head: column names; rows: (row name, HTML of each further cell)."""
    parts = ["<table><thead><tr>"]
    parts += [f"<th scope=col>{escape(name)}</th>" for name in head]
    parts.append("</tr></thead><tbody>")
    # A phone shows a row as a block, in which data-label names each cell.
    for name, *cells in rows:
        parts.append(f"<tr><th scope=row>{escape(name)}</th>")
        for label, cell in zip(head[1:], cells, strict=True):
            parts.append(f'<td data-label="{escape(label)}">{cell}</td>')
        parts.append("</tr>\n")
    return "".join([*parts, "</tbody></table>"])


@matplotlib.rc_context(RC)
def write_report(output, heading, body, command, figures):
    """Write a page, and its figures as PNG and SVG beside it.

    Args:
        body: HTML between the heading and the command.
        figures: {what to add to the page's name: matplotlib figure}.
    Returns:
        The path of the page.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        file = output.with_name(f"{output.stem}{name}.png")
        # Without a date, the same figure gives the same file.
        figure.savefig(file)
        figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(heading)}</title><style>{STYLE}</style></head>
<body><h1>{escape(heading)}</h1>
{body}
<h2>Made by</h2><pre>{escape(command)}</pre></body></html>
"""
    output.write_text(page, encoding="utf-8")
    return output


def check_output(output):
    """Raise DataError where no page can be written later."""
    if Path(output).suffix != ".html":
        raise DataError(f"--output {output} must end in .html; PNG and SVG are written beside it")
    # The folders in between are made later.
    folder = next(folder for folder in Path(output).absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(f"--output {output}: nothing can be written in {folder}")
