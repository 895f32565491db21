"""common/data.py: data set files and their errors, rows of other projects, prompts, inversion."""

import json
import random
from dataclasses import replace

import pytest
from conftest import chat_parts

import reward
from common.data import (
    ASK_FOR_WRONG,
    INSTRUCTIONS,
    PROBLEM_TYPES,
    DataError,
    Example,
    Medium,
    answer_type,
    build_prompt,
    differences,
    invert_question,
    load_examples,
    negate_question,
    parse_example,
    parse_time,
    read_template,
    split_options,
    strip_tag,
    target_text,
)

ROW = {
    "problem_id": 7,
    "problem": "What moves?",
    "problem_type": "multiple choice",
    "options": ["A. a ball", "B. a car"],
    "solution": "<answer>A</answer>",
    "data_type": "video",
    "path": "./videos/a.mp4",
    "process": "<think>It rolls.</think>",
}


def write_dataset(folder, rows, name="data.json"):
    file = folder / name
    file.write_text(
        "\n".join(json.dumps(row) for row in rows) if name.endswith(".jsonl") else json.dumps(rows),
        encoding="utf-8",
    )
    return file


# ------------------------------------------------------------ data set files


def test_a_row_becomes_an_example(tmp_path):
    grounding = {"00:04-01:08": "a ball rolls", "00:10": "it stops"}
    row = {**ROW, "grounding": grounding, "evidence": [[4, 8.5]], "data_source": "toy", "kind": "x"}
    (example,) = load_examples(write_dataset(tmp_path, [row]))
    assert example == Example(
        id="7",
        question="What moves?",
        options=["A. a ball", "B. a car"],
        problem_type="multiple choice",
        answer="A",
        media=[Medium("video", str(tmp_path.resolve() / "videos/a.mp4"))],
        reasoning="It rolls.",
        grounding=[(4.0, 68.0, "a ball rolls"), (10.0, 10.0, "it stops")],
        evidence=[(4, 8.5)],
        extra={"path": "./videos/a.mp4", "data_source": "toy", "kind": "x"},
    )


def test_json_lines_and_media_root(tmp_path):
    rows = [{**ROW, "problem_id": index} for index in range(3)]
    file = write_dataset(tmp_path, rows, "data.jsonl")
    file.write_text(file.read_text() + "\n\n")
    examples = load_examples(str(file), media_root=str(tmp_path / "media"))
    assert [example.id for example in examples] == ["0", "1", "2"]
    assert examples[0].path == str(tmp_path.resolve() / "media/videos/a.mp4")


def test_json_lines_may_hold_unicode_line_separators(tmp_path):
    # U+2028 and U+0085 are characters inside a JSON string; only a newline ends a JSON line
    file = tmp_path / "data.jsonl"
    file.write_text(
        json.dumps({**ROW, "problem": "What\u2028moves\u0085here?"}, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    assert load_examples(file)[0].question == "What\u2028moves\u0085here?"


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("<answer>A</answer>", "A"),
        ("A", "A"),
        (" <answer> 3.5\n</answer>", "3.5"),
        (12, "12"),
        ("so <answer>B</answer> not <answer>C</answer>", "B"),
    ],
)
def test_solutions_come_with_and_without_tags(tmp_path, solution, answer):
    assert (
        parse_example({**ROW, "problem_type": "OCR", "solution": solution}, 0, tmp_path).answer
        == answer
    )


OPTIONS = ["A. red", "B. dark blue", "C. red", "D. U.S. flag", "E. 1,200"]
PAREN = ["(A) red", "(B) dark blue", "(C) c", "(D) D"]
BARE = ["red", "dark blue", "C"]


@pytest.mark.parametrize(
    ("solution", "options", "letters"),
    [
        # one option of "A. red": its letter as people write it, with its text, or the text alone
        ("B", OPTIONS, "B"),
        ("b", OPTIONS, "B"),
        ("B.", OPTIONS, "B"),
        ("(B)", OPTIONS, "B"),
        ("(b).", OPTIONS, "B"),
        ("B)", OPTIONS, "B"),
        ("B:", OPTIONS, "B"),
        ("B. dark blue", OPTIONS, "B"),
        ("(B) dark blue", OPTIONS, "B"),
        ("B: Dark  blue.", OPTIONS, "B"),
        ("dark blue", OPTIONS, "B"),
        (" Dark\n Blue. ", OPTIONS, "B"),
        ("<answer>(B)</answer>", OPTIONS, "B"),
        ("A", OPTIONS, "A"),
        ("A. red", OPTIONS, "A"),
        ("C. red", OPTIONS, "C"),
        ("U.S. flag", OPTIONS, "D"),
        ("D. U.S. flag", OPTIONS, "D"),
        ("1,200", OPTIONS, "E"),
        (6, ["A. 5", "B. 6"], "B"),
        ("D", PAREN, "D"),
        ("c", PAREN, "C"),
        ("(B) Dark blue", PAREN, "B"),
        ("(B)", ["A: red", "B: blue"], "B"),
        ("blue", ["A) red", "B) blue"], "B"),
        # several
        ("A,C", OPTIONS, "A,C"),
        ("A, C", OPTIONS, "A,C"),
        ("(A), (C)", OPTIONS, "A,C"),
        ("c,a", OPTIONS, "C,A"),
        ("A,A", OPTIONS, "A"),
        ("<answer>(B),(D)</answer>", PAREN, "B,D"),
        # none, or more than one
        ("Z", OPTIONS, None),
        ("F", OPTIONS, None),
        ("A,F", OPTIONS, None),
        ("green", OPTIONS, None),
        ("red", OPTIONS, None),
        ("red, dark blue", OPTIONS, None),
        ("AC", OPTIONS, None),
        ("B. red", OPTIONS, None),
        ("A,", OPTIONS, None),
        ("two", OPTIONS, None),
        ("a", ["A. k", "B. a"], None),
        ("A", ["A. k", "B. a"], "A"),
        # options without letters get them by their place; "A" may then be a text
        ("dark blue", BARE, "B"),
        ("(B)", BARE, "B"),
        ("b", BARE, "B"),
        ("C", BARE, "C"),
        ("Z", BARE, None),
        ("A", ["K", "A"], None),
        ("B", ["K", "B"], "B"),
        ("12", [10, 12], "B"),
        # without options the letters may stand in the question
        ("B", [], "B"),
        ("(b)", None, "B"),
        ("A, C", [], "A,C"),
        ("Yes", [], None),
        ("5", [], None),
    ],
)
def test_a_choice_is_read_as_its_letter(tmp_path, solution, options, letters):
    row = {**ROW, "solution": solution, "options": options}
    if letters is not None:
        example = parse_example(row, 0, tmp_path)
        assert example.answer == letters
        assert (
            reward.accuracy_reward(f"<answer>{letters}</answer>", example.answer, "multiple choice")
            == 1
        )
        return
    with pytest.raises(
        DataError, match=r"^row 0 \(problem_id 7\) solution '.*' names none of the options A, B"
    ):
        parse_example(row, 0, tmp_path)


