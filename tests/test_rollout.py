"""common/rollout.py: hand-derived numbers for sampling; Hugging Face's generate and forwards as
oracles for rollouts.
"""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import banned_ids, hf_inputs
from torch.utils.flop_counter import FlopCounterMode

import grpo
from common import policy
from common.engine import hookless_twin, sampling
from common.policy import Policy, attend_apart, collate
from common.rollout import (
    Sampling,
    answer_inputs,
    least_by_bisection,
    least_by_sort,
    rollout,
    row_uniforms,
    sample_texts,
    sample_tokens,
    token_batches,
)

INF = float("inf")

# -------------------------------------------------------------------------------------- sampling

# sorted: tokens 1, 3, 0, 2 with cumulative .5, .8, .95, 1
PROBS = torch.tensor([0.15, 0.5, 0.05, 0.3])
JUST_BELOW_1 = 1 - 2**-24


def sample(logits, uniforms, **settings):
    return sample_tokens(logits, uniforms, Sampling(1, **{"top_p": 1.0, **settings}))


def draw(uniforms, **settings):
    logits = PROBS.log().expand(len(uniforms), -1)
    return sample(logits, torch.tensor(uniforms), **settings).tolist()


def test_sample_tokens_inverts_the_cumulative_distribution():
    """In the order of the vocabulary: .15, .65, .7, 1; with top-k in that of the probabilities."""
    uniforms = [0.0, 0.14, 0.16, 0.64, 0.66, 0.69, 0.71, JUST_BELOW_1]
    assert draw(uniforms) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert draw(uniforms, top_p=0.999) == [0, 0, 1, 1, 2, 2, 3, 3]
    uniforms = [0.0, 0.49, 0.51, 0.79, 0.81, 0.94, 0.96, JUST_BELOW_1]
    assert draw(uniforms, top_k=4) == [1, 1, 3, 3, 0, 0, 2, 2]


@pytest.mark.parametrize("least_of_nucleus", [least_by_bisection, least_by_sort])
def test_the_nucleus_is_that_of_a_float64_sort(least_of_nucleus):
    """At the edge as well, and where probabilities are equal or 0."""
    logits = 4 * torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    logits[:50] = logits[:50].round()
    logits[:, -3:] = -INF
    probs = logits.softmax(-1)
    for top_p in (1e-6, 0.3, 0.95, 0.999):
        ordered, _ = probs.double().sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        least = ordered.masked_fill(before >= top_p, 1.0).amin(-1)
        found = least_of_nucleus(probs, top_p)[:, 0].double()
        assert (found == least).float().mean() > 0.99  # float32 sums at the very edge


def test_the_vocabulary_is_not_sorted_on_a_gpu(monkeypatch):
    def fails(*args, **options):
        raise AssertionError("sorted")

    monkeypatch.setattr(torch.Tensor, "sort", fails)
    with pytest.raises(AssertionError, match="sorted"):
        draw([0.1], top_p=0.6)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert draw([0.1, 0.9]) == [0, 3] and draw([0.1, 0.9], temperature=0) == [1, 1]
    assert draw([0.1, 0.9], top_k=2, top_p=0.9) == draw([0.1, 0.9], top_p=0.6) == [1, 3]


@pytest.mark.parametrize(
    "settings", [{}, {"top_p": 0.95}, {"top_k": 50}, {"top_k": 50, "top_p": 0.9}]
)
def test_rounding_never_samples_what_has_no_probability(settings):
    """The largest uniform number times a sum can be rounded to the sum itself."""
    logits = 3 * torch.randn(2000, 300, generator=torch.Generator().manual_seed(0))
    logits[:, -5:] = -INF
    tokens = sample(logits, torch.full((2000,), JUST_BELOW_1), **settings)
    assert tokens.max() < 295
    kept = logits.softmax(-1).sort(-1, descending=True)
    before = kept.values.cumsum(-1) - kept.values
    rank = (kept.indices == tokens[:, None]).long().argmax(-1, keepdim=True)
    assert (before.gather(-1, rank) < settings.get("top_p", 2.0)).all()
    assert (rank < settings.get("top_k", 300)).all()


def test_sample_tokens_greedy_and_temperature():
    assert draw([0.0, 0.99], temperature=0) == [1, 1]
    # temperature .5 squares: .0225, .25, .0025, .09 over .365 -> cumulative .0616, .7466, .7534, 1
    uniforms = [0.061, 0.062, 0.746, 0.747, 0.753, 0.754]
    assert draw(uniforms, temperature=0.5) == [0, 1, 1, 2, 2, 3]


