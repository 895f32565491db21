# SPDX-License-Identifier: Apache-2.0
"""Rewards for reinforcement learning on video question answering, each one a pure function.

This file stands alone: copy it into your repository. It needs torch; the "free-form" accuracy also
needs rouge-score. Text in, float out; tensors in, float32 tensors or floats out. No gradients.
Adapters for trainers are at the end.

    accuracy = accuracy_reward(completion, "<answer>B</answer>", "multiple choice")
    use = frame_use(response_states, pool_frames(visual_states))      # (L, D), (t, M, D) -> (t,)
    # prior (K,): where the experts look
    consensus = consensus_frame_reward(merge_prior(prior, len(use)), use)
    reward = total_reward(accuracy, format_reward(completion), consensus, temporal=0.0)

What to cite for which function:
    VideoCFR / CF-GRPO, arXiv 2606.18441: pool_frames, frame_use (Eq. 3-5), merge_prior,
        consensus_frame_reward (Eq. 6), gate, total_reward (Eq. 7). attention_use is this project's
        own counterpart of Eq. 3-5.
    Video-R1 / T-GRPO, arXiv 2503.21776: accuracy_reward, format_reward, length_reward,
        temporal_reward.
    GRPO-CARE, arXiv 2506.16141: consistency_bonus.
    TW-GRPO, arXiv 2505.24718: multi_choice_reward.
    Video-R2, arXiv 2511.23478: temporal_alignment_reward; parse_claims replaces its LLM that
        extracts claims.
"""

import math
import re
from collections import Counter

import torch
import torch.nn.functional as F

# ---- Answers: extraction, accuracy, format, length ----


def _block(text, tag):
    """Return the stripped content of the first <tag>...</tag> block, or None without one."""
    # Two scans in linear time: a regular expression would backtrack over many open tags.
    _, _, rest = text.partition(f"<{tag}>")
    content, close_tag, _ = rest.partition(f"</{tag}>")
    return content.strip() if close_tag else None


def extract_answer(text):
    """Return the stripped content of the first answer block; "" without one (Video-R1)."""
    return _block(text, "answer") or ""


def extract_think(text):
    """Return the stripped content of the first think block; "" without one."""
    return _block(text, "think") or ""


_TAG = re.compile(r"<\s?(/?)\s?(think|answer)(?:ing)?\s?>", re.IGNORECASE)


def split_output(text):
    """Split an output into its reasoning and its answer, as evaluation does; training is stricter.

    Tags may be missing, unclosed, nested or in capitals, and the opening one may have stood in the
    prompt. What follows the reasoning is the answer; of several answer blocks it is the first.
    Reasoning that never ends has no answer, unless its last words are an answer block.

    Returns:
        (reasoning, answer) without tags; "" for what is not there.

    >>> split_output("It turns.</think> <answer>B"), split_output("B"), split_output("<think>B?")
    (('It turns.', 'B'), ('', 'B'), ('B?', ''))
    """
    text = _TAG.sub(lambda tag: f"<{tag[1]}{tag[2].lower()}>", text).strip()
    reasoning, _, rest = text.rpartition("</think>")
    if not rest or "<think>" in rest.partition("<answer>")[0]:
        reasoning, begun, rest = text.removesuffix("</think>").rpartition("<answer>")
        if not begun or rest.partition("</answer>")[2].strip():
            reasoning = text
            rest = ""
    before, begun, block = rest.partition("<answer>")
    if begun:
        reasoning += before
        rest = block
    # Of nested blocks the inner one; a stray end tag ends the answer, too.
    answer = rest.partition("</answer>")[0].rpartition("<answer>")[2]
    return _TAG.sub("", reasoning).strip(), _TAG.sub("", answer).strip()


def solution_answer(solution):
    """Return a solution without tags: "<answer>A,C</answer>" and " A,C " both give "A,C"."""
    tagged = _block(solution, "answer")
    return solution.strip() if tagged is None else tagged


