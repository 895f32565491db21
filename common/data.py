"""Examples: data set files in the formats of several projects, solutions, prompts.

    examples = load_examples("Video-R1-260k.json", media_root="DATA")  # list of Example
    prompt = build_prompt(examples[0])  # question, options, instruction

A data set is a JSON array (or JSON lines) in Video-R1's format: problem, problem_type, options,
solution, path, data_type and, for SFT, process. We add optional fields: evidence,
[[start, end], ...] in seconds, grounding, {"00:04-00:08": "sentence"}, and media for several of
them. Rows of SEED-Bench-R1, TW-GRPO (CLEVRER, NExT-GQA, STAR), MVBench and Video-R2 are recognised
by their fields and converted to Video-R1's first. docs/own_data.md has a row of every type.
"""

import json
import logging
import math
import os
import random
import re
import unicodedata
from collections import Counter
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

logger = logging.getLogger(__name__)

PROBLEM_TYPES = ("multiple choice", "numerical", "regression", "free-form", "OCR")

# A video that is missing under its name is looked for with these; SSv2 has .webm for .mp4.
VIDEO_SUFFIXES = ".mp4 .webm .mkv .avi .mov .m4v".split()

# Frames a second of MVBench's folders of frames (TVQA), whose rows do not say it.
MVBENCH_FPS = 3.0

# Fields of a row that have their own place in an Example; all others go to `extra`.
FIELDS = """problem_id problem options problem_type solution data_type media process grounding
    evidence""".split()

# Fields that no prompt shows, the last four but for a medium (a rate: for a folder of frames); a
# data set that has them is told so.
UNUSED = "subtitle key_frame temporal_captions path start end fps".split()

# What a demonstration or solution cut short, or without its first tag, leaves inside.
TAG = re.compile(r"</?(?:think|answer)>")

# Half of a character: JSON can hold it, but no tokenizer and no file accepts it.
SURROGATE = re.compile(r"[\ud800-\udfff]")

# Our own wording for all types; --prompt_template FILE replaces it.
PROMPT_TEMPLATE = """{question}
{instruction}"""

INSTRUCTIONS = {
    "several letters": "Think inside <think></think>, then answer with the letters of all right "
    "options, joined by commas, inside <answer></answer>.",
    "multiple choice": "Think inside <think></think>, then answer with one letter inside "
    "<answer></answer>.",
    "numerical": "Think inside <think></think>, then answer with a number inside "
    "<answer></answer>.",
    "regression": "Think inside <think></think>, then answer with a number inside "
    "<answer></answer>.",
    "free-form": "Think inside <think></think>, then answer in words inside <answer></answer>.",
    "OCR": "Think inside <think></think>, then answer with the text inside <answer></answer>.",
}


class DataError(ValueError):
    """Bad input that a user can correct: commands print the message alone and exit with 2."""


class MediaError(DataError):
    """An image or video that cannot be decoded: skipped, counted and named, never replaced."""


class Cues(NamedTuple):
    """What prior.py reads from a video or an image itself; worker processes return it."""

    frames: list  # (K,) indices in the video
    times: list  # (K,) seconds
    scene_scores: list  # (K,); empty for an image
    pixels: object  # (K, 3, h, w) float32 array for CLIP, or None


@dataclass
class Prior:
    """Consensus prior of one question: a row of a priors file, with its keys in their order.

    prior.py writes and checks it.
    """

    problem_id: str
    _: KW_ONLY
    question: str | None = None
    media: str | None = None  # path as the data set writes it
    span: list = field(default_factory=lambda: [None, None])  # Example.span
    frames: list[int]  # (K,) indices in the video, ascending
    times: list[float]  # (K,) seconds
    scene_scores: list[float] = field(default_factory=list)  # (K,)
    semantic_scores: list[float] = field(default_factory=list)  # (K,)
    scene: list[int] = field(default_factory=list)  # positions among the K frames, S_scene of Eq. 1
    semantic: list[int] = field(default_factory=list)  # positions of S_sem of Eq. 1
    prior: list[float] = field(default_factory=list)  # (K,) P of Eq. 2, sums to 1
    settings: dict = field(default_factory=dict)  # PriorSettings that made it


@dataclass(frozen=True)
class Medium:
    """A video or a picture that a question shows."""

    kind: str  # "video" or "image"
    path: str  # absolute; of a file, or of a folder that holds a video's frames
    fps: float | None = None  # of a folder of frames
    start: float | None = None  # seconds; the part of a video that is shown
    end: float | None = None


