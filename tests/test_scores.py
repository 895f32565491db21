"""common/scores.py and reward.split_output: what an output says, and what nobody could read."""

import json
import time

import pytest

import reward
from common import scores
from common.data import read_choices

# ------------------------------------------------------------------------- reasoning and answer


@pytest.mark.parametrize(
    "output,reasoning,answer",
    [
        ("<think>It falls.</think><answer>B</answer>", "It falls.", "B"),
        ("<think>It falls.</think>\n\nB", "It falls.", "B"),
        ("It falls.\n</think>\nB", "It falls.", "B"),  # the prompt opened it
        ("B", "", "B"),
        ("So: <answer>B</answer>", "So:", "B"),
        ("<answer>B", "", "B"),  # a stop string
        ("B</answer>", "", "B"),  # the prompt opened it
        ("<Think>It falls.</THINK> <Answer>B</ANSWER>", "It falls.", "B"),
        ("< think >It falls.< /think >< answer >B</ answer>", "It falls.", "B"),
        ("<thinking>It falls.</thinking>B", "It falls.", "B"),
        ("<think>It falls, so B", "It falls, so B", ""),
        ("<think>It falls.</think>", "It falls.", ""),
        ("<think>It falls.</think><answer></answer>", "It falls.", ""),
        ("<think>One.</think><think>Two.</think> B", "One.Two.", "B"),
        ("<think>One.</think> B? <think>No, wait", "One. B? No, wait", ""),
        # Of several blocks the first, of nested ones the inner one.
        ("<answer>A</answer> or <answer>B</answer>", "", "A"),
        ("<answer>the <answer>B</answer></answer>", "", "B"),
        # Reasoning speaks about the tags; the answer comes behind it.
        ("<think>I write <answer>A</answer>? No.</think><answer>B</answer>", None, "B"),
        ("<think>I write <answer>A</answer> and then", None, ""),
        # Never closed, but the last words are an answer block.
        ("<think>It falls. <answer>B</answer>", "It falls.", "B"),
        ("<think>It falls. <answer>B</answer></think>\n", "It falls.", "B"),
        ("<answer>B</answer></think>", "", "B"),
        ("<think>It falls.</think><answer>B</answer><think>Or", None, "B"),
        ("", "", ""),
        ("  \n", "", ""),
        ("</think>", "", ""),
        ("a < b and b > c", "", "a < b and b > c"),
    ],
)
def test_reasoning_and_answer(output, reasoning, answer):
    split = reward.split_output(output)
    assert split[1] == answer
    assert reasoning in (None, split[0])


@pytest.mark.parametrize("text", ["<think>", "</think>", "<answer>", "</answer>", "<  "])
def test_many_tags_take_linear_time(text):
    start = time.process_time()
    reward.split_output(text * 50_000)
    assert time.process_time() - start < 2


# ---------------------------------------------------------------------------------- the readers

BALLS = ["A. left", "B. right", "C. a dark-blue ball", "D. 5", "E. cannot tell"]


