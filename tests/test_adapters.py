"""reward.py's adapters: hand numbers, plain padded forwards of tiny Qwen2-VL, Qwen2.5-VL and
Qwen3-VL models, a run of TRL's trainer.
"""

import copy
import functools
import importlib.util
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import video_row

import reward
from common.data import build_prompt, load_examples
from common.media import Encoder, PromptFlags
from common.policy import Policy, collate
from grpo import rollout_frame_use

RIGHT, WRONG, LOOSE = (
    "<think>a</think><answer>B</answer>",
    "<think>a</think><answer>C</answer>",
    "so: <answer>B</answer>",
)


def chat(text):
    return [{"role": "assistant", "content": text}]


# ---------------------------------------------------------------------------- text: TRL and verl


@pytest.mark.parametrize(
    "wrap",
    [
        str,
        chat,
        lambda text: [*chat("<answer>Z</answer>"), {"role": "tool", "content": "1"}, *chat(text)],
    ],
)
def test_trl_rewards_by_hand(wrap):
    completions = [
        wrap(text) for text in (RIGHT, WRONG, LOOSE, "<answer>10</answer>", "<answer>A</answer>")
    ]
    columns = {
        "solution": ["<answer>B</answer>", "B", "B", "8", "A,C"],
        "problem_type": ["multiple choice"] * 3 + ["regression", "multiple choice"],
    }
    extra = {
        "prompts": ["p"] * 5,
        "completion_ids": [[1]] * 5,
        "trainer_state": None,
        "path": [""] * 5,
    }
    # regression: 1 - |10 - 8| / 8; "A" of "A,C" is half the set
    assert reward.trl_accuracy(completions=completions, **columns, **extra) == pytest.approx(
        [1, 0, 1, 0.75, 0.5]
    )
    assert reward.trl_format(completions=completions, **columns, **extra) == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    "completions, solution, problem_type",
    [
        ([RIGHT], ["B", "B"], ["multiple choice"]),
        ([RIGHT, RIGHT], ["B"], ["multiple choice"] * 2),
        ([RIGHT] * 2, ["B"] * 2, ["OCR"]),
    ],
)
def test_trl_accuracy_refuses_columns_of_different_lengths(completions, solution, problem_type):
    with pytest.raises(ValueError, match="zip"):
        reward.trl_accuracy(completions, solution=solution, problem_type=problem_type)


def test_verl_score_is_accuracy_plus_format():
    cases = [
        (RIGHT, "B", "multiple choice", 2),
        (WRONG, "B", "multiple choice", 1),
        (LOOSE, "<answer>B</answer>", "multiple choice", 1),
        ("B", "B", "multiple choice", 0),
        ("<think>a</think>\n<answer>10</answer>", "8", "regression", 1.75),
    ]
    for text, truth, kind, expected in cases:
        extra = {"problem_type": kind, "index": 3}
        assert reward.compute_score(
            data_source="toy", solution_str=text, ground_truth=truth, extra_info=extra
        ) == pytest.approx(expected)


# ---------------------------------------------------------- a plain forward of each model family

PAD, START, END, VIDEO, IMAGE, TIMES = (
    0,
    91,
    92,
    93,
    94,
    range(80, 90),
)  # TIMES: what stands between Qwen3-VL's frames
FAMILIES = ("Qwen2VL", "Qwen2_5_VL", "Qwen3VL")
GRIDS = torch.tensor(
    [[3, 4, 4], [2, 2, 6]]
)  # rows 0 and 2; merged by 2: 3 slots of 4 tokens, 2 slots of 3
PRIORS = [
    torch.tensor([0.05, 0.1, 0.5, 0.1, 0.25]),
    None,
    torch.tensor([0.6, 0.25, 0.1, 0.05]),
]  # 5 frames in 3 slots, text, 4 in 2
MERGED = {0: [0.15, 0.6, 0.25], 2: [0.85, 0.15]}


