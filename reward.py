# SPDX-License-Identifier: Apache-2.0
"""Rewards for reinforcement learning on video question answering, each one a pure function.

This file stands alone: copy it into your repository. It needs torch; only accuracy_reward(..., "free-form") also needs rouge-score.
Text in, float out; tensors in, float32 tensors or floats out; nothing is differentiated through. Adapters for trainers are at the end.

    from reward import accuracy_reward, consensus_frame_reward, format_reward, frame_use, merge_prior, pool_frames, total_reward
    accuracy = accuracy_reward(completion, "<answer>B</answer>", "multiple choice")
    use = frame_use(response_states, pool_frames(visual_states))               # (L, D), (t, M, D) -> (t,)
    consensus = consensus_frame_reward(merge_prior(prior, len(use)), use)      # prior (K,): where experts look
    reward = total_reward(accuracy, format_reward(completion), consensus, temporal=0.0)

What to cite for which function:
    VideoCFR / CF-GRPO, arXiv 2606.18441: pool_frames, frame_use (Eq. 3-5), merge_prior, consensus_frame_reward (Eq. 6), gate,
        total_reward (Eq. 7). attention_use is this project's own counterpart of Eq. 3-5.
    Video-R1 / T-GRPO, arXiv 2503.21776: accuracy_reward, format_reward, length_reward, temporal_reward.
    GRPO-CARE, arXiv 2506.16141: consistency_bonus.      TW-GRPO, arXiv 2505.24718: multi_choice_reward.
    Video-R2, arXiv 2511.23478: temporal_alignment_reward; parse_claims stands in for its LLM that extracts claims.
"""

import math
import re
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F

# ---- Answers: extraction, accuracy, format, length ----


def _block(text: str, tag: str) -> str | None:
    """Trimmed content of the first <tag>...</tag> block, None when there is none. Two scans, whatever the text."""
    start = text.find(f"<{tag}>")
    end = text.find(f"</{tag}>", start) if start >= 0 else -1
    return text[start + len(tag) + 2 : end].strip() if end >= 0 else None


def extract_answer(text: str) -> str:
    """Content of the first <answer>...</answer> block, trimmed; "" when there is none (Video-R1)."""
    return _block(text, "answer") or ""


def extract_think(text: str) -> str:
    """Content of the first <think>...</think> block, trimmed; "" when there is none."""
    return _block(text, "think") or ""


def solution_answer(solution: str) -> str:
    """The answer of a data set's solution: "<answer>A,C</answer>" and " A,C " both give "A,C"."""
    tagged = _block(solution, "answer")
    return solution.strip() if tagged is None else tagged


