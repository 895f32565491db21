"""Figures of files that other stages have written: the events of answers (visualize.py enrichment) and priors (visualize.py prior).

What is drawn is computed by pure functions over what read_events and summarise_priors keep of a file.
"""

import json
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.patches import Rectangle
from tqdm import tqdm

from common import scores
from common.data import DataError, MediaError, resolve_media
from common.media import decode_frames
from common.pages import check_output, panels_html, table_html, write_report
from common.plots import (
    CUES,
    DASHES,
    HEIGHT,
    SHEETS,
    Panel,
    data_url,
    draw,
    jpeg,
    short_names,
    shorten,
    thumbnail,
)
from prior import read_priors

# --------------------------------------------------------------------------------------------------------------- enrichment


@dataclass
class Events:
    """The answers of a predictions file whose consensus slots are some of their slots, and how many others it has."""

    label: str
    answers: list  # of dicts: problem_id, events (E,) flat indices token * slots + slot, tokens, slots, consensus (positions), correct
    one_sided: int  # answers whose consensus slots are all or none of their slots
    without: int  # answers without events: no video of two slots, no prior, or no answer
    score: str  # of frame use: "attention, layer 1"
    repeated: int = 0  # rows that repeat a problem_id, of which the first counts


def events_fault(use):
    """What is wrong with a prediction's frame_use (evaluate.use_row), in words; '' for a good one."""
    slots, events, tokens, chosen = (
        use.get(name) for name in ("slots", "events", "tokens", "consensus_slots")
    )
    if (
        not isinstance(slots, list)
        or not slots
        or not all(type(share) in (int, float) and math.isfinite(share) for share in slots)
    ):
        return "slots that are not finite numbers"
    if type(tokens) is not int or tokens < 1:
        return "tokens that are no number above 0"
    for name, places, end in (
        ("events", events, tokens * len(slots)),
        ("consensus_slots", chosen, len(slots)),
    ):
        good = isinstance(places, list) and all(
            type(place) is int and 0 <= place < end for place in places
        )
        if not good or any(a >= b for a, b in zip(places, places[1:], strict=False)):
            return f"{name} that are not ascending indices below {end}"
    return "" if events else "no event"


def read_events(path, label):
    """Predictions of evaluate.py -> Events. DataError where it has none to count."""
    (items, repeated, _), answers, one_sided = scores.read_predictions(path), [], 0
    for item in items:
        use = item.frame_use if isinstance(item.frame_use, dict) else {}
        if "events" not in use:
            continue
        fault = events_fault(use)
        if fault:
            raise DataError(
                f"{path}: the frame_use of {item.problem_id} has {fault}; make the file again"
            )
        one_sided += not 0 < len(use["consensus_slots"]) < len(use["slots"])
        answers.append(
            {
                "problem_id": item.problem_id,
                "events": use["events"],
                "tokens": use["tokens"],
                "slots": len(use["slots"]),
                "consensus": use["consensus_slots"],
                "correct": scores.score_item(item)["correct"],
            }
        )
    counted = [answer for answer in answers if 0 < len(answer["consensus"]) < answer["slots"]]
    if not answers:
        raise DataError(
            f"{path} has no events; evaluate.py --frame_use attention --priors FILE stores them in NAME.predictions.jsonl"
        )
    if not counted:
        raise DataError(
            f"{path} has no answer that counts: the consensus slots of {one_sided} are all or none of their slots"
        )
    rows, settings = scores.read_json(path)
    settings = settings or rows[0].get("settings") or {}
    score = (
        f"{settings['frame_use']}, layer {settings.get('frame_use_layer')}"
        if settings.get("frame_use")
        else "not told"
    )
    return Events(label, counted, one_sided, len(items) - len(answers), score, len(repeated))


def sides(answers):
    """-> event enrichment (R,) of the consensus slots, and of the other slots."""
    others = [
        [slot for slot in range(answer["slots"]) if slot not in answer["consensus"]]
        for answer in answers
    ]
    return (
        np.array(
            [
                scores.event_enrichment(answer["events"], answer["slots"], answer["consensus"])
                for answer in answers
            ]
        ),
        np.array(
            [
                scores.event_enrichment(answer["events"], answer["slots"], rest)
                for answer, rest in zip(answers, others, strict=True)
            ]
        ),
    )


def by_position(answers, parts):
    """Answers cut in equal parts -> (R, parts) each: events on consensus slots, events, events that chance would have on consensus slots.

    A token belongs to the part in which its middle lies.
    """
    hits, events, share = (
        np.zeros((len(answers), parts)),
        np.zeros((len(answers), parts)),
        np.zeros((len(answers), 1)),
    )
    for row, answer in enumerate(answers):
        tokens, slots = np.divmod(answer["events"], answer["slots"])
        part = parts * (2 * tokens + 1) // (2 * answer["tokens"])
        events[row] = np.bincount(part, minlength=parts)
        hits[row] = np.bincount(part, np.isin(slots, answer["consensus"]), parts)
        share[row] = len(answer["consensus"]) / answer["slots"]
    return hits, events, events * share


