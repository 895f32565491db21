"""The report of a training run."""

import json
import shlex
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from common.data import DataError
from common.pages import check_output, panels_html, table_html, write_report
from common.plots import DASHES, SHEETS, Panel, draw, short_names, shorten

# One panel each, in this order: stage, metric, title, unit, y axis (panels that name the same one share it), what it is.
METRICS = [
    (
        "grpo",
        "reward/accuracy",
        "Accuracy of rollouts",
        "share correct",
        "0 to 1",
        "Mean accuracy reward of the sampled completions.",
    ),
    (
        "grpo",
        "consensus/score",
        "Consensus, the run's score",
        "score",
        "consensus",
        "Eq. 6 with the run's own frame use; videos only.",
    ),
    (
        "grpo",
        "consensus/paper_score",
        "Consensus, the paper's score",
        "score",
        "consensus",
        "Last layer, max pool, τ = 0.1.",
    ),
    ("grpo", "rollout/length", "Completion length", "tokens", "", "Mean tokens of a completion."),
    (
        "grpo",
        "consensus/evidence_use",
        "Evidence use, the run's score",
        "share of use",
        "evidence",
        "Frame use on the frames that hold the answer.",
    ),
    (
        "grpo",
        "consensus/paper_evidence_use",
        "Evidence use, the paper's",
        "share of use",
        "evidence",
        "The same by the paper's frame use.",
    ),
    ("grpo", "loss/kl", "KL to the reference", "nats per token", "", "k3 estimate, Eq. 10."),
    (
        "grpo",
        "loss/zero_variance_groups",
        "Zero-variance groups",
        "share of groups",
        "0 to 1",
        "All rollouts earn the same: no signal.",
    ),
    (
        "grpo",
        "rollout/entropy",
        "Entropy",
        "nats per token",
        "",
        "Of the policy's next-token distribution on its completions.",
    ),
    (
        "grpo",
        "reward/total",
        "Reward, total",
        "reward",
        "",
        "Sum of the terms: accuracy and those that follow.",
    ),
    (
        "grpo",
        "reward/consensus",
        "Reward term: consensus",
        "reward",
        "",
        "λ × gate × consensus score, Eq. 7.",
    ),
    (
        "grpo",
        "reward/temporal",
        "Reward term: temporal",
        "reward",
        "",
        "For correct completions where frame order helps.",
    ),
    (
        "grpo",
        "reward/alignment",
        "Reward term: alignment",
        "reward",
        "",
        "Share of timed claims that match, if correct.",
    ),
    (
        "grpo",
        "reward/consistency",
        "Reward term: consistency",
        "reward",
        "",
        "For correct answers that the reference finds likely too.",
    ),
    (
        "grpo",
        "reward/format",
        "Reward term: format",
        "reward",
        "0 to 1",
        "1 for a think block followed by an answer block.",
    ),
    (
        "grpo",
        "reward/length",
        "Reward term: length",
        "reward",
        "",
        "Bonus of correct completions within the length band.",
    ),
    ("grpo", "time/step", "Time per GRPO step", "seconds", "", "Wall clock, rollouts included."),
    ("sft", "loss/sft", "SFT loss", "nats per token", "", "Cold start, mean over target tokens."),
]

STAGES = ("rollout", "reference", "policy", "update")  # of a GRPO step, in seconds under time/