def _number(text: str) -> float:
    """ "1,234.5" -> 1234.5; NaN for anything that is no finite number (units, words, "inf")."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def numerical_reward(answer: str, truth: str) -> float:
    """1.0 when both numbers agree after round(., 2), else 0.0 (Video-R1). Both or neither must contain "." or ",": "5" is not "5.0".

    >>> numerical_reward("5.00", "5.0"), numerical_reward("5", "5.0"), numerical_reward("5 cm", "5")
    (1.0, 0.0, 0.0)
    """
    if ("." in answer or "," in answer) != ("." in truth or "," in truth):
        return 0.0
    return float(round(_number(answer), 2) == round(_number(truth), 2))  # NaN equals nothing


def regression_reward(answer: str, truth: str) -> float:
    """1 - min(1, (|y_hat - y| + 1e-9) / (|y| + 1e-9)), in [0, 1] (Video-R1); 0 for anything that is no finite number.

    "nan" scores 1.0 in the releases of Video-R1 and VideoCFR; here it scores 0, as in GRPO-CARE's. The formula has one blind spot, kept:
    a truth of exactly 0 scores 0 for every answer.
    """
    y_hat, y = _number(answer), _number(truth)
    relative_error = (abs(y_hat - y) + 1e-9) / (abs(y) + 1e-9)
    return 1.0 - relative_error if relative_error < 1.0 else 0.0  # NaN ends here too


def _edit_distance(reference: list[str], hypothesis: list[str]) -> int:
    """Levenshtein distance of two word lists (reference not empty); a column of the table is two integers.

    Bit-vectors of Myers (1999) as put by Hyyro (2003): |hypothesis| steps on integers of |reference| bits.
    """
    masks: dict[str, int] = {}  # word -> bit i is set where reference[i] is that word
    for i, word in enumerate(reference):
        masks[word] = masks.get(word, 0) | (1 << i)
    full, last = (1 << len(reference)) - 1, 1 << (len(reference) - 1)
    up, down, distance = (
        full,
        0,
        len(reference),
    )  # where the column rises or falls by 1; the value of its last cell
    for word in hypothesis:
        same = masks.get(word, 0)
        diagonal = (((same & up) + up) ^ up) | same
        right_up, right_down = down | ~(diagonal | up), up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up, right_down, vertical = (right_up << 1) | 1, right_down << 1, same | down
        up, down = (right_down | ~(vertical | right_up)) & full, right_up & vertical & full
    return distance


def ocr_reward(answer: str, truth: str) -> float:
    """1 - word error rate, clipped to [0, 1]: words split at white space, case-sensitive (Video-R1)."""
    reference, hypothesis = truth.split(), answer.split()
    if len(hypothesis) >= 2 * len(reference):
        return 0.0  # the error rate is at least 1
    return max(0.0, 1.0 - _edit_distance(reference, hypothesis) / len(reference))


def rouge_reward(answer: str, truth: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L with stemmer, in [0, 1] (Video-R1). Needs rouge-score.

    rouge-score keeps a-z and 0-9 only, so other scripts score 0; a one-word truth has no bigram, so it reaches 2/3.
    ROUGE-L takes words x words steps: bound the completion length.
    """
    from rouge_score import rouge_scorer  # pip install rouge-score

    scores = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(
        truth, answer
    )
    return min(1.0, sum(score.fmeasure for score in scores.values()) / 3)


def multi_choice_reward(answer: str, solution: str) -> float:
    """TW-GRPO's soft reward for several right letters: |answer| / |truth| when answer is a subset of truth, else 0.

    Letters are comma-separated; order, spaces and repeats do not matter. "AC", "A." and "A," hold no letter: 0.

    >>> multi_choice_reward("C, A", "A,C"), multi_choice_reward("A", "A,C"), multi_choice_reward("A,B", "A,C")
    (1.0, 0.5, 0.0)
    """
    given = set("".join(answer.split()).split(","))
    truth = set("".join(solution_answer(solution).split()).split(","))
    return len(given) / len(truth) if "" not in given and given <= truth else 0.0


def accuracy_reward(completion: str, solution: str, problem_type: str) -> float:
    """How right the answer block of a completion is, in [0, 1]; rules of Video-R1, VideoCFR and GRPO-CARE.

    completion: the whole generated text; no answer block, or an empty one, scores 0. solution: with or without tags.
    problem_type: "multiple choice" (exact letter; TW-GRPO's sets where the solution has several, e.g. "A,C"),
    "numerical", "regression", "OCR", "free-form"; anything else raises: a silent 0 would hide a fault of the data.
    """
    answer, truth = extract_answer(completion), solution_answer(solution)
    scores = {"numerical": numerical_reward, "regression": regression_reward, "OCR": ocr_reward}
    scores |= {
        "free-form": rouge_reward,
        "multiple choice": lambda given, right: float(given == right),
    }
    if problem_type not in scores:
        raise ValueError(
            f"unknown problem_type {problem_type!r}: expected one of {', '.join(scores)}"
        )
    letters = [part.strip() for part in truth.split(",")]
    if (
        problem_type == "multiple choice"
        and len(letters) > 1
        and all(x.isalpha() and len(x) == 1 for x in letters)
    ):
        return multi_choice_reward(answer, truth)
    return scores[problem_type](answer, truth) if answer else 0.0