def test_the_prompt_has_a_letter_for_every_option(tmp_path):
    example = parse_example(
        {**ROW, "options": ["red", "U.S. flag", 3], "solution": "U.S. flag"}, 0, tmp_path
    )
    assert example.options == ["A. red", "B. U.S. flag", "C. 3"] and example.answer == "B"
    assert "Options:\nA. red\nB. U.S. flag\nC. 3\n" in build_prompt(example)
    for options in (
        ["(A) x", "(B) y"],
        ["A. x", "B. y", "none of them"],
    ):  # what has letters stays as it is
        assert parse_example({**ROW, "options": options}, 0, tmp_path).options == options
    assert parse_example(
        {**ROW, "problem_type": "OCR", "options": ["x", "y"]}, 0, tmp_path
    ).options == ["x", "y"]
    with pytest.raises(DataError, match="has 27 options, more than there are letters"):
        parse_example({**ROW, "options": [f"o{place}" for place in range(27)]}, 0, tmp_path)


def test_several_letters_are_asked_for_however_they_are_written(tmp_path):
    rows = [{**ROW, "solution": "(a), (b)"}, {**ROW, "problem_id": 8}]
    examples = load_examples(write_dataset(tmp_path, rows))
    assert [(example.answer, example.extra["multi_answer"]) for example in examples] == [
        ("A,B", True),
        ("A", True),
    ]


def test_ids_can_be_printed(tmp_path):
    assert parse_example({**ROW, "problem_id": "a\ud800"}, 0, tmp_path).id == "a\\ud800"


def test_a_zero_is_a_solution(tmp_path):
    assert (
        parse_example({**ROW, "problem_type": "numerical", "solution": 0}, 0, tmp_path).answer
        == "0"
    )


