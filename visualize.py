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
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# stage, metric, title, unit, group of panels that share a y axis, what it is. One panel each, in this order, where there is something to draw.
PANELS = [
    ("grpo", "reward/accuracy", "Accuracy of rollouts", "share correct", "share", "Mean accuracy reward of the sampled completions."),
    ("grpo", "consensus/score", "Consensus score, the run's", "score", "score", "Eq. 6 with the run's own frame-use estimator, videos only."),
    ("grpo", "consensus/paper_score", "Consensus score, the paper's", "score", "score", "Eq. 6 with hidden states of the last layer, max pool, τ = 0.1."),
    ("grpo", "rollout/length", "Completion length", "tokens", None, "Mean tokens of a completion."),
    ("grpo", "consensus/evidence_use", "True-evidence use, the run's", "share of use", "evidence",
     "Frame use that lies on the frames the answer rests on. Dotted: uniform use of the held-out questions' frames."),
    ("grpo", "consensus/paper_evidence_use", "True-evidence use, the paper's", "share of use", "evidence", "The same by the paper's estimator."),
    ("grpo", "loss/kl", "KL to the reference", "nats per token", None, "k3 estimate, Eq. 10."),
    ("grpo", "loss/zero_variance_groups", "Zero-variance groups", "share of groups", "share", "Questions whose rollouts all earn the same: no signal."),
    ("grpo", "rollout/entropy", "Entropy", "nats per token", None, "Of the policy's next-token distribution on its completions."),
    ("grpo", "reward/total", "Reward, total", "reward", None, "Sum of the reward terms."),
    ("grpo", "reward/consensus", "Reward term: consensus", "reward", None, "λ × gate × consensus score, Eq. 7."),
    ("grpo", "reward/temporal", "Reward term: temporal", "reward", None, "Paid to correct completions where frames in order beat shuffled ones."),
    ("grpo", "reward/format", "Reward term: format", "reward", None, "1 for a think block followed by an answer block."),
    ("grpo", "reward/length", "Reward term: length", "reward", None, "Bonus of correct completions within the length band."),
    ("grpo", "time/step", "Time per GRPO step", "seconds", None, "Wall clock, rollouts included."),
    ("sft", "loss/sft", "SFT loss", "nats per token", None, "Cold start, mean over target tokens."),
]
ROWS = {  # result.json's names in the table's words; names of the form greedy/KIND are filled in
    "greedy": "Held-out accuracy, greedy", "sampled": "Held-out accuracy, sampled", "conflict": "asked and salient evidence differ",
    "consensus": "Consensus score, the run's", "evidence_use": "True-evidence use, the run's", "paper_consensus": "Consensus score, the paper's",
    "paper_evidence_use": "True-evidence use, the paper's", "evidence_chance": "True-evidence use by chance", "length": "Completion length, tokens"}
THEMES = {  # Okabe and Ito's colour-blind-safe colours, the lighter ones first on dark
    "light": {"back": "#ffffff", "text": "#22262b", "faint": "#d9dde2",
              "lines": ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]},
    "dark": {"back": "#15181d", "text": "#e4e7eb", "faint": "#3a414b",
             "lines": ["#56B4E9", "#E69F00", "#1FBF92", "#E295BE", "#F0E442", "#4A90D9"]}}
DASHES = [(), (5, 1.5), (1.5, 1.2), (6, 1.5, 1.5, 1.5)]  # a second cue beside colour
WIDTH, HEIGHT, DPI = 4.0, 2.9, 160  # inches of a panel


class ReportError(ValueError):
    """Bad input that a user can mend; printed alone, exit 2."""


@dataclass
class Run:
    folder: str
    label: str
    records: dict  # stage -> {step: record}
    result: dict | None  # result.json


# ------------------------------------------------------------------------------------------------------------ the files


def read_run(folder, label):
    """A directory that train.py wrote. A last line without its line break belongs to a run that is still writing and is left out."""
    file, result = Path(folder) / "metrics.jsonl", Path(folder) / "result.json"
    if not Path(folder).is_dir():
        raise ReportError(f"{folder} is not a folder (the --output_dir of a run is expected)")
    if not file.is_file():
        raise ReportError(f"{folder} has no metrics.jsonl; train.py writes it once training starts")
    records = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), 1):
        try:
            record = json.loads(line) if line.strip() else None
            if record is not None:
                records.setdefault(record["stage"], {})[int(record["step"])] = record
        except (ValueError, KeyError, TypeError) as error:
            if line.endswith("\n"):
                raise ReportError(f"{file} line {number} is not a record with stage and step") from error
    if not any(stage in records for stage, *_ in PANELS):
        raise ReportError(f"{file} holds no step yet; try again once training has made one")
    try:
        read = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None
        if read is not None and not all(isinstance(read[part], dict) for part in ("before", "after")):
            raise TypeError("before and after are objects")
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{result} is not the result of a run (JSON with before and after is expected)") from error
    return Run(str(folder), label, records, read)