def format_reward(completion: str) -> float:
    """1.0 when the whole completion is one think block and then one answer block, white space around allowed; else 0.0.

    >>> format_reward("<think>a cat</think>\\n<answer>B</answer>"), format_reward("so: <answer>B</answer>")
    (1.0, 0.0)
    """
    text = completion.strip()
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return 0.0
    think, _, rest = text.partition("</think>")
    return float(
        think.startswith("<think>")
        and rest.lstrip().startswith("<answer>")
        and rest.endswith("</answer>")
    )


def length_reward(
    num_tokens: int, accuracy: float, low: int = 320, high: int = 512, bonus: float = 0.2
) -> float:
    """`bonus` for a correct (accuracy > 0.1) completion of `low` to `high` tokens, both included, else 0 (Video-R1)."""
    return bonus if accuracy > 0.1 and low <= num_tokens <= high else 0.0


def temporal_reward(
    accuracy: float,
    ordered_accuracy: float,
    shuffled_accuracy: float,
    gamma: float = 0.3,
    ratio: float = 1.0,
) -> float:
    """T-GRPO (Video-R1): `gamma` for a correct (accuracy > 0.1) completion when frame order helps, else 0.

    It helps when ordered_accuracy >= ratio * shuffled_accuracy: mean accuracies over ONE question's group (never over a
    batch) of rollouts with the frames in order, and shuffled. ratio: 1.0 in VideoCFR's paper, 0.8 in both releases.
    """
    return gamma if accuracy > 0.1 and ordered_accuracy >= ratio * shuffled_accuracy else 0.0


# ---- Consensus frame reward (VideoCFR) ----


@torch.no_grad()
def pool_frames(visual_states: torch.Tensor, how: str = "max") -> torch.Tensor:
    """(K, M, D) last-layer states of the M visual tokens of each frame -> (K, D) frame vectors (Eq. 3).

    "max" is channel-wise, the paper's sparse aggregation; "mean" is its ablation."""
    if how not in ("max", "mean"):
        raise ValueError(f"unknown pooling {how!r}: expected 'max' or 'mean'")
    states = visual_states.float()  # (K, M, D)
    return states.amax(dim=1) if how == "max" else states.mean(dim=1)


@torch.no_grad()
def frame_use(
    response_states: torch.Tensor,
    frame_states: torch.Tensor,
    tau: float = 0.1,
    order: str = "mean_softmax",
) -> torch.Tensor:
    """How much the response uses each frame: (L, D) response states, (K, D) frame vectors -> (K,), sums to 1 (Eq. 4-5).

    "mean_softmax" is the paper: S_i = mean_t cos(h_t, f_i), use = softmax(S / tau). "softmax_mean" is the release: a
    softmax over frames for each token, then the mean over tokens (with tau = 0.5 there).
    """
    if order not in ("mean_softmax", "softmax_mean"):
        raise ValueError(f"unknown order {order!r}: expected 'mean_softmax' or 'softmax_mean'")
    if response_states.shape[0] == 0:
        raise ValueError("frame_use: no response tokens, so the use of the frames is undefined")
    response = F.normalize(response_states.float(), dim=-1)  # (L, D)
    similarity = response @ F.normalize(frame_states.float(), dim=-1).T  # (L, K)
    if order == "mean_softmax":
        return torch.softmax(similarity.mean(dim=0) / tau, dim=-1)  # (K,)
    return torch.softmax(similarity / tau, dim=-1).mean(dim=0)  # (K,)


