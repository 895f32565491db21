"""Stage 6: pictures of a run. One PNG and one HTML report that opens from disk, without network, on a phone, light or dark.

    python visualize.py run output                                        # -> output/report.html and output/report.png
    python visualize.py run a0 a1 b0 b1 --label "λ = 0" --label "λ = 0" --label "λ = 3" --label "λ = 3" --output compare.html

`run` draws the training dynamics that train.py wrote to metrics.jsonl, and the before/after table of result.json. Directories are overlaid;
those with the same label (seeds of one arm) become one line, their mean, in a band from the lowest to the highest run.
"""

import argparse
import base64
import io
import json
import shlex
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from PIL import Image

# One panel each, in this order: stage, metric, title, unit, y axis (panels that name the same one share it), what it is.
PANELS = [
    ("grpo", "reward/accuracy", "Accuracy of rollouts", "share correct", "0 to 1", "Mean accuracy reward of the sampled completions."),
    ("grpo", "consensus/score", "Consensus, the run's score", "score", "consensus", "Eq. 6 with the run's own frame use; videos only."),
    ("grpo", "consensus/paper_score", "Consensus, the paper's score", "score", "consensus", "Last layer, max pool, τ = 0.1."),
    ("grpo", "rollout/length", "Completion length", "tokens", "", "Mean tokens of a completion."),
    ("grpo", "consensus/evidence_use", "Evidence use, the run's score", "share of use", "evidence",
     "Frame use on the frames that hold the answer."),
    ("grpo", "consensus/paper_evidence_use", "Evidence use, the paper's", "share of use", "evidence", "The same by the paper's frame use."),
    ("grpo", "loss/kl", "KL to the reference", "nats per token", "", "k3 estimate, Eq. 10."),
    ("grpo", "loss/zero_variance_groups", "Zero-variance groups", "share of groups", "0 to 1", "All rollouts earn the same: no signal."),
    ("grpo", "rollout/entropy", "Entropy", "nats per token", "", "Of the policy's next-token distribution on its completions."),
    ("grpo", "reward/total", "Reward, total", "reward", "", "Sum of the terms: accuracy and those that follow."),
    ("grpo", "reward/consensus", "Reward term: consensus", "reward", "", "λ × gate × consensus score, Eq. 7."),
    ("grpo", "reward/temporal", "Reward term: temporal", "reward", "", "For correct completions where frame order helps."),
    ("grpo", "reward/alignment", "Reward term: temporal alignment", "reward", "", "Share of timed claims that match, if correct."),
    ("grpo", "reward/consistency", "Reward term: consistency", "reward", "", "For correct answers that the reference finds likely too."),
    ("grpo", "reward/format", "Reward term: format", "reward", "0 to 1", "1 for a think block followed by an answer block."),
    ("grpo", "reward/length", "Reward term: length", "reward", "", "Bonus of correct completions within the length band."),
    ("grpo", "time/step", "Time per GRPO step", "seconds", "", "Wall clock, rollouts included."),
    ("sft", "loss/sft", "SFT loss", "nats per token", "", "Cold start, mean over target tokens."),
]
MEASURES = {  # of result.json, in the table's order; parts of the question set follow theirs: greedy/conflict, greedy/KIND
    "greedy": "Held-out accuracy, greedy", "sampled": "Held-out accuracy, sampled", "consensus": "Consensus, the run's score",
    "evidence_use": "Evidence use, the run's score", "paper_consensus": "Consensus, the paper's score",
    "paper_evidence_use": "Evidence use, the paper's", "evidence_chance": "Evidence use by chance", "length": "Completion length, tokens",
    "conflict": "asked and salient evidence differ"}
LINES = {  # Okabe and Ito's colours, safe for the colour-blind, brighter on dark; dashes are a second cue
    "light": ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"],
    "dark": ["#56B4E9", "#E69F00", "#1FBF92", "#E295BE", "#F0E442", "#4A90D9"]}
SHEETS = {"light": ("#ffffff", "#22262b", "#d9dde2"), "dark": ("#15181d", "#e4e7eb", "#3a414b")}  # background, text, grid
DASHES = [(1, 0), (5, 1.5), (6, 1.5, 1.5, 1.5), (2, 1)]
WIDTH, HEIGHT, DPI = 4.0, 2.75, 160  # a panel, inches


class ReportError(ValueError):
    """Bad input that a user can mend; printed alone, exit 2."""


@dataclass
class Run:
    folder: str
    records: dict  # stage -> {step: record}
    result: dict | None  # result.json: before, after