@dataclass
class Example:
    """One question of a data set."""

    id: str  # problem_id of the row, else its position in the file
    question: str
    options: list[str]  # "A. red", "B. blue"
    problem_type: str  # one of PROBLEM_TYPES
    answer: str  # the solution without tags; letters of the right options, "A" or "A,C"
    media: list[Medium] = field(default_factory=list)  # in the prompt's order; one video at most
    reasoning: str = ""  # text of the think block of a demonstration
    grounding: list[tuple[float, float, str]] = field(default_factory=list)  # start s, end s, text
    evidence: list[tuple[float, float]] = field(default_factory=list)  # (start s, end s)
    # path and the row's other fields; also multi_answer and inverted_from, which we add
    extra: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what is not as the row says

    @property
    def video(self):
        """The Medium that is a video, or None."""
        return next((medium for medium in self.media if medium.kind == "video"), None)

    @property
    def span(self):
        """[start, end] in seconds of the part of the video that is shown; None: the video's."""
        return [self.video.start, self.video.end] if self.video else [None, None]

    @property
    def medium(self):
        """The Medium that priors are about: the video, else the first picture, else None."""
        return self.video or next(iter(self.media), None)

    @property
    def media_type(self):
        """Kind of the medium, "video" or "image"; "text" without one."""
        return self.medium.kind if self.media else "text"

    @property
    def path(self):
        """Path of the medium, which messages name; "" for text."""
        return self.medium.path if self.media else ""


# ------------------------------------------------------------------------------------ text


def first_words(error):
    """First line of an error, at most 160 characters, without decord's times and source paths."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^(\[[^]]*\]\s*|\S*\.(cc|h):\d+:\s*)*", "", line)[:160]


def strip_tag(text, tag):
    """Text inside the first <tag>...</tag> block, or the whole text without one."""
    match = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    if match:
        text = match[1]
    return text.strip()


def parse_time(text):
    """'MM:SS' or 'HH:MM:SS' -> seconds."""
    seconds = 0.0
    for part in text.strip().split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


# --------------------------------------------------------------------- options and choices

# "A. x", "(A) x", "A) x", "A: x", but not "U.S. flag"
LETTERED = re.compile(r"\(?([A-Z])(?:[.:]|\)[.:]?)(?![A-Z]\.)\s*(.*)", re.DOTALL)


def add_letters(texts):
    """["red", "blue"] -> ["A. red", "B. blue"]."""
    return [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, texts, strict=False)]


def split_options(text):
    """Cut a question with one lettered option a line, "Why?\\nA. x\\n(B) y".

    Returns:
        The question, and the options as ["A. x", "B. y"]. Letters that are out of order start no
        option.
    """
    question = []
    options = []
    for line in text.strip().split("\n"):
        # Only the next letter starts an option; other lines continue the last one.
        match = re.match(r"\(?([A-Z])[.)]\s*(.*)", line.strip())
        if match and ascii_uppercase.index(match[1]) == len(options):
            options.append(f"{match[1]}. {match[2]}")
        elif options:
            options[-1] += f"\n{line}"
        else:
            question.append(line)
    return "\n".join(question).strip(), options


def option_texts(options):
    """Options such as "A. x", "(A) x" or bare "x" -> {letter: text}.

    An option without a letter gets that of its position.
    """
    texts = {}
    for index, option in enumerate(options):
        letter = chr(ord("A") + index)
        match = LETTERED.fullmatch(option.strip())
        if match:
            letter, option = match.groups()
        texts[letter] = option.strip()
    return texts


def with_letters(options):
    """Letter the options if none of them has a letter: the prompt asks for one."""
    if any(LETTERED.fullmatch(option.strip()) for option in options):
        return options
    return add_letters(option.strip() for option in options)


# Typography and markup that do not change what a text says: (pattern, what it becomes).
MARKUP = (
    (r"[\u2010-\u2015\u2212]", "-"),
    # NFKC would make 11/2 of 1½ and 102 of 10².
    (r"(?<=\d)(?=[¼-¾⅐-⅞])", " "),
    ("[²³¹⁰⁴-⁹]+", r"^\g<0>"),
    (r"[\u2018\u2019]", "'"),
    (r"[\u201c\u201d]", '"'),
    (r"<\|[^<>|]{1,30}\|>|</?(?:s|b|i|em|strong)>", ""),  # special tokens, HTML
    (r"\\[dt]?frac\s?{([^{}]*)}\s?{([^{}]*)}", r"\1/\2"),
    (r"\\(?:boxed|text\w*|math\w*|left|right|[,;:! ])|[{}`]|__|(?m:^#{1,6}\s)", ""),
    (r"\$([^$]*)\$", r"\1"),
    (r"(?<!\d)\*+|\*+(?!\d)", ""),
    (r"\^?\\(?:circ|degree)", "°"),
    (r"\\(?=\W)", ""),
)


@lru_cache(maxsize=4096)
def clean_text(text):
    """A text without markup (Markdown, LaTeX), and in the usual characters: Unicode's NFKC."""
    for pattern, plain in MARKUP:
        text = re.sub(pattern, plain, text)
    return unicodedata.normalize("NFKC", text).strip()


def plain_text(text):
    """The text of an option without markup, case, extra white space and punctuation around it."""
    words = clean_text(text).split()
    return " ".join(words).lower().strip("\"'()[] ").rstrip(".;:!?。\"' ")


# Words before an answer: "So the final answer is: ...", "I choose option ...", "x = ...".
LEAD = re.compile(
    r"""\A(?:(?:so|thus|hence|therefore|then|the|my|final|best|correct|right|most|likely|answer|ans
    |solution|result|option|choice|letter|number|value|is|it's|it|that|would|be|i|choose|pick
    |select|think|believe|about|approximately|approx|around|roughly|nearly|almost|[a-z](?=\s*=))\b
    |答案[是为]?|[\s:=,~≈]|\.\s)+""",
    re.VERBOSE | re.IGNORECASE,
)
STATED = re.compile(
    r"(?<!wrong )(?<!incorrect )(?<!not )(?<!\bno )(?<!doubt that the )"
    r"\banswer(?:\s+is\b|\s*[:=])|答案[是为:]",
    re.IGNORECASE,
)