@torch.no_grad()
def attention_use(weights: torch.Tensor, num_frames: int | None = None) -> torch.Tensor:
    """Attention counterpart of frame_use: response-to-video attention -> (K,), sums to 1. Not in the paper.

    weights: (heads, L, K, M), or (heads, L, K*M) with num_frames = K: attention of L response tokens to the M visual
    tokens of K frames. Summed over all but K, then normalised once: a token counts by how much it looks at the video.
    """
    if weights.dim() == 3 and num_frames and weights.shape[-1] % num_frames == 0:
        weights = weights.unflatten(-1, (num_frames, -1))  # (heads, L, K, M)
    if weights.dim() != 4 or num_frames not in (None, weights.shape[2]):
        raise ValueError(
            f"attention_use: expected (heads, L, K, M) or (heads, L, K*M) and K, got {[*weights.shape]}, {num_frames}"
        )
    mass = weights.float().sum(dim=(0, 1, 3))  # (K,)
    if not mass.sum() > 0:  # NaN ends here too
        raise ValueError(
            "attention_use: no attention from the response to the video, so there is nothing to normalise"
        )
    return mass / mass.sum()


@torch.no_grad()
def merge_prior(prior: torch.Tensor, slots: int) -> torch.Tensor:
    """(K,) prior over sampled frames -> (slots,) over the model's temporal slots; equal runs are summed, mass is kept.

    Qwen2.5-VL merges temporal_patch_size = 2 frames into one slot and repeats the last frame to fill the last slot:
    slots = ceil(K / patch), and the last slot may hold fewer frames.

    >>> merge_prior(torch.tensor([0.125, 0.125, 0.25, 0.25, 0.25]), 3)
    tensor([0.2500, 0.5000, 0.2500])
    """
    frames = prior.shape[0]
    patch = math.ceil(frames / slots) if slots > 0 else 0  # frames in a slot
    if patch == 0 or math.ceil(frames / patch) != slots:
        raise ValueError(
            f"a prior over {frames} frames and a video of {slots} slots do not describe the same frames"
        )
    return (
        F.pad(prior.float(), (0, patch * slots - frames)).view(slots, patch).sum(dim=1)
    )  # (slots,)


@torch.no_grad()
def consensus_frame_reward(prior: torch.Tensor, use: torch.Tensor) -> float:
    """R_cf = sum_i P(i) use(i), in [0, 1] (Eq. 6): two distributions over the same K frames (or slots) -> float."""
    if prior.dim() != 1 or prior.shape != use.shape:
        raise ValueError(
            f"prior {list(prior.shape)} and use {list(use.shape)} must share one length: see merge_prior"
        )
    prior, use = prior.float().cpu(), use.float().cpu()
    for name, p in (("prior", prior), ("use", use)):
        if not (
            p.min() >= 0 and abs(float(p.sum()) - 1) < 0.01
        ):  # refuses NaN; 0.01 leaves room for bfloat16
            raise ValueError(
                f"{name} is not a probability distribution: it sums to {float(p.sum()):.4f}"
            )
    return min(1.0, float(prior @ use))  # min: rounding may leave 1 + 1e-7


def gate(accuracy: float, how: str = "soft") -> float:
    """Weight of the consensus term: a wrong answer earns nothing by looking at the right frames (no reward hacking).

    soft: accuracy clipped to [0, 1]; hard: 1 if accuracy > 0.01 else 0 (the release); none: 1 (Eq. 7 as printed).
    """
    if how not in ("soft", "hard", "none"):
        raise ValueError(f"unknown gate {how!r}: expected 'soft', 'hard' or 'none'")
    return {
        "soft": min(max(float(accuracy), 0.0), 1.0),
        "hard": float(accuracy > 0.01),
        "none": 1.0,
    }[how]


def total_reward(
    accuracy: float,
    structure: float,
    consensus: float,
    temporal: float,
    weight: float = 3.0,
    how: str = "soft",
) -> float:
    """R = R_acc + R_struct + weight * gate * R_cf + R_temp (Eq. 7); R_struct = format + length. Release: weight 5."""
    return accuracy + structure + weight * gate(accuracy, how) * consensus + temporal


# ---- Consistency bonus (GRPO-CARE) ----