def read_run(folder):
    """A directory that train.py wrote. A last line without its line break is one that train.py is still writing, and is left out."""
    file, result = Path(folder) / "metrics.jsonl", Path(folder) / "result.json"
    if not Path(folder).is_dir():
        raise ReportError(f"{folder} is not a folder (the --output_dir of a run is expected)")
    if not file.is_file():
        raise ReportError(f"{folder} has no metrics.jsonl; train.py writes it once training starts")
    records = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
            records.setdefault(record["stage"], {})[int(record["step"])] = record
        except (ValueError, KeyError, TypeError) as error:
            if line.endswith("\n"):
                raise ReportError(f"{file} line {number} is not a JSON record with stage and step") from error
    if not records:
        raise ReportError(f"{file} holds no step yet; try again once training has made one")
    try:
        read = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None
        if read is not None and not (isinstance(read["before"], dict) and isinstance(read["after"], dict)):
            raise ValueError("before and after are not objects")
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{result} is not the result of a run (JSON with before and after)") from error
    return Run(str(folder), records, read)


def running_mean(values):
    """(S,) -> (S,): centred mean over about sqrt(S) steps, fewer at the ends, of what is not NaN; NaN where the value itself is."""
    half = int(len(values) ** 0.5 / 2)
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return np.array([np.nan if np.isnan(value) else np.nanmean(window) for value, window in zip(values, windows, strict=True)])


def curves(runs, stage, name):
    """-> all their steps (S,), values (R, S) and running means (R, S) with NaN where a run has none, steps whose value is not a number."""
    records = [run.records.get(stage, {}) for run in runs]
    steps = sorted({step for own in records for step, record in own.items() if name in record})
    values, means, broken = np.full((len(runs), len(steps)), np.nan), np.full((len(runs), len(steps)), np.nan), []
    for row, own in enumerate(records):
        here = [index for index, step in enumerate(steps) if name in own.get(step, {})]
        numbers = [own[steps[index]][name] for index in here]
        numbers = np.array([number if isinstance(number, (int, float)) and np.isfinite(number) else np.nan for number in numbers], float)
        values[row, here], means[row, here] = numbers, running_mean(numbers)
        broken += [steps[index] for index, number in zip(here, numbers, strict=True) if np.isnan(number)]
    return np.array(steps), values, means, broken


def draw_panel(axes, panel, groups, colours):
    """One metric of every group of runs. Returns its alt text."""
    stage, name, title, unit, axis, _ = panel
    told = []
    for index, (label, runs) in enumerate(groups.items()):
        steps, values, means, broken = curves(runs, stage, name)
        colour, values, means = colours[index % 6], np.ma.masked_invalid(values), np.ma.masked_invalid(means)
        if broken:
            axes.plot(broken, [0.03] * len(broken), "x", color=colour, transform=axes.get_xaxis_transform(), clip_on=False)
        if not values.count():
            continue
        middle = means.mean(0)  # (S,)
        there = np.pad(~np.ma.getmaskarray(middle), 1)
        known, alone = np.flatnonzero(there[1:-1]), np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:])  # alone: a dot, not a line
        axes.plot(steps, values.mean(0), color=colour, alpha=0.3, linewidth=0.9)
        if len(runs) > 1:
            axes.fill_between(steps, means.min(0), means.max(0), color=colour, alpha=0.18, linewidth=0)
        axes.plot(steps, middle, color=colour, linewidth=2, dashes=DASHES[index % 4], marker="o", markersize=5, markevery=alone.tolist())
        told.append(f"{label}: {middle[known[0]]:.3g} at step {steps[known[0]]}, {middle[known[-1]]:.3g} at step {steps[known[-1]]}")
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set(xlabel=f"{stage.upper()} step", ylabel=unit)
    axes.yaxis.set_label_coords(-0.25, 0.5)
    if np.ptp(axes.dataLim.intervalx) == 0:  # one step only
        axes.set_xlim(axes.dataLim.x0 - 1, axes.dataLim.x0 + 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if axis == "0 to 1":
        axes.set_ylim(-0.03, 1.03)
    return f"{title}, {unit}, running mean. {'; '.join(told) or 'No number in any step'}."


def draw(groups, panels, sheet, heading):
    """-> the picture (H, W, 3) with heading and legend, the panels cut out of it, their alt texts."""
    back, text, faint = SHEETS[sheet]
    chances = [run.result["after"]["evidence_chance"] for runs in groups.values() for run in runs
               if run.result and "evidence_chance" in run.result["after"] and any(panel[4] == "evidence" for panel in panels)]
    names = [legend_text(label if len(label) < 40 else f"{label[:39]}…", runs) for label, runs in groups.items()]
    names += ["uniform use (chance, held-out)"] if chances else []
    columns = min(3, len(panels))
    rows, widths = -(-len(panels) // columns), [0.75 + 0.08 * len(name) for name in names]  # inches
    wide = len(names) if sum(widths) < columns * WIDTH else max(1, int(columns * WIDTH / max(widths)))  # legend entries in a line
    height, width = rows * HEIGHT + 0.5 + 0.25 * -(-len(names) // wide), columns * WIDTH  # inches
    settings = {**dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), text),
                "grid.color": faint, "axes.facecolor": back, "font.size": 11, "text.parse_math": False, "axes.grid": True,
                "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(settings):
        figure = Figure((width, height), dpi=DPI, facecolor=back)
        places = [divmod(index, columns) for index in range(len(panels))]
        axes = [figure.add_axes(((column + 0.23) * WIDTH / width, ((rows - 1 - row) * HEIGHT + 0.6) / height, 0.72 * WIDTH / width,
                                 (HEIGHT - 1) / height)) for row, column in places]
        alts = [draw_panel(one, panel, groups, LINES[sheet]) for one, panel in zip(axes, panels, strict=True)]
        for shared in ("consensus", "evidence"):
            members = [one for one, panel in zip(axes, panels, strict=True) if panel[4] == shared]
            for one in members if shared == "evidence" and chances else []:
                one.axhline(np.mean(chances), color=text, linestyle=":", linewidth=1.2)
            limits = [one.get_ylim() for one in members]
            for one in members:
                one.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        figure.text(0.15 / width, 1 - 0.12 / height, heading, fontsize=14, fontweight="bold", va="top")
        handles = [Line2D([], [], color=LINES[sheet][index % 6], dashes=DASHES[index % 4], linewidth=2) for index in range(len(groups))]
        handles += [Line2D([], [], color=text, linestyle=":", linewidth=1.2)] if chances else []
        legend = figure.legend(handles, ["."] * len(names), loc="upper left", bbox_to_anchor=(0.15 / width, 1 - 0.42 / height), ncols=wide,
                               frameon=False, handlelength=2.6, borderpad=0, borderaxespad=0)
        for entry, name in zip(legend.get_texts(), names, strict=True):  # afterwards: a label may begin with an underscore
            entry.set_text(name)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3]
    high, across = int(HEIGHT * DPI), int(WIDTH * DPI)  # pixels
    top = picture.shape[0] - rows * high
    return picture, [picture[top + r * high : top + (r + 1) * high, c * across : (c + 1) * across] for r, c in places], alts


def legend_text(label, runs):
    return label if len(runs) == 1 else f"{label} ({len(runs)} runs)"


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).quantize(200).save(buffer, "png")
    return buffer.getvalue()


