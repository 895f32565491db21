"""evaluate.py and common/scores.py: rules, stored files, judges, comparison, resumed runs."""

import base64
import io
import itertools
import json
import random
import shutil
import socket
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from warm import Script, run_script

import evaluate
import reward
from common import data, policy, scores
from common.inputs import Ready
from common.policy import load_model


def command(monkeypatch, capsys, *words):
    """evaluate.py in this process -> exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    try:
        evaluate.main()
        status = 0
    except SystemExit as end:
        status = end.code
    return status, *capsys.readouterr()


def row(problem_id, output, solution, problem_type="multiple choice", **more):
    return {
        "problem_id": problem_id,
        "problem": f"Question {problem_id}?",
        "data_type": "video",
        "problem_type": problem_type,
        "options": ["A. red", "B. blue", "C. green"] if problem_type == "multiple choice" else [],
        "output": output,
        "solution": f"<answer>{solution}</answer>",
        **more,
    }


def write(path, document, lines=False):
    path.write_text("\n".join(map(json.dumps, document)) + "\n" if lines else json.dumps(document))
    return path


def rescore(path, monkeypatch, capsys, *words):
    output = path.parent / "out" / "report.json"
    status, out, err = command(monkeypatch, capsys, "--rescore", path, "--output", output, *words)
    assert status == 0, err
    return json.loads(output.read_text()), out, err


# ------------------------------------------------------------------------------- the scoring rules

RULES = [  # problem type, solution, what stands in the answer block, official score, Video-R1's
    ("multiple choice", "B", "B", 1, 1),
    ("multiple choice", "B", " B\n", 1, 1),
    ("multiple choice", "B", "A", 0, 0),
    ("multiple choice", "B", "B.", 1, 0),
    ("multiple choice", "B", "(B)", 1, 0),
    ("multiple choice", "B", "B. blue", 1, 0),
    ("multiple choice", "B", "b", 1, 0),
    ("multiple choice", "B", "blue", 1, 0),
    ("multiple choice", "B", "B. red", 0, 0),
    ("multiple choice", "A", "a dog", 0, 0),
    ("multiple choice", "C", "Cannot tell", 0, 0),
    ("multiple choice", "B", "Both", 0, 0),
    ("multiple choice", "A,C", "C, A", 1, 0),
    ("multiple choice", "A,C", "A,A,C", 1, 0),
    ("multiple choice", "A,C", "A,C", 1, 1),
    ("multiple choice", "A,C", "A", 0, 0),
    ("multiple choice", "A,C", "AC", 0, 0),
    ("multiple choice", "A,C", "A,B", 0, 0),
    ("multiple choice", "A,C", "A,", 0, 0),
    ("multiple choice", "A,C", "A.", 0, 0),
    ("numerical", "5", "5", 1, 1),
    ("numerical", "5.0", "5", 1, 0),
    ("numerical", "5", "5.0", 1, 0),
    ("numerical", "1200", "1,200", 1, 0),
    ("numerical", "5.0", "5.00", 1, 1),
    ("numerical", "5", "5 cm", 1, 0),
    ("numerical", "5", "5%", 1, 0),
    ("numerical", "5", "five", 0, 0),
    ("numerical", "2.675", "2.68", 0, 0),
    ("numerical", "2.675", "2.67", 1, 1),
    ("numerical", "5", "nan", 0, 0),
    ("numerical", "5", "inf", 0, 0),
    ("numerical", "0.125", "0.12", 1, 1),
    ("numerical", "1,200.5", "1200.5", 1, 1),
    ("regression", "2", "1", 0.1, 0),
    ("regression", "4", "3", 0.6, 0.5),
    ("regression", "10", "7", 0.5, 0.4),
    ("regression", "10", "9", 0.9, 0.8),
    ("regression", "20", "19", 1, 0.9),
    ("regression", "100", "85", 0.8, 0.7),
    ("regression", "4", "4", 1, 1),
    ("regression", "4", "4.0", 1, 1),
    ("regression", "0.7", "0.35", 0.1, 0),
    ("regression", "0.3", "0.27", 0.9, 0.8),
    ("regression", "4", "nan", 0, 0),
    ("regression", "4", "inf", 0, 0),
    ("regression", "4", "four", 0, 0),
    ("regression", "4", "4 chairs", 1, 0),
    ("regression", "4", "1e999999999", 0, 0),
    ("regression", "0", "0", 1, 1),
    ("regression", "0", "1", 0, 0),
    ("regression", "-4", "9", 0, 0),
    ("regression", "4", "9", 0, 0),
    ("OCR", "stop here", "stop here", 1, 0),
    ("OCR", "stop here", "stop", 0.5, 0),
    ("free-form", "a red car", "a red car", 1, 0),
]


@pytest.mark.parametrize("kind,solution,answer,official,video_r1", RULES)
def test_rules(kind, solution, answer, official, video_r1):
    record = scores.score_item(
        scores.item_of(row(1, f"<think>so</think>\n<answer>{answer}</answer>", solution, kind))
    )
    assert (record["reward"], record["reward_video_r1"]) == pytest.approx(
        (official, video_r1), abs=1e-9
    )
    assert record["correct"] == (record["reward"] == 1.0)


@pytest.mark.parametrize(
    "output,solution,kind,official,video_r1",
    [
        ("B", "B", "multiple choice", 1, 1),  # no tag: the whole output is the answer
        ("It is blue. B", "B", "multiple choice", 0, 0),
        ("<answer></answer>", "B", "multiple choice", 0, 0),
        ("<ANSWER>B</ANSWER>", "B", "multiple choice", 1, 0),  # tags are case-sensitive in Video-R1
        (
            "<answer>A</answer> no: <answer>B</answer>",
            "B",
            "multiple choice",
            0,
            0,
        ),  # the first block counts
        ("<answer>\nB\n</answer>", "B", "multiple choice", 1, 1),
        ("<answer>B", "B", "multiple choice", 1, 0),  # the end tag was a stop string
        ("a red car", "a red car", "free-form", 1, 0),
        ("<think>a red car", "a red car", "free-form", 0, 0),  # thinking is no answer
        ("<think>a red car</think><answer></answer>", "a red car", "free-form", 0, 0),
        ("", "B", "multiple choice", 0, 0),
        (None, "B", "multiple choice", 0, 0),
        ("4", "4", "regression", 1, 1),
        ("There are 4.", "4", "regression", 0, 0),
        ("There are 4.", "4", "numerical", 0, 0),
    ],
)
def test_extraction(output, solution, kind, official, video_r1):
    record = scores.score_item(scores.item_of(row(1, output, solution, kind)))
    assert (record["reward"], record["reward_video_r1"]) == (official, video_r1)


def test_an_unknown_problem_type_scores_nothing_and_is_told(tmp_path, monkeypatch, capsys):
    path = write(
        tmp_path / "a.json",
        {
            "results": [
                row(1, "<answer>4</answer>", "4", "counting"),
                row(2, "<answer>B</answer>", "B"),
            ]
        },
    )
    report, _, err = rescore(path, monkeypatch, capsys)
    assert report["accuracy"] == 0.5 and "{'counting': 1}" in err


# ------------------------------------------------------------------------------------ stored files


def test_video_r1_results(tmp_path, monkeypatch, capsys):
    rows = [
        row(1, "<think>x</think><answer>B</answer>", "B", reward=1.0, task_type="colour"),
        row(2, "<think>x</think> <answer>A</answer>", "B", reward=0.0, task_type="colour"),
        row(3, "<answer>3</answer>", "4", "regression", reward=0.5, task_type="count"),
        row(4, "<answer>word</answer>", "word", "OCR", reward=0.0),
        row(5, "", "A", reward=0.0),
        row(6, "<answer>error</answer>", "A", reward=0.0),  # a batch with one unreadable video
        row(1, "<answer>C</answer>", "B", reward=0.0),  # repeats problem 1: the first counts
        {**row(3, "<answer>C</answer>", "B", reward=0.0), "problem": "Another?"},
    ]
    path = write(tmp_path / "eval_mmvu_x_greedy_output.json", {"results": rows, "final_acc": [{}]})
    report, out, err = rescore(path, monkeypatch, capsys)
    assert (report["n"], report["correct"], report["format_rate"]) == (6, 2, pytest.approx(2 / 6))
    assert report["accuracy"] == pytest.approx(2.6 / 6) and report[
        "accuracy_video_r1"
    ] == pytest.approx(1.5 / 6)
    assert report["video_r1"] == {"mean_acc": pytest.approx(1 / 5), "mean_mra": 0.5}
    assert report["accuracy_as_stored"] == pytest.approx(1.5 / 6)
    assert (
        report["by_type"]["multiple choice"]["n"] == 4 and report["by_type"]["OCR"]["accuracy"] == 1
    )
    assert report["by_task"] == {
        "colour": report["by_task"]["colour"],
        "count": report["by_task"]["count"],
    }
    assert report["by_task"]["colour"]["accuracy"] == 0.5 and report["task_mean"] == pytest.approx(
        0.55
    )
    assert report["duplicates"] == ["1", "3"]
    assert (
        report["empty_outputs"] == 1
        and list(report["errors"]) == ["stored as error"]
        and "multiple choice" in out
    )
    assert "2 rows repeat the problem_id" in err and "mmvu has 625 questions, this file 6" in err


def test_a_report_is_a_prediction_file_too(tmp_path, monkeypatch, capsys):
    rows = [
        row(1, "<think>x</think><answer>B</answer>", "B", task="colour", duration="short"),
        row(2, "<answer>3</answer>", "4", "regression"),
    ]
    report, _, _ = rescore(write(tmp_path / "a.jsonl", rows, lines=True), monkeypatch, capsys)
    status, _, err = command(
        monkeypatch,
        capsys,
        "--rescore",
        tmp_path / "out" / "report.json",
        "--output",
        tmp_path / "again.json",
    )
    again = json.loads((tmp_path / "again.json").read_text())
    assert status == 0 and {**again, "settings": 0, "accuracy_as_stored": 0} == {
        **report,
        "settings": 0,
        "accuracy_as_stored": 0,
    }
    assert (
        again["by_duration"]["short"]["n"] == 1 and again["accuracy_as_stored"] == again["accuracy"]
    )
    status, _, err = command(
        monkeypatch,
        capsys,
        "--rescore",
        tmp_path / "again.json",
        "--output",
        tmp_path / "again.json",
    )
    assert status == 2 and "is a file to be read; choose another" in err


def tw_grpo(video, output, solution, **more):
    return {
        "question": {
            "problem": "Which will happen?\nA. x\nB. y\nC. z",
            "solution": f"<answer>{solution}</answer>",
            "video": video,
        },
        "ground_truth": solution,
        "model_output": output,
        **more,
    }


def test_tw_grpo_log(tmp_path, monkeypatch, capsys):
    rows = [
        tw_grpo("1.mp4", "<think>t</think><answer>C, A</answer>", "A,C", accuracy_score=1.0),
        tw_grpo("2.mp4", "<answer>A</answer>", "A,C", accuracy_score=0.5),  # partial
        tw_grpo("3.mp4", "<answer>AC</answer>", "A,C", accuracy_score=0.0),
        tw_grpo("4.mp4", "So the Answer: B", "B", accuracy_score=1.0),  # no tag
        # "I" is what TW-GRPO's rule finds.
        tw_grpo("5.mp4", "The answer Is B", "B", accuracy_score=0.0),
        # Neither a tag nor the word answer.
        tw_grpo("6.mp4", "B", "B", accuracy_score=0.0),
        tw_grpo(
            "7.mp4",
            "system\nanswer: C\nuser\n?\nassistant\n<answer>B</answer>",
            "B",
            accuracy_score=1.0,
        ),
        tw_grpo("7.mp4", "<answer>A</answer>", "B", accuracy_score=0.0),
    ]
    # JSON lines named .json
    path = write(tmp_path / "clevrer.json", rows, lines=True)
    report, out, err = rescore(path, monkeypatch, capsys)
    right = [True, False, False, True, True, True, True]
    assert [record["correct"] for record in report["results"]] == right
    assert len(report["duplicates"]) == 1
    assert report["accuracy"] == 5 / 7 and report["partial_accuracy"] == pytest.approx(5.5 / 7)
    assert report["accuracy_as_stored"] == pytest.approx(3.5 / 7)
    # The last of the seven, and "B" alone.
    assert report["accuracy_video_r1"] == pytest.approx(2 / 7)
    # Partial credit and two answers that TW-GRPO does not find.
    assert "3 of 7 answers have another score in the file, 1 of them that of" in err
    assert "('The answer Is B' for 'B': 0 there, 1 here)" in err


def test_lmms_eval_samples(tmp_path, monkeypatch, capsys):
    rows = [
        {
            "doc_id": 0,
            "doc": {
                "question": "Q?",
                "options": ["A. x", "B. y"],
                "answer": "B",
                "duration": "short",
            },
            "target": "B",
            "resps": [["<think>y fits</think><answer>B</answer>"]],
            "videomme_perception_score": {"pred_answer": "B", "answer": "B"},
        },
        {
            "doc_id": 0,
            "doc": {"question": "Other?", "candidates": ["x", "y"], "answer": "y"},
            "target": "y",
            "resps": [["(B)"]],
            "mvbench_accuracy": {"pred_answer": "B", "gt_answer": "B", "score": 1},
        },  # the same doc_id in another of the twenty files
        {
            "doc_id": 2,
            "doc": {
                "question": "How many?",
                "question_type": "object_counting",
                "ground_truth": "4",
            },
            "target": "4",
            "resps": [["3"]],
            "vsibench_score": {"prediction": "3"},
        },
        {
            "doc_id": 3,
            "doc": {"question": "Q?", "options": ["A. x", "B. y"], "answer": "A"},
            "target": "A",
            "resps": [[""]],
        },
        {
            "doc_id": 4,
            "doc": {"question": "Is it red?"},
            "input": "Is it red?\nA. yes\nB. no",
            "target": "B",
            "filtered_resps": ["B. no"],
        },
    ]
    report, _, _ = rescore(
        write(tmp_path / "20260101_samples_x.jsonl", rows, lines=True), monkeypatch, capsys
    )
    assert [record["reward"] for record in report["results"]] == [1, 1, pytest.approx(0.6), 0, 1]
    assert report["n"] == 5 and report["empty_outputs"] == 1 and report["duplicates"] == []
    assert report["truncated"] is None
    assert (
        report["by_task"]["object_counting"]["n"] == 1
        and report["results"][2]["problem_type"] == "regression"
    )


def test_vsi_bench_has_four_numbers(tmp_path, monkeypatch, capsys):
    rows = [
        row(1, "<answer>B</answer>", "B", original_question_type="object_rel_direction_easy"),
        row(2, "<answer>B</answer>", "B", original_question_type="object_rel_direction_easy"),
        row(3, "<answer>A</answer>", "B", original_question_type="object_rel_direction_hard"),
        row(4, "<answer>A</answer>", "A", original_question_type="route_planning"),
        row(5, "<answer>3</answer>", "4", "regression", original_question_type="object_counting"),
        row(
            6,
            "<answer>7</answer>",
            "10",
            "regression",
            original_question_type="room_size_estimation",
        ),
    ]
    report, out, err = rescore(
        write(tmp_path / "eval_vsibench.json", {"results": rows}), monkeypatch, capsys
    )
    official, video_r1 = report["vsi_bench"]["official"], report["vsi_bench"]["video_r1"]
    assert (
        official["tasks"]["object_rel_direction"] == 0.5
    )  # the levels' 1.0 and 0.0, not 2 of 3 questions
    assert official["official"] == pytest.approx((0.5 + 1 + 0.6 + 0.5) / 4)
    assert (official["mean_acc"], official["mean_mra"]) == (0.75, pytest.approx(0.55))
    assert official["sample_weighted_mean"] == report["accuracy"] == pytest.approx((3 + 1.1) / 6)
    assert (video_r1["mean_mra"], video_r1["official"]) == (
        pytest.approx(0.45),
        pytest.approx((0.5 + 1 + 0.5 + 0.4) / 4),
    )
    assert "vsibench has 5130 questions" in err and "vsi_bench, video_r1: mean_acc 0.75" in out


@pytest.mark.parametrize(
    "name,meant",
    [
        ("eval_mmvu.json", "mmvu"),
        ("eval_videommmu_m_greedy_output.json", "videommmu"),
        ("eval_16frames_tempcompass_results.json", "tempcompass"),
        ("x/validation_L2.jsonl", "seed-bench-r1 L2"),
        ("star_val.json", "star"),
        ("start.json", ""),
        ("eval_videomme.json", "videomme"),
        ("20260101_samples_vsibench.jsonl", "vsibench"),
        ("NExT-GQA_val.json", "nextgqa"),
        ("heldout.json", ""),
    ],
)
def test_the_benchmark_is_told_by_the_name(name, meant):
    assert scores.benchmark_of(name) == meant


@pytest.mark.parametrize(
    "text,said",
    [
        ("", "is not valid JSON"),
        ("[]", "holds no predictions"),
        ('{"results": []}', "holds no predictions"),
        ('{"problem_id": 1}\n{"problem', "line 2"),
        ('[{"problem_id": 1, "problem_type": "OCR", "solution": "x"}]', "row 0 has no output"),
        ('[{"problem_id": 1, "output": "x"}]', "row 0 has no problem_type, solution"),
        ('[{"doc": {}, "doc_id": 1}]', "no lmms-eval prediction"),
        ('[{"model_output": "x", "question": "?"}]', "no TW-GRPO prediction"),
        ("[1]", "holds no predictions"),
        ('{"settings": 5, "results": []}', "holds no predictions"),
        ('[{"problem_id": 1, "output": 5, "solution": 1}]', "an output that is not text"),
        ("3", "holds no predictions"),
    ],
)
def test_bad_files_get_a_sentence(text, said, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.json"
    path.write_text(text)
    status, _, err = command(
        monkeypatch, capsys, "--rescore", path, "--output", tmp_path / "r.json"
    )
    assert (
        status == 2
        and any(part in err for part in said.split("|"))
        and "Traceback" not in err
        and not (tmp_path / "r.json").exists()
    )


@pytest.mark.parametrize(
    "words,said",
    [
        ((), "give --model_name_or_path and --dataset_name"),
        (("--rescore", "nowhere.json"), "nowhere.json not found"),
        (("--rescore", "a", "--bench", "b"), "no --dataset_name"),
        (("--model_name_or_path", "m", "--bench", "b", "--top_p", "0"), "--top_p"),
        (
            ("--model_name_or_path", "m", "--bench", "b", "--api_base", "localhost"),
            "http://host:port/v1",
        ),
        (("compare", "a.json", "b.json"), "a.json not found"),
        (
            ("--model_name_or_path", "m", "--bench", "b", "--min_pixels", "9999999"),
            "--min_pixels must not be above",
        ),
        (("--model_name_or_path", "m", "--bench", "b.json"), "data set b.json not found"),
        (("--rescore", "a", "--output", "/tmp"), "--output /tmp is a folder; give a file"),
        (("--rescore", "a", "--output", "./a"), "--output ./a is a file to be read"),
        (
            ("--model_name_or_path", "m", "--bench", "b", "--output", "b"),
            "--output b is a file to be read",
        ),
    ],
)
def test_bad_command_lines_get_a_sentence(words, said, monkeypatch, capsys):
    status, _, err = command(monkeypatch, capsys, *words)
    assert status == 2 and said in err and "Traceback" not in err


# --------------------------------------------------------------------------------------- reasoning


def replies(records, readings):
    """Replies of a judge that rates nothing, as evaluate.judge_one returns them."""
    told = {}
    for record, (answer, conclusion) in zip(records, readings, strict=False):
        reply = {"answer": answer, "conclusion": conclusion, "vas": None}
        told[record["problem_id"]] = reply
    return told


def test_tac_and_consistency():
    # The answer and what its reasoning concludes, of problem_ids 1 to 8; B is right everywhere.
    readings = [
        ("B", "B"),
        ("B", "B"),
        ("B", "C"),
        ("C", "B"),
        ("C", "A"),
        ("C", "C"),
        ("B", ""),
        ("", ""),
    ]
    outputs = ["told"] * 7 + [""]  # no output: not in N, and not consistent
    rows = [row(number, output, "B") for number, output in enumerate(outputs, start=1)]
    rows.append(row(9, "<answer>w</answer>", "w", "OCR"))  # of a type that nobody reads
    records = [scores.score_item(scores.item_of(each)) for each in rows]
    metrics = scores.reasoning_metrics(records, replies(records, readings), "somebody")
    assert {name: metrics[name] for name in ("TP", "TN", "FP", "FN")} == {
        "TP": 2,
        "TN": 2,
        "FP": 1,
        "FN": 2,
    }
    assert metrics["TAC"] == {
        "answer_to_thinking_correlation": 4 / 7,
        "consistency_accuracy": 2 / 4,
    }
    assert (
        metrics["consistency_rate"] == 3 / 8
    )  # twice B and B, once C and C; A and C are two different wrong answers
    assert (metrics["n"], metrics["outputs"], metrics["not_read"], metrics["no_conclusion"]) == (
        8,
        7,
        1,
        1,
    )
    assert metrics["judge"] == "somebody"


@pytest.mark.parametrize(
    "kind,solution,read,right",
    [
        ("regression", "20", ("20.5", "21"), "TP"),
        ("numerical", "21", ("20.5", "21"), "FP"),
        ("regression", "20", ("20.5", "21.1"), "FN"),
        ("numerical", "2.5", ("2.50", "two"), "FN"),
    ],
)
def test_tac_of_numbers_is_within_five_percent(kind, solution, read, right):
    """Of a regression; a numerical answer is compared after rounding to two decimals."""
    record = scores.score_item(scores.item_of(row(1, "told", solution, kind)))
    assert scores.reasoning_metrics([record], replies([record], [read]), "somebody")[right] == 1


def test_a_judge_may_name_the_option_in_full():
    records = [scores.score_item(scores.item_of(row(1, "told", "B")))]
    for reply in ("B", "b", "(B) blue", "B. blue", "blue"):
        told = replies(records, [(reply, "B: blue")])
        metrics = scores.reasoning_metrics(records, told, "somebody")
        assert (metrics["TP"], metrics["consistency_rate"]) == (1, 1)
    # A reply that names no option is not UNKNOWN: it is a conclusion, and wrong.
    told = replies(records, [("B", "It is B, or C.")])
    metrics = scores.reasoning_metrics(records, told, "somebody")
    assert (metrics["FN"], metrics["no_conclusion"]) == (1, 0)


def test_without_a_judge_the_report_says_so(tmp_path, monkeypatch, capsys):
    path = write(
        tmp_path / "a.json",
        {"results": [row(1, "<think>So the answer is B.</think><answer>B</answer>", "B")]},
    )
    report, out, _ = rescore(path, monkeypatch, capsys)
    assert report["judged"] == {
        "judge": None,
        "TAC": None,
        "consistency_rate": None,
        "VAS": None,
        "correctness": None,
        "reason": "no judge was asked (--judge_base, --judge_model)",
    }
    assert "judge None" in out and "reasoning" not in report


# -------------------------------------------------------------------------------------- comparison


def test_compare(tmp_path, monkeypatch, capsys):
    rng = random.Random(0)
    first = [row(i, f"<answer>{'B' if i % 2 else 'A'}</answer>", "B") for i in range(100)]
    second = [
        row(i, f"<answer>{'B' if i % 2 and i > 8 or i % 5 == 0 else 'A'}</answer>", "B")
        for i in range(100)
    ] + [row(200, "", "B")]
    rng.shuffle(second)
    paths = (
        write(tmp_path / "a.json", {"results": first}),
        write(tmp_path / "b.json", {"results": second}),
    )
    status, out, err = command(
        monkeypatch, capsys, "compare", *paths, "--output", tmp_path / "c.json"
    )
    result = json.loads((tmp_path / "c.json").read_text())
    assert status == 0 and (result["n"], result["only_in_second"]) == (100, 1)
    assert (len(result["gains"]), len(result["losses"])) == (10, 3) and result[
        "difference"
    ] == pytest.approx(0.07)
    assert result["mcnemar_p"] == pytest.approx(0.0922851562)  # 2 (C(13,0) + ... + C(13,3)) / 2^13
    low, high = result["interval_95"]
    assert (
        -0.01 <= low <= 0.01 and 0.12 <= high <= 0.15
    )  # 0.07 +- 1.96 sqrt((13 - 0.49) / 100) / 10
    assert "10 gains and 3 losses" in out and "p = 0.09229" in out

    before = Path(paths[0]).read_text()
    # Under another name, too.
    same = f"{tmp_path}/../{tmp_path.name}/a.json"
    status, _, err = command(monkeypatch, capsys, "compare", *paths, "--output", same)
    assert status == 2 and "is one of the files" in err and Path(paths[0]).read_text() == before
    assert command(monkeypatch, capsys, "compare", *paths)[1] == out  # seeded


def test_compare_refuses_other_questions(tmp_path, monkeypatch, capsys):
    one = write(tmp_path / "a.json", {"results": [row(1, "<answer>B</answer>", "B")]})
    other = write(tmp_path / "b.json", {"results": [row(2, "<answer>B</answer>", "B")]})
    changed = write(tmp_path / "c.json", {"results": [row(1, "<answer>B</answer>", "C")]})
    for path, said in (
        (other, "share no problem_id"),
        (changed, "another question in each file: 'B' is right in the first, 'C'"),
    ):
        status, _, err = command(monkeypatch, capsys, "compare", one, path)
        assert status == 2 and said in err
    failed = [row(1, "", "B", error="server error: status 500")]
    path = write(tmp_path / "failed.json", {"results": failed})
    status, _, err = command(monkeypatch, capsys, "compare", one, path)
    assert status == 0 and f"{path}: 1 questions failed and count as wrong" in err
    # Other spaces are no other words.
    for words, count in (("Question  1?\n", 0), ("Which car wins?", 1)):
        rows = [row(1, "<answer>B</answer>", "B", problem=words)]
        worded = write(tmp_path / "d.json", {"results": rows})
        status, out, _ = command(monkeypatch, capsys, "compare", one, worded)
        assert status == 0
        assert ("1 questions are worded otherwise in the second, such as 1" in out) == bool(count)


def test_compare_says_first_what_is_unread(tmp_path, monkeypatch, capsys):
    def run(name, outputs):
        rows = [row(number, output, "B") for number, output in enumerate(outputs)]
        return write(tmp_path / name, {"results": rows})

    good = run("good.json", ["B"] * 10)
    half = run("half.json", ["B"] * 6 + ["Hard to say"] * 4)
    bad = run("bad.json", ["B"] * 2 + ["Hard to say"] * 8)
    status, _, err = command(monkeypatch, capsys, "compare", good, half)
    assert status == 0 and f"warning: {half}: 4 of 10 answers could not be read" in err
    status, out, err = command(monkeypatch, capsys, "compare", bad, good)
    assert status == 2 and "difference" not in out
    assert "8 of 10 answers of the first file could not be read, such as 'Hard to say'" in err


def test_a_stored_solution_may_be_written_in_other_ways(tmp_path):
    stored = row("1", "<answer>B</answer>", "", options=["(A) x", "(B) y"], settings={})
    stored["solution"] = "(B)"
    file = write(tmp_path / "a.predictions.jsonl", [stored], lines=True)
    (item,), _, _ = scores.read_predictions(file)
    assert item.solution == "B"
    assert scores.official_score("B", item) == scores.video_r1_score("B", item) == 1


def test_answers_to_other_questions_are_not_continued(tmp_path):
    stored = row("1", "<answer>B</answer>", "B", settings={"frames": 4})
    evaluate.check_row(tmp_path, stored, {"1": stored}, {"frames": 4})
    for known in ({}, {"1": stored | {"solution": "A"}}, {"1": stored | {"problem": "Why?"}}):
        with pytest.raises(data.DataError, match="another data set"):
            evaluate.check_row(tmp_path, stored, known, {"frames": 4})


def test_mcnemar_by_hand():
    assert (
        scores.mcnemar(0, 0) == 1
        and scores.mcnemar(5, 0) == 2 / 32
        and scores.mcnemar(1, 9) == scores.mcnemar(9, 1)
    )
    assert 0 < scores.mcnemar(3000, 2000) < 1e-40  # no overflow
    assert scores.paired_bootstrap([0.0] * 10) == (0, 0) and scores.paired_bootstrap(
        [1.0, 1.0]
    ) == (1, 1)


# ------------------------------------------------------------------------------- answers made here


@pytest.fixture(scope="module")
def checkpoint(toy_model, toy_processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    toy_model.save_pretrained(folder)
    toy_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bench(toy_folder):
    """Eight questions of the toy, and a missing, damaged, unsolved and repeated one."""
    rows = (
        json.loads((toy_folder / "heldout.json").read_text())[:6]
        + json.loads((toy_folder / "train.json").read_text())[:2]
    )
    rows = [
        {**row, "problem_id": index, "original_question_type": f"kind {index % 2}"}
        for index, row in enumerate(rows)
    ]
    (toy_folder / "videos" / "damaged.mp4").write_bytes(b"no video")
    rows[1]["key_frame"] = 7
    rows.insert(3, {**rows[0], "problem_id": 20, "path": "videos/missing.mp4"})
    rows.insert(5, {**rows[0], "problem_id": 21, "path": "videos/damaged.mp4"})
    rows += [{**rows[0], "problem_id": 22, "solution": ""}, {**rows[1], "problem": "again?"}]
    path = toy_folder / "bench.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def flags(checkpoint, bench):
    return [
        "--model_name_or_path",
        checkpoint,
        "--bench",
        bench,
        "--frames",
        4,
        "--min_pixels",
        3136,
        "--max_pixels",
        3136,
        "--max_completion_length",
        12,
        "--batch_size",
        3,
        "--temperature",
        1.0,
        "--top_k",
        50,
        "--decode_workers",
        0,
    ]


def local(flags, output, monkeypatch, capsys, *words):
    status, out, err = command(monkeypatch, capsys, *flags, "--output", output, *words)
    assert status == 0, err
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory):
    """A run from end to end: its report and its lines."""
    output = tmp_path_factory.mktemp("undisturbed") / "report.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        words = ["evaluate.py", *flags, "--output", output]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        evaluate.main()
    return json.loads(output.read_text()), output.with_suffix(".predictions.jsonl").read_text()


def test_whatever_goes_wrong_counts_as_wrong(undisturbed, bench, checkpoint):
    report, lines = undisturbed
    assert report["differences"] == {"rows have key_frame, which no prompt shows": 1}
    cut = [record["truncated"] for record in report["results"] if not record["error"]]
    assert report["truncated"] == sum(cut) > 0
    assert report["n"] == len(report["results"]) == lines.count("\n") == 11 and report[
        "duplicates"
    ] == ["1"]
    assert {kind: sorted(rows) for kind, rows in report["errors"].items()} == {
        "unreadable media": ["20", "21"],
        "unusable row": ["22"],
    }
    assert (
        "no such file" in report["errors"]["unreadable media"]["20"]
        and "no solution" in report["errors"]["unusable row"]["22"]
    )
    assert all(record["reward"] == 0 for record in report["results"] if record["error"])
    assert report["accuracy"] == sum(record["reward"] for record in report["results"]) / 11
    assert {"kind 0", "kind 1"} == set(report["by_task"])
    settings = report["settings"]
    assert (settings["frames"], settings["max_pixels"], settings["top_k"]) == (
        4,
        3136,
        50,
    ) and "{question}" in settings["prompt_template"]
    assert (
        settings["dataset_name"] == str(bench)
        and settings["weights"] == evaluate.fingerprint(checkpoint) is not None
    )


def test_a_fingerprint_of_weights_that_a_full_disk_left_empty(tmp_path):
    """The loader says what is wrong with them."""
    (tmp_path / "model.safetensors").touch()
    empty = evaluate.fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert len(empty) == 16 and empty != evaluate.fingerprint(tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_run_is_continued(seed, flags, undisturbed, tmp_path, monkeypatch, capsys):
    """Whatever byte the file ends at, the same command brings the report of the undisturbed run."""
    report, lines = undisturbed
    kept = random.Random(seed).randrange(len(lines))
    (tmp_path / "report.predictions.jsonl").write_text(lines[:kept])
    assert local(flags, tmp_path / "report.json", monkeypatch, capsys) == report
    assert sorted((tmp_path / "report.predictions.jsonl").read_text().splitlines()) == sorted(
        lines.splitlines()
    )


def test_a_finished_run_loads_no_model(flags, undisturbed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(policy, "load_model", None)
    (tmp_path / "report.predictions.jsonl").write_text(undisturbed[1])
    assert local(flags, tmp_path / "report.json", monkeypatch, capsys) == undisturbed[0]


def test_two_ranks_equal_one(flags, undisturbed, tmp_path):
    """Two ranks, continuing a shard that a killed rank left with a torn line."""
    report, lines = undisturbed
    (tmp_path / "report.predictions.jsonl.shard1").write_text(lines[: lines.index("\n") + 30])
    run_script("evaluate.py", *flags, "--output", tmp_path / "report.json", ranks=2)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.json",
        "report.predictions.jsonl",
    ]


def test_other_settings_do_not_continue_a_run(flags, undisturbed, tmp_path, monkeypatch, capsys):
    (tmp_path / "report.predictions.jsonl").write_text(undisturbed[1])
    status, _, err = command(
        monkeypatch, capsys, *flags, "--output", tmp_path / "report.json", "--frames", 8
    )
    assert status == 2 and "was made with --frames 4, this run has 8" in err
    template = tmp_path / "template.txt"
    template.write_text("Look: {question}\n{instruction}\nBe brief.")
    status, _, err = command(
        monkeypatch,
        capsys,
        *flags,
        "--output",
        tmp_path / "report.json",
        "--prompt_template",
        template,
    )
    assert status == 2 and "made with --prompt_template" in err
    report = local(
        flags, tmp_path / "other.json", monkeypatch, capsys, "--prompt_template", template
    )
    assert report["settings"]["prompt_template"].startswith("Look")
    assert [r["output"] for r in report["results"]] != [
        r["output"] for r in undisturbed[0]["results"]
    ]
    template.write_text("{problem}")
    assert (
        "{question} must be in it"
        in command(monkeypatch, capsys, *flags, "--prompt_template", template)[2]
    )


def test_answers_are_those_of_the_rollout_code(
    flags, bench, toy_model, toy_processor, tmp_path, monkeypatch, capsys
):
    """Greedy, and scored as train.py's held-out table is, by reward.accuracy_reward."""
    from common.data import load_examples
    from common.media import Encoder, PromptFlags
    from common.policy import collate
    from common.rollout import Sampling, sample_texts

    report = local([*flags, "--temperature", 0], tmp_path / "report.json", monkeypatch, capsys)
    encoder = Encoder(toy_processor, PromptFlags(min_pixels=3136, max_pixels=3136, frames=4))
    answers = {record["problem_id"]: record for record in report["results"]}
    for example in load_examples(bench, errors=[])[:3]:
        prompts = collate([encoder.encode(example)], toy_model)
        settings = Sampling(12, temperature=0)
        (text,) = sample_texts(toy_model, toy_processor, prompts, [1], [0], settings).texts
        assert answers[example.id]["output"] == text
        assert answers[example.id]["reward"] == reward.accuracy_reward(
            text, example.answer, example.problem_type
        )