def read_alone(text, read):
    """Read what a text says where it stands alone: with or without a lead-in, the whole, the first
    line, the last line, or the line behind the last "answer is".

    Args:
        read: function of a text without markup; None for what it cannot read.
    Returns:
        What `read` found; None for nothing, or where two places disagree.
    """
    text = clean_text(text)
    lines = text.splitlines() or [""]
    stated = STATED.split(text)[-1].strip(": \n").partition("\n")[0]
    found = set()
    for phrase in (text, lines[0], lines[-1], stated):
        value = read(phrase)
        if value is None:
            value = read(LEAD.sub("", phrase))
        found.add(value)
    found.discard(None)
    return found.pop() if len(found) == 1 else None


# A letter, what sets it off, and what follows: "(B) blue", "B. blue", "B - blue", "b is right".
CHOICE = re.compile(r"(?s)[(\[\"]?([A-Za-z])(?![\w'])([)\].:\"]*)(?![A-Z]\.)(?:[\s,=-]+\b)?(.*)")
RIGHT = re.compile("is (the )?(correct|right|best|final|most likely)? ?(answer|option|choice)?")
# Another letter behind the first, or words that take it back: "A. red or C", "B. not (A)", "(A) is
# wrong", "B. Wait, C".
RIVAL = re.compile(
    r"\b(?:or|and|not|nor)\s+\(?[A-Z]\b(?!\s[a-z])|\([A-Z]\)|\b[A-Z][).:](?!\w)|^\W*[A-Z]\W*$"
    r"|^\W*(?:(?:is|seems|looks)\s+)?(?:wrong|incorrect|false|not)\b|\b(?:[Ww]ait|maybe|vs)\b"
)
# A line that begins with an option's letter.
LISTED = re.compile(r"^\W*([A-Z])[).:]\s", re.MULTILINE)


def read_option(text, known):
    """Letter of the option that a text is, "" for none or several.

    Args:
        known: {letter: plain_text of the option}.
    """
    choice = CHOICE.fullmatch(text)
    if choice:
        letter = choice[1].upper()
        rest = plain_text(choice[3])
        if not rest or RIGHT.fullmatch(rest):
            return letter
    words = plain_text(text)
    same = [letter for letter, option in known.items() if option == words != ""]
    if same or not choice:
        return same[0] if len(same) == 1 else ""
    # A letter with another option's text names neither; "a dog" and "A dog" are no letters.
    rival = RIVAL.search(choice[3]) or any(f" or {text}" in rest for text in known.values() if text)
    clear = choice[1].isupper() and choice[2] and not rival
    if known.get(letter) == rest or (clear and rest not in known.values()):
        return letter
    return ""


def read_choices(answer, options=()):
    """Find the options that an answer names.

    "B", "(b)", "**B**", "B. blue", "B blue", "blue", "Answer: B", "Option B is correct" name the
    option "B. blue"; "A, C" and "A and C" name two. "a dog", "Cannot tell" and "A or C" name none.

    Returns:
        Letters without repeats; () for none, or where two places disagree (see read_alone).
    """
    known = {letter: plain_text(text) for letter, text in option_texts(options).items()}
    # A list of options names none of them, but where the answer is stated besides.
    if len(set(LISTED.findall(clean_text(answer)))) > 1:
        _, *stated = STATED.split(answer)
        answer = stated[-1] if stated else ""

    def read(text):
        for parts in ([text], re.split(r"\s*(?:[,;&、]|\band\b)\s*", text)):
            letters = [read_option(part, known) for part in parts]
            if all(letters):
                return tuple(dict.fromkeys(letters))
        return None

    return read_alone(answer, read) or ()


def read_choice(answer, options=()):
    """Letter of the one option that an answer names (see read_choices), "" for none or several."""
    letters = read_choices(answer, options)
    return letters[0] if len(letters) == 1 else ""


def solution_letters(solution, options):
    """Read the solution of a multiple-choice question, as read_choices does.

    "(A)", "A.", "a", "A. red", "(A) red" and "red" are A where "A. red" is an option; "A, C" and
    "(A), (C)" are A,C. Without options (they may stand in the question) every letter is valid.

    Returns:
        Letters joined by commas; None for a solution that names no option, or more than one.
    """
    known = option_texts(options)
    # "A" is a letter where options have letters; else it may be the text of another option.
    if solution in known and with_letters(options) == options:
        return solution
    letters = read_choices(solution, options)
    words = plain_text(solution)
    same = {letter for letter, text in known.items() if plain_text(text) == words}
    # The text of another option than its letter says, or the letter of none.
    if (same and same != set(letters)) or not set(letters) <= set(known or ascii_uppercase):
        return None
    return ",".join(letters) or None


