"""common/policy.py: hand-derived numbers for attention and frame use; plain Hugging Face forwards
and eager attention as oracles for the rest.
"""

import copy
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import banned_ids, hf_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig
from warm import run_script

from common import policy as policy_module
from common.data import DataError
from common.policy import (
    Layout,
    Policy,
    blank_image,
    checkpoint_activations,
    collate,
    encode_media,
    group_attention,
    read_config,
    speed_up_vision,
)
from common.rollout import Sampling, rollout
from grpo import group_advantages, policy_loss, rollout_frame_use, token_weights

NAN, INF = float("nan"), float("inf")


# ------------------------------------------------------------------------------ the vision tower


def vision_numbers(model, pixels, grid, faster):
    """Features of three media, and the gradients of all weights of the vision tower."""
    visual = copy.deepcopy(model.model.visual)
    visual.patch_embed.proj.__class__ = torch.nn.Conv3d
    visual.config._attn_implementation = "sdpa"
    if hasattr(visual, "fullatt_block_indexes"):
        visual.fullatt_block_indexes = [1]  # windows in the first block
    holder = SimpleNamespace(model=SimpleNamespace(visual=visual))
    if faster:
        speed_up_vision(holder)
        assert visual.config._attn_implementation == "flash_windows"
        assert type(visual.patch_embed.proj) is not torch.nn.Conv3d
    features = encode_media(holder, pixels, grid)
    visual.zero_grad()
    sum(
        (feature * torch.linspace(-1, 1, feature.shape[1])).sum() for feature in features
    ).backward()
    gradients = {n: p.grad for n, p in visual.named_parameters() if p.grad is not None}
    return features, gradients


def check_vision(model):
    grid = torch.tensor([[2, 4, 6], [1, 4, 4], [3, 2, 10]])
    pixels, _ = blank_image(model.config, "cpu")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(int(grid.prod(1).sum()), pixels.shape[1], generator=generator)
    plain, slow = vision_numbers(model, pixels, grid, faster=False)
    fast, quick = vision_numbers(model, pixels, grid, faster=True)
    for one, two in zip(plain, fast, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)
    assert slow.keys() == quick.keys() and len(slow) > 10
    for name in slow:
        torch.testing.assert_close(slow[name], quick[name], atol=1e-3, rtol=1e-3, msg=name)


def test_windows_of_a_vision_tower_in_batches(toy_model):
    check_vision(toy_model)


def test_windows_of_another_familys_tower_in_batches(other_family):
    check_vision(other_family[0])


# ------------------------------------------------------------------------------------- the mask