def test_rows_without_optional_fields(tmp_path):
    row = {key: ROW[key] for key in ("problem", "problem_type", "solution", "data_type", "path")}
    example = parse_example(
        {**row, "options": None, "process": None, "grounding": None, "evidence": None}, 4, tmp_path
    )
    assert (
        example.id,
        example.options,
        example.reasoning,
        example.grounding,
        example.evidence,
    ) == ("4", [], "", [], [])
    text = parse_example({**row, "data_type": "text", "path": ""}, 0, tmp_path)
    assert text.media == [] and text.media_type == "text" and text.path == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": ""}, "has no problem"),
        ({"solution": None}, "has no solution"),
        ({"problem": None, "data_type": None}, "has no problem, data_type"),
        (
            {"problem_type": "poetry"},
            "'poetry'.*multiple choice, numerical, regression, free-form, OCR",
        ),
        ({"data_type": "audio"}, "'audio'.*video, image, text"),
        ({"path": ""}, "has no video: its path is empty"),
        ({"path": None}, "has no video: its path is empty"),
        ({"path": "../secret.mp4"}, "outside the media root"),
        ({"path": "videos/../../secret.mp4"}, "outside the media root"),
        ({"path": "/etc/passwd"}, "outside the media root"),
        ({"path": ["a.mp4"]}, "which is not a path"),
        ({"path": "a\0.mp4"}, "which is not a path"),
        # a lone surrogate, which no file system has
        ({"path": "a\ud800.mp4"}, "has no valid Unicode in path"),
        (
            {"solution": float("nan")},
            "has a solution that is neither text nor number: nan",
        ),  # as JSON's NaN is read
        ({"solution": float("inf")}, "has a solution that is neither text nor number: inf"),
        ({"solution": {"A": 1}}, "has a solution that is neither text nor number"),
        ({"solution": " "}, "has an empty solution"),
        ({"problem_type": "numerical", "solution": "two"}, "'two', which is not a number"),
        ({"problem_type": "regression", "solution": "50%"}, "'50%', which is not a number"),
        ({"problem_type": "numerical", "solution": "NaN"}, "has an empty solution NaN"),
        ({"solution": "NaN"}, "has an empty solution NaN"),
        ({"problem_type": "free-form", "solution": "NaN"}, "has an empty solution NaN"),
        ({"options": [], "solution": "green"}, "'green' names none of the options A, B, C, D"),
        ({"grounding": {"00:05-00:03": "x"}}, r"ends before it starts, 5.0 to 3.0 s"),
        ({"grounding": {"nan-2": "x"}}, r"ends before it starts, nan to 2.0 s"),
        ({"grounding": {"1-inf": "x"}}, r"ends before it starts, 1.0 to inf s"),
        ({"problem": " "}, "has an empty problem or option"),
        ({"problem": float("nan")}, "has an empty problem or option"),
        ({"options": ["A. x", float("nan")]}, "has an empty problem or option"),
        ({"options": ["A. x", ""]}, "has an empty problem or option"),
        ({"evidence": [[5, 4]]}, "an interval ends before it starts"),
        ({"evidence": [[float("nan"), 4]]}, "an interval ends before it starts"),
        ({"solution": "<answer> </answer>"}, "has an empty solution"),
        ({"problem": "What \udc80?"}, r"has no valid Unicode in problem \(a lone surrogate\)"),
        ({"options": ["A. x", "B. \ud83d"]}, "has no valid Unicode in options"),
        ({"process": "\ud83d", "solution": "\ud83d"}, "has no valid Unicode in process"),
        ({"options": ["red", "C. elegans", "blue"], "solution": "blue"}, "two options of one le"),
        ({"options": ["J. Smith", "J. Brown"], "solution": "J. Smith"}, "two options of one let"),
        ({"options": [["A", "red"], ["B", "blue"]]}, r"no text: \['A', 'red'\]"),
        ({"problem": {"text": "Who?"}}, "no text: {'text': 'Who\\?'}"),
        (
            {"problem_type": "OCR", "solution": "<answer>NO ENTRY"},
            "a think or answer tag inside its solution",
        ),
        ({"evidence": ["15", "27"]}, "'15' is no list"),
        ({"data_type": "frame", "path": "", "fps": "x"}, "fps 'x', which is not a number"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    with pytest.raises(DataError, match=rf"row 1 \(problem_id 8\).*{message}"):
        load_examples(write_dataset(tmp_path, [ROW, {**ROW, "problem_id": 8, **change}]))


@pytest.mark.parametrize(
    "change",
    [
        {"grounding": {"soon": "a ball rolls"}},
        {"grounding": ["00:04"]},
        {"evidence": [4, 8]},
        {"options": "A. a ball"},
    ],
)
def test_a_malformed_optional_field_is_named(tmp_path, change):
    with pytest.raises(DataError, match="row 1"):
        load_examples(write_dataset(tmp_path, [ROW, {**ROW, "problem_id": 8, **change}]))


def test_letters_alone_are_options_that_a_picture_shows(tmp_path):
    example = parse_example({**ROW, "options": ["A.", "B."], "solution": "B"}, 0, tmp_path)
    assert example.options == ["A.", "B."] and example.answer == "B"


@pytest.mark.parametrize("process", ["abc</think><answer>B</answer>", "<think>abc", "abc</think>"])
def test_a_demonstration_with_a_tag_inside_is_left_out_and_counted(tmp_path, process):
    example = parse_example({**ROW, "process": process}, 0, tmp_path)
    assert example.reasoning == ""
    left_out = {"rows have a think or answer tag inside their process, which is left out": 1}
    assert differences([example]) == left_out
    whole = "<think>abc</think><answer>B</answer>"
    assert parse_example({**ROW, "process": whole}, 0, tmp_path).reasoning == "abc"


def test_a_file_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="deep.json is not valid JSON: maximum recursion depth"):
        load_examples(tmp_path / "deep.json")


def test_a_template_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "mark.txt").write_text("{question}!", encoding="utf-8-sig")
    assert read_template(tmp_path / "mark.txt") == "{question}!"
    (tmp_path / "latin.txt").write_bytes("{question}, s'il vous plaît".encode("latin-1"))
    with pytest.raises(DataError, match="latin.txt is not UTF-8"):
        read_template(tmp_path / "latin.txt")


@pytest.mark.parametrize("row", [3, "text", None, ["a"]])
def test_a_row_that_is_no_object_is_named(tmp_path, row):
    with pytest.raises(DataError, match="row 1"):
        load_examples(write_dataset(tmp_path, [ROW, row]))


def test_a_neighbour_with_the_roots_name_as_prefix_is_outside(tmp_path):
    (tmp_path / "media").mkdir()
    with pytest.raises(DataError, match="outside"):
        parse_example({**ROW, "path": "../media2/a.mp4"}, 0, tmp_path / "media")


def test_links_are_the_users_own(tmp_path):
    # A hub cache, or a folder on another disk.
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/a.mp4").write_text("x")
    (tmp_path / "media").mkdir()
    (tmp_path / "media/videos").symlink_to(tmp_path / "disk")
    example = parse_example(ROW, 0, tmp_path / "media")
    assert example.path == str(tmp_path / "media/videos/a.mp4")
    for path in ("videos/../a.mp4", str(tmp_path / "media/videos/a.mp4")):
        with pytest.raises(DataError, match="outside"):
            parse_example({**ROW, "path": path}, 0, tmp_path / "media")


def test_another_video_suffix_is_taken_and_counted(tmp_path, caplog):
    (tmp_path / "videos").mkdir()
    for name in ("a.webm", "b.mp4", "b.webm"):
        (tmp_path / "videos" / name).write_text("x")
    names = ["a.mp4", "b.mp4", "c.mp4", "a.png"]
    rows = [{**ROW, "problem_id": name, "path": f"videos/{name}"} for name in names]
    rows[3]["data_type"] = "image"
    examples = load_examples(write_dataset(tmp_path, rows))
    found = ["a.webm", "b.mp4", "c.mp4", "a.png"]
    assert [example.path for example in examples] == [f"{tmp_path}/videos/{name}" for name in found]
    assert examples[0].extra["path"] == "videos/a.mp4"
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "data.json: 1 videos are there as .webm alone, which is taken"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", "not valid JSON"),
        ("", "not valid JSON"),
        ("[]", "no examples"),
        ("{}", "no examples"),
        ('{"problem": "x"}', "no examples"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, message):
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(DataError, match=f"bad.json.*{message}"):
        load_examples(file)