def cut_options(question, options):
    """The question without lines at its end that repeat its options, such as "A red"."""
    lines = question.strip().split("\n")
    begin = len(lines) - len(options)
    repeated = [line.partition(" ")[2].strip() for line in lines[begin:]]
    if 0 < begin < len(lines) and repeated == list(option_texts(options).values()):
        question = "\n".join(lines[:begin])
    return question


# -------------------------------------------------------------------- rows of other projects


def list_of(row, name):
    """A field that must be a list: the letters of a text would be taken for its entries."""
    if not isinstance(row[name], list):
        raise DataError(f"has {name} that is not a list")
    return row[name]


def from_tw_grpo(row):
    """TW-GRPO: option lines in the problem, letters joined by commas, `glue` for the evidence.

    NExT-GQA before its conversion has question, options and answer instead, MVBench's own files
    have candidates without letters and the text of the right one.
    """
    question = row["problem"] if "problem" in row else row["question"]
    options = row.get("options")
    solution = row.get("answer")
    kind = "video"
    if "candidates" in row:
        texts = list_of(row, "candidates")
        # By the text alone: a candidate may be a single letter.
        count = texts.count(solution)
        if count != 1:
            raise DataError(f"has its answer {solution!r} {count} times among its candidates")
        options = add_letters(texts)
        solution = ascii_uppercase[texts.index(solution)]
        kind = "frame"  # a video that is a folder holds frames
    elif not options:
        question, options = split_options(question)
    return {
        "data_type": kind,
        "problem_type": "multiple choice",
        "evidence": row.get("glue"),
        "solution": solution,
        **row,
        "problem": question,
        "options": options,
        "path": row["video"].lstrip("/"),
    }


def from_seed_bench(row):
    """SEED-Bench-R1: its validation files list choice_a to choice_d, its training file does not.

    A training row gets its answer and three of its negative_answers as options, shuffled once.
    Shown are the video of the task so far, if there is one, and the picture of the current
    observation.
    """
    if "golden_choice_idx" in row:
        texts = [row[f"choice_{name}"] for name in "abcd"]
        letter = row["golden_choice_idx"]
    else:
        # Seeded with the row's id: the same options in every run and on every rank.
        rng = random.Random(str(row["sample_id"]))
        texts = [row["answer"], *rng.sample(list_of(row, "negative_answers"), 3)]
        if row["answer"] in texts[1:]:
            raise DataError("has its answer among its negative_answers")
        rng.shuffle(texts)
        letter = ascii_uppercase[texts.index(row["answer"])]
    # With a letter before it, null would be a text.
    if any(map(is_empty, texts)):
        raise DataError("has an empty problem or option")
    # The question is asked in the middle of a task, seen in a video so far.
    source = row["video_source"]
    video = {"data_type": "video", "path": f"videos/{source}/{row['video_basename']}"}
    picture = f"images/{source}/{row['current_observation_basename']}"
    media = [video] if row["task_progress_metadata"] else []
    return {
        **row,
        "problem": row["question"],
        "problem_type": "multiple choice",
        "solution": letter,
        "options": add_letters(texts),
        "media": [*media, {"data_type": "image", "path": picture}],
    }


def answer_type(answer, options=()):
    """Problem type of a Video-R2 answer, whose rows do not name one."""
    # B, b, (B), B., (B).
    letter = re.fullmatch(r"\(?[A-Za-z](?:[.:]|\)[.:]?)?", answer)
    if letter or LETTERED.fullmatch(answer) or (options and solution_letters(answer, options)):
        return "multiple choice"
    if re.fullmatch(r"-?[\d,]*\.\d{4,}", answer):
        return "regression"
    if re.fullmatch(r"-?[\d,]*\.?\d+", answer):
        return "numerical"
    return "OCR" if len(answer.split()) <= 5 else "free-form"


def from_video_r2(row):
    """Video-R2: `video` and `image` (a path or a list of paths) and a conversation of two turns,
    the second with think and answer blocks."""
    user, assistant = (turn["value"] for turn in row["conversations"])
    media = []
    for kind in ("video", "image"):
        paths = row.get(kind) or []
        if not isinstance(paths, list):
            paths = [paths]
        media += [{"data_type": kind, "path": path} for path in paths]
    order = re.findall("<(video|image)>", user)
    if len(order) > len(media):
        raise DataError(f"shows {len(order)} media in its text, and has paths of {len(media)}")
    # The placeholders tell where the one video stands, if every medium has one.
    if "video" in order and sorted(order) == sorted(part["data_type"] for part in media):
        media.insert(order.index("video"), media.pop(0))
    # The placeholders of the prompt are the chat template's to add.
    question, options = split_options(re.sub(r"<(video|image)>\n?", "", user))
    answer = strip_tag(assistant, "answer")
    return {
        **row,
        "problem": question,
        "options": options,
        "solution": answer,
        "process": assistant if "<think>" in assistant else "",
        "problem_type": answer_type(answer, options),
        "media": media,
        "grounding": row.get("temporal_grounding"),
    }


def to_video_r1(row):
    """Convert a row of any supported format to Video-R1's; its other fields stay in it."""
    if "conversations" in row:
        return from_video_r2(row)
    if "task_progress_metadata" in row:
        return from_seed_bench(row)
    if "video" in row and "path" not in row:
        return from_tw_grpo(row)
    return row