def test_batches_are_bounded_by_tokens(flags, bench, tmp_path, monkeypatch, capsys):
    """Their size changes no answer; a question that is too long alone is answered alone."""
    import common.rollout

    rows = json.loads(bench.read_text())
    rows[0]["problem"] += " Look well." * 60
    path = write(bench.parent / "long.json", rows)
    words = [*flags, "--bench", path, "--temperature", 0, "--batch_size", 8]
    sizes = []
    sample_texts = common.rollout.sample_texts

    def spy(model, processor, prompts, *more):
        sizes.append(prompts.input_ids.shape)
        return sample_texts(model, processor, prompts, *more)

    monkeypatch.setattr(common.rollout, "sample_texts", spy)
    whole = local(words, tmp_path / "whole.json", monkeypatch, capsys)
    lengths = [length for _, length in sizes]
    # Eight questions, two of them broken, then the last two.
    assert [count for count, _ in sizes] == [6, 2] and lengths[0] > 2 * lengths[1]
    sizes.clear()
    budget = 8 * (2 * 4 + 256 + 12)
    more = ["--batch_tokens", budget, "--cuda_graph", "true"]
    cut = local([*words, *more], tmp_path / "cut.json", monkeypatch, capsys)
    assert all(count == 1 or count * (length + 12) <= budget for count, length in sizes)
    assert sum(count for count, _ in sizes) == 8 and len(sizes) > 2
    pairs = zip(whole["results"], cut["results"], strict=True)
    assert all(a["output"] == b["output"] for a, b in pairs)


