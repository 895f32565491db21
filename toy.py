"""The embedded default: a small world in which looking at the right frames can be measured.

    python toy.py --output_dir toy  # videos, questions, tokenizer, CLIP, an untrained Qwen2.5-VL

It takes under a minute and no network. A video is 16 s of four scenes with hard cuts, or 24 s of
six (--scenes). A scene has
a background texture, one to three moving balls of one colour and a grey distractor. Questions ask
for the colour of the balls in a scene, for their number, and for the colour in the earlier of two
scenes; the interval that the answer rests on is known.

The demonstrations for SFT are *biased*: they list all scenes correctly, then 60 % of them look up
the salient (longest) scene instead of the asked one. SFT therefore learns to see and to look at the
wrong evidence, and RL has to find the right one.
"""

import json
import math
import random
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torchvision.transforms.functional import normalize
from tqdm import tqdm
from tqdm.contrib.concurrent import process_map
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from common.data import DataError, add_letters, build_prompt, load_examples, target_text
from common.flags import Parser, exit_codes, flag
from common.media import clock, sample_video

VERSION = 4  # of the toy; a cached toy of another version is made anew
SIZE = 112  # pixels a side
FPS = 4
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 70, 230),
    "yellow": (235, 215, 40),
    "cyan": (30, 220, 230),
    "pink": (245, 90, 200),
}
# The bright pixels of each texture. A period of 28 px becomes a patch of 14 px in CLIP, which sees
# 56x56, and half a patch in the model's 28x28.
Y, X = np.mgrid[:SIZE, :SIZE]
TEXTURES = {
    "plain": X < 0,
    "striped": Y // 14 % 2,
    "barred": X // 14 % 2,
    "dotted": (X % 28 - 14) ** 2 + (Y % 28 - 14) ** 2 < 64,
    "checked": (X // 14 + Y // 14) % 2,
    "slanted": (X + Y) // 14 % 2,
}
WORDS = ("sun", "moon", "star", "tree", "fish", "bird")


@dataclass
class ToyArguments:
    output_dir: str = flag("toy", "Folder to make the toy in; a finished one is reused.")
    train_videos: int = flag(600, "Videos of the training split.")
    heldout_videos: int = flag(100, "Videos of the held-out split; three scored questions each.")
    scenes: int = flag(
        4, "Scenes of a video; a video of n scenes has 4 n seconds.", choices=[4, 5, 6]
    )
    options: int = flag(2, "Options of a choice about a video.", choices=[2, 3, 4])
    biased_share: float = flag(
        0.6, "Share of demonstrations that look at the salient scene, whatever is asked."
    )
    dense_share: float = flag(1.0, "Share of demonstrations that list everything before they look.")
    clip_steps: int = flag(100, "Training steps of the tiny CLIP.")
    seed: int = flag(0, "Random seed; it determines everything that is made.")


# ---------------------------------------------------------------------------------- videos


@dataclass
class Scene:
    texture: str  # one of TEXTURES
    colour: str  # of its balls, one of COLOURS
    balls: int  # 1 to 3
    start: int  # seconds
    end: int

    def __str__(self):
        return f"{self.texture} {self.colour} {self.balls}"


@dataclass
class Video:
    path: str  # relative to the toy's folder, without .mp4
    scenes: list[Scene]
    seed: list[int]  # of the pixels
    word: str | None  # written into the second scene


def draw_scene(scene, rng, word=None):
    """Frames of one scene: texture, grey square, moving balls, a word if any, camera noise.

    Args:
        scene: Scene.
        rng: numpy Generator.
        word: text to write on every frame.
    Returns:
        (frames, SIZE, SIZE, 3) uint8, RGB.
    """
    # The brightness differs between scenes: a cut shows even without texture.
    dark = rng.uniform(60, 90)
    bright = rng.uniform(140, 175)
    background = np.where(TEXTURES[scene.texture], bright, dark).astype(np.uint8)  # (SIZE, SIZE)
    # Each ball has its own quarter of the frame.
    quarters = np.array([(28, 28), (84, 28), (28, 84), (84, 84)])
    centres = quarters[rng.permutation(4)[: scene.balls]]
    balls = centres + rng.uniform(-5, 5, centres.shape)
    ball_speeds = rng.uniform(-1, 1, centres.shape)
    square = rng.uniform(10, 90, 2)
    square_speed = rng.uniform(-3, 3, 2)
    frames = []
    for step in range((scene.end - scene.start) * FPS):
        frame = cv2.cvtColor(background, cv2.COLOR_GRAY2RGB)
        # The distractor moves faster than the balls.
        x, y = np.clip(square + square_speed * step, 4, SIZE - 14).astype(int)
        frame[y : y + 12, x : x + 12] = 30
        # The balls stay within their quarters, so that they can be counted.
        places = np.clip(balls + ball_speeds * step, centres - 7, centres + 7).astype(int)
        for place in places.tolist():
            cv2.circle(frame, place, 20, COLOURS[scene.colour], -1, cv2.LINE_AA)
        if word:
            cv2.putText(frame, word, (6, 104), 0, 0.9, (15, 15, 15), 2, cv2.LINE_AA)
        frames.append(frame)
    # Camera noise: consecutive frames are never equal. No pixel is so dark or bright as to wrap.
    frames = np.stack(frames)  # (frames, SIZE, SIZE, 3)
    return frames + rng.integers(-7, 8, frames.shape, np.int8).astype(np.uint8)


def plan_video(rng, count=4):
    """Plan `count` scenes in random order, four of 2, 2, 4 and 8 s -> list of Scene."""
    # The longest scene is half of the video, and so of its uniform frames.
    others = [2] * (count - 2) + [4]
    lengths = rng.permutation([*others, sum(others)]).tolist()
    textures = rng.choice(list(TEXTURES), count, replace=False).tolist()
    colours = rng.choice(list(COLOURS), count, replace=False).tolist()
    scenes = []
    start = 0
    for index, length in enumerate(lengths):
        balls = int(rng.integers(1, 4))
        scenes.append(Scene(textures[index], colours[index], balls, start, start + length))
        start += length
    return scenes


def write_video(path, frames, fps=FPS):
    """Write frames (K, H, W, 3), uint8 RGB, to an mp4."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, frames.shape[2:0:-1])
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()


def make_video(folder, video):
    """Write a video as .mp4, and the middle frame of its first scene as .png."""
    rng = np.random.default_rng(video.seed)
    # OCR questions ask for the second scene.
    parts = []
    for index, scene in enumerate(video.scenes):
        parts.append(draw_scene(scene, rng, video.word if index == 1 else None))
    write_video(f"{folder}/{video.path}.mp4", np.concatenate(parts))
    picture = parts[0][len(parts[0]) // 2]  # (SIZE, SIZE, 3)
    cv2.imwrite(f"{folder}/{video.path}.png", picture[..., ::-1])


# ------------------------------------------------------------------------------- questions

COLOUR_QUESTION = "What colour are the balls in the {} scene?"
COUNT_QUESTION = "How many balls are in the {} scene?"
ORDER_QUESTION = (
    "Of the {} and the {} scene, what colour are the balls in the one that comes first?"
)


def listing(scenes):
    """What there is to see, every two seconds."""
    parts = []
    for scene in scenes:
        parts += [f"{second}s {scene}." for second in range(scene.start, scene.end, 2)]
    return " ".join(parts)


def colour_options(offered, looked, trace, rng):
    """Offer the colours of scenes.

    Args:
        offered: Scenes with the colours offered.
        looked: the one of them whose colour the demonstration names.
        trace: what the demonstration says up to that colour.
        rng: random.Random.
    Returns:
        Options "A. blue", "B. red"; the letter of the looked scene's colour; the trace with the
        option behind it.
    """
    colours = [scene.colour for scene in offered]
    # The position of an option must not give it away.
    rng.shuffle(colours)
    options = add_letters(colours)
    letter = options[colours.index(looked.colour)][0]
    return options, letter, f"{trace} Option: {letter}. {looked.colour}."


def make_row(kind, question, options, answer, trace=""):
    """Row of Video-R1's format for a video, without path and problem_id."""
    problem_type = "multiple choice" if options else kind  # regression, free-form, OCR
    if kind == "count":
        problem_type = "numerical"
    return {
        "problem": question,
        "data_type": "video",
        "problem_type": problem_type,
        "options": options,
        "solution": f"<answer>{answer}</answer>",
        "process": f"<think>{trace}</think>" if trace else "",
        "kind": kind,
        "data_source": "toy",
    }


def add_evidence(row, scenes, asked, salient_is_asked):
    """Add the fields that say where the answer is and what the video shows."""
    row["evidence"] = [[asked.start, asked.end]]
    row["salient_is_asked"] = salient_is_asked
    row["grounding"] = {f"{clock(one.start)}-{clock(one.end)}": str(one) for one in scenes}
    return row


def make_question(kind, scenes, rng, biased, dense_share=1.0, choices=2):
    """Ask one question about a planned video, with its demonstration.

    Args:
        kind: colour, count or order.
        scenes: plan of the video.
        rng: random.Random.
        biased: the demonstration looks at the salient (longest) scene instead of the asked one,
            and answers what it sees there.
        dense_share: probability that the demonstration lists all scenes first.
        choices: options of a choice; the asked and the salient scene's colour are among them.
    Returns:
        Row of Video-R1's format without path and problem_id.
    """
    salient = max(scenes, key=lambda scene: scene.end - scene.start)
    others = [scene for scene in scenes if scene is not salient]
    # The asked one is the earlier of the salient scene and another.
    if kind == "order":
        asked, other = sorted([salient, rng.choice(others)], key=scenes.index)
    else:
        asked = rng.choice(scenes)
        # The salient scene is always one of the options: the biased answer is there.
        other = rng.choice(others) if asked is salient else salient
    looked = salient if biased else asked
    # The trace names the evidence first: what the model looks at can be read from it.
    trace = f"Asked: {asked.texture}. Look: {looked}."
    if kind == "count":
        question = COUNT_QUESTION.format(asked.texture)
        options = []
        answer = looked.balls
    else:
        question = COLOUR_QUESTION.format(asked.texture)
        rest = [scene for scene in scenes if scene not in (asked, other)]
        offered = [asked, other, *rng.sample(rest, choices - 2)]
        options, answer, trace = colour_options(offered, looked, trace, rng)
    if kind == "order":
        question = ORDER_QUESTION.format(*rng.sample([asked.texture, other.texture], 2))
    # A dense trace describes everything before it looks; a focused one looks at once.
    if rng.random() < dense_share:
        trace = f"{listing(scenes)} {trace}"
    row = make_row(kind, question, options, answer, trace)
    return add_evidence(row, scenes, asked, asked is salient)


def make_image_question(scenes, rng):
    """Ask for the colour in the picture of the first scene; see make_question."""
    first = scenes[0]
    options, letter, trace = colour_options(scenes[:2], first, f"Look: {first}.", rng)
    row = make_row("image", "What colour are the balls in the picture?", options, letter, trace)
    row["data_type"] = "image"
    row["salient_is_asked"] = True
    return row


def make_other_type(video, rng):
    """Ask a question of a type that the tiny model is not trained on, for tests and evaluation."""
    scene = rng.choice(video.scenes)
    kind = rng.choice(["regression", "free-form", "OCR"])
    if kind == "regression":
        question = "How many seconds does the {} scene last?"
        answer = scene.end - scene.start
    elif kind == "free-form":
        question = "What happens in the {} scene?"
        answer = f"{scene.balls} {scene.colour} balls move over a {scene.texture} background"
    else:
        scene = video.scenes[1]
        question = "Which word is written in the {} scene?"
        answer = video.word
    row = make_row(kind, question.format(scene.texture), [], answer)
    return add_evidence(row, video.scenes, scene, salient_is_asked=False)


KINDS = ("colour", "count", "order")
TRAINED_KINDS = (*KINDS, "order")  # the hardest of them twice


def make_rows(video, rng, arguments):
    """Rows about a video: yields the name of a question file and a row for it."""
    choices = arguments.options
    scenes = video.scenes
    if "heldout" in video.path:
        for kind in KINDS:
            yield "heldout", make_question(kind, scenes, rng, biased=False, choices=choices)
        if video.word:
            for _ in range(3):
                yield "other_types", make_other_type(video, rng)
        return
    for kind in TRAINED_KINDS * 6:
        biased = rng.random() < arguments.biased_share
        row = make_question(kind, scenes, rng, biased, arguments.dense_share, choices)
        yield "train_cot", row
    for _ in range(2):
        yield "train_cot", make_image_question(scenes, rng)
    for kind in TRAINED_KINDS:
        yield "train", make_question(kind, scenes, rng, biased=False, choices=choices)
    if rng.random() < 0.3:
        yield "train", make_image_question(scenes, rng)


def make_dataset(folder, arguments):
    """Make the videos and the four question files.

    They are train_cot.json (SFT), train.json (RL), heldout.json (scored) and other_types.json
    (held out, not scored).

    Returns:
        list of the training's Videos, in the order of their first demonstrations.
    """
    # One generator draws all texts in a fixed order, so that a seed gives the same files.
    rng = random.Random(arguments.seed)
    splits = ["train"] * arguments.train_videos + ["heldout"] * arguments.heldout_videos
    videos = []
    for index, split in enumerate(splits):
        scenes = plan_video(np.random.default_rng([arguments.seed, index]), arguments.scenes)
        # Every fourth video shows a word.
        word = rng.choice(WORDS) if index % 4 == 0 else None
        path = f"videos/{split}_{index:04d}"
        videos.append(Video(path, scenes, [arguments.seed, index, 1], word))
    (folder / "videos").mkdir(parents=True)
    # The pixels have their own seeds: workers may finish in any order.
    folders = [folder] * len(videos)
    process_map(make_video, folders, videos, chunksize=8, desc="toy: videos")

    files = {name: [] for name in ("train_cot", "train", "heldout", "other_types")}
    for video in videos:
        for name, row in make_rows(video, rng, arguments):
            if name == "train":
                row["process"] = ""  # RL has no demonstrations
            row["path"] = video.path + (".png" if row["data_type"] == "image" else ".mp4")
            files[name].append(row)
    for name, rows in files.items():
        # Neighbouring rows would otherwise be of one video.
        rng.shuffle(rows)
        for index, row in enumerate(rows):
            row["problem_id"] = f"{name}-{index}"
        lines = ",\n".join(map(json.dumps, rows))
        (folder / f"{name}.json").write_text(f"[\n{lines}\n]\n")
    made = {f"{video.path}.mp4": video for video in videos}
    shown = dict.fromkeys(row["path"] for row in files["train_cot"])
    return [made[path] for path in shown if path in made]


# -------------------------------------------------------------------- tokenizer, model, CLIP

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# Whole tokens, but not special, as Qwen3 has them.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_processor(folder):
    """Train a byte-level BPE on the toy's own text, and wrap it in a Qwen2.5-VL processor with the
    real special tokens."""
    corpus = ["user\n", "assistant\n"]  # of the chat template
    for example in load_examples(folder / "train_cot.json")[-4000:]:
        text = f"{build_prompt(example)}\n{target_text(example)}"
        # No merge may cross a tag.
        corpus += re.split("|".join(TAGS), text)
    # What a question or a trace says of its video are tokens, " red", " 2" or "A. red"; what
    # stands between them merges to one, such as ". 2s" or "What colour are the balls in the". All
    # bytes are in the alphabet, so that any other text can be tokenized too.
    colours = "|".join(COLOURS)
    facts = rf"[A-D]\. ({colours})\b| ?\b({'|'.join(TEXTURES)}|{colours})\b| [123](?=\.)"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(facts), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        video_processor=Qwen2VLVideoProcessor(),
        tokenizer=fast,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(processor, seed, hidden=128, layers=3, group=1):
    """Make an untrained Qwen2.5-VL of the real classes, with 1.0 M parameters.

    Weights start at 0.1, about 1/sqrt(width): at the usual 0.02, made for widths of thousands, a
    model this narrow takes three times as many steps until it begins to see.

    Args:
        processor: of make_processor.
        seed: of the weights.
        hidden: width of the language model.
        layers: its layers.
        group: query heads per key head.
    """
    # The weights are drawn when the model is made, below.
    torch.manual_seed(seed)
    token = processor.tokenizer.convert_tokens_to_ids
    text_config = dict(
        vocab_size=len(processor.tokenizer),
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
        rope_parameters={"rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    )
    vision_config = dict(
        depth=2,
        hidden_size=64,
        intermediate_size=128,
        num_heads=4,
        out_hidden_size=hidden,
        window_size=56,
        fullatt_block_indexes=[0, 1],
        # A line of the listing has four tokens, a slot of two seconds four positions: the two keep
        # their distance, which is what a model this small finds a slot by.
        tokens_per_second=2,
        initializer_range=0.1,
    )
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


CLIP_SIZE = 56  # pixels a side
CLIP_TOKENS = 24  # of a caption
CLIP_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": CLIP_SIZE,
        "layers": 2,
        "width": 96,
        "head_width": 24,
        "patch_size": 14,
    },
    "text_cfg": {
        "context_length": CLIP_TOKENS,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 1,
    },
}
CLIP_VIDEOS = 80  # at most; enough
CLIP_BATCH = 64
CAPTIONS = (
    "{colour} balls in the {texture} scene",
    "the {texture} scene",
    "{colour} balls",
    "the balls in the {texture} scene",
    "the {texture} and the {rival} scene",
    "the {rival} and the {texture} scene",
    COLOUR_QUESTION.format("{texture}"),
    COUNT_QUESTION.format("{texture}"),
    ORDER_QUESTION.format("{texture}", "{rival}"),
    ORDER_QUESTION.format("{rival}", "{texture}"),
)


def caption_batch(labels, rng):
    """Write one caption a frame, and find all frames that it fits.

    Args:
        labels: (texture, colour) of each frame.
        rng: random.Random.
    Returns:
        Captions, and a bool tensor (frames, captions).
    """
    captions = []
    # A caption describes its own frame, and all frames of the batch that look like it.
    fits = []
    for texture, colour in labels:
        caption = rng.choice(CAPTIONS)
        rival = rng.choice([name for name in TEXTURES if name != texture])
        caption = caption.format(texture=texture, colour=colour, rival=rival)
        captions.append(caption)
        words = caption.split()
        # A caption fits any value of what it does not name.
        textures = TEXTURES.keys() & words or TEXTURES
        colours = COLOURS.keys() & words or COLOURS
        fits.append([other[0] in textures and other[1] in colours for other in labels])
    return captions, torch.tensor(fits).T


def clip_frames(folder, videos):
    """Frames to train CLIP on.

    Returns:
        Normalised images (frames, 3, CLIP_SIZE, CLIP_SIZE), and (texture, colour) of each.
    """
    images = []
    labels = []
    for video in videos[:CLIP_VIDEOS]:
        _, times, frames = sample_video(f"{folder}/{video.path}.mp4", 16)
        images.append(frames)
        for second in times:
            for scene in video.scenes:
                if scene.start <= second < scene.end:
                    labels.append((scene.texture, scene.colour))
    # As prior.py shows frames to CLIP: resized, then normalised.
    images = torch.from_numpy(np.concatenate(images))  # (frames, H, W, 3)
    images = images.permute(0, 3, 1, 2).float() / 255
    images = F.interpolate(images, CLIP_SIZE, mode="bicubic", antialias=True).clamp(0, 1)
    images = normalize(images, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    return images, labels


def make_clip(folder, videos, arguments):
    """Train a tiny open_clip model, with open_clip's own tokenizer, on toy frames and captions."""
    rng = random.Random(arguments.seed)
    torch.manual_seed(arguments.seed)
    model = open_clip.CLIP(**CLIP_CONFIG)
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=CLIP_TOKENS)
    images, labels = clip_frames(folder, videos)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, arguments.clip_steps)
    for _ in tqdm(range(arguments.clip_steps), desc="toy: CLIP"):
        chosen = rng.sample(range(len(labels)), CLIP_BATCH)
        captions, fits = caption_batch([labels[index] for index in chosen], rng)
        image_features, text_features, scale = model(images[chosen], tokenizer(captions))
        logits = scale * image_features @ text_features.T  # (frames, captions)
        # CLIP's symmetric loss, with all fitting pairs as targets.
        targets = fits.float()
        image_loss = F.cross_entropy(logits, F.normalize(targets, p=1))
        text_loss = F.cross_entropy(logits.T, F.normalize(targets.T, p=1))
        loss = (image_loss + text_loss) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        # A sharper softmax has denormal numbers, which slow a CPU down.
        model.logit_scale.data.clamp_(max=math.log(30))
    # open_clip's folder format, which is loaded by the name local-dir:FOLDER.
    (folder / "clip").mkdir()
    config = {
        "model_cfg": CLIP_CONFIG,
        "preprocess_cfg": {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD},
    }
    (folder / "clip/open_clip_config.json").write_text(json.dumps(config, indent=1))
    save_file(model.state_dict(), folder / "clip/open_clip_model.safetensors")


