"""What the tests share: a small toy world (4 + 2 videos, no CLIP) made once per session, encoded
examples of it, small models of every family, and train.py on a small toy with CLIP
(warm.py starts it).

torch and transformers are imported where they are needed: pytest-xdist's parent, which its workers
wait for, needs neither."""

import copy
import fcntl
import json
import multiprocessing
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from warm import BIN as BIN
from warm import ENV as ENV
from warm import ROOT as ROOT
from warm import join_server, run_script, start_server

# Two workers on two cores. Threads of libraries that wait for each other would slow both down.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        # The parent of pytest-xdist's workers. They are about to import what the server imports.
        start_server()
        return
    join_server()
    import torch
    from transformers import Qwen2_5_VLModel, Qwen2VLModel

    torch.set_num_threads(1)
    for module in (Qwen2VLModel, Qwen2_5_VLModel):
        module.get_rope_index = as_trained(module.get_rope_index)


def pytest_sessionfinish():
    # A test that failed may have left one running, which multiprocessing would wait for.
    for process in multiprocessing.active_children():
        process.kill()


def as_trained(get_rope_index):
    """transformers' positions, each run of one kind continued behind the largest position so far.

    transformers 4 and the released models have them. A second implementation of
    policy.continue_positions, for the plain forwards that the tests compare with.
    """
    import torch

    def wrapper(model, input_ids, mm_token_type_ids, *arguments, attention_mask=None, **keywords):
        positions, _ = get_rope_index(
            model,
            input_ids,
            mm_token_type_ids,
            *arguments,
            attention_mask=attention_mask,
            **keywords,
        )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for row, kinds in enumerate(mm_token_type_ids.tolist()):
            after, before = 0, None
            for column in mask[row].nonzero()[:, 0].tolist():
                if kinds[column] != before:
                    before = kinds[column]
                    shift = after - int(positions[0, row, column])
                positions[:, row, column] += shift
                after = max(after, int(positions[:, row, column].max()) + 1)
        deltas = torch.stack(
            [positions[:, row].max() + 1 - int(mask[row].sum()) for row in range(len(mask))]
        )
        return positions, deltas[:, None]

    wrapper.unchanged = get_rope_index
    return wrapper


def shared_folder(tmp_path_factory, name, make):
    """A folder that the first of pytest-xdist's workers to ask for it makes, for all of them.

    Args:
        make: called with the folder, which does not exist yet.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Every worker has a folder in that of the session.
        base = base.parent
    folder = base / name
    made = base / f"{name}.made"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """train_cot.json, train.json, heldout.json, other_types.json and videos/ (112x112, 16 s at 4
    fps) of a toy with six videos.
    """
    import toy

    folder = tmp_path_factory.mktemp("toy") / "toy"
    toy.make_dataset(
        folder, toy.ToyArguments(output_dir=str(folder), train_videos=4, heldout_videos=2)
    )
    return folder


@pytest.fixture(scope="session")
def toy_processor(toy_folder):
    import toy

    return toy.make_processor(toy_folder)


@pytest.fixture(scope="session")
def toy_model(toy_processor):
    """Untrained Qwen2.5-VL in eval mode; shared, so tests that change it take a copy.deepcopy."""
    import toy

    model = toy.make_model(toy_processor, seed=0).eval()
    model.requires_grad_(True)
    return model


def video_row(frames):
    """Prior of these frames of a toy video, which has 4 frames a second."""
    from common.data import Prior

    times = [index / 4 for index in frames]
    return Prior("0", frames=frames, times=times, prior=[1 / len(frames) for _ in frames])


@pytest.fixture(scope="session")
def items(toy_folder, toy_processor):
    """Encoded examples: a video of 6 frames (3 slots), an image, a video of 5 frames at another
    rate, a text.
    """
    from common.data import load_examples
    from common.media import Encoder, PromptFlags

    examples = load_examples(toy_folder / "train_cot.json")
    encoder = Encoder(toy_processor, PromptFlags(min_pixels=56 * 56, max_pixels=56 * 56))
    videos = {example.path: example for example in examples if example.media_type == "video"}
    first, second = list(videos.values())[:2]
    image = next(example for example in examples if example.media_type == "image")
    text = replace(image, id="text", media=[], question="Which letter is red?")
    return [
        encoder.encode(first, video_row([0, 10, 20, 30, 40, 50])),
        encoder.encode(image),
        encoder.encode(second, video_row([0, 3, 6, 9, 12])),
        encoder.encode(text),
    ]


@pytest.fixture(scope="session")
def talker(toy_model):
    """The tiny model with an output layer of its own: a tied one repeats its last token for
    ever."""
    import torch

    model = copy.deepcopy(toy_model)
    generator = torch.Generator().manual_seed(3)
    model.lm_head.weight = torch.nn.Parameter(
        0.4 * torch.randn(model.lm_head.weight.shape, generator=generator)
    )
    return model


@pytest.fixture(scope="session")
def checkpoint(talker, toy_processor, tmp_path_factory):
    """It, as from_pretrained loads it."""
    folder, model = tmp_path_factory.mktemp("model") / "a" / "talker", copy.deepcopy(talker)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.save_pretrained(folder)
    toy_processor.save_pretrained(folder)
    return folder


def chat_parts(processor, example, template=None, system_prompt=None):
    """(before, text, after): the whole prompt of an example, around the user's text."""
    from common.data import PROMPT_TEMPLATE, around_text, build_prompt

    kinds = tuple(medium.kind for medium in example.media)
    before, after = around_text(processor, kinds, system_prompt)
    return before, build_prompt(example, template or PROMPT_TEMPLATE), after


