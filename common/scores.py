"""Scoring rules of stage 5: stored answers in, numbers out, by pure functions. No model, no video.

    items, repeated, settings = read_predictions("eval_mmvu_greedy_output.json")  # any format
    report = make_report(items, "mmvu")  # accuracy, per type and task

evaluate.py is the command line. Every answer gets two scores:

- official, what a benchmark asks for: the right answer in whatever form it can be read ("(B)",
  "B. car", "Answer: B", "1,200" for "1200"), mean relative accuracy as VSI-Bench's code has it.
- video_r1, what eval_bench.py of Video-R1, VideoCFR and GRPO-CARE gives, to compare with their
  numbers: the exact letter, the decimal rule, mean relative accuracy with <, 0 for OCR and
  free-form.

Official scores the answer of reward.split_output; video_r1 the first <answer> block, and without
one, or with an empty one, the whole output. What official cannot read counts as wrong and is listed
under `unread`.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from string import ascii_uppercase

import numpy as np

import reward
from common.data import (
    PROBLEM_TYPES,
    DataError,
    add_letters,
    clean_text,
    from_tw_grpo,
    option_texts,
    plain_text,
    read_alone,
    read_choice,
    read_choices,
    read_document,
    solution_letters,
    split_options,
    with_letters,
)

# Number of questions in each benchmark's file (test, validation or level) as the releases have it.
SIZES = {
    "vsibench": (5130,),
    "videommmu": (900,),
    "mmvu": (625,),
    "mvbench": (4000,),
    "tempcompass": (7540,),
    "videomme": (2700,),
    "seed-bench-r1 L1": (2432,),
    "seed-bench-r1 L2": (923,),
    "seed-bench-r1 L3": (1321,),
    "clevrer": (9238,),
    "nextgqa": (5553, 3358),
    "star": (7098,),
    "mlvu": (2174, 502),  # dev, test
    "longvideobench": (1337,),
    "videomathqa": (420,),
    "minerva": (1515,),
    "scivideobench": (1000,),
}
VSI_NUMBERS = """object_counting object_abs_distance object_size_estimation
    room_size_estimation""".split()
# VSI-Bench's eight tasks. The three levels of a direction are averaged into one first.
VSI_TASKS = (
    "obj_appearance_order",
    "object_rel_distance",
    "route_planning",
    "object_rel_direction",
    *VSI_NUMBERS,
)
TASK_FIELDS = """original_question_type task_type task task_name question_type type subdomain dim
    kind""".split()
# lmms-eval's fields of TempCompass's captioning: what a judge answers from the caption.
CAPTION_FIELDS = ("mc_question", "mc_answer")
# Fields whose values, where they are texts, get a score each.
BREAKDOWNS = ("duration", "domain", "sub_category")


@dataclass
class Item:
    """One question with its stored output and the scores of that; a report lists it."""

    problem_id: str
    problem_type: str
    solution: str  # the right answer without tags; the letters of a multiple-choice question
    output: str
    problem: str = ""  # the question
    options: list[str] = field(default_factory=list)
    task: str = ""
    mc_question: str = ""  # of a caption: CAPTION_FIELDS
    mc_answer: str = ""
    evidence: list[tuple[float, float]] = field(default_factory=list)  # (start s, end s), if known
    frame_use: dict | None = None  # where the answer looked: see evaluate.use_row
    truncated: bool | None = None  # cut at the most tokens of an answer; None: not known
    error: str | None = None  # why there is no output
    # Set by score_item.
    prediction: str = ""  # the text that is scored
    reward: float = 0.0  # official score
    correct: bool = False  # whether it is 1
    unread: str | None = None  # why the official rules found no answer in the output
    reward_video_r1: float = 0.0  # eval_bench.py's score
    format: float = 0.0  # 1 for well-formed tags
    stored: float | None = None  # score in the file, which a report does not list


# ---------------------------------------------------------------------------------- stored files


def first_field(row, *names):
    """Return the first non-empty of a row's fields as text, "" if there is none."""
    found = (str(row[name]) for name in names if row.get(name) not in (None, ""))
    return next(found, "")