def pooled(hits, chance, samples=1000, seed=0):
    """(R, parts) each -> sum of hits over sum of chance, and the ends of its 95 % interval over resampled rows: (parts,) each.

    NaN where chance has nothing; no interval of a single row.
    """
    rng, count, ratios = (
        np.random.default_rng(seed),
        len(hits),
        np.full((1 + samples, hits.shape[1]), np.nan),
    )
    for sample, ratio in enumerate(ratios):
        times = (
            np.bincount(rng.integers(count, size=count), minlength=count)
            if sample
            else np.ones(count)
        )
        np.divide(times @ hits, times @ chance, out=ratio, where=times @ chance > 0)
    ends, known = np.full((2, hits.shape[1]), np.nan), chance.sum(0) > 0
    if count > 1:
        ends[:, known] = np.nanquantile(ratios[1:, known], [0.025, 0.975], axis=0)
    return ratios[0], *ends


def mean_interval(values):
    """(n,) -> mean and the ends of its 95 % bootstrap interval; NaN where n is too small for one."""
    ends = (
        scores.paired_bootstrap(values, samples=2000) if len(values) > 1 else (math.nan, math.nan)
    )
    return (float(np.mean(values)), *ends) if len(values) else (math.nan, *ends)


def told(values, sign=""):
    """(n,) -> "1.396 (1.330 to 1.461), n = 300"."""
    mean, low, high = mean_interval(values)
    interval = f" ({low:{sign}.3f} to {high:{sign}.3f})" if len(values) > 1 else ""
    return f"{mean:{sign}.3f}{interval}, n = {len(values)}" if len(values) else "–"


def plot_sides(axes, sheet, files):
    words = []
    for row, file in enumerate(files):
        for values, place, face, marker in zip(
            sides(file.answers),
            (-0.16, 0.16),
            (sheet.lines[row % 6], sheet.back),
            "os",
            strict=True,
        ):
            mean, low, high = mean_interval(values)
            axes.plot([low, high], [row + place] * 2, color=sheet.lines[row % 6], linewidth=2)
            axes.plot(
                mean,
                row + place,
                marker,
                color=sheet.lines[row % 6],
                markerfacecolor=face,
                markersize=8,
                markeredgewidth=1.6,
            )
            axes.annotate(
                f"{mean:.2f}",
                (mean, row + place),
                (0, 6 if place < 0 else -6),
                textcoords="offset points",
                fontsize=9,
                ha="center",
                va="bottom" if place < 0 else "top",
            )
        words.append(
            f"{file.label}: consensus slots {told(sides(file.answers)[0])}; others {told(sides(file.answers)[1])}"
        )
    axes.plot(
        [1, 1], [-0.5, len(files) - 0.4], color=sheet.text, linestyle=":", linewidth=1.2
    )  # below the legend
    for name, marker, face in (
        ("consensus slots", "o", sheet.text),
        ("other slots", "s", sheet.back),
    ):
        axes.plot([], [], marker, color=sheet.text, markerfacecolor=face, label=name)
    axes.legend(
        ncols=2,
        fontsize=9,
        frameon=False,
        loc="upper left",
        borderpad=0,
        handletextpad=0.1,
        columnspacing=1,
    )
    axes.set(
        xlabel="event enrichment, mean", ylim=(len(files) - 0.4, -1.0), yticks=range(len(files))
    )
    axes.margins(x=0.12)
    axes.set_yticklabels(
        [f"{shorten(file.label, 10)}\nn = {len(file.answers)}" for file in files], fontsize=9
    )
    axes.grid(axis="y", visible=False)
    return f"Mean event enrichment with 95 % intervals. {'. '.join(words)}."


def part_ends(values):
    return f"{values[0]:.3g} in the first part, {values[-1]:.3g} in the last"


def plot_positions(axes, sheet, files, parts, what):
    """what: "enrichment" of the consensus slots in each part of the answers, or "share" of the events in it."""
    words, middles = [], (np.arange(parts) + 0.5) / parts * 100
    for row, file in enumerate(files):
        hits, events, chance = by_position(file.answers, parts)
        colour, style = (
            sheet.lines[row % 6],
            {"dashes": DASHES[row % 4], "linewidth": 2, "marker": "o", "markersize": 3.5},
        )
        if what == "enrichment":
            values, low, high = pooled(hits, chance)
            axes.fill_between(middles, low, high, color=colour, alpha=0.18, linewidth=0)
        else:
            values = (events / events.sum(1, keepdims=True)).mean(0)
        axes.plot(middles, values, color=colour, **style)
        words.append(f"{file.label}: {part_ends(values)}")
    axes.axhline(
        1 if what == "enrichment" else 1 / parts, color=sheet.text, linestyle=":", linewidth=1.2
    )
    axes.set(
        xlabel="position in the answer, %",
        ylabel="enrichment" if what == "enrichment" else "share of events",
        xlim=(0, 100),
    )
    if what == "share":
        axes.set_ylim(bottom=0)
    return f"In {parts} equal parts of the answers. {'; '.join(words)}."


