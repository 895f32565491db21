"""reward.py: every number below is derived by hand in the comment beside it."""

import doctest
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reward

ROOT = Path(__file__).resolve().parents[1]

PROBLEM_TYPES = ["multiple choice", "numerical", "regression", "OCR", "free-form"]
property_test = settings(deadline=None, max_examples=50, database=None)
unit = st.floats(0.0, 1.0)
# arbitrary unicode, and the same wrapped or mixed with the pieces our parsers react to
pieces = st.sampled_from(
    ["<think>", "</think>", "<answer>", "</answer>", "0:05", "-", " to ", "12 s", "nan", "A,"]
)
texts = st.one_of(
    st.text(), st.lists(st.one_of(st.text(max_size=5), pieces), max_size=12).map("".join)
)


def tagged(answer):
    return f"<think>because</think>\n<answer>{answer}</answer>"


def accuracy(answer, solution, problem_type):
    return reward.accuracy_reward(tagged(answer), solution, problem_type)


# ---- the file itself ----


def test_doctests():
    result = doctest.testmod(reward)
    assert result.failed == 0 and result.attempted >= 7


def test_copied_alone_it_imports_with_torch_only(tmp_path):
    shutil.copy(ROOT / "reward.py", tmp_path)
    code = f"""
import doctest, sys, torch
sys.path.insert(0, {str(tmp_path)!r})
before = set(sys.modules)
import reward
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
assert new - set(sys.stdlib_module_names) == {{"reward"}}, new
assert reward.__file__.startswith({str(tmp_path)!r})
others = {{"common", "prior", "grpo", "train", "toy", "rouge_score", "nltk", "transformers"}}
assert not others & set(sys.modules)
assert reward.accuracy_reward("<answer>B</answer>", "B", "multiple choice") == 1.0
result = doctest.testmod(reward)
assert result.attempted >= 7 and not result.failed, result
"""
    subprocess.run([sys.executable, "-I", "-B", "-c", code], cwd=tmp_path, check=True, timeout=120)


# ---- extraction ----


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> B\n</answer>", "B"),
        ("so <answer>A</answer><answer>B</answer>", "A"),  # the FIRST block
        (
            "</answer> so <answer>line 1\nline 2</answer>",
            "line 1\nline 2",
        ),  # a stray close tag before it; new lines
        (
            "<answer>one <answer>two</answer>",
            "one <answer>two",
        ),  # first open tag to first close tag after it
        ("<answer>never closed", ""),
        ("<ANSWER>B</ANSWER>", ""),  # tags are case-sensitive
        ("B", ""),
        ("", ""),
    ],
)
def test_extract_answer(text, answer):
    assert reward.extract_answer(text) == answer
    assert reward.extract_think(text.replace("answer>", "think>")) == answer.replace(
        "answer>", "think>"
    )


def test_solution_with_or_without_tags():
    assert reward.solution_answer("<answer> 4 </answer>") == reward.solution_answer(" 4\n") == "4"
    assert reward.solution_answer("<answer></answer>") == ""


# ---- accuracy ----


@pytest.mark.parametrize("solution", ["<answer>B</answer>", "B"])
def test_multiple_choice(solution):
    assert accuracy(" B ", solution, "multiple choice") == 1.0
    for wrong in ("A", "b", "B.", "(B)", "B. a cat", "A,B", ""):
        assert accuracy(wrong, solution, "multiple choice") == 0.0
    assert reward.accuracy_reward("B", solution, "multiple choice") == 0.0  # no answer block


def test_multiple_choice_with_several_letters():
    assert accuracy("C, A", "<answer>A,C</answer>", "multiple choice") == 1.0
    assert accuracy("C", "A, C", "multiple choice") == 0.5
    assert accuracy("B,C", "A,C", "multiple choice") == 0.0
    # a comma does not make letters: two parts, but words, so only the exact text is right
    assert accuracy("yes, it is", "yes, it is", "multiple choice") == 1.0
    for part, truth in (("yes", "yes, it is"), ("yes", "yes,no"), ("1", "1,2")):
        assert accuracy(part, truth, "multiple choice") == 0.0


@pytest.mark.parametrize(
    ("answer", "solution", "score"),
    [
        ("5", "5", 1.0),
        ("5", "5.0", 0.0),  # decimal rule: the truth has ".", the answer has not
        ("5.0", "5", 0.0),
        ("5.00", "5.0", 1.0),
        ("1,200", "1200", 0.0),  # "," counts as decimal for the rule
        ("1,200", "1,200", 1.0),
        (
            "1,200",
            "1200.0",
            1.0,
        ),  # both have one of the two, and the comma is removed before float()
        ("3.141", "3.14", 1.0),  # round(3.141, 2) = 3.14
        ("3.146", "3.14", 0.0),  # round(3.146, 2) = 3.15
        ("-2", "2", 0.0),
        ("5 cm", "5", 0.0),
        ("50%", "50", 0.0),
        ("nan", "nan", 0.0),
        ("inf", "inf", 0.0),
        ("1" * 400, "1" * 400, 0.0),  # beyond the largest float: inf
        ("", "5", 0.0),
        ("5", "five", 0.0),
    ],
)
def test_numerical(answer, solution, score):
    assert accuracy(answer, solution, "numerical") == score