def test_group_attention_sees_what_a_mask_by_hand_allows():
    # two rows, 4 query heads on 2 key heads; columns: p0 p1 p2 a0 a1 b0 b1, p0 of the second row is
    # padding
    causal = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0],
            [1, 1, 1, 1, 1, 0, 0],
            [1, 1, 1, 0, 0, 1, 0],  # b0: not a
            [1, 1, 1, 0, 0, 1, 1],
        ]
    ).bool()
    allowed = torch.stack([causal, causal])[:, None].clone()
    allowed[1, :, 1:, 0] = False
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 7, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2)
    )
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    weights = scores.masked_fill(~allowed, -INF).softmax(-1)
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)  # (B, S, heads, d)
    valid = torch.ones(2, 7, 1, 1)
    valid[1, 0] = 0
    probe = torch.randn(2, 7, 4, 8, generator=generator) * valid
    grads = torch.autograd.grad((expected * probe).sum(), (query, key, value))
    module = SimpleNamespace(layer_idx=1)
    for checkpointed in (False, True):
        layout = Layout([0, 1], group=2, length=2, layer=2, checkpointed=checkpointed)
        with torch.no_grad():
            key[1, :, 0], value[1, :, 0] = 99.0, NAN  # padding holds poison
        attended, _ = group_attention(module, query, key, value, None, layout, scaling=0.3)
        torch.testing.assert_close(attended * probe, expected * probe)
        for one, two in zip(
            torch.autograd.grad((attended * probe).sum(), (query, key, value)), grads, strict=True
        ):
            torch.testing.assert_close(one[0], two[0], atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(one[1, :, 1:], two[1, :, 1:], atol=1e-6, rtol=1e-5)
            assert one[1, :, 0].abs().max() == 0
        shares = weights.mean(1)[:, 3:, :3].unflatten(1, (2, 2))  # (B, G, T, P)
        recorded = torch.stack(layout.recorded)
        torch.testing.assert_close(recorded, shares.detach())
        assert recorded[1, :, :, 0].abs().max() == 0 and not recorded.requires_grad


# --------------------------------------------------------- the model, against plain Hugging Face


@pytest.fixture(scope="module")
def group(items, toy_model):
    """(prompts, completions (4, 3, 5), mask) of random tokens with different lengths."""
    prompts = collate(items, toy_model)
    assert len({len(item.input_ids) for item in items}) >= 3 and prompts.slots == [3, 1, 3, 0]
    completions = torch.randint(0, 256, (4, 3, 5), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([[5, 2, 4], [1, 5, 3], [4, 4, 2], [3, 1, 5]])
    return prompts, completions, torch.arange(5) < lengths[..., None]


def hf_logps(model, items, completions, mask):
    """(B, G, T) log-probs from one plain forward a rollout; 0 on padding."""
    rows = []
    for b, item in enumerate(items):
        for g in range(completions.shape[1]):
            completion = completions[b, g][mask[b, g]]
            logits = model(**hf_inputs(item, model, completion)).logits[
                0, len(item.input_ids) - 1 : -1
            ]  # (L, V)
            logp = torch.log_softmax(logits.float(), -1).gather(-1, completion[:, None]).squeeze(1)
            rows.append(torch.cat([logp, logp.new_zeros(completions.shape[2] - len(completion))]))
    return torch.stack(rows).view(completions.shape)


def gradients(model, loss):
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameters[name]) if grad is None else grad
        for name, grad in zip(parameters, grads, strict=True)
    }


@contextmanager
def checkpointing(model, on):
    """The model in train mode with its layers checkpointed, or as it is."""
    if on:
        checkpoint_activations(model)
        model.train()
    yield
    checkpoint_activations(model, on=False)
    model.eval()


def assert_same_gradients(one, other, atol=1e-5):
    for name in one:
        scale = max(1.0, one[name].abs().max().item())
        torch.testing.assert_close(
            other[name] / scale,
            one[name] / scale,
            atol=atol,
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_collate_gives_hf_positions(items, toy_model):
    prompts = collate(items, toy_model)
    for row, item in enumerate(items):
        length = len(item.input_ids)
        assert (
            prompts.mask[row].tolist()
            == [False] * (prompts.mask.shape[1] - length) + [True] * length
        )
        assert torch.equal(prompts.input_ids[row, -length:], item.input_ids)
        inputs = hf_inputs(item, toy_model)
        if item.grid_thw is None:
            expected = torch.arange(length).expand(3, -1)
        else:
            expected = toy_model.model.get_rope_index(
                **{name: value for name, value in inputs.items() if "pixel" not in name}
            )[0][:, 0]
        assert torch.equal(prompts.position_ids[:, row, -length:], expected)


def test_packed_repeated_and_plain_forward_agree(items, group, toy_model):
    prompts, completions, mask = group
    policy = Policy(toy_model)
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2)) * mask
    expected = hf_logps(toy_model, items, completions, mask)
    expected_grads = gradients(toy_model, (expected * weights).sum())
    assert all(
        grad.abs().max() > 1e-3 for name, grad in expected_grads.items() if name.endswith("weight")
    )  # the comparison says something
    for packed, on in product((True, False), (True, False)):
        with checkpointing(toy_model, on):
            logp = policy(prompts, completions, mask, packed=packed).logp
            assert logp.shape == mask.shape
            torch.testing.assert_close(logp * mask, expected, atol=1e-5, rtol=0)
            assert_same_gradients(expected_grads, gradients(toy_model, (logp * weights).sum()))


