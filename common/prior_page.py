"""What made the rows of a priors file, and some of them (visualize.py prior)."""

import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from common.data import DataError, MediaError, resolve_media
from common.media import read_frames
from common.pages import page_path, table_html, write_page
from common.plots import prior_figure
from common.video import open_video
from prior import read_priors


def row_frames(row, media_root):
    """Frames of a row, (K, H, W, 3) uint8. Raises DataError with the cause."""
    if not row.media:
        raise MediaError(f"the row of {row.problem_id} names no medium")
    path = resolve_media(row.media, media_root, f"the row of {row.problem_id}")
    video = open_video(path, row.settings.get("decoder", "pyav"))
    _, times, frames = read_frames(video, row.frames)
    # A folder's frame rate stands in the data set alone.
    if not os.path.isdir(path) and not np.allclose(times, row.times, atol=0.02):
        raise MediaError(f"{path}: its frames were taken at other times than the row's")
    return frames


def prior_report(priors, media_root, items, output):
    """Write the report of a priors file.

    Args:
        priors: path. media_root: None is the folder of the file. items: rows drawn. output: the
            page.
    Returns:
        Path of the page; FILE-1.png, FILE-1.svg and so on show rows drawn at random.
    """
    output = page_path(output)
    rows = list(read_priors(priors))
    # P of a single frame is 1, whatever the cues.
    videos = [row for row in rows if len(row.prior) > 1]
    if not videos:
        raise DataError(f"priors file {priors} has no row of a video")
    numbers = [
        ["measure", "value"],
        ["rows of videos", len(videos)],
        ["rows of one frame (images), not drawn", len(rows) - len(videos)],
    ]
    # Rows of one file can have been made with several settings.
    made = Counter(json.dumps(row.settings) for row in rows)
    numbers += [[f"settings of {count} rows", text] for text, count in made.items()]
    figures = {}
    causes = []
    chosen = random.Random(0).sample(videos, min(items, len(videos)))
    for number, row in enumerate(chosen, 1):
        # Media that cannot be read are counted and named; the page is written without them.
        try:
            frames = row_frames(row, media_root or Path(priors).parent)
        except DataError as error:
            causes.append(str(error))
            continue
        figures[f"-{number}"], _ = prior_figure(row, frames)
    if causes:
        cause = f"{len(causes)} of {len(chosen)}; the first: {causes[0]}"
        numbers.append(["videos that cannot be shown", cause])
        print(f"visualize.py: warning: {': '.join(numbers[-1])}", file=sys.stderr)
    heading = f"Priors of {Path(priors).name}"
    return write_page(output, heading, table_html(numbers), figures)
