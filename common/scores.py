"""Stage 5's rules: stored answers -> numbers, by pure functions; no model, no video. evaluate.py is the command line.

    items, duplicates, source = read_predictions("eval_mmvu_greedy_output.json")     # any of five formats
    report = make_report(items, "mmvu")                                              # accuracy, per type and task

Every answer gets two scores. "official": what a benchmark asks for, a readable right answer ("(B)", "B. car", "1,200" for "1200", mean
relative accuracy with <=). "video_r1": what eval_bench.py of Video-R1, VideoCFR and GRPO-CARE gives, for numbers that are to be compared
with theirs: the exact letter, the decimal rule, mean relative accuracy with <, nothing for OCR and free-form.
In both, the answer is the first <answer> block; for "video_r1" the whole output where there is none or an empty one, for "official" only
where the output has no blocks at all.
"""

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path

import numpy as np

import reward
from common.data import (
    PROBLEM_TYPES,
    DataError,
    option_texts,
    read_choice,
    solution_letters,
    split_options,
)

# Questions of each benchmark's files (test, validation or level), after the releases' own; a file of another size is warned about.
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
}
# VSI-Bench's eight tasks; the three levels of a direction are averaged into one first.
VSI_TASKS = (
    "obj_appearance_order",
    "object_rel_distance",
    "route_planning",
    "object_rel_direction",
    "object_counting",
    "object_abs_distance",
    "object_size_estimation",
    "room_size_estimation",
)
VSI_NUMBERS = (
    "object_counting",
    "object_abs_distance",
    "object_size_estimation",
    "room_size_estimation",
)
TASK_FIELDS = (
    "original_question_type",
    "task_type",
    "task",
    "task_name",
    "question_type",
    "type",
    "subdomain",
    "dim",
    "kind",
)
BREAKDOWNS = (
    "duration",
    "domain",
    "sub_category",
)  # further fields whose values get a score of their own, where they are texts


@dataclass
class Item:
    """One question with its stored output. `solution` is the bare truth; `error` the cause why there is no output."""

    problem_id: str
    problem_type: str
    solution: str
    output: str
    question: str = ""
    options: list[str] = field(default_factory=list)
    task: str = ""
    groups: dict = field(
        default_factory=dict
    )  # further fields that a benchmark breaks its score down by: duration, domain
    error: str | None = None
    evidence: list[tuple[float, float]] = field(
        default_factory=list
    )  # (start s, end s) that the answer rests on, where it is known
    frame_use: dict | None = None  # where the answer looked: see frame_use_numbers
    stored: float | None = None  # the score that the file itself has
    tw_grpo: bool = False  # a TW-GRPO log: its own rule finds an answer without tags


# ------------------------------------------------------------------------------------------------------------ stored files


def first_field(row, names, default=""):
    """The first of a row's fields that says something, as text."""
    return str(next((row[name] for name in names if row.get(name) not in (None, "")), default))


def item_of(row, **more):
    """A question's fields, as Video-R1 names them, beside its output -> Item."""
    options, stored = row.get("options") or [], more.pop("stored", row.get("reward"))
    output = row.get("output")
    if not isinstance(options, list) or not isinstance(output, str | None):
        raise DataError("has options that are no list, or an output that is no text")
    if not more.get("error", row.get("error")):
        missing = [name for name in ("problem_type", "solution") if row.get(name) in (None, "")] + [
            "output"
        ] * ("output" not in row)
        if missing:
            raise DataError(f"has no {', '.join(missing)}")
    values = {
        "problem_id": first_field(row, ("problem_id", "sample_id")),
        "problem_type": str(row.get("problem_type") or ""),
        "solution": reward.solution_answer(str(row.get("solution") or "")),
        "output": output or "",
        "question": first_field(row, ("problem", "question")),
        "options": [str(option) for option in options],
        "task": first_field(row, TASK_FIELDS),
        "error": str(row["error"]) if row.get("error") else None,
        "evidence": [
            (float(start), float(end))
            for start, end in row.get("evidence") or row.get("glue") or []
        ],
        "frame_use": row.get("frame_use"),
        "groups": {
            name: row[name] for name in BREAKDOWNS if isinstance(row.get(name), str) and row[name]
        },
        "stored": float(stored)
        if isinstance(stored, int | float) and math.isfinite(stored)
        else None,
    }
    item = Item(**{**values, **more})
    if item.problem_type == "multiple choice":
        item.solution = (
            solution_letters(item.solution, item.options) or item.solution
        )  # as data.py reads it
    if (
        item.output.strip() == "<answer>error</answer>"
    ):  # what eval_bench.py stores for a whole batch of which one video is unreadable
        item.error = item.error or "stored as error: the file has <answer>error</answer>"
    if (
        not item.problem_id
    ):  # two runs over the same question must name it alike, whatever the order of their files
        told = json.dumps([item.question, row.get("video") or row.get("path"), item.options])
        item.problem_id = hashlib.sha1(told.encode()).hexdigest()[:12]
    return item