def running_mean(values):
    """(S,) -> (S,) centred mean over a tenth of the steps, shorter at the ends; NaN is left out, and stays where nothing else is near."""
    half = len(values) // 20
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.nan if np.isnan(window).all() else np.nanmean(window) for window in windows])


def curves(runs, stage, name):
    """-> steps (S,) of any run, values (R, S) and their running means (R, S), NaN where a run has no finite value; steps of those it has."""
    records = [run.records.get(stage, {}) for run in runs]
    steps = sorted({step for own in records for step, record in own.items() if name in record})
    values, means, broken = np.full((len(runs), len(steps)), np.nan), np.full((len(runs), len(steps)), np.nan), []
    for row, own in enumerate(records):
        here = [index for index, step in enumerate(steps) if name in own.get(step, {})]
        numbers = [own[steps[index]][name] for index in here]
        numbers = np.array([number if isinstance(number, (int, float)) and np.isfinite(number) else np.nan for number in numbers], float)
        broken += [steps[index] for index, number in zip(here, numbers, strict=True) if np.isnan(number)]
        values[row, here], means[row, here] = numbers, running_mean(numbers)
    return np.array(steps), values, means, broken


def spread(values):
    """(R, S) -> mean, lowest, highest over runs, (S,) each; NaN where no run has a value."""
    masked = np.ma.masked_invalid(values)
    return tuple(getattr(masked, how)(axis=0).filled(np.nan) for how in ("mean", "min", "max"))


# --------------------------------------------------------------------------------------------------------- the pictures


def draw_panel(axes, panel, groups, theme):
    """One metric of every group of runs. Returns its alt text."""
    stage, name, title, unit, _, _ = panel
    told = []
    for index, (label, runs) in enumerate(groups.items()):
        steps, values, means, broken = curves(runs, stage, name)
        colour, dashes = theme["lines"][index % len(theme["lines"])], DASHES[index % len(DASHES)]
        if len(broken):
            axes.plot(sorted(set(broken)), [0.03] * len(set(broken)), "x", color=colour, transform=axes.get_xaxis_transform(), clip_on=False)
        if not np.isfinite(values).any():
            continue
        middle, low, high = spread(means)
        axes.plot(steps, spread(values)[0], color=colour, alpha=0.3, linewidth=0.9)
        if len(runs) > 1:
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
        known = np.flatnonzero(np.isfinite(middle))
        axes.plot(steps, middle, color=colour, linewidth=2, dashes=dashes or (None, None), marker="o" if len(known) == 1 else None)
        told.append(f"{label}: {middle[known[0]]:.3g} at step {steps[known[0]]} to {middle[known[-1]]:.3g} at step {steps[known[-1]]}")
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold")
    axes.set_xlabel(f"{stage.upper()} step")
    axes.set_ylabel(unit)
    return f"{title}, {unit}, running mean. " + "; ".join(told)