def test_entropy_is_that_of_the_plain_forward(items, group, toy_model):
    prompts, completions, mask = group
    with torch.no_grad():
        entropy = Policy(toy_model)(prompts, completions, mask).entropy
        completion = completions[0, 2][mask[0, 2]]
        logits = toy_model(**hf_inputs(items[0], toy_model, completion)).logits[
            0, len(items[0].input_ids) - 1 : -1
        ]
    torch.testing.assert_close(
        entropy[0, 2][mask[0, 2]],
        torch.distributions.Categorical(logits=logits).entropy(),
        atol=1e-4,
        rtol=1e-4,
    )


def test_attention_is_asked_of_families_that_pack_alone(tmp_path):
    AutoConfig.for_model("qwen3_vl_moe").save_pretrained(tmp_path)
    assert read_config(tmp_path).model_type == "qwen3_vl_moe"
    words = "attention works with qwen2_vl, qwen2_5_vl, qwen3_vl, not with qwen3_vl_moe"
    with pytest.raises(DataError, match=words):
        read_config(tmp_path, needs_attention=True)


def test_token_weights_of_the_forward_are_those_of_each_groups_logits(items, group, toy_model):
    prompts, completions, mask = group
    with torch.no_grad():
        packed, repeated = (
            Policy(toy_model)(prompts, completions, mask, one, weight_alpha=1.7).weights
            for one in (True, False)
        )
        assert Policy(toy_model)(prompts, completions, mask).weights is None
        for b, item in enumerate(items):
            logits = torch.full(
                (3, 5, toy_model.config.text_config.vocab_size), NAN
            )  # poison where a rollout has ended
            for g in range(3):
                completion = completions[b, g][mask[b, g]]
                plain = toy_model(**hf_inputs(item, toy_model, completion)).logits[
                    0, len(item.input_ids) - 1 : -1
                ]
                logits[g, : len(completion)] = plain
            expected = token_weights(logits, mask[b], alpha=1.7)
            assert expected.max() == pytest.approx(1.7) and expected[
                :, mask[b].any(0)
            ].min() == pytest.approx(1)
            torch.testing.assert_close(packed[b], expected, atol=1e-4, rtol=0)
            torch.testing.assert_close(repeated[b], expected, atol=1e-4, rtol=0)


def test_hidden_states_and_attention_agree_with_repeated_and_eager(items, group, toy_model):
    prompts, completions, mask = group
    layers = {"hidden_layers": (0, 2, -1), "attention_layer": 2}
    with torch.no_grad():
        packed = Policy(toy_model)(prompts, completions, mask, **layers)
        repeated = Policy(toy_model)(prompts, completions, mask, packed=False, **layers)
    hidden = packed.hidden
    attention = packed.attention
    assert set(hidden) == {0, 2, -1} and not any(states.requires_grad for states in hidden.values())
    valid = torch.cat([prompts.mask, mask.flatten(1)], dim=1)
    for layer in hidden:
        torch.testing.assert_close(
            hidden[layer][valid], repeated.hidden[layer][valid], atol=2e-5, rtol=0
        )
    torch.testing.assert_close(attention[mask], repeated.attention[mask], atol=1e-5, rtol=0)

    eager = copy.deepcopy(toy_model)
    eager.set_attn_implementation("eager")
    prompt_length = prompts.mask.shape[1]
    for b, item in enumerate(items):
        for g in range(3):
            completion, length = completions[b, g][mask[b, g]], len(item.input_ids)
            with torch.no_grad():
                output = eager(
                    **hf_inputs(item, eager, completion),
                    output_attentions=True,
                    output_hidden_states=True,
                )
            expected = output.attentions[1][0].mean(0)[length:, :length]  # (L, prompt)
            recorded = attention[b, g][mask[b, g]]
            torch.testing.assert_close(
                recorded[:, prompt_length - length :], expected, atol=1e-5, rtol=0
            )
            assert (
                recorded[:, : prompt_length - length].abs().max() == 0
                if prompt_length > length
                else True
            )
            begin = prompt_length + g * 5
            for layer in (0, 2, -1):
                states = hidden[layer][b, begin : begin + 5][mask[b, g]]
                torch.testing.assert_close(
                    states, output.hidden_states[layer][0, length:], atol=2e-5, rtol=0
                )
                states = hidden[layer][b, prompt_length - length : prompt_length]
                torch.testing.assert_close(
                    states, output.hidden_states[layer][0, :length], atol=2e-5, rtol=0
                )