def from_tw_grpo_log(row):
    """A line of TW-GRPO's result log: the input row under `question`, the prompt's echo maybe before the answer."""
    asked = row["question"]
    question, options = split_options(asked["problem"])
    told = row["model_output"] or ""
    begin = told.find("system")
    if begin >= 0 and "assistant\n" in told[begin:]:
        told = told[told.index("assistant\n", begin) + len("assistant\n") :]
    fields = {
        "problem_type": "multiple choice",
        **asked,
        "solution": asked.get("solution") or row["ground_truth"],
        "problem": question,
        "options": options or asked.get("options"),
        "output": told,
    }
    return item_of(fields, stored=row.get("accuracy_score"), tw_grpo=True)


def from_lmms_eval(row):
    """A line of lmms-eval's samples: the data set's row under `doc`; MVBench's twenty files count their doc_id from 0 each."""
    doc, answers, target = (
        row["doc"],
        row.get("resps") or row.get("filtered_resps"),
        str(row["target"]),
    )
    while isinstance(answers, list):
        answers = answers[0] if answers else ""
    options = doc.get("options") or doc.get("candidates") or doc.get("choices") or []
    options = list(options.values()) if isinstance(options, dict) else options
    if isinstance(options, str) or not any(options):
        options = split_options(row.get("input") or "")[1]
    lettered = re.compile(r"\(?[A-Z][.):]")
    options = [
        str(text) if lettered.match(str(text)) else f"{letter}. {text}"
        for letter, text in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options, strict=False)
    ]
    task = first_field(doc, TASK_FIELDS)
    if task in VSI_NUMBERS:
        kind = "regression"
    elif options or re.fullmatch(r"[A-Z]", target):
        kind = "multiple choice"
    else:
        kind = "numerical" if exact_number(target) is not None else "free-form"
    texts = [re.sub(r"^\(?[A-Z][.):]\s*", "", text) for text in options]
    if kind == "multiple choice" and target in texts:  # MVBench keeps the right option's text
        target = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[texts.index(target)]
    number = hashlib.sha1(json.dumps(doc, sort_keys=True).encode()).hexdigest()[:12]
    names = [name for name in row if name.endswith(("_score", "accuracy", "_acc"))]
    scores = [row[name] for name in names if isinstance(row[name], dict | float | int)]
    stored = None
    for score in scores[:1]:
        if not isinstance(score, dict):
            stored = float(score)
        elif "score" in score or "correct" in score:
            stored = float(score.get("score", score.get("correct")))
        elif "answer" in score:
            stored = float(
                str(score.get("pred_answer", score.get("parsed_pred"))) == str(score["answer"])
            )
    return item_of(
        {
            **doc,
            "problem": doc.get("question"),
            "problem_type": kind,
            "solution": target,
            "options": options,
            "output": answers,
        },
        problem_id=f"{row['doc_id']}-{number}",
        stored=stored,
    )