def short_hash(content):
    return hashlib.sha1(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def numbered_options(row):
    """Texts of options that have a field each: choice_a, option0, answer_choice_0; not "N/A"."""
    texts = []
    for name in sorted(row):
        numbered = re.fullmatch("(answer_)?(choice|option)_?[0-9a-j]", name)
        if numbered and row[name] not in (None, "", "N/A"):
            texts.append(str(row[name]))
    return texts


def item_of(row):
    """Read a row with Video-R1's fields and an output.

    Returns:
        Item without scores.
    Raises:
        DataError: a field is missing or malformed.
    """
    # SEED-Bench-R1's results.
    if "golden_choice_idx" in row:
        row = {"problem_type": "multiple choice", "solution": row["golden_choice_idx"], **row}
    options = row.get("options") or add_letters(numbered_options(row))
    output = row.get("output") or ""
    error = first_field(row, "error") or None
    if not isinstance(options, list) or not isinstance(output, str):
        raise DataError("has options that are not a list, or an output that is not text")
    # A question without an answer may lack the rest, too.
    missing = [name for name in ("problem_type", "solution") if not first_field(row, name)]
    if "output" not in row:
        missing.append("output")
    if missing and not error:
        raise DataError(f"has no {', '.join(missing)}")
    # eval_bench.py stores this for a whole batch of which one video is unreadable.
    if output.strip() == "<answer>error</answer>":
        error = error or "stored as error: the file has <answer>error</answer>"
    # Two runs over the same question must name it alike, in whatever order their files are.
    problem = first_field(row, "problem", "question")
    medium = row.get("video") or row.get("path")
    options = [str(option) for option in options]
    cut = row.get("truncated")
    item = Item(
        first_field(row, "problem_id", "sample_id") or short_hash([problem, medium, options]),
        first_field(row, "problem_type"),
        reward.solution_answer(first_field(row, "solution")),
        output,
        problem,
        options,
        first_field(row, *TASK_FIELDS),
        first_field(row, "mc_question"),
        first_field(row, "mc_answer"),
        frame_use=row.get("frame_use"),
        truncated=cut if isinstance(cut, bool) else None,
        error=error,
    )
    # The predictions file keeps the events; they would be most of the report.
    if item.frame_use:
        item.frame_use.pop("events", None)
    for start, end in row.get("evidence") or row.get("glue") or []:
        item.evidence.append((float(start), float(end)))
    # Only a question that has one of these has the field.
    for name in BREAKDOWNS:
        if isinstance(row.get(name), str):
            setattr(item, name, row[name])
    if isinstance(row.get("reward"), int | float):
        item.stored = row["reward"]
    # Solutions are written as "(A)", "A. red" or "red", too.
    if item.problem_type == "multiple choice":
        item.solution = solution_letters(item.solution, options) or item.solution
    return item


def from_tw_grpo_log(row):
    """Read a line of TW-GRPO's log: the data set's row under `question`, its output."""
    fields = from_tw_grpo(row["question"])
    # Some outputs repeat the prompt first.
    output = row["model_output"] or ""
    fields["output"] = re.sub(r"\A.*?system.*?assistant\n", "", output, flags=re.DOTALL)
    fields["reward"] = row.get("accuracy_score")
    fields["solution"] = fields.get("solution") or row["ground_truth"]
    return item_of(fields)


def lmms_eval_score(row):
    """Return the score that lmms-eval stored in a line of samples, None if there is none."""
    ends = ("_score", "accuracy", "_acc")
    score = next((row[name] for name in row if name.endswith(ends)), None)
    if not isinstance(score, dict):
        return score
    # Some tasks store the answer that they read, and not whether it is right.
    if "answer" in score:
        predicted = score.get("pred_answer", score.get("parsed_pred"))
        score = {"correct": str(predicted) == str(score["answer"]), **score}
    # VSI-Bench's are of choices and of numbers.
    names = ("score", "correct", "accuracy", "MRA:.5:.95:.05")
    return next((score[name] for name in names if name in score), None)


# Fields of a document that lmms-eval's VSI-Bench adds to it.
WRITTEN = re.compile(r"(prediction|accuracy|MRA:.*)\Z")


def from_lmms_eval(row):
    """Read a line of lmms-eval's samples: the data set's row under `doc`, its output."""
    doc = row["doc"]
    output = row.get("resps") or row.get("filtered_resps")
    # Responses are nested: requests, then samples.
    while isinstance(output, list):
        output = output[0] if output else ""
    options = doc.get("options") or doc.get("candidates") or doc.get("choices")
    options = options or numbered_options(doc)
    target = str(row["target"])
    # LongVideoBench, MINERVA and SciVideoBench (options by letter) may count from 0 instead.
    index = doc.get("correct_choice", doc.get("answer_id"))
    if isinstance(options, dict):
        index = target
        options = options.values()
    # Some tasks have their options in the prompt or the question alone.
    if isinstance(options, str) or not any(options):
        options = split_options(row.get("input") or str(doc.get("question")))[1]
    options = with_letters([str(option) for option in options])
    if options and str(index).isdigit():
        target = ascii_uppercase[int(index)]
    # The samples do not name the type of a question.
    kind = "free-form"
    if first_field(doc, *TASK_FIELDS) in VSI_NUMBERS:
        kind = "regression"
    elif options or re.fullmatch(r"[A-Z]", target):
        kind = "multiple choice"
    elif exact_number(target) is not None:
        kind = "numerical"
    # VSI-Bench's task writes the answer and its scores into the question, whose name they would be.
    question = {name: value for name, value in doc.items() if not WRITTEN.match(name)}
    # MVBench's target is the right option's text, which may be another option's letter.
    letters = (letter for letter, text in option_texts(options).items() if text == target)
    fields = {
        **doc,
        # MVBench's twenty files each count doc_id from 0.
        "problem_id": f"{row['doc_id']}-{short_hash(question)}",
        "problem_type": kind,
        "solution": next(letters, target),
        "options": options,
        "output": output,
        "reward": lmms_eval_score(row),
    }
    return item_of(fields)


def read_predictions(path):
    """Read stored predictions of any known format; of a repeated problem_id the first row counts.

    Formats, recognised by their fields: eval_results of Video-R1, VideoCFR and GRPO-CARE; reports
    and prediction lines of evaluate.py; TW-GRPO's log; lmms-eval's samples.

    Args:
        path: a JSON document, or JSON lines whatever the file's name.
    Returns:
        (list of Item, list of repeated problem_ids, the settings that a report, or every line of a
        run, has, and the `format`).
    Raises:
        DataError: there are no rows of predictions, or one is malformed, with its number.
    """
    rows = read_document(path)
    settings = None
    if isinstance(rows, dict):
        settings = rows.get("settings")
        rows = rows.get("results", [rows])
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{path} holds no predictions (a list of objects, or an object with results, "
            "is expected)"
        )
    first = rows[0].get("settings")
    if all(row.get("settings") == first for row in rows):
        settings = settings or first
    items = {}
    repeated = []
    for index, row in enumerate(rows):
        source = "Video-R1"
        read = item_of
        if "model_output" in row:
            source = "TW-GRPO"
            read = from_tw_grpo_log
        elif "doc" in row:
            source = "lmms-eval"
            read = from_lmms_eval
        try:
            item = read(row)
        except DataError as error:
            raise DataError(f"{path}: row {index} {error}") from error
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            cause = f"{type(error).__name__}: {error}"
            raise DataError(f"{path}: row {index} is no {source} prediction ({cause})") from error
        if items.setdefault(item.problem_id, item) is not item:
            repeated.append(item.problem_id)
    return list(items.values()), repeated, {**(settings or {}), "format": source}


def benchmark_of(path, items=()):
    """Return the key of SIZES that a file's name or its tasks point to, "" if neither does."""
    name = Path(path).name.lower()
    # SEED-Bench-R1 names its files by level.
    level = re.search(r"(?:validation|seed.*)_?l([123])(?!\d)", name)
    if level:
        return f"seed-bench-r1 L{level[1]}"
    words = re.split(r"[^a-z0-9]+", name)
    joined = "".join(words)
    for benchmark in SIZES:
        # "star" is also part of other words.
        if benchmark in words or (benchmark != "star" and benchmark in joined):
            return benchmark
    return "vsibench" if items and all(vsi_task(item.task) for item in items) else ""


# ----------------------------------------------------------------------- answers and their scores


def exact_number(text):
    """Read "1,234.5" as a Fraction; None for units, words, "nan" and "inf"."""
    try:
        value = Decimal(text.strip().replace(",", ""))
    except InvalidOperation:
        return None
    # 1e999999999 would fill the memory.
    return Fraction(value) if value.is_finite() and abs(value.adjusted()) < 300 else None


NUMBER = re.compile(
    r"[(\[$€£¥]*([-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.?\d+|\d+\.)(?:e[-+]?\d+)?)"
    r"(?:\s?[/\u2044]\s?(\d{1,300}))?(.*)",
    re.DOTALL | re.IGNORECASE,
)
# A word of a unit: "m2", "km/h", "%", "°C".
UNIT = re.compile(r"(?:[^\d^+±×]|(?<=[^\W\d])\^?[23])+")
# Words after a number that make it another one.
OTHER_NUMBER = re.compile(
    r"\b(?:or|to|and|but|not|maybe|perhaps|out|plus|minus|times|x|k|half|dozen|hundred|thousand"
    r"|million|billion)\b",
    re.IGNORECASE,
)


def read_quantity(text):
    """Read a number with a unit of up to four words behind it -> Fraction, None if it is none."""
    number = NUMBER.fullmatch(text)
    if not number or OTHER_NUMBER.search(number[3]):
        return None
    words = number[3].split()
    if len(words) > 4 or not all(map(UNIT.fullmatch, words)):
        return None
    value = exact_number(number[1])
    below = int(number[2] or 1)
    return value / below if value is not None and below else None


def read_number(text):
    """Find the number that an answer is.

    "1,200", "\u22125", "5 apples", "50%", "3/4", "\\frac{3}{4}", "90°", "**5**", "The answer is 5".

    Returns:
        Fraction; None for none, for several ("5 or 6", "5-6") and where two places disagree (see
        common.data.read_alone).
    """
    return read_alone(text, read_quantity)


def same_number(first, second):
    """Whether two numbers are equal after rounding to two decimals."""
    return round(float(first), 2) == round(float(second), 2)


def mean_relative_accuracy(y_hat, y, strict=False):
    """Share of the tolerances 5 %, 10 %, ... 50 % that keep |y_hat - y| / |y|, in [0, 1].

    VSI-Bench's code asks for error <= tolerance in floating point: 4 for 5 is a hair above its 20 %
    and gets 0.6. Video-R1's eval_bench.py has < (strict), here exact: 20 |y_hat - y| against k |y|,
    k = 1..10; its float32 lets 9 for 10 and 19 for 20 pass one more. The right number scores 1.

    Args:
        y_hat, y: Fraction, or None for what is no number.

    >>> mean_relative_accuracy(Fraction(4), Fraction(5)), mean_relative_accuracy(3, 4, strict=True)
    (0.6, 0.5)
    """
    if None in (y_hat, y):
        return 0.0
    # Also where y is 0 and the relative error is not defined.
    if y_hat == y or y == 0:
        return float(y_hat == y)
    if strict:
        return sum(20 * abs(y_hat - y) < k * abs(y) for k in range(1, 11)) / 10
    error = abs(float(y_hat) - float(y)) / abs(float(y))
    return float(np.mean(error <= 1 - np.linspace(0.5, 0.95, 10)))


# Scripts without spaces between words (Thai, Lao, Burmese, Khmer, Chinese, Japanese).
NO_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


def spell_out(text):
    """Write letters other than a-z as numbers, since ROUGE drops them: "Café" -> "cafu233".

    In scripts without spaces every character is a word.
    """
    spelled = []
    for letter in clean_text(text).lower():
        if not letter.isascii():
            known = unicodedata.category(letter)[0] in "LMN"
            code = f"u{ord(letter)}" if known else " "
            letter = f" {code} " if NO_SPACES.match(letter) else code
        spelled.append(letter)
    return "".join(spelled)


def several_letters(truth):
    """Whether a truth names several options: "A,C"."""
    return re.fullmatch(r"[A-Za-z](\s*,\s*[A-Za-z])+", truth) is not None


def official_score(answer, item):
    """Score an answer's text in [0, 1] by what the benchmarks ask for; None if it is unreadable."""
    truth = item.solution
    kind = item.problem_type
    if kind == "OCR":
        return reward.ocr_reward(clean_text(answer), clean_text(truth))
    # Equal texts need no reading.
    if plain_text(answer) == plain_text(truth):
        return 1.0
    if kind == "multiple choice":
        letters = read_choices(answer, item.options)
        if not letters or (len(letters) > 1 and not several_letters(truth)):
            return None
        # All right letters and no other.
        return float(reward.multi_choice_reward(",".join(letters), truth.upper()) == 1.0)
    if kind in ("numerical", "regression"):
        number = read_number(answer)
        # VSI-Bench takes the first word of "5 meters wide, 3 long".
        if number is None and kind == "regression":
            number = exact_number(answer.split()[0].rstrip("."))
        right = read_number(truth)
        if None in (number, right):
            return None
        if kind == "numerical":
            return float(same_number(number, right))
        return mean_relative_accuracy(number, right)
    return reward.rouge_reward(spell_out(answer), spell_out(truth))


def video_r1_score(answer, item):
    """Score an answer's text in [0, 1] by eval_bench.py's rules."""
    if item.problem_type == "multiple choice":
        return float(answer == item.solution)
    if item.problem_type == "numerical":
        return reward.numerical_reward(answer, item.solution)
    if item.problem_type == "regression":
        numbers = [exact_number(answer), exact_number(item.solution)]
        return mean_relative_accuracy(*numbers, strict=True)
    return 0.0


def unread_kind(item):
    """Say why the official rules could not read an output."""
    if not item.output.strip():
        return "empty output"
    if not item.prediction:
        return "no answer after the reasoning"
    return f"no single {'option' if item.problem_type == 'multiple choice' else 'number'}"


def score_item(item):
    """Set an Item's scores; one of an unknown problem type or with an error scores 0.

    Returns:
        A report's record of the item, dict for JSON.
    """
    item.format = reward.format_reward(item.output)
    if not item.error:
        _, item.prediction = reward.split_output(item.output)
    if item.problem_type in PROBLEM_TYPES and not item.error:
        score = None
        if item.prediction:
            score = official_score(item.prediction, item)
        item.reward = score or 0.0
        if score is None:
            item.unread = unread_kind(item)
        # eval_bench.py scores everything that was said where it finds no answer.
        whole = reward.extract_answer(item.output) or item.output.strip()
        item.reward_video_r1 = video_r1_score(whole, item)
    item.correct = item.reward == 1.0
    record = dict(vars(item))
    del record["stored"]
    return record


# -------------------------------- a judge's readings: TAC, the consistency rate and open answers


def agrees(reply, truth, record):
    """Whether two texts name one option, or one number: to 5 % in a regression, else to cents."""
    if record["problem_type"] == "multiple choice":
        # Judges may name the option in full.
        letter = read_choice(reply, record["options"])
        return letter != "" and letter == read_choice(truth, record["options"])
    number = read_number(reply)
    right = read_number(truth)
    if None in (number, right):
        return False
    if record["problem_type"] == "numerical":
        return same_number(number, right)
    return 20 * abs(number - right) <= abs(right)


def has_output(record):
    """Whether there is anything to judge, right or wrong."""
    return bool(record["output"].strip()) and not record["error"]


def can_compare(record):
    """Whether the solution is a letter or a number, to be compared with a judge's reply."""
    if record["problem_type"] == "multiple choice":
        return not several_letters(record["solution"])
    return record["problem_type"] in ("numerical", "regression")


def is_open(record):
    """Whether words are the solution, and an answer is there to be compared with it by a judge."""
    return record["problem_type"] == "free-form" and record["prediction"] != ""


def ratio(part, whole):
    return part / whole if whole else None


def reasoning_metrics(records, replies, judge):
    """Compute TAC and VAS (Video-R2) and the consistency rate (GRPO-CARE) from a judge's replies.

    With a = the answer is right and t = the conclusion of the reasoning is right, TP counts both,
    TN neither, FP only t, FN only a, over the N questions that have an output and one letter or
    number as the solution. Video-R2's code exports two formulas: answer_to_thinking_correlation =
    (TP + TN) / N, in which two different wrong letters agree, and consistency_accuracy =
    TP / (TP + FN), more likely the published one. consistency_rate is the share of these questions,
    with or without an output, whose conclusion is the answer. VAS is over all rated outputs.

    Args:
        records: make_report's results.
        replies: {problem_id: {reading: value of evaluate.judge_one}} of the questions that have an
            output, but those on which the judge failed; no reading where there was nothing to read.
        judge: name of the judge.
    Returns:
        dict of counts and the metrics.
    """
    counts = dict.fromkeys(("n", "outputs", "no_conclusion", "TP", "TN", "FP", "FN"), 0)
    consistent = 0
    for record in filter(can_compare, records):
        reply = replies.get(record["problem_id"])
        if not has_output(record):
            counts["n"] += 1
        elif reply is not None:
            answer = reply.get("answer", "")
            conclusion = reply.get("conclusion", "")
            counts["n"] += 1
            counts["outputs"] += 1
            counts["no_conclusion"] += conclusion == ""
            consistent += agrees(conclusion, answer, record)
            # Against the solution, and not against each other. A reply that names no option is
            # a conclusion, and wrong.
            a = agrees(answer, record["solution"], record)
            t = agrees(conclusion, record["solution"], record)
            counts[("TN", "FP", "FN", "TP")[2 * a + t]] += 1
    # Without reasoning there is no attention: 0 of 10. None: the judge's reply was no rating.
    ratings = [reply.get("vas", 0.0) for reply in replies.values()]
    ratings = [10 * rating for rating in ratings if rating is not None]
    return {
        "judge": judge,
        **counts,
        "not_read": len(records) - counts["n"],
        "TAC": {
            "answer_to_thinking_correlation": ratio(counts["TP"] + counts["TN"], counts["outputs"]),
            "consistency_accuracy": ratio(counts["TP"], counts["TP"] + counts["FN"]),
        },
        "consistency_rate": ratio(consistent, counts["n"]),
        "VAS": {
            "value": mean(ratings),
            "n": len(ratings),
            "not_rated": sum(map(has_output, records)) - len(ratings),
        },
    }


def correctness(records, replies, failed):
    """Accuracy of open answers (free-form) by a judge's verdicts; sets each's `judged_correct`.

    Args:
        replies: see reasoning_metrics.
        failed: {problem_id: cause} of questions on which the judge failed.
    Returns:
        dict. n: open questions, of which one without an answer is wrong; judged: those with a
        verdict, and accuracy over them. accuracy_of_all: over all questions of the file, with the
        verdicts in place of word overlap. None where the reason says why.
    """
    opened = [record for record in records if record["problem_type"] == "free-form"]
    for record in opened:
        record["judged_correct"] = False
        if is_open(record):
            record["judged_correct"] = replies.get(record["problem_id"], {}).get("correct")
    unjudged = [record["problem_id"] for record in opened if record["judged_correct"] is None]
    reason = None if opened else "no open questions"
    if unjudged:
        cause = failed.get(unjudged[0], "the judge's reply was no verdict")
        reason = f"{len(unjudged)} are unjudged; the first is {unjudged[0]}: {cause}"
    rewards = [record.get("judged_correct", record["reward"]) for record in records]
    return {
        "n": len(opened),
        "judged": len(opened) - len(unjudged),
        "accuracy": mean_of(opened, "judged_correct"),
        "accuracy_of_all": None if reason else mean(rewards),
        "reason": reason,
    }


# ------------------------------------------------------------------------------------- the report


def mean(values):
    """Mean of the values that are known, None if there are none."""
    known = [value for value in values if value is not None]
    return ratio(sum(known), len(known))


def mean_of(records, name):
    """Mean of a field over the records in which it is known, None if there are none."""
    return mean(record.get(name) for record in records)


def summary(records):
    """Numbers of a list of records."""
    return {
        "n": len(records),
        "correct": sum(record["correct"] for record in records),
        "accuracy": mean_of(records, "reward"),
        "accuracy_video_r1": mean_of(records, "reward_video_r1"),
        "format_rate": mean_of(records, "format"),
    }


def group_by(records, name):
    """{value of a field: records that have it}, in order of appearance; without empty values."""
    groups = defaultdict(list)
    for record in records:
        if record.get(name):
            groups[record[name]].append(record)
    return groups


def eval_bench_means(records, reward_name):
    """What eval_bench.py prints: mean_mra of the regression questions, mean_acc of all others."""
    numbers = [record for record in records if record["problem_type"] == "regression"]
    others = [record for record in records if record["problem_type"] != "regression"]
    return {"mean_acc": mean_of(others, reward_name), "mean_mra": mean_of(numbers, reward_name)}


def vsi_task(name):
    """Return VSI-Bench's task of a question type, "" for other names."""
    task = re.sub(r"^(object_rel_direction)_(easy|medium|hard)$", r"\1", name)
    return task if task in VSI_TASKS else ""


def vsi_numbers(records, reward_name):
    """VSI-Bench's numbers: eval_bench.py's two, their mean over questions, and the official one.

    official is the mean over the eight tasks; each level of a direction counts the same.
    """
    # First the levels of a direction, then tasks of one or several levels.
    tasks = defaultdict(list)
    for name, level in group_by(records, "task").items():
        tasks[vsi_task(name)].append(mean_of(level, reward_name))
    scores = {name: mean(tasks[name]) for name in VSI_TASKS if name in tasks}
    return {
        **eval_bench_means(records, reward_name),
        "sample_weighted_mean": mean_of(records, reward_name),
        "official": mean(scores.values()),
        "tasks": scores,
    }


def partial_credit(record):
    """TW-GRPO's share of the right letters, 0 with a wrong letter."""
    letters = read_choices(record["prediction"], record["options"])
    return reward.multi_choice_reward(",".join(letters), record["solution"].upper())


def overlap(predicted, spans):
    """Compare an interval with the true ones.

    Args:
        predicted: (start s, end s); a point covers itself.
        spans: list of (start s, end s).
    Returns:
        (best intersection over the prediction, best intersection over the union).
    """
    start, end = predicted
    inside = []
    union = []
    # One prediction against several true spans: the best counts.
    for low, high in spans:
        common = max(0.0, min(end, high) - max(start, low))
        both = (end - start) + (high - low) - common
        inside.append(common / (end - start) if end > start else float(low <= start <= high))
        union.append(common / both if both else 0.0)
    return max(inside), max(union)


def grounding_numbers(records):
    """NExT-GQA's metrics over questions with known intervals.

    The prediction is the hull of all times that the reasoning cites; without one it scores 0.
    acc_gqa is the share of questions answered right with IoP >= 0.5.
    """
    predicted = 0
    right = 0
    overlaps = {"IoP": [], "IoU": []}
    for record in records:
        inside = 0.0
        union = 0.0
        claims = reward.parse_claims(reward.split_output(record["output"])[0])
        if claims and not record["error"]:
            predicted += 1
            hull = (min(claim[0] for claim in claims), max(claim[1] for claim in claims))
            inside, union = overlap(hull, record["evidence"])
        right += record["correct"] and inside >= 0.5
        overlaps["IoP"].append(inside)
        overlaps["IoU"].append(union)
    numbers = {"n": len(records), "predicted": predicted, "acc_gqa": right / len(records)}
    for name, values in overlaps.items():
        numbers[f"m{name}"] = mean(values)
        for bound in (0.3, 0.5):
            numbers[f"{name}@{bound}"] = mean(value >= bound for value in values)
    return numbers


def event_enrichment(events, slots, chosen):
    """How often the strongest token-slot pairs are about chosen slots (the paper's figure 9).

    Args:
        events: flat indices token * slots + slot.
        slots: number of temporal slots.
        chosen: positions of slots.
    Returns:
        Share of events on the chosen slots over the share of slots that are chosen (1 is chance);
        None if all or no slots are chosen.

    >>> event_enrichment([1, 4, 5, 9], 4, [0, 1])  # tokens 0, 1, 1, 2 on the slots 1, 0, 1, 1
    2.0
    """
    if not 0 < len(chosen) < slots:
        return None
    return sum(event % slots in chosen for event in events) / len(events) / (len(chosen) / slots)


def use_means(records):
    """Means of the fields of evaluate.use_row, each over the records where it is known."""
    numbers = {"n": len(records)}
    for name in ("consensus", "enrichment", "evidence", "chance"):
        numbers[name] = mean(record["frame_use"].get(name) for record in records)
    return numbers


def other_scores(items):
    """Yield a sentence about the scores in the file that are others than the official ones."""
    other = []
    by_video_r1 = 0
    for item in items:
        if item.stored is not None and abs(item.stored - item.reward) > 1e-6:
            other.append(
                f"{item.problem_id} ({item.prediction[:40]!r} for {item.solution[:40]!r}: "
                f"{item.stored:g} there, {item.reward:g} here)"
            )
            by_video_r1 += abs(item.stored - item.reward_video_r1) < 1e-6
    if other:
        yield (
            f"{len(other)} of {len(items)} answers have another score in the file, {by_video_r1} "
            f"of them that of accuracy_video_r1; the first: {', '.join(other[:3])}"
        )


def find_warnings(items, benchmark, repeated, unread):
    """Yield sentences about what makes a report's numbers incomparable or incomplete."""
    count = sum(map(len, unread.values()))
    if count > 0.02 * len(items):
        causes = []
        for kind, texts in unread.items():
            name, text = next(iter(texts.items()))
            causes.append(f"{len(texts)} {kind}, such as {name}: {text!r}")
        yield (
            f"{count} of {len(items)} answers could not be read and count as wrong: "
            f"{'; '.join(causes)}"
        )
    cut = sum(item.truncated is True for item in items)
    if cut > 0.02 * len(items):
        yield f"{cut} of {len(items)} answers were cut (--max_completion_length)"
    yield from other_scores(items)
    sizes = SIZES.get(benchmark, [len(items)])
    if len(items) not in sizes:
        yield (
            f"{benchmark} has {' or '.join(map(str, sizes))} questions, this file {len(items)}: "
            "not comparable with published numbers"
        )
    # No rule would score these, and 0 would look like a wrong answer.
    unknown = Counter(item.problem_type for item in items if not item.error)
    for kind in PROBLEM_TYPES:
        del unknown[kind]
    if unknown:
        yield f"problem types that no rule scores count as wrong: {dict(unknown)}"
    if repeated:
        yield f"{len(repeated)} rows repeat the problem_id of an earlier one and were left out"


def make_report(items, benchmark="", repeated=()):
    """Score stored answers.

    Args:
        items: list of Item; one without an output counts as wrong and is listed under `errors`.
        benchmark: a key of SIZES, or "".
        repeated: problem_ids of rows that were left out.
    Returns:
        dict for JSON: every number with its denominator.
    """
    records = [score_item(item) for item in items]
    report = {
        "benchmark": benchmark or None,
        **summary(records),
        "video_r1": eval_bench_means(records, "reward_video_r1"),
    }
    # A table of each: by_type, by_task, by_duration, ...
    for name in ("problem_type", "task", *BREAKDOWNS):
        groups = group_by(records, name)
        if groups or name == "task":
            table = {value: summary(groups[value]) for value in sorted(groups)}
            report[f"by_{name.removeprefix('problem_')}"] = table
    report["task_mean"] = mean_of(report["by_task"].values(), "accuracy")

    # Numbers that only some benchmarks or runs have.
    if benchmark == "vsibench":
        report["vsi_bench"] = {
            "official": vsi_numbers(records, "reward"),
            "video_r1": vsi_numbers(records, "reward_video_r1"),
        }
    if any(several_letters(record["solution"]) for record in records):
        report["partial_accuracy"] = mean(map(partial_credit, records))
    timed = [record for record in records if record["evidence"]]
    if timed:
        report["grounding"] = grounding_numbers(timed)
    looked = [record for record in records if record["frame_use"]]
    if looked:
        report["frame_use"] = {
            "all": use_means(looked),
            "right": use_means([record for record in looked if record["correct"]]),
            "wrong": use_means([record for record in looked if not record["correct"]]),
        }
    stored = [item.stored for item in items]
    if None not in stored:
        report["accuracy_as_stored"] = mean(stored)

    # What went wrong, and every question. Answers of others do not say whether they were cut.
    cut = [item.truncated for item in items if not item.error]
    errors = defaultdict(dict)
    unread = defaultdict(dict)
    for item in items:
        if item.unread:
            unread[item.unread][item.problem_id] = item.prediction[-80:]
        if item.error:
            errors[item.error.partition(":")[0]][item.problem_id] = item.error
    return report | {
        "empty_outputs": sum(not item.output.strip() for item in items),
        "truncated": None if None in cut else sum(cut),
        "unread": unread,
        "errors": errors,
        "duplicates": list(repeated),
        "judged": {
            **dict.fromkeys(("judge", "TAC", "consistency_rate", "VAS", "correctness")),
            "reason": "no judge was asked (--judge_base, --judge_model)",
        },
        "warnings": list(find_warnings(items, benchmark, repeated, unread)),
        "results": records,
    }


# ------------------------------------------------------------------------- two runs, side by side


def mcnemar(gains, losses):
    """Exact two-sided p-value of McNemar's test that gains and losses are equally likely.

    >>> mcnemar(9, 1), mcnemar(3, 3)
    (0.021484375, 1.0)
    """
    total = gains + losses
    tail = sum(math.comb(total, k) for k in range(min(gains, losses) + 1))
    return min(1.0, 2 * tail / 2**total)


def paired_bootstrap(differences, seed=0):
    """95 % percentile interval of the mean of paired differences over resampled questions.

    Returns:
        (low, high).
    """
    # Equal differences are drawn together, which is as good and much faster.
    values, counts = np.unique(np.asarray(differences, dtype=float), return_counts=True)
    rng = np.random.default_rng(seed)
    count = len(differences)
    drawn = rng.multinomial(count, counts / count, size=10_000)  # (10,000, values)
    low, high = np.quantile(drawn @ values / count, [0.025, 0.975])
    return float(low), float(high)


def compare(first, second, seed=0):
    """What changed from one run to another over the same questions, and is it more than noise?

    Args:
        first, second: lists of records (make_report's results).
        seed: of the bootstrap.
    Returns:
        dict for JSON. gains: wrong in the first, fully right in the second; losses: the reverse.
        difference: mean of the paired differences of the official scores, with its 95 % interval.
        normalised_gain: its share of what was left to gain; VideoMMMU's delta knowledge where the
        first run answers before and the second after the video.
    Raises:
        DataError: no question is shared, one has another solution, or the answers of one run are
            mostly unread.
    """
    # Pairs, since questions differ more in difficulty than runs do.
    by_id = {record["problem_id"]: record for record in second}
    pairs = [(a, by_id[a["problem_id"]]) for a in first if a["problem_id"] in by_id]
    if not pairs:
        raise DataError(
            "the two files share no problem_id: they are of different questions, "
            "or of formats that name them differently"
        )
    # Such a difference would be of formats.
    for name, side in (("first", first), ("second", second)):
        unread = [record["output"] for record in side if record.get("unread")]
        if 2 * len(unread) > len(side):
            raise DataError(
                f"{len(unread)} of {len(side)} answers of the {name} file could not be read, such "
                f"as {unread[0][-60:]!r}: a comparison would be about their form"
            )
    gains = []
    losses = []
    differences = []
    worded = []
    for a, b in pairs:
        same = all(a[name] == b[name] for name in ("solution", "problem_type"))
        if not (same or a["error"] or b["error"]):
            raise DataError(
                f"problem_id {a['problem_id']} is another question in each file: {a['solution']!r} "
                f"is right in the first, {b['solution']!r} in the second"
            )
        if a["problem"].split() != b["problem"].split():
            worded.append(a["problem_id"])
        differences.append(b["reward"] - a["reward"])
        if b["correct"] > a["correct"]:
            gains.append(b["problem_id"])
        elif a["correct"] > b["correct"]:
            losses.append(a["problem_id"])
    before = mean(a["reward"] for a, _ in pairs)
    difference = mean(differences)
    return {
        "n": len(pairs),
        "only_in_first": len(first) - len(pairs),
        "only_in_second": len(second) - len(pairs),
        "accuracy": [before, mean(b["reward"] for _, b in pairs)],
        "difference": difference,
        "normalised_gain": ratio(difference, 1 - before),
        "interval_95": paired_bootstrap(differences, seed=seed),
        "mcnemar_p": mcnemar(len(gains), len(losses)),
        "gains": gains,
        "losses": losses,
        "worded_otherwise": worded,
    }