def result_table(groups):
    """result.json as HTML, before → after: mean over a label's runs and, of several, the lowest and highest. '' without any."""
    done = {label: [run.result for run in runs if run.result and run.result["after"]] for label, runs in groups.items()}
    done = {label: results for label, results in done.items() if results}

    def cell(results, part, name):
        values = [result[part][name] for result in results if isinstance(result[part].get(name), (int, float))]
        several = f" <small>({min(values):.3f} to {max(values):.3f})</small>" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{several}" if values else "–"

    head = "".join(f"<th scope=col>{escape(legend_text(label, results))}</th>" for label, results in done.items())
    order, body = {name: index for index, name in enumerate(MEASURES)}, ""
    names = {name: name.partition("/") for results in done.values() for result in results for name in result["after"]}
    for name, (family, _, part) in sorted(names.items(), key=lambda pair: (order.get(pair[1][0], 99), pair[1])):
        words = MEASURES.get(family, family) + (f": {MEASURES.get(part, part)}" if part else "")
        body += f"<tr><th scope=row>{escape(words)}</th>" + "".join(
            f'<td data-label="{escape(label)}">{cell(results, "before", name)} → <b>{cell(results, "after", name)}</b></td>'
            for label, results in done.items()) + "</tr>\n"
    return body and f"""<h2>Held-out questions, before → after GRPO</h2>
<p>From result.json; of several runs the mean and (lowest to highest).</p>
<table><thead><tr><th scope=col>measure</th>{head}</tr></thead><tbody>
{body}</tbody></table>"""


STYLE = """body{margin:0 auto;padding:1rem;max-width:1280px;background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.2rem;margin-top:2rem}small{opacity:.8}
ul{display:flex;flex-wrap:wrap;gap:.3rem 1.5rem;padding:0;list-style:none}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:1.2rem .8rem}
figure{margin:0}img{width:100%;height:auto;display:block}figcaption{font-size:.9rem;padding:0 .5rem}
table{border-collapse:collapse}tbody th{font-weight:normal}
th,td{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--faint);font-variant-numeric:tabular-nums}
pre{white-space:pre-wrap;border:1px solid var(--faint);border-radius:6px;padding:.7rem}
@media(max-width:640px){thead{display:none}table,tbody,tr,th,td{display:block}tr{border-bottom:1px solid var(--faint);padding:.4rem 0}
th,td{border:0;padding:.1rem 0}tbody th{font-weight:600}td::before{content:attr(data-label) ": "}}"""