@torch.no_grad()
def consistency_bonus(
    accuracy: torch.Tensor,
    likelihood: torch.Tensor,
    coef: float = 0.5,
    cap: float = 0.95,
    margin: float = 0.01,
    floor: float = 0.1,
    dense: bool = False,
) -> torch.Tensor:
    """Bonus for an answer that follows from its own reasoning: one question's group (G,), (G,) -> (G,) in [0, coef].

    likelihood: exp(mean log-prob) of the answer tokens under the slowly moving reference model, given the reasoning; NaN without an answer
    block, then never selected. Selected: accuracy of at least max(group mean, floor). Those whose likelihood, clipped at cap, reaches the
    mean of the selected minus margin get coef * accuracy. dense: every answer gets coef * accuracy * clipped likelihood instead.

    >>> consistency_bonus(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.75, 0.25, 0.9]))
    tensor([0.5000, 0.0000, 0.0000])
    """
    accuracy, likelihood = accuracy.float(), likelihood.float()  # (G,)
    answered, clipped = ~likelihood.isnan(), likelihood.nan_to_num(0.0).clamp(max=cap)
    if dense:
        return coef * accuracy * clipped
    slack = 1e-6  # the mean of equal float32 numbers may round to just above them
    selected = answered & (accuracy >= accuracy.mean().clamp(min=floor) - slack)
    if not selected.any():
        return torch.zeros_like(accuracy)
    baseline = clipped[selected].mean() - margin
    return coef * accuracy * (selected & (clipped >= baseline - slack))


# ---- Temporal alignment reward (Video-R2) ----

_NUMBER = (
    r"[0-9]{1,5}(?:\.[0-9]{1,3})?"  # every repeat is bounded, so that any text takes linear time
)
_TO = r"\s{0,3}(?:-|–|—|to|until)\s{0,3}"
_TIME = re.compile(
    rf"""(?<![\w:.]) (?:(?:at|in|around|about|approximately|from|near|by)\s{{1,3}}){{0,2}}
    (?P<between>between\s{{1,3}})? (?:the\s{{1,3}})?
    (?: (?P<clock>[0-9]{{1,2}}:[0-5][0-9]:[0-5][0-9](?:\.[0-9]{{1,3}})? | [0-9]{{1,3}}:[0-5][0-9](?:\.[0-9]{{1,3}})?)
        (?:\s?s)? (?!\w|:[0-9]|\s?[ap]\.?m\b)                                            # 1:02, 00:01:02.5; no 4:30 pm
      | (?P<minutes>{_NUMBER})\s{{0,2}}(?:minutes?|mins?|m)(?:\s{{1,3}}and)?\s{{0,3}}    # 1 min 5 s
        (?P<rest>{_NUMBER})\s{{0,3}}(?:seconds?|secs?|s)(?!\w)
      | (?:(?P<first>{_NUMBER})(?(between)(?:{_TO}|\s{{1,3}}and\s{{1,3}})|{_TO}))?       # 12 s, 5-9 s
        (?P<seconds>{_NUMBER})(?:\s{{0,3}}|-(?=seconds?\smark))(?:seconds?|secs?|s)(?!\w)
      | (?<!the\s)(?:seconds?|secs?)\s{{1,3}}(?P<nth>{_NUMBER})(?:{_TO}(?P<last>{_NUMBER}))?(?!\w|:[0-9])  # second 12
    ) (?:\s{{1,3}}mark(?!\w))?""", re.VERBOSE | re.IGNORECASE)  # fmt: skip


def _seconds(match: re.Match) -> tuple[float, float]:
    """(start, end) of one match of _TIME, in seconds; equal for a point in time."""
    if match["clock"]:
        end = sum(float(part) * 60**i for i, part in enumerate(reversed(match["clock"].split(":"))))
    elif match["minutes"]:
        end = float(match["minutes"]) * 60 + float(match["rest"])
    else:
        end = float(match["seconds"] or match["last"] or match["nth"])
    start = float(match["first"] or (match["last"] and match["nth"]) or end)
    return min(start, end), max(start, end)


