"""What the tests share: the repository root on the path, and a small toy world (4 + 2 videos, no CLIP) made once per session,
and train.py as a user runs it: the deepspeed launcher, ZeRO-3, a small toy with CLIP."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory):
    """train_cot.json, train.json, heldout.json, other_types.json and videos/ (112x112, 16 s at 4 fps) of a toy with six videos."""
    import toy

    folder = tmp_path_factory.mktemp("toy") / "toy"
    toy.make_dataset(folder, toy.ToyArguments(output_dir=str(folder), train_videos=4, heldout_videos=2))
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


# ---------------------------------------------------------------------------------------------------- train.py by subprocess

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
SMALL = ["--sft_max_steps", "2", "--sft_per_device_batch_size", "4", "--max_steps", "2", "--num_generations", "4",
         "--max_completion_length", "12", "--gate", "none", "--weight_decay", "0"]  # rewards differ; nothing else moves weights
ENV = {**{name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def launch(*flags, ranks=1, check=True):
    """deepspeed train.py with these flags; returns the finished process with its output."""
    port = str(29600 + os.getpid() % 300)
    command = [BIN / "deepspeed", "--num_gpus", str(ranks), "--master_port", port, "train.py", "--deepspeed", "ds_zero3.json"]
    done = subprocess.run([*command, *map(str, flags)], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=420)
    assert not check or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def complain(*flags):
    """python train.py with bad input -> the one sentence it ends with."""
    done = subprocess.run([sys.executable, "train.py", *map(str, flags)], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def metrics(folder, stage):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["stage"] == stage]


def weights(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder).state_dict()


@pytest.fixture(scope="session")
def small_toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "toy"
    subprocess.run([sys.executable, "toy.py", "--output_dir", folder, "--train_videos", "8", "--heldout_videos", "3", "--clip_steps", "10"],
                   cwd=ROOT, env=ENV, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def first_run(small_toy, tmp_path_factory):
    """SFT, then GRPO, on one rank, as the README's first command does it."""
    output = tmp_path_factory.mktemp("run") / "output"
    done = launch("--toy_dir", small_toy, "--output_dir", output, *SMALL, "--per_device_train_batch_size", "4")
    return output, done


# ---------------------------------------------------------------------------------------------------- pages, in a real browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="session")
def chromium():
    """check(file): the page opens from disk on a phone, light and dark: nothing fetched, no complaint, every picture there, no sideways
    scrolling, an alt text for every picture. Returns its words."""
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium (.ci/run installs it)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)

        def check(file):
            backs = set()
            for scheme in ("light", "dark"):
                page, told = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme), []
                page.on("console", lambda message, told=told: told.append(message.text))
                page.on("pageerror", lambda error, told=told: told.append(str(error)))
                page.on("request", lambda request, told=told: told.append(request.url) if request.url[:5] not in ("file:", "data:") else 0)
                page.goto(Path(file).resolve().as_uri())
                pictures = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.alt.length > 10])")
                assert pictures and all(done and width > 0 and alt for done, width, alt in pictures)
                assert page.evaluate("document.documentElement.scrollWidth") <= 360
                assert told == []
                backs.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
                words = page.inner_text("body")
                page.close()
            assert len(backs) == 2
            return words

        yield check
        browser.close()