def test_a_byte_order_mark_and_json_lines_named_json_are_read(tmp_path):
    lines = "\n".join(json.dumps({**ROW, "problem_id": index}) for index in range(2))
    for name, text in (("a.json", json.dumps([ROW])), ("b.jsonl", lines), ("c.json", lines)):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert load_examples(tmp_path / name)[0].question == "What moves?"
    assert len(load_examples(tmp_path / "c.json")) == 2


def test_bad_json_lines_and_bytes_are_named(tmp_path):
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROW) + "\n{oops\n")
    with pytest.raises(DataError, match="bad.jsonl.*not valid JSON"):
        load_examples(tmp_path / "bad.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty.jsonl.*no examples"):
        load_examples(tmp_path / "empty.jsonl")
    (tmp_path / "latin.json").write_bytes(
        json.dumps([{**ROW, "problem": "Où?"}], ensure_ascii=False).encode("latin-1")
    )
    with pytest.raises(DataError, match="latin.json"):
        load_examples(tmp_path / "latin.json")


def test_a_missing_file_and_repeated_ids_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.json not found"):
        load_examples(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="data.json: row 2 repeats the problem_id 7 of row 0"):
        load_examples(
            write_dataset(tmp_path, [ROW, {**ROW, "problem_id": 9}, {**ROW, "problem_id": "7"}])
        )


def test_unusable_rows_are_listed_when_asked_for(tmp_path):
    rows = [
        ROW,
        3,
        {**ROW, "problem_id": 8, "path": "../x.mp4"},
        {**ROW, "problem": "Again?"},
        {**ROW, "problem_id": 9, "solution": ""},
        {"sample_id": 4, "task_progress_metadata": []},
        {**ROW, "problem_id": 10},
    ]
    errors = []
    examples = load_examples(write_dataset(tmp_path, rows), errors=errors)
    assert [(example.id, example.question) for example in examples] == [
        ("7", "What moves?"),
        ("10", "What moves?"),
    ]  # the first 7 is kept
    assert [(error["problem_id"], error["media"]) for error in errors] == [
        ("1", None),
        ("8", "../x.mp4"),
        ("7", "./videos/a.mp4"),
        ("9", "./videos/a.mp4"),
        ("4", None),
    ]
    causes = [
        "not an object",
        "outside the media root",
        "repeats the problem_id 7 of row 0",
        "has no solution",
        "lacks a field",
    ]
    assert all(cause in error["cause"] for cause, error in zip(causes, errors, strict=True))


# ------------------------------------------------------------ rows of other projects


def one(folder, row):
    [example] = load_examples(write_dataset(folder, [row]))
    return example, example.path.removeprefix(f"{folder.resolve()}/")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Why?\nA. x\nB. y", ("Why?", ["A. x", "B. y"])),
        ("Why?\nOr not?\n(A) x\n(B) y z", ("Why?\nOr not?", ["A. x", "B. y z"])),
        (
            "Why?\nB. y\nA. x\nC. z",
            ("Why?\nB. y", ["A. x\nC. z"]),
        ),  # letters out of order begin nothing
        ("A ball or a cube?", ("A ball or a cube?", [])),
        (
            "Who wins? A. red B. blue",
            ("Who wins? A. red B. blue", []),
        ),  # in one line they stay in the question
    ],
)
def test_split_options(text, expected):
    assert split_options(text) == expected


def test_a_row_of_tw_grpo(tmp_path):
    example, path = one(
        tmp_path,
        {
            "problem": "Which will not happen?\n"
            "A. The sphere hits\nB. The balls collide\nC. The cone exits",
            "solution": "<answer>A,C</answer>",
            "video": "/CLEVRER/validation/v1.mp4",
            "glue": [[1.5, 4]],
        },
    )
    assert example.question == "Which will not happen?"
    assert example.options == ["A. The sphere hits", "B. The balls collide", "C. The cone exits"]
    assert (example.answer, example.problem_type, example.media_type) == (
        "A,C",
        "multiple choice",
        "video",
    )
    assert path == "CLEVRER/validation/v1.mp4"
    assert example.evidence == [(1.5, 4.0)] and example.id == "0"
    row = {key: value for key, value in ROW.items() if key != "path"}
    free = {"video": "/x.mp4", "problem_type": "free-form"}
    renamed, _ = one(tmp_path, {**row, **free})
    assert (renamed.id, renamed.problem_type, renamed.options) == (
        "7",
        "free-form",
        ["A. a ball", "B. a car"],
    )  # what the row says is kept


def test_options_of_nextgqa_stand_once(tmp_path):
    raw = {
        "video": "1106/42.mp4",
        "question": "why did the boy sit",
        "options": ["(A) share with the girl", "(B) unwrap it"],
        "answer": "(B)",
        "glue": [[13.8, 29.8]],
    }
    # As TW-GRPO converts it: the problem repeats the options, without a sign behind the letter.
    converted = {
        **raw,
        "problem": "why did the boy sit\nA share with the girl\nB unwrap it",
        "solution": "<answer>B</answer>",
        "is_negated": False,
    }
    # STAR's options have no letters.
    star = {**converted, "options": ["share with the girl", "unwrap it"]}
    for row, options in ((raw, raw["options"]), (converted, raw["options"]), (star, None)):
        example, path = one(tmp_path, row)
        assert example.question == "why did the boy sit"
        assert example.options == (options or ["A. share with the girl", "B. unwrap it"])
        assert (example.answer, example.evidence) == ("B", [(13.8, 29.8)])
        assert path == "1106/42.mp4"
        assert build_prompt(example).count("unwrap it") == 1
        inverted = invert_question(example, random.Random(0))
        assert "unwrap" not in inverted.question
    # Lines that are not the options stay.
    kept, _ = one(tmp_path, {**converted, "problem": "why did the boy sit\nA share\nB unwrap it"})
    assert kept.question.endswith("\nB unwrap it")


