"""What the stages share: examples and their file formats, video decoding, prompts, batches.

    examples = load_examples("Video-R1-260k.json", media_root="DATA")     # -> list[Example]
    frames, times = decode_frames(examples[0].media, indices)             # decord, RGB uint8

A data set is a JSON array (or JSON lines) in Video-R1's format: problem, problem_type, options, solution, path, data_type and, for
SFT, process. Two optional fields of ours: evidence [[start, end], ...] in seconds and grounding {"00:04-00:08": "sentence"}.
Rows of SEED-Bench-R1, TW-GRPO (CLEVRER, NExT-GQA, STAR) and Video-R2 are told by their fields and rewritten as Video-R1 rows first.
"""

import json
import math
import os
import random
import re
import string
from dataclasses import dataclass, field, replace
from pathlib import Path

PROBLEM_TYPES = ("multiple choice", "numerical", "regression", "free-form", "OCR")

# The project's own wording; --prompt_template FILE replaces it ({question} and {instruction} are filled in).
PROMPT_TEMPLATE = """{question}
{instruction}"""

INSTRUCTIONS = {
    "several letters": "Think inside <think></think>, then answer with the letters of all right options, joined by commas, inside "
    "<answer></answer>.",
    "multiple choice": "Think inside <think></think>, then answer with one letter inside <answer></answer>.",
    "numerical": "Think inside <think></think>, then answer with a number inside <answer></answer>.",
    "regression": "Think inside <think></think>, then answer with a number inside <answer></answer>.",
    "free-form": "Think inside <think></think>, then answer in words inside <answer></answer>.",
    "OCR": "Think inside <think></think>, then answer with the text inside <answer></answer>.",
}


class DataError(ValueError):
    """Bad input that a user can mend; the command lines print the message alone and exit with 2."""


class MediaError(DataError):
    """One image or video that cannot be decoded: skipped, counted and named, never replaced."""


def first_words(error):
    """The sentence in a decord message, which comes wrapped in times and source paths and with a C++ stack trace behind it."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^(\[[^]]*\]\s*|\S*\.(cc|h):\d+:\s*)*", "", line)[:160]


@dataclass
class Prior:
    """The consensus prior of one question: a row of a priors file (prior.py writes and checks it)."""

    problem_id: str
    frames: list[int]  # (K,) indices in the video, ascending
    times: list[float]  # (K,) seconds
    prior: list[float]  # (K,) P of Eq. 2, sums to 1
    question: str | None = None
    media: str | None = None  # as the data set names it
    scene_scores: list[float] = field(default_factory=list)  # (K,)
    semantic_scores: list[float] = field(default_factory=list)  # (K,)
    scene: list[int] = field(default_factory=list)  # positions among the K frames, S_scene of Eq. 1
    semantic: list[int] = field(default_factory=list)  # the same, S_sem of Eq. 1
    settings: dict = field(default_factory=dict)  # PriorSettings that made it

    def __getitem__(self, name):  # TO GO: access as a dict
        return getattr(self, name)

    def get(self, name, default=None):  # TO GO
        value = getattr(self, name, None)
        return default if value is None else value

    def __contains__(self, name):  # TO GO
        return getattr(self, name, None) is not None


@dataclass
class Example:
    """One question. `answer` is the bare ground truth, `reasoning` the bare text of a think block ('' when there is none)."""

    id: str
    question: str
    options: list[str]
    problem_type: str
    answer: str
    media: str  # absolute path; '' for a text-only example
    media_type: str  # 'video' | 'image' | 'text'
    reasoning: str = ""
    grounding: list[tuple[float, float, str]] = field(
        default_factory=list
    )  # (start s, end s, sentence)
    evidence: list[tuple[float, float]] = field(
        default_factory=list
    )  # (start s, end s) that the answer rests on
    extra: dict = field(default_factory=dict)  # path, and every other field of the row, untouched


def strip_tag(text, tag):
    """The inside of the first <tag>...</tag> block, or the text itself: solutions come with and without tags."""
    match = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return (match.group(1) if match else text).strip()


def parse_time(text):
    """'MM:SS' or 'HH:MM:SS' -> seconds."""
    seconds = 0.0
    for part in text.strip().split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def split_options(text):
    """A question with lettered option lines, "Why?\\nA. x\\nB. y" or "(A) x" -> the question, the options as "A. x"."""
    question, options = [], []
    for line in text.strip().split("\n"):
        match = re.match(r"\(?([A-Z])[.)]\s*(.*)", line.strip())
        if match and match.group(1) == chr(ord("A") + len(options)):
            options.append(f"{match.group(1)}. {match.group(2)}")
        elif options:
            options[-1] += f"\n{line}"
        else:
            question.append(line)
    return "\n".join(question).strip(), options


def from_tw_grpo(row):
    """TW-GRPO: problem with the option lines in it, solution (letters joined by commas), video; NExT-GQA's `glue` are intervals."""
    question, options = split_options(row["problem"])
    return {
        "data_type": "video",
        "problem_type": "multiple choice",
        "evidence": row.get("glue"),
        **row,
        "problem": question,
        "options": options or row.get("options"),
        "path": row["video"].lstrip("/"),
    }