def test_top_p_keeps_the_token_that_crosses_it():
    # .6: token 1 (.5) does not reach it, token 3 crosses it and stays; the border is .5 / .8 = .625
    assert draw([0.0, 0.62, 0.63, JUST_BELOW_1], top_p=0.6) == [1, 1, 3, 3]
    assert draw([0.0, JUST_BELOW_1], top_p=0.4) == [1, 1]  # the first token always stays
    # .9: tokens 0, 1 and 3 stay, cumulative .15 / .95, .65 / .95, 1
    assert draw([0.15, 0.16, 0.68, 0.69, JUST_BELOW_1], top_p=0.9) == [0, 1, 1, 3, 3]


def test_top_k_keeps_the_likeliest_and_top_p_their_nucleus():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().expand(5, -1)
    uniforms = torch.tensor([0.0, 0.3, 0.56, 0.58, 0.99])

    def pick(**settings):
        return sample(logits, uniforms, **settings).tolist()

    assert pick(top_k=2) == [0, 0, 0, 1, 1]  # 4/7 = 0.571 and 3/7
    assert pick(top_k=9) == [0, 0, 1, 1, 3] == pick()
    # of 4/9, 3/9, 2/9 the first two reach 0.75; without top_k three would stay
    assert pick(top_k=3, top_p=0.75) == [0, 0, 0, 1, 1]
    assert pick(top_k=1) == [0] * 5


def test_banned_tokens_are_never_sampled():
    logits = PROBS.log().clone()
    logits[[1, 2]] = -INF
    sampled = sample(logits.expand(1001, -1), torch.linspace(0, JUST_BELOW_1, 1001))
    assert set(sampled.tolist()) == {0, 3}
    # .3 / (.3 + .15)
    assert (sampled == 3).float().mean().item() == pytest.approx(2 / 3, abs=0.002)


def test_row_uniforms_depend_on_their_own_seed_only():
    rows = row_uniforms([7, 8, 7], 20)
    assert rows.shape == (3, 20) and rows.min() >= 0 and rows.max() < 1
    assert torch.equal(rows[0], rows[2]) and not torch.equal(rows[0], rows[1])
    assert torch.equal(row_uniforms([8], 20)[0], rows[1])
    state = torch.get_rng_state()
    row_uniforms([7], 5)
    assert torch.equal(torch.get_rng_state(), state)


# -------------------------------------------------------------------------------------- rollouts


def rows_of(samples):
    """The completions as lists of token ids, without padding."""
    rows = zip(samples.tokens, samples.mask, strict=True)
    return [row[valid].tolist() for row, valid in rows]


def every(step, model):
    """Each step-th id of the vocabulary: with so many ends, rows end at different steps."""
    return list(range(0, model.config.text_config.vocab_size, step))


def test_rollout_is_reachable_from_grpo():
    assert grpo.rollout is rollout


def test_greedy_rollout_is_hf_generate(items, talker):
    eos = talker.config.text_config.eos_token_id
    banned = banned_ids(talker)
    settings = Sampling(12, temperature=0, eos_ids=[eos], banned_ids=banned)
    samples = rollout(talker, collate(items, talker), [1, 2, 1, 1], [0] * 5, settings)
    rows = rows_of(samples)
    assert rows[1] == rows[2]
    assert len({token for row in rows for token in row}) > 10  # not one token over and over
    for item, row in zip(items, [rows[0], rows[1], rows[3], rows[4]], strict=True):
        generated = talker.generate(
            **hf_inputs(item, talker),
            do_sample=False,
            max_new_tokens=12,
            suppress_tokens=banned,
            eos_token_id=eos,
            pad_token_id=0,
        )
        assert row == generated[0, len(item.input_ids) :].tolist()