def test_rows_of_mvbench(tmp_path):
    row = {
        "video": "castle_clip_00",
        "question": "Why?",
        "candidates": ["B", "because", "A"],
        "answer": "A",
        "start": 1,
        "end": 5.5,
    }
    (tmp_path / "castle_clip_00").mkdir()
    example, path = one(tmp_path, row)
    # By the text of the option, not by its letter.
    assert (example.options, example.answer) == (["A. B", "B. because", "C. A"], "C")
    assert example.media == [Medium("video", f"{tmp_path}/{path}", 3.0, 1.0, 5.5)]
    assert example.extra["path"] == path == "castle_clip_00"
    file, _ = one(tmp_path, {**row, "video": "a.mp4", "start": None, "end": None})
    assert file.media == [Medium("video", f"{tmp_path}/a.mp4")]
    # Video-R1's and TW-GRPO's copies of the benchmark.
    copy = {**ROW, "data_type": "frame", "path": "castle_clip_00", "start": 1}
    assert one(tmp_path, copy)[0].media == [Medium("video", f"{tmp_path}/{path}", 3.0, 1.0)]
    del copy["path"]
    copy = {**copy, "video": "/castle_clip_00", "fps": 2}
    assert one(tmp_path, copy)[0].media == [Medium("video", f"{tmp_path}/{path}", 2.0, 1.0)]
    with pytest.raises(DataError, match="has candidates that is not a list"):
        one(tmp_path, {**row, "candidates": "abc", "answer": "a"})
    with pytest.raises(DataError, match="has 0.0 frames a second"):
        one(tmp_path, {**row, "fps": 0})
    for count, change in ((0, {"answer": "C"}), (2, {"candidates": ["x", "x"], "answer": "x"})):
        with pytest.raises(DataError, match=f"its answer '.' {count} times among its candidates"):
            one(tmp_path, {**row, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": 5, "end": 5}, "a video that starts at 5.0 s and ends at 5.0 s"),
        ({"start": -1}, "starts at -1.0 s and ends at None s"),
        ({"end": "soon"}, "has end 'soon', which is not a number"),
        ({"start": True}, "has start True, which is not a number"),
        ({"media": ["a.mp4"]}, "media must be a list of objects"),
        (
            {"media": [{"data_type": "video", "path": "a.mp4"}] * 2},
            "has 2 videos; one is supported",
        ),
        ({"media": [{"data_type": "image", "path": "../a.png"}]}, "outside the media root"),
        ({"media": [{"data_type": "sound", "path": "a.wav"}]}, "has data_type 'sound'"),
        ({"media": [{"data_type": "image"}]}, "has no image: its path is empty"),
    ],
)
def test_media_that_cannot_be_right_are_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        one(tmp_path, {**ROW, **change})


def test_several_media_are_kept_in_order(tmp_path, toy_processor):
    media = [
        {"data_type": "image", "path": "a.png"},
        {"data_type": "video", "path": "v.mp4", "start": 2},
        {"data_type": "image", "path": "b.png"},
    ]
    row = {name: ROW[name] for name in ROW if name not in ("data_type", "path")}
    example, path = one(tmp_path, {**row, "media": media})
    assert example.media == [
        Medium("image", f"{tmp_path}/a.png"),
        Medium("video", f"{tmp_path}/v.mp4", start=2.0),
        Medium("image", f"{tmp_path}/b.png"),
    ]
    # The video is what priors are about and what files name.
    assert path == example.extra["path"] == "v.mp4" and example.video == example.media[1]
    before, _, _ = chat_parts(toy_processor, example)
    pads = ["image", "video", "image"]
    assert before.endswith("".join(f"<|vision_start|><|{pad}_pad|><|vision_end|>" for pad in pads))
    text, _ = one(tmp_path, {**row, "media": []})
    assert text.media_type == "text"
    # beside a path it is a column that other rows fill
    plain, path = one(tmp_path, {**ROW, "media": []})
    assert path == "videos/a.mp4" and plain.media == one(tmp_path, ROW)[0].media


def test_rows_of_seed_bench(tmp_path):
    row = {
        "sample_id": 1,
        "video_source": "Ego4D",
        "video_basename": "v.mp4",
        "current_observation_basename": "v.png",
        "question": "What next?",
        "task_progress_metadata": [
            {"narration_text": "take cup", "start_frame": 10, "stop_frame": 50}
        ],
    }
    valid, path = one(
        tmp_path,
        {
            **row,
            "choice_a": "stir",
            "choice_b": "pour",
            "choice_c": "cut",
            "choice_d": "wash",
            "golden_choice_idx": "B",
            "answer": "pour",
        },
    )
    assert (valid.id, valid.question, valid.options, valid.answer) == (
        "1",
        "What next?",
        ["A. stir", "B. pour", "C. cut", "D. wash"],
        "B",
    )
    assert path == valid.extra["path"] == "videos/Ego4D/v.mp4"
    # The question refers to the picture of the current observation.
    picture = Medium("image", f"{tmp_path}/images/Ego4D/v.png")
    assert valid.media == [Medium("video", f"{tmp_path}/{path}"), picture]
    train = {**row, "answer": "pour", "negative_answers": ["stir", "cut", "wash", "peel"]}
    example, _ = one(tmp_path, train)
    texts = [option[3:] for option in example.options]
    assert example.options[ord(example.answer) - ord("A")][3:] == "pour" and len(set(texts)) == 4
    assert (
        set(texts) - {"pour"} < {"stir", "cut", "wash", "peel"}
        and one(tmp_path, train)[0] == example
    )  # shuffled once and for all
    # The answer among them is drawn in some rows, and not in others.
    told = set()
    for number in range(12):
        wrong = ["stir", "cut", "wash", "peel", "boil", "pour"]
        row_with_it = {**train, "negative_answers": wrong, "sample_id": number}
        try:
            assert len(set(one(tmp_path, row_with_it)[0].options)) == 4
            told.add("")
        except DataError as error:
            told.add(str(error).rpartition(") ")[2])
    assert told == {"", "has its answer among its negative_answers"}
    empty = {f"choice_{name}": None for name in "abcd"}
    with pytest.raises(DataError, match="has an empty problem or option"):
        one(tmp_path, {**row, **empty, "golden_choice_idx": "B"})
    orders = {one(tmp_path, {**train, "sample_id": number})[0].answer for number in range(12)}
    assert len(orders) > 1
    image, path = one(tmp_path, {**train, "task_progress_metadata": []})
    assert image.media == [picture] and path == image.extra["path"] == "images/Ego4D/v.png"