def groups_of(file):
    """-> {name: event enrichment (n,)}: of both sides, and of the consensus slots in right and in wrong answers."""
    consensus, others = sides(file.answers)
    correct = np.array([answer["correct"] for answer in file.answers])
    return {
        "consensus": consensus,
        "others": others,
        "if right": consensus[correct],
        "if wrong": consensus[~correct],
    }


def plot_violins(axes, sheet, file, row):
    groups, words = groups_of(file), []
    for place, (name, values) in enumerate(groups.items()):
        if 0 < len(values) < 30:  # too few for a density
            axes.plot(
                place + np.linspace(-0.25, 0.25, len(values)),
                values,
                "o",
                color=sheet.lines[row % 6],
                markersize=4,
            )
        elif len(values):
            body = axes.violinplot(values, [place], widths=0.85, showextrema=False)["bodies"][0]
            body.set(
                facecolor=sheet.lines[row % 6],
                edgecolor=sheet.text,
                alpha=0.55,
                hatch=["", "//", "..", "xx"][place],
            )
        if len(values):
            axes.plot(
                [place - 0.3, place + 0.3],
                [np.median(values)] * 2,
                color=sheet.text,
                linewidth=2.5,
                solid_capstyle="butt",
            )
        words.append(
            f"{name} {np.median(values):.3g} (n = {len(values)})"
            if len(values)
            else f"{name}: none"
        )
    axes.axhline(1, color=sheet.text, linestyle=":", linewidth=1.2)
    axes.set(ylabel="enrichment", xticks=range(len(groups)), xlim=(-0.6, len(groups) - 0.4))
    axes.set_xticklabels([f"{name}\n{len(values)}" for name, values in groups.items()], fontsize=10)
    axes.grid(axis="x", visible=False)
    return f"Median event enrichment over answers: {', '.join(words)}."


def changes(first, file):
    """Enrichment of the consensus slots in `file` minus that in `first`, of the questions that both count -> (n,)."""
    before = dict(
        zip(
            [answer["problem_id"] for answer in first.answers], sides(first.answers)[0], strict=True
        )
    )
    after = zip(
        [answer["problem_id"] for answer in file.answers], sides(file.answers)[0], strict=True
    )
    return np.array([value - before[name] for name, value in after if name in before])


def enrichment_table(files):
    names = [
        "frame use by",
        "answers counted",
        "not counted: all or no slots are consensus slots",
        "without events: no video of two slots, no prior, or no answer",
        "tokens of an answer, median",
        "consensus slots' share of the slots, mean",
        "enrichment of the consensus slots",
        "… of the other slots",
        "… of the consensus slots, right answers",
        "… of the consensus slots, wrong answers",
        "… of the consensus slots, median",
    ]
    columns = []
    for file in files:
        groups, shares = (
            groups_of(file),
            [len(answer["consensus"]) / answer["slots"] for answer in file.answers],
        )
        columns.append(
            [
                escape(file.score),
                len(file.answers),
                file.one_sided,
                file.without,
                f"{np.median([answer['tokens'] for answer in file.answers]):g}",
                f"{np.mean(shares):.3f}",
                f"<b>{told(groups['consensus'])}</b>",
                *(told(groups[name]) for name in ("others", "if right", "if wrong")),
                f"{np.median(groups['consensus']):.3f}",
            ]
        )
    if len(files) > 1:
        names.append(f"consensus slots, change from {files[0].label} on the same questions")
        for file, column in zip(files, columns, strict=True):
            comparable = file is not files[0] and file.score == files[0].score
            column.append(told(changes(files[0], file), "+") if comparable else "–")
    return table_html(
        ["measure", *(file.label for file in files)], list(zip(names, *columns, strict=True))
    )


