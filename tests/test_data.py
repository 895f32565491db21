"""data.py: data set files and their errors, real videos and images written here, and the encoder with the toy's processor."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import reward
import train
from common import media
from common.data import (
    ASK_FOR_WRONG,
    INSTRUCTIONS,
    PROBLEM_TYPES,
    DataError,
    Example,
    MediaError,
    answer_type,
    build_prompt,
    chat_parts,
    invert_question,
    load_examples,
    negate_question,
    parse_example,
    parse_time,
    split_options,
    strip_tag,
    target_text,
)
from common.media import (
    Encoder,
    decode_frames,
    load_image,
    open_video,
    resize_frames,
    uniform_frames,
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


def write_video(path, count=20, fps=5, size=(64, 48), step=10):
    """Grey frames whose brightness says their index: 10, 20, 30, ..."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
    for index in range(count):
        writer.write(np.full((size[1], size[0], 3), 10 + step * index, np.uint8))
    writer.release()
    return str(path)


# ------------------------------------------------------------------------------------------------------ data set files


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
        media=str(tmp_path.resolve() / "videos/a.mp4"),
        media_type="video",
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
    assert examples[0].media == str(tmp_path.resolve() / "media/videos/a.mp4")


def test_json_lines_may_hold_unicode_line_separators(tmp_path):
    # U+2028, U+0085 and form feed are characters inside a JSON string; only a newline ends a JSON line
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
        # one option of "A. red": its letter as people write it, with or without its text, or the text alone
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
        # without options the letters may stand in the question; what else an answer can repeat stays
        ("B", [], "B"),
        ("(b)", None, "B"),
        ("A, C", [], "A,C"),
        ("Yes", [], "Yes"),
        ("5", [], "5"),
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
    assert text.media == "" and text.media_type == "text"


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
        ({"path": ["a.mp4"]}, "a path that is none"),
        ({"path": "a\0.mp4"}, "a path that is none"),
        (
            {"path": "a\ud800.mp4"},
            "a path that is none",
        ),  # a lone surrogate, which no file system has
        (
            {"solution": float("nan")},
            "has a solution that is neither text nor number: nan",
        ),  # as JSON's NaN is read
        ({"solution": float("inf")}, "has a solution that is neither text nor number: inf"),
        ({"solution": {"A": 1}}, "has a solution that is neither text nor number"),
        ({"solution": " "}, "has an empty solution"),
        ({"solution": "<answer> </answer>"}, "has an empty solution"),
        ({"problem": "What \udc80?"}, r"has no valid Unicode in problem \(a lone surrogate\)"),
        ({"options": ["A. x", "B. \ud83d"]}, "has no valid Unicode in options"),
        ({"process": "\ud83d", "solution": "\ud83d"}, "has no valid Unicode in process, solution"),
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


@pytest.mark.parametrize("row", [3, "text", None, ["a"]])
def test_a_row_that_is_no_object_is_named(tmp_path, row):
    with pytest.raises(DataError, match="row 1"):
        load_examples(write_dataset(tmp_path, [ROW, row]))


def test_a_neighbour_with_the_roots_name_as_prefix_is_outside(tmp_path):
    (tmp_path / "media").mkdir()
    with pytest.raises(DataError, match="outside"):
        parse_example({**ROW, "path": "../media2/a.mp4"}, 0, tmp_path / "media")


def test_a_link_out_of_the_root_is_outside(tmp_path):
    (tmp_path / "media").mkdir()
    (tmp_path / "secret.mp4").write_text("x")
    (tmp_path / "media/a.mp4").symlink_to(tmp_path / "secret.mp4")
    with pytest.raises(DataError, match="outside"):
        parse_example({**ROW, "path": "a.mp4"}, 0, tmp_path / "media")


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


# ----------------------------------------------------------------------------------- rows of other projects (shared/evaluation.md, 2)