def banned_ids(model):
    config = model.config
    return [
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
    ]


def hf_inputs(item, model, completion=None):
    """What a user of transformers alone would pass to the model for one unpadded row."""
    import torch

    ids = item.input_ids if completion is None else torch.cat([item.input_ids, completion])
    is_image, is_video = ids == model.config.image_token_id, ids == model.config.video_token_id
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    if item.grid_thw is None:
        return inputs
    inputs["mm_token_type_ids"] = (is_image.int() + 2 * is_video.int())[None]
    pixels = item.pixel_values.split(item.grid_thw.prod(1).tolist())
    names = {"image": "pixel_values", "video": "pixel_values_videos"}
    for kind in set(item.kinds):
        places = [place for place, own in enumerate(item.kinds) if own == kind]
        inputs[f"{kind}_grid_thw"] = item.grid_thw[places]
        inputs[names[kind]] = torch.cat([pixels[place] for place in places])
    if "video" in item.kinds:
        inputs["second_per_grid_ts"] = torch.tensor([item.second_per_grid])
    return inputs


NO_EOS = 10**9


@pytest.fixture(scope="session", params=["Qwen2VL", "Qwen3VL", "Qwen3VLMoe", "Qwen3_5"])
def other_family(request, items, toy_model):
    """(model, items) of another family with the toy's token ids: a video, an image, a text. Since
    Qwen3 times stand between the slots.
    """
    import torch
    import transformers

    name, config, text = request.param, toy_model.config, toy_model.config.text_config
    torch.manual_seed(0)
    vision = dict(
        depth=2,
        num_heads=4,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        initializer_range=0.1,
    )
    later = dict(
        hidden_size=64, intermediate_size=96, out_hidden_size=64, num_position_embeddings=16
    )
    options = dict(
        vocab_size=text.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    )
    more = {
        "Qwen2VL": {},
        "Qwen3VL": dict(head_dim=16),
        "Qwen3VLMoe": dict(
            head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
        ),
        "Qwen3_5": dict(
            head_dim=16,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
    }[name]
    vision |= dict(embed_dim=64, hidden_size=64) if name == "Qwen2VL" else later
    vision |= dict(deepstack_visual_indexes=[0, 1]) if name in ("Qwen3VL", "Qwen3VLMoe") else {}
    model = getattr(transformers, f"{name}ForConditionalGeneration")(
        getattr(transformers, f"{name}Config")(
            text_config=options | more,
            vision_config=vision,
            tie_word_embeddings=False,
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
        )
    ).eval()
    video, image, words = replace(items[0]), items[1], items[3]
    if name != "Qwen2VL":  # one run of video tokens becomes a run for every slot
        ids, token = video.input_ids.tolist(), config.video_token_id
        first, count = ids.index(token), ids.count(token) // video.slots
        run = [config.vision_start_token_id, *[token] * count, config.vision_end_token_id]
        slots = [[65 + slot, 66, *run] for slot in range(video.slots)]
        behind = ids[first + ids.count(token) + 1 :]
        video.input_ids = torch.tensor(ids[: first - 1] + sum(slots, []) + behind)
        video.shared += len(video.input_ids) - len(ids)
    return model, [video, image, words]


# ---------------------------------------------------------------------------------------- train.py

SMALL_GRPO = [
    "--max_steps",
    "2",
    "--num_generations",
    "4",
    "--max_completion_length",
    "12",
    "--gate",
    "none",
    "--weight_decay",
    "0",
]
# rewards differ; nothing else moves weights
SMALL = ["--sft_max_steps", "2", "--sft_per_device_batch_size", "4", *SMALL_GRPO]


def zero_stage(stage):
    """ds_zero3.json at a ZeRO stage; one rank keeps 3 because of the section offload_param."""
    config = json.loads((ROOT / "ds_zero3.json").read_text())
    config["zero_optimization"]["stage"] = stage
    if stage == 3:
        config["zero_optimization"]["offload_param"] = {"device": "none"}
    return config


def launch(*flags, ranks=1, env=None, report=False):
    """train.py with these flags, alone under ZeRO-2; returns the finished process."""
    flags = ["--deepspeed", "ds_zero3.json", *flags]
    return run_script("train.py", *flags, ranks=ranks, env=env, report=report)


def complain(*flags, env=None):
    """train.py with bad input -> the one sentence it ends with."""
    done = run_script("train.py", *flags, check=False, env=env)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def metrics(folder, stage):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["stage"] == stage]