def from_seed_bench(row):
    """SEED-Bench-R1: the validation files have choice_a to choice_d, the training file answer and three of negative_answers, shuffled once.

    The medium is the task's video, or the picture of the current observation when there is none; the picture's path is kept in `extra`.
    """
    picture = f"images/{row['video_source']}/{row['current_observation_basename']}"
    if "golden_choice_idx" in row:
        texts, letter = [row[f"choice_{name}"] for name in "abcd"], row["golden_choice_idx"]
    else:
        rng = random.Random(
            str(row["sample_id"])
        )  # the same options in every run and on every rank
        texts = [row["answer"], *rng.sample(row["negative_answers"], 3)]
        rng.shuffle(texts)
        letter = "ABCD"[texts.index(row["answer"])]
    video = bool(row["task_progress_metadata"])
    return {
        **row,
        "problem": row["question"],
        "problem_type": "multiple choice",
        "solution": letter,
        "options": [f"{name}. {text}" for name, text in zip("ABCD", texts, strict=True)],
        "data_type": "video" if video else "image",
        "path": f"videos/{row['video_source']}/{row['video_basename']}" if video else picture,
        "current_observation": picture,
    }


def answer_type(answer):
    """Video-R2 names no problem_type: a lone letter is a choice, a number numerical (regression with over three decimals), else words."""
    if re.fullmatch(r"\(?[A-Za-z][.)]?", answer):
        return "multiple choice"
    if re.fullmatch(r"-?[\d,]*\.?\d+", answer):
        return "regression" if len(answer.partition(".")[2]) > 3 else "numerical"
    return "OCR" if len(answer.split()) <= 5 else "free-form"


def from_video_r2(row):
    """Video-R2: a video or image (a path or a list of one), two turns, the second with think and answer blocks, temporal_grounding."""
    media_type = "video" if row.get("video") else "image"
    path = row.get(media_type)
    if isinstance(path, list):
        if len(path) != 1:
            raise DataError(f"has {len(path)} {media_type}s; one is supported")
        path = path[0]
    asked, told = (turn["value"] for turn in row["conversations"])
    question, options = split_options(re.sub(r"<(video|image)>\n?", "", asked))
    answer = strip_tag(told, "answer")
    return {
        **row,
        "problem": question,
        "options": options,
        "solution": answer,
        "process": told if "<think>" in told else "",
        "problem_type": answer_type(answer),
        "data_type": media_type,
        "path": path,
        "grounding": row.get("temporal_grounding"),
    }


def to_video_r1(row):
    """A row of any supported format -> the same in Video-R1's fields; what is not known stays in the row."""
    if "conversations" in row:
        return from_video_r2(row)
    if "task_progress_metadata" in row:
        return from_seed_bench(row)
    return from_tw_grpo(row) if "video" in row and "path" not in row else row


LETTER = r"\(?([A-Za-z])(?:[.:]|\)[.:]?)?"  # B, b, (B), B., (B).

