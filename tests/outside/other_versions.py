"""Do other versions of transformers read the checkpoints that this program writes? Not run by CI;
needs PyPI, takes some minutes:

    python tests/outside/other_versions.py /tmp/versions

makes three environments in that folder, which see torch and deepspeed of the one it is
started from: the oldest and the newest
transformers that requirements.txt allows, and 4.57, which writes small random models as the
hub has them (flat configurations, names of
weights, processor files). Both of the former load these as train.py does, under ZeRO-0 and
ZeRO-3, and save them by checkpoints.save_model.
Then each of the three reads each folder. It prints a table of the largest differences of
logits to those of 4.57 and the model that it
wrote, for a prompt with a video and one set of position ids, with a star where the version
itself gives the prompt other positions than
4.57 does; exits with 1 when a weight is missing, a difference exceeds 1e-4, or a processor
gives other ids.
docs/checkpoints.md has the last result.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
ENDOFTEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE, VIDEO = range(256, 263)
WORDS = "<|im_start|>user\nfive: <|video_pad|><|im_end|>"
TOLERANCE = 1e-4


def model_config(family, tied):
    """config.json of a small model, with the fields that the hub's have."""
    text = dict(
        vocab_size=263,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.1,
        rope_theta=500000.0,
        rms_norm_eps=1e-6,
        bos_token_id=ENDOFTEXT,
        eos_token_id=IM_END,
    )
    vision = dict(
        depth=2,
        num_heads=4,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        initializer_range=0.1,
    )
    top = dict(
        model_type=family,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    if family == "qwen2_vl":
        vision |= dict(embed_dim=64, hidden_size=64, mlp_ratio=2, in_chans=3, spatial_patch_size=14)
    elif family == "qwen2_5_vl":
        vision |= dict(
            hidden_size=64,
            intermediate_size=96,
            out_hidden_size=64,
            in_chans=3,
            spatial_patch_size=14,
        )
        vision |= dict(tokens_per_second=2, window_size=56, fullatt_block_indexes=[1])
    else:
        vision |= dict(
            hidden_size=64, intermediate_size=96, out_hidden_size=64, num_position_embeddings=16
        )
        vision |= dict(deepstack_visual_indexes=[0, 1], model_type=family)
    if family in ("qwen2_vl", "qwen2_5_vl"):
        rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
        return dict(**top, **text, rope_scaling=rope, torch_dtype="float32", vision_config=vision)
    rope = {"mrope_interleaved": True, "mrope_section": [3, 3, 2], "rope_type": "default"}
    text |= dict(
        head_dim=16,
        rope_scaling=rope,
        tie_word_embeddings=tied,
        model_type=f"{family}_text",
        dtype="float32",
    )
    if family == "qwen3_5":
        text |= dict(
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
        )
        text |= dict(layer_types=["linear_attention", "full_attention"])
        vision.pop("deepstack_visual_indexes")
    elif family == "qwen3_vl_moe":
        text |= dict(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            decoder_sparse_step=1,
            mlp_only_layers=[],
        )
        text |= dict(norm_topk_prob=True)
    return dict(**top, text_config=text, vision_config=vision)


def make_processor(family, folder):
    """A byte-level tokenizer without merges, in the family's processor."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast, Qwen2VLImageProcessor

    alphabet = sorted(ByteLevel.alphabet())
    (folder / "vocab.json").write_text(
        json.dumps({character: place for place, character in enumerate(alphabet)})
    )
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2TokenizerFast(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        additional_special_tokens=SPECIAL[1:],
    )
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(ENDOFTEXT, 263))
    patches = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}.get(family, "Qwen3VL")
    video_processor = (
        transformers.Qwen3VLVideoProcessor
        if name == "Qwen3VL"
        else transformers.Qwen2VLVideoProcessor
    )
    return getattr(transformers, f"{name}Processor")(
        image_processor=Qwen2VLImageProcessor(**patches),
        video_processor=video_processor(**patches),
        tokenizer=tokenizer,
        chat_template="{{ messages }}",
    )


def prompt(model):
    """Inputs of a prompt with a video of three slots of 2 x 2 tokens, and the positions (3, 1,
    length) that this version gives it.
    """
    import inspect

    import torch

    generator = torch.Generator().manual_seed(1)
    slots = [[VISION_START, *[VIDEO] * 4, VISION_END]] * 3
    if model.config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        slots = [[VISION_START, *[VIDEO] * 12, VISION_END]]
    ids = [IM_START, 70, 71]
    for number, slot in enumerate(slots):
        ids += [80 + number, *slot]
    ids = torch.tensor([[*ids, 72, 73, 74, IM_END]])
    grid = torch.tensor([[3, 4, 4]])
    given = {"video_grid_thw": grid, "attention_mask": torch.ones_like(ids)}
    if model.config.model_type == "qwen2_5_vl":
        given["second_per_grid_ts"] = torch.tensor([1.0])
    if "mm_token_type_ids" in inspect.signature(model.model.get_rope_index).parameters:
        given["mm_token_type_ids"] = (ids == VIDEO).int() * 2  # transformers 5: 1 images, 2 videos
    positions, _ = model.model.get_rope_index(ids, **given)
    pixels = torch.randn(48, 1176, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "video_grid_thw": grid,
        "pixel_values_videos": pixels,
    }, positions


def logits(model, inputs, positions):
    """-> (length, vocabulary)"""
    import torch

    with torch.no_grad():
        return model.eval()(**inputs, position_ids=positions).logits[0].float()


def make(folder):
    """The sources, their logits and token ids; run with 4.57."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    for family in FAMILIES:
        for tied in (True, False):
            torch.manual_seed(0)
            source = folder / f"{family}-{'tied' if tied else 'untied'}"
            source.mkdir(parents=True)
            config = model_config(family, tied)
            (source / "config.json").write_text(json.dumps(config))
            model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(source))
            model.save_pretrained(source)
            processor = make_processor(family, source)
            processor.save_pretrained(source)
            config["architectures"] = [type(model).__name__]
            (source / "config.json").write_text(json.dumps(config))
            inputs, positions = prompt(model)
            expected = {
                "logits": logits(model, inputs, positions),
                "positions": positions,
                "ids": processor.tokenizer(WORDS).input_ids,
            }
            torch.save(expected, source / "expected.pt")


