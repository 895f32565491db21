"""The last import of the fork server (warm.py): what every process forked from it needs once."""

import functools
import gc

import open_clip.factory

import toy

# It reads 49,000 merges, at every load of a CLIP.
open_clip.factory.SimpleTokenizer = functools.cache(open_clip.factory.SimpleTokenizer)
open_clip.get_tokenizer("ViT-B-32", context_length=toy.CLIP_TOKENS)

# Garbage collections leave out the million objects that all these imports have made.
gc.collect()
gc.freeze()