@pytest.mark.parametrize(
    ("answer", "solution", "score"),
    [
        ("4", "4", 1.0),
        ("3", "4", 0.75),  # 1 - 1/4
        ("5", "4", 0.75),
        ("-3", "-4", 0.75),  # |-3 + 4| / |-4|
        ("10", "4", 0.0),  # 6/4 > 1
        ("1,000", "2000.0", 0.5),  # no decimal rule here; 1 - 1000/2000
        ("0", "0", 0.0),  # (0 + 1e-9) / (0 + 1e-9) = 1: the formula's blind spot
        ("nan", "4", 0.0),
        ("inf", "4", 0.0),
        ("-inf", "4", 0.0),
        ("4", "nan", 0.0),
        ("4", "inf", 0.0),
        ("4 m", "4", 0.0),
        ("", "4", 0.0),
    ],
)
def test_regression(answer, solution, score):
    assert accuracy(answer, solution, "regression") == pytest.approx(score, abs=1e-8)


@pytest.mark.parametrize(
    ("answer", "solution", "score"),
    [
        ("keep the door closed", "keep the door closed", 1.0),
        ("keep  the\ndoor closed", "keep the door closed", 1.0),  # any white space separates words
        ("keep a door closed", "keep the door closed", 0.75),  # 1 substitution / 4
        ("keep door closed", "keep the door closed", 0.75),  # 1 deletion / 4
        ("please keep the door closed", "keep the door closed", 0.75),  # 1 insertion / 4
        (
            "closed door the keep",
            "keep the door closed",
            0.0,
        ),  # all 4 substituted: nothing survives the reversal
        ("the keep door closed", "keep the door closed", 0.5),  # a swap is 2 edits / 4
        ("Keep the door closed", "keep the door closed", 0.75),  # case-sensitive
        ("exit a b", "exit", 0.0),  # 2 insertions / 1, clipped
        ("exit a", "exit", 0.0),  # 1 insertion / 1
        ("exit", "", 0.0),
    ],
)
def test_ocr(answer, solution, score):
    assert accuracy(answer, solution, "OCR") == pytest.approx(score)


def plain_edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, previous = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


words = st.lists(st.sampled_from("abc"), max_size=70)


@property_test
@given(words.filter(len), words)
def test_edit_distance_equals_the_textbook_table(reference, hypothesis):
    assert reward._edit_distance(reference, hypothesis) == plain_edit_distance(
        reference, hypothesis
    )


def test_free_form():
    assert accuracy("a cat sat on mats", "a cat sat on mats", "free-form") == pytest.approx(1.0)
    assert accuracy("dog", "a cat sat", "free-form") == 0.0
    # truth "the cat sat", answer "the cat ran".
    # Unigrams 2 of 3: F1 2/3. Bigrams 1 of 2: 1/2. LCS 2 of 3: 2/3.
    assert accuracy("the cat ran", "the cat sat", "free-form") == pytest.approx(
        (2 / 3 + 1 / 2 + 2 / 3) / 3
    )
    # stemmer: "jumping" and "jumps" both become "jump", so every n-gram agrees
    assert accuracy("dog jumping", "dog jumps", "free-form") == pytest.approx(1.0)
    # precision and recall differ: words P = 1, R = 1/2, F1 2/3;
    # bigrams P = 1, R = 1/3, F1 1/2; LCS as words
    assert accuracy("a b", "a b c d", "free-form") == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert accuracy("one", "one", "free-form") == pytest.approx(2 / 3)  # no bigram in one word


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_empty_answer_scores_0_even_against_an_empty_solution(problem_type):
    assert accuracy("", "<answer></answer>", problem_type) == 0.0


def test_unknown_problem_type_raises():
    for problem_type in ("multiple-choice", "ocr", ""):
        with pytest.raises(ValueError, match="unknown problem_type"):
            accuracy("B", "B", problem_type)
    with pytest.raises(ValueError, match="unknown problem_type"):
        reward.accuracy_reward(
            "no answer block", "B", "numeric"
        )  # an empty answer does not hide it


@pytest.mark.parametrize(
    ("answer", "solution", "score"),
    [
        ("A,C", "A,C", 1.0),
        ("C,A", "A,C", 1.0),
        ("A, C", "A,C", 1.0),
        ("A,A,C", "A,C", 1.0),
        ("A,C", "<answer>C, A</answer>", 1.0),
        ("A", "A,C", 1 / 2),
        ("A,C", "A,B,C", 2 / 3),
        ("A,A", "A,B,C", 1 / 3),  # repeats count once
        ("A,B", "A,C", 0.0),  # one wrong letter loses all
        ("A,B,C", "A,C", 0.0),
        ("AC", "A,C", 0.0),
        ("A.", "A,C", 0.0),
        ("A,", "A,C", 0.0),
        ("a", "A,C", 0.0),
        ("", "A,C", 0.0),
        ("", "", 0.0),
    ],
)
def test_multi_choice(answer, solution, score):
    assert reward.multi_choice_reward(answer, solution) == pytest.approx(score)