def test_sampled_logps_are_those_of_the_packed_forward(items, talker):
    """A token's uniform falls in its interval of the plain forward's distribution (top_p 1)."""
    banned = banned_ids(talker)
    settings = Sampling(6, top_p=1.0, banned_ids=banned)
    samples = rollout(talker, collate(items, talker), [2] * 4, range(8), settings)
    for index, row in enumerate(samples.tokens):
        item = items[index // 2]
        with torch.no_grad():
            logits = talker(**hf_inputs(item, talker, row)).logits[0, len(item.input_ids) - 1 : -1]
        logits = logits.index_fill(-1, torch.tensor(banned), -INF)
        probs = logits.softmax(-1)
        above = probs.cumsum(-1).gather(-1, row[:, None]).squeeze(1)
        below = above - probs.gather(-1, row[:, None]).squeeze(1)
        uniform = row_uniforms([index], 6)[0]
        assert ((below - 1e-4 <= uniform) & (uniform <= above + 1e-4)).all()


def test_rollout_gives_the_log_probs_of_a_forward(items, talker):
    prompts = collate(items, talker)
    ends = every(5, talker)
    settings = Sampling(8, 0.7, 0.9, 50, eos_ids=ends, banned_ids=banned_ids(talker))
    tokens, mask, logp, ended, _ = rollout(talker, prompts, [2] * 4, range(8), settings)
    assert len(set(mask.sum(1).tolist())) > 2
    # Whether the last token of a completion is one that ends it.
    last = tokens.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
    assert (
        torch.equal(ended, torch.isin(last, torch.tensor(ends))) and len(set(ended.tolist())) == 2
    )
    with torch.no_grad():
        scored = Policy(talker)(prompts, tokens.view(4, 2, -1), mask.view(4, 2, -1))
    expected = scored.logp.flatten(0, 1)  # at temperature 1, over the whole vocabulary
    # not 1e-5: behind a video positions are large numbers, and so is the rounding of their angles
    torch.testing.assert_close(logp[mask], expected[mask], atol=3e-5, rtol=0)
    assert (logp[~mask] == 0).all() and (logp[mask] < -0.01).any()


@pytest.mark.parametrize("steps", [1, 20])
def test_fixed_shapes_sample_the_same(items, talker, steps):
    """Rows end at different steps; prompts have different lengths and numbers of completions."""
    options = dict(eos_ids=every(8, talker), banned_ids=banned_ids(talker))
    rows = talker, collate(items, talker), [3, 1, 2, 2], range(8)
    plain = rollout(*rows, Sampling(steps, 0.7, 0.9, 50, **options))
    fixed = rollout(*rows, Sampling(steps, 0.7, 0.9, 50, graph=True, **options))
    assert steps == 1 or len(set(plain.mask.sum(1).tolist())) > 3
    assert torch.equal(fixed.tokens, plain.tokens) and torch.equal(fixed.mask, plain.mask)
    assert torch.equal(fixed.ended, plain.ended)
    torch.testing.assert_close(fixed.logp, plain.logp, atol=1e-4, rtol=0)


def test_what_a_step_attends_to(items, talker, monkeypatch):
    """Fixed columns in multiples of 8, a growing cache by the token; no mask without padding."""
    shapes = []

    def record(query, keys, values, seen, scaling):
        shapes.append((keys[0].shape[2], keys[1].shape[3], seen.shape[-1]))
        return attend_apart(query, keys, values, seen, scaling)

    monkeypatch.setattr(policy, "attend_apart", record)
    for rows, graph in ((items, True), (items, False), (items[:1], False)):
        prompts = collate(rows, talker)
        length = prompts.input_ids.shape[1]
        shapes.clear()
        settings = Sampling(6, graph=graph, banned_ids=banned_ids(talker))
        rollout(talker, prompts, [2] * len(rows), range(2 * len(rows)), settings)
        if graph:
            assert set(shapes) == {(length + -length % 8, 8, length + -length % 8 + 8)}
        else:
            steps = range(1, 6)
            padded = len(rows) > 1
            assert set(shapes) == {(length, t, length + t if padded else 1) for t in steps}


def test_other_families_sample_what_their_plain_forward_likes_best(other_family):
    model, family_items = other_family
    prompts = collate(family_items, model)
    banned = banned_ids(model)
    greedy = Sampling(5, temperature=0, banned_ids=banned)
    samples = rollout(model, prompts, [1, 1, 1], [0, 1, 2], greedy)
    assert samples.mask.all()
    for item, row in zip(family_items, samples.tokens, strict=True):
        inputs = hf_inputs(item, model, row)
        inputs.pop("second_per_grid_ts", None)
        with torch.no_grad():
            logits = model(**inputs).logits[0, len(item.input_ids) - 1 : -1]
        logits[:, banned] = -torch.inf
        assert torch.equal(logits.argmax(-1), row)
    # the same in fixed shapes
    rows = model, prompts, [2, 1, 2], range(5)
    plain = rollout(*rows, Sampling(6, banned_ids=banned))
    fixed = rollout(*rows, Sampling(6, graph=True, banned_ids=banned))
    assert torch.equal(fixed.tokens, plain.tokens)


def test_rows_of_other_families_that_have_ended_leave_the_batch(other_family):
    model, family_items = other_family
    settings = Sampling(12, eos_ids=every(6, model), banned_ids=banned_ids(model))

    def sample(which, seeds):
        prompts = collate([family_items[index] for index in which], model)
        return rows_of(rollout(model, prompts, [1] * len(which), seeds, settings))

    together = sample([0, 1, 2, 0, 1, 2], range(6))
    assert len({len(row) for row in together}) > 2
    assert together == [sample([number % 3], [number])[0] for number in range(6)]


def test_a_row_depends_on_its_own_seed_only(items, talker):
    settings = Sampling(20, eos_ids=every(12, talker), banned_ids=banned_ids(talker))

    def sample(which, counts, seeds):
        prompts = collate([items[index] for index in which], talker)
        return rows_of(rollout(talker, prompts, counts, seeds, settings))

    seeds = [13, 14, 15, 20, 30, 31, 40, 41]
    together = sample([0, 1, 2, 3], [3, 1, 2, 2], seeds)
    assert len({len(row) for row in together}) >= 4 and len({tuple(row) for row in together}) == 8
    owners = [0, 0, 0, 1, 2, 2, 3, 3]
    for row, owner, seed in zip(together, owners, seeds, strict=True):
        assert sample([owner], [1], [seed]) == [row]
    others = sample([3, 2, 0], [1, 1, 2], [seeds[row] for row in (7, 4, 2, 0)])
    assert others == [together[7], together[4], together[2], together[0]]


def test_rollout_stops_at_eos_and_pads_with_it(items, talker):
    banned = banned_ids(talker)
    rows = talker, collate(items[:1], talker), [4], [1, 2, 3, 4]
    free = rollout(*rows, Sampling(16, banned_ids=banned)).tokens
    eos = [int(free[0, 3]), int(free[1, 7])]  # by construction at least two rows end
    tokens, mask, *_ = rollout(*rows, Sampling(16, eos_ids=eos, banned_ids=banned))
    assert tokens.shape == mask.shape and mask.dtype == torch.bool
    for row, full, valid in zip(tokens, free, mask, strict=True):
        ends = torch.isin(full, torch.tensor(eos)).nonzero()
        length = int(ends[0]) + 1 if len(ends) else 16
        assert valid.tolist() == [True] * length + [False] * (mask.shape[1] - length)
        assert torch.equal(row[:length], full[:length])
        assert (row[length:] == eos[0]).all()
    assert mask[0].sum() <= 4 and mask[1].sum() <= 8


def test_rollout_is_no_longer_than_its_longest_row(items, talker):
    prompts = collate(items[:1], talker)
    free = rollout(talker, prompts, [1], [1], Sampling(16, temperature=0)).tokens
    eos = int(free[0, 2])
    settings = Sampling(16, temperature=0, eos_ids=[eos])
    samples = rollout(talker, prompts, [2], [1, 2], settings)
    length = free[0].tolist().index(eos) + 1
    assert samples.tokens.shape == (2, length) and samples.mask.all()


def test_banned_ids_never_appear(items, talker):
    rows = talker, collate(items[:2], talker), [4, 4], range(8)
    free = rollout(*rows, Sampling(10, temperature=0)).tokens
    favourites = set(free.flatten().tolist())
    for temperature in (0, 1.0):
        settings = Sampling(10, temperature, banned_ids=sorted(favourites))
        assert not set(rollout(*rows, settings).tokens.flatten().tolist()) & favourites


@pytest.mark.parametrize("graph", [False, True])
def test_a_prompt_is_encoded_and_prefilled_once(items, talker, graph):
    towers = []
    inputs = []
    model = copy.deepcopy(talker)
    model.model.visual.register_forward_pre_hook(
        lambda tower, args, kwargs: towers.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    model.model.language_model.register_forward_pre_hook(
        lambda language, args, kwargs: inputs.append(kwargs["inputs_embeds"].shape[:2]),
        with_kwargs=True,
    )
    prompts = collate(items, model)
    settings = Sampling(5, graph=graph, banned_ids=banned_ids(model))
    rollout(model, prompts, [3, 1, 2, 2], range(8), settings)
    assert towers == [3]  # two videos and an image, whatever the number of completions
    # then a token a completion; prompts of fewer are filled up
    assert inputs == [prompts.input_ids.shape] + 4 * [(4, 3)]


def test_texts_begin_with_what_the_prompt_has_said(talker, toy_processor, items):
    thinking = copy.copy(toy_processor)
    thinking.chat_template = toy_processor.chat_template.replace(
        "assistant\n", "assistant\n<think>\n"
    )
    rows = collate([items[3]], talker), [2], [0, 1], Sampling(6)
    plain = sample_texts(talker, toy_processor, *rows)
    opened = sample_texts(talker, thinking, *rows)
    assert torch.equal(plain.tokens, opened.tokens)
    assert opened.texts == [f"<think>\n{text}" for text in plain.texts]


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory")])
def test_sampling_lends_the_weights_and_puts_linear_back(toy_model, error, monkeypatch):
    engine = SimpleNamespace(module=SimpleNamespace(model=toy_model), twin=hookless_twin(toy_model))
    hooked = []
    hook = toy_model.model.visual.register_forward_hook(lambda *_: hooked.append(1))
    plain = torch.nn.functional.linear
    # as DeepSpeed's zero.Init leaves it
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: plain(*args))
    wrapped = torch.nn.functional.linear
    toy_model.train()
    raised = pytest.raises(RuntimeError, match="out of memory") if error else nullcontext()
    with raised, sampling(engine) as bare:
        assert not bare.training and toy_model.training and torch.nn.functional.linear is plain
        pairs = zip(bare.parameters(), toy_model.parameters(), strict=True)
        assert all(one.data_ptr() == two.data_ptr() for one, two in pairs)
        assert bare.lm_head.weight is bare.get_input_embeddings().weight  # tied, as in the model
        if error:
            raise error
    assert torch.nn.functional.linear is wrapped and hooked == []
    assert all(parameter.numel() == 0 for parameter in engine.twin.parameters())
    hook.remove()
    toy_model.eval()


def test_prompts_are_batched_by_their_tokens():
    lengths = [10, 500, 480, 20, 3000, 15]
    # 2 rows of 500 + 100 tokens fit 1200, 3000 + 100 alone do not, 3 of 20 + 100 do.
    assert token_batches(lengths, 100, 1200) == [[4], [1, 2], [3, 5, 0]]
    assert token_batches([7, 7, 7, 7, 7], 3, 20) == [[0, 1], [2, 3], [4]]
    assert token_batches([], 3, 20) == []
    # What 32 prompts of 16k tokens would need 31 GB for
    assert max(map(len, token_batches([16_384] * 32, 1024))) == 7
    assert len(token_batches([200] * 64, 256)) == 1


def test_answers_in_batches_are_those_of_one_batch(items, talker, toy_processor):
    """Each with its own seed, wherever it stands; the first two batches hold one prompt each."""
    settings = Sampling(9, temperature=1.0)
    seeds = [5, 6, 7, 8]
    found = []
    for budget in (10**6, max(len(item.input_ids) for item in items) + 9):
        texts = {}
        layers = {"hidden_layers": (-1,)}
        answers = answer_inputs(talker, toy_processor, items, seeds, settings, budget, **layers)
        for batch in answers:
            assert batch.prompts.input_ids.shape[0] == len(batch.places)
            assert batch.scored.hidden[-1].shape[0] == len(batch.places)
            texts |= dict(zip(batch.places, batch.samples.texts, strict=True))
        found.append([texts[place] for place in range(len(items))])
    assert found[0] == found[1] and len(set(found[0])) == 4


# ------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("heads", [2, 4])
def test_completions_attend_to_their_prompt_and_themselves(heads):
    """Against torch's attention of each completion by itself, which copies the prompt for it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    batch, width, prompt, own, size = 2, 3, 11, 5, 8
    query = normal(batch, heads, width, size)
    keys = normal(batch, 2, prompt, size), normal(batch, 2, width, own, size)
    values = normal(batch, 2, prompt, size), normal(batch, 2, width, own, size)
    seen = torch.ones(batch, 1, 1, prompt + own, dtype=torch.bool)
    seen[0, ..., :4] = False  # padding
    seen[..., -1] = False  # a column that is not written yet
    with FlopCounterMode(display=False) as counter:
        found = attend_apart(query, keys, values, seen, 0.3)
    for b in range(batch):
        for w in range(width):
            both = [torch.cat([part[0][b], part[1][b, :, w]], 1)[None] for part in (keys, values)]
            expected = torch.nn.functional.scaled_dot_product_attention(
                query[b, None, :, w, None], *both, seen[b], scale=0.3, enable_gqa=True
            )
            torch.testing.assert_close(found[b, w], expected[0, :, 0], atol=1e-6, rtol=1e-5)
    # scores and sums over P + T columns of each completion, not over those of its siblings
    assert counter.get_total_flops() == 2 * 2 * batch * heads * width * (prompt + own) * size