def one(folder, row):
    [example] = load_examples(write_dataset(folder, [row]))
    return example, example.media.removeprefix(f"{folder.resolve()}/")


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
            "problem": "Which will not happen?\nA. The sphere hits\nB. The balls collide\nC. The cone exits",
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
    renamed, _ = one(tmp_path, {**row, "video": "/x.mp4", "problem_type": "numerical"})
    assert (renamed.id, renamed.problem_type, renamed.options) == (
        "7",
        "numerical",
        ["A. a ball", "B. a car"],
    )  # what the row says is kept


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
    assert (valid.media_type, path, valid.extra["current_observation"]) == (
        "video",
        "videos/Ego4D/v.mp4",
        "images/Ego4D/v.png",
    )
    train = {**row, "answer": "pour", "negative_answers": ["stir", "cut", "wash", "peel"]}
    example, _ = one(tmp_path, train)
    texts = [option[3:] for option in example.options]
    assert example.options[ord(example.answer) - ord("A")][3:] == "pour" and len(set(texts)) == 4
    assert (
        set(texts) - {"pour"} < {"stir", "cut", "wash", "peel"}
        and one(tmp_path, train)[0] == example
    )  # shuffled once and for all
    orders = {one(tmp_path, {**train, "sample_id": number})[0].answer for number in range(12)}
    assert len(orders) > 1
    image, path = one(tmp_path, {**train, "task_progress_metadata": []})
    assert (image.media_type, path) == ("image", "images/Ego4D/v.png")


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
        ("red", "red", "OCR"),
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
    for change in (
        {"video": ["a.mp4", "b.mp4"]},
        {"conversations": row["conversations"][:1]},
        {"conversations": 3},
    ):
        with pytest.raises(DataError, match="row 0"):
            one(tmp_path, {**row, **change})


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("A", "multiple choice"),
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


# --------------------------------------------------------------------------------------------------------------- media


def test_uniform_frames_by_hand():
    # linspace(0, 9, 4) = 0 3 6 9; linspace(0, 10, 4) = 0 3.33 6.67 10
    assert uniform_frames(10, 4) == [0, 3, 6, 9]
    assert uniform_frames(11, 4) == [0, 3, 7, 10]
    assert uniform_frames(3, 8) == [0, 1, 2]
    assert uniform_frames(5, 1) == [0]
    assert uniform_frames(64, 16)[-1] == 63


def test_decoded_frames_are_the_asked_ones(tmp_path):
    path = write_video(tmp_path / "a.mp4", count=20, fps=5)
    assert len(open_video(path)) == 20
    for indices in ([0, 7, 13, 19], [19, 3], [5]):
        frames, times = decode_frames(path, indices)
        assert frames.shape == (len(indices), 48, 64, 3) and frames.dtype == np.uint8
        assert np.abs(frames.mean((1, 2, 3)) - (10 + 10 * np.array(indices))).max() < 4
        np.testing.assert_allclose(times, np.array(indices) / 5, atol=1e-3)