def test_what_is_decoded_together_fits_one_batch():
    arguments = evaluate.EvaluateArguments(model_name_or_path="m", dataset_name="d")
    # 131,072 tokens; 16 frames of 256 visual tokens in 8 slots, 256 of words and 1,024 of answer
    assert evaluate.window_size(arguments, 10_000) == 131_072 // (8 * 256 + 256 + 1024) == 39
    # 625 questions on 8 ranks: a 16th
    assert evaluate.window_size(arguments, 625) == 39 and evaluate.window_size(arguments, 300) == 32
    arguments.frames, arguments.max_pixels = 64, 401_408
    assert evaluate.window_size(arguments, 10_000) == 131_072 // (32 * 512 + 256 + 1024) == 7
    arguments.batch_size = 3
    assert evaluate.window_size(arguments, 10_000) == 3
    arguments.batch_tokens = 10
    assert evaluate.window_size(arguments, 10_000) == 1


def test_a_misnamed_checkpoint_loads_and_a_torn_one_does_not(checkpoint, tmp_path):
    """transformers up to 5.24 wrote the names of a model under ZeRO-3 with one model. too many."""
    expected = load_model(checkpoint)[0].state_dict()
    stored = load_file(checkpoint / "model.safetensors")
    misnamed = {}
    for name, weight in stored.items():
        misnamed[name.replace("model.", "model.model.")] = weight
    shutil.copytree(checkpoint, tmp_path / "old")
    save_file(misnamed, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    loaded, _ = load_model(tmp_path / "old")
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.state_dict().items())
    del stored["model.norm.weight"]
    save_file(stored, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(data.DataError, match="lacks 1 weights of a qwen2_5_vl model"):
        load_model(tmp_path / "old")


def test_what_is_no_checkpoint(flags, tmp_path, monkeypatch, capsys):
    status, _, err = command(monkeypatch, capsys, *flags, "--model_name_or_path", tmp_path)
    assert status == 2 and "is not a checkpoint" in err and "Traceback" not in err
    status, _, err = command(
        monkeypatch, capsys, *flags, "--frame_use", "attention", "--frame_use_layer", 99
    )
    assert status == 2 and "has layers 1 to 3, and hidden states 0 to 3" in err


def test_no_answers_at_all_is_an_error(flags, tmp_path, monkeypatch, capsys):
    status, _, err = command(
        monkeypatch, capsys, *flags, "--output", tmp_path / "report.json", "--media_root", tmp_path
    )
    assert status == 2 and "none of 11 questions could be answered" in err and "no such file" in err


def test_frame_use_check(flags, toy_folder, tmp_path, monkeypatch, capsys):
    rows = json.loads((toy_folder / "train_cot.json").read_text())
    rows = [each for each in rows if each["data_type"] == "video"][:2]
    flags = [
        *flags,
        "--bench",
        write(tmp_path / "two.json", rows),
        "--media_root",
        toy_folder,
        "--frame_use_check",
        "--output",
        tmp_path / "report.json",
    ]
    status, out, err = command(monkeypatch, capsys, *flags)
    report = json.loads((tmp_path / "report.json").read_text())
    assert (
        status == 0
        and report["tokens"] > 0
        and report["frame_use"]["chance"][1] == 1
        and "attention, layer 1" in out
    )


# ------------------------------------------------------------------------------------ one question


def test_one_question_is_answered_on_the_screen(
    flags, bench, undisturbed, toy_folder, tmp_path, monkeypatch, capsys
):
    """As it is in a benchmark, if its row says the same."""
    asked = json.loads(bench.read_text())[0]
    assert asked["data_type"] == "video"
    words = [*flags[:2], *flags[4:], "--temperature", 0]
    report = local([*flags, "--temperature", 0], tmp_path / "report.json", monkeypatch, capsys)
    wanted = next(row["output"] for row in report["results"] if row["problem_id"] == "0")
    question = ["--question", asked["problem"], "--video", toy_folder / asked["path"]]
    if asked["options"]:
        question += ["--options", *asked["options"]]
    times = [0.0, 5.25, 10.5, 15.75]
    prior = {"problem_id": "77", "question": asked["problem"], "frames": [0, 21, 42, 63]}
    prior |= {"times": times, "scene": [0], "semantic": [0], "prior": [0.1, 0.1, 0.5, 0.3]}
    other = {**prior, "problem_id": "0", "question": "Another?"}
    path = write(tmp_path / "priors.jsonl", [other, prior], lines=True)
    monkeypatch.chdir(tmp_path)
    status, out, err = command(monkeypatch, capsys, *words, *question, "--priors", path)
    assert status == 0, err
    reasoning, answer = reward.split_output(wanted)
    assert f"reasoning: {reasoning or '(none)'}\nanswer: {answer or '(none)'}\n" in out
    looked, beside, seconds = out.splitlines()[-3:]
    # Four frames in two slots: 0.2 and 0.8, a quarter of it.
    assert beside == "prior    " + "▂" * 6 + " " + "█" * 6
    assert looked.startswith("looked   ") and "█" * 6 in looked
    assert seconds.split() == ["seconds", "0.0", "10.5"]
    # The same question about another video has another prior.
    write(path, [{**prior, "media": "videos/another.mp4"}], lines=True)
    _, _, err = command(monkeypatch, capsys, *words, *question, "--priors", path)
    assert f"has no prior of this question about {Path(asked['path']).name}" in err
    # Nothing is written.
    assert sorted(path.name for path in tmp_path.glob("report*")) == [
        "report.json",
        "report.predictions.jsonl",
    ]


def test_bars_stand_over_their_times(capsys):
    """Twelve slots of two frames each, of which the last has one: ten in the first rows."""
    shares = [0.0, 0.5, 1.0, *[0.25] * 9]
    evaluate.print_bars({"slots": shares, "times": [float(second) for second in range(23)]})
    one, two, three, four = capsys.readouterr().out.splitlines()
    bars = ["      ", "▄▄▄▄▄▄", "██████", *["▂▂▂▂▂▂"] * 7]
    assert one == "looked   " + " ".join(bars)
    assert two.split() == ["seconds", *(f"{second}.0" for second in range(0, 20, 2))]
    assert three == "looked   ▂▂▂▂▂▂ ▂▂▂▂▂▂" and four.split() == ["seconds", "20.0", "22.0"]
    # A bar begins and ends over its time.
    assert [two.index(".0"), two.index("2.0") + 3] == [len("looked   ......") - 2, 22]


def test_one_question_about_pictures_and_for_a_server(
    serve, flags, toy_folder, tmp_path, monkeypatch, capsys
):
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (56, 56), colour).save(tmp_path / f"{number}.png")
    pictures = [tmp_path / "0.png", tmp_path / "1.png"]
    words = [*flags[:2], *flags[4:], "--question", "Which is red?", "--options", "first", "second"]
    words += ["--image", *pictures]
    status, out, err = command(monkeypatch, capsys, *words, "--frame_use", "attention")
    assert status == 0, err
    assert "Which is red?\nA. first\nB. second\n" in out and "no choice of frames" in out
    server = serve(lambda request, times: "<think>Look.</think><answer>A</answer>")
    status, out, _ = command(monkeypatch, capsys, *words, "--api_base", server.base)
    assert status == 0 and out.endswith("reasoning: Look.\nanswer: A\n")
    ((_, _, request),) = server.requests
    kinds = [part["type"] for part in request["messages"][0]["content"]]
    assert kinds == ["image_url", "image_url", "text"]
    words[-1] = tmp_path / "nowhere.png"
    status, _, err = command(monkeypatch, capsys, *words)
    assert status == 2 and "nowhere.png: no such file" in err
    other = {"problem_id": "0", "question": "Another?", "frames": [0], "times": [0.0]}
    other |= {"scene": [], "semantic": [], "prior": [1.0]}
    priors = write(tmp_path / "priors.jsonl", [other], lines=True)
    for more, said in (
        (["--bench", "b.json"], "give --model_name_or_path and"),
        (["--control", "black"], "go with --question"),
        (["--frame_use_check"], "go with --question"),
        (["--priors", priors], "no prior of this question"),
    ):
        status, _, err = command(monkeypatch, capsys, *words, *more)
        assert status == 2 and said in err
    status, _, err = command(monkeypatch, capsys, *flags, "--video", "clip.mp4")
    assert status == 2 and "go with --question" in err