LETTERED = re.compile(
    r"\(?([A-Z])(?:[.:]|\)[.:]?)(?![A-Z]\.)\s*(.*)", re.DOTALL
)  # "A. x", "(A) x", "A) x", "A: x", not "U.S. flag"


def option_texts(options):
    """Options as they come, "A. x", "(A) x" or bare -> {letter: text}; a bare one has the letter of its place."""
    texts = {}
    for index, option in enumerate(options):
        match = LETTERED.fullmatch(option.strip())
        letter, text = match.groups() if match else (chr(ord("A") + index), option)
        texts[letter] = text.strip()
    return texts


def with_letters(options):
    """Options of which none has a letter get one by their place, for the prompt asks for a letter: ["x", "y"] -> ["A. x", "B. y"]."""
    if any(LETTERED.fullmatch(option.strip()) for option in options):
        return options
    return [f"{letter}. {text}" for letter, text in option_texts(options).items()]


def plain_text(text):
    """An option's text without what people write differently: case, white space, full stops at the end."""
    return " ".join(text.split()).rstrip(". ").lower()


def read_choice(answer, options=()):
    """The letter that an answer names, "" for none: "B", "b", "(B)", "B.", "B. car", or an option's text. "a dog" is no letter."""
    letter, lettered = re.fullmatch(LETTER, answer.strip()), LETTERED.fullmatch(answer.strip())
    if letter:
        return letter[1].upper()
    told = plain_text(lettered[2] if lettered else answer)
    named = [name for name, text in option_texts(options).items() if plain_text(text) == told]
    if lettered:
        return (
            "" if named and lettered[1] not in named else lettered[1]
        )  # "": the letter of one option with the text of another
    return named[0] if len(named) == 1 else ""


def solution_letters(solution, options):
    """A solution as people write it -> the letter of the option that it names, several letters joined by commas: "A", "A,C".

    "(A)", "A.", "a", "A. red", "(A) red" and "red" are A where A. red is an option; "A, C" and "(A), (C)" are A,C. None for what names no
    option, or more than one. Without options (their letters may stand in the question) every letter names one.
    """
    texts = option_texts(options or [f"{letter}." for letter in string.ascii_uppercase])
    # "A" is the letter where options have letters; without them it may be the text of another option
    if solution in texts and with_letters(options) == options:
        return solution
    parts = [part.strip() for part in solution.split(",")]
    if not all(re.fullmatch(LETTER, part) for part in parts):
        parts = [solution]  # a comma of the option's text
    letters = list(
        dict.fromkeys(read_choice(part, options) for part in parts)
    )  # each once, in their order
    by_text = [letter for letter, text in texts.items() if plain_text(text) == plain_text(solution)]
    if by_text not in ([], letters) or not set(letters) <= texts.keys():
        return None
    return ",".join(letters)


def row_id(row, index):
    """What a row is known by everywhere: its problem_id (SEED-Bench-R1: sample_id), else its position in the file."""
    found = next(
        (row[name] for name in ("problem_id", "sample_id") if row.get(name) is not None), index
    )
    return (
        str(found).encode(errors="backslashreplace").decode()
    )  # a lone surrogate could not be printed


def is_unicode(text):
    """False for a text with lone surrogates, which JSON can hold and no tokenizer and no file takes."""
    return text.encode(errors="replace").decode() == text


def read_solution(row, options, where):
    """The bare truth of a row as the rewards compare it; of a multiple-choice question the letters. DataError when there is none."""
    solution = row["solution"]
    if not isinstance(solution, str | int | float) or (
        isinstance(solution, float) and not math.isfinite(solution)
    ):
        raise DataError(f"{where} has a solution that is neither text nor number: {solution!r}")
    answer = strip_tag(str(solution), "answer")
    if not answer:
        raise DataError(f"{where} has an empty solution")
    if row["problem_type"] != "multiple choice":
        return answer
    if len(options) > len(string.ascii_uppercase):
        raise DataError(f"{where} has {len(options)} options, more than there are letters")
    letters = solution_letters(answer, options)
    if options and letters is None:
        letters_there = ", ".join(option_texts(options))
        raise DataError(
            f"{where} solution {answer[:60]!r} names none of the options {letters_there}, or more than one"
        )
    return letters or answer


