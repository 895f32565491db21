"""Stage 1, the consensus prior: which of a video's K sampled frames a question should rest on.

    python prior.py --video clip.mp4 --question "Who falls first?"     # a table and prior.png
    python prior.py --dataset_name Video-R1-260k.json --media_root DATA --output priors.jsonl
    torchrun --nproc_per_node 8 prior.py --dataset_name ...            # or deepspeed
    python prior.py --dataset_name toy-seed0/heldout.json --clip local-dir:toy-seed0/clip

The second command continues where an interrupted one stopped; nodes of the third share a folder;
the last runs the toy on a CPU.

Two cues vote on K frames spread evenly over the video (VideoCFR, arXiv 2606.18441, Eq. 1-2):
frames that begin a scene (jumps between colour histograms, or a detector of PySceneDetect) and
frames that look like the question (CLIP). A frame's weight is w_base, plus w_scene if the first cue
names it, plus w_sem if the second does; the weights divided by their sum are P.

One JSON line per example: problem_id, question, media (as the data set names it), span ([start,
end] in s of the part of the video that is shown, or nulls), frames (indices in the video), times
(s), scene_scores, semantic_scores, scene and semantic (positions among the K frames), prior,
settings. An image is one frame with P = [1.0] and no cues; a text-only example has no row. Worker
processes decode while this process runs CLIP.
"""

import json
import math
import os
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import lru_cache
from itertools import chain, pairwise
from pickle import UnpicklingError

import cv2
import numpy as np
import scenedetect
import torch
from PIL import Image
from safetensors import SafetensorError
from scenedetect.common import FrameTimecode, Timecode
from scenedetect.scene_manager import compute_downscale_factor
from tqdm import tqdm

from common.data import (
    Cues,
    DataError,
    MediaError,
    Prior,
    first_words,
    load_examples,
    typed_example,
)
from common.flags import Parser, check_least, exit_codes, flag
from common.media import FrameFlags, sample_medium
from common.video import load_image, open_medium, open_video
from common.workers import Pool, ShardedLines, check_settings, join_ranks, writing
from grpo import slot_shares

# Histograms of the scene cue: bins of the chroma's x and y, odd so that grey is mid-bin, and value.
CONE_BINS = [25, 25, 32]
CONE_RANGES = [-256, 256, -256, 256, 0, 256]

HISTOGRAM_SIGMA = 2.0  # smoothing, in bins

HISTOGRAM_SIDE = 160  # pixels on the long side to which frames are shrunk first

DETECTORS = {
    "content": scenedetect.ContentDetector,
    "adaptive": scenedetect.AdaptiveDetector,
    "hash": scenedetect.HashDetector,
    "histogram": scenedetect.HistogramDetector,
    "threshold": scenedetect.ThresholdDetector,
}

SHORTEST_SCENE = "0.6s"  # of the detectors; the default of PySceneDetect's command line


@dataclass(kw_only=True)
class PriorSettings(FrameFlags):
    """What a prior depends on; every row records it. train.py has the same flags."""

    scene: str = flag(
        "hsv",
        "Scene cue, S_scene of Eq. 1. hsv (the paper's): distances of the sampled frames' "
        "histograms. The others: PySceneDetect's detectors on every frame of the video (slower); "
        "threshold finds fades and cuts through black only.",
        choices=["hsv", *DETECTORS],
        group="Prior (Eq. 1-2)",
    )
    scene_threshold: float | None = flag(
        None,
        "hsv: least distance (0-1) of neighbouring frames' histograms that can be a cut, None: "
        "0.2. Other --scene: the detector's threshold, None: its default.",
    )
    semantic_k: int | None = flag(
        None,
        "Semantic cue, S_sem of Eq. 1: number of frames most like the question. None: a quarter "
        "of K, rounded up.",
    )
    semantic_options: bool = flag(
        False,
        "Compare frames with the question and its options, cut to the model's context, not with "
        "the question alone.",
    )
    clip: str = flag(
        "ViT-B-32",
        "Image-text model of the semantic cue: a name of open_clip (SigLIP's too) or "
        "local-dir:FOLDER (open_clip_config.json and weights).",
    )
    clip_pretrained: str = flag(
        "openai",
        "open_clip's tag of the weights, or a file of them; unused with local-dir: and hf-hub:.",
    )
    prior: str = flag(
        "full",
        "Cues in P; the paper's ablation rows. Without the semantic cue no CLIP model is loaded.",
        choices=["full", "no_scene", "no_semantic", "uniform"],
    )
    w_base: float = flag(0.1, "w_base of Eq. 1: weight of every frame.")
    w_scene: float = flag(1.0, "lambda_scene of Eq. 1: added to a frame that begins a scene.")
    w_sem: float = flag(3.0, "lambda_sem of Eq. 1: added to a frame that is like the question.")

    def __post_init__(self):
        super().__post_init__()
        # P is a distribution over all frames.
        check_least(self, w_base=1e-6, w_scene=0, w_sem=0, semantic_k=1, scene_threshold=0)

    @property
    def has_scene(self):
        return self.prior in ("full", "no_semantic")

    @property
    def has_semantic(self):
        return self.prior in ("full", "no_scene")