# ------------------------------------------------------------------------- rows -> examples


def row_id(row, index):
    """Name of a row in every output: problem_id (SEED-Bench-R1: sample_id), else its index."""
    for name in ("sample_id", "problem_id"):
        if row.get(name) is not None:
            index = row[name]
    # A lone surrogate cannot be printed.
    return str(index).encode(errors="backslashreplace").decode()


def resolve_media(path, media_root, owner):
    """Absolute path of a medium.

    Args:
        path: as the data set writes it.
        media_root: folder that it starts from.
        owner: subject of the error message.
    Raises:
        DataError: the path leaves media_root (by ".." or an absolute path; links are the user's).
    """
    root = os.path.abspath(media_root)
    if os.path.isabs(path) or ".." in Path(path).parts:
        raise DataError(f"{owner} points outside the media root {root}: {path}")
    full = os.path.normpath(os.path.join(root, path))
    stem, suffix = os.path.splitext(full)
    if suffix.lower() in VIDEO_SUFFIXES and not os.path.exists(full):
        for other in VIDEO_SUFFIXES:
            if os.path.exists(stem + other):
                return stem + other
    return full


def is_empty(value):
    """Whether it is None, blank or NaN, as tables write an empty cell, or an empty list."""
    return value in (None, []) or str(value).strip().lower() in ("", "nan")


def read_number(part, name):
    """A field as float; None if it is empty."""
    value = part.get(name)
    try:
        # As text, since float(True) would be a second.
        return None if is_empty(value) else float(str(value))
    except ValueError as error:
        raise DataError(f"has {name} {value!r}, which is not a number") from error


def note_unused(part, medium, notes):
    """Adds to a row's notes which fields of it, or of a part of it, no prompt shows."""
    for name in UNUSED:
        if not is_empty(part.get(name)) and getattr(medium, name, None) is None:
            notes.append(f"rows have {name}, which no prompt shows")


def read_medium(part, media_root, notes):
    """The Medium that a row is about, or an entry of its field media."""
    kind = part.get("data_type")
    path = part.get("path")
    fps = read_number(part, "fps")
    # MVBench's word for a folder of frames.
    if kind == "frame":
        kind = "video"
        fps = MVBENCH_FPS if fps is None else fps
    if kind not in ("video", "image"):
        raise DataError(f"has data_type {kind!r}; known are video, image, text")
    if not path:
        raise DataError(f"has no {kind}: its path is empty")
    if not isinstance(path, str) or "\0" in path:
        raise DataError(f"has {path!r}, which is not a path")
    full = resolve_media(path, media_root, "has a path that")
    suffix = os.path.splitext(full)[1]
    if not path.endswith(suffix):
        notes.append(f"videos are there as {suffix} alone, which is taken")
    medium = Medium(kind, full)
    if kind == "video":
        start = read_number(part, "start")
        end = read_number(part, "end")
        if not 0 <= (start or 0) < (math.inf if end is None else end):
            raise DataError(f"has a video that starts at {start} s and ends at {end} s")
        if not os.path.isdir(full):
            fps = None
        elif fps is not None and not 0 < fps < math.inf:
            raise DataError(f"has {fps} frames a second")
        medium = Medium(kind, full, fps, start, end)
    note_unused(part, medium, notes)
    return medium


def read_media(row, media_root, notes):
    """The media of a row, list of Medium in the order of the prompt.

    Args:
        notes: list that gets what is not as the row says.
    """
    parts = row.get("media")
    # An empty list beside a path is a column that other rows fill.
    if parts is None or (parts == [] and row.get("path")):
        parts = [] if row["data_type"] == "text" else [row]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise DataError("media must be a list of objects with data_type and path")
    media = [read_medium(part, media_root, notes) for part in parts]
    if row not in parts:
        note_unused(row, None, notes)
    videos = sum(medium.kind == "video" for medium in media)
    if videos > 1:
        raise DataError(f"has {videos} videos; one is supported")
    return media


def read_solution(row, options):
    """The solution of a row as the rewards compare it: letters for a multiple-choice question."""
    solution = row["solution"]
    # JSON can hold NaN and Infinity.
    finite = not isinstance(solution, float) or math.isfinite(solution)
    if not isinstance(solution, str | int | float) or not finite:
        raise DataError(f"has a solution that is neither text nor number: {solution!r}")
    answer = strip_tag(str(solution), "answer")
    if is_empty(answer):
        raise DataError(f"has an empty solution {answer}")
    if TAG.search(answer):
        raise DataError(f"has a think or answer tag inside its solution: {answer[:60]!r}")
    if row["problem_type"] in ("numerical", "regression"):
        try:
            finite = math.isfinite(float(answer.replace(",", "")))
        except ValueError:
            finite = False
        if not finite:
            raise DataError(f"has the solution {answer[:60]!r}, which is not a number")
    if row["problem_type"] != "multiple choice":
        return answer
    if len(options) > len(ascii_uppercase):
        raise DataError(f"has {len(options)} options, more than there are letters")
    if len(option_texts(options)) < len(options):
        raise DataError(f"has two options of one letter: {options}")
    letters = solution_letters(answer, options)
    if letters is None:
        known = ", ".join(option_texts(options) or ascii_uppercase)
        raise DataError(
            f"solution {answer[:60]!r} names none of the options {known}, or more than one"
        )
    return letters