def parse_example(row, index, media_root):
    """One row of a data set -> Example. Raises DataError that names the row and what is wrong with it."""
    if not isinstance(row, dict):
        raise DataError(f"row {index} is not an object")
    where = f"row {index} (problem_id {row_id(row, 'missing')})"
    try:
        row = to_video_r1(row)
    except DataError as error:
        raise DataError(f"{where} {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where} lacks a field of its format, or has it in another shape ({type(error).__name__}: {error})"
        ) from error
    missing = [
        key
        for key in ("problem", "problem_type", "solution", "data_type")
        if row.get(key) in (None, "")
    ]
    if missing:
        raise DataError(f"{where} has no {', '.join(missing)}")
    if row["problem_type"] not in PROBLEM_TYPES:
        raise DataError(
            f"{where} has problem_type {row['problem_type']!r}; known are {', '.join(PROBLEM_TYPES)}"
        )
    if row["data_type"] not in ("video", "image", "text"):
        raise DataError(f"{where} has data_type {row['data_type']!r}; known are video, image, text")
    media = ""
    if row["data_type"] != "text":
        if not row.get("path"):
            raise DataError(f"{where} has no {row['data_type']}: its path is empty")
        if not isinstance(row["path"], str) or "\0" in row["path"] or not is_unicode(row["path"]):
            raise DataError(f"{where} has a path that is none: {row['path']!r}")
        media = resolve_media(row["path"], media_root, where)
    options, process = row.get("options") or [], row.get("process") or ""
    if not isinstance(options, list) or not isinstance(process, str):
        raise DataError(f"{where}: options must be a list and process a text")
    options = [str(option) for option in options]
    texts = {
        "problem": str(row["problem"]),
        "options": "".join(options),
        "process": process,
        "solution": str(row["solution"]),
    }
    broken = [name for name, text in texts.items() if not is_unicode(text)]
    if broken:
        raise DataError(f"{where} has no valid Unicode in {', '.join(broken)} (a lone surrogate)")
    answer = read_solution(row, options, where)
    try:
        spans = [
            (*span.partition("-"), sentence)
            for span, sentence in (row.get("grounding") or {}).items()
        ]
        grounding = [
            (parse_time(start), parse_time(end or start), sentence)
            for start, _, end, sentence in spans
        ]
        evidence = [(float(start), float(end)) for start, end in row.get("evidence") or []]
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(
            f'{where}: grounding must be {{"MM:SS-MM:SS": sentence}}, evidence [[start, end], ...] ({error})'
        ) from error
    known = {
        "problem_id",
        "problem",
        "options",
        "problem_type",
        "solution",
        "data_type",
        "process",
        "grounding",
        "evidence",
    }
    return Example(
        id=row_id(row, index),
        question=str(row["problem"]),
        options=with_letters(options) if row["problem_type"] == "multiple choice" else options,
        problem_type=row["problem_type"],
        answer=answer,
        media=media,
        media_type=row["data_type"],
        reasoning=strip_tag(process, "think"),
        grounding=grounding,
        evidence=evidence,
        extra={key: value for key, value in row.items() if key not in known},
    )


def resolve_media(path, media_root, where=""):
    """A row's path joined to the media root; a path that leaves the root is refused (rule 6 of the project)."""
    root = os.path.realpath(media_root)
    full = os.path.realpath(os.path.join(root, path))
    if os.path.commonpath([root, full]) != root:
        raise DataError(f"{where} points outside the media root {root}: {path}")
    return full


def read_rows(dataset_name):
    """A data set file (JSON array, or JSON lines named .jsonl) -> its rows as they are. DataError (one sentence) when it is malformed."""
    file = Path(dataset_name)
    if not file.is_file():
        raise DataError(f"data set {file} not found (a JSON array or JSON lines file is expected)")
    try:
        text = file.read_text(encoding="utf-8")
        rows = (
            [json.loads(line) for line in text.split("\n") if line.strip()]
            if file.suffix == ".jsonl"
            else json.loads(text)
        )
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"data set {file} is not valid JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"data set {file} holds no examples (a non-empty JSON array is expected)")
    return rows