def read_json(path):
    """A JSON document, or JSON lines whatever the file's name -> list of rows, and the settings of a report of ours ({} otherwise)."""
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file} not found")
    try:
        text = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    try:
        document = json.loads(text)
    except ValueError:
        document = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                document += [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise DataError(
                    f"{file} is neither JSON nor JSON lines: line {number}: {error}"
                ) from error
    settings = document.get("settings") if isinstance(document, dict) else {}
    settings = settings if isinstance(settings, dict) else {}
    if isinstance(document, dict):
        document = document["results"] if "results" in document else [document]
    if (
        not isinstance(document, list)
        or not document
        or not all(isinstance(row, dict) for row in document)
    ):
        raise DataError(
            f"{file} holds no predictions (a list of objects, or an object with results, is expected)"
        )
    return document, settings


def read_predictions(path):
    """Stored predictions -> (list of Item without repeats, list of repeated problem_ids, name of the format).

    Formats, told by their fields: eval_results of Video-R1, VideoCFR and GRPO-CARE; the reports and prediction lines of evaluate.py;
    TW-GRPO's result log; lmms-eval's samples. Of a repeated problem_id the first row counts. DataError names the row that is none.
    """
    rows, _ = read_json(path)
    items, repeated, source = {}, [], ""
    for index, row in enumerate(rows):
        if "model_output" in row:
            source, read = "TW-GRPO", from_tw_grpo_log
        elif "doc" in row:
            source, read = "lmms-eval", from_lmms_eval
        else:
            source, read = "Video-R1", item_of
        try:
            item = read(row)
        except DataError as error:
            raise DataError(f"{path}: row {index} {error}") from error
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: row {index} is no {source} prediction ({type(error).__name__}: {error})"
            ) from error
        if item.problem_id in items:
            other = item.question != items[item.problem_id].question
            repeated.append(item.problem_id + (" (another question)" if other else ""))
        items.setdefault(item.problem_id, item)
    return list(items.values()), repeated, source


def benchmark_of(path, items=()):
    """The benchmark that a file's name or its tasks speak of, "" when neither does."""
    name = Path(path).name.lower()
    level = re.search(r"(?:validation|seed.*)_?l([123])(?!\d)", name)
    if level:
        return f"seed-bench-r1 L{level[1]}"
    words, joined = re.split(r"[^a-z0-9]+", name), re.sub(r"[^a-z0-9]+", "", name)
    for benchmark in SIZES:
        if (
            benchmark in words
            or (len(benchmark) > 4 and benchmark in joined)
            or (benchmark == "mmvu" and "mmvu" in joined)
        ):
            return benchmark
    return "vsibench" if items and all(vsi_task(item.task) for item in items) else ""


# ----------------------------------------------------------------------------------------------------- answers and their scores


def find_answer(item):
    """The text that is scored: the first <answer> block; of an output without blocks all of it, in TW-GRPO's logs what follows "answer".

    "" for a think block that no answer follows: words of the reasoning are no answer to a free-form question."""
    block = re.search(r"<answer>(.*?)</answer>", item.output, re.DOTALL)
    if block or not item.tw_grpo:
        return (
            block[1].strip() if block else "" if "<think>" in item.output else item.output.strip()
        )
    told = re.search(r"(?:answer|Answer|ANSWER)[:\s]*([A-Z](?:\s*,\s*[A-Z])*)", item.output)
    return told[1] if told else ""


def exact_number(text):
    """ "1,234.5" -> Fraction; None for anything that is no finite number (units, words, "nan", "inf"), as reward.py reads numbers."""
    try:
        value = Decimal(text.strip().replace(",", ""))
    except InvalidOperation:
        return None
    return (
        Fraction(value) if value.is_finite() and abs(value.adjusted()) < 300 else None
    )  # 1e999999999 would fill the memory