def read_times(row, notes):
    """Grounding [(start s, end s, sentence), ...] and evidence [(start s, end s), ...] of a row.

    Null sentences are left out, each with a note.
    """
    grounding = []
    try:
        spans = row.get("grounding") or {}
        if isinstance(spans, str):
            spans = json.loads(spans)
        for span, sentence in spans.items():
            if is_empty(sentence):
                notes.append("sentences of grounding are null and left out")
                continue
            ends = re.split(r"\s*(?:[-–—]|\bto\b)\s*", span.strip(), maxsplit=1)
            # "00:04" alone is a moment.
            grounding.append((parse_time(ends[0]), parse_time(ends[-1]), str(sentence)))
        evidence = []
        for interval in row.get("evidence") or []:
            if not isinstance(interval, list):
                raise TypeError(f"{interval!r} is no list")
            start, end = map(float, interval)
            evidence.append((start, end))
        for start, end, *_ in grounding + evidence:
            if not start <= end < math.inf:
                raise ValueError(f"an interval ends before it starts, {start} to {end} s")
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f'grounding must be {{"MM:SS-MM:SS": sentence}}, evidence [[start, end], ...] ({error})'
        ) from error
    return grounding, evidence


def read_example(row, index, media_root):
    """A row in Video-R1's format -> Example. DataError says what is wrong, not in which row."""
    needed = ["problem", "problem_type", "solution"]
    if row.get("media") is None:
        needed.append("data_type")
    missing = [name for name in needed if row.get(name) in (None, "")]
    if missing:
        raise DataError(f"has no {', '.join(missing)}")
    kind = row["problem_type"]
    if kind not in PROBLEM_TYPES:
        raise DataError(f"has problem_type {kind!r}; known are {', '.join(PROBLEM_TYPES)}")
    # Checked before anything is printed, hashed or tokenized.
    for name in ("problem", "options", "process", "solution", "path", "media"):
        if SURROGATE.search(json.dumps(row.get(name), ensure_ascii=False)):
            raise DataError(f"has no valid Unicode in {name} (a lone surrogate)")

    options = row.get("options") or []
    process = row.get("process") or ""
    if not isinstance(options, list) or not isinstance(process, str):
        raise DataError("options must be a list and process a text")
    for text in (row["problem"], *options):
        if not isinstance(text, str | int | float):
            raise DataError(f"has a problem or option that is no text: {text!r}")
    options = [str(option) for option in options]
    if any(map(is_empty, [row["problem"], *options])):
        raise DataError("has an empty problem or option")
    notes = []
    reasoning = strip_tag(process, "think")
    if TAG.search(reasoning):
        notes.append("rows have a think or answer tag inside their process, which is left out")
        reasoning = ""
    media = read_media(row, media_root, notes)
    answer = read_solution(row, options)
    grounding, evidence = read_times(row, notes)
    example = Example(
        id=row_id(row, index),
        question=cut_options(str(row["problem"]), options),
        options=with_letters(options) if kind == "multiple choice" else options,
        problem_type=kind,
        answer=answer,
        media=media,
        reasoning=reasoning,
        grounding=grounding,
        evidence=evidence,
        extra={name: value for name, value in row.items() if name not in FIELDS},
        notes=notes,
    )
    # The name of the medium in the files that we write.
    if row.get("media"):
        example.extra["path"] = row["media"][media.index(example.medium)]["path"]
    return example


def parse_example(row, index, media_root):
    """Read one row of a data set, in any of the supported formats.

    Args:
        row: what the file has at this position.
        index: the position, which names a row without problem_id.
        media_root: folder that its path starts from.
    Returns:
        Example.
    Raises:
        DataError: names the row and what is wrong with it.
    """
    if not isinstance(row, dict):
        raise DataError(f"row {index} is not an object")
    name = f"row {index} (problem_id {row_id(row, 'missing')})"
    try:
        return read_example(to_video_r1(row), index, media_root)
    except DataError as error:
        raise DataError(f"{name} {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{name} lacks a field of its format, or has it in another shape "
            f"({type(error).__name__}: {error})"
        ) from error


def read_document(path, kind="file"):
    """Parse a JSON document, or JSON lines (into a list), which may be named .json, too.

    Args:
        kind: what the file is, for messages.
    Raises:
        DataError: the file is missing or malformed.
    """
    if not Path(path).is_file():
        raise DataError(
            f"{kind} {path} not found, or a folder (a JSON or JSON lines file is expected)"
        )
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # with a byte order mark or without
        if Path(path).suffix == ".jsonl" or re.match(r"\s*{.*}\s*\n\s*{", text):
            # An array of all lines, so that an error names the line. str.splitlines would also
            # split at U+2028, which a JSON string may hold.
            lines = filter(str.strip, text.split("\n"))
            text = "[" + ",\n".join(lines) + "]"
        return json.loads(text)
    except (RecursionError, ValueError) as error:  # too deep, not JSON, or not UTF-8
        raise DataError(f"{kind} {path} is not valid JSON: {error}") from error