@pytest.mark.parametrize("packed", [True, False])
def test_padding_tokens_change_nothing(group, toy_model, packed):
    prompts, completions, mask = group
    other = copy.copy(prompts)
    other.input_ids = torch.where(prompts.mask, prompts.input_ids, torch.tensor(77))
    poisoned = torch.where(mask, completions, torch.tensor(99))
    results = []
    for inputs in ((prompts, completions), (other, poisoned)):
        scored = Policy(toy_model)(
            *inputs, mask, packed=packed, hidden_layers=(-1,), attention_layer=1
        )
        valid = torch.cat([prompts.mask, mask.flatten(1)], dim=1)
        logp = scored.logp[mask]
        numbers = (logp, scored.hidden[-1][valid], scored.attention[mask])
        results.append((*numbers, gradients(toy_model, logp.sum())))
    for one, two in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
    assert_same_gradients(results[0][3], results[1][3])


def test_text_alone_keeps_the_vision_tower_in_the_graph(items, toy_model):
    prompts = collate([items[3], items[3]], toy_model)
    assert prompts.pixel_values is None
    completions, mask = (
        torch.randint(0, 256, (2, 2, 3), generator=torch.Generator().manual_seed(0)),
        torch.ones(2, 2, 3).bool(),
    )
    logp = Policy(toy_model)(prompts, completions, mask).logp
    torch.testing.assert_close(
        logp, hf_logps(toy_model, [items[3]] * 2, completions, mask), atol=1e-5, rtol=0
    )
    vision = [parameter for name, parameter in toy_model.named_parameters() if ".visual." in name]
    grads = torch.autograd.grad(
        logp.sum(), vision
    )  # raises if one is unused: ZeRO-3 would then wait for ranks that use it
    assert all(grad.abs().max() == 0 for grad in grads)