def mean_relative_accuracy(answer, truth, strict=False):
    """Share of the ten tolerances 5 %, 10 %, ... 50 % that the relative error |answer - truth| / |truth| keeps; two texts -> [0, 1].

    VSI-Bench's code asks for error <= tolerance, eval_bench.py of Video-R1 for < (strict). Exact: 20 |answer - truth| against k |truth|,
    k = 1..10. In float32, as Video-R1 has it, rounding lets 9 for 10 and 19 for 20 pass one tolerance more than strict < does.
    The right number scores 1 in both, a truth of 0 too.

    >>> mean_relative_accuracy("3", "4"), mean_relative_accuracy("3", "4", strict=True)
    (0.6, 0.5)
    """
    y_hat, y = exact_number(answer), exact_number(truth)
    if y_hat is None or y is None:
        return 0.0
    if y_hat == y:
        return 1.0
    error, unit = 20 * abs(y_hat - y), abs(y)
    return sum(error < k * unit if strict else error <= k * unit for k in range(1, 11)) / 10


def several_letters(truth):
    """Whether a truth names several options: "A,C"."""
    return re.fullmatch(r"[A-Za-z](\s*,\s*[A-Za-z])+", truth) is not None


def official_score(answer, item):
    """Score of an answer's text in [0, 1] by what the benchmarks ask for; several right letters: all of them and no other."""
    truth = item.solution
    if item.problem_type == "multiple choice":
        if several_letters(truth):
            return float(reward.multi_choice_reward(answer, truth) == 1.0)
        return float(answer == truth or read_choice(answer, item.options) == truth.upper())
    if item.problem_type == "numerical":
        told, right = exact_number(answer), exact_number(truth)
        return float(None not in (told, right) and round(float(told), 2) == round(float(right), 2))
    if item.problem_type == "regression":
        return mean_relative_accuracy(
            (answer.split() or [""])[0].rstrip("."), truth
        )  # "5 meters": VSI-Bench takes the first word
    return (
        {"OCR": reward.ocr_reward, "free-form": reward.rouge_reward}[item.problem_type](
            answer, truth
        )
        if answer
        else 0.0
    )


def video_r1_score(answer, item):
    """Score of an answer's text in [0, 1] as eval_bench.py of Video-R1, VideoCFR and GRPO-CARE gives it; an unknown type gives 0."""
    if item.problem_type == "multiple choice":
        return float(answer == item.solution)
    if item.problem_type == "numerical":
        return reward.numerical_reward(answer, item.solution)
    return (
        mean_relative_accuracy(answer, item.solution, strict=True)
        if item.problem_type == "regression"
        else 0.0
    )


def score_item(item):
    """Item -> record of a report: the item, its prediction, `reward` (official), `reward_video_r1`, `correct`, format."""
    answer, known = find_answer(item), item.problem_type in PROBLEM_TYPES
    plain = reward.extract_answer(item.output) or item.output.strip()  # eval_bench.py's
    official = official_score(answer, item) if answer and known and not item.error else 0.0
    use = item.frame_use and {
        name: value for name, value in item.frame_use.items() if name != "events"
    }  # the predictions keep those
    return {
        "problem_id": item.problem_id,
        "problem_type": item.problem_type,
        "task": item.task,
        **item.groups,
        "problem": item.question,
        "options": item.options,
        "solution": item.solution,
        "evidence": item.evidence,
        "output": item.output,
        "prediction": answer,
        "reward": official,
        "correct": official == 1.0,
        "reward_video_r1": video_r1_score(plain, item) if plain and not item.error else 0.0,
        "format": reward.format_reward(item.output),
        "frame_use": use,
        "error": item.error,
    }


# ---------------------------------------------------------------- a judge's readings of a reasoning; TAC, consistency


def last_block(text, tag):
    """Trimmed content of the last <tag>...</tag>, upper or lower case; "" without one (Video-R2's reading of a response)."""
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL | re.IGNORECASE)
    return blocks[-1].strip() if blocks else ""