# ----------------------------------------------------------------------------- answers of a server


class Server(ThreadingHTTPServer):
    """Chat completions; `reply(request, times asked)` returns a text or a status."""

    daemon_threads = True

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.requests, self.lock = reply, [], threading.Lock()
        self.base = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_):
        """A client that did not wait for the reply; its trace would be another test's output."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, self.headers["Authorization"], request))
            asked = sum(
                request["messages"] == other["messages"] for _, _, other in self.server.requests
            )
        reply = self.server.reply(request, asked)
        status, body = (
            (reply, {"error": {"message": "made up"}}) if isinstance(reply, int) else (200, reply)
        )
        if isinstance(reply, str):
            body = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": request["model"],
                "usage": {},
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": reply},
                    }
                ],
            }
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    servers = []
    monkeypatch.setattr(evaluate.time, "sleep", lambda seconds: None)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def start(reply):
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def asked(request):
    content = request["messages"][0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def test_a_server_answers(serve, flags, bench, tmp_path, monkeypatch, capsys):
    server = serve(
        lambda request, times: 503 if times == 1 else "<think>t</think><answer>A</answer>"
    )
    report = local(
        flags,
        tmp_path / "report.json",
        monkeypatch,
        capsys,
        "--api_base",
        server.base,
        "--model_name_or_path",
        "toy",
    )
    answered = [record for record in report["results"] if not record["error"]]
    assert len(answered) == 8 and all(
        record["output"] == "<think>t</think><answer>A</answer>" for record in answered
    )
    assert (
        len(server.requests) == 16
    )  # each question twice: its first try met a server that was overloaded
    assert {kind: sorted(rows) for kind, rows in report["errors"].items()} == {
        "unreadable media": ["20", "21"],
        "unusable row": ["22"],
    }
    path, key, request = server.requests[0]
    assert path == "/v1/chat/completions" and key == "Bearer none" and request["model"] == "toy"
    assert (request["max_tokens"], request["temperature"], request["top_k"]) == (
        12,
        1.0,
        50,
    ) and request["seed"] is not None
    *pictures, text = request["messages"][0]["content"]
    frames = [
        Image.open(io.BytesIO(base64.b64decode(p["image_url"]["url"].partition("base64,")[2])))
        for p in pictures
    ]
    assert (
        [frame.size for frame in frames] in ([(56, 56)] * 4, [(56, 56)])
        and "Options:" in text["text"]
        or "?" in text["text"]
    )
    assert report["settings"]["engine"] == "api" and report["settings"]["api_base"] == server.base


def test_answers_that_a_server_cuts_are_counted(serve, flags, tmp_path, monkeypatch, capsys):
    """What else may stand in the place of a text costs its question alone."""
    turns = itertools.count()

    def reply(request, times):
        choice = {"index": 0, "finish_reason": "length", "message": {"role": "assistant"}}
        choice["message"]["content"] = ["A"] if next(turns) % 2 else "<answer>A</answer>"
        return {"choices": [choice], "created": 0, "id": "1", "model": "toy", "usage": {}}

    server = serve(reply)
    words = ["--api_base", server.base, "--model_name_or_path", "toy", "--api_retries", 0]
    report = local(flags, tmp_path / "report.json", monkeypatch, capsys, *words)
    answered = [record for record in report["results"] if not record["error"]]
    assert 0 < len(answered) < 8 and all(record["truncated"] for record in answered)
    assert report["truncated"] == len(answered)
    assert f"{len(answered)} of 11 answers were cut (--max_comp" in " ".join(report["warnings"])
    causes = report["errors"]["server error"].values()
    assert len(causes) == 8 - len(answered)
    assert all("TypeError: its content is no text" in cause for cause in causes)


def test_a_servers_errors_are_listed_and_tried_again(
    serve, flags, bench, tmp_path, monkeypatch, capsys
):
    """400 is final for the run, 500 is tried 1 + 2 times; the next run asks only these again."""
    down = {"on": True}
    questions = sorted({row["problem"] for row in json.loads(bench.read_text())[:3]})

    def reply(request, times):
        if down["on"] and questions[0] in asked(request):
            return 400
        return 500 if down["on"] and questions[-1] in asked(request) else "<answer>B</answer>"

    server = serve(reply)
    words = [
        "--api_base",
        server.base,
        "--model_name_or_path",
        "toy",
        "--api_retries",
        2,
        "--api_workers",
        3,
    ]
    report = local(flags, tmp_path / "report.json", monkeypatch, capsys, *words)
    failed = report["errors"]["server error"]
    assert (
        failed
        and report["n"] == 11
        and all("status 400" in cause or "status 500" in cause for cause in failed.values())
    )
    tries = [
        sum(cause in asked(request) for _, _, request in server.requests)
        for cause in (questions[0], questions[-1])
    ]
    down["on"], before = False, len(server.requests)
    report = local(flags, tmp_path / "report.json", monkeypatch, capsys, *words)
    assert (
        len(server.requests) - before == len(failed)
        and "server error" not in report["errors"]
        and report["n"] == 11
    )
    assert tries[0] >= 1 and (questions[0] == questions[-1] or tries[1] % 3 == 0)
    other = serve(lambda request, times: "<answer>B</answer>")
    again = local(
        flags,
        tmp_path / "other" / "report.json",
        monkeypatch,
        capsys,
        *words,
        "--api_base",
        other.base,
    )
    assert again["results"] == report["results"]


@pytest.mark.parametrize(
    "reply,said",
    [
        (lambda request, times: {"choices": []}, "no chat completion came back"),
        (lambda request, times: 401, "status 401"),
        (lambda request, times: threading.Event().wait(1.5) or "late", "timed out"),
    ],
)
def test_a_server_that_answers_nothing_is_an_error(
    reply, said, serve, flags, tmp_path, monkeypatch, capsys
):
    server = serve(reply)
    words = [
        "--api_base",
        server.base,
        "--api_retries",
        0,
        "--api_timeout",
        0.5 if said == "timed out" else 20,
        "--bench",
    ]
    path = tmp_path / "one.json"
    path.write_text(
        json.dumps(
            [
                {
                    "problem_id": 1,
                    "problem": "Why?",
                    "problem_type": "free-form",
                    "solution": "so",
                    "data_type": "text",
                }
            ]
        )
    )
    status, _, err = command(
        monkeypatch, capsys, *flags, *words, path, "--output", tmp_path / "report.json"
    )
    assert status == 2 and "none of 1 questions could be answered" in err and said in err


def test_nobody_listens(flags, tmp_path, monkeypatch, capsys, serve):
    words = [
        "--api_base",
        "http://127.0.0.1:9/v1",
        "--api_retries",
        1,
        "--output",
        tmp_path / "report.json",
    ]
    status, _, err = command(monkeypatch, capsys, *flags, *words)
    assert status == 2 and "could be answered" in err and "Traceback" not in err


def test_a_video_is_sent_as_it_is(serve, flags, toy_folder, tmp_path, monkeypatch, capsys):
    server = serve(lambda request, times: "<answer>B</answer>")
    local(
        flags,
        tmp_path / "report.json",
        monkeypatch,
        capsys,
        "--api_base",
        server.base,
        "--api_media",
        "video",
    )
    videos = [
        content["video_url"]["url"]
        for _, _, request in server.requests
        for content in request["messages"][0]["content"]
        if content["type"] == "video_url"
    ]
    assert videos and all(url.startswith("data:video/mp4;base64,") for url in videos)
    files = {path.read_bytes() for path in (toy_folder / "videos").glob("*.mp4")}
    assert all(base64.b64decode(url.partition(",")[2]) in files for url in videos)


def test_reasoning_that_a_server_cuts_off_is_put_back(serve, flags, tmp_path, monkeypatch, capsys):
    message = {"role": "assistant", "content": "<answer>B</answer>", "reasoning_content": "blue"}
    server = serve(
        lambda request, times: {
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}]
        }
    )
    report = local(
        flags,
        tmp_path / "report.json",
        monkeypatch,
        capsys,
        "--api_base",
        server.base,
        "--api_extra",
        '{"chat": {"k": 1}}',
    )
    assert (
        report["results"][-1]["output"] == "<think>blue</think><answer>B</answer>"
        and report["results"][-1]["format"] == 1
    )
    assert all(
        request["chat"] == {"k": 1} and request["top_k"] == 50 for _, _, request in server.requests
    )
    assert (
        "is no JSON object"
        in command(monkeypatch, capsys, *flags, "--api_base", server.base, "--api_extra", "[1]")[2]
    )
    assert (
        "--frame_times goes with a model"
        in command(monkeypatch, capsys, *flags, "--api_base", server.base, "--frame_times", "text")[
            2
        ]
    )


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")),
    reason="transformers[serving] is missing",
)
def test_a_real_server_answers_as_the_model_here_does(
    flags, checkpoint, toy_folder, tmp_path, monkeypatch, capsys
):
    """`transformers serve` on images and text; it would take a video for separate images."""
    rows = [
        row
        for row in json.loads((toy_folder / "train.json").read_text())
        if row["data_type"] == "image"
    ][:3]
    rows += [
        {
            "problem_id": index,
            "problem": f"What is {index} and {index}?",
            "problem_type": "numerical",
            "solution": str(2 * index),
            "data_type": "text",
        }
        for index in range(9)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*flags, "--bench", path, "--media_root", toy_folder, "--temperature", 0]
    here = local(words, tmp_path / "here.json", monkeypatch, capsys)
    (tmp_path / "serve.py").write_text("from transformers.cli.transformers import main\nmain()")
    serving = ["serve", checkpoint, "--port", port, "--device", "cpu", "--dtype", "float32"]
    server = Script(tmp_path / "serve.py", *serving, env={"HF_HUB_OFFLINE": "1"})
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                assert server.poll() is None, "the server has ended"
                time.sleep(0.05)
        words += [
            "--api_base",
            f"http://localhost:{port}/v1",
            "--api_workers",
            1,
            "--api_retries",
            6,
        ]
        there = local(words, tmp_path / "there.json", monkeypatch, capsys)
        # As if killed while it wrote the sixth answer; the server answers as before.
        file = tmp_path / "there.predictions.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[:5]) + lines[5][:30])
        assert local(words, tmp_path / "there.json", monkeypatch, capsys) == there
        # The same model as the judge, whose replies are short here.
        monkeypatch.setattr(evaluate, "JUDGE_TOKENS", 6)
        rows = [
            row(1, "<think>It is blue.</think><answer>B</answer>", "B"),
            row(2, "<answer>a car</answer>", "a lorry", "free-form"),
        ]
        judge = ["--judge_base", f"http://localhost:{port}/v1", "--judge_model", checkpoint]
        judge += ["--api_workers", 1, "--api_retries", 6]
        path = write(tmp_path / "stored.json", rows)
        judged, out, _ = rescore(path, monkeypatch, capsys, *judge)
        # Killed while it wrote the second reading of four.
        file = tmp_path / "out" / "report.judged.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text(lines[0] + lines[1][:30])
        again, later, _ = rescore(path, monkeypatch, capsys, *judge)
    finally:
        server.kill()
    pairs = [
        (a["output"], b["output"]) for a, b in zip(here["results"], there["results"], strict=True)
    ]
    # Untrained, it opens think blocks anywhere, which the server then moves, and writes vision
    # tokens, which are banned here.
    pairs = [(a, b) for a, b in pairs if "think>" not in a and "<|" not in b]
    # The server cuts white space at the end.
    assert len(pairs) >= 3 and all(a.rstrip() == b for a, b in pairs)
    assert there["settings"]["model_name_or_path"] == str(checkpoint)
    assert there["settings"]["api_base"] == f"http://localhost:{port}/v1"
    assert "is asked 4 times" in out and "is asked 3 times" in later
    assert again == judged and judged["judged"]["failed"] == {}
    assert judged["judged"]["judge"] == str(checkpoint)
    assert judged["judged"]["judge_base"] == f"http://localhost:{port}/v1"
    # Untrained, it says neither correct nor wrong.
    assert judged["judged"]["correctness"]["accuracy"] is None
    assert "no verdict" in judged["judged"]["correctness"]["reason"]


# ---------------------------------------------------------------------------- controls and a judge


def test_controls_change_what_the_model_sees(
    flags, undisturbed, toy_processor, tmp_path, monkeypatch, capsys
):
    from common.data import load_examples
    from common.media import Encoder

    example = next(
        e
        for e in load_examples(flags[3], errors=[])
        if e.media_type == "video" and Path(e.path).name not in ("missing.mp4", "damaged.mp4")
    )
    seen = {}
    for control in ("none", "shuffled", "black"):
        arguments = evaluate.EvaluateArguments(
            "m", "d", control=control, min_pixels=3136, max_pixels=3136, frames=4
        )
        encoder = Encoder(toy_processor, arguments)
        seen[control] = [
            evaluate.encode(encoder, Ready(position, example, None))[0] for position in range(4)
        ]
        assert all(len(item.times) == 4 for item in seen[control])
        same = [item.input_ids == seen["none"][0].input_ids for item in seen[control]]
        assert all(ids.all() for ids in same)
    patches = seen["none"][0].pixel_values
    assert (
        len(
            {
                tuple(
                    evaluate.frame_order(
                        evaluate.EvaluateArguments("m", "d", control="shuffled"), p, 4
                    )
                )
                for p in range(9)
            }
        )
        > 2
    )
    assert any((item.pixel_values != patches).any() for item in seen["shuffled"])
    assert all((item.pixel_values == item.pixel_values[0]).all() for item in seen["black"])
    report = local(
        flags, tmp_path / "report.json", monkeypatch, capsys, "--control", "question_only"
    )
    assert report["settings"]["control"] == "question_only" and list(report["errors"]) == [
        "unusable row"
    ]  # no medium is needed


def test_a_server_gets_the_controls_too(serve, flags, tmp_path, monkeypatch, capsys):
    pictures = {}
    for control in ("none", "black", "question_only"):
        server = serve(lambda request, times: "<answer>B</answer>")
        words = ["--api_base", server.base, "--control", control]
        local(flags, tmp_path / control / "report.json", monkeypatch, capsys, *words)
        contents = [request["messages"][0]["content"] for _, _, request in server.requests]
        pictures[control] = [
            part["image_url"]["url"] for content in contents for part in content[:-1]
        ]
    assert len(pictures["none"]) == len(pictures["black"]) > 0 and not pictures["question_only"]
    black = Image.open(io.BytesIO(base64.b64decode(pictures["black"][0].partition(",")[2])))
    assert black.getextrema() == ((0, 0),) * 3 and len(set(pictures["black"])) == 1 < len(
        set(pictures["none"])
    )
    status, _, err = command(
        monkeypatch,
        capsys,
        *flags,
        "--api_base",
        "http://x",
        "--api_media",
        "video",
        "--control",
        "black",
    )
    assert status == 2 and "sends the file as it is" in err


def judge(request, times):
    """A judge that reads what stands behind "says", rates by the number of digits, and finds right
    what has a car in it."""
    text = asked(request)
    if "CORRECT or WRONG" in text:
        answer = text.rpartition("Answer:\n")[2]
        if "perhaps" in answer or ("hm" in answer and "One word" not in text):
            return "The answer is correct in part."
        return "**Correct**." if "car" in answer else "incorrect"
    if "from the description alone" in text:
        description = text.partition("Description:\n")[2].partition("\n")[0]
        known = {"dunks": "A", "dribbles": "(B) dribbling", "sings": "NONE of them"}
        return next((reply for word, reply in known.items() if word in description), "B or C")
    if "Final answer:" in text:
        return text.rpartition("Final answer:\n")[2]
    told = text.rpartition("Reasoning:\n")[2]
    if "Rate from 0 to 10" in text:
        if "mumbles" in told and "JSON only" not in text:
            return "It is rather good."
        return (
            "no idea"
            if "raves" in told
            else json.dumps({"score": 8 if "frame" in told else 12, "rationale": "so"})
        )
    return (
        "<think>hmm</think> (" + told.rpartition("says ")[2] + ")" if "says" in told else "UNKNOWN"
    )


def test_a_judge_gives_tac_and_vas(serve, tmp_path, monkeypatch, capsys):
    rows = [
        row(1, "<think>frame says B</think><answer>B</answer>", "B"),
        row(2, "<think>frame says A</think><answer>B</answer>", "B"),
        row(3, "<think>mumbles frame</think><answer>B</answer>", "B"),
        row(4, "<think>raves</think><answer>C</answer>", "B"),
        row(5, "<answer>B</answer>", "B"),
        row(6, "", "B"),
        row(7, "<think>says 12</think><answer>12</answer>", "12", "numerical"),
        row(8, "<think>frame</think><answer>w</answer>", "w", "OCR"),
        row(9, "<think>raves</think><answer>A,C</answer>", "A,C"),
    ]  # several letters, like words, are not read
    path, server = write(tmp_path / "a.json", {"results": rows}), serve(judge)
    report, out, _ = rescore(
        path, monkeypatch, capsys, "--judge_base", server.base, "--judge_model", "judge-1"
    )
    judged = report["judged"]
    assert {
        name: judged[name] for name in ("TP", "TN", "FP", "FN", "n", "outputs", "not_read")
    } == {"TP": 2, "TN": 1, "FP": 0, "FN": 3, "n": 7, "outputs": 6, "not_read": 2}
    assert (
        judged["TAC"] == {"answer_to_thinking_correlation": 3 / 6, "consistency_accuracy": 2 / 5}
        and judged["consistency_rate"] == 2 / 7
    )
    assert judged["VAS"]["value"] == pytest.approx(
        10 * (8 + 8 + 8 + 0 + 10 + 8) / 6
    )  # 5 has no reasoning: 0; 12 of 7 counts as 10
    assert (judged["VAS"]["n"], judged["VAS"]["not_rated"], judged["judge"], judged["failed"]) == (
        6,
        2,
        "judge-1",
        {},
    )
    assert "judged: judge judge-1" in out and "judged, VAS: value 70.0000" in out
    asked_before = len(server.requests)
    again, _, _ = rescore(
        path, monkeypatch, capsys, "--judge_base", server.base, "--judge_model", "judge-1"
    )
    assert (
        again == report and len(server.requests) == asked_before
    )  # what was judged is not asked again
    assert all(
        request["temperature"] == 0 and request["model"] == "judge-1"
        for _, _, request in server.requests
    )


def test_a_judge_that_fails_is_told(serve, tmp_path, monkeypatch, capsys):
    rows = [
        row(1, "<think>frame says B</think><answer>B</answer>", "B"),
        row(2, "<think>kaput</think><answer>B</answer>", "B"),
    ]
    path = write(tmp_path / "a.json", {"results": rows})
    server = serve(
        lambda request, times: 400 if "kaput" in asked(request) else judge(request, times)
    )
    words = ["--judge_base", server.base, "--judge_model", "j"]
    report, _, _ = rescore(path, monkeypatch, capsys, *words)
    assert (
        list(report["judged"]["failed"]) == ["2"]
        and report["judged"]["n"] == 1
        and report["judged"]["VAS"]["n"] == 1
    )
    server.reply = judge
    report, _, _ = rescore(path, monkeypatch, capsys, *words)
    assert report["judged"]["failed"] == {} and report["judged"]["n"] == 2
    server.reply = lambda request, times: 400
    status, _, err = command(
        monkeypatch, capsys, "--rescore", path, "--output", tmp_path / "r.json", *words
    )
    assert status == 2 and "judged none of 2 answers" in err and "status 400" in err
    # Two empty readings do not agree.
    server.reply = lambda request, times: ""
    empty = ["--rescore", path, "--output", tmp_path / "empty.json", *words]
    assert command(monkeypatch, capsys, *empty)[0] == 0
    judged = json.loads((tmp_path / "empty.json").read_text())["judged"]
    assert sorted(judged["failed"]) == ["1", "2"] and "reply was empty" in judged["failed"]["1"]
    assert judged["n"] == 0 and set(judged["TAC"].values()) == {None}
    assert (
        "--judge_model go together"
        in command(monkeypatch, capsys, "--rescore", path, "--judge_base", server.base)[2]
    )


def test_a_judge_of_open_answers(serve, tmp_path, monkeypatch, capsys):
    """What is unjudged is null with its reason, and asked again where the server failed."""
    outputs = ["a red car", "a lorry", "kaput car", "perhaps a car", "hm", ""]
    rows = [
        row(number, f"<answer>{output}</answer>" if output else "", "a red car", "free-form")
        for number, output in enumerate(outputs)
    ]
    rows.append(row(6, "<answer>B</answer>", "B"))
    path = write(tmp_path / "a.json", {"results": rows})
    server = serve(
        lambda request, times: 400 if "kaput" in asked(request) else judge(request, times)
    )
    words = ["--judge_base", server.base, "--judge_model", "judge-1"]
    report, out, _ = rescore(path, monkeypatch, capsys, *words)
    # Five answers, and the letter for TAC.
    told = f"judge-1 at {server.base} is asked 6 times: about "
    tokens = int(out.partition(told)[2].partition(" tokens")[0])
    # A second try for no verdict is not foreseen.
    sent = {asked(request) for _, _, request in server.requests}
    firsts = [text for text in sent if not text.endswith("One word only.")]
    assert len(firsts) == 6 and tokens == sum(len(text) // 4 for text in firsts)
    assert f"at most {6 * 256} to write" in out
    found = report["judged"]["correctness"]
    reason = found.pop("reason")
    assert found == {"n": 6, "judged": 4, "accuracy": 1 / 4, "accuracy_of_all": None}
    assert reason.startswith("2 are unjudged; the first is 2: server error: status 400")
    assert [record.get("judged_correct", "none") for record in report["results"]] == [
        *[True, False, None, None, False, False],
        "none",
    ]
    assert (report["judged"]["judge"], report["judged"]["judge_base"]) == ("judge-1", server.base)

    # Once the server is up it is asked about the one answer alone.
    server.reply = judge
    server.requests.clear()
    report, out, _ = rescore(path, monkeypatch, capsys, *words)
    assert "is asked 1 times" in out and len(server.requests) == 1
    assert report["judged"]["correctness"]["accuracy"] == 2 / 5
    assert "perhaps" not in asked(server.requests[0][2]) and report["judged"]["failed"] == {}
    rows[3]["output"] = "<answer>the same car</answer>"
    write(path, {"results": rows})
    report, _, _ = rescore(path, monkeypatch, capsys, *words)
    # Three of six, and the letter.
    found = {"n": 6, "judged": 6, "accuracy": 3 / 6, "accuracy_of_all": 4 / 7, "reason": None}
    assert report["judged"]["correctness"] == found
    # Another judge reads everything itself.
    report, out, _ = rescore(path, monkeypatch, capsys, *words[:-1], "judge-2")
    assert "judge-2 at" in out and "is asked 6 times" in out


def test_a_caption_is_judged_by_what_it_tells(serve, tmp_path, monkeypatch, capsys):
    """TempCompass: the judge answers a question from the caption; as lmms-eval stores it."""
    doc = {
        "video_id": "1",
        "question": "Information A: dribbling\nInformation B: dunking\nGenerated Caption:",
        "answer": "B. dunking",
        "dim": "action",
        "mc_question": "What does he do?\nA. dunking\nB. dribbling\nC. singing",
        "mc_answer": "A. dunking",
    }
    captions = ["A man dunks.", "A man dribbles.", "A man sings.", "A man."]
    rows = []
    for number, caption in enumerate(captions):
        fields = {"doc_id": number, "target": "B. dunking", "input": doc["question"]}
        rows.append({**fields, "doc": {**doc, "number": number}, "resps": [[caption]]})
    path = write(tmp_path / "samples_tempcompass.jsonl", rows, lines=True)
    server = serve(judge)
    words = ["--judge_base", server.base, "--judge_model", "judge-1"]
    report, _, _ = rescore(path, monkeypatch, capsys, *words)
    verdicts = [record["judged_correct"] for record in report["results"]]
    assert verdicts == [True, False, False, None]
    assert "the judge's reply was no verdict" in report["judged"]["correctness"]["reason"]
    # A report keeps the judge's question: it is judged as the samples are.
    again = tmp_path / "again.json"
    status, _, err = command(
        monkeypatch,
        capsys,
        "--rescore",
        tmp_path / "out" / "report.json",
        "--output",
        again,
        *words,
    )
    assert status == 0, err
    assert json.loads(again.read_text())["judged"]["correctness"]["accuracy"] == 1 / 3


def test_readings_of_before_are_kept(serve, tmp_path, monkeypatch, capsys):
    """Rows of a judge that was not asked about open answers yet, the last one torn by a kill."""
    rows = [
        row(1, "<think>frame</think><answer>a car</answer>", "a car", "free-form"),
        row(2, "<think>frame says B</think><answer>B</answer>", "B"),
    ]
    path = write(tmp_path / "a.json", {"results": rows})
    server = serve(judge)
    words = ["--judge_base", server.base, "--judge_model", "judge-1"]
    report, _, _ = rescore(path, monkeypatch, capsys, *words)
    told = {"answer": "", "conclusion": "", "vas": 3.0}
    stored = {"problem_id": "1", "output": rows[0]["output"], "told": told}
    stored |= {"judge_model": "judge-1", "judge_base": server.base}
    file = tmp_path / "out" / "report.judged.jsonl"
    line = next(line for line in file.read_text().splitlines() if '"problem_id": "2"' in line)
    file.write_text(json.dumps(stored) + "\n" + line + "\n" + line[:40])
    server.requests.clear()
    again, out, _ = rescore(path, monkeypatch, capsys, *words)
    assert "is asked 3 times" in out and len(server.requests) == 3
    assert again["judged"]["VAS"]["value"] == 10 * (3 + 8) / 2
    assert again["judged"]["correctness"] == report["judged"]["correctness"]


def test_grounding_by_the_times_that_the_reasoning_cites(tmp_path, monkeypatch, capsys):
    """The hull of the cited times against each true interval; 0 without a cited time."""
    rows = [
        row(
            1,
            "<think>From 0:10 to 0:20 he falls.</think><answer>B</answer>",
            "B",
            glue=[[10, 15], [40, 60]],
        ),  # IoP 0.5, IoU 0.5
        row(
            2, "<think>At 0:12 he falls.</think><answer>B</answer>", "B", glue=[[10, 20]]
        ),  # a point inside: IoP 1, IoU 0
        row(
            3,
            "<think>At 0:10 he falls and at 0:30 he stands.</think><answer>A</answer>",
            "B",
            glue=[[20, 30]],
        ),  # IoP 0.5
        row(4, "<think>He falls.</think><answer>B</answer>", "B", glue=[[20, 30]]),
        row(5, "<think>At 0:10 he falls.</think><answer>B</answer>", "B"),
    ]  # no known interval
    report, out, _ = rescore(
        write(tmp_path / "nextgqa.json", {"results": rows}), monkeypatch, capsys
    )
    grounding = report["grounding"]
    assert (grounding["n"], grounding["predicted"], grounding["acc_gqa"]) == (4, 3, 0.5)
    assert (
        grounding["mIoP"] == pytest.approx((0.5 + 1 + 0.5 + 0) / 4) and grounding["IoP@0.5"] == 0.75
    )
    assert (
        grounding["mIoU"] == pytest.approx((0.5 + 0 + 0.5 + 0) / 4)
        and grounding["IoU@0.3"] == 0.5
        and "acc_gqa 0.5000" in out
    )


def test_the_normalised_gain_is_delta_knowledge():
    def record(name, right):
        return {
            "problem_id": name,
            "problem": "Which?",
            "solution": "A",
            "problem_type": "multiple choice",
            "error": None,
            "correct": right,
            "reward": float(right),
        }

    before, after = [record(n, n < 4) for n in range(10)], [record(n, n < 7) for n in range(10)]
    assert scores.compare(before, after)["normalised_gain"] == pytest.approx(
        (70 - 40) / (100 - 40)
    )  # (post - pre) / (100 - pre)
    assert scores.compare(after, before)["normalised_gain"] == pytest.approx((40 - 70) / (100 - 70))
    assert scores.compare([record(1, True)], [record(1, True)])["normalised_gain"] is None


def test_event_enrichment_by_hand():
    # Two tokens, four slots; the largest quarter of 8 pairs: token 0 slot 1, and token 1 slot 3.
    each = torch.tensor([[0.1, 0.9, 0.2, 0.3], [0.0, 0.4, 0.5, 0.8]])
    events = evaluate.strongest_events(each, share=0.25)
    assert events == [0 * 4 + 1, 1 * 4 + 3] and evaluate.strongest_events(each) == [
        1
    ]  # 5 % of 8 pairs: one of them
    assert evaluate.strongest_events(each.T, share=0.25) == [1 * 2 + 0, 3 * 2 + 1]
    assert scores.event_enrichment(events, 4, [1]) == pytest.approx(0.5 / 0.25)
    assert scores.event_enrichment(events, 4, [1, 3]) == pytest.approx(1 / 0.5)
    assert (
        scores.event_enrichment(events, 4, [0]) == 0 and scores.event_enrichment([1], 4, [1]) == 4
    )
    assert (
        scores.event_enrichment(events, 4, []) is None
        and scores.event_enrichment(events, 4, [0, 1, 2, 3]) is None
    )


def test_what_a_prediction_keeps_of_its_events():
    """Ten tokens, four slots of two frames: 5 % of 40 pairs are two. The prior: slots 1 and 3."""
    each = torch.zeros(10, 4)
    each[7, 3], each[2, 0] = 0.9, 0.8
    times = [float(second) for second in range(8)]
    example = types.SimpleNamespace(id="a", evidence=[])
    values = [0.05, 0.05, 0.4, 0.05, 0.05, 0.05, 0.05, 0.3]
    prior = types.SimpleNamespace(times=times, prior=values)
    looked = (torch.full((4,), 0.25), each)
    row = evaluate.use_row(example, times, prior, *looked)
    assert (row["events"], row["tokens"], row["consensus_slots"]) == (
        [2 * 4 + 0, 7 * 4 + 3],
        10,
        [1, 3],
    )
    assert row["enrichment"] == pytest.approx(0.5 / 0.5) and row["consensus"] == pytest.approx(0.25)
    even = evaluate.use_row(
        example, times, types.SimpleNamespace(times=times, prior=[0.125] * 8), *looked
    )
    assert even["consensus_slots"] == [] and even["enrichment"] is None and len(even["events"]) == 2
    assert "events" not in evaluate.use_row(example, times, None, *looked)


def test_frame_use_of_the_answers(flags, bench, undisturbed, tmp_path, monkeypatch, capsys):
    """Frame use is stored and changes no answer; a prior of other frames is refused."""

    from common.data import load_examples

    examples = {example.id: example for example in load_examples(bench, errors=[])}
    good = [record for record in undisturbed[0]["results"] if not record["error"]]
    video = [
        record["problem_id"]
        for record in good
        if examples[record["problem_id"]].media_type == "video"
    ]
    priors = [
        {
            "problem_id": name,
            "frames": [0, 21, 42, 63],
            "times": [0.0, 5.25, 10.5, 15.75],
            "scene": [0],
            "semantic": [0],
            "prior": [0.7, 0.1, 0.1, 0.1],
        }
        for name in video[:2]
    ]
    path = write(tmp_path / "priors.jsonl", priors, lines=True)
    words = ["--frame_use", "attention", "--priors", path]
    report = local(flags, tmp_path / "report.json", monkeypatch, capsys, *words)
    assert [record["output"] for record in report["results"]] == [
        record["output"] for record in undisturbed[0]["results"]
    ]
    used = {
        record["problem_id"]: record["frame_use"]
        for record in report["results"]
        if record["frame_use"]
    }
    assert sorted(used) == sorted(video) and all(
        abs(sum(use["slots"]) - 1) < 1e-5 for use in used.values()
    )
    first = used[video[0]]
    assert first["consensus"] == pytest.approx(
        0.8 * first["slots"][0] + 0.2 * first["slots"][1], abs=1e-5
    )  # four frames in two slots
    numbers = report["frame_use"]["all"]
    assert numbers["n"] == len(video)
    assert (
        first["enrichment"] is not None and 0 <= numbers["enrichment"] <= 2
    )  # one slot of two has more than an even share
    rows = [
        json.loads(line)
        for line in (tmp_path / "report.predictions.jsonl").read_text().splitlines()
    ]
    stored = {
        row["problem_id"]: row["frame_use"] for row in rows if "frame_use" in row
    }  # of a report they would be most
    events = stored[video[0]].pop("events")
    assert stored[video[0]] == first and "events" not in stored[video[-1]]  # without a prior
    assert first["consensus_slots"] == [0] and len(events) == max(
        1, round(0.05 * 2 * first["tokens"])
    )
    assert first["enrichment"] == scores.event_enrichment(events, 2, [0])
    assert numbers["consensus"] == pytest.approx(
        sum(use["consensus"] for use in used.values() if use["consensus"]) / 2
    )
    assert 0 < numbers["chance"] < 1 and report["frame_use"]["right"]["n"] + report["frame_use"][
        "wrong"
    ]["n"] == len(video)
    pair = {"frames": [0, 63], "times": [0.0, 15.75], "prior": [0.5, 0.5]}
    for change, said in (
        ({"times": [0.0, 1.0, 2.0, 3.0]}, "made for other frames"),
        (pair, f"has 2 frames of {video[0]}, this run uses --frames 4"),
        ({"question": "Another?"}, f"{video[0]} is another question there"),
        ({"settings": {"decoder": "decord"}}, "made with --decoder decord, this run has pyav"),
    ):
        write(path, [{**row, **change} for row in priors], lines=True)
        output = ["--output", tmp_path / "other.json"]
        status, _, err = command(monkeypatch, capsys, *flags, *words, *output)
        assert status == 2 and said in err
    assert (
        "--priors goes with --frame_use"
        in command(monkeypatch, capsys, *flags, "--priors", path)[2]
    )
    write(path, priors, lines=True)
    hidden = local(flags, tmp_path / "h.json", monkeypatch, capsys, "--frame_use", "hidden")[
        "frame_use"
    ]["all"]
    assert hidden["consensus"] is None and hidden["enrichment"] is None
    report = local(
        flags, tmp_path / "p.json", monkeypatch, capsys, "--frame_use", "hidden", "--priors", path
    )
    assert 0 <= report["frame_use"]["all"]["enrichment"] <= 2


# --------------------------------------------------------------------------- decoding by workers


def test_workers_decode_what_this_process_would(flags, tmp_path, monkeypatch, capsys):
    """Two batches and more, shuffled frames and broken media among them."""
    answers = []
    for workers in (0, 1):
        words = ("--control", "shuffled", "--decode_workers", workers)
        local(flags, tmp_path / f"{workers}.json", monkeypatch, capsys, *words)
        rows = (tmp_path / f"{workers}.predictions.jsonl").read_text().splitlines()
        answers.append([(row["output"], row["error"]) for row in map(json.loads, rows)])
    assert answers[0] == answers[1]
    assert any(error and "damaged.mp4" in error for _, error in answers[1])


FAKE_DECORD = """
import time
import numpy as np

