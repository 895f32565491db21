"""A model of the hub that is in Hugging Face's cache: found without a network (HF_HUB_OFFLINE=1), as from_pretrained finds it."""

import shutil
import subprocess
import sys

from conftest import ENV, ROOT


def test_a_cached_model_is_found_offline_and_one_that_is_not_is_one_sentence(checkpoint, tmp_path):
    # the cache as huggingface_hub lays it out: models--OWNER--NAME/{refs/main, snapshots/COMMIT/files}
    commit, folder = (
        "0123456789abcdef0123456789abcdef01234567",
        tmp_path / "hub" / "models--own--tiny",
    )
    shutil.copytree(checkpoint, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    code = """if True:
        import data, train
        from transformers import AutoModelForImageTextToText
        arguments = train.TrainArguments()
        print(type(train.load_processor(arguments, "own/tiny")).__name__)
        print(type(AutoModelForImageTextToText.from_pretrained("own/tiny", use_safetensors=True)).__name__)
        for name in ("own/none", "no/such/folder"):
            try:
                train.load_processor(arguments, name)
            except data.DataError as error:
                print(error)"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**ENV, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    processor, model, *messages = done.stdout.splitlines()[
        -4:
    ]  # above it: what DeepSpeed says when it is imported
    assert processor == "Qwen2_5_VLProcessor" and model == "Qwen2_5_VLForConditionalGeneration"
    assert [message.partition(" cannot be loaded: ")[0] for message in messages] == [
        "model own/none",
        "model no/such/folder",
    ]