def html_page(heading, groups, panels, pictures, note, command):
    """The report as one string; pictures: draw()'s for light and dark."""
    colours = {sheet: "".join(f"--{name}:{value};" for name, value in zip(
        ("back", "text", "faint", *(f"c{index}" for index in range(6))), (*SHEETS[sheet], *LINES[sheet]), strict=True)) for sheet in SHEETS}
    legend = "".join(
        f'<li><svg width="40" height="10" aria-hidden="true"><line x1="0" y1="5" x2="40" y2="5" stroke="var(--c{index % 6})" '
        f'stroke-width="3" stroke-dasharray="{" ".join(f"{2.5 * part}" for part in DASHES[index % 4])}"/></svg> '
        f"{escape(legend_text(label, runs))}</li>" for index, (label, runs) in enumerate(groups.items()))
    data = lambda pixels: f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"  # noqa: E731
    figures = "\n".join(
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{data(dark)}"><img src="{data(light)}" '
        f'width="{light.shape[1]}" height="{light.shape[0]}" alt="{escape(alt)}"></picture>'
        f"<figcaption>{escape(panel[5])}</figcaption></figure>"
        for panel, light, dark, alt in zip(panels, pictures["light"][1], pictures["dark"][1], pictures["light"][2], strict=True))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(heading)}</title>
<style>:root{{color-scheme:light dark;{colours["light"]}}}@media(prefers-color-scheme:dark){{:root{{{colours["dark"]}}}}}
{STYLE}</style></head>
<body><h1>{escape(heading)}</h1><ul>{legend}</ul>
{result_table(groups)}
<h2>Step by step</h2><p>{escape(note)}</p>
<div class="panels">
{figures}
</div>
<h2>Made by</h2><pre>{escape(command)}</pre></body></html>
"""


def run_report(folders, labels=None, output=None, command=""):
    """The report of `visualize.py run`. labels: one a folder, or None. Returns the path of the HTML file; the PNG lies beside it."""
    folders = [str(folder) for folder in folders]
    output = Path(output or (Path(folders[0]) / "report.html" if len(folders) == 1 else "report.html"))
    if labels and len(labels) != len(folders):
        raise ReportError(f"{len(labels)} --label for {len(folders)} directories; give none, or one a directory in their order")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ReportError("a directory is given twice")
    if output.suffix != ".html":
        raise ReportError(f"--output {output} must end in .html; the PNG is written beside it")
    groups = {}
    for folder, label in zip(folders, labels or folders, strict=True):
        groups.setdefault(label, []).append(read_run(folder))
    runs = [run for members in groups.values() for run in members]
    series = [(panel, *curves(runs, *panel[:2])) for panel in PANELS]
    panels = [panel for panel, _, values, _, broken in series if broken or np.nan_to_num(values).any()]
    zero = [panel[2] for panel, steps, *_ in series if len(steps) and panel not in panels]
    unfinished = [run.folder for run in runs if run.result is None]
    if not panels:
        raise ReportError("metrics.jsonl has none of the metrics that this report draws, or all of them are zero")
    heading = f"Training dynamics of {runs[0].folder if len(runs) == 1 else f'{len(runs)} runs'}"
    note = "Line: running mean over about √n of n steps, centred. Faint: value of each step."
    note += " Band: lowest to highest running mean of the runs; their mean is the line." if len(groups) < len(runs) else ""
    note += " Dotted: use if spread evenly over the held-out questions' frames." if len(unfinished) < len(runs) else ""
    note += " A cross at the bottom: the value is not a number." if any(entry[-1] for entry in series) else ""
    note += f" Zero throughout, so not drawn: {', '.join(zero)}." if zero else ""
    note += f" Without result.json yet: {', '.join(unfinished)}." if unfinished else ""
    pictures = {sheet: draw(groups, panels, sheet, heading) for sheet in SHEETS}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".png").write_bytes(png(pictures["light"][0]))
    output.write_text(html_page(heading, groups, panels, pictures, note, command), encoding="utf-8")
    return output


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", allow_abbrev=False, help="training dynamics of one or several runs")
    run.add_argument("output_dirs", nargs="+", metavar="OUTPUT_DIR", help="what train.py wrote (its --output_dir)")
    run.add_argument("--label", action="append", metavar="NAME", help="once a directory, in their order; same name: one line and a band")
    run.add_argument("--output", metavar="FILE.html", help="default: report.html in the directory, of several ./report.html")
    arguments = parser.parse_args()
    try:
        print(run_report(arguments.output_dirs, arguments.label, arguments.output, f"python {shlex.join(sys.argv)}"))
    except (ReportError, OSError) as error:
        print(f"visualize.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
