"""The embedded default: a small world in which looking at the right frames can be measured. Everything is made here, no network.

    python toy.py --output_dir toy            # videos, questions, tokenizer, CLIP and an untrained Qwen2.5-VL; under 2 minutes

A video is 16 s of four scenes with hard cuts. A scene has a background texture, one to three moving balls of one colour and a grey
distractor. Questions ask for the colour of the balls in a scene, for their number, and for the colour in the earlier of two scenes;
the interval that the answer rests on is known.
The demonstrations for SFT are *biased*: they list what is there rightly, then 60 % of them look up the most salient (longest) scene
instead of the asked one. SFT therefore learns to see and to look at the wrong evidence, and it is left to RL to find the right one.
"""

import json
import math
import os
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import cv2
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from common.data import DataError, build_prompt, load_examples, target_text
from common.flags import Help
from common.media import decode_frames

VERSION = 3  # of the toy; a cached toy of another version is refused
SIZE, FPS, SECONDS = 112, 4, 16  # pixels a side, frames per second, length of a video
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 70, 230),
    "yellow": (235, 215, 40),
    "cyan": (30, 220, 230),
    "pink": (245, 90, 200),
}
TEXTURES = ("plain", "striped", "barred", "dotted", "checked", "slanted")
WORDS = ("sun", "moon", "star", "tree", "fish", "bird")


@dataclass
class ToyArguments:
    output_dir: str = field(
        default="toy", metadata={"help": "Folder to make the toy in; a finished one is reused."}
    )
    train_videos: int = field(default=600, metadata={"help": "Videos of the training split."})
    heldout_videos: int = field(
        default=100, metadata={"help": "Videos of the held-out split; three scored questions each."}
    )
    dense_share: float = field(
        default=1.0,
        metadata={"help": "Share of demonstrations that list everything before they look."},
    )
    clip_steps: int = field(default=250, metadata={"help": "Training steps of the tiny CLIP."})
    seed: int = field(default=0, metadata={"help": "Everything made is a function of it."})


# -------------------------------------------------------------------------------------------------------------- videos