# ---- format, length, temporal ----


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("<think>a</think><answer>B</answer>", 1.0),
        ("\n <think>a\nb</think> \n\t<answer>B</answer>\n", 1.0),
        ("", 0.0),
        ("<answer>B</answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("<answer>B</answer><think>a</think>", 0.0),  # wrong order
        ("so <think>a</think><answer>B</answer>", 0.0),  # text before
        ("<think>a</think> so <answer>B</answer>", 0.0),  # text between
        ("<think>a</think><answer>B</answer>.", 0.0),  # text after
        ("<think>a</think><think>a</think><answer>B</answer>", 0.0),  # two think blocks
        ("<think>a</think><answer>B</answer><answer>B</answer>", 0.0),  # two answer blocks
        (
            "<think>a <answer>B</answer></think><answer>B</answer>",
            0.0,
        ),  # an answer inside the reasoning
        ("<think>a<answer></think></answer>", 0.0),  # one of each tag, crossed
        ("<think>a</think><answer>B", 0.0),
        ("<Think>a</Think><answer>B</answer>", 0.0),
    ],
)
def test_format(completion, score):
    assert reward.format_reward(completion) == score


@pytest.mark.parametrize(
    ("completion", "solution", "format_score", "accuracy_score", "read"),
    [
        ("<think>a</think><answer>B</answer>", "B", 1, 1, "B"),
        ("\n<think>a</think>\n<answer>B</answer> ", "B", 1, 1, "B"),
        ("So: <think>a</think><answer>B</answer>", "B", 0, 1, "B"),
        ("<think>a</think><answer>B</answer> Done.", "B", 0, 1, "B"),
        ("<think>a</think><answer>B</answer><answer>A</answer>", "B", 0, 1, "B"),
        ("<think>a</think><answer>A</answer><answer>B</answer>", "B", 0, 0, "A"),
        ("<think>a</think><answer>the <answer>B</answer></answer>", "B", 0, 0, "B"),
        ("<think><answer>A</answer></think><answer>B</answer>", "B", 0, 0, "B"),
        ("<think>a</think><Answer>B</Answer>", "B", 0, 0, "B"),
        ("<think>a</think><answer>B", "B", 0, 0, "B"),
        ("<think>a</think>B", "B", 0, 0, "B"),
        ("<think>a</think><answer>A,A</answer>", "A", 1, 0, "A,A"),
        ("<think>a</think><answer>C,A,A</answer>", "A,C", 1, 1, "C,A,A"),
        ("<think>a</think><answer>(B)</answer>", "B", 1, 0, "(B)"),
    ],
)
def test_the_table_of_docs_differences(completion, solution, format_score, accuracy_score, read):
    """What training is strict about, and what evaluation reads in the same text."""
    assert reward.format_reward(completion) == format_score
    assert reward.accuracy_reward(completion, solution, "multiple choice") == accuracy_score
    assert reward.split_output(completion)[1] == read


def test_length():
    assert [reward.length_reward(n, 1.0) for n in (319, 320, 400, 512, 513)] == [
        0.0,
        0.2,
        0.2,
        0.2,
        0.0,
    ]
    assert reward.length_reward(400, 0.1) == 0.0  # "correct" is strictly above 0.1
    assert reward.length_reward(400, 0.11) == 0.2
    assert reward.length_reward(5, 1.0, low=4, high=6, bonus=0.5) == 0.5


def test_temporal():
    assert reward.temporal_reward(1.0, 0.75, 0.5) == 0.3
    assert reward.temporal_reward(1.0, 0.5, 0.5) == 0.3  # as good as shuffled is enough at ratio 1
    assert reward.temporal_reward(1.0, 0.45, 0.5) == 0.0
    assert reward.temporal_reward(1.0, 0.45, 0.5, ratio=0.8) == 0.3  # 0.45 >= 0.8 * 0.5 = 0.4
    assert reward.temporal_reward(0.1, 0.75, 0.5) == 0.0  # "correct" is strictly above 0.1
    assert reward.temporal_reward(0.2, 0.75, 0.5, gamma=0.7) == 0.7


# ---- consensus frame reward ----


def test_pool_frames():
    states = torch.tensor(
        [[[1.0, -2.0], [3.0, -4.0]], [[0.0, 8.0], [2.0, 0.0]]], requires_grad=True
    )  # (K=2, M=2, D=2)
    assert reward.pool_frames(states).tolist() == [
        [3.0, -2.0],
        [2.0, 8.0],
    ]  # channel-wise, not the largest token
    assert reward.pool_frames(states, "mean").tolist() == [[2.0, -3.0], [1.0, 4.0]]
    assert not reward.pool_frames(states).requires_grad
    assert reward.pool_frames(states.bfloat16(), "mean").dtype == torch.float32
    with pytest.raises(ValueError, match="pooling"):
        reward.pool_frames(states, "median")


