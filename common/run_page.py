"""The report of training runs: `visualize.py run`, and the report.html that train.py writes."""

import json
import math
import shlex
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from common.data import DataError
from common.pages import check_output, panels_html, table_html, write_report
from common.plots import Key, Panel, draw_panels, line_key, short_names, shorten


@dataclass
class Metric:
    """How the report shows one number of metrics.jsonl."""

    title: str
    unit: str
    caption: str = ""
    axis: str = ""  # panels that name the same axis share their y limits
    stage: str = "grpo"


# Panels in this order; every other reward/NAME of a file follows under its name.
METRICS = {
    "reward/accuracy": Metric(
        "Accuracy of rollouts", "share correct", "Mean accuracy reward of sampled completions."
    ),
    "consensus/score": Metric(
        "Consensus, the run's score", "score", "Eq. 6 with the run's frame use; videos only.", "cfr"
    ),
    "consensus/paper_score": Metric(
        "Consensus, the paper's score", "score", "Last layer, max pool, τ = 0.1.", "cfr"
    ),
    "rollout/length": Metric("Completion length", "tokens", "Mean tokens of a completion."),
    "consensus/evidence_use": Metric(
        "Evidence use, the run's score",
        "share of use",
        "Frame use on the frames that hold the answer.",
        "evidence",
    ),
    "consensus/paper_evidence_use": Metric(
        "Evidence use, the paper's", "share of use", "The same by the paper's score.", "evidence"
    ),
    "loss/kl": Metric("KL to the reference", "nats per token", "k3 estimate, Eq. 10."),
    "loss/zero_variance_groups": Metric(
        "Zero-variance groups", "share of groups", "All rollouts earn the same: no signal."
    ),
    "rollout/entropy": Metric(
        "Entropy", "nats per token", "Of the policy's next-token distributions on completions."
    ),
    "reward/total": Metric("Reward, total", "reward", "Sum of the terms."),
    "reward/consensus": Metric(
        "Reward term: consensus", "reward", "λ × gate × consensus score, Eq. 7."
    ),
    "reward/temporal": Metric(
        "Reward term: temporal", "reward", "For correct completions where frame order helps."
    ),
    "reward/alignment": Metric(
        "Reward term: alignment", "reward", "Share of timed claims that match, if correct."
    ),
    "reward/consistency": Metric(
        "Reward term: consistency",
        "reward",
        "For correct answers that the reference finds likely too.",
    ),
    "reward/format": Metric(
        "Reward term: format", "reward", "1 for a think block followed by an answer block."
    ),
    "reward/length": Metric(
        "Reward term: length", "reward", "Bonus of correct completions within the length band."
    ),
    "time/step": Metric("Time per GRPO step", "seconds", "Wall clock, rollouts included."),
    "loss/sft": Metric(
        "SFT loss", "nats per token", "Cold start, mean over target tokens.", stage="sft"
    ),
}

# Words for the names of result.json; others are shown as they are.
MEASURES = {
    "greedy": "Held-out accuracy, greedy",
    "sampled": "Held-out accuracy, sampled",
    "consensus": "Consensus, the run's score",
    "evidence_use": "Evidence use, the run's score",
    "paper_consensus": "Consensus, the paper's score",
    "paper_evidence_use": "Evidence use, the paper's",
    "evidence_chance": "Evidence use by chance",
    "length": "Completion length, tokens",
    "conflict": "asked and salient evidence differ",
}


@dataclass
class Run:
    """What train.py wrote to an output folder."""

    folder: str
    records: dict  # stage -> {step: record}
    result: dict | None  # result.json; None while the run goes on