def test_rows_of_video_r2(tmp_path):
    row = {
        "video": "v/abc.mp4",
        "temporal_grounding": {"00:10-00:14": "Red car passes the blue car."},
        "conversations": [
            {"from": "human", "value": "<video>\nWho wins?\nA. red\nB. blue"},
            {"from": "gpt", "value": "<think>At 00:12 red passes.</think><answer>A</answer>"},
        ],
    }
    example, path = one(tmp_path, row)
    assert (example.question, example.options, example.answer, path) == (
        "Who wins?",
        ["A. red", "B. blue"],
        "A",
        "v/abc.mp4",
    )
    assert example.reasoning == "At 00:12 red passes." and example.grounding == [
        (10, 14, "Red car passes the blue car.")
    ]
    assert one(tmp_path, {**row, "video": ["v/abc.mp4"]})[1] == "v/abc.mp4"
    for told, answer, kind in (
        ("(b)", "B", "multiple choice"),
        ("B.", "B", "multiple choice"),
        ("3.5", "3.5", "numerical"),
        ("red", "A", "multiple choice"),
        ("B. blue", "B", "multiple choice"),
        ("green", "green", "OCR"),
    ):
        turns = [
            row["conversations"][0],
            {"from": "gpt", "value": f"<think>.</think><answer>{told}</answer>"},
        ]
        assert (
            found := one(tmp_path, {**row, "conversations": turns})[0]
        ).answer == answer and found.problem_type == kind
    image, path = one(
        tmp_path, {**{key: value for key, value in row.items() if key != "video"}, "image": "p.png"}
    )
    assert (image.media_type, path) == ("image", "p.png")
    turns = [{"value": "<image><video>\n<image>Who?"}, row["conversations"][1]]
    several, _ = one(tmp_path, {**row, "image": ["p.png", "q.png"], "conversations": turns})
    names = ["p.png", "v/abc.mp4", "q.png"]
    assert [medium.path for medium in several.media] == [f"{tmp_path}/{name}" for name in names]
    assert several.question == "Who?"
    for change in (
        {"video": None},
        {"video": ["a.mp4", "b.mp4"]},
        {"conversations": row["conversations"][:1]},
        {"conversations": 3},
        {"conversations": [{"value": "<video><image>Who?"}, row["conversations"][1]]},
        {"conversations": [turns[0], {"value": "<think>He walks; <answer>A"}]},
    ):
        with pytest.raises(DataError, match="row 0"):
            one(tmp_path, {**row, **change})


def test_grounding_of_video_r2(tmp_path, caplog):
    turns = [{"value": "<video>\nWho wins?"}, {"value": "<think>.</think><answer>3</answer>"}]
    row = {"video": "a.mp4", "conversations": turns}
    spans = {
        "00:10–00:14": "en dash",
        "01:00 to 01:02": "to",
        "00:20 - 00:21": "spaces",
        "00:30": "point",
        "00:40-00:41": None,
    }
    read = [
        (10, 14, "en dash"),
        (60, 62, "to"),
        (20, 21, "spaces"),
        (30, 30, "point"),
    ]
    for grounding in (spans, json.dumps(spans)):
        caplog.clear()
        example, _ = one(tmp_path, {**row, "temporal_grounding": grounding})
        assert example.grounding == read
        assert "1 sentences of grounding are null and left out" in caplog.text
    for grounding in ("soon", {"soon": "x"}, {"00:01-00:02-00:03": "x"}, [3]):
        with pytest.raises(DataError, match="grounding must be"):
            one(tmp_path, {**row, "temporal_grounding": grounding})


def test_fields_that_no_prompt_shows_are_named_once(tmp_path, caplog, monkeypatch):
    rows = [{**ROW, "problem_id": index, "subtitle": "Hello." * index} for index in range(3)]
    file = write_dataset(tmp_path, rows)
    load_examples(file)
    (record,) = caplog.records
    assert record.getMessage() == f"{file}: 2 rows have subtitle, which no prompt shows"
    # Times of what has none, and the rate of a file, which has its own.
    caplog.clear()
    span = {"start": 1.0, "end": 2.5, "fps": 3}
    part = {"data_type": "image", "path": "a.png", "start": 1}
    rows = [
        {**ROW, **span, "problem_id": 0, "data_type": "image"},
        {**ROW, **span, "problem_id": 1, "data_type": "text"},
        {**ROW, **span, "problem_id": 2},
        {**ROW, "problem_id": 3, "media": [part]},
        {**ROW, "problem_id": 4, "start": None, "end": float("nan"), "fps": ""},
    ]
    examples = load_examples(write_dataset(tmp_path, rows))
    counts = {"path": 2, "start": 3, "end": 2, "fps": 3}  # of a text, and beside media
    told = {f"rows have {name}, which no prompt shows": n for name, n in counts.items()}
    assert differences(examples) == told
    assert len(caplog.records) == 4
    # One of the ranks tells.
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    load_examples(file)
    assert not caplog.records


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("A", "multiple choice"),
        ("A. a red car", "multiple choice"),
        ("(b)", "multiple choice"),
        ("C.", "multiple choice"),
        ("blue car", "OCR"),
        ("42", "numerical"),
        ("-1,200.5", "numerical"),
        ("0.12345", "regression"),
        ("a man walks over to the table", "free-form"),
    ],
)
def test_answer_type(answer, expected):
    assert answer_type(answer) == expected