# Two response tokens along x and y, two frames along x and (x + y) / sqrt(2).
# The lengths must not matter.
RESPONSE = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
FRAMES = torch.tensor([[7.0, 0.0], [3.0, 3.0]])


def test_frame_use_mean_then_softmax():
    # cosines: token x (1, 0.70711), token y (0, 0.70711); mean S = (0.5, 0.70711)
    # softmax of two numbers = sigmoid of their difference: use of frame 2 = sigmoid(0.20711 / tau)
    for tau, default in ((0.1, True), (1.0, False)):
        use = (
            reward.frame_use(RESPONSE, FRAMES)
            if default
            else reward.frame_use(RESPONSE, FRAMES, tau=tau)
        )
        second = 1 / (
            1 + math.exp(-(math.sqrt(0.5) - 0.5) / tau)
        )  # tau 0.1: 0.88803, tau 1: 0.55159
        assert use.tolist() == pytest.approx([1 - second, second], abs=1e-6)


def test_frame_use_softmax_then_mean():
    # token x: sigmoid(-0.29289 / 0.5) = 0.35761 on frame 2; token y: sigmoid(0.70711 / 0.5) =
    # 0.80441; mean 0.58101
    use = reward.frame_use(RESPONSE, FRAMES, tau=0.5, order="softmax_mean")
    assert use.tolist() == pytest.approx([0.41899, 0.58101], abs=1e-5)


def test_frame_use_reads_states_and_differentiates_nothing():
    use = reward.frame_use(RESPONSE.clone().requires_grad_(), FRAMES.bfloat16())
    assert not use.requires_grad and use.dtype == torch.float32
    with pytest.raises(ValueError, match="no response tokens"):
        reward.frame_use(torch.zeros(0, 2), FRAMES)
    with pytest.raises(ValueError, match="order"):
        reward.frame_use(RESPONSE, FRAMES, order="softmax")


def test_attention_use():
    # 1 head, 2 tokens, K = 2 frames of M = 2 visual tokens. Frame masses: token 1 (0.3, 0.1),
    # token 2 (0.0, 0.2). Sum (0.3, 0.3), so (0.5, 0.5); normalising each token first would give
    # ((0.75 + 0) / 2, ...) = (0.375, 0.625).
    weights = torch.tensor([[[[0.1, 0.2], [0.05, 0.05]], [[0.0, 0.0], [0.2, 0.0]]]])
    assert reward.attention_use(weights).tolist() == pytest.approx([0.5, 0.5])
    # a second head that looks at frame 2 only, with mass 0.6: (0.3, 0.9) / 1.2
    both = torch.cat(
        [weights, torch.tensor([[[[0.0, 0.0], [0.0, 0.3]], [[0.0, 0.0], [0.3, 0.0]]]])]
    ).requires_grad_()
    use = reward.attention_use(both)
    assert use.tolist() == pytest.approx([0.25, 0.75]) and not use.requires_grad


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_attention_use_refuses_no_mass(value):
    with pytest.raises(ValueError, match="no attention"):
        reward.attention_use(torch.full((1, 2, 2, 2), value))


def test_merge_prior():
    prior = torch.arange(1, 17, dtype=torch.float64) / 136  # 1 + ... + 16 = 136
    merged = reward.merge_prior(prior, 8)  # pairs 1+2, 3+4, ...
    assert merged.dtype == torch.float32
    assert (merged * 136).tolist() == pytest.approx([3, 7, 11, 15, 19, 23, 27, 31], abs=1e-4)
    assert reward.merge_prior(prior, 16).tolist() == pytest.approx(prior.tolist())
    # 5 frames, patch 2: the processor repeats frame 5, and slot 3 holds it alone
    assert reward.merge_prior(torch.tensor([0.1, 0.2, 0.3, 0.1, 0.3]), 3).tolist() == pytest.approx(
        [0.3, 0.4, 0.3]
    )


@pytest.mark.parametrize(("frames", "slots"), [(16, 17), (16, 7), (5, 4), (4, 0), (4, -1), (0, 2)])
def test_merge_prior_refuses_another_video(frames, slots):
    # (16, 7): ceil(16/7) = 3 frames a slot would make 6 slots; (5, 4): 2 a slot would make 3
    with pytest.raises(ValueError, match="do not describe the same frames"):
        reward.merge_prior(torch.ones(frames), slots)


