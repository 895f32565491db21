"""The report of training runs: `visualize.py run`, and the report.html that train.py writes."""

import json
import math
from pathlib import Path

import numpy as np
from jinja2 import Template
from matplotlib.ticker import MaxNLocator

from common.data import DataError, read_document
from common.pages import columns_html, page_path, write_page
from common.plots import line_style, name_paths, new_figure

# {metric: unit} of the panels in their order; the other reward terms follow.
UNITS = {
    "reward/accuracy": "share correct",
    "consensus/score": "share",
    "consensus/paper_score": "share",
    "consensus/evidence_use": "share of use",
    "consensus/paper_evidence_use": "share of use",
    "rollout/length": "tokens",
    "rollout/truncated": "share of completions",
    "rollout/entropy": "nats per token",
    "loss/kl": "nats per token",
    "loss/zero_variance_groups": "share of groups",
    "loss/grad_norm": "norm",
    "time/step": "seconds",
    "loss/sft": "nats per token",
    "reward/total": "reward",
}

# Jinja: the settings in which runs differ, what each skipped, and what it wrote.
DETAILS = """{% if runs | length > 1 %}<h2>Settings that differ</h2><div><table>
<tr><th>setting</th>{% for run in runs %}<th>{{ run.folder }}</th>{% endfor %}</tr>
{# All runs have a command and a folder of their own. #}
{% for name in runs | map(attribute="settings") | map("list") | sum(start=[]) | unique(true)
if name not in ("command", "output_dir") %}
{% set values = runs | map(attribute="settings") | map(attribute=name) | map("string") | list %}
{% if values | unique(true) | list | length > 1 %}
<tr><td>{{ name }}</td>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endif %}{% endfor %}</table></div>{% endif %}
{% for run in runs %}
<h2>Skipped by {{ run.folder }}</h2>
<ul>{% for cause, count in (run.result.skipped_by_cause or {}).items() %}
<li>{{ count }}: {{ cause }}</li>
{% endfor %}<li>held-out questions: {{ run.result.heldout_skipped | length }}</li></ul>
<h2>Rollouts of {{ run.folder }}: the best and the worst of some groups, early and late</h2>
{% for step, rows in run.rollouts | groupby("step") %}
{% for id, group in (rows | groupby("problem_id", case_sensitive=true))[:4] %}
<details><summary>Step {{ step }}, {{ id }}: {{ group[0].question }}</summary>
<p>{{ group[0].options | join(", ") }}</p><p>Right: {{ group[0].answer }}</p>
{% set group = group | sort(attribute="rewards.total", reverse=true) %}
{% for row in (group[0], group[-1]) %}
<h3>{{ "Best" if loop.first else "Worst" }} of {{ group | length }}
{%- if row.truncated %}, cut at --max_completion_length{% endif %}</h3>
<pre>{{ row.text }}</pre><div><table>
<tr>{% for term in row.rewards %}<th>{{ term }}</th>{% endfor %}</tr>
<tr>{% for value in row.rewards.values() %}<td>{{ "%.3f" | format(value) }}</td>{% endfor %}</tr>
</table></div>
{% if row.use %}<div><table>
{# A slot has several frames. #}
{% set width = (row.prior | length / row.use | length) | round(0, "ceil") | int %}
<tr><th>prior, of frames</th>
{%- for share in row.prior %}<td>{{ "%.2f" | format(share) }}</td>{% endfor %}</tr>
<tr><th>use, of slots</th>
{%- for share in row.use %}<td colspan="{{ width }}">{{ "%.2f" | format(share) }}</td>
{%- endfor %}</tr></table></div>{% endif %}
{% endfor %}</details>
{% endfor %}{% endfor %}{% endfor %}"""