def run_enrichment(predictions, labels=None, output="enrichment.html", command=""):
    """The report of `visualize.py enrichment`. labels: one a file, or None. Returns the path of the HTML file."""
    if labels and len(labels) != len(predictions):
        raise DataError(
            f"{len(labels)} labels for {len(predictions)} prediction files; give none, or one a file in their order"
        )
    labels = labels or short_names(
        [
            str(Path(path).absolute()).removesuffix(".jsonl").removesuffix(".predictions")
            for path in predictions
        ]
    )
    if len(set(labels)) < len(labels):
        raise DataError("a file or a label is given twice")
    check_output(output)
    files = [read_events(path, label) for path, label in zip(predictions, labels, strict=True)]
    parts = max(
        1,
        min(10, *(int(np.median([answer["tokens"] for answer in file.answers])) for file in files)),
    )
    panels = [
        Panel(
            "Where the events lie",
            "Mean over answers, 95 % bootstrap interval. The paper: 1.48 on consensus frames, 0.94 on others.",
            lambda axes, sheet: plot_sides(axes, sheet, files),
            height=max(HEIGHT, 1.6 + 0.6 * len(files)),
        ),
        Panel(
            "Consensus slots, by position",
            "Events in each part of the answers, pooled; band: 95 % bootstrap over answers.",
            lambda axes, sheet: plot_positions(axes, sheet, files, parts, "enrichment"),
        ),
        Panel(
            "Where in the answer",
            f"Share of an answer's events in each of {parts} parts, mean over answers; dotted: evenly spread.",
            lambda axes, sheet: plot_positions(axes, sheet, files, parts, "share"),
        ),
        *(
            Panel(
                f"Answers of {shorten(file.label, 16)}",
                f"{file.label}: enrichment of the consensus slots, of the others, and of the "
                "consensus slots if the answer is right, or wrong; below, how many. Bar: median; few answers are dots.",
                lambda axes, sheet, file=file, row=row: plot_violins(axes, sheet, file, row),
                "violins",
            )
            for row, file in enumerate(files)
        ),
    ]
    heading = (
        f"Event enrichment of {labels[0] if len(files) == 1 else f'{len(files)} prediction files'}"
    )
    left, alone = (
        sum(file.one_sided for file in files),
        [file.label for file in files if len(file.answers) == 1],
    )
    note = (
        "Each token of an answer has a score for each temporal slot of the video; the largest 5 % of an answer's scores are its "
        "events. Consensus slots have more of the prior than an even share. Event enrichment of some slots: their share of the events "
        f"over their share of the slots; 1 (dotted) is chance. Frame use by {' or '.join(sorted({file.score for file in files}))}."
    )
    note += (
        f" Not counted, since all or no slots are consensus slots: {left} answers." if left else ""
    )
    for file in files[1:]:
        if file.score == files[0].score and len(found := changes(files[0], file)):
            note += f" From {files[0].label} to {file.label} on the same questions, consensus slots: {told(found, '+')}."
    again = sum(file.repeated for file in files)
    note += f" Left out, since an earlier row has their problem_id: {again}." if again else ""
    note += (
        " The scores of frame use differ (see the table): compare no levels."
        if len({file.score for file in files}) > 1
        else ""
    )
    note += f" One answer only, n = 1, so no interval: {', '.join(alone)}." if alone else ""
    legend = [(shorten(label, 40), index, DASHES[index % 4]) for index, label in enumerate(labels)]
    body = f"<p>{escape(note)}</p>\n{panels_html(panels, legend)}\n<h2>Numbers</h2>\n{enrichment_table(files)}"
    return write_report(
        output,
        heading,
        body,
        command,
        {"": draw(panels, SHEETS["light"], heading, legend, note=note)[0]},
    )


# -------------------------------------------------------------------------------------------------------------------- prior


@dataclass
class Priors:
    """What the rows of a priors file say about the videos' distributions P; rows of one frame (images) are counted apart."""

    images: int
    mass: dict  # K -> [rows of K frames, sum of their P (K,)]
    effective: list  # exp(entropy of P) / K of each row: 1 is uniform
    shares: list  # (mass on the scene set, on the semantic set, on neither) of each row that has both sets
    overlaps: list  # (frames in both sets, K, size of the scene set, of the semantic set) of each row where neither is empty
    correlations: list  # Spearman's rank correlation of the two scores of each row that has both and in which neither is constant
    settings: dict  # name -> Counter of its values, as text
    chosen: list  # rows drawn at random, for the sheet

    @property
    def rows(self):
        return len(self.effective)

    @property
    def usual_frames(self):
        return max(self.mass, key=lambda count: self.mass[count][0])


def effective_share(prior):
    """P (K,) -> exp(entropy) / K: the share of the frames that a uniform distribution of this entropy would have."""
    prior = np.asarray(prior)
    return float(
        np.exp(-np.sum(prior * np.log(prior, where=prior > 0, out=np.zeros(len(prior)))))
        / len(prior)
    )


def set_shares(row):
    """-> P's mass on the scene set, on the semantic set (a frame in both counts in both), and on the frames of neither."""
    scene, semantic, prior = set(row["scene"]), set(row["semantic"]), row["prior"]
    neither = [place for place in range(len(prior)) if place not in scene | semantic]
    return tuple(sum(prior[place] for place in places) for places in (scene, semantic, neither))