def test_consensus_frame_reward():
    prior, use = torch.tensor([0.1, 0.2, 0.7]), torch.tensor([0.5, 0.25, 0.25])
    # 0.05 + 0.05 + 0.175
    assert reward.consensus_frame_reward(prior, use) == pytest.approx(0.275)
    assert reward.consensus_frame_reward(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])) == 1.0
    assert reward.consensus_frame_reward(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 0.0
    with pytest.raises(ValueError, match="merge_prior"):
        reward.consensus_frame_reward(torch.full((16,), 1 / 16), torch.full((8,), 1 / 8))
    with pytest.raises(ValueError, match="merge_prior"):
        reward.consensus_frame_reward(prior[None], use[None])


@pytest.mark.parametrize("bad", [[0.5, 0.6], [1.5, -0.5], [math.nan, 1.0], [0.0, 0.0]])
def test_consensus_frame_reward_refuses_what_is_no_distribution(bad):
    good = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="prior is not a probability"):
        reward.consensus_frame_reward(torch.tensor(bad), good)
    with pytest.raises(ValueError, match="use is not a probability"):
        reward.consensus_frame_reward(good, torch.tensor(bad))


def test_gate():
    assert [reward.gate(a) for a in (-1.0, 0.0, 0.4, 1.0, 2.0)] == [0.0, 0.0, 0.4, 1.0, 1.0]
    assert [reward.gate(a, "hard") for a in (0.0, 0.01, 0.011, 1.0)] == [0.0, 0.0, 1.0, 1.0]
    assert reward.gate(0.0, "none") == 1.0
    with pytest.raises(ValueError, match="gate"):
        reward.gate(1.0, "firm")
    group = torch.tensor([-1.0, 0.0, 0.4, 1.0, 2.0], dtype=torch.float64)
    for how in ("soft", "hard"):
        floats = [reward.gate(a, how) for a in group.tolist()]
        assert reward.gate(group, how).tolist() == floats


def test_total_reward():
    # 0.5 + 1.2 + 3 * 0.5 * 0.4 + 0.3 = 2.6; hard: 3 * 1 * 0.4 = 1.2 -> 3.2;
    # weight 5: 5 * 0.5 * 0.4 = 1.0 -> 3.0
    assert reward.total_reward(0.5, 1.2, 0.4, 0.3) == pytest.approx(2.6)
    assert reward.total_reward(0.5, 1.2, 0.4, 0.3, how="hard") == pytest.approx(3.2)
    assert reward.total_reward(0.5, 1.2, 0.4, 0.3, weight=5.0) == pytest.approx(3.0)
    assert (
        reward.total_reward(0.0, 1.0, 0.4, 0.0) == 1.0
    )  # wrong: looking at the right frames earns nothing
    assert reward.total_reward(0.0, 1.0, 0.4, 0.0, how="none") == pytest.approx(2.2)
    terms = [(0.5, 1.2, 0.4, 0.3), (0.0, 1.0, 0.4, 0.0)]
    group = torch.tensor(terms, dtype=torch.float64).T  # (4, G)
    for how in ("soft", "hard", "none"):
        floats = [reward.total_reward(*rollout, how=how) for rollout in terms]
        assert reward.total_reward(*group, how=how).tolist() == floats


# ---- consistency bonus ----


def bonus(accuracies, likelihoods, **settings_):
    return reward.consistency_bonus(
        torch.tensor(accuracies), torch.tensor(likelihoods), **settings_
    ).tolist()


def test_consistency_bonus():
    # group mean 0.75, selected: the first three; their mean likelihood 0.6, baseline 0.59;
    # 0.9 and 0.6 reach it
    assert bonus([1.0, 1.0, 1.0, 0.0], [0.9, 0.6, 0.3, 0.99]) == [0.5, 0.5, 0.0, 0.0]
    # without margin the middle one sits exactly on the baseline and still counts;
    # margin -0.01 puts it below
    assert bonus([1.0, 1.0, 1.0, 0.0], [0.75, 0.5, 0.25, 0.99], margin=0.0) == [0.5, 0.5, 0.0, 0.0]
    assert bonus([1.0, 1.0, 1.0, 0.0], [0.75, 0.5, 0.25, 0.99], margin=-0.01) == [
        0.5,
        0.0,
        0.0,
        0.0,
    ]
    # in proportion to accuracy: mean 0.6, selected 0.6 and 1.0, likelihoods equal
    assert bonus([0.2, 0.6, 1.0], [0.5, 0.5, 0.5], coef=1.0) == pytest.approx([0.0, 0.6, 1.0])


def test_consistency_bonus_clips_likelihood():
    # clipped (0.95, 0.93), mean 0.94, baseline 0.93: both reach it;
    # unclipped mean 0.965, baseline 0.955: one does
    assert bonus([1.0, 1.0], [1.0, 0.93]) == [0.5, 0.5]
    assert bonus([1.0, 1.0], [1.0, 0.93], cap=1.0) == [0.5, 0.0]