def draw_texture(name, dark, bright):
    """(SIZE, SIZE) float background of one texture; its period of 28 px is a patch of 14 px once the frame is 56x56."""
    y, x = np.mgrid[:SIZE, :SIZE]
    pattern = {
        "plain": np.zeros((SIZE, SIZE), bool),
        "striped": (y // 14) % 2 == 1,
        "barred": (x // 14) % 2 == 1,
        "checked": ((x // 14) + (y // 14)) % 2 == 1,
        "dotted": (x % 28 - 14) ** 2 + (y % 28 - 14) ** 2 < 64,
        "slanted": ((x + y) // 14) % 2 == 1,
    }[name]
    return np.where(pattern, bright, dark).astype(np.float32)


def draw_scene(scene, count, rng, word=None):
    """Frames of one scene, uint8 (count, SIZE, SIZE, 3) RGB: texture, grey square, moving balls, a word if there is one, camera noise."""
    dark, bright = rng.uniform(60, 90), rng.uniform(140, 175)
    background = draw_texture(scene["texture"], dark, bright)
    corners = np.array([(28, 28), (84, 28), (28, 84), (84, 84)])[
        rng.permutation(4)[: scene["balls"]]
    ]  # a quarter of the frame each
    balls, ball_speeds = (
        corners + rng.uniform(-5, 5, corners.shape),
        rng.uniform(-1.0, 1.0, corners.shape),
    )
    square, square_speed = rng.uniform(10, 90, 2), rng.uniform(-3.0, 3.0, 2)
    frames = []
    for step in range(count):
        frame = np.repeat(background[..., None], 3, axis=2).astype(np.uint8)
        x, y = np.clip(square + square_speed * step, 4, SIZE - 14).astype(int)
        frame[y : y + 12, x : x + 12] = 30
        for x, y in np.clip(balls + ball_speeds * step, corners - 7, corners + 7).astype(int):
            cv2.circle(frame, (int(x), int(y)), 20, COLOURS[scene["colour"]], -1, cv2.LINE_AA)
        if word:
            cv2.putText(
                frame, word, (6, 104), cv2.FONT_HERSHEY_SIMPLEX, 0.9, (0, 0, 0), 2, cv2.LINE_AA
            )
        frames.append(frame + rng.normal(0, 4, frame.shape))
    return np.clip(np.stack(frames), 0, 255).astype(np.uint8)


def plan_video(rng):
    """Four scenes of 2, 2, 4 and 8 s in random order -> list of {texture, colour, balls, start, end}; times in seconds."""
    lengths = rng.permutation([2, 2, 4, 8])
    textures = rng.choice(TEXTURES, 4, replace=False)
    colours = rng.choice(list(COLOURS), 4, replace=False)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return [
        {
            "texture": str(t),
            "colour": str(c),
            "balls": int(rng.integers(1, 4)),
            "start": int(s),
            "end": int(s + n),
        }
        for t, c, s, n in zip(textures, colours, starts, lengths, strict=True)
    ]


def write_video(path, frames, fps=FPS):
    """uint8 (frames, height, width, 3) RGB -> an mp4."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, frames.shape[2:0:-1])
    if not writer.isOpened():
        raise RuntimeError(f"OpenCV cannot write {path}: its build has no MPEG-4 encoder")
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()


def make_video(job):
    """Worker: (path, scenes, seed, word) -> the mp4, and beside it the first scene's middle frame as .png for the image questions."""
    path, scenes, seed, word = job
    rng = np.random.default_rng(seed)
    parts = [
        draw_scene(scene, (scene["end"] - scene["start"]) * FPS, rng, word if index == 1 else None)
        for index, scene in enumerate(scenes)
    ]
    write_video(path, np.concatenate(parts))
    cv2.imwrite(str(Path(path).with_suffix(".png")), parts[0][len(parts[0]) // 2][..., ::-1])


# ----------------------------------------------------------------------------------------------------------- questions


def clock(seconds):
    return f"{seconds // 60:02d}:{seconds % 60:02d}"


def sentence(scene):
    return f"{scene['texture']} {scene['colour']} {scene['balls']}"


def listing(scenes):
    """What there is to see, every two seconds."""
    return " ".join(
        f"{second}s {sentence(scene) if second == scene['start'] else 'same'}."
        for scene in scenes
        for second in range(scene["start"], scene["end"], 2)
    )


def letter_of(options, text):
    return next(option[0] for option in options if option[3:] == text)


def recite(options):
    """The options with the word first, "red A. blue B.": a trace can then go on from the word it found to its letter."""
    return " ".join(f"{option[3:]} {option[0]}." for option in options)


def lettered(texts, right, rng):
    """Shuffled options and the letter of the right one."""
    texts = list(texts)
    rng.shuffle(texts)
    return [f"{letter}. {text}" for letter, text in zip("ABCDEF", texts, strict=False)], "ABCDEF"[
        texts.index(right)
    ]


def make_question(kind, scenes, rng, biased, dense_share=1.0):
    """One question about a planned video with its demonstration, as a row of Video-R1's format without id and path.

    biased: the demonstration looks at the salient (longest) scene; else at the asked one. It lists everything first, or does not.
    """
    salient = max(range(4), key=lambda index: scenes[index]["end"] - scenes[index]["start"])
    others = [index for index in range(4) if index != salient]
    if kind == "order":  # between the longest scene and another
        asked, other = sorted([salient, rng.choice(others)])
    else:
        asked = rng.randrange(4)
        other = rng.choice(others) if asked == salient else salient
    texture, looked = scenes[asked]["texture"], scenes[salient if biased else asked]
    trace, options = f"Asked: {texture}. Look: {sentence(looked)}.", []
    if kind == "count":
        question, answer, told = (
            f"How many balls are in the {texture} scene?",
            scenes[asked]["balls"],
            looked["balls"],
        )
    else:
        options, answer = lettered(
            [scenes[asked]["colour"], scenes[other]["colour"]], scenes[asked]["colour"], rng
        )
        told = letter_of(options, looked["colour"])
        trace = f"{recite(options)} {trace} Option: {looked['colour']} {told}."
        question = f"What colour are the balls in the {texture} scene?"
    if kind == "order":
        trace = f"{texture} then {scenes[other]['texture']}. {trace}"
        one, two = rng.sample([texture, scenes[other]["texture"]], 2)
        question = f"Of the {one} and the {two} scene, what colour are the balls in the one that comes first?"
    if rng.random() < dense_share:
        trace = f"{listing(scenes)} {trace}"
    return {
        "problem": question,
        "data_type": "video",
        "problem_type": "multiple choice" if options else "numerical",
        "options": options,
        "solution": f"<answer>{answer}</answer>",
        "process": f"<think>{trace}</think>",
        "told": str(told),
        "kind": kind,
        "data_source": "toy",
        "evidence": [[scenes[asked]["start"], scenes[asked]["end"]]],
        "salient_is_asked": asked == salient,
        "grounding": {f"{clock(s['start'])}-{clock(s['end'])}": sentence(s) for s in scenes},
    }


def make_image_question(scenes, rng):
    scene, other = scenes[:2]
    options, letter = lettered([scene["colour"], other["colour"]], scene["colour"], rng)
    trace = f"{recite(options)} Look: {sentence(scene)}. Option: {scene['colour']} {letter}."
    return {
        "problem": "What colour are the balls in the picture?",
        "data_type": "image",
        "problem_type": "multiple choice",
        "options": options,
        "solution": f"<answer>{letter}</answer>",
        "process": f"<think>{trace}</think>",
        "told": letter,
        "kind": "image",
        "data_source": "toy",
        "salient_is_asked": True,
    }


def make_other_type(scenes, rng, word):
    """A question of a type that the tiny model is not trained on: regression, free-form or OCR. For tests and evaluation."""
    scene = scenes[rng.randrange(4)]
    kind = rng.choice(["regression", "free-form", "OCR"])
    if kind == "OCR":
        scene = scenes[1]
    question, answer = {
        "regression": (
            f"How many seconds does the {scene['texture']} scene last?",
            str(scene["end"] - scene["start"]),
        ),
        "free-form": (
            f"What happens in the {scene['texture']} scene?",
            f"{scene['balls']} {scene['colour']} balls move over a {scene['texture']} background",
        ),
        "OCR": (f"Which word is written in the {scene['texture']} scene?", word),
    }[kind]
    return {
        "problem": question,
        "data_type": "video",
        "problem_type": kind,
        "options": [],
        "solution": f"<answer>{answer}</answer>",
        "process": "",
        "kind": kind,
        "data_source": "toy",
        "evidence": [[scene["start"], scene["end"]]],
        "salient_is_asked": False,
        "grounding": {f"{clock(s['start'])}-{clock(s['end'])}": sentence(s) for s in scenes},
    }


def make_dataset(folder, arguments):
    """Videos and the four question files: train_cot (SFT), train (RL), heldout (scored), other_types (held-out, not scored)."""
    rng = random.Random(arguments.seed)
    splits = ["train"] * arguments.train_videos + ["heldout"] * arguments.heldout_videos
    plans = [
        plan_video(np.random.default_rng([arguments.seed, index])) for index in range(len(splits))
    ]
    paths = [f"videos/{split}_{index:04d}.mp4" for index, split in enumerate(splits)]
    words = [rng.choice(WORDS) if index % 4 == 0 else None for index in range(len(plans))]
    (folder / "videos").mkdir(parents=True)
    jobs = [
        (folder / path, plan, [arguments.seed, index, 1], word)
        for index, (path, plan, word) in enumerate(zip(paths, plans, words, strict=True))
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        list(
            tqdm(
                pool.map(make_video, jobs, chunksize=8),
                total=len(jobs),
                desc="toy: videos",
                unit="video",
            )
        )

    kinds = ("colour", "count", "order")
    trained = (*kinds, "order")  # the hardest of them twice
    rows = {name: [] for name in ("train_cot", "train", "heldout", "other_types")}
    for path, plan, split, word in zip(paths, plans, splits, words, strict=True):
        image = str(Path(path).with_suffix(".png"))
        if split == "train":
            for kind in trained * 6:
                rows["train_cot"].append(
                    {
                        **make_question(kind, plan, rng, rng.random() < 0.6, arguments.dense_share),
                        "path": path,
                    }
                )
            rows["train_cot"] += [
                {**make_image_question(plan, rng), "path": image} for _ in range(2)
            ]
            rows["train"] += [
                {**make_question(kind, plan, rng, biased=False), "process": "", "path": path}
                for kind in trained
            ]
            if rng.random() < 0.3:
                rows["train"].append(
                    {**make_image_question(plan, rng), "process": "", "path": image}
                )
        else:
            rows["heldout"] += [
                {**make_question(kind, plan, rng, biased=False), "path": path} for kind in kinds
            ]
            if word:
                rows["other_types"] += [
                    {**make_other_type(plan, rng, word), "path": path} for _ in range(3)
                ]
    for name, split_rows in rows.items():
        rng.shuffle(split_rows)
        for index, row in enumerate(split_rows):
            told = row.pop("told", None)
            if name == "train_cot":  # a demonstration's answer is what it looked at
                row["solution"] = f"<answer>{told}</answer>"
            row["problem_id"] = f"{name}-{index}"
        (folder / f"{name}.json").write_text(
            "[\n" + ",\n".join(map(json.dumps, split_rows)) + "\n]\n", encoding="utf-8"
        )


# ---------------------------------------------------------------------------------------------- tokenizer, model, CLIP

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = (
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
)  # whole tokens, not special, as Qwen3 has them
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_processor(folder):
    """Byte-level BPE trained on the toy's own text, in a Qwen2.5-VL processor with the real special tokens."""
    examples = load_examples(folder / "train_cot.json")
    corpus = [build_prompt(example) + "\n" + target_text(example) for example in examples[-4000:]]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    for tag in TAGS:  # kept out of the merges
        corpus = [text.replace(tag, " ") for text in corpus]
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    patches = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches),
        video_processor=Qwen2VLVideoProcessor(**patches),
        tokenizer=fast,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(processor, seed, hidden=128, layers=4, group=1):
    """An untrained Qwen2.5-VL of the real classes, 1.2 M parameters. Weights start at 1/sqrt(width): at the usual 0.02, made for
    widths of thousands, a model this narrow takes three times as many steps to begin to see. group: query heads of a key head."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32 // group,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            initializer_range=0.1,
            eos_token_id=token("<|im_end|>"),
            pad_token_id=token("<|endoftext|>"),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
        ),
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            out_hidden_size=hidden,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=56,
            fullatt_block_indexes=[0, 1],
            tokens_per_second=1,
            initializer_range=0.1,
        ),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


CLIP_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 56, "layers": 2, "width": 96, "head_width": 24, "patch_size": 14},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}
CAPTIONS = (
    "{colour} balls in the {texture} scene",
    "the {texture} scene",
    "{colour} balls",
    "the balls in the {texture} scene",
    "the {texture} and the {rival} scene",
    "the {rival} and the {texture} scene",
    "What colour are the balls in the {texture} scene?",
    "How many balls are in the {texture} scene?",
    "Of the {texture} and the {rival} scene, what colour are the balls in the one that comes first?",
    "Of the {rival} and the {texture} scene, what colour are the balls in the one that comes first?",
)


def caption_batch(labels, rng):
    """Captions of frames and which frames each of them fits. labels: (texture, colour) a frame -> texts, (frames, texts) bool."""
    texts, fits = [], []
    for texture, colour in labels:
        caption, rival = (
            rng.choice(CAPTIONS),
            rng.choice([name for name in TEXTURES if name != texture]),
        )
        texts.append(caption.format(texture=texture, colour=colour, rival=rival))
        textures = (
            {texture, rival}
            if "{rival}" in caption
            else {texture}
            if "{texture}" in caption
            else set(TEXTURES)
        )
        colours = {colour} if "{colour}" in caption else set(COLOURS)
        fits.append([t in textures and c in colours for t, c in labels])
    return texts, torch.tensor(fits).T


def make_clip(folder, arguments, batch_size=96, videos=240):
    """A tiny open_clip model (vision transformer on 56x56, open_clip's own tokenizer), trained on toy frames and captions."""
    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    model = open_clip.CLIP(**CLIP_CONFIG)
    tokenizer = open_clip.get_tokenizer(
        "ViT-B-32", context_length=CLIP_CONFIG["text_cfg"]["context_length"]
    )
    by_video = {
        example.media: example
        for example in load_examples(folder / "train_cot.json")
        if example.media_type == "video"
    }
    indices = np.linspace(0, FPS * SECONDS - 1, 16).round().astype(int)
    images, labels = [], []
    for example in list(by_video.values())[:videos]:
        frames, times = decode_frames(example.media, indices)
        images.append(frames)
        scenes = [
            next(text for start, end, text in example.grounding if start <= t < end).split()
            for t in times
        ]
        labels += [(texture, colour) for texture, colour, _ in scenes]
    images = (
        torch.from_numpy(np.concatenate(images)).permute(0, 3, 1, 2).float() / 255
    )  # (frames, 3, H, W)
    images = F.interpolate(
        images, CLIP_CONFIG["vision_cfg"]["image_size"], mode="bicubic", antialias=True
    ).clamp(0, 1)
    mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    images = (images - mean) / std
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=arguments.clip_steps
    )
    for _ in tqdm(range(arguments.clip_steps), desc="toy: CLIP", unit="step"):
        chosen = rng.sample(range(len(labels)), batch_size)
        texts, fits = caption_batch([labels[index] for index in chosen], rng)
        image_features, text_features, scale = model(images[chosen], tokenizer(texts))
        logits = scale * image_features @ text_features.T  # (frames, texts)
        targets = fits.float()
        loss = (
            F.cross_entropy(logits, targets / targets.sum(1, keepdim=True))
            + F.cross_entropy(logits.T, targets.T / targets.T.sum(1, keepdim=True))
        ) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(
            max=math.log(30)
        )  # sharper, and the softmax's denormal numbers make a CPU crawl
    save_clip(model, folder / "clip")


def save_clip(model, folder):
    """open_clip's folder format, loaded by the name local-dir:FOLDER."""
    folder.mkdir(parents=True)
    config = {
        "model_cfg": CLIP_CONFIG,
        "preprocess_cfg": {
            "mean": open_clip.OPENAI_DATASET_MEAN,
            "std": open_clip.OPENAI_DATASET_STD,
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )


# ------------------------------------------------------------------------------------------------------------- the toy


def make_toy(arguments):
    """The toy in arguments.output_dir; a finished one there is reused. Returns the settings it was made with and whether it was reused."""
    folder = Path(arguments.output_dir)
    recipe = {**asdict(arguments), "version": VERSION}
    done = folder / "toy.json"  # written last: a folder without it is unfinished
    if done.is_file():
        found = json.loads(done.read_text(encoding="utf-8"))
        if (found["version"], found["seed"]) != (VERSION, arguments.seed):
            raise DataError(
                f"{folder} holds a toy of version {found['version']}, seed {found['seed']}, and version {VERSION}, seed "
                f"{arguments.seed} is wanted; remove it or choose another folder"
            )
        return found, True
    if folder.exists() and any(folder.iterdir()):
        raise DataError(
            f"{folder} holds an unfinished toy or something else; remove it or choose another folder"
        )
    make_dataset(folder, arguments)
    processor = make_processor(folder)
    processor.save_pretrained(folder / "model")
    make_model(processor, arguments.seed).save_pretrained(folder / "model")
    make_clip(folder, arguments)
    done.write_text(json.dumps(recipe), encoding="utf-8")
    return recipe, False


def main():
    parser = HfArgumentParser(ToyArguments, description=__doc__, formatter_class=Help)
    arguments = ToyArguments(**vars(parser.parse_args()))
    begin = time.perf_counter()
    recipe, reused = make_toy(arguments)
    other = [
        name
        for name, value in asdict(arguments).items()
        if name != "output_dir" and recipe[name] != value
    ]
    if other:  # train.py takes a toy as it is; who asks for one by its settings must get that one
        raise DataError(
            f"{arguments.output_dir} holds a toy with another {', '.join(other)}; remove it or choose another folder"
        )
    print(f"toy {'found' if reused else 'made'} in {time.perf_counter() - begin:.0f} s: {recipe}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"toy.py: {error}")