def _number(text):
    """Convert "1,234.5" to 1234.5; NaN for anything but a finite number (units, words, "inf")."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def numerical_reward(answer, truth):
    """Return 1.0 when both numbers are equal after rounding to 2 decimals, else 0.0 (Video-R1).

    Both or neither must contain "." or ",": "5" does not equal "5.0".

    >>> numerical_reward("5.00", "5.0"), numerical_reward("5", "5.0"), numerical_reward("5 cm", "5")
    (1.0, 0.0, 0.0)
    """
    if ("." in answer or "," in answer) != ("." in truth or "," in truth):
        return 0.0
    # NaN, for text that is not a number, equals nothing.
    return float(round(_number(answer), 2) == round(_number(truth), 2))


def regression_reward(answer, truth):
    """Return 1 - min(1, (|y_hat - y| + 1e-9) / (|y| + 1e-9)), in [0, 1] (Video-R1).

    Anything but a finite number scores 0; "nan" scores 1.0 in the releases of Video-R1 and
    VideoCFR, 0 in GRPO-CARE's. A truth of exactly 0 scores 0 for every answer, as in the formula.
    """
    y_hat = _number(answer)
    y = _number(truth)
    relative_error = (abs(y_hat - y) + 1e-9) / (abs(y) + 1e-9)
    # The comparison is false for NaN, too.
    return 1.0 - relative_error if relative_error < 1.0 else 0.0


def _edit_distance(reference, hypothesis):
    """Compute the Levenshtein distance of two word lists.

    Bit-vectors of Myers (1999) in the form of Hyyro (2003): one step per hypothesis word, on
    integers with one bit per reference word, so that long answers do not slow training down.
    """
    # Word -> integer with bit i set where reference[i] is that word.
    positions = {}
    for i, word in enumerate(reference):
        positions[word] = positions.get(word, 0) | (1 << i)
    all_bits = (1 << len(reference)) - 1
    # Bit i: the distance rises (falls) by 1 from row i to row i + 1 of the table's current column.
    rises = all_bits
    falls = 0
    for word in hypothesis:
        same = positions.get(word, 0)
        vertical = same | falls
        diagonal = (((same & rises) + rises) ^ rises) | same
        # The same from the current column to the next one.
        right_rises = ((falls | ~(diagonal | rises)) << 1) | 1
        right_falls = (rises & diagonal) << 1
        rises = (right_falls | ~(vertical | right_rises)) & all_bits
        falls = right_rises & vertical & all_bits
    # The last column begins with len(hypothesis) insertions.
    return len(hypothesis) + rises.bit_count() - falls.bit_count()


def ocr_reward(answer, truth):
    """Return 1 - word error rate, clipped to [0, 1] (Video-R1).

    Words are separated by white space and compared with case.
    """
    reference = truth.split()
    hypothesis = answer.split()
    # At twice the words the error rate is at least 1.
    if len(hypothesis) >= 2 * len(reference):
        return 0.0
    return max(0.0, 1.0 - _edit_distance(reference, hypothesis) / len(reference))


def rouge_reward(answer, truth):
    """Return the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L with stemmer, in [0, 1] (Video-R1).

    Needs rouge-score, which reads a-z and 0-9 only: other scripts score 0. A one-word truth has no
    bigram and reaches 2/3. ROUGE-L takes words x words steps: bound the completion length.
    """
    # Imported here, so that the other rewards do not need it: pip install rouge-score
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = scorer.score(truth, answer)
    return sum(score.fmeasure for score in scores.values()) / 3


def multi_choice_reward(answer, solution):
    """Return |answer| / |truth| when the answer's letters are a subset of the truth's, else 0.

    TW-GRPO's soft reward for several right letters, separated by commas. Order, spaces and repeats
    do not matter. "AC", "A." and "A," are not letters and score 0.

    >>> multi_choice_reward("C, A", "A,C"), multi_choice_reward("A", "A,C")
    (1.0, 0.5)
    >>> multi_choice_reward("A,B", "A,C")
    0.0
    """
    given = set("".join(answer.split()).split(","))
    truth = set("".join(solution_answer(solution).split()).split(","))
    return len(given) / len(truth) if "" not in given and given <= truth else 0.0


def _choice_reward(answer, truth):
    """Return 1.0 for the exact letter (Video-R1); for several, as in "A,C", multi_choice_reward."""
    # A comma alone does not make letters: "yes, it is" is compared as text.
    if re.fullmatch(r"\s*[^\W\d_]\s*(,\s*[^\W\d_]\s*)+", truth):
        return multi_choice_reward(answer, truth)
    return float(answer == truth)


_ACCURACY = {
    "multiple choice": _choice_reward,
    "numerical": numerical_reward,
    "regression": regression_reward,
    "OCR": ocr_reward,
    "free-form": rouge_reward,
}


def accuracy_reward(completion, solution, problem_type):
    """Score the answer block of a completion by the rules of Video-R1, VideoCFR and GRPO-CARE;
    several right letters by TW-GRPO's.

    Args:
        completion: the whole generated text. Without an answer block, or with an empty one, it
            scores 0.
        solution: the true answer, with or without tags.
        problem_type: "multiple choice", "numerical", "regression", "OCR" or "free-form".
    Returns:
        float in [0, 1].
    Raises:
        ValueError: for another problem_type, since a silent 0 would hide a fault of the data.
    """
    if problem_type not in _ACCURACY:
        raise ValueError(
            f"unknown problem_type {problem_type!r}: expected one of {', '.join(_ACCURACY)}"
        )
    answer = extract_answer(completion)
    return _ACCURACY[problem_type](answer, solution_answer(solution)) if answer else 0.0


def format_reward(completion):
    """Return 1.0 when a completion is one think block and then one answer block, else 0.0.

    White space may stand around the blocks, but no other text.

    >>> format_reward("<think>a cat</think>\\n<answer>B</answer>")
    1.0
    >>> format_reward("so: <answer>B</answer>")
    0.0
    """
    text = completion.strip()
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return 0.0
    # With one of each tag it takes linear time.
    blocks = re.fullmatch(r"<think>.*</think>\s*<answer>.*</answer>", text, re.DOTALL)
    return float(blocks is not None)


def length_reward(num_tokens, accuracy, low=320, high=512, bonus=0.2):
    """Return `bonus` for a correct completion of `low` to `high` tokens, else 0 (Video-R1).

    Correct means accuracy > 0.1. Both `low` and `high` are included.
    """
    return bonus if accuracy > 0.1 and low <= num_tokens <= high else 0.0


def temporal_reward(accuracy, ordered_accuracy, shuffled_accuracy, gamma=0.3, ratio=1.0):
    """Return `gamma` for a correct completion when the order of the frames helps, else 0 (T-GRPO).

    Args:
        accuracy: of the completion; above 0.1 it is correct.
        ordered_accuracy: mean over the rollouts of this one question (never over a batch).
        shuffled_accuracy: the same for rollouts with shuffled frames.
        ratio: order helps when ordered_accuracy >= ratio * shuffled_accuracy. 1.0 in VideoCFR's
            paper, 0.8 in the releases of Video-R1 and VideoCFR.
    """
    return gamma if accuracy > 0.1 and ordered_accuracy >= ratio * shuffled_accuracy else 0.0


# ---- Consensus frame reward (VideoCFR) ----


@torch.no_grad()
def pool_frames(visual_states, how="max"):
    """Pool the states of each frame's visual tokens into one vector (Eq. 3).

    Args:
        visual_states: (K, M, D) last-layer states of the M visual tokens of K frames.
        how: "max" is channel-wise, the paper's sparse aggregation; "mean" is its ablation.
    Returns:
        (K, D) frame vectors.
    """
    states = visual_states.float()  # (K, M, D)
    if how == "max":
        return states.amax(dim=1)  # (K, D)
    if how == "mean":
        return states.mean(dim=1)  # (K, D)
    raise ValueError(f"unknown pooling {how!r}: expected 'max' or 'mean'")


@torch.no_grad()
def frame_use(response_states, frame_states, tau=0.1, order="mean_softmax"):
    """Compute how much the response uses each frame (Eq. 4-5).

    Args:
        response_states: (L, D) states of the response tokens.
        frame_states: (K, D) frame vectors.
        tau: temperature of the softmax.
        order: "mean_softmax" is the paper's: S_i = mean_t cos(h_t, f_i), use = softmax(S / tau).
            "softmax_mean" is the release's: a softmax over frames for each token, then the mean
            over tokens (with tau = 0.5 there).
    Returns:
        (K,), sums to 1.
    """
    if len(response_states) == 0:
        raise ValueError("frame_use: no response tokens, so the use of the frames is undefined")
    response = F.normalize(response_states.float(), dim=-1)  # (L, D)
    similarity = response @ F.normalize(frame_states.float(), dim=-1).T  # (L, K)
    if order == "mean_softmax":
        return torch.softmax(similarity.mean(dim=0) / tau, dim=-1)  # (K,)
    if order == "softmax_mean":
        return torch.softmax(similarity / tau, dim=-1).mean(dim=0)  # (K,)
    raise ValueError(f"unknown order {order!r}: expected 'mean_softmax' or 'softmax_mean'")


@torch.no_grad()
def attention_use(weights):
    """Compute how much the response uses each frame from its attention to them (not in the paper).

    Summed over heads, response and visual tokens, then normalised once, so that a response token
    counts by how much it looks at the video.

    Args:
        weights: (heads, L, K, M) attention of L response tokens to the M visual tokens of K frames.
    Returns:
        (K,), sums to 1.
    """
    mass = weights.float().sum(dim=(0, 1, 3))  # (K,)
    # Not `<= 0`, which is false for NaN.
    if not mass.sum() > 0:
        raise ValueError(
            "attention_use: no attention from the response to the video, "
            "so there is nothing to normalise"
        )
    return mass / mass.sum()


@torch.no_grad()
def merge_prior(prior, slots):
    """Sum a prior over sampled frames into one over the model's temporal slots.

    Qwen2.5-VL merges temporal_patch_size = 2 frames into one slot and repeats the last frame to
    fill the last slot: slots = ceil(K / patch), and the last slot may hold fewer frames.

    Args:
        prior: (K,).
        slots: number of temporal slots.
    Returns:
        (slots,) with the same sum.

    >>> merge_prior(torch.tensor([0.125, 0.125, 0.25, 0.25, 0.25]), 3)
    tensor([0.2500, 0.5000, 0.2500])
    """
    # Frames in a slot.
    patch = max(1, math.ceil(len(prior) / max(1, slots)))
    parts = prior.float().split(patch)
    if len(parts) != slots:
        raise ValueError(
            f"a prior over {len(prior)} frames and a video of {slots} slots "
            "do not describe the same frames"
        )
    return torch.stack([part.sum() for part in parts])  # (slots,)


@torch.no_grad()
def consensus_frame_reward(prior, use):
    """Compute R_cf = sum_i P(i) use(i), in [0, 1] (Eq. 6).

    Args:
        prior, use: (K,) distributions over the same frames, or (slots,): see merge_prior.
    Raises:
        ValueError: for different shapes, or anything but a probability distribution.
    """
    if prior.dim() != 1 or prior.shape != use.shape:
        raise ValueError(
            f"prior {list(prior.shape)} and use {list(use.shape)} must share one length: "
            "see merge_prior"
        )
    prior = prior.float().cpu()
    use = use.float().cpu()
    for name, p in (("prior", prior), ("use", use)):
        # Refuses NaN, too; 0.01 leaves room for bfloat16.
        if not (p.min() >= 0 and abs(float(p.sum()) - 1) < 0.01):
            raise ValueError(
                f"{name} is not a probability distribution: it sums to {float(p.sum()):.4f}"
            )
    # Rounding may leave 1 + 1e-7.
    return min(1.0, float(prior @ use))


def gate(accuracy, how="soft"):
    """Weight the consensus reward by accuracy: a wrong answer earns nothing for where it looked.

    Args:
        accuracy: float, or a tensor of any shape.
        how: "soft" clips accuracy to [0, 1]; "hard" is 1 if accuracy > 0.01 else 0 (the release);
            "none" is 1 (Eq. 7 as printed).
    Returns:
        float, or a tensor of the shape of `accuracy`.
    """
    if how == "none":
        return 1.0
    if how == "hard":
        return (accuracy > 0.01) * 1.0
    if how != "soft":
        raise ValueError(f"unknown gate {how!r}: expected 'soft', 'hard' or 'none'")
    if torch.is_tensor(accuracy):
        return accuracy.clamp(0.0, 1.0)
    return min(max(float(accuracy), 0.0), 1.0)


def total_reward(accuracy, structure, consensus, temporal, weight=3.0, how="soft"):
    """Compute R = R_acc + R_struct + weight * gate * R_cf + R_temp (Eq. 7).

    Args:
        accuracy, structure, consensus, temporal: floats, or (G,) tensors of a group's rollouts;
            structure is format + length.
        weight: lambda of the consensus reward; 3 in the paper, 5 in the release.
        how: see gate.
    """
    return accuracy + structure + weight * gate(accuracy, how) * consensus + temporal


# ---- Consistency bonus (GRPO-CARE) ----


@torch.no_grad()
def consistency_bonus(accuracy, likelihood, coef=0.5, cap=0.95, margin=0.01, floor=0.1):
    """Compute the bonus for answers that follow from their own reasoning, one question's group.

    Selected are the completions whose accuracy reaches max(group mean, floor). Those of them whose
    likelihood, clipped at `cap`, reaches the mean of the selected minus `margin` get
    coef * accuracy.

    Args:
        accuracy: (G,).
        likelihood: (G,) exp(mean log-prob) of the answer tokens under the slowly moving reference
            model, given the reasoning. NaN without an answer block; never selected then.
    Returns:
        (G,) in [0, coef].

    >>> consistency_bonus(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.75, 0.25, 0.9]))
    tensor([0.5000, 0.0000, 0.0000])
    """
    accuracy = accuracy.float()
    likelihood = likelihood.float()
    clipped = likelihood.nan_to_num(0.0).clamp(max=cap)
    # The mean of equal float32 numbers may round to just above them.
    slack = 1e-6
    selected = ~likelihood.isnan() & (accuracy >= accuracy.mean().clamp(min=floor) - slack)
    # NaN with none selected, which nothing reaches.
    baseline = clipped[selected].mean() - margin
    return coef * accuracy * (selected & (clipped >= baseline - slack))


# ---- Temporal alignment reward (Video-R2) ----

# Every repeat is bounded, so that any text takes linear time.
_TIME = re.compile(
    r"""(?<![\w:.]) (?:(?:at|in|around|about|approximately|from|near|by)\s{1,3}){0,2}
    (?P<between>between\s{1,3})? (?:the\s{1,3})?
    (?:(?P<clock> # 1:02, 00:01:02.5; not 4:30 pm
          (?:[0-9]{1,2}:[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,3})?
            | [0-9]{1,3}:[0-5][0-9](?:\.[0-9]{1,3})?)
          (?:\s?s)? (?!\w|:[0-9]|\s?[ap]\.?m\b)
        | # 1 min 5 s
          NUMBER\s{0,2}(?:minutes?|mins?|m)(?:\s{1,3}and)?\s{0,3}
          NUMBER\s{0,3}(?:seconds?|secs?|s)(?!\w))
      | # 12 s, 5-9 s
        (?:(?P<first>NUMBER)(?(between)(?:TO|\s{1,3}and\s{1,3})|TO))?
        (?P<seconds>NUMBER)(?:\s{0,3}|-(?=seconds?\smark))(?:seconds?|secs?|s)(?!\w)
      | # second 12
        (?<!the\s)(?:seconds?|secs?)\s{1,3}(?P<nth>NUMBER)(?:TO(?P<last>NUMBER))?(?!\w|:[0-9])
    ) (?:\s{1,3}mark(?!\w))?
    """.replace("NUMBER", r"[0-9]{1,5}(?:\.[0-9]{1,3})?").replace(
        "TO", r"\s{0,3}(?:-|–|—|to|until)\s{0,3}"
    ),
    re.VERBOSE | re.IGNORECASE,
)


def _seconds(match):
    """Return the start and the end of one match of _TIME in seconds; equal for a point in time."""
    if match["clock"]:
        parts = reversed(re.findall("[0-9.]+", match["clock"]))
        end = sum(float(part) * 60**i for i, part in enumerate(parts))
    else:
        end = float(match["seconds"] or match["last"] or match["nth"])
    start = float(match["first"] or match["nth"] or end)
    return sorted((start, end))


def _tidy(text):
    """Drop empty brackets, and connectives and punctuation at both ends, left by cut-out times."""
    words = re.sub(r"\(\s*\)|\[\s*\]", "", text).split()
    empty = ("", "and", "then", "or", "but")
    full = [i for i, word in enumerate(words) if word.strip(",;:.!?-–—()[]").lower() not in empty]
    if not full:
        return ""
    claim = " ".join(words[full[0] : full[-1] + 1])
    return claim.lstrip(" ,;:.!?-–—)]").rstrip(" ,;:.!?-–—([")


def parse_claims(text):
    """Find what a text claims to happen at which time.

    Reads MM:SS, HH:MM:SS, "12 s", "12.5 seconds", "second 12", "1 min 5 s" and ranges of them
    ("00:10-00:14", "from 0:05 to 0:09", "5-9 s"). A time is cut out of its sentence with its "at",
    "around", "from"... With several times in a sentence, each gets the text up to the next one, or
    the whole sentence if that text is empty. A time without any words is not a claim. "for 5
    seconds" is read as a time, too: the rules do not recognise durations.

    Returns:
        List of (start second, end second, sentence); start == end for a point in time.

    >>> parse_claims("At 00:12 a red car passes. From 0:20 to 0:25 it turns and at 31 s it stops.")
    [(12.0, 12.0, 'a red car passes'), (20.0, 25.0, 'it turns'), (31.0, 31.0, 'it stops')]
    """
    claims = []
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", text):
        times = []  # (start second, end second)
        pieces = []  # the text before the first time and behind each
        between = None
        last = 0
        for match in _TIME.finditer(sentence):
            piece = sentence[last : match.start()]
            last = match.end()
            start, end = _seconds(match)
            # Two points in time may be the ends of one range.
            points = times and times[-1][0] == times[-1][1] and start == end
            joins = ["-", "–", "—", "to", "until"]
            if between:
                joins.append("and")
            if points and piece.strip().lower() in joins:
                start, end = sorted((times.pop()[0], start))
            else:
                pieces.append(piece)
            times.append((start, end))
            between = match["between"]
        pieces.append(sentence[last:])
        whole = _tidy(" ".join(pieces))
        for (start, end), piece in zip(times, pieces[1:], strict=True):
            claim = _tidy(piece) if len(times) > 1 else ""
            if claim or whole:
                claims.append((start, end, claim or whole))
    return claims


def lexical_similarity(a, b):
    """Return the F1 of two sentences' lower-cased words, in [0, 1]; a paraphrase scores low."""
    words_a = Counter(re.findall(r"\w+", a.lower()))
    words_b = Counter(re.findall(r"\w+", b.lower()))
    total = (words_a + words_b).total()
    return 2 * (words_a & words_b).total() / total if total else 0.0