def agrees(told, truth, problem_type):
    """Whether a letter or number agrees with another: a letter exactly, regression within 5 %, numerical after rounding to two decimals."""
    if problem_type == "multiple choice":
        return told != "" and told == truth.upper()
    told, truth = exact_number(told), exact_number(truth)
    if None in (told, truth):
        return False
    return (
        20 * abs(told - truth) <= abs(truth)
        if problem_type == "regression"
        else round(float(told), 2) == round(float(truth), 2)
    )


def reasoning_metrics(records, readings, judge):
    """Does the answer follow from the reasoning? TAC after Video-R2, by both formulas that its code exports, and the consistency rate.

    readings: {problem_id: (answer, conclusion of the reasoning)}, letters or numbers, "" for none, as the judge of that name reads them.
    a: answer right, t: conclusion right, TP both, TN neither, FP only t, FN only a: answer_to_thinking_correlation = (TP + TN) / N, in
    which two different wrong letters agree; consistency_accuracy = TP / (TP + FN), more likely the published one. N: questions that have
    an output. consistency_rate: share of all questions, those without an output too, whose conclusion is the answer, right or wrong; a
    reasoning that never concludes is not.
    """
    counts, consistent, silent, outputs = Counter(), 0, 0, 0
    for record in records:
        if record["problem_id"] not in readings:
            continue
        answer, concluded = readings[record["problem_id"]]
        right, kind = record["solution"], record["problem_type"]
        consistent += agrees(concluded, answer, kind)
        if record["output"].strip() and not record["error"]:
            outputs += 1
            silent += concluded == ""
            a, t = agrees(answer, right, kind), agrees(concluded, right, kind)
            counts[("TN", "FP", "FN", "TP")[2 * a + t]] += 1
    ratio = lambda part, whole: part / whole if whole else None  # noqa: E731
    return {
        "judge": judge,
        "n": len(readings),
        "not_read": len(records) - len(readings),
        "outputs": outputs,
        "no_conclusion": silent,
        **{name: counts[name] for name in ("TP", "TN", "FP", "FN")},
        "TAC": {
            "answer_to_thinking_correlation": ratio(counts["TP"] + counts["TN"], outputs),
            "consistency_accuracy": ratio(counts["TP"], counts["TP"] + counts["FN"]),
        },
        "consistency_rate": ratio(consistent, len(readings)),
    }


# -------------------------------------------------------------------------------------------------------------- the report


def mean(values):
    """Mean of numbers; None where there are none, which is not 0."""
    values = list(values)
    return sum(values) / len(values) if values else None


def summary(records):
    """Numbers of a list of records."""
    return {
        "n": len(records),
        "correct": sum(record["correct"] for record in records),
        "accuracy": mean(r["reward"] for r in records),
        "accuracy_video_r1": mean(r["reward_video_r1"] for r in records),
        "format_rate": mean(r["format"] for r in records),
    }


def grouped(records, name):
    """{value of a field: summary}, of the records that have it."""
    groups = defaultdict(list)
    for record in records:
        if record.get(name):
            groups[record[name]].append(record)
    return {value: summary(group) for value, group in sorted(groups.items())}


def vsi_task(name):
    """A question type of VSI-Bench -> its task, "" for other names: the three levels of object_rel_direction are one task."""
    task = re.sub(r"^(object_rel_direction)_(easy|medium|hard)$", r"\1", name)
    return task if task in VSI_TASKS else ""


def vsi_numbers(records, reward_name):
    """VSI-Bench's four numbers: what eval_bench.py prints (mean_acc, mean_mra), their mean over questions, the benchmark's own over tasks.

    official: the mean of eight tasks; a direction's three levels are averaged first, each level counting the same.
    """
    levels = defaultdict(list)
    for record in records:
        levels[record["task"]].append(record[reward_name])
    tasks = defaultdict(list)
    for name, values in levels.items():
        tasks[vsi_task(name)].append(mean(values))
    scores = {name: mean(tasks[name]) for name in VSI_TASKS if name in tasks}
    return {
        "mean_acc": mean(r[reward_name] for r in records if r["problem_type"] != "regression"),
        "mean_mra": mean(r[reward_name] for r in records if r["problem_type"] == "regression"),
        "sample_weighted_mean": mean(r[reward_name] for r in records),
        "official": mean(scores.values()),
        "tasks": scores,
    }