def rank_correlation(first, second):
    """Spearman's: correlation of the ranks, equals sharing their mean rank; None where either is constant.

    >>> rank_correlation([1, 2, 3, 9], [5, 6, 6, 8]), rank_correlation([1, 1], [1, 2])
    (0.9486832980505139, None)
    """
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    ranks = [
        np.searchsorted(np.sort(values), values) + np.searchsorted(np.sort(values), values, "right")
        for values in (first, second)
    ]
    return float(np.corrcoef(*ranks)[0, 1])


def chance_overlaps(sizes):
    """(K, size of one set, size of another) of each row -> {frames in both: share of rows} if the sets did not know of each other
    (hypergeometric)."""
    shares = Counter()
    for (frames, one, other), rows in Counter(sizes).items():
        for both in range(max(0, one + other - frames), min(one, other) + 1):
            shares[both] += (
                rows
                / len(sizes)
                * math.comb(one, both)
                * math.comb(frames - one, other - both)
                / math.comb(frames, other)
            )
    return shares


def overlap_ratio(overlaps):
    """Priors.overlaps -> frames in both sets over those expected by chance, |scene| |semantic| / K, summed over rows; ends of its 95 %
    bootstrap interval."""
    both, frames, scene, semantic = np.array(overlaps, float).T  # (R,) each
    return tuple(
        float(values[0]) for values in pooled(both[:, None], (scene * semantic / frames)[:, None])
    )


def binned_mass(mass, bins):
    """Priors.mass -> (bins,) mean P over equal parts of the sampled frames; a frame that lies in two parts is divided between them."""
    total, ends = np.zeros(bins), np.linspace(0, 1, bins + 1)
    for frames, (_, prior) in mass.items():
        total += np.diff(np.interp(ends, np.linspace(0, 1, frames + 1), [0, *np.cumsum(prior)]))
    return total / sum(rows for rows, _ in mass.values())


def cues_fault(row):
    """What is wrong with the cues of a row that read_priors has passed, in words; '' for a good one. Cues may be missing."""
    count = len(row["prior"])
    for name in ("scene", "semantic"):
        places = row.get(name, [])
        if not isinstance(places, list) or not all(
            type(place) is int and 0 <= place < count for place in places
        ):
            return f"has a {name} set that is not positions among its {count} frames"
        values = row.get(f"{name}_scores", [])
        good = isinstance(values, list) and all(
            type(value) in (int, float) and math.isfinite(value) for value in values
        )
        if not good or len(values) not in (0, count):
            return f"has {name}_scores that are not {count} finite numbers"
    return ""


def summarise_priors(path, items, seed=0):
    """A priors file -> Priors, by one pass that keeps `items` rows, drawn at random."""
    told, rng = Priors(0, {}, [], [], [], [], {}, []), random.Random(seed)
    for row in tqdm(read_priors(path), desc="read", unit="row", delay=2):
        fault = cues_fault(row)
        if fault:
            raise DataError(
                f"priors file {path}: the row of {row['problem_id']} {fault}; build it again"
            )
        count, sets = (
            len(row["prior"]),
            {name for name in ("scene", "semantic") if row.get(name) or row.get(f"{name}_scores")},
        )
        for name, value in row.get("settings", {}).items():
            told.settings.setdefault(name, Counter())[
                value if isinstance(value, str) else json.dumps(value)
            ] += 1
        if count == 1:
            told.images += 1
            continue
        told.mass.setdefault(count, [0, np.zeros(count)])
        told.mass[count][0] += 1
        told.mass[count][1] += row["prior"]
        told.effective.append(effective_share(row["prior"]))
        told.shares += [set_shares(row)] if len(sets) == 2 else []
        if row.get("scene") and row.get("semantic"):
            scene, semantic = set(row["scene"]), set(row["semantic"])
            told.overlaps.append((len(scene & semantic), count, len(scene), len(semantic)))
        correlation = rank_correlation(row.get("scene_scores", []), row.get("semantic_scores", []))
        told.correlations += [] if correlation is None else [correlation]
        if len(told.chosen) < items:
            told.chosen.append(row)
        elif (
            place := rng.randrange(told.rows)
        ) < items:  # so that every row is as likely to be there at the end
            told.chosen[place] = row
    if not told.rows:
        raise DataError(
            f"priors file {path} "
            + (
                f"has no row of a video, only {told.images} of images"
                if told.images
                else "is empty"
            )
        )
    return told


def plot_mass(axes, sheet, told, bins):
    values = binned_mass(told.mass, bins)
    axes.bar((np.arange(bins) + 0.5) / bins * 100, values, 0.86 / bins * 100, color=sheet.lines[0])
    axes.axhline(1 / bins, color=sheet.text, linestyle=":", linewidth=1.2)
    axes.set(xlabel="position in the video, %", ylabel="mean of P", xlim=(0, 100))
    axes.grid(axis="x", visible=False)
    return f"Mean P in {bins} parts: {', '.join(f'{value:.3f}' for value in values)}; uniform {1 / bins:.3f}."