def temporal_alignment_reward(
    predicted, reference, similarity=lexical_similarity, buffer=2.0, threshold=0.75
):
    """Return the share of predicted claims that match a reference claim (TAR of Video-R2).

    Predictions choose in time order, each the most similar reference that is still free. Words are
    compared by default; to compare meaning, as in Video-R2, pass embeddings:

        model = sentence_transformers.SentenceTransformer("all-MiniLM-L6-v2")
        embed = functools.cache(lambda sentence: model.encode(sentence, normalize_embeddings=True))
        temporal_alignment_reward(predicted, reference, lambda a, b: float(embed(a) @ embed(b)))

    Args:
        predicted, reference: lists of (start second, end second, sentence).
        similarity: of a predicted and a reference sentence.
        buffer: seconds by which both intervals are widened on both sides; they must touch then.
        threshold: least similarity of a match.
    Returns:
        float in [0, 1]; 0 when either list is empty.

    >>> claims = [(3, 3, "a dog barks"), (9, 9, "it rains")]
    >>> temporal_alignment_reward(claims, [(5, 6, "A dog barks.")])
    0.5
    """
    free = sorted(reference)
    matched = 0
    for start, end, sentence in sorted(predicted):
        near = []
        for claim in free:
            if start - buffer <= claim[1] + buffer and claim[0] - buffer <= end + buffer:
                near.append(claim)
        scores = [similarity(sentence, claim[2]) for claim in near]
        if scores and max(scores) >= threshold:
            free.remove(near[scores.index(max(scores))])
            matched += 1
    return matched / len(predicted) if predicted else 0.0


