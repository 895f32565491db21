"""Do answers look where the prior points? (visualize.py enrichment; the paper's figure 9)

Reads the events that `evaluate.py --frame_use ... --priors ...` stores in NAME.predictions.jsonl:
the largest 5 % of an answer's token-slot scores.
"""

import numpy as np

from common import scores
from common.data import DataError
from common.pages import columns_html, page_path, write_page
from common.plots import DOTTED, line_style, name_paths, new_figure

PARTS = 10  # of an answer
NOTE = (
    "Each token of an answer has a score for each temporal slot of the video; the largest 5 % "
    "of an answer's scores are its events. Consensus slots have more of the prior than an even "
    "share. Event enrichment of some slots: their share of the events over their share of the "
    "slots; 1 (dotted) is chance. Left: mean over answers with its 95 % bootstrap interval; the "
    "paper has 1.48 and 0.94. Right: consensus slots, events of all answers together."
)


def read_events(path):
    """Read predictions of evaluate.py.

    Returns:
        {problem_id: frame_use (evaluate.use_row) with the enrichment of the `others`} of the
        answers whose enrichment is known, the score of frame use, and the number of other rows.
    """
    rows, settings = scores.read_json(path)
    uses = {}
    for row in rows:
        use = row.get("frame_use") or {}
        # A ratio of shares: some slots must be consensus slots, and some not.
        if use.get("enrichment") is None:
            continue
        slots = len(use["slots"])
        others = set(range(slots)) - set(use["consensus_slots"])
        use["others"] = scores.event_enrichment(use["events"], slots, others)
        uses.setdefault(row["problem_id"], use)
    if not uses:
        raise DataError(
            f"{path} has no answer with a known enrichment; evaluate.py --frame_use attention "
            "--priors FILE stores it in NAME.predictions.jsonl"
        )
    score = f"{settings.get('frame_use')}, layer {settings.get('frame_use_layer')}"
    return uses, score, len(rows) - len(uses)


def values_of(uses, name):
    """One number of every answer (n,)."""
    return np.array([use[name] for use in uses.values()])


def by_position(uses):
    """Enrichment of the consensus slots in equal parts of the answers -> (PARTS,), NaN if empty.

    Events are pooled over answers, since a part of one answer has few.
    """
    # Events on consensus slots, and how many of all events chance would put there.
    hits = np.zeros(PARTS)
    chance = np.zeros(PARTS)
    for use in uses.values():
        chosen = use["consensus_slots"]
        slots = len(use["slots"])
        token, slot = np.divmod(use["events"], slots)
        # The middle of token i lies at (2 i + 1) / (2 L).
        part = PARTS * (2 * token + 1) // (2 * use["tokens"])
        hits += np.bincount(part, np.isin(slot, chosen), PARTS)
        chance += np.bincount(part, minlength=PARTS) * len(chosen) / slots
    with np.errstate(invalid="ignore"):
        return hits / chance


def mean_text(values, sign=""):
    """(n,) -> "1.396 (1.330 to 1.461), n = 300", with a 95 % bootstrap interval."""
    if len(values) == 0:
        return "–"
    text = f"{np.mean(values):{sign}.3f}"
    # One value has no interval.
    if len(values) > 1:
        low, high = scores.paired_bootstrap(values, samples=2000)
        text += f" ({low:{sign}.3f} to {high:{sign}.3f})"
    return f"{text}, n = {len(values)}"


def plot_means(axes, files):
    """Draw the mean enrichment of both kinds of slots of each file, with its interval."""
    for index, uses in enumerate(files):
        colour = line_style(index)["color"]
        for place, name in enumerate(["enrichment", "others"]):
            values = values_of(uses, name)
            mean = values.mean()
            ends = scores.paired_bootstrap(values, samples=2000)
            # Files stand side by side.
            bar = np.abs(np.array(ends) - mean)[:, None]
            axes.errorbar(place + 0.1 * index, mean, bar, fmt="o", color=colour)
    axes.axhline(1, **DOTTED)
    axes.set_xticks([0, 1], ["consensus slots", "other slots"])
    axes.set(xlim=(-0.5, 1.5), ylabel="event enrichment")


def plot_positions(axes, files):
    """Draw the enrichment of the consensus slots along the answers."""
    for index, uses in enumerate(files):
        middles = (np.arange(PARTS) + 0.5) / PARTS * 100
        axes.plot(middles, by_position(uses), marker="o", markersize=4, **line_style(index))
    axes.axhline(1, **DOTTED)
    axes.set(xlabel="position in the answer, %", xlim=(0, 100))


def enrichment_report(predictions, label, output):
    """Write the report of predictions files.

    Args:
        predictions: paths. label: one a file, or None for the files' names. output: the page.
    Returns:
        Path of the page.
    """
    output = page_path(output)
    names = [path.removesuffix(".predictions.jsonl") for path in predictions]
    labels = name_paths(names, label)
    files = []
    columns = []
    for name, path in zip(labels, predictions, strict=True):
        uses, score, left_out = read_events(path)
        # Paired by problem_id. Levels of different scores of frame use cannot be compared.
        changes = []
        if files and score == columns[0]["frame use by"]:
            for key, use in uses.items():
                if key in files[0]:
                    changes.append(use["enrichment"] - files[0][key]["enrichment"])
        columns.append(
            {
                "measure": name,
                "frame use by": score,
                "rows without a known enrichment": left_out,
                "enrichment of the consensus slots": mean_text(values_of(uses, "enrichment")),
                "enrichment of the other slots": mean_text(values_of(uses, "others")),
                f"consensus slots, change from {labels[0]} on the same questions": mean_text(
                    changes, "+"
                ),
            }
        )
        files.append(uses)
    figure = new_figure(9, 4.5, "Event enrichment", labels, NOTE)
    means, positions = figure.subplots(1, 2, sharey=True)
    plot_means(means, files)
    plot_positions(positions, files)
    return write_page(output, "Event enrichment", columns_html(columns), {"": figure})