def _times(sentence: str) -> list[tuple[int, int, float, float]]:
    """Every time or range in a sentence: (first character, end character, start second, end second)."""
    times, between = [], False
    for match in _TIME.finditer(sentence):
        begin, stop, (start, end) = match.start(), match.end(), _seconds(match)
        if (
            times and times[-1][2] == times[-1][3] and start == end
        ):  # two points: are they the ends of a range?
            gap = sentence[times[-1][1] : begin].strip().lower()
            if gap in ("-", "–", "—", "to", "until") or (gap == "and" and between):
                begin, _, other, _ = times.pop()
                start, end = min(other, start), max(other, end)
        times.append((begin, stop, start, end))
        between = match["between"] is not None
    return times


def _tidy(text: str) -> str:
    """What a sentence says once its times are cut out: no empty brackets, no connective or comma at either end."""
    words = re.sub(r"\(\s?\)|\[\s?\]", "", " ".join(text.split())).split()
    empty = ("", "and", "then", "or", "but")
    kept = [i for i, word in enumerate(words) if word.strip(",;:.!?-–—()[]").lower() not in empty]
    said = " ".join(words[kept[0] : kept[-1] + 1]) if kept else ""
    return said.lstrip(" ,;:.!?-–—)]").rstrip(" ,;:.!?-–—([")


def parse_claims(text: str) -> list[tuple[float, float, str]]:
    """What a text claims to happen when: a list of (start second, end second, sentence), start == end for a point.

    Reads MM:SS, HH:MM:SS, "12 s", "12.5 seconds", "second 12", "1 min 5 s" and ranges of them ("00:10-00:14",
    "from 0:05 to 0:09", "5-9 s"). A time leaves its sentence together with its "at", "around", "from"... Of several
    times in a sentence each owns the text up to the next one, or the whole sentence where there is none. A time without
    any words claims nothing. "for 5 seconds" is read as a time too: rules do not tell durations apart.

    >>> parse_claims("At 00:12 a red car passes. From 0:20 to 0:25 it turns and at 31 s it stops.")
    [(12.0, 12.0, 'a red car passes'), (20.0, 25.0, 'it turns'), (31.0, 31.0, 'it stops')]
    """
    claims = []
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", text):
        times = _times(sentence)
        begins = [time[0] for time in times] + [len(sentence)]
        stops = [0] + [time[1] for time in times]
        whole = (
            _tidy(" ".join(sentence[a:b] for a, b in zip(stops, begins, strict=True)))
            if times
            else ""
        )
        for (_, stop, start, end), until in zip(times, begins[1:], strict=True):
            said = (_tidy(sentence[stop:until]) if len(times) > 1 else "") or whole
            if said:
                claims.append((start, end, said))
    return claims


def lexical_similarity(a: str, b: str) -> float:
    """F1 of the two sentences' lower-cased words (with repeats), in [0, 1]: lexical, so a paraphrase scores low."""
    words_a, words_b = (Counter(re.findall(r"\w+", text.lower())) for text in (a, b))
    total = words_a.total() + words_b.total()
    return 2 * (words_a & words_b).total() / total if total else 0.0


def temporal_alignment_reward(
    predicted: list[tuple[float, float, str]],
    reference: list[tuple[float, float, str]],
    similarity: Callable[[str, str], float] = lexical_similarity,
    buffer: float = 2.0,
    threshold: float = 0.75,
) -> float:
    """TAR of Video-R2: share of predicted claims that match a reference claim, in [0, 1]; 0 when either list is empty.

    Two claims match when their intervals, each widened by `buffer` seconds on both sides, touch or overlap, and
    similarity(predicted sentence, reference sentence) >= threshold. Predictions choose in time order, each the most
    similar reference still free. Words are compared by default; for meaning, as in Video-R2, plug in embeddings:

        model = sentence_transformers.SentenceTransformer("all-MiniLM-L6-v2")
        embed = functools.cache(lambda sentence: model.encode(sentence, normalize_embeddings=True))
        temporal_alignment_reward(predicted, reference, lambda a, b: float(embed(a) @ embed(b)))

    >>> temporal_alignment_reward([(3, 3, "a dog barks"), (9, 9, "it rains")], [(5, 6, "A dog barks.")])
    0.5
    """
    free, matched = sorted(reference), 0
    for start, end, sentence in sorted(predicted):
        near = [
            claim
            for claim in free
            if start - buffer <= claim[1] + buffer and claim[0] - buffer <= end + buffer
        ]
        scores = [similarity(sentence, claim[2]) for claim in near]
        if scores and max(scores) >= threshold:
            free.remove(near[scores.index(max(scores))])
            matched += 1
    return matched / len(predicted) if predicted else 0.0


