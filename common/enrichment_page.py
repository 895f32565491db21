"""Do answers look where the prior points? (visualize.py enrichment; the paper's figure 9)

Reads the events that `evaluate.py --frame_use ... --priors ...` stores in NAME.predictions.jsonl:
the largest 5 % of an answer's token-slot scores.
"""

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from common import scores
from common.data import DataError
from common.pages import check_output, panels_html, table_html, write_report
from common.plots import Panel, draw_panels, line_key, ratio_interval, short_names, shorten


@dataclass
class Answer:
    """Events of one answer of L tokens about a video of several slots."""

    problem_id: str
    events: list[int]  # token * slots + slot, ascending
    tokens: int  # L
    slots: int
    consensus: list[int]  # slots with more than an even share of the prior
    correct: bool

    def enrichment(self, slots):
        """Share of the events on these slots over their share of the slots; 1 is chance."""
        return scores.event_enrichment(self.events, self.slots, slots)


@dataclass
class Events:
    """Answers of one predictions file."""

    label: str
    answers: list[Answer]  # those of which some slots are consensus slots, and some are not
    one_sided: int  # answers whose consensus slots are all or none of their slots
    without: int  # answers without events: no video of two slots, no prior, or no answer
    score: str  # of frame use: "attention, layer 1"
    repeated: int  # rows with the problem_id of an earlier one, which are left out

    def sides(self):
        """Enrichment of the consensus slots and of the other slots: (R,), (R,)."""
        consensus = []
        others = []
        for answer in self.answers:
            rest = set(range(answer.slots)) - set(answer.consensus)
            consensus.append(answer.enrichment(answer.consensus))
            others.append(answer.enrichment(rest))
        return np.array(consensus), np.array(others)

    def groups(self):
        """{name: enrichment (n,)}: both sides, and consensus slots of right and wrong answers."""
        consensus, others = self.sides()
        correct = np.array([answer.correct for answer in self.answers])
        right = consensus[correct]
        wrong = consensus[~correct]
        return {"consensus": consensus, "others": others, "if right": right, "if wrong": wrong}


def read_answer(item, path):
    """A prediction with events -> Answer. Raises DataError where they do not fit its slots."""
    use = item.frame_use
    try:
        slots = len(use["slots"])
        answer = Answer(
            item.problem_id,
            use["events"],
            use["tokens"],
            slots,
            use["consensus_slots"],
            bool(scores.score_item(item)["correct"]),
        )
        # Indices must be ascending, without repeats, and within the answer.
        for places, end in ((answer.events, answer.tokens * slots), (answer.consensus, slots)):
            if sorted(set(places)) != places or not set(places) <= set(range(end)):
                raise ValueError(f"indices are not ascending below {end}")
        if not answer.events:
            raise ValueError("no event")
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: the frame_use of {item.problem_id} is malformed ({error}); "
            "make the file again"
        ) from error
    return answer


def read_events(path, label):
    """Predictions of evaluate.py -> Events. Raises DataError where none can be counted."""
    items, repeated, _ = scores.read_predictions(path)
    answers = [read_answer(item, path) for item in items if "events" in (item.frame_use or {})]
    if not answers:
        raise DataError(
            f"{path} has no events; evaluate.py --frame_use attention --priors FILE "
            "stores them in NAME.predictions.jsonl"
        )
    # Enrichment is a ratio of shares: it needs slots of both kinds.
    counted = [answer for answer in answers if 0 < len(answer.consensus) < answer.slots]
    one_sided = len(answers) - len(counted)
    if not counted:
        raise DataError(
            f"{path} has no answer that counts: "
            f"the consensus slots of {one_sided} are all or none of their slots"
        )
    # A report has its settings once, prediction lines have them in every row.
    rows, settings = scores.read_json(path)
    settings = settings or rows[0].get("settings") or {}
    score = "unknown"
    if settings.get("frame_use"):
        score = f"{settings['frame_use']}, layer {settings.get('frame_use_layer')}"
    return Events(label, counted, one_sided, len(items) - len(answers), score, len(repeated))