def weights(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def alone():
    """A world of one rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def small_toy(tmp_path_factory):
    def make(folder):
        sizes = ["--train_videos", 8, "--heldout_videos", 3, "--clip_steps", 10]
        run_script("toy.py", "--output_dir", folder, *sizes)

    return shared_folder(tmp_path_factory, "small_toy", make)


@pytest.fixture(scope="session")
def first_run(small_toy, tmp_path_factory):
    """SFT, then GRPO, on one rank, as the README's first command does it."""

    def make(folder):
        batch = ["--per_device_train_batch_size", 4]
        flags = ["--toy_dir", small_toy, "--output_dir", folder / "output", *SMALL, *batch]
        done = launch(*flags, report=True)
        (folder / "stdout").write_text(done.stdout)
        (folder / "stderr").write_text(done.stderr)

    folder = shared_folder(tmp_path_factory, "first_run", make)
    said = [(folder / name).read_text() for name in ("stdout", "stderr")]
    return folder / "output", subprocess.CompletedProcess("train.py", 0, *said)


# ------------------------------------------------------------------------ pages, in a real browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def chromium():
    """check(file, drawn): the page opens from disk on a phone, light and dark: nothing fetched, no
    complaint, every picture there (none, if drawn is
    False), no sideways scrolling, an alt text for every picture. Returns its words."""
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium (.ci/run installs it)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)

        def check(file, drawn=True):
            backs = set()
            for scheme in ("light", "dark"):
                page, told = (
                    browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme),
                    [],
                )
                page.on("console", lambda message, told=told: told.append(message.text))
                page.on("pageerror", lambda error, told=told: told.append(str(error)))
                page.on(
                    "request",
                    lambda request, told=told: (
                        told.append(request.url) if request.url[:5] not in ("file:", "data:") else 0
                    ),
                )
                page.goto(Path(file).resolve().as_uri())
                pictures = page.evaluate(
                    "[...document.images].map(i => [i.complete, i.naturalWidth, i.alt.length > 10])"
                )
                assert bool(pictures) == drawn
                assert all(done and width > 0 and alt for done, width, alt in pictures)
                assert page.evaluate("document.documentElement.scrollWidth") <= 360
                assert told == []
                backs.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
                words = page.inner_text("body")
                page.close()
            assert len(backs) == 2
            return words

        yield check
        browser.close()