@pytest.mark.parametrize(
    "answer,letters",
    [
        # The letter alone, as people and typesetters write it.
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("[B]", "B"),
        ("B)", "B"),
        ('"B"', "B"),
        ("**B**", "B"),
        ("__B__", "B"),
        ("`B`", "B"),
        ("$B$", "B"),
        (r"\boxed{B}", "B"),
        (r"$\boxed{\text{B}}$", "B"),
        (r"\(\mathbf{B}\)", "B"),
        ("\uff22", "B"),
        ("\uff08\uff22\uff09", "B"),
        ("B<|im_end|>", "B"),
        ("B?", "B"),
        # With its text.
        ("B. right", "B"),
        ("B right", "B"),
        ("b. right", "B"),
        ("B - right", "B"),
        ("B \u2014 right", "B"),
        ("B: Right.", "B"),
        ("(B) right", "B"),
        ("B (right)", "B"),
        ("C. A dark\u2011blue ball", "C"),
        ("C. the dark ball in the corner", "C"),
        # The text alone.
        ("right", "B"),
        ("Right.", "B"),
        ("A dark-blue ball", "C"),
        ("5", "D"),
        ("Cannot tell", "E"),
        # Lead-ins, and the line where the answer stands.
        ("Answer: B", "B"),
        ("Ans: B", "B"),
        ("I think it's B", "B"),
        ("I think it’s B.", "B"),
        ("**Answer:** (B)", "B"),
        ("The answer is B.", "B"),
        ("So the final answer is **B**.", "B"),
        ("The answer is right.", "B"),
        ("Option B", "B"),
        ("Option (B) is correct.", "B"),
        ("B is the correct answer", "B"),
        ("I would choose option B", "B"),
        ("\u7b54\u6848\uff1aB", "B"),
        ("It rolls to that side.\n\nB", "B"),
        ("It rolls. The answer is B.", "B"),
        ("B\n\nIt rolls to that side.", "B"),
        ("### Answer\n\nB", "B"),
        # Several.
        ("B, C", "BC"),
        ("B and C", "BC"),
        ("(B), (C)", "BC"),
        ("B. right, C. a dark-blue ball", "BC"),
        ("B,B", "B"),
        # None.
        ("I cannot say", ""),
        ("Cannot", ""),
        ("Both", ""),
        ("B or C", ""),
        ("B/C", ""),
        ("either B or C", ""),
        ("B. right or C", ""),
        ("(B)(C)", ""),
        ("B)C)", ""),
        ("B. C", ""),
        ("B.C", ""),
        ("not B", ""),
        ("The answer is not B", ""),
        ("B. left", ""),
        ("a dog", ""),
        ("A dog barks", ""),
        ("BC", ""),
        ("B,", ""),
        ("It rolls. B", ""),
        ("A\nB", ""),
        ("Answer: A\nAnswer: B", ""),
        ("\n".join(BALLS), ""),
        ("Which one?\n" + "\n".join(BALLS[:3]), ""),
        ("A. left - incorrect\nB. right - correct\nC. a ball - incorrect", ""),
        ("A. left: no\nB. right: yes\nThe answer is B", "B"),
        # Taken back.
        ("(A) is wrong", ""),
        ("(A) is not correct", ""),
        ("A: incorrect", ""),
        ("(A) seems wrong", ""),
        ("B) is not the answer", ""),
        ("B. Wait, C", ""),
        ("(B) vs C", ""),
        ("B. right? or maybe C", ""),
        ("B. right or left", ""),
        ("The wrong answer is A", ""),
        ("I doubt that the answer is A", ""),
        ("No answer: A", ""),
        ("The answer is", ""),
        ("?", ""),
    ],
)
def test_choices(answer, letters):
    assert "".join(read_choices(answer, BALLS)) == letters


def test_a_letter_wins_over_an_option_that_is_a_letter():
    assert read_choices("B", ["A. B", "B. A"]) == ("B",)
    assert read_choices("U.S. flag", ["A. flag", "B. U.S. flag"]) == ("B",)
    assert read_choices("same", ["A. same", "B. same"]) == ()