def plot_histogram(axes, sheet, named, low, high, xlabel):
    """named: {name: values in [low, high]}, as outlines in the sheet's colours and dashes, their medians as lines of the same dashes."""
    edges, words = np.linspace(low, high, 21), []
    for index, (name, values) in enumerate(named.items()):
        colour = sheet.text if name == "neither" else sheet.lines[CUES.get(name, 0)]
        shares = np.histogram(np.clip(values, low, high), edges)[0] / len(
            values
        )  # rounding: 1.0000001 is 1
        axes.stairs(
            np.where(shares > 0, shares, np.nan),
            edges,
            baseline=0,
            label=name,
            color=colour,
            linewidth=2,
            linestyle=(0, DASHES[index]) if index else "-",
        )
        if index == 0:
            axes.stairs(shares, edges, color=colour, fill=True, alpha=0.25)
        if len(named) == 1:
            axes.axvline(np.median(values), color=sheet.text, linewidth=1.5)
        words.append(
            f"{name}: mean {np.mean(values):.3f}, median {np.median(values):.3f}, n = {len(values)}"
        )
    if len(named) > 1:
        axes.legend(
            fontsize=9,
            frameon=False,
            loc="upper left",
            borderpad=0,
            handlelength=1.8,
            ncols=3,
            columnspacing=1,
            handletextpad=0.5,
        )
    axes.set(xlabel=xlabel, ylabel="share of rows", xlim=(low, high))
    axes.set_ylim(0, axes.dataLim.y1 * (1.2 if len(named) > 1 else 1.05))
    return f"{'; '.join(words)}."


def plot_overlap(axes, sheet, overlaps):
    found, chance = (
        Counter(both for both, *_ in overlaps),
        chance_overlaps([overlap[1:] for overlap in overlaps]),
    )
    counts = range(max(*found, *(both for both, share in chance.items() if share > 0.001)) + 1)
    shares = [found[both] / len(overlaps) for both in counts]
    axes.bar(counts, shares, 0.7, color=sheet.lines[0], label="rows")
    expected = [chance[both] for both in counts]
    axes.plot(
        counts,
        expected,
        "D",
        color=sheet.lines[1],
        markeredgecolor=sheet.back,
        markersize=8,
        label="chance",
    )
    axes.legend(fontsize=9, frameon=False, loc="upper right", borderpad=0)
    axes.set(xlabel="frames that both cues name", ylabel="share of rows", xticks=counts)
    axes.grid(axis="x", visible=False)
    words = ", ".join(
        f"{both}: {share:.3f} ({due:.3f})"
        for both, share, due in zip(counts, shares, expected, strict=True)
    )
    return f"Share of rows by frames in both sets (by chance): {words}. n = {len(overlaps)}."


STRIP, THUMBNAIL = (
    16,
    160,
)  # frames in a line of the sheet's figure, pixels of a frame's longer side


def read_strip(row, media_root):
    """-> the row's frames as small pictures, K of (h, w, 3) uint8. DataError with the cause when the medium is not there or another one."""
    if not row.get("media"):
        raise MediaError(f"the row of {row['problem_id']} names no medium")
    path = resolve_media(row["media"], media_root, f"the row of {row['problem_id']}")
    frames, times = decode_frames(path, row["frames"])
    if not np.allclose(times, row["times"], atol=0.02):
        raise MediaError(f"{path}: its frames were taken at other times than the row's")
    return [thumbnail(frame, THUMBNAIL) for frame in frames]


def marks(row, place):
    """The cues that name this frame of a row."""
    return [name for name in ("scene", "semantic") if place in row.get(name, [])]


def plot_strip(axes, sheet, row, pictures, start, high, largest):
    """Frames start to start + 15 of a row above bars of its P; high: of a picture, in bars of `largest`."""
    for x, place in enumerate(range(start, min(start + STRIP, len(pictures)))):
        axes.imshow(
            pictures[place], extent=(x - 0.43, x + 0.43, 1.45, 1.45 + high), aspect="auto", zorder=2
        )
        axes.bar(x, row["prior"][place] / largest, 0.86, color=sheet.lines[CUES["prior"]])
        for name in marks(row, place):
            by = 0.47 if name == "scene" else 0.43
            axes.add_patch(
                Rectangle(
                    (x - by, 1.45 - (by - 0.43)),
                    2 * by,
                    high + 2 * (by - 0.43),
                    fill=False,
                    zorder=3,
                    linewidth=2,
                    edgecolor=sheet.lines[CUES[name]],
                    linestyle=(0, DASHES[1]) if name == "scene" else "-",
                )
            )
        if marks(row, place):
            axes.text(
                x,
                row["prior"][place] / largest + 0.02,
                f"{row['prior'][place]:.2f}",
                fontsize=9,
                ha="center",
                va="bottom",
            )
    times = row["times"][start : start + STRIP]
    axes.set(
        xlim=(-0.5, STRIP - 0.5),
        ylim=(0, 1.55 + high),
        xticks=range(len(times)),
        yticks=[],
        ylabel="P",
    )
    axes.set_xticklabels([f"{time:.1f} s" for time in times], fontsize=8)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    return f"P {', '.join(f'{value:.3f}' for value in row['prior'][start : start + STRIP])}."