# ---- Adapters: TRL, verl, and a plain batched forward of Qwen2-VL, Qwen2.5-VL or Qwen3-VL ----


def _texts(completions):
    """Return TRL's completions as texts; of a chat, the content of its last message."""
    return [text if isinstance(text, str) else text[-1]["content"] for text in completions]


def trl_accuracy(completions, solution, problem_type, **columns):
    """accuracy_reward for TRL's GRPOTrainer(reward_funcs=[trl_accuracy, trl_format]).

    TRL passes the columns `solution` and `problem_type` of the data set.
    """
    rows = zip(_texts(completions), solution, problem_type, strict=True)
    return [accuracy_reward(*row) for row in rows]


def trl_format(completions, **columns):
    """format_reward for TRL's GRPOTrainer."""
    return [format_reward(text) for text in _texts(completions)]


def compute_score(data_source, solution_str, ground_truth, extra_info, **_):
    """Return accuracy + format for verl's reward.custom_reward_function.path.

    extra_info["problem_type"] is the question's. Further arguments of verl are ignored
    (reward_router_address, reward_model_tokenizer, the configuration's reward_kwargs).
    """
    accuracy = accuracy_reward(solution_str, ground_truth, extra_info["problem_type"])
    return accuracy + format_reward(solution_str)


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
):
    """Compute R_cf (Eq. 6) of every row of a batch.

    Args:
        hidden_states: output.hidden_states, each (B, T, D); `layer` is the index of the one to use.
        input_ids: (B, T) prompt, response and padding.
        grid_thw: (videos, 3) video_grid_thw, at most one video a row; None without videos.
        merge_size: of the vision tower, spatial_merge_size.
        completion_mask: (B, T) True on the response.
        prior: B priors (K,), None for a row without a video.
        pool, tau, order: see pool_frames and frame_use.
        attentions: output.attentions, used with attention_use instead of hidden_states.
    Returns:
        (B,) float32; 0 for a row without a video of two temporal slots, as in train.py.
    Raises:
        ValueError: if a row's video tokens do not fit its grid.
    """
    rewards = torch.zeros(len(input_ids))
    states = (hidden_states if attentions is None else attentions)[layer]
    grids = iter([] if grid_thw is None else grid_thw.tolist())
    for row, ids in enumerate(input_ids):
        visual = (ids == video_token_id).nonzero()[:, 0]  # (slots * M,) positions
        response = completion_mask[row].bool()  # (T,)
        if not len(visual):
            continue
        slots, height, width = next(grids, (0, 0, 0))
        if len(visual) != slots * height * width // merge_size**2:
            raise ValueError(
                f"row {row}: {len(visual)} video tokens, grid {slots} x {height} x {width}, "
                f"merged by {merge_size}"
            )
        # One slot leaves nothing to choose.
        if slots < 2:
            continue
        if attentions is None:
            frames = states[row, visual].unflatten(0, (slots, -1))  # (slots, M, D)
            use = frame_use(states[row, response], pool_frames(frames, pool), tau, order)
        else:
            weights = states[row][:, response][:, :, visual]  # (heads, L, slots * M)
            use = attention_use(weights.unflatten(-1, (slots, -1)))
        rewards[row] = consensus_frame_reward(merge_prior(prior[row], slots), use)
    return rewards


def cfr_from_attentions(attentions, *inputs, layer=0, **named):
    """Compute R_cf of every row as cfr_from_forward does, with attention_use.

    Args:
        attentions: output.attentions, each (B, heads, T, T); needs attn_implementation="eager".
        inputs, named: cfr_from_forward's input_ids, video_token_id, grid_thw, merge_size,
            completion_mask and prior.
        layer: index into attentions.
    """
    return cfr_from_forward(None, *inputs, layer=layer, attentions=attentions, **named)