def test_consistency_bonus_floor():
    assert bonus([0.05, 0.05], [0.5, 0.5]) == [
        0.0,
        0.0,
    ]  # at the group mean, but below the floor 0.1
    assert bonus([0.05, 0.05], [0.5, 0.5], floor=0.0) == pytest.approx([0.025, 0.025])
    assert bonus([0.1, 0.0], [0.5, 0.5]) == pytest.approx([0.05, 0.0])  # the floor itself is enough


def test_consistency_bonus_without_answer():
    nan = math.nan
    # the NaN is neither selected nor part of the baseline: mean of (0.8, 0.6) = 0.7, baseline 0.69
    assert bonus([1.0, 1.0, 1.0], [0.8, nan, 0.6]) == [0.5, 0.0, 0.0]
    assert bonus([1.0, 1.0], [nan, nan]) == [0.0, 0.0]
    assert bonus([0.0, 0.0], [0.9, 0.2]) == [0.0, 0.0]  # nothing selected
    assert bonus([1.0, 0.0], [nan, 0.9]) == [0.0, 0.0]


def test_consistency_bonus_of_equal_rollouts_survives_rounding():
    for n in range(1, 40):  # the float32 mean of n equal numbers may lie just above them
        for value in (0.1, 0.3, 0.7):
            assert bonus([value] * n, [value] * n, margin=0.0, floor=0.0) == pytest.approx(
                [0.5 * value] * n
            )


def test_consistency_bonus_differentiates_nothing():
    likelihood = torch.rand(2, dtype=torch.float64, requires_grad=True)
    out = reward.consistency_bonus(torch.ones(2, requires_grad=True), likelihood)
    assert not out.requires_grad and out.dtype == torch.float32


# ---- claims and temporal alignment ----


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ("At 00:12 the car stops.", [(12, 12, "the car stops")]),
        ("The car stops (0:12).", [(12, 12, "The car stops")]),
        ("The film at 1:02:03 ends", [(3723, 3723, "The film ends")]),  # 3600 + 2 * 60 + 3
        ("Around 1:02, a man waves", [(62, 62, "a man waves")]),
        ("00:10-00:14: Red car passes the blue car.", [(10, 14, "Red car passes the blue car")]),
        ("00:10 – 00:14 it rains", [(10, 14, "it rains")]),
        ("From 0:05 to 0:09 it rains", [(5, 9, "it rains")]),
        ("Between 0:05 and 0:09 it rains", [(5, 9, "it rains")]),
        ("From 0:09 to 0:05 it rains", [(5, 9, "it rains")]),  # ends swapped
        ("It rains from 5 to 9 seconds", [(5, 9, "It rains")]),
        ("It rains from 9 to 5 seconds", [(5, 9, "It rains")]),
        ("Between 5 and 9 seconds it rains", [(5, 9, "it rains")]),
        ("It rains at 12 s", [(12, 12, "It rains")]),
        ("It rains at 12s", [(12, 12, "It rains")]),
        ("It rains at 12.5 seconds", [(12.5, 12.5, "It rains")]),
        ("It rains at 3 seconds", [(3, 3, "It rains")]),
        ("It rains at the 3-second mark", [(3, 3, "It rains")]),
        ("5s-9s it rains", [(5, 9, "it rains")]),
        ("At second 12 it rains", [(12, 12, "it rains")]),
        ("From second 5 to 9 it rains", [(5, 9, "it rains")]),
        ("After 1 min 5 s it rains", [(65, 65, "After it rains")]),
        (
            "At 0:05 it rains. Later it snows! At 0:09 it ends?",
            [(5, 5, "it rains"), (9, 9, "it ends")],
        ),
        ("0:05 it rains\n0:09 it ends", [(5, 5, "it rains"), (9, 9, "it ends")]),
        ("First line\n0:09 it ends", [(9, 9, "it ends")]),
        # several times: each owns the text up to the next one...
        ("At 0:05 it rains and at 0:09 it ends", [(5, 5, "it rains"), (9, 9, "it ends")]),
        (
            "From 0:01 to 0:02 it rains, then at 4 s it ends",
            [(1, 2, "it rains"), (4, 4, "it ends")],
        ),
        # ... and the whole sentence where that is empty
        ("At 0:05 and 0:09 it rains", [(5, 5, "it rains"), (9, 9, "it rains")]),
        (
            "It rains at 0:05, 0:07 and 0:09",
            [(5, 5, "It rains"), (7, 7, "It rains"), (9, 9, "It rains")],
        ),
        # no times
        ("", []),
        ("It rains.", []),
        ("The second 2 cars, version 1.5, at 4:30 pm", []),
        ("At 0:75 it rains, at 1:02:75 it ends", []),  # no such second
        ("0:05", []),  # a time that claims nothing
    ],
)
def test_parse_claims(text, claims):
    assert reward.parse_claims(text) == claims
    assert all(type(t) is float for claim in reward.parse_claims(text) for t in claim[:2])