@dataclass(kw_only=True)
class PriorArguments(PriorSettings):
    """The command line: the settings and the files."""

    dataset_name: str | None = flag(
        None,
        "Data set file (JSON or JSON lines; Video-R1, SEED-Bench-R1, TW-GRPO, MVBench, Video-R2).",
        group="Files",
    )
    media_root: str | None = flag(
        None, "Folder that media paths start from. None: the data set file's folder."
    )
    video: str | None = flag(
        None, "One video instead of a data set: its prior is printed and drawn."
    )
    question: str | None = flag(None, "Question about --video.")
    output: str | None = flag(
        None,
        "File to write. None: priors.jsonl, or prior.png with --video. The same command continues "
        "an interrupted run, whose rows stay. Unusable examples are listed with their causes in "
        "OUTPUT.errors.jsonl and tried again by the next run.",
    )
    workers: int | None = flag(
        None,
        "Processes that decode. None: the cores, half of them where CLIP runs on the CPU, shared "
        "by the ranks of a machine. 0: decode in this process, without a timeout.",
        group="Run",
    )
    decode_timeout: float = flag(
        300.0, "Seconds after which a decoder is killed and its video counts as broken."
    )
    local_rank: int = flag(-1, "Set by the deepspeed launcher.")

    def __post_init__(self):
        super().__post_init__()
        check_least(self, decode_timeout=1e-6, workers=0)
        # Two commands in one: a data set, or one video with its question.
        no_video = self.video is None
        if no_video == (self.dataset_name is None) or no_video != (self.question is None):
            raise DataError(
                "give one of --dataset_name and --video; --video and --question go together"
            )
        self.output = self.output or ("prior.png" if self.video else "priors.jsonl")
        if self.video and not self.output.endswith((".png", ".svg", ".pdf")):
            raise DataError(f"--output {self.output}: a prior is drawn as .png, .svg or .pdf")
        # The input would be overwritten.
        if os.path.realpath(self.output) == os.path.realpath(self.dataset_name or self.video):
            raise DataError(f"--output {self.output} is the input itself; choose another file")
        if os.path.isdir(self.output):
            raise DataError(f"--output {self.output} is a folder; name a file in it")


def uniform_frames(total, k):
    """Indices of k evenly spread frames: round(linspace(0, total - 1, k)), or all if fewer."""
    return np.linspace(0, total - 1, min(k, total)).round().astype(int).tolist()


def settings_of(settings, kind=PriorSettings):
    """The settings that a row records, as a dict: those of PriorSettings, or fewer."""
    names = [one.name for one in fields(kind)]
    return {name: getattr(settings, name) for name in names if hasattr(settings, name)}


# ---------------------------------------------------------------------------- cues, sets, fusion

# Unit vectors of OpenCV's 8-bit hue, which is in units of 2 degrees.
HUE_CIRCLE = np.exp(2j * np.pi * np.arange(256) / 180)  # (256,)
COSINE = HUE_CIRCLE.real.astype(np.float32)
SINE = HUE_CIRCLE.imag.astype(np.float32)

# Gaussian, cut at 3 sigma.
KERNEL = np.exp(-0.5 * (np.arange(-6, 7, dtype=np.float32) / HISTOGRAM_SIGMA) ** 2)  # (13,)
IDENTITY = np.ones(1, np.float32)


def blur(histogram):
    """Convolves each axis of an (A, B, C) float32 histogram with KERNEL, zero-padded."""
    for _ in range(3):
        # The last axis first, and so in turn. Not by BLAS, whose threads spin on shared cores.
        rows = histogram.reshape(-1, histogram.shape[-1])
        rows = cv2.sepFilter2D(rows, -1, KERNEL, IDENTITY, borderType=cv2.BORDER_CONSTANT)
        histogram = np.ascontiguousarray(np.moveaxis(rows.reshape(histogram.shape), -1, 0))
    return histogram