def make_model(family, attention):
    """A random model of three layers; weights of 0.3, so that tokens differ."""
    torch.manual_seed(1)
    vision = dict(
        depth=2,
        num_heads=2,
        patch_size=4,
        temporal_patch_size=2,
        spatial_merge_size=2,
        initializer_range=0.3,
    )
    vision |= {
        "Qwen2VL": dict(embed_dim=16, hidden_size=32, mlp_ratio=2),
        "Qwen2_5_VL": dict(
            hidden_size=16,
            intermediate_size=32,
            out_hidden_size=32,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        "Qwen3VL": dict(
            hidden_size=16,
            intermediate_size=32,
            out_hidden_size=32,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
    }[family]
    text = dict(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=PAD,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    )
    if family == "Qwen3VL":
        text |= dict(head_dim=8)
    config = getattr(transformers, f"{family}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    config._attn_implementation = attention
    return getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()


def make_batch(family):
    """input_ids (3, T) with prompts padded on the left and responses on the right, completion_mask
    (3, T), and by row: the positions of each slot's video tokens, and those of the response.
    """
    media = {0: (3, 4), 2: (2, 3)}  # row -> slots, tokens of a slot
    prompts, lengths = [], [4, 6, 5]
    for row, words in enumerate(([5, 6, 7], [8, 9, 10, 11], [12])):
        slots, tokens = media.get(row, (0, 0))
        if family == "Qwen3VL":  # <0.2 seconds><start><video>...<end><1.1 seconds><start>...
            runs = [
                [TIMES[slot], TIMES[slot + 3], START] + [VIDEO] * tokens + [END]
                for slot in range(slots)
            ]
        else:
            runs = [[START], *[[VIDEO] * tokens for _ in range(slots)], [END]] if slots else []
        prompts.append(sum(runs, []) + words)
    left, right = max(len(prompt) for prompt in prompts), max(lengths)
    ids, mask, positions = torch.full((3, left + right), PAD), torch.zeros(3, left + right), []
    for row, prompt in enumerate(prompts):
        ids[row, left - len(prompt) : left] = torch.tensor(prompt)
        ids[row, left : left + lengths[row]] = torch.arange(20, 20 + lengths[row]) + 10 * row
        mask[row, left : left + lengths[row]] = 1
        visual = [left - len(prompt) + at for at, token in enumerate(prompt) if token == VIDEO]
        slots, tokens = media.get(row, (0, 0))
        positions.append(
            (
                [visual[slot * tokens : (slot + 1) * tokens] for slot in range(slots)],
                range(left, left + lengths[row]),
            )
        )
    return ids, mask, positions


@functools.cache
def forward(family, attention="sdpa"):
    """The model's output for the batch, and the batch."""
    ids, mask, positions = make_batch(family)
    pixels = torch.randn(
        int(GRIDS.prod(1).sum()), 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(4)
    )
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "mm_token_type_ids": 2 * (ids == VIDEO).int(),
        "pixel_values_videos": pixels,
        "video_grid_thw": GRIDS,
    }
    if family == "Qwen2_5_VL":
        inputs["second_per_grid_ts"] = torch.tensor([0.5, 1.0])
    with torch.no_grad():
        output = make_model(family, attention)(
            **inputs,
            output_hidden_states=True,
            output_attentions=attention == "eager",
            use_cache=False,
        )
    return output, ids, mask, positions


def softmax(values):
    exponents = [math.exp(value) for value in values]
    return [value / sum(exponents) for value in exponents]


def hidden_by_hand(states, positions, merged, pool="max", tau=0.1, order="mean_softmax"):
    """R_cf of one row from Eq. 3-6, one number at a time."""
    slots, response = positions
    states = states.double().numpy()  # (T, D)
    frames = [
        [
            {"max": max, "mean": np.mean}[pool]([states[at][d] for at in slot])
            for d in range(states.shape[1])
        ]
        for slot in slots
    ]
    cosines = [
        [
            np.dot(states[at], frame) / np.linalg.norm(states[at]) / np.linalg.norm(frame)
            for frame in frames
        ]
        for at in response
    ]
    if order == "mean_softmax":
        use = softmax(
            [sum(row[slot] for row in cosines) / len(response) / tau for slot in range(len(slots))]
        )
    else:
        each = [softmax([cosine / tau for cosine in row]) for row in cosines]
        use = [sum(row[slot] for row in each) / len(response) for slot in range(len(slots))]
    return sum(p * u for p, u in zip(merged, use, strict=True))


def attention_by_hand(weights, positions, merged):
    """R_cf of one row from its attention weights (heads, T, T), one number at a time."""
    slots, response = positions
    mass = [
        sum(float(head[query, key]) for head in weights for query in response for key in slot)
        for slot in slots
    ]
    return sum(p * m / sum(mass) for p, m in zip(merged, mass, strict=True))


def assert_rewards(rewards, expected):
    """The three rows against two numbers by hand, which must not be those of a use that is equal on
    all slots.
    """
    assert rewards.dtype == torch.float32 and rewards.shape == (3,) and rewards[1] == 0
    for row, value in zip((0, 2), expected, strict=True):
        assert abs(value - 1 / len(MERGED[row])) > 1e-3  # equal use: (sum of the prior) / slots
        assert rewards[row].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"layer": 1, "pool": "mean", "tau": 0.5, "order": "softmax_mean"}]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_cfr_from_forward_by_hand(family, options):
    output, ids, mask, positions = forward(family)
    rewards = reward.cfr_from_forward(
        output.hidden_states, ids, VIDEO, GRIDS, 2, mask, PRIORS, **options
    )
    states, rest = (
        output.hidden_states[options.get("layer", -1)],
        {name: options[name] for name in options if name != "layer"},
    )
    assert_rewards(
        rewards,
        [hidden_by_hand(states[row], positions[row], MERGED[row], **rest) for row in (0, 2)],
    )


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_cfr_from_attentions_by_hand(family, layer):
    output, ids, mask, positions = forward(family, "eager")
    assert output.attentions[0].shape == (3, 4, ids.shape[1], ids.shape[1])
    rewards = reward.cfr_from_attentions(
        output.attentions, ids, VIDEO, GRIDS, 2, mask, PRIORS, **({"layer": layer} if layer else {})
    )
    weights = output.attentions[layer or 0]  # by default the first layer, as train.py's --toy
    assert_rewards(
        rewards, [attention_by_hand(weights[row], positions[row], MERGED[row]) for row in (0, 2)]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_cfr_reads_nothing_but_video_and_response(family):
    # NaN in everything that is not read changes nothing; NaN in one response token or video token
    # cannot stay unseen
    output, ids, mask, positions = forward(family, "eager")
    states, weights = output.hidden_states[-1].clone(), output.attentions[0].clone()
    rest = (ids, VIDEO, GRIDS, 2, mask, PRIORS)
    expected = (
        reward.cfr_from_forward((states.clone(),), *rest),
        reward.cfr_from_attentions((weights.clone(),), *rest),
    )
    for row, (slots, response) in enumerate(positions):
        visual = sum(slots, [])
        others = [at for at in range(ids.shape[1]) if at not in visual]
        states[row, [at for at in others if at not in response or not visual]] = math.nan
        weights[row][:, [at for at in range(ids.shape[1]) if at not in response]] = math.nan
        weights[row][:, :, others] = math.nan
    assert states.isnan().any(dim=2).sum() > 40  # padding, prompt text and the whole text row
    assert torch.equal(reward.cfr_from_forward((states,), *rest), expected[0])
    assert torch.equal(reward.cfr_from_attentions((weights,), *rest), expected[1])
    slots, response = positions[2]
    for at in (slots[0][0], slots[-1][-1], response[0], response[-1]):
        poisoned = states.clone()
        poisoned[2, at] = math.nan
        with pytest.raises(ValueError, match="probability"):
            reward.cfr_from_forward((poisoned,), *rest)
    for query, key in ((response[0], slots[0][0]), (response[-1], slots[-1][-1])):
        poisoned = weights.clone()
        poisoned[2, 0, query, key] = math.nan
        with pytest.raises(ValueError, match="nothing to normalise"):
            reward.cfr_from_attentions((poisoned,), *rest)


@pytest.mark.parametrize(
    "row, grids",
    [(0, [[3, 4, 6], [2, 2, 6]]), (2, [[3, 4, 4], [3, 2, 6]]), (0, [[2, 2, 6], [3, 4, 4]])],
)
def test_cfr_names_the_row_whose_grid_is_not_its_video(row, grids):
    output, ids, mask, _ = forward("Qwen2VL", "eager")
    rest = (ids, VIDEO, torch.tensor(grids), 2, mask, PRIORS)
    for call, tensors in (
        (reward.cfr_from_forward, output.hidden_states),
        (reward.cfr_from_attentions, output.attentions),
    ):
        grid = " x ".join(map(str, grids[row // 2]))
        with pytest.raises(
            ValueError,
            match=f"^row {row}: {12 if row == 0 else 6} video tokens, grid {grid}, merged by 2",
        ):
            call(tensors, *rest)


def test_cfr_without_grids():
    output, ids, mask, _ = forward("Qwen2VL")
    with pytest.raises(ValueError, match="^row 2: 6 video tokens"):  # a grid too few
        reward.cfr_from_forward(output.hidden_states, ids, VIDEO, GRIDS[:1], 2, mask, PRIORS)
    text = [states[1:2] for states in output.hidden_states]
    assert reward.cfr_from_forward(text, ids[1:2], VIDEO, None, 2, mask[1:2], [None]).tolist() == [
        0
    ]  # text alone: no grids at all


def test_cfr_hand_numbers():
    # merged by 1: slots of 2 tokens, max over channels (1, 0) and (0, 1); the response (3, 0) has
    # cosines 1 and 0, with tau 1 e / (e + 1)
    ids = torch.tensor([[9, 9, 9, 9, 1, 2], [9, 9, 3, 1, 2, 2]])  # 9: video
    states = torch.tensor([[[1.0, 0], [1, 0], [0, 0], [0, 1], [7, 7], [3, 0]]] * 2)
    mask, prior = (
        torch.tensor([[0, 0, 0, 0, 0, 1]] * 2),
        [torch.tensor([0.75, 0.25]), torch.tensor([1.0])],
    )
    use = math.e / (math.e + 1)
    rewards = reward.cfr_from_forward(
        [states], ids, 9, torch.tensor([[2, 1, 2], [1, 1, 2]]), 1, mask, prior, tau=1.0
    )
    torch.testing.assert_close(
        rewards, torch.tensor([0.75 * use + 0.25 * (1 - use), 0])
    )  # one slot: nothing to choose between
    # two heads look at the slots with .1 + .2 and .1 + .0, and with .0 + .1 and .4 + .1: .4 to .6
    weights = torch.zeros(2, 2, 6, 6)
    weights[:, 0, 5, :4], weights[:, 1, 5, :4] = (
        torch.tensor([0.1, 0.2, 0.1, 0.0]),
        torch.tensor([0.0, 0.1, 0.4, 0.1]),
    )
    rewards = reward.cfr_from_attentions(
        [weights], ids, 9, torch.tensor([[2, 1, 2], [1, 1, 2]]), 1, mask, prior
    )
    torch.testing.assert_close(rewards, torch.tensor([0.75 * 0.4 + 0.25 * 0.6, 0]))


# ------------------------------------------------------------------- against train.py's own path


def test_cfr_from_forward_is_what_the_packed_path_gives(toy_folder, toy_processor, toy_model):
    examples = load_examples(toy_folder / "train_cot.json")
    videos = list(
        {example.path: example for example in examples if example.media_type == "video"}.values()
    )
    text = replace(videos[0], id="text", media=[], question="Which letter is red?")
    encoder = Encoder(toy_processor, PromptFlags(min_pixels=56 * 56, max_pixels=56 * 56))
    items = [
        encoder.encode(example, video_row(frames))
        for example, frames in (
            (videos[0], [0, 10, 20, 30, 40, 50]),
            (text, []),
            (videos[1], [0, 12, 24, 36, 48, 60, 62]),
        )
    ]
    config, group = toy_model.config, 2
    priors = [
        torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.05]),
        None,
        torch.tensor([0.02, 0.03, 0.05, 0.1, 0.1, 0.1, 0.6]),
    ]
    prompts = collate(items, toy_model)
    completions = torch.randint(0, 256, (3, group, 5), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(5) < torch.tensor([[5, 2], [4, 5], [3, 5]])[..., None]
    with torch.no_grad():
        hidden = Policy(toy_model)(prompts, completions, mask, hidden_layers=(-1,)).hidden[-1]
    uses = rollout_frame_use(prompts, mask, hidden)
    expected = torch.tensor(
        [
            0.0
            if use is None
            else reward.consensus_frame_reward(reward.merge_prior(priors[b], len(use)), use)
            for b in range(3)
            for use in uses[b]
        ]
    )

    repeated, flat = prompts.repeat([group] * 3), mask.flatten(0, 1)
    grids = repeated.grid_thw  # of the videos
    ids = torch.cat(
        [
            repeated.input_ids,
            completions.flatten(0, 1).masked_fill(~flat, config.text_config.pad_token_id),
        ],
        dim=1,
    )
    seconds = torch.tensor(
        [item.second_per_grid for item in (items[0], items[2]) for _ in range(group)]
    )
    with torch.no_grad():
        output = toy_model(
            input_ids=ids,
            attention_mask=torch.cat([repeated.mask, flat], dim=1).long(),
            pixel_values_videos=repeated.pixel_values,
            video_grid_thw=grids,
            mm_token_type_ids=2 * (ids == config.video_token_id).int(),
            second_per_grid_ts=seconds,
            output_hidden_states=True,
            use_cache=False,
        )
    completion_mask = torch.cat([torch.zeros_like(repeated.mask), flat], dim=1)
    rewards = reward.cfr_from_forward(
        output.hidden_states,
        ids,
        config.video_token_id,
        grids,
        config.vision_config.spatial_merge_size,
        completion_mask,
        [p for p in priors for _ in range(group)],
    )
    assert (
        prompts.slots == [3, 0, 4] and expected.unique().numel() == 5
    )  # four rollouts with a video, and 0
    torch.testing.assert_close(rewards, expected, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------- TRL's run


def test_trl_trains_with_a_copy_of_the_file(toy_folder, toy_processor, toy_model, tmp_path):
    """Three steps of GRPOTrainer on the toy's questions, each asked about a picture."""
    # Not about its video: TRL 1.16 generates with the prompt's video but scores without it
    # (_get_per_token_logps_and_entropies takes no
    # pixel_values_videos). And no row of text alone: in a batch with pictures TRL's processor call
    # fails on its None.
    pytest.importorskip("trl")
    from datasets import Dataset
    from datasets import Image as ImageColumn
    from trl import GRPOConfig, GRPOTrainer

    shutil.copy(reward.__file__, tmp_path / "copied_reward.py")
    spec = importlib.util.spec_from_file_location("copied_reward", tmp_path / "copied_reward.py")
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    calls = []

    def recorded(function):
        @functools.wraps(function)  # TRL names its metrics by __name__
        def wrapper(**columns):
            calls.append((function.__name__, columns, function(**columns)))
            return calls[-1][2]

        return wrapper

    rows = json.loads((toy_folder / "train.json").read_text())
    examples = load_examples(toy_folder / "train.json")
    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": build_prompt(example)}],
                "image": str(Path(example.path).with_suffix(".png")),
                "solution": row["solution"],
                "problem_type": row["problem_type"],
            }
            for row, example in zip(rows, examples, strict=True)
        ]
    )
    # an untrained model writes no tags, so its sampling is led to <think></think><answer>A or
    # B</answer>
    token = toy_processor.tokenizer.convert_tokens_to_ids
    start = toy_processor.tokenizer("assistant\n")["input_ids"][-1]
    path = [start, token("<think>"), token("</think>"), token("<answer>")]
    bias = [[[a, b], 100.0] for a, b in zip(path, path[1:], strict=False)]
    for letter in (token("A"), token("B")):
        bias += [[[path[-1], letter], 100.0], [[letter, token("</answer>")], 100.0]]
    bias.append([[token("</answer>"), token("<|im_end|>")], 100.0])
    model = copy.deepcopy(toy_model).train()
    trainer = GRPOTrainer(
        model=model,
        processing_class=toy_processor,
        train_dataset=data.cast_column("image", ImageColumn()),
        reward_funcs=[recorded(copied.trl_accuracy), recorded(copied.trl_format)],
        args=GRPOConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=3,
            per_device_train_batch_size=8,
            num_generations=4,
            logging_steps=1,
            max_completion_length=12,
            learning_rate=1e-3,
            temperature=3.0,  # untrained, it would nearly always answer the same letter
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            seed=1,
            generation_kwargs={"sequence_bias": bias},
        ),
    )
    trainer.train()

    assert trainer.state.global_step == 3
    logs = [log for log in trainer.state.log_history if "rewards/trl_format/mean" in log]
    assert [name for name, _, _ in calls] == ["trl_accuracy", "trl_format"] * 3 and len(logs) == 3
    seen = {(row["solution"], row["problem_type"]) for row in rows}
    rights = []
    for step, log in enumerate(logs):
        _, columns, values = calls[2 * step]
        texts = [completion[0]["content"] for completion in columns["completions"]]
        assert (
            len(texts) == 8
            and set(zip(columns["solution"], columns["problem_type"], strict=True)) <= seen
        )
        right = [
            float(text.endswith(solution))
            for text, solution in zip(texts, columns["solution"], strict=True)
        ]  # <answer>B</answer>
        assert values == right and log["rewards/trl_accuracy/mean"] == pytest.approx(sum(right) / 8)
        assert calls[2 * step + 1][2] == [1.0] * 8 and log["rewards/trl_format/mean"] == 1
        rights += right
    assert 0 < sum(rights) < 24
    before, after = dict(toy_model.named_parameters()), dict(model.named_parameters())
    assert any(
        not torch.equal(before[name], after[name]) for name in before if "visual" in name
    )  # the picture was seen when scoring
