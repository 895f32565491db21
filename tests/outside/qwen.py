"""Processors with the real Qwen vocabulary (in the package dashscope) and chat templates."""

import importlib.resources
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.convert_slow_tokenizer import TikTokenConverter

VOCABULARY = Path(importlib.resources.files("dashscope") / "resources" / "qwen.tiktoken")
# how Qwen cuts text before its byte pairs are merged: published with the vocabulary
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# the ids of Qwen2.5-VL from 151643 on, in their order
SPECIAL = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>
<|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|>
<|vision_pad|> <|image_pad|> <|video_pad|>""".split()
# not special, as Qwen3 has them
THINK = ("<think>", "</think>")

# As Qwen2.5-VL's: a system turn, media and text in their order, a line break behind a turn.
TEMPLATE = (
    "{% if messages[0].role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING_TEMPLATE = TEMPLATE.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")


@cache
def converted():
    """The vocabulary as JSON of the library tokenizers; its merges take seconds to find."""
    converter = TikTokenConverter(str(VOCABULARY), pattern=PATTERN, extra_special_tokens=SPECIAL)
    return converter.converted().to_str()


@cache
def qwen_tokenizer(eos="<|im_end|>", think=True):
    """Qwen2.5-VL's tokenizer; with `think` also Qwen3's two tags. It takes seconds to load."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(converted()),
        eos_token=eos,
        pad_token="<|endoftext|>",
        padding_side="left",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    if think:
        tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in THINK])
    return tokenizer


@cache
def qwen_processor(template=TEMPLATE, eos="<|im_end|>"):
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        video_processor=Qwen2VLVideoProcessor(),
        tokenizer=qwen_tokenizer(eos),
        chat_template=template,
    )