def by_position(answers, parts):
    """Count events in equal parts of the answers; a token is where its middle lies.

    Returns:
        (R, parts) events on consensus slots, (R, parts) events, (R, parts) events that chance
        would put on consensus slots.
    """
    hits = np.zeros((len(answers), parts))
    events = np.zeros((len(answers), parts))
    chance = np.zeros((len(answers), parts))
    for row, answer in enumerate(answers):
        tokens, slots = np.divmod(answer.events, answer.slots)
        # The middle of token i lies at (2 i + 1) / (2 L).
        part = parts * (2 * tokens + 1) // (2 * answer.tokens)
        events[row] = np.bincount(part, minlength=parts)
        hits[row] = np.bincount(part, np.isin(slots, answer.consensus), parts)
        chance[row] = events[row] * len(answer.consensus) / answer.slots
    return hits, events, chance


def mean_interval(values):
    """(n,) -> mean and ends of its 95 % bootstrap interval; NaN where n is too small."""
    if len(values) == 0:
        return math.nan, math.nan, math.nan
    if len(values) == 1:
        return float(values[0]), math.nan, math.nan
    return float(np.mean(values)), *scores.paired_bootstrap(values, samples=2000)


def mean_text(values, sign=""):
    """(n,) -> "1.396 (1.330 to 1.461), n = 300"."""
    if len(values) == 0:
        return "–"
    mean, low, high = mean_interval(values)
    # One value has no interval.
    interval = f" ({low:{sign}.3f} to {high:{sign}.3f})" if len(values) > 1 else ""
    return f"{mean:{sign}.3f}{interval}, n = {len(values)}"


def plot_sides(axes, files):
    """Draw the mean enrichment of both kinds of slots, with intervals, one line a file."""
    words = []
    for row, file in enumerate(files):
        colour = line_key("", row).colour
        # Consensus slots as a full dot, the others below as an open square.
        consensus, others = file.sides()
        for values, place, marker, face in (
            (consensus, row - 0.16, "o", colour),
            (others, row + 0.16, "s", "white"),
        ):
            mean, low, high = mean_interval(values)
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot(mean, place, marker, color=colour, markerfacecolor=face, markersize=8)
            white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axes.text(mean, place - 0.12, f"{mean:.2f}", fontsize=9, ha="center", bbox=white)
        words.append(
            f"{file.label}: consensus slots {mean_text(consensus)}; others {mean_text(others)}"
        )
    axes.axvline(1, 0, 0.85, color="black", linestyle="dotted", linewidth=1.2)
    # Room for the legend above the first line.
    axes.plot([], [], "o", color="black", label="consensus slots")
    axes.plot([], [], "s", color="black", markerfacecolor="white", label="other slots")
    axes.legend(ncols=2, fontsize=9, frameon=False, loc="upper left", columnspacing=1)
    axes.set(xlabel="event enrichment, mean", ylim=(len(files) - 0.4, -1.0))
    axes.margins(x=0.12)
    # The first file stands on top.
    names = [f"{shorten(file.label, 10)}\nn = {len(file.answers)}" for file in files]
    axes.set_yticks(range(len(files)), names, fontsize=9)
    axes.grid(axis="y", visible=False)
    return f"Mean event enrichment with 95 % intervals. {'. '.join(words)}."


def plot_positions(axes, files, parts, what):
    """Draw along the answers: "enrichment" of the consensus slots, or "share of events"."""
    words = []
    middles = (np.arange(parts) + 0.5) / parts * 100
    for row, file in enumerate(files):
        key = line_key("", row)
        hits, events, chance = by_position(file.answers, parts)
        # Pooled over answers: a part of one answer has few events.
        if what == "enrichment":
            values, low, high = ratio_interval(hits, chance)
            axes.fill_between(middles, low, high, color=key.colour, alpha=0.18, linewidth=0)
        else:
            values = (events / events.sum(1, keepdims=True)).mean(0)  # (parts,)
        axes.plot(middles, values, "o", color=key.colour, linestyle=key.style, lw=2, markersize=4)
        words.append(
            f"{file.label}: {values[0]:.3g} in the first part, {values[-1]:.3g} in the last"
        )
    # What chance would give.
    level = 1 if what == "enrichment" else 1 / parts
    axes.axhline(level, color="black", linestyle="dotted", linewidth=1.2)
    axes.set(xlabel="position in the answer, %", ylabel=what, xlim=(0, 100))
    return f"In {parts} equal parts of the answers. {'; '.join(words)}."


def changes(first, file):
    """Change of the consensus slots' enrichment on the questions of both files -> (n,)."""
    # Paired by problem_id.
    before = {}
    for answer, value in zip(first.answers, first.sides()[0], strict=True):
        before[answer.problem_id] = value
    differences = []
    for answer, value in zip(file.answers, file.sides()[0], strict=True):
        if answer.problem_id in before:
            differences.append(value - before[answer.problem_id])
    return np.array(differences)