def several_letter_numbers(records):
    """Where questions have several right letters (CLEVRER): per question, per option and by TW-GRPO's partial credit."""
    partial, options_right = {}, []
    for record in records:
        partial[record["problem_id"]] = 0.0
        if not record["error"]:
            partial[record["problem_id"]] = reward.multi_choice_reward(
                record["prediction"], record["solution"]
            )
        given, right = (
            {letter.strip() for letter in record[name].split(",")}
            for name in ("prediction", "solution")
        )
        options_right += [
            (letter in given) == (letter in right)
            if record["prediction"] and not record["error"]
            else False
            for letter in option_texts(record["options"])
        ]
    groups = {
        "overall": records,
        "single answer": [r for r in records if not several_letters(r["solution"])],
        "several answers": [r for r in records if several_letters(r["solution"])],
    }
    return {"per_option_accuracy": mean(options_right)} | {
        name: {
            "n": len(group),
            "per_question_accuracy": mean(r["reward"] for r in group),
            "partial_accuracy": mean(partial[r["problem_id"]] for r in group),
        }
        for name, group in groups.items()
    }


def overlap(predicted, spans):
    """(start, end) against true spans -> the best intersection over the prediction, and over the union; a point covers itself."""
    start, end = predicted
    shares = []
    for low, high in spans:
        common = max(0.0, min(end, high) - max(start, low))
        union = (end - start) + (high - low) - common
        inside = common / (end - start) if end > start else float(low <= start <= high)
        shares.append((inside, common / union if union else 0.0))
    return max(share[0] for share in shares), max(share[1] for share in shares)


def cited_interval(record):
    """(start s, end s): the hull of all times that the reasoning cites; None without one."""
    claims = [] if record["error"] else reward.parse_claims(last_block(record["output"], "think"))
    return (
        (min(claim[0] for claim in claims), max(claim[1] for claim in claims)) if claims else None
    )


def frame_use_interval(record):
    """(start s, end s) of the slots around the most used one that have more than an even share of the frame use; None without it."""
    return tuple(record["frame_use"]["interval"]) if record["frame_use"] else None


def grounding_numbers(records, interval=cited_interval):
    """NExT-GQA's figures, where a question has known intervals, by what `interval` predicts of a record.

    acc_gqa: answered right and IoP >= 0.5. A question without a prediction counts as 0 in every figure."""
    known, scores = [record for record in records if record["evidence"]], []
    for record in known:
        predicted = interval(record)
        scores.append(overlap(predicted, record["evidence"]) if predicted else None)
    inside, union = ([share[place] if share else 0.0 for share in scores] for place in (0, 1))
    right = [
        record["correct"] and share >= 0.5 for record, share in zip(known, inside, strict=True)
    ]
    return {
        "n": len(known),
        "predicted": sum(share is not None for share in scores),
        "acc_gqa": mean(right),
    } | {
        name: value
        for kind, shares in (("IoP", inside), ("IoU", union))
        for name, value in (
            (f"m{kind}", mean(shares)),
            (f"{kind}@0.3", mean(x >= 0.3 for x in shares)),
            (f"{kind}@0.5", mean(x >= 0.5 for x in shares)),
        )
    }


def event_enrichment(events, slots, chosen):
    """How often the strongest token-slot pairs are about chosen slots (the paper's figure 9): events, flat indices token * slots + slot;
    chosen, positions of slots -> their share of the events over their share of the slots, 1 is chance; None where all or none are chosen.

    >>> event_enrichment([1, 4, 5, 9], 4, [0, 1])  # tokens 0, 1, 1, 2 on the slots 1, 0, 1, 1: all on half of the slots
    2.0
    """
    if not 0 < len(chosen) < slots:
        return None
    return sum(event % slots in chosen for event in events) / len(events) / (len(chosen) / slots)