def load_examples(dataset_name, media_root=None, errors=None):
    """A data set file -> list of Example, in file order.

    media_root: folder that the rows' paths start from; default: the data set file's folder.
    errors: a list, to which {"problem_id", "media", "cause"} of every unusable row is added (malformed, outside the media root, a
    problem_id that an earlier row has); without it the first such row is a DataError, as a malformed file always is.
    """
    examples, seen = [], {}
    for index, row in enumerate(read_rows(dataset_name)):
        try:
            example = parse_example(row, index, media_root or Path(dataset_name).parent)
            if example.id in seen:
                raise DataError(
                    f"row {index} repeats the problem_id {example.id} of row {seen[example.id]}; results are joined by it"
                )
        except DataError as error:
            if errors is None:
                raise DataError(f"data set {dataset_name}: {error}") from error
            fields = row if isinstance(row, dict) else {}
            errors.append(
                {
                    "problem_id": row_id(fields, index),
                    "media": fields.get("path") or fields.get("video"),
                    "cause": str(error),
                }
            )
            continue
        seen[example.id] = index
        examples.append(example)
    choices = [example for example in examples if example.problem_type == "multiple choice"]
    if any(re.fullmatch(r"[A-Z](,[A-Z])+", example.answer) for example in choices):
        for (
            example
        ) in choices:  # those with a single letter too: the prompt must not tell how many are right
            example.extra["multi_answer"] = True
    return examples


ASK_FOR_WRONG = "Which of these is not a right answer to this question: "

NEGATIVE = re.compile(
    r"\b(not|cannot|never|no|none|neither|nor|nobody|nothing|except|false|wrong|incorrect|unlikely)\b|n['’]t\b",
    re.I,
)

AUXILIARY = re.compile(
    r"(?:^|[,.:;?!]\s+)(?:"
    r"(?:(?:what|which)(?: of (?:the following|these)(?: \w+)?| \w+(?<!s)(?<!ed))?|who|where|when) "  # "Which ball will", "Who is"
    r"(is|are|was|were|will|would)(?! (?:do|does|did|is|are|was|were)\b)"
    r"|(?:what|which|where|when) (do|does|did)(?= (?:the|an?|this|that|these|those|his|her|their|its|he|she|it|they|people)\b)) ",
    re.I,
)  # "Which person does a handstand", "Who did the dishes": a full verb

# options that stand or fall with others, or that name others by a letter that inversion gives to another one
ABOUT_OPTIONS = re.compile(
    r"\b(all|both|neither|none|either|any|each|every\w*|nothing|nobody|above|following|only|options?|choices?|least|most|more|less|fewer)\b"
    r"|\b[A-H] ?(and|or|,|&|/) ?[A-H]\b|^[A-H]$|\b(cannot|can['’]t|not) |insufficient|unknown|unclear|undetermined|uncertain",
    re.I,
)


def negate_question(question):
    """A question -> one that its wrong answers answer; None when it has a negation already, so that another would be no clear one.

    "Which ball will fall?" -> "Which ball won't fall?": what, which, who, where or when and the auxiliary after it, in a question of one
    clause. Every other question is put after "Which of these is not a right answer to this question:": how and why (negated, they ask
    something else), a leading auxiliary ("Isn't he tall?" negates nothing), a full verb ("What falls first?", "Who did the dishes?"), must,
    should, can and could (they turn into a ban or an impossibility), and whatever has more clauses, any of which might get the negation.
    """
    if NEGATIVE.search(question):
        return None
    found = AUXILIARY.search(question)
    more = r"[,.:;?!].|\b(and|or|but) (what|which|who|where|when|why|how|is|are|was|were|will|do|does|did)\b"  # other clauses
    if found is None or re.search(more, question[found.end() :], re.I):
        return ASK_FOR_WRONG + question
    auxiliary = found[1] or found[2]
    negated = "won't" if auxiliary.lower() == "will" else f"{auxiliary}n't"
    return question[: found.end() - len(auxiliary) - 1] + negated + question[found.end() - 1 :]