def strip_panels(strips, width):
    """(row, pictures) each -> panels of a sheet of this width in inches, at most STRIP frames each."""
    panels, bars, largest = [], 0.6, max(max(row["prior"]) for row, _ in strips)  # bars: inches
    for row, pictures in strips:
        tall, wide = pictures[0].shape[:2]
        high = 0.86 * (width - 1.12) / STRIP * tall / wide  # inches; 1.12: draw's margins
        for start in range(0, len(pictures), STRIP):
            title = (
                shorten(f"{row['problem_id']}: {row.get('question', '')}", 110)
                if start == 0
                else "…"
            )
            panels.append(
                Panel(
                    title,
                    "",
                    lambda axes, sheet, row=row, pictures=pictures, start=start, high=high: (
                        plot_strip(axes, sheet, row, pictures, start, high / bars, largest)
                    ),
                    height=1 + high + 1.55 * bars,
                )
            )
    return panels


def strip_html(row, pictures, largest):
    """A row's frames as a grid: time, P as a number and a bar, the cues that name it in words and as a frame."""
    cells = []
    for place, picture in enumerate(pictures):
        names, prior = marks(row, place), row["prior"][place]
        told = f"{row['times'][place]:.1f} s, P {prior:.3f}"
        line = {
            name: f"{kind} var(--c{CUES[name]});"
            for name, kind in (("scene", "outline:3px dashed"), ("semantic", "border:3px solid"))
        }
        style = "box-sizing:border-box;" + "".join(line[name] for name in names)
        cells.append(
            f'<figure><img src="{data_url(jpeg(picture), "jpeg")}" width="{picture.shape[1]}" height="{picture.shape[0]}" '
            f'style="{style}" alt="Frame at {told}{", named by " + " and ".join(names) if names else ""}">'
            f'<div style="height:6px;margin:6px 0;background:var(--c{CUES["prior"]});width:{100 * prior / largest:.0f}%"></div>'
            f"<figcaption>{''.join(f'<div>{line}</div>' for line in (*told.split(', '), *names))}</figcaption></figure>"
        )
    return (
        f"<h3>{escape(row.get('question') or row['problem_id'])}</h3><p><small>{escape(row['problem_id'])}, {escape(row['media'])}"
        f'</small></p>\n<div class="frames">{"".join(cells)}</div>'
    )


def prior_table(told):
    """Everything in numbers, and the settings that made the rows, as HTML."""
    both = [overlap[0] > 0 for overlap in told.overlaps]
    frames = (
        f"{min(told.mass)}"
        if len(told.mass) == 1
        else f"{min(told.mass)} to {max(told.mass)}, most often {told.usual_frames}"
    )
    numbers = [
        ("rows of videos", told.rows),
        ("rows of one frame (images), not drawn", told.images),
        ("frames of a video, K", frames),
        ("effective frames, exp(entropy) / K, mean", f"{np.mean(told.effective):.3f}"),
    ]
    for name, values in zip(
        ("on the scene set", "on the semantic set", "on neither"),
        zip(*told.shares, strict=True),
        strict=False,
    ):
        numbers.append((f"mass of P {name}, mean", f"{np.mean(values):.3f}, n = {len(values)}"))
    if told.overlaps:
        ratio, low, high = overlap_ratio(told.overlaps)
        interval = f" ({low:.3f} to {high:.3f})" if len(both) > 1 else ""
        numbers += [
            ("rows whose cues name a frame in common", f"{np.mean(both):.3f}, n = {len(both)}"),
            ("frames that both cues name, over chance", f"{ratio:.3f}{interval}, n = {len(both)}"),
        ]
    if told.correlations:
        numbers.append(
            (
                "rank correlation of the cues' scores, mean",
                f"{np.mean(told.correlations):.3f}, n = {len(told.correlations)}",
            )
        )
    made = [
        (
            f"--{name}",
            escape(
                "; ".join(f"{value} ({count} rows)" for value, count in values.most_common())
                if len(values) > 1
                else next(iter(values))
            ),
        )
        for name, values in told.settings.items()
    ]
    settings = (
        f"<h2>Settings that made them</h2>\n{table_html(['setting', 'value'], made)}"
        if made
        else ("<p>The file does not tell the settings that made it.</p>")
    )
    return f"<h2>Numbers</h2>\n{table_html(['measure', 'value'], numbers)}\n{settings}"