def draw(groups, panels, theme, heading):
    """-> picture (H, W, 4) with heading and legend, the panels cut out of it, their alt texts."""
    columns = min(3, len(panels))
    rows, per_row = -(-len(panels) // columns), min(columns, len(groups))
    top = 0.55 + 0.27 * -(-len(groups) // per_row)  # inches of heading and legend
    settings = {"text.color": theme["text"], "axes.labelcolor": theme["text"], "xtick.color": theme["text"], "ytick.color": theme["text"],
                "axes.edgecolor": theme["text"], "grid.color": theme["faint"], "axes.facecolor": theme["back"], "font.size": 11,
                "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "text.parse_math": False, "axes.axisbelow": True}
    with matplotlib.rc_context(settings):
        size = (columns * WIDTH, rows * HEIGHT + top)
        figure = Figure(size, dpi=DPI, facecolor=theme["back"])
        alts, shared = [], {}
        for index, panel in enumerate(panels):
            row, column = divmod(index, columns)
            box = (column * WIDTH + 0.8, (rows - 1 - row) * HEIGHT + 0.62, WIDTH - 1.0, HEIGHT - 1.06)  # left, bottom, width, height in inches
            axes = figure.add_axes((box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1]))
            alts.append(draw_panel(axes, panel, groups, theme))
            if panel[4] == "share":
                axes.set_ylim(-0.03, 1.03)
            elif panel[4]:
                shared.setdefault(panel[4], []).append(axes)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(5))
        chances = [run.result["after"]["evidence_chance"] for runs in groups.values() for run in runs
                   if run.result and "evidence_chance" in run.result["after"]]
        for name, members in shared.items():
            if name == "evidence" and chances:
                for axes in members:
                    axes.axhline(np.mean(chances), color=theme["text"], linestyle=":", linewidth=1.2)
            limits = [axes.get_ylim() for axes in members]
            for axes in members:
                axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        figure.text(0.15 / size[0], 1 - 0.14 / size[1], heading, fontsize=14, fontweight="bold", va="top")
        handles = [Line2D([], [], color=theme["lines"][index % len(theme["lines"])], dashes=DASHES[index % len(DASHES)] or (None, None), linewidth=2)
                   for index in range(len(groups))]
        legend = figure.legend(handles, ["."] * len(groups), loc="upper left", bbox_to_anchor=(0.1 / size[0], 1 - 0.42 / size[1]), ncols=per_row,
                               frameon=False, handlelength=2.6, borderaxespad=0)
        for text, (label, runs) in zip(legend.get_texts(), groups.items(), strict=True):
            text.set_text(legend_text(label if len(label) <= 36 else label[:35] + "…", runs))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        picture = np.asarray(canvas.buffer_rgba())
    height, width, above = round(HEIGHT * DPI), round(WIDTH * DPI), picture.shape[0] - rows * round(HEIGHT * DPI)
    cells = [picture[above + row * height : above + (row + 1) * height, column * width : (column + 1) * width]
             for row, column in (divmod(index, columns) for index in range(len(panels)))]
    return picture, cells, alts


def legend_text(label, runs):
    return label if len(runs) == 1 else f"{label} ({len(runs)} runs)"


def png(pixels):
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------------------ the report


def row_words(name):
    """A name of result.json in words; greedy/conflict and the like become '  conflict's words'."""
    family, _, part = name.partition("/")
    return f"{ROWS[family]}: {ROWS.get(part, part)}" if part and family in ROWS else ROWS.get(name, name)


def result_table(groups):
    """The before/after table as HTML: mean over a label's runs and, of several, the lowest and highest. '' without any result."""
    done = {label: [run.result for run in runs if run.result and run.result["after"]] for label, runs in groups.items()}
    done = {label: results for label, results in done.items() if results}
    names = list(dict.fromkeys(name for results in done.values() for result in results for name in result["after"]))
    if not names:
        return ""

    def cell(results, part, name):
        values = [result[part][name] for result in results if isinstance(result[part].get(name), (int, float))]
        if not values:
            return "–"
        return f"{np.mean(values):.3f}" + (f" <small>({min(values):.3f} to {max(values):.3f})</small>" if len(values) > 1 else "")

    order = {name: index for index, name in enumerate(ROWS)}
    names.sort(key=lambda name: (order.get(name.partition("/")[0], len(order)), "/" in name, name))
    head = "".join(f"<th scope=col>{escape(legend_text(label, results))}</th>" for label, results in done.items())
    body = "".join(
        f"<tr><th scope=row>{escape(row_words(name))}</th>" + "".join(
            f'<td data-label="{escape(label)}">{cell(results, "before", name)} → <b>{cell(results, "after", name)}</b></td>'
            for label, results in done.items()) + "</tr>\n" for name in names)
    return ("<h2>Held-out questions, before → after GRPO</h2>\n<p>From result.json; for several runs the mean and (lowest to highest).</p>\n"
            f"<table><thead><tr><th scope=col>measure</th>{head}</tr></thead>\n<tbody>\n{body}</tbody></table>\n")


STYLE = """:root{color-scheme:light dark;--back:#fff;--text:#22262b;--faint:#d9dde2;LIGHT}
@media(prefers-color-scheme:dark){:root{--back:#15181d;--text:#e4e7eb;--faint:#3a414b;DARK}}
body{margin:0 auto;padding:1rem;max-width:1300px;background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.2rem;margin-top:2rem}small{opacity:.8}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.5rem;padding:0;list-style:none}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:1.2rem .8rem}
figure{margin:0;max-width:480px}img{width:100%;height:auto;display:block}figcaption{font-size:.9rem;padding:0 .5rem}
table{border-collapse:collapse}th,td{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px solid var(--faint);font-variant-numeric:tabular-nums}
tbody th{font-weight:normal}pre{white-space:pre-wrap;border:1px solid var(--faint);border-radius:6px;padding:.7rem}
@media(max-width:640px){thead{display:none}table,tbody,tr,th,td{display:block}tr{border-bottom:1px solid var(--faint);padding:.4rem 0}
th,td{border:0;padding:.1rem 0}tbody th{font-weight:600}td::before{content:attr(data-label) ": "}}"""


def run_report(folders, labels=None, output=None, command=""):
    """The report of `visualize.py run`. labels: one a folder, or None. Returns the HTML file; the PNG lies beside it."""
    folders = [str(folder) for folder in folders]
    if labels and len(labels) != len(folders):
        raise ReportError(f"{len(labels)} --label for {len(folders)} directories; give none, or one a directory in the same order")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ReportError("a directory is given twice")
    output = Path(output or (Path(folders[0]) / "report.html" if len(folders) == 1 else "report.html"))
    if output.suffix != ".html":
        raise ReportError(f"--output {output} must end in .html; the PNG is written beside it")
    groups = {}
    for folder, label in zip(folders, labels or folders, strict=True):
        groups.setdefault(label, []).append(read_run(folder, label))
    everything = [run for runs in groups.values() for run in runs]
    data = {panel[1]: curves(everything, *panel[:2]) for panel in PANELS}
    panels = [panel for panel in PANELS if data[panel[1]][3] or np.nan_to_num(data[panel[1]][1]).any()]
    zero = [panel[2] for panel in PANELS if panel not in panels and np.isfinite(data[panel[1]][1]).any()]
    if not panels:
        raise ReportError("none of the metrics in metrics.jsonl is one that this report draws, or all are zero")
    heading = f"Training dynamics of {everything[0].folder if len(everything) == 1 else f'{len(everything)} runs'}"
    pictures = {name: draw(groups, panels, theme, heading) for name, theme in THEMES.items()}
    note = "Line: running mean over a tenth of the steps, centred. Faint: per-step values."
    note += " Band: lowest to highest run; the line is their mean." if len(groups) < len(everything) else ""
    note += " A cross marks a step whose value is not a number." if any(entry[3] for entry in data.values()) else ""
    note += f" Zero throughout and not drawn: {', '.join(zero)}." if zero else ""
    unfinished = [run.folder for run in everything if run.result is None]
    note += f" No result.json yet, so not in the table: {', '.join(unfinished)}." if unfinished else ""
    colours = {name: "".join(f"--c{index}:{colour};" for index, colour in enumerate(theme["lines"])) for name, theme in THEMES.items()}
    legend = "".join(
        f'<li><svg width=40 height=10 aria-hidden=true><line x1=0 y1=5 x2=40 y2=5 stroke="var(--c{index % 6})" stroke-width=3 '
        f'stroke-dasharray="{" ".join(str(2.5 * part) for part in DASHES[index % len(DASHES)])}"/></svg> {escape(legend_text(label, runs))}</li>'
        for index, (label, runs) in enumerate(groups.items()))
    figures = "\n".join(
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{base64.b64encode(png(dark)).decode()}">'
        f'<img src="data:image/png;base64,{base64.b64encode(png(light)).decode()}" width={light.shape[1]} height={light.shape[0]} '
        f'alt="{escape(alt)}"></picture><figcaption>{escape(panel[5])}</figcaption></figure>'
        for panel, light, dark, alt in zip(panels, pictures["light"][1], pictures["dark"][1], pictures["light"][2], strict=True))
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".png").write_bytes(png(pictures["light"][0]))
    output.write_text(
        f'<!doctype html>\n<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">'
        f"<title>{escape(heading)}</title>\n<style>{STYLE.replace('LIGHT', colours['light']).replace('DARK', colours['dark'])}</style></head>\n"
        f"<body><h1>{escape(heading)}</h1>\n<ul class=legend>{legend}</ul>\n<p>{escape(note)}</p>\n{result_table(groups)}"
        f"<h2>Step by step</h2>\n<div class=panels>\n{figures}\n</div>\n"
        f"<h2>Made by</h2>\n<pre>{escape(command)}</pre>\n</body></html>\n", encoding="utf-8")
    return output


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = parser.add_subparsers(dest="figure", required=True).add_parser("run", allow_abbrev=False, help="training dynamics of one or several runs")
    run.add_argument("output_dirs", nargs="+", metavar="OUTPUT_DIR", help="what train.py wrote (--output_dir)")
    run.add_argument("--label", action="append", metavar="NAME", help="once a directory, in their order; same label: mean and min-max band")
    run.add_argument("--output", help="HTML file; default: report.html in the directory, of several ./report.html")
    arguments = parser.parse_args()
    try:
        print(run_report(arguments.output_dirs, arguments.label, arguments.output, "python " + shlex.join(sys.argv)))
    except (ReportError, OSError) as error:
        print(f"visualize.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