# --------------------------------------------------------------------------------- the toy


def is_made(folder):
    """Whether a folder holds a finished toy of this version."""
    done = Path(folder) / "toy.json"
    return done.is_file() and json.loads(done.read_text())["version"] == VERSION


def make_toy(output_dir, **settings):
    """Make a toy, or reuse a finished one in the folder.

    Args:
        output_dir: folder of the toy.
        settings: fields of ToyArguments. A finished toy must share them; one of another version is
            made anew, with its own settings. The others have their defaults.
    Returns:
        All settings that the toy was made with.
    Raises:
        DataError: the folder holds something else.
    """
    folder = Path(output_dir)
    done = folder / "toy.json"  # written last: a folder without it is unfinished
    # An older toy's questions or weights would silently give other results.
    asked = settings | {"version": VERSION}
    if done.is_file():
        # One of before a setting was there has its default.
        made = asdict(ToyArguments()) | json.loads(done.read_text())
        if made | asked == made:
            return made
        if made | settings == made:
            print(f"{folder} is a toy of version {made.pop('version')}; it is made anew")
            settings = made
            for part in ("videos", "model", "clip"):
                shutil.rmtree(folder / part, ignore_errors=True)
            for file in folder.glob("*.json"):
                file.unlink()
    if folder.exists() and any(folder.iterdir()):
        raise DataError(
            f"{folder} holds files, but no finished toy with {asked} (see toy.json there); "
            "remove it or choose another folder"
        )
    # In order: the tokenizer is trained on the questions, CLIP on the videos.
    arguments = ToyArguments(**settings | {"output_dir": str(folder)})
    videos = make_dataset(folder, arguments)
    processor = make_processor(folder)
    processor.save_pretrained(folder / "model")
    make_model(processor, arguments.seed).save_pretrained(folder / "model")
    make_clip(folder, videos, arguments)
    recipe = asdict(arguments) | {"version": VERSION}
    done.write_text(json.dumps(recipe))
    return recipe


def main():
    settings = vars(Parser(ToyArguments, __doc__).parse_args())
    recipe = make_toy(**settings)
    print(f"a toy is in {settings['output_dir']}: {recipe}")


if __name__ == "__main__":
    with exit_codes("toy.py", "remove the folder and begin anew"):
        main()