def frame_use_numbers(records):
    """Where the answers looked, of questions about videos of two slots or more; means over all, and over right and wrong answers.

    A record's frame_use: slots, shares (t,) of the temporal slots that sum to 1; interval, see frame_use_interval; consensus, its agreement
    with the prior (Eq. 6); enrichment, see event_enrichment, and tokens and consensus_slots, which it is made of (evaluate.use_row; the
    events are in the predictions); evidence, its mass on the slots that the answer rests on, and chance, uniform use's mass there; None
    where the prior or the evidence is not known. entropy is divided by log t: 1 is even use, 0 a single slot.
    """

    def numbers(uses):
        entropies = [
            -sum(p * math.log(p) for p in use["slots"] if p > 0) / math.log(len(use["slots"]))
            for use in uses
        ]
        means = {
            name: mean(use[name] for use in uses if use.get(name) is not None)
            for name in ("consensus", "enrichment", "evidence", "chance")
        }
        return {"n": len(uses), "entropy": mean(entropies), **means}

    used = [record for record in records if record["frame_use"]]
    return {
        name: numbers([r["frame_use"] for r in used if want is None or r["correct"] is want])
        for name, want in (("all", None), ("right", True), ("wrong", False))
    }


def make_report(items, benchmark="", repeated=()):
    """Items -> report: every number with its denominator; a question without an output counts as wrong and stands under `errors`."""
    records, warnings = [score_item(item) for item in items], []
    if not records:
        raise DataError("there are no predictions to score")
    if benchmark and len(records) not in SIZES[benchmark]:
        sizes = " or ".join(map(str, SIZES[benchmark]))
        warnings.append(
            f"{benchmark} has {sizes} questions, this file {len(records)}: not comparable with published numbers"
        )
    unknown = Counter(
        r["problem_type"]
        for r in records
        if r["problem_type"] not in PROBLEM_TYPES and not r["error"]
    )
    if unknown:
        warnings.append(f"problem types that no rule scores count as wrong: {dict(unknown)}")
    if repeated:
        others = sum(name.endswith("(another question)") for name in repeated)
        warnings.append(
            f"{len(repeated)} rows repeat the problem_id of an earlier one and were left out"
            + (f"; {others} of them ask something else: is this one benchmark?" if others else "")
        )
    errors = defaultdict(dict)
    for record in records:
        if record["error"]:
            errors[record["error"].partition(":")[0]][record["problem_id"]] = record["error"]
    report = {
        "benchmark": benchmark or None,
        **summary(records),
        "scoring": {
            "accuracy": "mean of `reward`: letters and numbers as they are meant, mean relative accuracy with <=, OCR and free-form by overlap",
            "accuracy_video_r1": "mean of `reward_video_r1`: eval_bench.py's rules, mean relative accuracy with <, OCR and free-form are 0",
        },
    }
    report["video_r1"] = {
        "mean_acc": mean(
            r["reward_video_r1"] for r in records if r["problem_type"] != "regression"
        ),
        "mean_mra": mean(
            r["reward_video_r1"] for r in records if r["problem_type"] == "regression"
        ),
        "correct": sum(r["reward_video_r1"] == 1.0 for r in records),
    }
    report["by_type"], report["by_task"] = (
        grouped(records, "problem_type"),
        grouped(records, "task"),
    )
    report["task_mean"] = mean(row["accuracy"] for row in report["by_task"].values())
    for name in BREAKDOWNS:
        if any(record.get(name) for record in records):
            report[f"by_{name}"] = grouped(records, name)
    if benchmark == "vsibench":
        report["vsi_bench"] = {
            "official": vsi_numbers(records, "reward"),
            "video_r1": vsi_numbers(records, "reward_video_r1"),
        }
        missing = [
            task for task in VSI_TASKS if task not in report["vsi_bench"]["official"]["tasks"]
        ]
        if missing:
            warnings.append(
                f"VSI-Bench's own mean is over {len(VSI_TASKS) - len(missing)} of its 8 tasks; no {', '.join(missing)}"
            )
    if any(several_letters(record["solution"]) for record in records):
        report["several_letters"] = several_letter_numbers(records)
    stored = [item.stored for item in items]
    if any(record["evidence"] for record in records):
        report["grounding"] = grounding_numbers(records)
        if any(record["frame_use"] for record in records):
            report["grounding_by_frame_use"] = grounding_numbers(records, frame_use_interval)
    if any(record["frame_use"] for record in records):
        report["frame_use"] = frame_use_numbers(records)
    if None not in stored:
        report["accuracy_as_stored"] = mean(stored)
    not_judged = dict.fromkeys(("judge", "TAC", "consistency_rate", "VAS"))
    not_judged["reason"] = "no judge was asked (--judge_base, --judge_model)"
    report |= {
        "empty_outputs": sum(not r["output"].strip() for r in records),
        "errors": errors,
        "duplicates": list(repeated),
        "judged": not_judged,
        "warnings": warnings,
        "results": records,
    }
    return report