def test_lexical_similarity():
    assert reward.lexical_similarity("A red car.", "a RED car") == 1.0
    assert reward.lexical_similarity("a a b", "a b b") == pytest.approx(
        4 / 6
    )  # shared: one a, one b; 2 * 2 / (3 + 3)
    assert reward.lexical_similarity("red car", "dog") == 0.0
    assert reward.lexical_similarity("", "") == 0.0


def same(a, b):
    return float(a == b)


@pytest.mark.parametrize(
    ("predicted", "score"),
    [
        ([(10, 10, "rain")], 1.0),
        ([(14, 14, "rain")], 1.0),  # 10 + 2 touches 14 - 2
        ([(14.1, 14.1, "rain")], 0.0),
        ([(6, 6, "rain")], 1.0),  # and on the other side
        ([(5.9, 5.9, "rain")], 0.0),
        ([(0, 60, "rain")], 1.0),  # an interval around it
        ([(10, 10, "snow")], 0.0),
        ([(10, 10, "rain"), (10, 10, "rain")], 0.5),  # one-to-one
        ([(10, 10, "rain"), (30, 33, "wind"), (50, 50, "rain")], 2 / 3),
        ([], 0.0),
    ],
)
def test_temporal_alignment(predicted, score):
    reference = [(30, 30, "wind"), (10, 10, "rain")]
    assert reward.temporal_alignment_reward(predicted, reference, same) == pytest.approx(score)
    assert reward.temporal_alignment_reward(predicted, [], same) == 0.0


def test_temporal_alignment_buffer_and_threshold():
    def constant(a, b):
        return 0.75

    one = [(0, 0, "a")]
    assert (
        reward.temporal_alignment_reward(one, [(4, 4, "b")], constant) == 1.0
    )  # 0.75 itself is enough
    assert reward.temporal_alignment_reward(one, [(4, 4, "b")], constant, threshold=0.76) == 0.0
    assert reward.temporal_alignment_reward(one, [(4, 4, "b")], constant, buffer=1.9) == 0.0
    assert reward.temporal_alignment_reward(one, [(0, 0, "a")]) == 1.0  # words by default


def test_temporal_alignment_is_greedy_in_time_order_best_first():
    table = {("p", "x"): 0.8, ("p", "y"): 0.9, ("q", "x"): 0.0, ("q", "y"): 0.8}
    reference = [(0, 0, "x"), (1, 1, "y")]
    # p is first in time and takes y, its best; q finds only x left: 1 of 2
    # (an optimal assignment would give 2 of 2)
    first_p = [(1, 1, "q"), (0, 0, "p")]
    assert reward.temporal_alignment_reward(first_p, reference, lambda a, b: table[a, b]) == 0.5
    # q first takes y, p falls back to x: 2 of 2
    first_q = [(1, 1, "p"), (0, 0, "q")]
    assert reward.temporal_alignment_reward(first_q, reference, lambda a, b: table[a, b]) == 1.0


# ---- properties ----


@property_test
@given(texts, texts)
def test_any_text_is_scored_between_0_and_1(text, solution):
    for completion in (text, tagged(text)):
        for problem_type in PROBLEM_TYPES:
            assert 0.0 <= reward.accuracy_reward(completion, solution, problem_type) <= 1.0
        assert reward.format_reward(completion) in (0.0, 1.0)
        assert isinstance(reward.extract_answer(completion) + reward.extract_think(completion), str)
    assert 0.0 <= reward.multi_choice_reward(text, solution) <= 1.0
    assert 0.0 <= reward.lexical_similarity(text, solution) <= 1.0
    claims = reward.parse_claims(text)
    assert all(0 <= start <= end < math.inf and said for start, end, said in claims)
    assert 0.0 <= reward.temporal_alignment_reward(claims, reward.parse_claims(solution)) <= 1.0
    comparable = [
        claim for claim in claims if reward.lexical_similarity(claim[2], claim[2]) == 1.0
    ]  # has words
    assert reward.temporal_alignment_reward(comparable, comparable) == (1.0 if comparable else 0.0)


@property_test
@given(
    st.integers(0, 2**31),
    st.integers(1, 9),
    st.integers(1, 6),
    st.floats(0.02, 5.0),
    st.integers(1, 3),
)
def test_use_prior_and_reward_are_distributions_and_in_range(seed, frames, tokens, tau, patch):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(frames, 3, 4, generator=generator)
    response = torch.randn(tokens, 4, generator=generator)
    prior = torch.rand(frames, generator=generator) + 0.01
    prior = prior / prior.sum()
    uses = [reward.frame_use(response, reward.pool_frames(states, how), tau, order)
            for how in ("max", "mean") for order in ("mean_softmax", "softmax_mean")]  # fmt: skip
    uses.append(reward.attention_use(torch.rand(2, tokens, frames, 3, generator=generator) + 0.01))
    for use in uses:
        assert (
            use.shape == (frames,)
            and float(use.sum()) == pytest.approx(1.0, abs=1e-5)
            and (use >= 0).all()
        )
        assert 0.0 <= reward.consensus_frame_reward(prior, use) <= 1.0
    merged = reward.merge_prior(prior, math.ceil(frames / patch))
    assert float(merged.sum()) == pytest.approx(float(prior.sum()), abs=1e-6)
    # scaling the states changes no cosine
    assert torch.allclose(
        uses[0], reward.frame_use(3 * response, 7 * reward.pool_frames(states), tau), atol=1e-4
    )