def test_other_kernels_repeat_the_prompt_and_say_so(items, group, toy_model, talker, monkeypatch):
    said = []
    monkeypatch.setattr(policy_module.logger, "warning_once", said.append)
    prompts, completions, mask = group
    eager = copy.deepcopy(toy_model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        scored = Policy(eager)(prompts, completions, mask, hidden_layers=(-1,))
        expected = Policy(toy_model)(prompts, completions, mask, hidden_layers=(-1,))
    assert len(said) == 1 and "eager" in said[0] and "repeats its prompt" in said[0]
    torch.testing.assert_close(scored.logp[mask], expected.logp[mask], atol=1e-5, rtol=0)
    valid = torch.cat([prompts.mask, mask.flatten(1)], dim=1)
    states = scored.hidden[-1][valid]
    torch.testing.assert_close(states, expected.hidden[-1][valid], atol=2e-5, rtol=0)
    assert scored.attention is None
    with pytest.raises(ValueError, match="no attention of layer 1"):
        Policy(eager)(prompts, completions, mask, attention_layer=1)

    eager = copy.deepcopy(talker)
    eager.set_attn_implementation("eager")
    settings = Sampling(6, eos_ids=range(100), banned_ids=banned_ids(talker))
    repeated = rollout(eager, prompts, [2, 1, 3, 1], range(7), settings)
    packed = rollout(talker, prompts, [2, 1, 3, 1], range(7), settings)
    assert torch.equal(repeated.tokens, packed.tokens)
    assert torch.equal(repeated.mask, packed.mask)
    assert len(set(packed.mask.sum(1).tolist())) > 1


def test_a_packing_model_still_generates_alone_and_saves_no_trace(
    items, toy_model, talker, tmp_path
):
    plain = copy.deepcopy(talker)
    plain.model.language_model.config._attn_implementation = "sdpa"
    packing = Policy(copy.deepcopy(plain)).model
    ids = torch.tensor([[0, 0, 40, 41, 42], [50, 51, 52, 53, 54]])
    options = dict(
        attention_mask=torch.tensor([[0, 0, 1, 1, 1], [1] * 5]), max_new_tokens=4, do_sample=False
    )
    assert torch.equal(packing.generate(ids, **options), plain.generate(ids, **options))
    packing.save_pretrained(tmp_path)
    assert '"group"' not in (tmp_path / "config.json").read_text()


def test_other_families_agree_with_their_plain_forward(other_family):
    model, family_items = other_family
    prompts = collate(family_items, model)
    completions = torch.randint(0, 256, (3, 2, 4), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(4) < torch.tensor([[4, 2], [3, 4], [1, 4]])[..., None]
    rows = []
    for b, item in enumerate(family_items):
        for completion, valid in zip(completions[b], mask[b], strict=True):
            inputs = hf_inputs(item, model, completion[valid])
            inputs.pop("second_per_grid_ts", None)
            logits = model(**inputs).logits[0, len(item.input_ids) - 1 : -1]
            logp = torch.log_softmax(logits, -1).gather(-1, completion[valid][:, None]).squeeze(1)
            rows.append(torch.nn.functional.pad(logp, (0, 4 - len(logp))))
    expected = torch.stack(rows).view(3, 2, 4)
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(2)) * mask
    grads = gradients(model, (expected * weights).sum())
    assert all(grad.abs().max() > 1e-4 for name, grad in grads.items() if name.endswith("weight"))
    policy, atol = (
        Policy(model),
        1e-4 if model.config.model_type == "qwen3_5" else 1e-5,
    )  # its recurrence adds up in another order
    assert policy.packs == (model.config.model_type in ("qwen2_vl", "qwen3_vl"))
    layer = 1 if policy.packs else None
    for packed, on in product((True, False), (True, False)):
        with checkpointing(model, on):
            scored = policy(
                prompts, completions, mask, packed, hidden_layers=(-1,), attention_layer=layer
            )
            logp = scored.logp
            torch.testing.assert_close(logp * mask, expected, atol=1e-5, rtol=0)
            assert_same_gradients(grads, gradients(model, (logp * weights).sum()), atol)
        uses = [rollout_frame_use(prompts, mask, scored.hidden[-1])]
        if policy.packs:
            uses.append(rollout_frame_use(prompts, mask, attention=scored.attention))
        assert all(len(use[0][0]) == 3 and use[1] == use[2] == [None, None] for use in uses)


@pytest.mark.parametrize("packed", [True, False])
def test_chunks_of_the_vocabulary_change_nothing(group, toy_model, packed, monkeypatch):
    prompts, completions, mask = group
    results = []
    for size in (
        1 << 25,
        4 * 3 * 2 * toy_model.config.text_config.vocab_size,
    ):  # one chunk; chunks of two positions, the last of one
        monkeypatch.setattr(policy_module, "CHUNK_LOGITS", size)
        scored = Policy(toy_model)(prompts, completions, mask, packed, weight_alpha=1.7)
        grads = gradients(toy_model, (scored.logp * mask).sum())
        results.append((scored.logp, scored.entropy, scored.weights, grads))
    for one, two in zip(results[0][:3], results[1][:3], strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
    assert_same_gradients(results[0][3], results[1][3])


def test_no_tensor_of_all_logits_lives(toy_model, group, monkeypatch):
    prompts, completions, mask = group
    vocabulary, largest = toy_model.config.text_config.vocab_size, 0
    monkeypatch.setattr(policy_module, "CHUNK_LOGITS", 4 * 3 * vocabulary)  # one position

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            for tensor in output if isinstance(output, (tuple, list)) else [output]:
                if (
                    torch.is_tensor(tensor)
                    and tensor.shape[-1:] == (vocabulary,)
                    and tensor.shape != toy_model.lm_head.weight.T.shape
                ):
                    largest = max(largest, tensor.numel())
            return output

    with Watch():
        scored = Policy(toy_model)(prompts, completions, mask, weight_alpha=1.7)
        (scored.logp * scored.weights)[mask].sum().backward()
    assert largest == policy_module.CHUNK_LOGITS


PEAK = """
import re, sys, torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from common.policy import Policy, Prompts
from grpo import policy_loss

def memory(name):
    status = open("/proc/self/status").read()
    return int(re.search(name + r":\\s+(\\d+) kB", status)[1]) * 1024 / 1e9

rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
text = dict(vocab_size=151936, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, rope_parameters=rope,
            pad_token_id=None, eos_token_id=None, bos_token_id=None)
vision = dict(depth=1, hidden_size=64, num_heads=4, intermediate_size=128, out_hidden_size=128)
config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa")
ids, positions = torch.randint(20, 9999, (1, 512)), torch.arange(512).expand(3, 1, -1)
prompts = Prompts(ids, ids > 0, positions, 0 * ids, None, None, [0], [0])
completions, mask = torch.randint(20, 9999, (1, 8, 256)), torch.ones(1, 8, 256).bool()
before = memory("VmRSS")
scored = Policy(model)(prompts, completions, mask, weight_alpha=1.7)
logp, mask, weights = scored.logp[0], mask[0], scored.weights[0]
policy_loss(logp, logp.detach(), torch.randn(8), mask, weights=weights)[0].backward()
assert model.lm_head.weight.grad.abs().max() > 0
print("GB over the model:", memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_peak_memory_of_a_large_vocabulary(tmp_path):
    # 2,048 tokens x 151,936 x 4 bytes are 1.25 GB once; the logits, their log-softmax and two
    # gradients would be four times that
    (tmp_path / "peak.py").write_text(PEAK)
    done = run_script(tmp_path / "peak.py")
    print(done.stdout)
    assert float(done.stdout.split("model:")[1]) < 1.25


@pytest.mark.parametrize("packed", [True, False])
def test_features_of_a_frozen_tower_are_shared(group, toy_model, packed):
    prompts, completions, mask = group
    with torch.no_grad():
        features = Policy(toy_model).encode(prompts)
        expected = Policy(toy_model)(prompts, completions, mask).logp
        shared = replace(
            prompts, features=features, pixel_values=torch.full_like(prompts.pixel_values, NAN)
        )  # not read again
        torch.testing.assert_close(
            Policy(toy_model)(shared, completions, mask, packed).logp, expected, atol=1e-5, rtol=0
        )


def test_one_step_moves_every_parameter(group, toy_model):
    prompts, completions, mask = group
    model = copy.deepcopy(toy_model).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    logp = Policy(model)(prompts, completions, mask).logp.flatten(0, 1)
    advantages = group_advantages(torch.arange(12.0).view(4, 3)).flatten()
    loss, _ = policy_loss(logp, logp.detach(), advantages, mask.flatten(0, 1), logp.detach() - 0.1)
    loss.backward()
    optimizer.step()
    still = [
        name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])
    ]
    assert not still, f"did not move: {still}"
    after = Policy(model)(prompts, completions, mask).logp.flatten(0, 1)
    assert (
        policy_loss(after, logp.detach(), advantages, mask.flatten(0, 1), logp.detach() - 0.1)[0]
        < loss
    )


@pytest.mark.parametrize("layer", [-1, 0, 5])
def test_a_layer_that_does_not_exist_is_an_error(group, toy_model, layer):
    # train.py's default --frame_use_layer is -1, which with --frame_use attention would match no
    # layer and record nothing
    prompts, completions, mask = group
    with pytest.raises(ValueError, match="no attention of layer"), torch.no_grad():
        Policy(toy_model)(prompts, completions, mask, attention_layer=layer)