MEASURES = {  # of result.json, in the table's order; parts of the question set follow theirs: greedy/conflict, greedy/KIND
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
    folder: str
    records: dict  # stage -> {step: record}
    result: dict | None  # result.json: before, after


def read_run(folder):
    """A directory that train.py wrote. A last line without its line break is one that train.py is still writing, and is left out."""
    file, result = Path(folder) / "metrics.jsonl", Path(folder) / "result.json"
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a folder (the --output_dir of a run is expected)")
    if not file.is_file():
        raise DataError(f"{folder} has no metrics.jsonl; train.py writes it once training starts")
    records = {}
    for number, line in enumerate(
        file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), 1
    ):
        try:
            record = json.loads(line)
            records.setdefault(record["stage"], {})[int(record["step"])] = record
        except (ValueError, KeyError, TypeError) as error:
            if line.endswith("\n"):
                raise DataError(
                    f"{file} line {number} is not a JSON record with stage and step"
                ) from error
    if not records:
        raise DataError(f"{file} holds no step yet; try again once training has made one")
    try:
        read = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None
        numbers = (
            []
            if read is None
            else [
                *read["before"].values(),
                *read["after"].values(),
                *read.get("seconds", {}).values(),
            ]
        )
        if not all(type(number) in (int, float) for number in numbers):
            raise ValueError("not numbers")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{result} is not the result of a run (JSON with numbers before and after)"
        ) from error
    return Run(str(folder), records, read)


def running_mean(values):
    """(S,) -> (S,): centred mean over about sqrt(S) steps, fewer at the ends, of what is not NaN; NaN where the value itself is."""
    half = int(len(values) ** 0.5 / 2)
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return np.array(
        [
            np.nan if np.isnan(value) else np.nanmean(window)
            for value, window in zip(values, windows, strict=True)
        ]
    )


def curves(runs, stage, name):
    """-> all their steps (S,), values (R, S) and running means (R, S) with NaN where a run has none, steps whose value is not a number."""
    records = [run.records.get(stage, {}) for run in runs]
    steps = sorted({step for own in records for step, record in own.items() if name in record})
    values, means, broken = (
        np.full((len(runs), len(steps)), np.nan),
        np.full((len(runs), len(steps)), np.nan),
        [],
    )
    for row, own in enumerate(records):
        here = [index for index, step in enumerate(steps) if name in own.get(step, {})]
        numbers = [own[steps[index]][name] for index in here]
        numbers = np.array(
            [
                number if isinstance(number, (int, float)) and np.isfinite(number) else np.nan
                for number in numbers
            ],
            float,
        )
        values[row, here], means[row, here] = numbers, running_mean(numbers)
        broken += [
            steps[index] for index, number in zip(here, numbers, strict=True) if np.isnan(number)
        ]
    return np.array(steps), values, means, broken