def differences(examples):
    """What is not as the rows of a data set say, and how often: Counter."""
    return Counter(chain.from_iterable(example.notes for example in examples))


def load_examples(dataset_name, media_root=None, errors=None):
    """Read a data set file.

    Args:
        dataset_name: path of the file.
        media_root: folder that the rows' paths start from; default: the folder of the file.
        errors: list that collects {"problem_id", "media", "cause"} of every unusable row: one that
            is malformed, leaves the media root, or repeats the problem_id of an earlier row.
    Returns:
        List of Example, in the order of the file.
    Raises:
        DataError: the file is missing, malformed or empty, or a row is unusable and `errors` is
            None.
    """
    rows = read_document(dataset_name, "data set")
    if not isinstance(rows, list) or not rows:
        raise DataError(
            f"data set {dataset_name} holds no examples (a non-empty JSON array is expected)"
        )
    examples = []
    first_rows = {}  # id -> index of the row that has it
    for index, row in enumerate(rows):
        try:
            example = parse_example(row, index, media_root or Path(dataset_name).parent)
            # Priors and results are joined by id.
            first = first_rows.setdefault(example.id, index)
            if first != index:
                raise DataError(
                    f"row {index} repeats the problem_id {example.id} of row {first}; "
                    "results are joined by it"
                )
            examples.append(example)
        except DataError as error:
            if errors is None:
                raise DataError(f"data set {dataset_name}: {error}") from error
            fields = row if isinstance(row, dict) else {}
            medium = fields.get("path") or fields.get("video")
            name = row_id(fields, index)
            errors.append({"problem_id": name, "media": medium, "cause": str(error)})

    # Every rank reads the file.
    for words, count in differences(examples).items():
        if os.environ.get("RANK", "0") == "0":
            logger.warning("%s: %d %s", dataset_name, count, words)
    # If one question of the file has several right options, the prompts of all others ask for
    # "all right options" too, since the wording must not give away how many are right.
    choices = [example for example in examples if example.problem_type == "multiple choice"]
    if any("," in example.answer for example in choices):
        for example in choices:
            example.extra["multi_answer"] = True
    return examples


def typed_example(question, options=None, video=None, images=None, answer=None):
    """A question of a command line as an Example.

    Args:
        options: with letters or without; with some it is multiple choice, else free-form.
        video, images: paths.
        answer: the solution, if it is known.
    Raises:
        DataError: the solution is none of this kind.
    """
    media = [Medium("video", os.path.abspath(video))] if video else []
    media += [Medium("image", os.path.abspath(path)) for path in images or []]
    options = with_letters(options or [])
    kind = "multiple choice" if options else "free-form"
    if answer:
        answer = read_solution({"problem_type": kind, "solution": answer}, options)
    return Example("0", question, options, kind, answer or "", media)


# -------------------------------------------------------------- question-answer inversion

ASK_FOR_WRONG = "Which of these is not a right answer to this question: "

NEGATIVE = re.compile(
    r"\b(not|cannot|never|no|none|neither|nor|nobody|nothing|except|false|wrong|incorrect|unlikely)"
    r"\b|n['’]t\b",
    re.I,
)

# A question word with its auxiliary: "Which ball will", "Who is". The lookaheads exclude full
# verbs: "Which person does a handstand", "Who did the dishes".
AUXILIARY = re.compile(
    r"(?:^|[,.:;?!]\s+)(?:"
    r"(?:(?:what|which)(?: of (?:the following|these)(?: \w+)?| \w+(?<!s)(?<!ed))?"
    r"|who|where|when) "
    r"(is|are|was|were|will|would)(?! (?:do|does|did|is|are|was|were)\b)"
    r"|(?:what|which|where|when) (do|does|did)"
    r"(?= (?:the|an?|this|that|these|those|his|her|their|its|he|she|it|they|people)\b)) ",
    re.I,
)

# A further clause, which might get the negation instead.
CLAUSE = re.compile(
    r"[,.:;?!].|\b(and|or|but) "
    r"(what|which|who|where|when|why|how|is|are|was|were|will|do|does|did)\b",
    re.I,
)

# Options that depend on other options, or name them by a letter, which inversion changes.
ABOUT_OPTIONS = re.compile(
    r"\b(all|both|neither|none|either|any|each|every\w*|nothing|nobody|above|following|only"
    r"|options?|choices?|least|most|more|less|fewer)\b"
    r"|\b[A-H] ?(and|or|,|&|/) ?[A-H]\b|^[A-H]$"
    r"|\b(cannot|can['’]t|not) |insufficient|unknown|unclear|undetermined|uncertain",
    re.I,
)


def negate_question(question):
    """Turn a question into one that its wrong options answer.

    A question of one clause that starts with what, which, who, where or when and an auxiliary gets
    a negated auxiliary: "Which ball will fall?" -> "Which ball won't fall?". All others follow
    "Which of these is not a right answer to this question:", since a negation would be wrong or
    ambiguous: how and why (they would ask something else), a leading auxiliary ("Isn't he tall?"
    negates nothing), a full verb ("What falls first?"), must, should, can and could (they would
    become a ban or an impossibility), and questions of several clauses.

    Returns:
        The new question; None when the question has a negation already.
    """
    if NEGATIVE.search(question):
        return None
    match = AUXILIARY.search(question)
    if match is None or CLAUSE.search(question, match.end()):
        return ASK_FOR_WRONG + question
    auxiliary = match[1] or match[2]
    negated = "won't" if auxiliary.lower() == "will" else f"{auxiliary}n't"
    end = match.end() - 1  # the match ends with a space
    return question[: end - len(auxiliary)] + negated + question[end:]


