"""HTML pages that open from disk."""

import os
from html import escape
from pathlib import Path

import matplotlib
import numpy as np

from common.data import DataError
from common.plots import SHEETS, data_url, draw, png

STYLE = """body{margin:0 auto;padding:1rem;max-width:1280px;background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.2rem;margin-top:2rem}small{opacity:.8}
ul{display:flex;flex-wrap:wrap;gap:.3rem 1.5rem;padding:0;list-style:none}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:1.2rem .8rem}
.frames{display:grid;grid-template-columns:repeat(auto-fill,minmax(100px,1fr));gap:.5rem}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,390px),1fr));gap:.8rem}
figure{margin:0}img{width:100%;height:auto;display:block}figcaption{font-size:.9rem;padding:0 .5rem}
table{border-collapse:collapse}tbody th{font-weight:normal}
th,td{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--faint);font-variant-numeric:tabular-nums}
pre,.text{white-space:pre-wrap;border:1px solid var(--faint);border-radius:6px;padding:.7rem}
.text sub{font-size:.7em;opacity:.85}
@media(max-width:640px){thead{display:none}table,tbody,tr,th,td{display:block}tr{border-bottom:1px solid var(--faint);padding:.4rem 0}
th,td{border:0;padding:.1rem 0}tbody th{font-weight:600}td::before{content:attr(data-label) ": "}}"""


def panels_html(panels, legend=()):
    """Panels as a grid of pictures, light and dark, under their legend."""
    entries = "".join(
        f'<li><svg width="40" height="10" aria-hidden="true"><line x1="0" y1="5" x2="40" y2="5" '
        f'stroke="var(--{"text" if index is None else f"c{index % 6}"})" stroke-width="3" '
        f'stroke-dasharray="{" ".join(f"{2.5 * part}" for part in dashes)}"/></svg> {escape(name)}</li>'
        for name, index, dashes in legend
    )
    drawn = {name: draw(panels, sheet) for name, sheet in SHEETS.items()}
    figures = "\n".join(
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{data_url(png(dark))}"><img src="{data_url(png(light))}" '
        f'width="{light.shape[1]}" height="{light.shape[0]}" alt="{escape(alt)}"></picture>'
        f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
        for panel, light, dark, alt in zip(
            panels, drawn["light"][2], drawn["dark"][2], drawn["light"][3], strict=True
        )
    )
    return (f"<ul>{entries}</ul>\n" if legend else "") + f'<div class="panels">\n{figures}\n</div>'


def table_html(head, rows):
    """head: column names; rows of (row name, HTML of each cell)."""
    columns = "".join(f"<th scope=col>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th scope=row>{escape(name)}</th>"
        + "".join(
            f'<td data-label="{escape(label)}">{cell}</td>'
            for label, cell in zip(head[1:], cells, strict=True)
        )
        + "</tr>\n"
        for name, *cells in rows
    )
    return f"<table><thead><tr>{columns}</tr></thead><tbody>\n{body}</tbody></table>"


def write_report(output, heading, body, command, figures):
    """Writes the page (body: HTML between its heading and its command) and its figures {what to add to the name: matplotlib figure} as PNG
    and SVG beside it. Returns the path of the page."""
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    colours = {
        name: f"--back:{sheet.back};--text:{sheet.text};--faint:{sheet.faint};"
        + "".join(f"--c{index}:{colour};" for index, colour in enumerate(sheet.lines))
        for name, sheet in SHEETS.items()
    }
    for name, figure in figures.items():
        file = output.with_name(f"{output.stem}{name}.png")
        photographs = any(
            axes.images for axes in figure.axes
        )  # they would take the colours of the lines
        file.write_bytes(
            png(np.asarray(figure.canvas.buffer_rgba())[..., :3], None if photographs else 200)
        )
        with matplotlib.rc_context({"svg.hashsalt": "", "text.parse_math": False}):
            figure.savefig(
                file.with_suffix(".svg"), metadata={"Date": None}, facecolor=figure.get_facecolor()
            )
    output.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(heading)}</title>
<style>:root{{color-scheme:light dark;{colours["light"]}}}@media(prefers-color-scheme:dark){{:root{{{colours["dark"]}}}}}
{STYLE}</style></head>
<body><h1>{escape(heading)}</h1>
{body}
<h2>Made by</h2><pre>{escape(command)}</pre></body></html>
""",
        encoding="utf-8",
    )
    return output


def check_output(output):
    """Before the work: DataError where no page can be written later."""
    if Path(output).suffix != ".html":
        raise DataError(
            f"--output {output} must end in .html; the PNG and the SVG are written beside it"
        )
    folder = next(folder for folder in Path(output).absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(f"--output {output}: nothing can be written in {folder}")