# ------------------------------------------------------------------------------------------------------- two runs, side by side


def mcnemar(gains, losses):
    """Exact two-sided p-value of McNemar's test: were gains and losses equally likely, how rare is a split as uneven as this one?

    >>> mcnemar(9, 1), mcnemar(3, 3)
    (0.021484375, 1.0)
    """
    total = gains + losses
    tail = sum(math.comb(total, k) for k in range(min(gains, losses) + 1))
    return min(1.0, 2 * tail / 2**total)


def paired_bootstrap(differences, level=0.95, samples=10_000, seed=0):
    """Confidence interval of the mean of paired differences, by percentiles over resampled questions -> (low, high)."""
    values, counts = np.unique(np.asarray(differences, dtype=float), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(
        len(differences), counts / counts.sum(), size=samples
    )  # (samples, distinct values)
    low, high = np.quantile(drawn @ values / len(differences), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare(first, second, seed=0):
    """Records of two runs over the same questions -> what changed from the first to the second, and whether that is more than noise.

    gains: wrong in the first and fully right in the second; losses: the other way round. difference: mean of the paired differences of the
    official scores, with its 95 % interval; normalised_gain: its share of what was left to gain, VideoMMMU's delta knowledge where the
    first are the answers before the video and the second those after it. DataError when no question is shared, or when one has another
    solution.
    """
    by_id = {record["problem_id"]: record for record in second}
    pairs = [
        (record, by_id[record["problem_id"]]) for record in first if record["problem_id"] in by_id
    ]
    if not pairs:
        raise DataError(
            "the two files share no problem_id: they are of different questions, or of formats that name them differently"
        )
    for a, b in pairs:
        if (a["solution"], a["problem_type"]) != (b["solution"], b["problem_type"]) and not (
            a["error"] or b["error"]
        ):
            told = f"{a['solution']!r} is right in the first, {b['solution']!r} in the second"
            raise DataError(
                f"problem_id {a['problem_id']} is another question in each file: {told}"
            )
    gains = [b["problem_id"] for a, b in pairs if b["correct"] and not a["correct"]]
    losses = [b["problem_id"] for a, b in pairs if a["correct"] and not b["correct"]]
    differences = [b["reward"] - a["reward"] for a, b in pairs]
    before = mean(a["reward"] for a, _ in pairs)
    return {
        "n": len(pairs),
        "only_in_first": len(first) - len(pairs),
        "only_in_second": len(second) - len(pairs),
        "accuracy": [before, mean(b["reward"] for _, b in pairs)],
        "difference": mean(differences),
        "normalised_gain": mean(differences) / (1 - before) if before < 1 else None,
        "interval_95": paired_bootstrap(differences, seed=seed),
        "mcnemar_p": mcnemar(len(gains), len(losses)),
        "gains": gains,
        "losses": losses,
    }