def test_colours_are_rgb(tmp_path):
    writer = cv2.VideoWriter(
        str(tmp_path / "red.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (64, 48)
    )
    for _ in range(3):
        writer.write(np.full((48, 64, 3), (30, 60, 200), np.uint8))  # BGR
    writer.release()
    frame = decode_frames(str(tmp_path / "red.mp4"), [1])[0][0]
    assert np.abs(frame.mean((0, 1)) - (200, 60, 30)).max() < 8


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "holed", "folder"])
def test_an_undecodable_video_is_named(tmp_path, damage):
    path = tmp_path / f"{damage}.mp4"
    rng = np.random.default_rng(0)
    writer = cv2.VideoWriter(
        str(tmp_path / "noise.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (64, 48)
    )
    for _ in range(20):
        writer.write(rng.integers(0, 255, (48, 64, 3), np.uint8))
    writer.release()
    good = (tmp_path / "noise.mp4").read_bytes()
    third = len(good) // 3
    content = {
        "empty": b"",
        "text": b"this is no video\n" * 50,
        "truncated": good[: len(good) // 2],
        "holed": good[:third] + bytes(third) + good[2 * third :],
    }
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(content[damage])
    with pytest.raises(MediaError, match=f"{damage}.mp4") as caught:
        decode_frames(str(path), [0, 5, 10, 15, 19])
    assert "\n" not in str(caught.value) and ".cc:" not in str(caught.value), (
        "one clear sentence, no C++ source path"
    )


def test_an_index_beyond_the_video_is_named(tmp_path):
    path = write_video(tmp_path / "a.mp4", count=6)
    with pytest.raises(MediaError, match="a.mp4.*frames 0 to 6 asked for, the video has 0 to 5"):
        decode_frames(path, [0, 6])


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_load_image(tmp_path, mode):
    Image.new("RGB", (30, 20), (200, 60, 20)).convert(mode).save(tmp_path / "a.png")
    image = load_image(str(tmp_path / "a.png"))
    assert image.shape == (1, 20, 30, 3) and image.dtype == np.uint8
    if mode in ("RGB", "RGBA"):
        assert (image == (200, 60, 20)).all()


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated"])
def test_an_undecodable_image_is_named(tmp_path, damage):
    path = tmp_path / f"{damage}.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(
        tmp_path / "good.png"
    )
    good = (tmp_path / "good.png").read_bytes()
    if damage != "missing":
        path.write_bytes(
            {"empty": b"", "text": b"no image", "truncated": good[: len(good) // 2]}[damage]
        )
    with pytest.raises(MediaError, match=f"{damage}.png"):
        load_image(str(path))


def test_resize_frames_by_hand():
    frames = np.full((2, 100, 200, 3), 77, np.uint8)
    # 100x200 -> multiples of 28: 112x196 = 21952 px, within the limits
    assert resize_frames(frames, 28 * 28, 10**6).shape == (2, 3, 112, 196)
    # at most 10 * 784 px = 7840: shrink by sqrt(20000 / 7840) = 1.597 -> 62.6 x 125.2, floored to 56 x 112
    assert resize_frames(frames, 28 * 28, 10 * 784).shape == (2, 3, 56, 112)
    # at least 60 * 784 px = 47040: grow by sqrt(47040 / 20000) = 1.534 -> 153.4 x 306.7, ceiled to 168 x 308
    assert resize_frames(frames, 60 * 784, 10**6).shape == (2, 3, 168, 308)
    resized = resize_frames(frames, 28 * 28, 10**6)
    assert resized.dtype == torch.uint8 and (resized == 77).all()


def test_resize_frames_keeps_places_and_channels():
    frames = np.zeros((1, 56, 56, 3), np.uint8)
    frames[0, :28, :, 0] = 255  # the upper half is red
    pixels = resize_frames(frames, 112 * 112, 112 * 112)[0].float()
    assert pixels.shape == (3, 112, 112)
    assert pixels[0, :50].min() > 240 and pixels[0, 62:].max() < 15 and pixels[1:].max() == 0


def test_an_image_that_cannot_be_resized_is_a_media_error(tmp_path, toy_processor):
    Image.new("RGB", (4000, 10)).save(
        tmp_path / "strip.png"
    )  # aspect 400; Qwen's smart_resize refuses over 200
    example = Example("1", "What?", [], "free-form", "x", str(tmp_path / "strip.png"), "image")
    with pytest.raises(MediaError, match="strip.png"):
        Encoder(toy_processor, 784, 4 * 784).encode(example)


# ------------------------------------------------------------------------------------------------------------- prompts


def example_of(**change):
    return Example(
        **{
            **dict(
                id="1",
                question="What moves?",
                options=["A. a ball", "B. a car"],
                problem_type="multiple choice",
                answer="A",
                media="",
                media_type="text",
                reasoning="It rolls.",
            ),
            **change,
        }
    )


def test_prompt_has_question_options_each_on_a_line_and_instruction():
    assert build_prompt(example_of()).split("\n") == [
        "What moves?",
        "Options:",
        "A. a ball",
        "B. a car",
        INSTRUCTIONS["multiple choice"],
    ]
    assert build_prompt(example_of(options=[], problem_type="OCR")).split("\n") == [
        "What moves?",
        INSTRUCTIONS["OCR"],
    ]
    assert set(INSTRUCTIONS) == {*PROBLEM_TYPES, "several letters"}


def test_prompt_template_replaces_the_wording():
    assert (
        build_prompt(example_of(options=[]), "Q: {question} [{instruction}]")
        == f"Q: What moves? [{INSTRUCTIONS['multiple choice']}]"
    )
    braces = example_of(question="What is {x} in {0}?", options=[])
    assert build_prompt(braces, "{question}") == "What is {x} in {0}?"


def test_chat_parts(toy_processor):
    text = "".join(chat_parts(toy_processor, example_of(media_type="video")))
    assert text == (
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
        + build_prompt(example_of())
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "\nA. a ball\nB. a car\n" in text
    assert "<|image_pad|>" in chat_parts(toy_processor, example_of(media_type="image"))[0]
    assert "<|vision_start|>" not in chat_parts(toy_processor, example_of())[0]
    assert "".join(chat_parts(toy_processor, example_of(), "<{question}>")).startswith(
        "<|im_start|>user\n<What moves?"
    )


def test_target_text():
    assert target_text(example_of()) == "<think>It rolls.</think><answer>A</answer>"


# ------------------------------------------------------------------------------------------------------------- encoder


def encoder_of(processor, **change):
    return Encoder(
        processor, **{**dict(min_pixels=56 * 56, max_pixels=56 * 56, frames=4), **change}
    )


def brightness(item, processor):
    """(frames,) 0-255 from the processor's normalised patches; a row of pixel_values is (channel 3, time 2, 14, 14)."""
    slots = int(item["grid_thw"][0])
    settings = processor.video_processor
    mean, std = (
        torch.tensor(values).view(1, 1, 3, 1)
        for values in (settings.image_mean, settings.image_std)
    )
    values = (
        item["pixel_values"].view(slots, -1, 3, 2, 14 * 14).mean(-1) * std + mean
    )  # (slots, patches, 3, 2)
    return (255 * values.mean((1, 2))).flatten()


@pytest.fixture
def video_example(tmp_path):
    return example_of(
        id="v",
        media=write_video(tmp_path / "v.mp4", count=20, fps=5, size=(56, 56)),
        media_type="video",
    )


@pytest.fixture
def image_example(tmp_path):
    Image.new("RGB", (56, 56), (200, 60, 20)).save(tmp_path / "i.png")
    return example_of(id="i", media=str(tmp_path / "i.png"), media_type="image")


def test_encode_video(video_example, toy_processor):
    item = encoder_of(toy_processor).encode(video_example)
    # frames 0 6 13 19 (linspace 0..19), brightness 10 + 10 i, 5 frames a second
    np.testing.assert_allclose(brightness(item, toy_processor), [10, 70, 140, 200], atol=4)
    np.testing.assert_allclose(item["times"], [0, 1.2, 2.6, 3.8], atol=1e-3)
    assert item["grid_thw"].tolist() == [2, 4, 4] and item["pixel_values"].shape == (
        32,
        3 * 2 * 14 * 14,
    )
    assert item["second_per_grid"] == pytest.approx(
        2 * 3.8 / 3
    )  # two frames a slot, 3 steps in 3.8 s
    ids = item["input_ids"].tolist()
    assert ids.count(toy_processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")) == 2 * 2 * 2
    text = "".join(chat_parts(toy_processor, video_example)).replace(
        "<|video_pad|>", "<|video_pad|>" * 8
    )
    assert ids == toy_processor.tokenizer(text).input_ids


def test_encode_uses_the_priors_frames(video_example, toy_processor):
    item = encoder_of(toy_processor).encode(
        video_example, {"frames": [2, 4, 10], "times": [0.4, 0.8, 2.0]}
    )
    np.testing.assert_allclose(
        brightness(item, toy_processor), [30, 50, 110, 110], atol=4
    )  # the last frame fills its slot
    assert len(item["times"]) == 3


def test_encode_image_and_text(image_example, toy_processor):
    encoder = encoder_of(toy_processor)
    item = encoder.encode(image_example)
    assert item["grid_thw"].tolist() == [1, 4, 4] and item["times"] == [0.0]
    assert (
        item["input_ids"]
        .tolist()
        .count(toy_processor.tokenizer.convert_tokens_to_ids("<|image_pad|>"))
        == 4
    )
    np.testing.assert_allclose(brightness(item, toy_processor), [(200 + 60 + 20) / 3] * 2, atol=2)
    text = encoder.encode(example_of())
    assert text["pixel_values"] is None and text["grid_thw"] is None and text["times"] == []
    assert (
        text["input_ids"].tolist()
        == toy_processor.tokenizer("".join(chat_parts(toy_processor, example_of()))).input_ids
    )


def test_cache_gives_the_same_and_reads_the_file_once(
    video_example, image_example, toy_processor, monkeypatch
):
    from common import media

    decoded = []
    original = media.decode_frames
    monkeypatch.setattr(
        media,
        "decode_frames",
        lambda path, indices: decoded.append(path) or original(path, indices),
    )
    encoder = encoder_of(toy_processor)
    for example in (video_example, image_example):
        first, second, fresh = (
            encoder.encode(example),
            encoder.encode(example),
            encoder_of(toy_processor).encode(example),
        )
        for name in ("input_ids", "pixel_values", "grid_thw"):
            assert torch.equal(first[name], second[name]) and torch.equal(first[name], fresh[name])
        assert first["times"] == second["times"] == fresh["times"]
        assert first["second_per_grid"] == second["second_per_grid"] == fresh["second_per_grid"]
    assert len(decoded) == 2  # one for the cache, one for the fresh encoder


def test_questions_of_one_video_share_its_frames_not_its_prompt(video_example, toy_processor):
    encoder, other = (
        encoder_of(toy_processor),
        example_of(**{**vars(video_example), "id": "w", "question": "What stands still?"}),
    )
    for _ in range(2):
        for example in (video_example, other):
            item = encoder.encode(example)
            assert (
                item["input_ids"].tolist()
                == encoder_of(toy_processor).encode(example)["input_ids"].tolist()
            )


def test_examples_of_two_files_may_share_an_id(video_example, toy_processor, tmp_path):
    """train.py encodes training and held-out questions with one encoder; rows without problem_id are '0', '1', ... in every file."""
    encoder = encoder_of(toy_processor)
    other = example_of(
        **{
            **vars(video_example),
            "question": "What stands still?",
            "media": write_video(tmp_path / "w.mp4", size=(56, 56)),
        }
    )
    for example, word in ((video_example, "moves"), (other, "still"), (video_example, "moves")):
        assert word in toy_processor.tokenizer.decode(encoder.encode(example)["input_ids"])


def bytes_held(entry):
    tensors = [
        value
        for value in [*entry.values(), *entry.get("seen", {}).values()]
        if torch.is_tensor(value)
    ]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_eviction_keeps_within_the_limit_and_stays_right(tmp_path, toy_processor):
    paths = [write_video(tmp_path / f"{i}.mp4", step=i + 1, size=(56, 56)) for i in range(3)]
    examples = [example_of(id=path, media=path, media_type="video") for path in paths]
    # a video: 4 frames of 3 x 56 x 56 = 37,632 bytes, and as float32 patches four times that: 188,160; two fit into 400 kB
    encoder = encoder_of(toy_processor, cache_gb=400e3 / 1e9)
    expected = [encoder_of(toy_processor).encode(example)["pixel_values"] for example in examples]
    for index in (0, 1, 2, 0, 2, 1):
        assert torch.equal(encoder.encode(examples[index])["pixel_values"], expected[index])
    assert len(encoder.media) == 2 and sum(map(bytes_held, encoder.media.values())) <= 400e3
    assert [path for path, _ in encoder.media] == [
        examples[2].media,
        examples[1].media,
    ]  # the one used longest ago left first


@pytest.mark.parametrize("kind", ["video", "image"])
def test_cache_counts_what_it_holds(video_example, image_example, toy_processor, kind):
    encoder = encoder_of(toy_processor)
    encoder.encode(video_example if kind == "video" else image_example)
    (entry,) = encoder.media.values()
    assert 0.99 * bytes_held(entry) <= encoder.media_bytes <= 1.5 * bytes_held(entry)


def test_shuffle_permutes_frames_and_leaves_the_rest(video_example, toy_processor):
    encoder, permutation = encoder_of(toy_processor), [2, 0, 3, 1]
    plain = encoder.encode(video_example)
    shuffled = encoder.encode(video_example, shuffle=permutation)
    np.testing.assert_allclose(brightness(shuffled, toy_processor), [140, 10, 200, 70], atol=4)
    assert (
        torch.equal(shuffled["input_ids"], plain["input_ids"])
        and shuffled["times"] == plain["times"]
    )
    assert (
        torch.equal(shuffled["grid_thw"], plain["grid_thw"])
        and shuffled["second_per_grid"] == plain["second_per_grid"]
    )
    np.testing.assert_allclose(
        brightness(encoder.encode(video_example), toy_processor), [10, 70, 140, 200], atol=4
    )  # cache untouched
    cold = encoder_of(toy_processor).encode(video_example, shuffle=permutation)
    assert torch.equal(cold["pixel_values"], shuffled["pixel_values"])


@pytest.mark.parametrize("warm", [False, True])
def test_a_prior_made_for_other_frames_is_an_error(video_example, toy_processor, warm):
    encoder = encoder_of(toy_processor)
    right = {"frames": [0, 6, 13, 19], "times": [0.0, 1.2, 2.6, 3.8]}
    wrong = {
        "frames": [0, 6, 13, 19],
        "times": [0.0, 2.4, 5.2, 7.6],
    }  # the same indices of a video with half the rate
    if warm:
        encoder.encode(video_example, right)
    with pytest.raises(DataError, match="v.mp4.*prior"):
        encoder.encode(video_example, wrong)


def test_a_prior_of_other_frames_than_the_cached_ones_is_an_error_or_decoded(
    video_example, toy_processor
):
    """The frames of a prior and the frames the model sees are the same by construction, in whatever order they are asked for."""
    encoder = encoder_of(toy_processor)
    encoder.encode(video_example)  # SFT encodes without priors: 0 6 13 19
    try:
        item = encoder.encode(
            video_example, {"frames": [1, 3, 5, 7], "times": [0.2, 0.6, 1.0, 1.4]}
        )
    except DataError:
        return
    np.testing.assert_allclose(item["times"], [0.2, 0.6, 1.0, 1.4], atol=1e-3)


def test_a_broken_video_is_not_cached(tmp_path, toy_processor):
    encoder = encoder_of(toy_processor)
    example = example_of(media=str(tmp_path / "late.mp4"), media_type="video")
    with pytest.raises(MediaError, match="late.mp4"):
        encoder.encode(example)
    write_video(tmp_path / "late.mp4")
    assert encoder.encode(example)["grid_thw"] is not None


# ------------------------------------------------------------------------------------------------- question-answer inversion


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
    "/a.mp4",
    "video",
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
            "/a.mp4",
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


def test_frame_times_are_told_as_text_or_drawn(toy_folder, toy_processor):
    example = next(
        example
        for example in load_examples(toy_folder / "train.json")
        if example.media_type == "video"
    )
    row = {"frames": [0, 30, 50], "times": [0.0, 7.5, 12.5]}
    none, text, drawn = (
        Encoder(toy_processor, 112 * 112, 112 * 112, frame_times=name)
        for name in ("none", "text", "drawn")
    )
    plain, told, seen = (encoder.encode(example, row) for encoder in (none, text, drawn))
    words = toy_processor.tokenizer.decode(told["input_ids"])
    assert "The frames were taken at 00:00, 00:07, 00:12.\n" + example.question in words
    assert torch.equal(told["pixel_values"], plain["pixel_values"]) and torch.equal(
        seen["input_ids"], plain["input_ids"]
    )
    assert not torch.equal(seen["pixel_values"], plain["pixel_values"])
    # a control's frames change places, the times on them do not
    entry = drawn.load(example, row)
    shuffled = drawn.encode(example, row, shuffle=[2, 0, 1])["pixel_values"]
    frames = media.draw_times(entry["frames"][[2, 0, 1]], row["times"])
    expected = none.process(example, "x<|vision_start|><|video_pad|><|vision_end|>", frames, entry)[
        "pixel_values"
    ]
    assert torch.equal(shuffled, expected)


def test_drawn_times_stand_in_the_corner_of_their_own_frame():
    frames = torch.full((2, 3, 200, 300), 90, dtype=torch.uint8)
    one, two = media.draw_times(frames, [5.0, 65.9])
    assert (
        media.clock(65.9) == "01:05"
        and media.clock(3599.9) == "59:59"
        and media.clock(6000) == "100:00"
    )
    assert (frames == 90).all() and not torch.equal(one, two)  # the input stays as it is
    for frame in (one, two):
        assert (
            frame[:, :40, :110].max() > 250
            and frame[:, :40, :110].min() == 0
            and (frame[:, :2, :2] == 0).all()
        )
        assert (frame[:, 40:] == 90).all() and (frame[:, :, 110:] == 90).all()


# ------------------------------------------------------------------------------------------------------- docs/own_data.md


def test_the_rows_of_the_page_are_a_data_set(tmp_path, toy_processor):
    page = (Path(__file__).parent.parent / "docs" / "own_data.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "data.json").write_text(block, encoding="utf-8")
    (tmp_path / "clips").mkdir()
    (tmp_path / "pictures").mkdir()
    write_video(tmp_path / "clips/kitchen.mp4")
    Image.new("RGB", (64, 48), "red").save(tmp_path / "pictures/sign.png")
    examples = load_examples(tmp_path / "data.json")
    assert {example.problem_type for example in examples} == set(PROBLEM_TYPES)
    assert {example.media_type for example in examples} == {"video", "image", "text"}
    answers = {example.id: example.answer for example in examples}
    assert (
        answers["choice"] == "B"
        and answers["bare options"] == "A"
        and answers["several letters"] == "A,B"
    )
    encoder = Encoder(toy_processor, 56 * 56, 56 * 56)
    for example in examples:
        assert train.unearnable(example) is None
        assert len(encoder.encode(example)["input_ids"])