# The kernel's mass inside the borders: less near them.
SPREAD = blur(np.ones(CONE_BINS, np.float32))  # (25, 25, 32)


def hsv_histogram(frame):
    """Smoothed histogram of a frame's HSV colours.

    Its bins are those of the HSV cone, not of raw (H, S, V): x, y = C cos H, C sin H with
    C = S V / 255, and V. Raw hue is noise on grey pixels, and a hard bin border lets one grey level
    of flicker move all the mass, so that static clips would show cuts. In the cone both are
    continuous.

    Args:
        frame: (H, W, 3) uint8 RGB.
    Returns:
        (25, 25, 32) float32.
    """
    height, width = frame.shape[:2]
    scale = HISTOGRAM_SIDE / max(height, width)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
    hue, saturation, value = cv2.split(cv2.cvtColor(frame, cv2.COLOR_RGB2HSV))  # each (h, w) uint8
    chroma = cv2.multiply(saturation, value, scale=1 / 255, dtype=cv2.CV_32F)  # (h, w)
    x = cv2.multiply(chroma, cv2.LUT(hue, COSINE))
    y = cv2.multiply(chroma, cv2.LUT(hue, SINE))
    cone = [x, y, value.astype(np.float32)]
    histogram = cv2.calcHist(cone, [0, 1, 2], None, CONE_BINS, CONE_RANGES)  # (25, 25, 32)
    # Divided first, so that every pixel keeps its weight.
    return blur(histogram / SPREAD)


def scene_scores(frames):
    """Bhattacharyya distance (0-1) of the HSV histograms of frames i-1 and i; 0 for i = 0.

    Args:
        frames: K of (H, W, 3) uint8 RGB.
    Returns:
        (K,) float64.
    """
    return histogram_distances([hsv_histogram(frame) for frame in frames])


def histogram_distances(histograms):
    distances = [0.0]
    for before, after in pairwise(histograms):
        distances.append(cv2.compareHist(before, after, cv2.HISTCMP_BHATTACHARYYA))
    return np.array(distances)  # (K,)