def read_log(folder, name):
    """Yield the records of a log of train.py; each has a step."""
    path = Path(folder, name)
    if not path.is_file():
        raise DataError(f"{folder} is no --output_dir of train.py, it has no {name}")
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            # train.py is still writing a last line without its line break.
            if not line.endswith("\n"):
                break
            try:
                record = json.loads(line)
                int(record["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{file.name} line {number} is not a JSON record with a step"
                ) from error
            yield record


def read_run(folder):
    """Read what train.py wrote to a folder.

    Returns:
        {(stage, step): record of metrics.jsonl}, and result.json ({} while the run goes on).
    """
    records = {(row.get("stage"), row["step"]): row for row in read_log(folder, "metrics.jsonl")}
    return records, read_object(folder, "result.json")


def read_object(folder, name):
    """The object in a JSON file of a run; {} without the file."""
    file = Path(folder) / name
    return read_document(file) if file.is_file() else {}


def series(runs, name):
    """One metric of several runs.

    Returns:
        (S,) all steps that have it; (R, S) values, NaN where a run has none or no finite number;
        how many values are no finite numbers.
    """
    # SFT logs some of GRPO's metrics, too.
    stage = "sft" if name == "loss/sft" else "grpo"
    # {step: value} of each run
    curves = []
    for records, _ in runs:
        curve = {}
        for (part, step), record in records.items():
            if part == stage and name in record:
                curve[step] = record[name]
        curves.append(curve)
    # Runs can have different lengths; None becomes NaN.
    steps = sorted(set().union(*curves))
    values = np.array([list(map(curve.get, steps)) for curve in curves], float)  # (R, S)
    broken = sum(map(len, curves)) - int(np.isfinite(values).sum())
    values[np.isinf(values)] = np.nan
    return steps, values, broken


def running_means(values):
    """(R, S) -> (R, S): centred means over about sqrt(S) steps without NaN; NaN stays NaN."""
    half = int(values.shape[1] ** 0.5 / 2)
    means = np.full(values.shape, np.nan)
    for row, step in np.argwhere(np.isfinite(values)):
        means[row, step] = np.nanmean(values[row, max(0, step - half) : step + half + 1])
    return means


def plot_metric(axes, name, groups):
    """Draw one metric of every group of runs. groups: {label: list of read_run()}."""
    missing = 0
    for index, runs in enumerate(groups.values()):
        steps, values, broken = series(runs, name)
        missing += broken
        style = line_style(index)
        shade = {"color": style["color"], "linewidth": 0}
        axes.plot(steps, values.T, ".", alpha=0.4, markersize=5, markeredgewidth=0, **shade)
        means = running_means(values)
        axes.fill_between(steps, means.min(0), means.max(0), alpha=0.2, **shade)
        # NaN where any run has none: a mean of fewer runs would jump where one ends.
        axes.plot(steps, means.mean(0), **style)
    title = f"{name}, {missing} not a number" if missing else name
    axes.set_title(title, loc="left", fontsize=11, weight="bold")
    axes.set(xlabel="step", ylabel=UNITS.get(name, "reward"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def mean_text(results, part, name):
    """One number of result.json, mean (lowest to highest) over runs. part: before or after."""
    values = [result[part][name] for result in results if name in result[part]]
    if not values:
        return "–"
    text = f"{np.mean(values):.3f}"
    if len(values) > 1:
        text += f" ({min(values):.3f} to {max(values):.3f})"
    return text


def result_table(groups):
    """result.json of the finished runs, one column a group, as HTML."""
    columns = []
    for label, runs in groups.items():
        # Runs without held-out questions have no numbers.
        results = [result for _, result in runs if "after" in result]
        column = {"before → after GRPO": label}
        for result in results:
            for name in result["after"]:
                before = mean_text(results, "before", name)
                after = mean_text(results, "after", name)
                column[name] = f"{before} → {after}"
        columns.append(column)
    return columns_html(columns)


def run_details(folder, run):
    """What DETAILS shows of a folder and its read_run(): its rollouts are of three steps.

    A folder may hold metrics.jsonl alone.
    """
    records, result = run
    rollouts = []
    if Path(folder, "rollouts.jsonl").is_file():
        rollouts = read_log(folder, "rollouts.jsonl")
    steps = [step for stage, step in records if stage == "grpo"]
    shown = {*steps[:1], *steps[len(steps) // 2 :][:1], *steps[-1:]}
    return {
        "folder": folder,
        "settings": read_object(folder, "run.json"),
        "result": result,
        "rollouts": [row for row in rollouts if row["step"] in shown],
    }


def run_report(output_dirs, label=None, output=None):
    """Write the report of training runs.

    Args:
        output_dirs: of runs of train.py.
        label: one a folder; runs of the same label become one line and a band. None: their names.
        output: the page; None: report.html in the only folder, or here for several.
    Returns:
        Path of the page; PNG and SVG lie beside it.
    """
    # Seeds of one arm share a label.
    groups = {}
    logged = {}
    details = []
    for folder, name in zip(output_dirs, name_paths(output_dirs, label), strict=True):
        run = read_run(folder)
        groups.setdefault(name, []).append(run)
        details.append(run_details(folder, run))
        for record in run[0].values():
            logged |= record
    # A new reward term needs no entry in UNITS.
    terms = [name for name in logged if name.startswith("reward/") and name not in UNITS]
    names = [name for name in [*UNITS, *terms] if name in logged]
    if not names:
        raise DataError(f"{output_dirs[0]}/metrics.jsonl has none of the metrics to be drawn yet")
    note = (
        "Line: running mean over about √n of n steps, centred, and its mean over runs; band: its "
        "lowest to highest run. Dots: value of each step."
    )
    legend = [f"{name}, n = {len(runs)}" for name, runs in groups.items()]
    heading = "Training dynamics"
    rows = math.ceil(len(names) / 3)
    figure = new_figure(12, 2.75 * rows + 1, heading, legend, note)
    panels = {}
    for place, name in enumerate(names, 1):
        # Both scores of frame use stand on the same scale.
        twin = panels.get(name.replace("paper_", ""))
        panels[name] = figure.add_subplot(rows, 3, place, sharey=twin)
        plot_metric(panels[name], name, groups)
    # The page of one run stands with the run.
    folder = output_dirs[0] if len(output_dirs) == 1 else ""
    output = page_path(output or Path(folder, "report.html"))
    end = Template(DETAILS, autoescape=True).render(runs=details)
    return write_page(output, heading, result_table(groups), {"": figure}, end)