# ---- Adapters: TRL, verl, and the outputs of a plain batched forward of Qwen2-VL, Qwen2.5-VL or Qwen3-VL ----


def trl_accuracy(
    completions: list, solution: list[str], problem_type: list[str], **columns
) -> list[float]:
    """accuracy_reward for TRL's GRPOTrainer(reward_funcs=[trl_accuracy, trl_format]); the data set has the other two columns."""
    texts = [
        text if isinstance(text, str) else text[-1]["content"] for text in completions
    ]  # a chat: its last message
    return [accuracy_reward(*row) for row in zip(texts, solution, problem_type, strict=True)]


def trl_format(completions: list, **columns) -> list[float]:
    return [
        format_reward(text if isinstance(text, str) else text[-1]["content"])
        for text in completions
    ]


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict, **_
) -> float:
    """For verl's reward.custom_reward_function.path: accuracy + format; extra_info["problem_type"] is the question's.

    What else verl passes (reward_router_address, reward_model_tokenizer, the configuration's reward_kwargs) is not needed.
    """
    return accuracy_reward(solution_str, ground_truth, extra_info["problem_type"]) + format_reward(
        solution_str
    )


@torch.no_grad()
def cfr_from_forward(
    hidden_states,
    input_ids,
    video_token_id,
    grid_thw,
    merge_size,
    completion_mask,
    prior,
    layer=-1,
    pool="max",
    tau=0.1,
    order="mean_softmax",
    attentions=None,
) -> torch.Tensor:
    """R_cf (Eq. 6) of every row of a batch -> (B,) float32; 0 for a row without a video of two temporal slots, as train.py has it.
    hidden_states: output.hidden_states, of which `layer` is taken, each (B, T, D). input_ids, completion_mask (B, T): prompt, response and
    padding, True on the response. grid_thw (videos, 3): video_grid_thw, one video a row. prior: (K,) a row, or None without a video."""
    rewards, states = (
        torch.zeros(len(input_ids)),
        (hidden_states if attentions is None else attentions)[layer],
    )
    grids = iter([] if grid_thw is None else grid_thw.tolist())
    for row, ids in enumerate(input_ids):
        visual, response = (ids == video_token_id).nonzero()[:, 0], completion_mask[row].bool()
        slots, height, width = next(grids, (0, 0, 0)) if len(visual) else (0, 0, 0)
        if len(visual) != slots * height * width // merge_size**2:
            raise ValueError(
                f"row {row}: {len(visual)} video tokens, grid {slots} x {height} x {width}, merged by {merge_size}"
            )
        if slots > 1:
            use = (
                attention_use(states[row][:, response][:, :, visual], slots)
                if attentions is not None
                else frame_use(
                    states[row, response],
                    pool_frames(states[row, visual].unflatten(0, (slots, -1)), pool),
                    tau,
                    order,
                )
            )
            rewards[row] = consensus_frame_reward(merge_prior(prior[row], slots), use)
    return rewards


def cfr_from_attentions(
    attentions, input_ids, video_token_id, grid_thw, merge_size, completion_mask, prior, layer=0
) -> torch.Tensor:
    """cfr_from_forward with attention_use of output.attentions[layer], (B, heads, T, T); the model needs attn_implementation="eager"."""
    return cfr_from_forward(
        None,
        input_ids,
        video_token_id,
        grid_thw,
        merge_size,
        completion_mask,
        prior,
        layer,
        attentions=attentions,
    )