def detector_scores(video, indices, settings):
    """1 where a sampled frame is the first after a cut that a PySceneDetect detector finds, else 0.

    Args:
        video: video.Video.
        indices: (K,) sampled frames. The detector sees every frame from the first to the last.
        settings: PriorSettings, whose scene is a key of DETECTORS.
    Returns:
        (K,) float64.
    """
    options = {"min_scene_len": SHORTEST_SCENE}
    if settings.scene_threshold is not None:
        options["threshold"] = settings.scene_threshold
    detector = DETECTORS[settings.scene](**options)
    rate = (len(video) - 1) / video.times[-1] if len(video) > 1 else 1.0
    numbers = range(indices[0], indices[-1] + 1)
    cuts = []
    for number, frame in zip(numbers, video.read(numbers), strict=True):
        microseconds = round(video.times[number] * 1e6)
        stamp = FrameTimecode(Timecode(microseconds, Fraction(1, 10**6)), rate)
        # In the size that the library's own reading gives its detectors.
        scale = 1 / compute_downscale_factor(max(frame.shape[:2]))
        frame = cv2.resize(frame, None, fx=scale, fy=scale)
        cuts += detector.process_frame(stamp, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    cuts += detector.post_process(stamp)
    # A frame exactly at a cut belongs to the new scene, whatever the rounding of its time.
    starts = [cut.seconds - 1e-3 for cut in cuts]
    scores = np.zeros(len(indices))
    scores[np.searchsorted(video.times[indices], starts)] = 1.0
    return scores


def scene_set(scores, threshold=0.2):
    """Ascending positions of the frames that begin a scene, S_scene of Eq. 1.

    Criterion: s_i >= threshold, and s_i is a peak: at least twice the calmest value within two
    samples to its left and within two to its right. So a pan counts at most once and a steady drift
    never, yet two cuts in a row (a scene of a single sampled frame) are both found. Of three or
    more in a row the inner ones are no peaks, so s_i >= 2 threshold counts without a peak.

    Args:
        scores: (K,) scene scores.
    """
    chosen = []
    for i in range(1, len(scores)):
        left = min(scores[max(i - 2, 0) : i])
        right = min(scores[i + 1 : i + 3], default=left)
        is_peak = scores[i] >= 2 * max(left, right)
        if scores[i] >= threshold and (is_peak or scores[i] >= 2 * threshold):
            chosen.append(i)
    return chosen


@dataclass
class Clip:
    """An image-text model and its preprocessing."""

    model: torch.nn.Module
    preprocess: object  # PIL image -> (3, h, w) float
    tokenizer: object  # list of N str -> (N, context) int64, longer texts cut to the context
    device: str


# Of open_clip, torch, safetensors and the Hub.
CLIP_ERRORS = (
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    SafetensorError,
    UnpicklingError,
)


def load_clip(name, pretrained=None, device="cpu"):
    """Loads an open_clip model; one without weights is refused.

    open_clip reads pickled weights by torch's weights_only.

    Args:
        name: a name of open_clip, hf-hub:REPO, or local-dir:FOLDER with open_clip_config.json,
            weights, and tokenizer files if its text_cfg has hf_tokenizer_name.
        pretrained: open_clip's tag or a file of weights, for a name of open_clip.
    Returns:
        Clip in eval mode.
    Errors: DataError if it cannot be loaded.
    """
    # Imported here: it takes seconds, and most commands load no CLIP.
    import open_clip

    if name.startswith(("local-dir:", "hf-hub:")):
        pretrained = None
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, device=device, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(name)
    except CLIP_ERRORS as error:
        raise DataError(
            f"CLIP model {name} ({pretrained}) cannot be loaded, give --clip local-dir:FOLDER or "
            f"--prior no_semantic: {first_words(error)}"
        ) from error
    return Clip(model.eval(), preprocess, tokenizer, device)


@torch.no_grad()
def encode_pixels(pixels, clip, batch=64):
    """Unit image features; they depend on the video only, so one call serves all its questions.

    Args:
        pixels: (K, 3, h, w) float32 of clip.preprocess.
    Returns:
        (K, D) float32 on the CPU.
    """
    parts = []
    for part in torch.as_tensor(pixels).split(batch):
        features = clip.model.encode_image(part.to(clip.device), normalize=True)  # (batch, D)
        parts.append(features.float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def encode_texts(texts, clip):
    """Unit text features (N, D) of N texts."""
    tokens = clip.tokenizer(texts).to(clip.device)  # (N, context)
    return clip.model.encode_text(tokens, normalize=True).float().cpu()


def semantic_scores(frames, question, clip):
    """Cosine similarity of each frame with the question, in [-1, 1].

    Args:
        frames: (K, H, W, 3) uint8 RGB.
        clip: Clip.
    Returns:
        (K,) float32.
    """
    images = [clip.preprocess(Image.fromarray(frame)) for frame in frames]
    pixels = torch.stack(images)  # (K, 3, h, w)
    return encode_pixels(pixels, clip) @ encode_texts([question], clip)[0]  # (K, D) @ (D,)


def semantic_set(scores, k=None):
    """Ascending positions of the k highest of (K,) semantic scores, S_sem of Eq. 1.

    k None: ceil(K / 4). Of equal scores the earlier counts.
    """
    if k is None:
        k = math.ceil(len(scores) / 4)
    # A stable sort keeps the earlier of equal scores first.
    order = np.argsort(-np.asarray(scores), kind="stable").tolist()
    return sorted(order[:k])


def fuse(k, scene, semantic, w_base=0.1, w_scene=1.0, w_sem=3.0):
    """The prior P, (k,) summing to 1, from the two sets of positions.

    Eq. 1: w_i = w_base + 1[i in S_scene] lambda_scene + 1[i in S_sem] lambda_sem.
    Eq. 2: P(i) = w_i / sum_j w_j.
    """
    weights = torch.full((k,), w_base)  # (k,)
    weights[list(scene)] += w_scene
    weights[list(semantic)] += w_sem
    return weights / weights.sum()


# ------------------------------------------------------------------------------ from media to rows


def read_cues(medium, settings, preprocess=None):
    """Decodes a medium and reads its cues, one frame at a time.

    Args:
        medium: Medium.
        preprocess: Clip.preprocess; None: no pixels are returned.
    Returns:
        Cues.
    Errors: MediaError if the medium cannot be read.
    """
    if medium.kind == "image":
        load_image(medium.path)  # finds a broken one
        return Cues([0], [0.0], [], None)
    video, indices = open_medium(medium, settings)
    times = rounded(video.times[indices])
    histograms = []
    pixels = []
    # All frames of a long 4K video would not fit into the memory of many workers.
    for frame in video.read(indices):  # (H, W, 3)
        if settings.scene == "hsv":
            histograms.append(hsv_histogram(frame))
        if preprocess is not None:
            pixels.append(preprocess(Image.fromarray(frame)).numpy())
    if settings.scene == "hsv":
        scores = histogram_distances(histograms)
    else:
        scores = detector_scores(video, indices, settings)
    return Cues(indices, times, rounded(scores), np.stack(pixels) if pixels else None)


def rounded(scores):
    """(K,) scores as a priors file has them."""
    return [round(float(score), 6) for score in scores]


def media_name(example):
    """The medium as the data set names it, whatever the media root."""
    return example.extra.get("path") or os.path.basename(example.path)


def weigh(row, settings):
    """Adds to a Prior the P of its sets (Eq. 2) and the settings that weighed them."""
    # An ablated cue keeps its set in the row, so that it can be weighed anew.
    scene = row.scene if settings.has_scene else []
    semantic = row.semantic if settings.has_semantic else []
    count = len(row.frames)
    prior = fuse(count, scene, semantic, settings.w_base, settings.w_scene, settings.w_sem)  # (K,)
    # Nine digits are exact for a float32.
    row.prior = [float(f"{value:.9g}") for value in prior.tolist()]
    for name in ("prior", "w_base", "w_scene", "w_sem"):
        row.settings[name] = getattr(settings, name)
    return row


def media_rows(examples, cues, clip, settings):
    """Priors of examples that share one medium; they depend on these examples and it alone.

    Args:
        cues: Cues of the medium.
        clip: Clip; without pixels, as of an image, there are no semantic scores.
    """
    # A detector's scores are 0 or 1, and its threshold is its own.
    threshold = 0.2
    if settings.scene == "hsv" and settings.scene_threshold is not None:
        threshold = settings.scene_threshold
    likeness = [[]] * len(examples)  # (N, K), or no scores
    # One batch a medium: the frames are encoded once for all its questions.
    if cues.pixels is not None:
        texts = []
        for example in examples:
            options = example.options if settings.semantic_options else []
            texts.append(" ".join([example.question, *options]))
        likeness = encode_texts(texts, clip) @ encode_pixels(cues.pixels, clip).T  # (N, D) @ (D, K)
    rows = []
    for example, scores in zip(examples, likeness, strict=True):
        row = Prior(
            example.id,
            question=example.question,
            media=media_name(example),
            span=example.span,
            frames=cues.frames,
            times=cues.times,
            scene_scores=cues.scene_scores,
            semantic_scores=rounded(scores),
            settings=settings_of(settings),
        )
        row.scene = scene_set(row.scene_scores, threshold)
        row.semantic = semantic_set(row.semantic_scores, settings.semantic_k)
        rows.append(weigh(row, settings))
    return rows


def make_prior(example, clip, settings):
    """Prior of a video or image example, decoded in this process.

    Errors: MediaError if the medium cannot be read.
    """
    cues = read_cues(example.medium, settings, clip and clip.preprocess)
    return media_rows([example], cues, clip, settings)[0]


def group_by_medium(examples):
    """Examples as {Medium: list of Example}, without text-only ones."""
    groups = {}
    for example in examples:
        if example.media:
            groups.setdefault(example.medium, []).append(example)
    return groups


def error_lines(examples, cause):
    """Rows of the errors file for examples that cannot be used."""
    cause = str(cause)
    return [{"problem_id": one.id, "media": one.path, "cause": cause} for one in examples]


def group_priors(groups, clip, settings, workers, timeout, rank=0):
    """Yields a medium, the Priors of its examples and their error lines, either empty, as it ends.

    Args:
        groups: examples by medium, see group_by_medium.
        workers, timeout: see Pool.
        rank: rank 0 shows its progress.
    """
    found = Pool(workers, timeout).each(read_cues, groups, settings, clip and clip.preprocess)
    progress = tqdm(found, desc="priors", unit="video", total=len(groups), disable=rank > 0)
    for medium, cues in progress:
        if isinstance(cues, MediaError):
            yield medium, [], error_lines(groups[medium], cues)
        else:
            yield medium, media_rows(groups[medium], cues, clip, settings), []


def build_priors(examples, clip, settings, workers=0, timeout=300.0):
    """Priors of examples; the command line serves large data sets.

    Args:
        workers, timeout: see Pool.
    Returns:
        list of Prior, those of a medium together; error lines {"problem_id", "media", "cause"} of
        examples whose medium cannot be read. Text-only examples have neither.
    """
    groups = group_by_medium(examples)
    # In the order of the examples, whichever medium is decoded first.
    rows = dict.fromkeys(groups)
    errors = []
    for medium, made, lines in group_priors(groups, clip, settings, workers, timeout):
        rows[medium] = made
        errors += lines
    return list(chain.from_iterable(rows.values())), errors


# ------------------------------------------------------------------------ the release's frame_sets


def check_count(owner, frames, example, settings, fps):
    """Refuses frames that this run would not sample from an example's video.

    Right are --frames of them, fewer with --fps, and all frames of a shorter video or span.

    Errors: DataError, which begins with `owner`.
    """
    count = len(frames)
    first = frames[0] if any(example.span) else 0
    fewer = count < settings.frames and (fps or frames == list(range(first, first + count)))
    if example.video and count != settings.frames and not fewer:
        raise DataError(
            f"{owner} has {count} frames of {example.id}, this run uses --frames {settings.frames}"
        )


def are_indices(values):
    """Whether parsed JSON is a list of frame indices."""
    return isinstance(values, list) and all(type(one) is int and one >= 0 for one in values)


def frame_set_rows(examples, settings):
    """Priors of examples with the release's field frame_sets, whose videos are not decoded.

    The field is {"uniform", "scene", "semantic": frame indices}. The K frames are the uniform set;
    a frame of another set counts for the sampled frame nearest to it.

    Returns:
        list of Prior; error lines, as build_priors.
    Errors: DataError if a field is malformed or has another K.
    """
    rows = []
    errors = []
    for example in tqdm(examples, desc="frame_sets", unit="example", disable=not examples):
        sets = example.extra["frame_sets"]
        names = ("uniform", "scene", "semantic")
        known = isinstance(sets, dict) and sets.get("uniform")
        if not known or not all(are_indices(sets.get(name)) for name in names):
            raise DataError(
                f"{example.id}: frame_sets must have the lists uniform (not empty), scene and "
                "semantic of frame indices"
            )
        # A sampler of fixed K repeats the frames of a shorter video.
        frames = sorted(set(sets["uniform"]))
        check_count("the field frame_sets", frames, example, settings, settings.fps)
        times = [0.0]
        if example.video:
            try:
                times = frame_times(example.video, settings.decoder, tuple(frames))
            except MediaError as error:
                errors += error_lines([example], error)
                continue
        row = Prior(
            example.id,
            question=example.question,
            media=media_name(example),
            span=example.span,
            frames=frames,
            times=times,
            scene=nearest(frames, sets["scene"]),
            semantic=nearest(frames, sets["semantic"]),
            settings=settings_of(settings, FrameFlags),
        )
        rows.append(weigh(row, settings))
    return rows, errors


def nearest(frames, indices):
    """Ascending positions of the sampled frames that are nearest to some frame indices."""
    return sorted({int(np.abs(np.array(frames) - index).argmin()) for index in indices})


@lru_cache(1 << 14)  # the questions of a video share its frames
def frame_times(medium, decoder, frames):
    """Seconds of these frames of a video, without decoding them."""
    video = open_video(medium.path, decoder, medium.fps)
    if frames[-1] >= len(video):
        raise MediaError(
            f"{medium.path}: its frame_sets name frame {frames[-1]}, the video ends with "
            f"{len(video) - 1}"
        )
    return rounded(video.times[list(frames)])


# ----------------------------------------------------------------------------------- priors files


def check_row(row):
    """What is wrong with a parsed row of a priors file, in words; '' for a good one."""
    if not isinstance(row, dict) or "problem_id" not in row:
        return "is not an object with a problem_id"
    if not isinstance(row.get("settings", {}), dict):
        return "has settings that are not an object"
    try:
        numbers = np.array([row["frames"], row["times"], row["prior"]])  # (3, K)
    except (KeyError, ValueError):  # one is missing, or they differ in length
        numbers = np.array(None)
    if numbers.dtype.kind not in "if" or numbers.ndim != 2 or not np.isfinite(numbers).all():
        return "has frames, times and prior that are not equally long lists of numbers"
    frames = row["frames"]
    if not frames or not are_indices(frames) or frames != sorted(set(frames)):
        return "has frames that are not ascending indices"
    prior = numbers[2]
    if prior.min() < 0 or abs(prior.sum() - 1) > 1e-3:
        return f"has a prior whose least value is {prior.min():.4g}, the sum {prior.sum():.4g}"
    for name in ("scene", "semantic"):
        chosen = row.get(name) or []
        if not are_indices(chosen) or max(chosen, default=0) >= len(frames):
            return f"has a {name} set that is not of positions among its frames"
    return ""


def read_priors(path):
    """Yields the rows of a priors file, each a Prior; fields that it does not know are left out.

    Errors: DataError if the file or a row is malformed.
    """
    if not os.path.isfile(path):
        raise DataError(f"priors file {path} not found, or a folder (prior.py makes it)")
    names = [one.name for one in fields(Prior)]
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                fault = check_row(row)
            except (RecursionError, ValueError) as error:  # too deep, not JSON, or not UTF-8
                fault = f"is not valid JSON ({error})"
            if fault:
                raise DataError(f"priors file {path}, line {number} {fault}; build it again")
            row["problem_id"] = str(row["problem_id"])
            yield Prior(**{name: row[name] for name in names if row.get(name) is not None})


def other_question(row, example):
    """Whether a Prior is about another question, medium or span than the example of its id."""
    other = row.question not in (None, example.question)
    return other or row.span != example.span or row.media not in (None, media_name(example))


def load_priors(path, examples, settings, own=False):
    """Priors of the video and image examples that have a row in a priors file.

    Args:
        settings: the run's PriorSettings, or its FrameFlags alone. The names of CLIP models are not
            compared.
        own: whether this run writes the file: then they are, and all rows must be of its examples.
    Returns:
        {problem_id: Prior}.
    Errors: DataError if the file is malformed, or a row was made for another question, another K
        or with other settings.
    """
    # The K of a shorter video and the place of a model on this machine may differ.
    compared = settings_of(settings)
    remedy = "choose another --output"
    if not own:
        remedy = "give the same here, or weigh the file's sets anew (docs/priors.md)"
        for name in ("frames", "clip", "clip_pretrained"):
            compared.pop(name, None)
    needed = {example.id: example for example in examples if example.media}
    rows = {}
    for row in read_priors(path):
        example = needed.get(row.problem_id)
        if example is None and not own:
            continue
        if example is None or other_question(row, example):
            raise DataError(
                f"priors file {path}: {row.problem_id} is another question there, or about another "
                "file or span; build it for this data set, or choose another file"
            )
        check_count(f"priors file {path}", row.frames, example, settings, row.settings.get("fps"))
        # Rows of other programs need not record settings; ours had no other at first.
        ours = {"decoder": "decord", "min_frames": 1} if "fps" in row.settings else {}
        made_with = compared | ours | row.settings
        check_settings(f"priors file {path}", made_with, compared, remedy)
        if rows.setdefault(row.problem_id, row) != row:
            raise DataError(
                f"priors file {path} has two priors of {row.problem_id}; build it again"
            )
    return rows


# ------------------------------------------------------------------------------------ command line


def cores():
    """Processor cores for this rank, as torchrun and deepspeed count the ranks of the machine."""
    ranks = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", 1))
    return max(1, cv2.getNumberOfCPUs() // int(ranks))


def load_here(arguments, workers=0):
    """Loads the semantic cue's model onto this rank's device, with the cores that workers leave.

    Returns:
        Clip; None where --prior leaves the cue out.
    """
    if not arguments.has_semantic:
        return None
    # at most as many as OMP_NUM_THREADS allows
    torch.set_num_threads(min(torch.get_num_threads(), max(1, cores() - workers)))
    # One GPU a rank.
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return load_clip(arguments.clip, arguments.clip_pretrained, device)


def run_dataset(arguments):
    """Appends the rows of a data set to --output as they are made; ranks share its videos."""
    unusable = []
    examples = load_examples(arguments.dataset_name, arguments.media_root, unusable)
    rank, world = join_ranks()
    output = ShardedLines(arguments.output, rank, world)
    done = {}
    if output.path.exists():
        done = load_priors(output.path, examples, arguments, own=True)
    left = group_by_medium([example for example in examples if example.id not in done])
    # All examples of a medium, so that a resumed run computes the same numbers.
    groups = group_by_medium(examples)
    mine = {medium: groups[medium] for medium in list(left)[rank::world]}
    # CLIP on the CPU needs as many cores as the decoders.
    workers = arguments.workers
    if workers is None:
        workers = cores()
        if arguments.has_semantic and not torch.cuda.is_available():
            workers = max(1, workers // 2)
    # An image needs no cue, so that no model is loaded for images alone.
    clip = None
    if any(medium.kind == "video" for medium in mine):
        clip = load_here(arguments, workers)

    # What an earlier run could not use is tried again, now that nothing can refuse this run.
    errors = ShardedLines(f"{arguments.output}.errors.jsonl", rank, world)
    errors.replace(unusable)
    output.append([])  # the file exists even if no example needs a row
    made = group_priors(mine, clip, arguments, workers, arguments.decode_timeout, rank)
    for _, rows, lines in made:
        output.append([row for row in rows if row.problem_id not in done])
        errors.append([line for line in lines if line["problem_id"] not in done])
    output.close()
    errors.close()
    if rank == 0:
        conclude(output.path, errors.path, examples)


def conclude(output, errors_file, examples):
    """Prints a summary of both files, and how well P finds the evidence that the data set knows.

    Errors: DataError if no example can be used.
    """
    known = {example.id: example.evidence for example in examples if example.evidence}
    count = 0
    hits = []
    ratios = []
    for row in read_priors(output):
        count += 1
        if row.problem_id in known:
            # 1 for a frame inside the evidence, else 0.
            inside = slot_shares(row.times, known[row.problem_id], len(row.times)).numpy()  # (K,)
            hits.append(inside[row.semantic].any())
            if inside.any():
                ratios.append(inside @ row.prior / inside.mean())
    errors = errors_file.read_text(encoding="utf-8").splitlines()
    if errors and not count:
        output.unlink()
        raise DataError(
            f"none of the {len(errors)} examples can be used (see {errors_file}); "
            f"the first: {json.loads(errors[0])['cause']}"
        )
    # Everything that a reader counts: rows, failures, and what needs neither.
    texts = sum(not example.media for example in examples)
    print(
        f"{count} priors are in {output}; {len(errors)} examples could not be used (causes in "
        f"{errors_file}); {texts} text-only examples need none"
    )
    if ratios:
        print(
            f"{len(hits)} questions of known evidence, {len(hits) - len(ratios)} of them without a "
            f"sampled frame there: {np.mean(hits):.3f} have it among the semantic cue's frames; "
            f"P's mass on it is {np.mean(ratios):.2f} times uniform's (mean of ratios)"
        )


def run_video(arguments):
    """Prints one video's prior as a table and draws it."""
    # Imported here, since workers import this file and matplotlib takes a second.
    from common.plots import prior_figure

    clip = load_here(arguments)
    example = typed_example(arguments.question, video=arguments.video)
    row = make_prior(example, clip, arguments)
    # nan where the cue is left out.
    print("frame    time    scene  semantic      P")
    semantic = row.semantic_scores or [math.nan] * len(row.frames)
    for position, frame in enumerate(row.frames):
        begins = "*" if position in row.scene else " "
        alike = "*" if position in row.semantic else " "
        prior = row.prior[position]
        print(
            f"{frame:5d} {row.times[position]:6.1f} s  {row.scene_scores[position]:6.3f}{begins} "
            f"{semantic[position]:8.3f}{alike} {prior:6.3f} {'#' * round(100 * prior)}"
        )
    figure, _ = prior_figure(row, sample_medium(example.medium, arguments).frames)
    with writing(arguments.output):
        figure.savefig(arguments.output)
    print(
        "* begins a scene, or is among the frames most like the question. "
        f"Drawn in {arguments.output}"
    )


EXIT_CODES = """
Exit code 0: done; unusable examples are counted and listed in OUTPUT.errors.jsonl. 2: bad input, or
a file that cannot be written; one sentence says which. 130: interrupted; the same command
continues. 1: a fault of this program, with its trace."""


def main():
    parser = Parser(PriorArguments, __doc__ + EXIT_CODES)
    namespace = parser.parse_args()
    with exit_codes("prior.py"):
        arguments = PriorArguments(**vars(namespace))
        if arguments.video:
            run_video(arguments)
        else:
            run_dataset(arguments)


if __name__ == "__main__":
    main()