def test_tags_and_times():
    assert strip_tag("a <think>b\nc </think> d", "think") == "b\nc"
    assert strip_tag(" no tag ", "think") == "no tag"
    assert [parse_time(text) for text in ("00:04", "1:02", "01:00:03", " 00:07.5 ", "9")] == [
        4,
        62,
        3603,
        7.5,
        9,
    ]


# ------------------------------------------------------------ prompts


EXAMPLE = Example(
    id="1",
    question="What moves?",
    options=["A. a ball", "B. a car"],
    problem_type="multiple choice",
    answer="A",
    media=[],
    reasoning="It rolls.",
)


def test_prompt_has_question_options_each_on_a_line_and_instruction():
    assert build_prompt(EXAMPLE).split("\n") == [
        "What moves?",
        "Options:",
        "A. a ball",
        "B. a car",
        INSTRUCTIONS["multiple choice"],
    ]
    assert build_prompt(replace(EXAMPLE, options=[], problem_type="OCR")).split("\n") == [
        "What moves?",
        INSTRUCTIONS["OCR"],
    ]
    assert set(INSTRUCTIONS) == {*PROBLEM_TYPES, "several letters"}


def test_prompt_template_replaces_the_wording():
    assert (
        build_prompt(replace(EXAMPLE, options=[]), "Q: {question} [{instruction}]")
        == f"Q: What moves? [{INSTRUCTIONS['multiple choice']}]"
    )
    braces = replace(EXAMPLE, question="What is {x} in {0}?", options=[])
    assert build_prompt(braces, "{question}") == "What is {x} in {0}?"