def invert_question(example, rng):
    """Question-answer inversion of TW-GRPO (arXiv 2505.24718): a multiple-choice Example -> a new one, or None if it cannot be inverted.

    The question is negated, the right option becomes the wrong one, a random number (at least 1) of the wrong ones become the right
    ones, the others are dropped; shuffled and lettered anew. `answer` is the letters joined by commas. The id stays: the medium, its
    prior and its evidence are the same. The reasoning argued for the old answer and is dropped. rng: random.Random.
    """
    question = negate_question(example.question)
    options = [
        re.fullmatch(r"\(?([A-Z])[.):]\s*(.+)", option, re.DOTALL) for option in example.options
    ]
    if (
        example.problem_type != "multiple choice"
        or question is None
        or None in options
        or re.search(r"\b[A-H][.)]\s", example.question)
    ):
        return None
    texts = {option[1]: option[2].strip() for option in options}
    if (
        example.answer not in texts
        or len({text.lower() for text in texts.values()}) < len(options)
        or len(options) < 2
        or any(ABOUT_OPTIONS.search(text) for text in texts.values())
    ):
        return None
    wrong = texts.pop(example.answer)
    right = rng.sample(list(texts.values()), rng.randint(1, len(texts)))
    shuffled = rng.sample([wrong, *right], 1 + len(right))
    letters = [chr(ord("A") + place) for place in range(len(shuffled))]
    return replace(
        example,
        question=question,
        reasoning="",
        extra={**example.extra, "multi_answer": True, "inverted_from": example.question},
        options=[f"{letter}. {text}" for letter, text in zip(letters, shuffled, strict=True)],
        answer=",".join(
            letter for letter, text in zip(letters, shuffled, strict=True) if text != wrong
        ),
    )


def read_template(path):
    """--prompt_template's text, or our own wording."""
    if path is None:
        return PROMPT_TEMPLATE
    if not Path(path).is_file():
        raise DataError(f"prompt template {path} not found")
    template = Path(path).read_text(encoding="utf-8")
    if (
        set(re.findall(r"{(.*?)}", template)) - {"question", "instruction"}
        or "{question}" not in template
    ):
        raise DataError(
            f"prompt template {path}: {{question}} must be in it, {{instruction}} may, no other braces"
        )
    return template


def build_prompt(example, template=PROMPT_TEMPLATE):
    """The user turn's text, as Video-R1 writes it: question, 'Options:' and one option a line, then the instruction."""
    question = example.question
    if example.options:
        question += "\nOptions:\n" + "\n".join(example.options)
    several = example.problem_type == "multiple choice" and example.extra.get("multi_answer")
    return template.format(
        question=question,
        instruction=INSTRUCTIONS["several letters" if several else example.problem_type],
    )


MARK = "\ue000"  # stands for the user's words while the chat template is rendered


def chat_parts(processor, example, template=PROMPT_TEMPLATE, system_prompt=None):
    """The chat-templated prompt, cut around the user's words -> (before, words, after).

    `before` ends with the media placeholder, `after` where the assistant begins. The words stand apart because they are tokenized as plain
    text: a question about "<|im_end|>" neither ends a turn nor asks for a picture. DataError if the template does not show them once.
    """
    content = [{"type": example.media_type}] if example.media_type != "text" else []
    content.append({"type": "text", "text": MARK})
    messages = [{"role": "user", "content": content}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if rendered.count(MARK) != 1:
        raise DataError(
            f"the checkpoint's chat template shows the user's text {rendered.count(MARK)} times, not once"
        )
    before, after = rendered.split(MARK)
    return before, build_prompt(example, template), after


def plain_ids(tokenizer, text):
    """Token ids of a text in which special tokens are ordinary characters."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def target_text(example):
    """What SFT teaches: think block, answer block."""
    return f"<think>{example.reasoning}</think><answer>{example.answer}</answer>"