DECORDError = ValueError

class logging:
    QUIET = 0
    set_level = print

class VideoReader:
    def __init__(self, path, num_threads):
        while path.endswith("hangs.mp4"):
            time.sleep(1)

    def __len__(self):
        return 8

    def get_frame_timestamp(self, numbers):
        return np.array([[number / 4, number / 4] for number in numbers])

    def get_batch(self, indices):
        frames = np.full((len(indices), 56, 56, 3), 99, np.uint8)
        return type("Batch", (), {"asnumpy": lambda self: frames})()
"""


@pytest.mark.parametrize("way", ["here", "server", "check"])
def test_a_decoder_that_hangs_costs_its_question_alone(
    way, serve, checkpoint, toy_folder, tmp_path, monkeypatch, capsys
):
    (tmp_path / "decord.py").write_text(FAKE_DECORD)
    monkeypatch.syspath_prepend(tmp_path)
    row = json.loads((toy_folder / "train_cot.json").read_text())[0]
    rows = [{**row, "problem_id": path, "path": f"{path}.mp4"} for path in ("hangs", "plain")]
    for one in rows:
        (tmp_path / one["path"]).write_bytes(b"read by our decoder")
        one["data_type"] = "video"
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    words = ["--model_name_or_path", checkpoint, "--bench", path, "--decoder", "decord"]
    words += ["--decode_timeout", 5, "--max_pixels", 3136, "--max_completion_length", 4]
    if way == "server":
        words += ["--api_base", serve(lambda request, times: "<answer>B</answer>").base]
    if way == "check":
        words += ["--frame_use_check"]
    report = local(words, tmp_path / "report.json", monkeypatch, capsys)
    errors = report["errors"] if way == "check" else report["errors"]["unreadable media"]
    assert list(errors) == ["hangs"]
    assert "hangs.mp4: not decoded within 5 s (--decode_timeout)" in errors["hangs"]
    if way == "check":
        assert report["tokens"] > 0
    else:
        assert [one["error"] is None for one in report["results"]] == [False, True]
