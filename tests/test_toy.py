"""toy.py: what a question asks, where its evidence lies and what a demonstration looks at are checked against the planned video."""

import json
import random
import re
import sys
from dataclasses import asdict

import numpy as np
import pytest

import reward
import toy

KINDS = ("colour", "count", "order")


def question(kind, seed, biased, dense_share=1.0):
    scenes = toy.plan_video(np.random.default_rng(seed))
    return scenes, toy.make_question(kind, scenes, random.Random(seed), biased, dense_share)


def scene_at(scenes, evidence):
    return next(scene for scene in scenes if [scene["start"], scene["end"]] == evidence[0])


@pytest.mark.parametrize("seed", range(30))
def test_a_plan_is_four_scenes_that_fill_the_video(seed):
    scenes = toy.plan_video(np.random.default_rng(seed))
    assert scenes[0]["start"] == 0 and scenes[-1]["end"] == toy.SECONDS
    assert all(a["end"] == b["start"] for a, b in zip(scenes, scenes[1:], strict=False))
    assert sorted(scene["end"] - scene["start"] for scene in scenes) == [2, 2, 4, 8]
    assert (
        len({scene["colour"] for scene in scenes})
        == len({scene["texture"] for scene in scenes})
        == 4
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_the_evidence_is_the_scene_that_answers(kind, seed):
    scenes, row = question(kind, seed, biased=False)
    scene, answer = scene_at(scenes, row["evidence"]), reward.extract_answer(row["solution"])
    starts = {s["texture"]: s["start"] for s in scenes}
    named = [word for word in re.findall(r"\w+", row["problem"]) if word in starts]
    assert (
        len(named) == (2 if kind == "order" else 1)
        and min(named, key=starts.get) == scene["texture"]
    )
    if kind == "count":
        assert (
            answer == str(scene["balls"])
            and row["problem_type"] == "numerical"
            and row["options"] == []
        )
    else:
        assert row["problem_type"] == "multiple choice" and len(set(row["options"])) == 2
        (chosen,) = [option[3:] for option in row["options"] if option[0] == answer]
        assert chosen == scene["colour"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_a_demonstration_answers_what_it_looked_at(kind, biased, seed):
    scenes, row = question(kind, seed, biased)
    looked = next(
        s for s in scenes if s["texture"] == re.search(r"Look: (\w+)", row["process"]).group(1)
    )
    asked = scene_at(scenes, row["evidence"])
    length = looked["end"] - looked["start"]
    if not biased:
        assert looked == asked and row["told"] == reward.extract_answer(row["solution"])
    else:
        assert length == 8 and row["salient_is_asked"] == (asked == looked)
    told = (
        str(looked["balls"])
        if kind == "count"
        else next(o[0] for o in row["options"] if o[3:] == looked["colour"])
    )
    assert row["told"] == told
    for scene in scenes:  # listed rightly, whatever it looks at
        assert (
            f"{scene['start']}s {scene['texture']} {scene['colour']} {scene['balls']}."
            in row["process"]
        )


def test_a_focused_demonstration_lists_nothing():
    _, row = question("colour", 3, biased=True, dense_share=0.0)
    assert "same" not in row["process"] and "Look: " in row["process"]


def test_the_asked_scene_differs_from_the_salient_one_often_enough():
    """One of four scenes is asked for: the longest in a quarter. Of the longest and another one, the longest comes first in half."""
    share = {
        kind: np.mean(
            [question(kind, seed, biased=False)[1]["salient_is_asked"] for seed in range(2000)]
        )
        for kind in KINDS
    }
    assert share == pytest.approx({"colour": 1 / 4, "count": 1 / 4, "order": 1 / 2}, abs=0.04)


def test_a_cached_toy_of_other_settings_is_refused(tmp_path, monkeypatch, capsys):
    made = {**asdict(toy.ToyArguments(output_dir="elsewhere")), "version": toy.VERSION}
    (tmp_path / "toy.json").write_text(json.dumps(made))
    monkeypatch.setattr(sys, "argv", ["toy.py", "--output_dir", str(tmp_path)])
    toy.main()
    assert "toy found" in capsys.readouterr().out
    monkeypatch.setattr(
        sys, "argv", ["toy.py", "--output_dir", str(tmp_path), "--dense_share", "0.6"]
    )
    with pytest.raises(toy.DataError, match="another dense_share"):
        toy.main()


def test_letters_are_shuffled():
    letters = [
        reward.extract_answer(question("colour", seed, biased=False)[1]["solution"])
        for seed in range(400)
    ]
    assert letters.count("A") == pytest.approx(200, abs=45)