def invert_question(example, rng):
    """Question-answer inversion of TW-GRPO (arXiv 2505.24718) for a multiple-choice question.

    The question is negated, the right option becomes the wrong one, a random number (at least 1)
    of the wrong options become the right ones, and the others are dropped. The options are shuffled
    and lettered anew. The reasoning argued for the old answer and is dropped. The id stays, since
    medium, prior and evidence are the same.

    Args:
        example: Example.
        rng: random.Random.
    Returns:
        A new Example; None if this one cannot be inverted.
    """
    question = negate_question(example.question)
    # Letters of options inside the question would name the wrong options afterwards.
    lettered_inside = re.search(r"\b[A-H][.)]\s", example.question)
    if example.problem_type != "multiple choice" or question is None or lettered_inside:
        return None
    if not all(map(LETTERED.fullmatch, example.options)):
        return None
    texts = option_texts(example.options)
    if any(map(ABOUT_OPTIONS.search, texts.values())):
        return None
    # One right option, at least one wrong one, no two alike.
    distinct = set(map(str.lower, texts.values()))
    if example.answer not in texts or not 2 <= len(example.options) == len(distinct):
        return None
    # Draws: how many right options, which, and their order with the wrong one.
    wrong = texts.pop(example.answer)
    right = rng.sample(list(texts.values()), rng.randint(1, len(texts)))
    shuffled = rng.sample([wrong, *right], 1 + len(right))
    letters = list(ascii_uppercase[: len(shuffled)])
    del letters[shuffled.index(wrong)]
    return replace(
        example,
        question=question,
        reasoning="",
        extra={**example.extra, "multi_answer": True, "inverted_from": example.question},
        options=add_letters(shuffled),
        answer=",".join(letters),
    )


# ---------------------------------------------------------------------------------- prompts


def read_template(path):
    """Wording of --prompt_template; our own when `path` is None.

    Returns:
        text, or the {problem type: text} of a .json file.
    """
    if path is None:
        return PROMPT_TEMPLATE
    if not Path(path).is_file():
        raise DataError(f"prompt template {path} not found")
    try:
        template = Path(path).read_text(encoding="utf-8-sig")
        texts = dict.fromkeys(INSTRUCTIONS, template)
        if Path(path).suffix == ".json":
            template = texts = dict(json.loads(template))
    except (TypeError, ValueError) as error:
        raise DataError(
            f"prompt template {path} is not UTF-8, or not a JSON object: {error}"
        ) from error
    for kind in INSTRUCTIONS:
        if kind not in texts:
            raise DataError(f"prompt template {path} lacks the problem type {kind}")
        names = set(re.findall(r"{(.*?)}", str(texts[kind])))
        if "question" not in names or names - {"question", "options", "instruction"}:
            raise DataError(
                f"prompt template {path}, {kind}: {{question}} must be in it, {{options}} and "
                "{instruction} may, no other braces"
            )
    return template


def build_prompt(example, template=PROMPT_TEMPLATE):
    """Text of the user's turn: question, "Options:" with one option a line, instruction.

    Args:
        template: see read_template.
    """
    kind = example.problem_type
    if kind == "multiple choice" and example.extra.get("multi_answer"):
        kind = "several letters"
    if isinstance(template, dict):
        template = template[kind]
    question = example.question
    options = "\n".join(example.options)
    # A template that places the options itself has the question alone.
    if options and "{options}" not in template:
        question += f"\nOptions:\n{options}"
    return template.format(question=question, options=options, instruction=INSTRUCTIONS[kind])


MARK = "\ue000"  # stands for the user's text while the chat template is rendered


@lru_cache(maxsize=64)
def around_text(processor, kinds, system_prompt=None):
    """What the chat template puts before and behind the user's text.

    The text stands apart because its special tokens are tokenized as plain text: a question about
    "<|im_end|>" must not end the turn.

    Args:
        kinds: tuple of the media's, "video" or "image", in the prompt's order.
    Returns:
        [before, after]: `before` ends with the placeholder of the last medium, `after` where the
        assistant's turn begins.
    Raises:
        DataError: the template does not show the user's text exactly once.
    """
    content = [{"type": kind} for kind in kinds]
    content.append({"type": "text", "text": MARK})
    messages = [{"role": "user", "content": content}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    parts = rendered.split(MARK)
    if len(parts) != 2:
        raise DataError(
            f"the checkpoint's chat template shows the user's text {len(parts) - 1} times, not once"
        )
    return parts


def plain_ids(tokenizer, text):
    """Token ids of a text, with special tokens read as ordinary characters."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def target_text(example):
    """Demonstration for SFT: think block, answer block."""
    return f"<think>{example.reasoning}</think><answer>{example.answer}</answer>"