def save(sources, folder):
    """As train.py loads and saves them, at ZeRO-0 and ZeRO-3."""
    sys.path.insert(0, str(ROOT))
    from transformers import AutoProcessor

    from common import checkpoints, engine, ranks

    ranks.start_ranks()
    for stage in (0, 3):
        config = json.loads((ROOT / "ds_zero3.json").read_text())
        # one rank keeps stage 3 because of the second section
        config["zero_optimization"] = {"stage": stage, "offload_param": {"device": "none"}}
        file = folder.parent / f"{folder.name}.json"
        file.write_text(json.dumps(config))
        settings = SimpleNamespace(
            deepspeed=str(file),
            max_grad_norm=1.0,
            weight_decay=0.0,
            ema_decay=1.0,
            lora_rank=0,
            freeze_vision=False,
            train_only_merger=False,
            gradient_checkpointing=False,
        )
        for source in sorted(sources.iterdir()):
            started = engine.start_engine(settings, source, learning_rate=1e-6)
            checkpoints.save_model(
                started,
                AutoProcessor.from_pretrained(source),
                folder / f"{source.name}-zero{stage}",
            )
            started.destroy()


def read(sources, folder):
    """Prints {name of a saved folder: [largest difference, or what went wrong; whether this
    version gives the prompt other positions]}.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    found = {}
    for path in sorted(folder.iterdir()):
        expected = torch.load(sources / path.name.rpartition("-")[0] / "expected.pt")
        model, info = AutoModelForImageTextToText.from_pretrained(
            path, output_loading_info=True, attn_implementation="sdpa"
        )
        inputs, own = prompt(model)
        result = (
            (logits(model, inputs, expected["positions"]) - expected["logits"]).abs().max().item()
        )
        if info["missing_keys"] or info["unexpected_keys"]:
            result = f"{len(info['missing_keys'])} weights missing"
        elif AutoProcessor.from_pretrained(path).tokenizer(WORDS).input_ids != expected["ids"]:
            result = "other token ids"
        found[path.name] = [result, own.tolist() != expected["positions"].tolist()]
    print(json.dumps(found))


def environment(folder, name, wanted):
    """-> its python, and the version that pip chose."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        packages = next((folder / name / "lib").glob("python*")) / "site-packages"
        (packages / "zz_rest.pth").write_text(
            sysconfig.get_paths()["purelib"] + "\n"
        )  # after its own packages
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", f"transformers{wanted}"], check=True
        )
    version = subprocess.run(
        [python, "-c", "import transformers; print(transformers.__version__)"],
        check=True,
        capture_output=True,
    )
    return python, version.stdout.decode().strip()


def main(folder):
    oldest, below = re.search(
        r"^transformers>=([\d.]+),<(\d+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE
    ).groups()
    wanted = {"oldest": f"=={oldest}.*", "newest": f">={oldest},<{below}", "reader": "==4.57.*"}
    folder.mkdir(parents=True, exist_ok=True)
    pythons = {name: environment(folder, name, version) for name, version in wanted.items()}

    def run(name, *words):
        done = subprocess.run(
            [pythons[name][0], __file__, *map(str, words)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{pythons[name][1]} could not {words[0]}")
        return done.stdout

    sources = folder / "sources"
    if not sources.exists():
        run("reader", "make", sources)
    bad = 0
    print(
        "| written by | read by | "
        + " | ".join(FAMILIES)
        + " |\n|---|---|"
        + "---|" * len(FAMILIES)
    )
    for writer in ("oldest", "newest"):
        saved = folder / f"by-{writer}"
        if not saved.exists():
            run(writer, "save", sources, saved)
        for reader in ("reader", "oldest", "newest"):
            found = json.loads(run(reader, "read", sources, saved).splitlines()[-1])
            cells = []
            for family in FAMILIES:
                results = [
                    result for name, result in found.items() if name.partition("-")[0] == family
                ]
                values = [value for value, _ in results]
                words = [value for value in values if isinstance(value, str)]
                star = " *" if any(other for _, other in results) else ""
                cells.append((words[0] if words else f"{max(values):.0e}") + star)
                bad += bool(words) or max(values) > TOLERANCE
            print(
                f"| {pythons[writer][1]} | {pythons[reader][1]} | " + " | ".join(cells) + " |",
                flush=True,
            )
    sys.exit(bad > 0)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    elif len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        {"make": make, "save": save, "read": read}[sys.argv[1]](*map(Path, sys.argv[2:]))