def run_prior(priors, media_root=None, items=6, seed=0, output="priors.html", command=""):
    """The report of `visualize.py prior`. Returns the path of the HTML file; FILE-sheet.png and .svg show the rows drawn at random."""
    media_root = media_root or Path(priors).parent
    check_output(output)
    if items < 0:
        raise DataError("--items must be at least 0")
    told, strips, causes = summarise_priors(priors, items, seed), [], []
    for row in tqdm(told.chosen, desc="decode", unit="video", delay=2):
        try:
            strips.append((row, read_strip(row, media_root)))
        except DataError as error:
            causes.append(str(error))
    bins = min(told.usual_frames, 32)
    panels = [
        Panel(
            "Where in the video",
            f"Mean P over {told.rows} videos in {bins} equal parts; dotted: uniform.",
            lambda axes, sheet: plot_mass(axes, sheet, told, bins),
        ),
        Panel(
            "Concentration of P",
            "exp(entropy of P) / K: 1 is uniform, 1 / K a single frame. Line: median.",
            lambda axes, sheet: plot_histogram(
                axes, sheet, {"effective frames": told.effective}, 0, 1, "effective frames / K"
            ),
        ),
    ]
    if told.shares:
        mass = dict(
            zip(("scene", "semantic", "neither"), zip(*told.shares, strict=True), strict=True)
        )
        panels.insert(
            1,
            Panel(
                "Mass by cue",
                "P's mass on the frames of each set; a frame that both sets name counts in both.",
                lambda axes, sheet: plot_histogram(axes, sheet, mass, 0, 1, "mass of P"),
            ),
        )
    if told.overlaps:
        panels.append(
            Panel(
                "Do the cues agree?",
                "Diamonds: sets of these sizes that do not know of each other (hypergeometric).",
                lambda axes, sheet: plot_overlap(axes, sheet, told.overlaps),
            )
        )
    if told.correlations:
        panels.append(
            Panel(
                "Correlation of the cues",
                "Spearman's, of a video's scene and semantic scores. Line: median.",
                lambda axes, sheet: plot_histogram(
                    axes, sheet, {"correlation": told.correlations}, -1, 1, "rank correlation"
                ),
            )
        )
    left = (
        told.rows - len(told.shares),
        told.rows - len(told.overlaps),
        told.rows - len(told.correlations),
    )
    several = [name for name, values in told.settings.items() if len(values) > 1]
    note = f"P: the consensus prior over a video's K sampled frames (arXiv 2606.18441, Eq. 1-2). {told.rows} rows of videos"
    note += f"; {told.images} of images, one frame each, are left out." if told.images else "."
    note += (
        f" Rows without both sets: {left[0]}; with an empty one, so not asked whether the cues agree: {left[1]}."
        if left[1]
        else ""
    )
    note += (
        f" Rows without both scores, or with a constant one, so without correlation: {left[2]}."
        if left[2]
        else ""
    )
    note += f" The rows were made with several settings: {', '.join(several)}." if several else ""
    if causes:
        warning = (
            f"{len(causes)} of {len(told.chosen)} videos of the sheet cannot be shown (--media_root {media_root}); the first: "
            f"{causes[0]}"
        )
        print(f"visualize.py: warning: {warning}", file=sys.stderr)
        note += f" {warning}."
    heading, figures = f"Priors of {Path(priors).name}", {}
    figures[""] = draw(panels, SHEETS["light"], heading, note=note)[0]
    body = f"<p>{escape(note)}</p>\n{panels_html(panels)}\n{prior_table(told)}"
    if strips:
        legend = [
            ("scene cue: begins a scene", CUES["scene"], DASHES[1]),
            ("semantic cue: among the most like the question", CUES["semantic"], DASHES[0]),
        ]
        title, largest = (
            f"{len(strips)} of {told.rows} rows, drawn at random",
            max(max(row["prior"]) for row, _ in strips),
        )
        sheet_note = "Bars: the consensus prior P of each frame, one scale for all rows; P in numbers where a cue names the frame."
        figures["-sheet"] = draw(
            strip_panels(strips, 12), SHEETS["light"], title, legend, 1, 12, sheet_note
        )[0]
        body += (
            f"\n<h2>{title}</h2><p>Dashed line: begins a scene. Solid line: among the most like the question. Bars: P, one scale for "
            "all rows.</p>\n" + "\n".join(strip_html(*strip, largest) for strip in strips)
        )
    return write_report(output, heading, body, command, figures)