@property_test
@given(unit, unit, st.sampled_from(["soft", "hard", "none"]))
def test_gate_is_monotone_and_in_range(a, b, how):
    low, high = sorted((a, b))
    assert 0.0 <= reward.gate(low, how) <= reward.gate(high, how) <= 1.0


sixteenths = st.integers(0, 16).map(lambda i: i / 16)
groups = st.lists(
    st.tuples(sixteenths, st.one_of(sixteenths, st.just(math.nan))), min_size=1, max_size=8
)


@property_test
@given(groups, st.randoms(use_true_random=False))
def test_permuting_a_group_permutes_its_bonuses(group, random):
    order = list(range(len(group)))
    random.shuffle(order)
    straight = bonus(*map(list, zip(*group, strict=True)))
    shuffled = bonus(*map(list, zip(*[group[i] for i in order], strict=True)))
    assert shuffled == pytest.approx([straight[i] for i in order])
    assert all(0.0 <= b <= 0.5 for b in straight)  # finite too: NaN compares as False
    assert all(
        b == 0.0
        for b, (_, likelihood) in zip(straight, group, strict=True)
        if math.isnan(likelihood)
    )


# ---- time: no text makes a reward slow ----

SIZE = 100_000
HOSTILE = {
    "open answer tags": "<answer>" * (SIZE // 8),
    "open think tags": "<think>" * (SIZE // 7),
    "both open tags": "<think><answer>" * (SIZE // 15),
    "open tags in an answer": "<answer>" + "<think>" * (SIZE // 7) + "</answer>",
}
ODD = {
    "digits": "1" * SIZE,
    "colons": "1:" * (SIZE // 2),
    "spaces": "1" + " " * SIZE,
    "lead words": "at " * (SIZE // 3),
    "times": "0:01 a " * (SIZE // 7),
    "bare times": "0:01 " * (SIZE // 5),
    "ranges": "5-" * (SIZE // 2),
    "brackets": "(" * (SIZE // 2) + ")" * (SIZE // 2),
    "sentences": ". " * (SIZE // 2),
    "connectives": "and " * (SIZE // 4) + "0:01",
}
TEXT_FUNCTIONS = {
    "extract_answer": reward.extract_answer,
    "extract_think": reward.extract_think,
    "split_output": reward.split_output,
    "format": reward.format_reward,
    "multi_choice": lambda text: reward.multi_choice_reward(text, "A,B"),
    "lexical": lambda text: reward.lexical_similarity(text, "a dog"),
    "claims": reward.parse_claims,
    **{
        t: lambda text, t=t: reward.accuracy_reward(text, "<answer>5 dogs</answer>", t)
        for t in PROBLEM_TYPES
    },
}


def fastest(function, argument, limit):
    """Smallest of three processor times in seconds; stops at the first one under the limit."""
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        function(argument)
        best = min(best, time.process_time() - start)
        if best < limit:
            break
    return best


@pytest.mark.parametrize("name", TEXT_FUNCTIONS)
def test_open_tags_cost_nothing(name):
    TEXT_FUNCTIONS[name]("<answer>warm up</answer>")  # the lazy import is not what is timed
    limit = 0.05
    for label, text in HOSTILE.items():
        if (name, label) == ("free-form", "open tags in an answer"):
            continue  # 14,000 words for rouge-score to tokenise and align: see the next test
        assert fastest(TEXT_FUNCTIONS[name], text, limit) < 1.5 * limit, (
            label
        )  # allowance: two shared cores


def test_long_texts_take_linear_time():
    limit = 0.5  # quadratic would take minutes
    for label, text in ODD.items():
        assert fastest(reward.parse_claims, text, limit) < limit, label
        for problem_type in ("multiple choice", "numerical", "regression", "OCR"):
            assert (
                fastest(TEXT_FUNCTIONS[problem_type], f"<answer>{text}</answer>", limit) < limit
            ), label
    assert fastest(TEXT_FUNCTIONS["free-form"], HOSTILE["open tags in an answer"], 2.0) < 2.0


def test_ocr_of_two_long_answers_ends():
    truth = " ".join("abc"[i * i % 3] for i in range(10_000))
    answer = " ".join("abc"[i * 7 % 3] for i in range(15_000))
    assert (
        fastest(lambda a: reward.ocr_reward(a, truth), answer, 2.0) < 2.0
    )  # the plain table has 150 million cells
    assert (
        fastest(lambda a: reward.ocr_reward(a, truth), answer * 2, 0.05) < 0.05
    )  # 3 x the words: 0 without aligning
    assert reward.ocr_reward(answer * 2, truth) == 0.0