@pytest.mark.parametrize(
    "answer,value",
    [
        ("5", "5"),
        ("-5", "-5"),
        ("\u22125", "-5"),
        ("\u20135", "-5"),
        ("\uff15", "5"),
        ("\uff0d\uff11\uff12", "-12"),
        ("5.", "5"),
        (".5", "1/2"),
        ("1,200", "1200"),
        ("1,234,567.5", "2469135/2"),
        ("1.2e3", "1200"),
        ("5 apples", "5"),
        ("5 meters.", "5"),
        ("5cm", "5"),
        ("5 m^2", "5"),
        ("5 m\u00b2", "5"),
        ("5 km/h", "5"),
        ("50%", "50"),
        (r"50\%", "50"),
        ("50 percent", "50"),
        ("90\u00b0", "90"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        ("20 \u2103", "20"),
        ("$5", "5"),
        ("$5$", "5"),
        ("\u20ac5", "5"),
        ("5\u4e2a", "5"),
        ("3/4", "3/4"),
        ("\u00be", "3/4"),
        (r"\frac{3}{4}", "3/4"),
        (r"$\boxed{\dfrac{3}{4}}$", "3/4"),
        ("**5**", "5"),
        ("(5)", "5"),
        ("Answer: 5", "5"),
        ("The answer is -5.", "-5"),
        ("about 5", "5"),
        ("\u2248 5", "5"),
        ("x = 5", "5"),
        ("It has a door.\n\n**Answer: 5 chairs**", "5"),
        # None, or more than one.
        ("five", None),
        ("about five or six", None),
        ("5 or 6", None),
        ("5 or six", None),
        ("5-6", None),
        ("5 to 6", None),
        ("5 \u00b1 1", None),
        ("5, 6", None),
        ("5 chairs and 3 tables", None),
        ("5 thousand", None),
        ("1,5", None),
        ("12,34", None),
        ("1\u00bd", None),
        ("10\u00b2", None),
        ("2*3", None),
        ("2^3", None),
        ("5:30", None),
        ("1/0", None),
        ("nan", None),
        ("inf", None),
        ("1e999999999", None),
        ("There are 5.", None),
        ("4\n5", None),
        ("", None),
    ],
)
def test_numbers(answer, value):
    found = scores.read_number(answer)
    assert (None if found is None else str(found)) == value


@pytest.mark.parametrize("text", ["B " * 30_000, "5 " * 30_000, "-" * 60_000, "((" * 30_000])
def test_long_answers_are_read_in_time(text):
    start = time.process_time()
    scores.read_number(text)
    read_choices(text, BALLS)
    assert time.process_time() - start < 2


# -------------------------------------------------------------------------------------- the scores


def item(output, solution, kind="multiple choice", options=BALLS, **more):
    choice = kind == "multiple choice"
    fields = {"problem": "Where?", "problem_type": kind, "options": options if choice else []}
    return scores.item_of(
        {"problem_id": 1, **fields, "output": output, "solution": solution} | more
    )


@pytest.mark.parametrize(
    "kind,solution,answer,score",
    [
        ("numerical", "3/4", "0.75", 1),
        ("numerical", "50%", "50%", 1),
        ("numerical", "90\u00b0", "90", 1),
        ("numerical", r"\frac{3}{4}", r"\frac{3}{4}", 1),
        ("numerical", "5", "6 apples", 0),
        ("numerical", "five", "five", 1),  # equal texts need no reading
        ("regression", "5", "4", 0.6),
        ("regression", "5", "about 4 meters", 0.6),
        ("regression", "5", "5 meters wide, 3 long", 1),  # VSI-Bench takes the first word
        ("regression", "\u22125", "-5", 1),
        ("multiple choice", "(B)", "B", 1),
        ("multiple choice", "B. right", "b", 1),
        ("multiple choice", "B,C", "C and B", 1),
        ("multiple choice", "B,C", "(C), (B)", 1),
        ("multiple choice", "B,C", "B", 0),
        ("multiple choice", "B", "B,C", 0),
        ("OCR", "STOP here", "**STOP here**", 1),
        ("OCR", "STOP here", "STOP", 0.5),
        ("OCR", "STOP", "stop", 0),
        ("OCR", "$5", "5", 0),
        ("OCR", "\uff33\uff34\uff2f\uff30", "STOP", 1),
        ("free-form", "\u4e00\u53ea\u72d7", "\u4e00\u53ea\u72d7", 1),
        ("free-form", "Caf\u00e9", "caf\u00e9.", 1),
        (
            "free-form",
            "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
            "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
            1,
        ),
        ("free-form", "a red car", "a red car", 1),
        # One of three words, no pair of words: (1/3 + 0 + 1/3) / 3.
        ("free-form", "red caf\u00e9 wall", "a dark caf\u00e9", 2 / 9),
        # Two of three characters, one of two pairs: (2/3 + 1/2 + 2/3) / 3.
        ("free-form", "\u4e00\u53ea\u72d7", "\u4e00\u53ea\u732b", 11 / 18),
        ("free-form", "\u72d7", "\u732b", 0),
    ],
)
def test_official_scores(kind, solution, answer, score):
    record = scores.score_item(item(f"<answer>{answer}</answer>", solution, kind))
    assert record["reward"] == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize(
    "output",
    [
        "<think>At 0:10 he falls.</think><answer>B</answer>",
        "At 0:10 he falls.</think>\n\nB",
        "<Think>At 0:10 he falls.</THINK> B",
        "At 0:10 he falls. <answer>B",
    ],
)
def test_times_are_read_in_the_same_reasoning(output):
    """NExT-GQA's accuracy with grounding; times that stand in the answer are not cited."""
    record = scores.score_item(item(output, "B", evidence=[[5, 15]]))
    assert scores.grounding_numbers([record])["acc_gqa"] == 1
    record = scores.score_item(item("At 0:10 he falls", "B", evidence=[[5, 15]]))
    assert scores.grounding_numbers([record])["predicted"] == 0


def test_words_of_a_to_z_are_scored_as_rouge_scores_them():
    told = ("The cats were sitting, on_the 2nd mat!", "A cat sat on the 2nd mats.")
    assert reward.rouge_reward(*map(scores.spell_out, told)) == reward.rouge_reward(*told) > 0.4


def test_relative_accuracy_is_that_of_vsi_benchs_floats():
    """Every pair of whole numbers to 200, in Python's own floats."""
    step = (0.95 - 0.5) / 9
    confidences = [0.5 + step * place for place in range(9)] + [0.95]
    other = 0
    for y in range(1, 201):
        for y_hat in range(201):
            error = abs(y_hat - y) / y
            passed = sum(error <= 1 - confidence for confidence in confidences)
            exact = sum(20 * abs(y_hat - y) <= k * y for k in range(1, 11))
            assert scores.mean_relative_accuracy(y_hat, y) == pytest.approx(passed / 10, abs=1e-12)
            assert passed <= exact
            other += passed < exact
    assert scores.mean_relative_accuracy(4, 5) == 0.6
    # 4 for 5 is one of 89 pairs that exact fractions would give one tolerance more.
    assert other == 89


# ----------------------------------------------------------------------------------- what is unread

UNREAD = [
    ("", "B", "multiple choice", "empty output"),
    ("<think>It must be B, I am sure", "B", "multiple choice", "no answer after the reasoning"),
    ("<answer>I cannot say</answer>", "B", "multiple choice", "no single option"),
    ("<answer>B or C</answer>", "B", "multiple choice", "no single option"),
    ("<answer>B, C</answer>", "B", "multiple choice", "no single option"),
    ("<answer>many</answer>", "5", "numerical", "no single number"),
    ("<answer>many</answer>", "5", "regression", "no single number"),
    ("<answer>C</answer>", "B", "multiple choice", None),
    ("<answer>6</answer>", "5", "numerical", None),
    ("<answer>nothing</answer>", "a car", "free-form", None),
]


@pytest.mark.parametrize("output,solution,kind,cause", UNREAD)
def test_what_cannot_be_read_is_wrong_and_named(output, solution, kind, cause):
    record = scores.score_item(item(output, solution, kind))
    assert (record["unread"], record["reward"]) == (cause, 0)
    # What failed before it was read has its own list.
    assert scores.score_item(item(output, solution, kind, error="no such file"))["unread"] is None


def run_of(outputs, **more):
    return [item(output, "B", problem_id=name, **more) for name, output in enumerate(outputs)]


def test_unread_answers_are_counted_with_examples():
    report = scores.make_report(run_of(["B"] * 97 + ["", "B or C", "Neither, <none>"]))
    assert report["unread"] == {
        "empty output": {"97": ""},
        "no single option": {"98": "B or C", "99": "Neither, <none>"},
    }
    assert report["accuracy"] == 0.97
    assert report["warnings"] == [
        "3 of 100 answers could not be read and count as wrong: 1 empty output, such as 97: ''; "
        "2 no single option, such as 98: 'B or C'"
    ]
    # At 2 % nothing is said.
    report = scores.make_report(run_of(["B"] * 98 + ["", "B or C"]))
    assert len(report["unread"]) == 2 and report["warnings"] == []


def test_a_comparison_of_unread_answers_is_refused():
    good = scores.make_report(run_of(["B"] * 10))["results"]
    half = scores.make_report(run_of(["B"] * 5 + ["?"] * 5))["results"]
    bad = scores.make_report(run_of(["B"] * 4 + ["Hard to say"] * 6))["results"]
    assert scores.compare(good, half)["difference"] == -0.5
    for pair, name in (((good, bad), "second"), ((bad, good), "first")):
        with pytest.raises(scores.DataError, match=f"6 of 10 answers of the {name} .*Hard to say"):
            scores.compare(*pair)


# ------------------------------------------------------------------------------------- stored files


def stored(tmp_path, rows, name="stored.json"):
    path = tmp_path / name
    path.write_text(
        json.dumps(rows) if isinstance(rows, dict) else "\n".join(map(json.dumps, rows))
    )
    items, _, settings = scores.read_predictions(path)
    return scores.make_report(items), settings["format"]


# How a model may write an answer, and whether the release's own rules read it.
WAYS = [
    ("<think>It falls.</think><answer>{}</answer>", True),
    ("<answer>{}</answer>", True),
    ("{}", True),
    ("<think>It falls.</think>\n\n{}", False),
    ("It falls.\n</think>\n\n{}", False),
    ("<answer>{}", False),
    ("<Answer>{}</Answer>", False),
    ("**Answer: {}**", False),
]


def video_r1(name, output, right, score):
    fields = {"problem_type": "multiple choice", "options": BALLS, "problem": "Where?"}
    row = {"problem_id": name, **fields, "solution": f"<answer>{right}</answer>"}
    return {**row, "output": output, "reward": score, "correct": score == 1}


def videocfr(name, output, right, score):
    return {**video_r1(name, output, right, score), "abs_path": f"/data/{name}.mp4"}


def seed_bench_r1(name, output, right, score):
    row = {"sample_id": name, "question": "What next?", "golden_choice_idx": right}
    row |= {"choice_a": "stir", "choice_b": "pour", "choice_c": "cut", "choice_d": "wash"}
    return {**row, "task_progress_metadata": [], "output": output, "reward": score}


def tw_grpo(name, output, right, score):
    question = {"problem": "Where?\nA. left\nB. right", "video": f"{name}.mp4"}
    question["solution"] = f"<answer>{right}</answer>"
    row = {"question": question, "ground_truth": right, "model_output": output}
    return {**row, "accuracy_score": score}


def lmms_eval(name, output, right, score):
    doc = {"question": "Where?", "options": ["A. left", "B. right"], "answer": right}
    row = {"doc_id": name, "doc": doc, "target": right, "resps": [[output]]}
    return {**row, "videomme_perception_score": {"answer": right, "pred_answer": "AB"[score]}}


def ours(name, output, right, score):
    return {**video_r1(name, output, right, score), "settings": {"frames": 16}, "error": None}


@pytest.mark.parametrize("way,read", WAYS)
@pytest.mark.parametrize("row", [video_r1, videocfr, seed_bench_r1, tw_grpo, lmms_eval, ours])
def test_six_formats_with_and_without_tags(row, way, read, tmp_path):
    """Three of four are right; the file's own score finds them where its rules can read them."""
    answers = "BABB"
    rows = []
    for name, answer in enumerate(answers):
        score = int(read and answer == "B")
        rows.append(row(name, way.format(answer), "B", score))
    report, _ = stored(tmp_path, {"results": rows} if row is videocfr else rows)
    assert report["accuracy"] == 0.75 and report["unread"] == {}
    if read:
        assert report["accuracy_as_stored"] == 0.75 and report["warnings"] == []
    else:
        (warning,) = report["warnings"]
        assert "3 of 4 answers have another score in the file" in warning
        assert "' for 'B': 0 there, 1 here)" in warning


def test_results_of_seed_bench_r1_have_their_options(tmp_path):
    rows = [seed_bench_r1(1, "<answer>pour</answer>", "B", 0.0)]
    rows.append(seed_bench_r1(2, "<answer>C. pour</answer>", "B", 0.0))
    report, _ = stored(tmp_path, rows)
    first, second = report["results"]
    assert first["options"] == ["A. stir", "B. pour", "C. cut", "D. wash"]
    assert (first["problem"], first["problem_type"]) == ("What next?", "multiple choice")
    assert (first["reward"], second["unread"]) == (1, "no single option")


# lmms-eval's samples of Video-R2's further benchmarks: the data set's row, the target, the score.
MLVU = ({"question": "Where?\n(A) left\n(B) right", "answer": "B", "task_type": "ego"}, "B")
LONG = (
    {"question": "Where?", "correct_choice": 1, "option0": "1", "option1": "2", "option2": "N/A"},
    "1",
)
MATHS = ({"question": "Where?", "options": ["A. left", "B. right"], "answer": "B"}, "B")
MINERVA = ({"question": "Where?", "answer_choice_0": "x", "answer_choice_1": "y"}, "B")
SCIENCE = ({"question": "Where?", "options": {"A": "x", "B": "y"}, "answer": "B"}, "1")


@pytest.mark.parametrize(
    "sample,name,size,texts",
    [
        (MLVU, "samples_mlvu_dev.jsonl", 2174, ["left", "right"]),
        (LONG, "samples_longvideobench_val_v.jsonl", 1337, ["1", "2"]),
        (MATHS, "samples_videomathqa_mcq.jsonl", 420, ["left", "right"]),
        (MINERVA, "samples_minerva.jsonl", 1515, ["x", "y"]),
        (SCIENCE, "samples_scivideobench.jsonl", 1000, ["x", "y"]),
    ],
)
def test_further_benchmarks_of_video_r2(sample, name, size, texts, tmp_path):
    doc, target = sample
    row = {"doc_id": 0, "doc": doc, "target": target, "resps": [["(B)"]]}
    path = tmp_path / name
    path.write_text(json.dumps(row))
    (one,), _, _ = scores.read_predictions(path)
    assert one.options == [f"A. {texts[0]}", f"B. {texts[1]}"]
    assert (one.problem_type, one.solution) == ("multiple choice", "B")
    assert scores.score_item(one)["reward"] == 1
    assert size in scores.SIZES[scores.benchmark_of(path)]


def test_vsi_benchs_own_scores_are_read():
    assert scores.lmms_eval_score({"vsibench_score": {"accuracy": 1.0}}) == 1.0
    assert scores.lmms_eval_score({"vsibench_score": {"MRA:.5:.95:.05": 0.6}}) == 0.6


def test_other_scores_in_the_file_are_told_with_the_first_rows(tmp_path):
    rows = [video_r1(name, "<answer>B</answer>", "B", 1.0) for name in range(10)]
    for name in (3, 5, 6, 8):
        rows[name] = video_r1(name, "<answer>(B)</answer>", "B", 0.0)
    rows[9]["reward"] = 0.0
    report, _ = stored(tmp_path, rows)
    assert report["accuracy"] == 1 and report["accuracy_as_stored"] == 0.5
    assert report["warnings"] == [
        "5 of 10 answers have another score in the file, 4 of them that of accuracy_video_r1; the "
        "first: 3 ('(B)' for 'B': 0 there, 1 here), 5 ('(B)' for 'B': 0 there, 1 here), "
        "6 ('(B)' for 'B': 0 there, 1 here)"
    ]


def test_a_log_of_4000_rows_is_scored_in_seconds(tmp_path):
    """Long reasoning, every way to write an answer, words to compare."""
    words = "the ball rolls to the left and then a red car passes behind it at 0:12".split()
    rows = []
    for number in range(4000):
        way, _ = WAYS[number % len(WAYS)]
        output = way.format("B").replace("It falls.", " ".join(words * 15))
        rows.append(video_r1(number, output, "B", 1.0))
        if number % 10 == 0:
            rows[-1] |= {"problem_type": "free-form", "output": " ".join(words * 2)}
    start = time.process_time()
    report, _ = stored(tmp_path, rows)
    assert time.process_time() - start < 10
    assert report["n"] == 4000 and report["by_type"]["multiple choice"]["accuracy"] == 1


@pytest.mark.parametrize(
    "told, expected",
    [([True, False], 1), ([False, None], None), ([True, "length"], None), ([None, None], None)],
)
def test_cut_answers_are_counted_where_all_rows_tell(told, expected, tmp_path):
    rows = []
    for index, cut in enumerate(told):
        row = {"problem_id": index, "problem_type": "numerical", "solution": "1", "output": "1"}
        rows.append(row if cut is None else row | {"truncated": cut})
    rows.append({"problem_id": "x", "error": "unreadable media: x"})
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    assert scores.make_report(scores.read_predictions(file)[0])["truncated"] == expected


def test_samples_of_vsi_bench_are_paired_whatever_was_answered(tmp_path):
    runs = []
    for name, answers in (("a", ["3", "7"]), ("b", ["4", "7"])):
        rows = []
        for index, answer in enumerate(answers):
            doc = {"question": f"How many {index}?", "question_type": "object_counting"}
            # What the task writes into the question before the sample is logged.
            doc |= {"ground_truth": "4", "prediction": answer, "MRA:.5:.95:.05": 0.5}
            rows.append({"doc_id": index, "doc": doc, "target": "4", "resps": [[answer]]})
        file = tmp_path / f"{name}_samples_vsibench.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs.append(scores.make_report(scores.read_predictions(file)[0], "vsibench")["results"])
    found = scores.compare(*runs)
    assert (found["n"], found["only_in_first"], found["only_in_second"]) == (2, 0, 0)
    assert found["difference"] > 0 and len(found["gains"]) == 1


def test_an_endless_denominator_is_no_number():
    assert scores.read_number("1/" + "3" * 5000) is None