def test_a_template_places_options_and_has_a_text_for_each_type(tmp_path):
    file = tmp_path / "wording.json"
    texts = {kind: "{question} in words" for kind in INSTRUCTIONS}
    texts["multiple choice"] = "{question}Options:\n{options}\n Which letter?"
    file.write_text(json.dumps(texts))
    template = read_template(file)
    assert template == texts
    prompt = "What moves?Options:\nA. a ball\nB. a car\n Which letter?"
    assert build_prompt(EXAMPLE, template) == prompt
    words = replace(EXAMPLE, problem_type="OCR", options=[])
    assert build_prompt(words, template) == "What moves? in words"
    several = replace(EXAMPLE, extra={"multi_answer": True})
    assert build_prompt(several, template) == (
        "What moves?\nOptions:\nA. a ball\nB. a car in words"
    )
    file = tmp_path / "wording.txt"
    file.write_text("{options}|{question}")
    assert build_prompt(EXAMPLE, read_template(file)) == "A. a ball\nB. a car|What moves?"
    del texts["OCR"]
    for name, text, message in (
        ("a.json", json.dumps(texts), "a.json lacks the problem type OCR"),
        ("b.json", "[3", "b.json is not UTF-8, or not a JSON object"),
        ("c.txt", "{question} {solution}", "no other braces"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=message):
            read_template(tmp_path / name)


def test_chat_parts(toy_processor):
    text = "".join(chat_parts(toy_processor, replace(EXAMPLE, media=[Medium("video", "v.mp4")])))
    assert text == (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
        + build_prompt(EXAMPLE)
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "\nA. a ball\nB. a car\n" in text
    assert (
        "<|image_pad|>"
        in chat_parts(toy_processor, replace(EXAMPLE, media=[Medium("image", "i.png")]))[0]
    )
    assert "<|vision_start|>" not in chat_parts(toy_processor, EXAMPLE)[0]
    assert "".join(chat_parts(toy_processor, EXAMPLE, "<{question}>")).startswith(
        "<|im_start|>user\n<What moves?"
    )


def test_target_text():
    assert target_text(EXAMPLE) == "<think>It rolls.</think><answer>A</answer>"


# ------------------------------------------------------------ question-answer inversion


@pytest.mark.parametrize(
    ("question", "negated"),
    [
        ("What will the man do next?", "What won't the man do next?"),
        (
            "Which of the following will happen if the cube is removed?",
            "Which of the following won't happen if the cube is removed?",
        ),
        ("Which of these objects is red?", "Which of these objects isn't red?"),
        ("In the video, which ball is red?", "In the video, which ball isn't red?"),
        (
            "What color are the balls in the striped scene?",
            "What color aren't the balls in the striped scene?",
        ),
        ("Who was running?", "Who wasn't running?"),
        ("Who were they?", "Who weren't they?"),
        ("Who would win?", "Who wouldn't win?"),
        ("Where does the boy who was hit go?", "Where doesn't the boy who was hit go?"),
        ("What do people eat?", "What don't people eat?"),
        ("What colour would it take", "What colour wouldn't it take"),
        ("When did it rain?", "When didn't it rain?"),
        ("WHAT WAS IT?", "WHAT WASn't IT?"),
        ("A man walks. What does he do?", "A man walks. What doesn't he do?"),
        (
            "When the ball has stopped, what does he do?",
            "When the ball has stopped, what doesn't he do?",
        ),
    ],
)
def test_the_auxiliary_is_negated(question, negated):
    assert negate_question(question) == negated


@pytest.mark.parametrize(
    "question",
    [
        "Why did the man fall?",
        "How is she feeling?",
        "How many balls are there?",  # negated, these ask for something else
        "Is the man running?",
        "Did it rain?",  # "Isn't he running?" expects a yes
        "What falls first?",
        "What happens after the man has left?",
        "Who moved the ball the man has?",
        "Name the colour of the ball.",
        "Who did the dishes?",
        "Which team did better?",
        "Which person does a handstand?",
        "Who has the ball?",  # full verbs
        "What made the baby do that?",
        "What made the man think he was late?",
        "Which fell because it was hit?",
        "Which can did the person open?",
        "What type of will does the man have?",
        "Which must be true?",
        "What should the driver do?",
        "What could it be?",
        "Who can fly?",
        "What do you think he feels?",  # a ban, an impossibility, a thought
        "What is the man doing and what is the woman doing?",
        "Which ball is red or is it blue?",
        "Where is it but how?",
        "Which of the balls that are red will fall?",
        "What happens is odd?",
        "What moved is red?",  # the first auxiliary is a clause's
        "What caused the ball, which is red, to fall?",
        "The video shows a girl, who is dancing. What color is her dress?",
        "A man enters a room, which is dark. What does he do?",
        "In the triangle shown, which is drawn to scale, what is the angle A?",
        "In the room, which is dark, does he sit?",
        "In the first scene, where is the cat? And in the second, where is it?",
    ],
)
def test_other_questions_are_asked_for_a_wrong_answer(question):
    assert negate_question(question) == ASK_FOR_WRONG + question


@pytest.mark.parametrize(
    "word",
    [
        "not",
        "cannot",
        "never",
        "no",
        "none",
        "neither",
        "nor",
        "nobody",
        "nothing",
        "except",
        "false",
        "wrong",
        "incorrect",
        "unlikely",
        "didn't",
        "isn’t",
        "Not",
    ],
)
def test_a_negated_question_is_left_out(word):
    assert negate_question(f"Which ball is {word} red?") is None
    assert negate_question(f"Which ball is x{word}y red?") is not None


CHOICE = Example(
    "q",
    "What will he do next?",
    ["A. sit", "B. (stand) up", "C. run", "D. sleep"],
    "multiple choice",
    "B",
    [Medium("video", "/a.mp4")],
    reasoning="He stands.",
    evidence=[(1.0, 2.0)],
    extra={"path": "a.mp4"},
)


def test_inversion_exchanges_right_and_wrong():
    counts = set()
    for seed in range(40):
        new = invert_question(CHOICE, random.Random(seed))
        assert (new.id, new.media, new.evidence, new.extra["path"]) == (
            "q",
            [Medium("video", "/a.mp4")],
            [(1.0, 2.0)],
            "a.mp4",
        )
        assert (
            new.question == "What won't he do next?"
            and new.extra["inverted_from"] == CHOICE.question
            and new.reasoning == ""
        )
        letters, texts = zip(*(option.split(". ", 1) for option in new.options), strict=True)
        assert list(letters) == ["A", "B", "C", "D"][: len(letters)]
        right = new.answer.split(",")
        assert [
            letter for letter, text in zip(letters, texts, strict=True) if text != "(stand) up"
        ] == right  # all but the old right one
        assert "(stand) up" in texts and set(texts) <= {"sit", "(stand) up", "run", "sleep"}
        counts.add((len(right), texts.index("(stand) up")))
        assert INSTRUCTIONS["several letters"] in build_prompt(new) and INSTRUCTIONS[
            "multiple choice"
        ] in build_prompt(CHOICE)
    assert counts == {
        (right, place) for right in (1, 2, 3) for place in range(right + 1)
    }  # 1 to 3 right ones; the wrong one anywhere
    assert invert_question(CHOICE, random.Random(3)) == invert_question(CHOICE, random.Random(3))
    assert (CHOICE.answer, CHOICE.reasoning) == ("B", "He stands.")


@pytest.mark.parametrize(
    "change",
    [
        {"question": "What will he not do?"},
        {"problem_type": "numerical"},
        {"options": []},
        {"answer": "A,C"},
        {"answer": "E"},
        {"options": ["sit", "stand", "run"]},
        {"options": ["A. sit", "B. Sit"]},
        {"options": ["B. sit"]},
        {"question": "Which is right? A. sit B. stand"},
        {"question": "(A) sit or (B) stand?"},
        *(
            {"options": ["A. sit", f"B. {text}"]}
            for text in (
                "both of them",
                "none of the above",
                "neither",
                "all",
                "any",
                "each of them",
                "everything",
                "nothing",
                "nobody",
                "either",
                "only A",
                "the following",
                "option A",
                "choice A",
                "the least",
                "the most",
                "more than 2",
                "less",
                "fewer",
                "A and B",
                "A or B",
                "A, B",
                "A & B",
                "A/B",
                "B",
                "it cannot be said",
                "can't tell",
                "not enough",
                "insufficient information",
                "unknown",
                "Unclear",
                "undetermined",
                "uncertain",
            )
        ),
    ],
)
def test_what_cannot_be_inverted(change):
    assert invert_question(replace(CHOICE, answer="A"), random.Random(0)) is not None
    assert invert_question(replace(CHOICE, **{"answer": "A", **change}), random.Random(0)) is None


def test_a_file_of_several_answers_says_so_in_every_prompt(tmp_path):
    rows = [
        {
            "problem_id": index,
            "problem": "What happens?\nA. a\nB. b",
            "solution": f"<answer>{answer}</answer>",
            "video": "/x.mp4",
        }
        for index, answer in enumerate(("A", "A,B"))
    ]  # TW-GRPO's
    for example in load_examples(write_dataset(tmp_path, rows), tmp_path):
        assert INSTRUCTIONS["several letters"] in build_prompt(
            example
        )  # not a hint that this one has a single answer
    (single,) = load_examples(write_dataset(tmp_path, rows[:1]), tmp_path)
    assert INSTRUCTIONS["multiple choice"] in build_prompt(single)
    words = {
        **ROW,
        "problem_id": 8,
        "problem_type": "free-form",
        "solution": "A, B",
    }  # no letters of options
    assert not any(
        "multi_answer" in example.extra
        for example in load_examples(write_dataset(tmp_path, [ROW, words]), tmp_path)
    )