def read_run(folder):
    """Read metrics.jsonl and result.json of a run. Raises DataError where they are malformed."""
    file = Path(folder) / "metrics.jsonl"
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder (the --output_dir of a run is expected)")
    if not file.is_file():
        raise DataError(f"{folder} has no metrics.jsonl; train.py writes it once training starts")
    records = {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.setdefault(record["stage"], {})[int(record["step"])] = record
        except (ValueError, KeyError, TypeError) as error:
            # Without its line break, the last line is one that train.py is still writing.
            if line.endswith("\n"):
                raise DataError(
                    f"{file} line {number} is not a JSON record with stage and step"
                ) from error
    if not records:
        raise DataError(f"{file} holds no step yet; try again once training has made one")
    return Run(str(folder), records, read_result(Path(folder) / "result.json"))


def read_result(file):
    """result.json of a run -> dict; None where there is none yet."""
    if not file.is_file():
        return None
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        for number in [*result["before"].values(), *result["after"].values()]:
            if type(number) not in (int, float):
                raise ValueError("not numbers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not the result of a run (JSON with numbers before and after)"
        ) from error
    return result


def metrics_of(runs):
    """{name: Metric} that the report shows: the known ones and every reward term of the runs."""
    # A new reward term needs no entry in METRICS.
    metrics = dict(METRICS)
    for run in runs:
        for record in run.records.get("grpo", {}).values():
            for name in record:
                if name.startswith("reward/"):
                    title = f"Reward term: {name.removeprefix('reward/')}"
                    metrics.setdefault(name, Metric(title, "reward"))
    return metrics


def series(runs, stage, name):
    """One metric of several runs.

    Returns:
        (S,) all steps that have it, (R, S) values, NaN where a run has none or it is not a finite
        number, and the list of the steps of the latter.
    """
    records = [run.records.get(stage, {}) for run in runs]
    steps = set()
    for own in records:
        steps.update(step for step, record in own.items() if name in record)
    steps = sorted(steps)
    # NaN stands for "no number"; `broken` tells missing values from bad ones.
    values = np.full((len(runs), len(steps)), np.nan)
    broken = []
    for row, own in enumerate(records):
        for column, step in enumerate(steps):
            value = own.get(step, {}).get(name, np.nan)
            if isinstance(value, int | float) and math.isfinite(value):
                values[row, column] = value
            elif name in own.get(step, {}):
                broken.append(step)
    return np.array(steps), values, broken


def running_mean(values):
    """(S,) -> (S,): centred mean over about sqrt(S) steps without NaN; NaN stays NaN."""
    half = int(len(values) ** 0.5 / 2)
    means = np.full(len(values), np.nan)
    for index in np.flatnonzero(~np.isnan(values)):
        means[index] = np.nanmean(values[max(0, index - half) : index + half + 1])
    return means


def plot_metric(axes, name, metric, groups, chance):
    """Draw one metric of every group of runs.

    Args:
        groups: {label: list of Run}.
        chance: height of a dotted line, or None.
    Returns:
        Alt text.
    """
    words = []
    for index, (label, runs) in enumerate(groups.items()):
        key = line_key(label, index)
        steps, values, broken = series(runs, metric.stage, name)
        # A value that is not a number is marked at the bottom of its step.
        if broken:
            place = axes.get_xaxis_transform()  # y from 0 at the bottom to 1 at the top
            heights = [0.03] * len(broken)
            axes.plot(broken, heights, "x", color=key.colour, transform=place, clip_on=False)
        means = np.array([running_mean(row) for row in values])  # (R, S)
        # NaN where any run has none: a mean of fewer runs would jump where one ends.
        middle = means.mean(0)  # (S,)
        # The alt text names the first and the last value.
        known = np.flatnonzero(np.isfinite(middle))
        if not len(known):
            continue
        axes.plot(steps, values.mean(0), ".", color=key.colour, alpha=0.5, markersize=6, mew=0)
        if len(runs) > 1:
            low, high = means.min(0), means.max(0)
            axes.fill_between(steps, low, high, color=key.colour, alpha=0.18, linewidth=0)
        axes.plot(steps, middle, color=key.colour, linewidth=2, linestyle=key.style)
        ends = [f"{middle[place]:.3g} at step {steps[place]}" for place in known[[0, -1]]]
        words.append(f"{label}: {', '.join(ends)}")
    axes.set(xlabel=f"{metric.stage.upper()} step", ylabel=metric.unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    # Shares that stand alone are shown on their whole scale.
    if metric.unit.startswith("share") and not metric.axis:
        axes.set_ylim(-0.03, 1.03)
    if chance is not None:
        axes.axhline(chance, color="black", linestyle="dotted", linewidth=1.2)
    return f"{metric.unit}, running mean. {'; '.join(words) or 'No number in any step'}."


def mean_cell(values):
    """One number of several runs (None where a run lacks it) -> mean (lowest to highest)."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    cell = f"{np.mean(values):.3f}"
    if len(values) > 1:
        cell += f" ({min(values):.3f} to {max(values):.3f})"
    return cell


def result_table(groups):
    """result.json of finished runs, before → after training, as HTML; '' where there is none."""
    columns = {}
    names = {}
    for label, runs in groups.items():
        # Runs without held-out questions have no numbers.
        done = [run.result for run in runs if run.result and run.result["after"]]
        if done:
            columns[legend_name(label, done)] = done
        for result in done:
            names |= result["after"]
    rows = []
    for name in names:
        # greedy/colour: a measure on one kind of question.
        family, _, kind = name.partition("/")
        row = [MEASURES.get(family, family)]
        if kind:
            row[0] += f": {MEASURES.get(kind, kind)}"
        for results in columns.values():
            before = mean_cell([result["before"].get(name) for result in results])
            after = mean_cell([result["after"].get(name) for result in results])
            row.append(f"{before} → <b>{after}</b>")
        rows.append(row)
    if not rows:
        return ""
    return (
        "<h2>Held-out questions, before → after GRPO</h2>"
        "<p>From result.json; of several runs the mean (lowest to highest).</p>"
        f"{table_html(['measure', *columns], rows)}"
    )


def legend_name(label, runs):
    return label if len(runs) == 1 else f"{label} ({len(runs)} runs)"


def group_runs(folders, labels):
    """Read the runs -> {label: list of Run}; without labels the folders' names, shortened."""
    if labels and len(labels) != len(folders):
        raise DataError(
            f"{len(labels)} --label for {len(folders)} directories; "
            "give none, or one a directory in their order"
        )
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise DataError("a directory is given twice")
    # Seeds of one arm share a label.
    groups = {}
    for folder, label in zip(folders, labels or short_names(folders), strict=True):
        groups.setdefault(label, []).append(read_run(folder))
    return groups


def metric_panels(groups, chance):
    """A panel for every metric that is not zero throughout.

    Args:
        chance: evidence use by chance, or None.
    Returns:
        list of Panel, and what the reader should know about the values.
    """
    runs = sum(groups.values(), [])
    panels = []
    zeros = []
    note = ""
    for name, metric in metrics_of(runs).items():
        steps, values, broken = series(runs, metric.stage, name)
        if broken:
            note = " A cross at the bottom: the value is not a number."
        # Terms that are switched off are zero throughout.
        if broken or np.nan_to_num(values).any():
            level = chance if metric.axis == "evidence" else None

            def plot(axes, name=name, metric=metric, level=level):
                return plot_metric(axes, name, metric, groups, level)

            panels.append(Panel(metric.title, metric.caption, plot, metric.axis))
        elif len(steps):
            zeros.append(metric.title)
    if zeros:
        note += f" Zero throughout, so not drawn: {', '.join(zeros)}."
    return panels, note


def run_report(folders, labels=None, output=None, command=""):
    """Write the report of training runs.

    Args:
        folders: output folders of train.py.
        labels: one a folder; runs of the same label become one line and a band. None: their names.
        output: the page; None: report.html in the only folder, or here for several.
        command: shown at the end of the page.
    Returns:
        Path of the page; PNG and SVG lie beside it.
    """
    folders = [str(folder) for folder in folders]
    # The page of one run stands with the run.
    if output is None:
        output = Path(folders[0] if len(folders) == 1 else "") / "report.html"
    check_output(output)
    groups = group_runs(folders, labels)
    runs = sum(groups.values(), [])
    # Evidence use by chance is a number of the held-out questions.
    results = [run.result for run in runs if run.result]
    chances = [result["after"].get("evidence_chance") for result in results]
    chances = [chance for chance in chances if chance is not None]
    panels, found = metric_panels(groups, float(np.mean(chances)) if chances else None)
    if not panels:
        raise DataError(
            "metrics.jsonl has none of the metrics that this report draws, or all of them are zero"
        )
    note = "Line: running mean over about √n of n steps, centred. Dots: value of each step."
    if len(groups) < len(runs):
        note += (
            " Band: lowest to highest running mean of the runs; "
            "their mean is the line, where all of them have a value."
        )
    note += found
    unfinished = [run.folder for run in runs if run.result is None]
    if unfinished:
        note += f" Without result.json yet: {', '.join(unfinished)}."
    keys = []
    for index, (label, members) in enumerate(groups.items()):
        keys.append(line_key(legend_name(shorten(label, 40), members), index))
    if any(panel.shared == "evidence" for panel in panels) and chances:
        keys.append(Key("uniform use (chance, held-out)", "black", "dotted"))
    heading = f"Training dynamics of {folders[0] if len(runs) == 1 else f'{len(runs)} runs'}"
    figure = draw_panels(panels, heading, keys, note)
    body = [result_table(groups), f"<h2>Step by step</h2><p>{escape(note)}</p>"]
    body.append(panels_html(panels, keys))
    # The launcher adds --local_rank to what the user typed.
    commands = [command]
    for run in runs:
        if run.result and "command" in run.result:
            words = [word for word in run.result["command"] if "local_rank" not in word]
            commands.append(f"# {run.folder}: {shlex.join(words)}")
    return write_report(output, heading, "\n".join(body), "\n".join(commands), {"": figure})