def plot_metric(axes, sheet, metric, groups, chance):
    """One metric of every group of runs; chance: where uniform use would lie, None where that means nothing. Returns its alt text."""
    stage, name, _, unit, axis, _ = metric
    told = []
    for index, (label, runs) in enumerate(groups.items()):
        steps, values, means, broken = curves(runs, stage, name)
        colour, everywhere = (
            sheet.lines[index % 6],
            np.isfinite(values).all(0),
        )  # a mean of fewer runs would jump where one ends
        values, means = (
            np.ma.masked_where(~np.broadcast_to(everywhere, rows.shape), rows)
            for rows in (values, means)
        )
        if broken:
            axes.plot(
                broken,
                [0.03] * len(broken),
                "x",
                color=colour,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
        if not values.count():
            continue
        middle = means.mean(0)  # (S,)
        there = np.pad(~np.ma.getmaskarray(middle), 1)
        known, alone = (
            np.flatnonzero(there[1:-1]),
            np.flatnonzero(there[1:-1] & ~there[:-2] & ~there[2:]),
        )  # alone: a dot, not a line
        axes.plot(steps, values.mean(0), color=colour, alpha=0.3, linewidth=0.9)
        if len(runs) > 1:
            axes.fill_between(
                steps, means.min(0), means.max(0), color=colour, alpha=0.18, linewidth=0
            )
        axes.plot(
            steps,
            middle,
            color=colour,
            linewidth=2,
            dashes=DASHES[index % 4],
            marker="o",
            markersize=5,
            markevery=alone.tolist(),
        )
        told.append(
            f"{label}: {middle[known[0]]:.3g} at step {steps[known[0]]}, {middle[known[-1]]:.3g} at step {steps[known[-1]]}"
        )
    axes.set(xlabel=f"{stage.upper()} step", ylabel=unit)
    if np.ptp(axes.dataLim.intervalx) == 0:  # one step only
        axes.set_xlim(axes.dataLim.x0 - 1, axes.dataLim.x0 + 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    if axis == "0 to 1":
        axes.set_ylim(-0.03, 1.03)
    if chance is not None:
        axes.axhline(chance, color=sheet.text, linestyle=":", linewidth=1.2)
    return f"{unit}, running mean. {'; '.join(told) or 'No number in any step'}."


def stage_seconds(runs):
    """Median seconds of each of STAGES over the GRPO steps of these runs; 0 where there are none."""
    found = []
    for stage in STAGES:
        values = curves(runs, "grpo", f"time/{stage}")[1]
        found.append(float(np.nanmedian(values)) if np.isfinite(values).any() else 0.0)
    return found


def plot_stages(axes, sheet, groups):
    told = []
    for row, (label, runs) in enumerate(groups.items()):
        begin, found = 0.0, stage_seconds(runs)
        for index, (stage, seconds) in enumerate(zip(STAGES, found, strict=True)):
            axes.barh(
                row,
                seconds,
                left=begin,
                height=0.6,
                color=sheet.lines[index],
                hatch=["", "//", "..", "xx"][index],
                label=stage if row == 0 else None,
            )
            begin += seconds
        told.append(
            f"{label}: "
            + ", ".join(
                f"{stage} {seconds:.3g}" for stage, seconds in zip(STAGES, found, strict=True)
            )
        )
    axes.set(xlabel="seconds, median over steps", ylim=(len(groups) - 0.4, -1.1))
    names = (
        [shorten(label, 10) for label in groups] if len(groups) > 1 else []
    )  # of one, the page's heading says which
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.grid(axis="y", visible=False)
    axes.legend(
        ncols=4,
        fontsize=8,
        frameon=False,
        loc="upper left",
        borderpad=0,
        handlelength=1,
        columnspacing=0.8,
        handletextpad=0.4,
    )
    return f"Seconds, median over steps. {'; '.join(told)}."


def legend_text(label, runs):
    return label if len(runs) == 1 else f"{label} ({len(runs)} runs)"


def result_table(groups):
    """result.json as HTML, before → after: mean over a label's runs and, of several, the lowest and highest. '' without any."""
    done = {
        label: [
            run.result
            for run in runs
            if run.result and run.result["after"] and "grpo" in run.records
        ]
        for label, runs in groups.items()
    }
    done = {label: results for label, results in done.items() if results}

    def cell(results, part, name):
        values = [
            result[part][name]
            for result in results
            if isinstance(result[part].get(name), (int, float))
        ]
        several = (
            f" <small>({min(values):.3f} to {max(values):.3f})</small>" if len(values) > 1 else ""
        )
        return f"{np.mean(values):.3f}{several}" if values else "–"

    order, rows = {name: index for index, name in enumerate(MEASURES)}, []
    names = {
        name: name.partition("/")
        for results in done.values()
        for result in results
        for name in result["after"]
    }
    for name, (family, _, part) in sorted(
        names.items(), key=lambda pair: (order.get(pair[1][0], 99), pair[1])
    ):
        words = MEASURES.get(family, family) + (f": {MEASURES.get(part, part)}" if part else "")
        rows.append(
            (
                words,
                *(
                    f"{cell(results, 'before', name)} → <b>{cell(results, 'after', name)}</b>"
                    for results in done.values()
                ),
            )
        )
    head = ["measure", *(legend_text(label, results) for label, results in done.items())]
    return (
        f"""<h2>Held-out questions, before → after GRPO</h2>
<p>From result.json; of several runs the mean and (lowest to highest).</p>
{table_html(head, rows)}"""
        if rows
        else ""
    )


def seconds_table(groups):
    """Wall clock of a run's stages as HTML, from result.json: mean over a label's runs. '' without any."""
    done = {
        label: [run.result["seconds"] for run in runs if run.result and "seconds" in run.result]
        for label, runs in groups.items()
    }
    done = {label: results for label, results in done.items() if results}
    rows = [
        (
            name,
            *(
                f"{np.mean([result.get(name, 0.0) for result in results]):.0f}"
                for results in done.values()
            ),
        )
        for name in {name: 0 for results in done.values() for result in results for name in result}
    ]
    of = ", mean of the runs" if any(len(results) > 1 for results in done.values()) else ""
    return f"<h2>Seconds of each stage{of}</h2>{table_html(['stage', *done], rows)}" if rows else ""


def run_report(folders, labels=None, output=None, command=""):
    """The report of `visualize.py run`. labels: one a folder, or None. Returns the path of the HTML file; PNG and SVG lie beside it."""
    folders = [str(folder) for folder in folders]
    output = Path(
        output or (Path(folders[0]) / "report.html" if len(folders) == 1 else "report.html")
    )
    if labels and len(labels) != len(folders):
        raise DataError(
            f"{len(labels)} --label for {len(folders)} directories; give none, or one a directory in their order"
        )
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise DataError("a directory is given twice")
    check_output(output)
    groups = {}
    for folder, label in zip(folders, labels or short_names(folders), strict=True):
        groups.setdefault(label, []).append(read_run(folder))
    runs = [run for members in groups.values() for run in members]
    chances = [
        run.result["after"]["evidence_chance"]
        for run in runs
        if run.result and "evidence_chance" in run.result["after"]
    ]
    chance, panels, zero, gaps = float(np.mean(chances)) if chances else None, [], [], False
    for metric in METRICS:
        steps, values, _, broken = curves(runs, *metric[:2])
        gaps = gaps or bool(broken)
        if broken or np.nan_to_num(values).any():
            own = chance if metric[4] == "evidence" else None
            panels.append(
                Panel(
                    metric[2],
                    metric[5],
                    lambda axes, sheet, metric=metric, own=own: plot_metric(
                        axes, sheet, metric, groups, own
                    ),
                    metric[4] if metric[4] != "0 to 1" else "",
                )
            )
        elif len(steps):
            zero.append(metric[2])
        if metric[1] == "time/step" and any(stage_seconds(runs)):
            panels.append(
                Panel(
                    "Time by stage",
                    "What a GRPO step spends its time on.",
                    lambda axes, sheet: plot_stages(axes, sheet, groups),
                )
            )
    if not panels:
        raise DataError(
            "metrics.jsonl has none of the metrics that this report draws, or all of them are zero"
        )
    unfinished = [run.folder for run in runs if run.result is None]
    heading = f"Training dynamics of {runs[0].folder if len(runs) == 1 else f'{len(runs)} runs'}"
    note = "Line: running mean over about √n of n steps, centred. Faint: value of each step."
    if len(groups) < len(runs):
        note += " Band: lowest to highest running mean of the runs; their mean is the line, where all of them have a value."
    note += " Dotted: use if spread evenly over the held-out questions' frames." if chances else ""
    note += " A cross at the bottom: the value is not a number." if gaps else ""
    note += f" Zero throughout, so not drawn: {', '.join(zero)}." if zero else ""
    note += f" Without result.json yet: {', '.join(unfinished)}." if unfinished else ""
    legend = [
        (legend_text(shorten(label, 40), members), index, DASHES[index % 4])
        for index, (label, members) in enumerate(groups.items())
    ]
    legend += (
        [("uniform use (chance, held-out)", None, (1, 1))]
        if chances and any(panel.shared == "evidence" for panel in panels)
        else []
    )
    parts = [
        result_table(groups),
        f"<h2>Step by step</h2><p>{escape(note)}</p>",
        panels_html(panels, legend),
        seconds_table(groups),
    ]
    trained = [
        f"# {run.folder}: {shlex.join(word for word in run.result['command'] if 'local_rank' not in word)}"  # the launcher's
        for run in runs
        if run.result and "command" in run.result
    ]
    figures = {"": draw(panels, SHEETS["light"], heading, legend, note=note)[0]}
    return write_report(output, heading, "\n".join(parts), "\n".join([command, *trained]), figures)