def enrichment_table(files):
    """Everything in numbers, one column a file, as HTML."""
    columns = []
    for file in files:
        groups = file.groups()
        column = {
            "frame use by": escape(file.score),
            "answers counted": len(file.answers),
            "not counted: all or no slots are consensus slots": file.one_sided,
            "without events: no video of two slots, no prior, or no answer": file.without,
            "enrichment of the consensus slots": f"<b>{mean_text(groups['consensus'])}</b>",
            "… of the other slots": mean_text(groups["others"]),
            "… of the consensus slots, right answers": mean_text(groups["if right"]),
            "… of the consensus slots, wrong answers": mean_text(groups["if wrong"]),
        }
        # Levels of different scores of frame use cannot be compared.
        change = "–"
        if file is not files[0] and file.score == files[0].score:
            change = mean_text(changes(files[0], file), "+")
        if len(files) > 1:
            name = f"consensus slots, change from {files[0].label} on the same questions"
            column[name] = change
        columns.append(column)
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return table_html(["measure", *(file.label for file in files)], rows)


def enrichment_note(files):
    """What the figure shows, and what was left out of it."""
    used = sorted({file.score for file in files})
    note = (
        "Each token of an answer has a score for each temporal slot of the video; the largest 5 % "
        "of an answer's scores are its events. Consensus slots have more of the prior than an even "
        "share. Event enrichment of some slots: their share of the events over their share of the "
        f"slots; 1 (dotted) is chance. Frame use by {' or '.join(used)}."
    )
    # What is left out is counted and named.
    one_sided = sum(file.one_sided for file in files)
    if one_sided:
        note += f" Not counted, since all or no slots are consensus slots: {one_sided} answers."
    repeated = sum(file.repeated for file in files)
    if repeated:
        note += f" Left out, since an earlier row has their problem_id: {repeated}."
    if len(used) > 1:
        note += " The scores of frame use differ: do not compare levels."
    return note


def enrichment_report(predictions, labels=None, output="enrichment.html", command=""):
    """Write the report of predictions files.

    Args:
        predictions: paths. labels: one a file, or None for the files' names.
        output: the page. command: shown at its end.
    Returns:
        Path of the page.
    """
    if labels and len(labels) != len(predictions):
        raise DataError(
            f"{len(labels)} labels for {len(predictions)} prediction files; "
            "give none, or one a file in their order"
        )
    # NAME.predictions.jsonl is called NAME.
    if not labels:
        paths = [str(Path(path).absolute()) for path in predictions]
        labels = short_names([path.removesuffix(".predictions.jsonl") for path in paths])
    if len(set(labels)) < len(labels):
        raise DataError("a file or a label is given twice")
    check_output(output)
    files = [read_events(path, label) for path, label in zip(predictions, labels, strict=True)]
    # At most ten parts, and no more than a usual answer has tokens.
    lengths = [int(np.median([answer.tokens for answer in file.answers])) for file in files]
    parts = max(1, min(10, *lengths))
    panels = [
        Panel(
            "Where the events lie",
            "Mean over answers, 95 % bootstrap interval. "
            "The paper: 1.48 on consensus frames, 0.94 on others.",
            lambda axes: plot_sides(axes, files),
        ),
        Panel(
            "Consensus slots, by position",
            "Events in each part of the answers, pooled; band: 95 % bootstrap over answers.",
            lambda axes: plot_positions(axes, files, parts, "enrichment"),
        ),
        Panel(
            "Where in the answer",
            f"Share of an answer's events in each of {parts} parts, mean over answers; "
            "dotted: evenly spread.",
            lambda axes: plot_positions(axes, files, parts, "share of events"),
        ),
    ]
    heading = f"Event enrichment of {labels[0]}"
    if len(files) > 1:
        heading = f"Event enrichment of {len(files)} prediction files"
    keys = [line_key(shorten(label, 40), index) for index, label in enumerate(labels)]
    note = enrichment_note(files)
    figure = draw_panels(panels, heading, keys, note)
    body = [f"<p>{escape(note)}</p>", panels_html(panels, keys)]
    body += ["<h2>Numbers</h2>", enrichment_table(files)]
    return write_report(output, heading, "\n".join(body), command, {"": figure})
