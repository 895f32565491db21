"""Sampling: a group of completions from one KV cache.

    settings = Sampling(max_new_tokens=256, eos_ids=[tokenizer.eos_token_id])
    samples = rollout(model, prompts, counts=[8], seeds=range(8), settings=settings)

Letters in shapes: B prompts of P tokens, N completions in all, at most W of one prompt and at most
T tokens long, D hidden size, V vocabulary.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from common.inputs import BATCH_TOKENS, token_batches
from common.policy import Policy, Prompts, Scored, cache_argument, collate, vision_tokens


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: always the likeliest token
    top_p: float = 0.95  # nucleus of the distribution that top_k leaves
    top_k: int = 0  # 0: all tokens
    graph: bool = False  # fixed shapes, on a GPU as one CUDA graph; families that pack only
    eos_ids: tuple = ()  # end a completion; sample_texts takes the checkpoint's
    banned_ids: tuple = ()  # never sampled; sample_texts bans the vision placeholders


class Samples(NamedTuple):
    """Completions of all prompts, in order."""

    tokens: torch.Tensor  # (N, T), right-padded with the first of eos_ids
    mask: torch.Tensor  # (N, T) bool, False on padding
    # (N, T) the model's log-probabilities of the tokens, before temperature, top-k, top-p and bans;
    # 0 where masked
    logp: torch.Tensor
    ended: torch.Tensor  # (N,) bool, by one of eos_ids; otherwise cut at max_new_tokens
    texts: list | None = None  # N decoded completions, by sample_texts alone


def sample_tokens(logits, uniform, settings):
    """Sample by inverting the cumulative distribution, with top-k and top-p as in transformers.

    Args:
        logits: (N, V).
        uniform: (N,) in [0, 1).
        settings: Sampling.
    Returns:
        Token ids (N,).
    """
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    probs = torch.softmax(logits.float() / settings.temperature, dim=-1)
    order = None
    if settings.top_k:
        probs, order = probs.topk(min(settings.top_k, probs.shape[-1]), dim=-1)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    if settings.top_p < 1:
        # on a GPU the sort of a whole vocabulary takes many times as long
        least_of_nucleus = least_by_bisection if probs.is_cuda else least_by_sort
        probs = probs.masked_fill(probs < least_of_nucleus(probs, settings.top_p), 0.0)
    cumulative = probs.cumsum(dim=-1)
    # below the sum, which rounding could reach
    total = cumulative[:, -1:]
    point = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    chosen = (cumulative <= point).sum(dim=-1, keepdim=True)
    return (chosen if order is None else order.gather(-1, chosen)).squeeze(-1)


def least_by_sort(probs, top_p):
    """Find the least probability in a nucleus: what is likelier sums to less than top_p.

    Args:
        probs: (N, V) float32.
    Returns:
        (N, 1), so that the token that crosses top_p stays.
    """
    falling = probs.sort(dim=-1, descending=True).values
    likelier = pad(falling.cumsum(dim=-1)[:, :-1], (1, 0))
    inside = (likelier < top_p).sum(dim=-1, keepdim=True)
    return falling.gather(-1, inside - 1)


def least_by_bisection(probs, top_p):
    """The same as least_by_sort() by bisection."""
    # positive floats are in the order of their bits; these are 0 and 1
    low = torch.zeros_like(probs[:, :1], dtype=torch.int32)
    high = low + 0x3F800000
    for _ in range(30):
        middle = (low + high) // 2
        likelier = probs > middle.view(torch.float32)
        inside = (probs * likelier).sum(-1, keepdim=True) < top_p
        high = torch.where(inside, middle, high)
        low = torch.where(inside, low, middle + 1)
    return high.view(torch.float32)


def row_uniforms(seeds, length):
    """Uniform numbers (N, length), each row from its own seed, whatever its neighbours and rank."""
    generators = map(torch.Generator().manual_seed, seeds)
    return torch.stack([torch.rand(length, generator=generator) for generator in generators])


@dataclass
class Columns:
    """The completions' columns of a KV cache, behind their prompt's."""

    newest: torch.Tensor  # (1,) the one that a step writes
    shown: int  # how many are read


class RoomyLayer(DynamicLayer):
    """A layer of the KV cache with room for more: transformers' is copied whole for every token.

    Args:
        prompt: layer with the keys and values of B prompts, (B, key heads, P, d) each.
        width, more: completions of each prompt, columns of each completion.
        columns: Columns of all layers.
        apart: whether attention takes pairs (prompt, completions), as policy.attend_apart does.
            Otherwise a prompt has one completion, in whose room it stands, too.
    """

    def __init__(self, prompt, width, more, columns, apart):
        super().__init__()
        self.is_initialized = True
        self.keys = prompt.keys
        self.values = prompt.values
        self.columns = columns
        self.apart = apart
        self.begin = 0 if apart else prompt.keys.shape[2]
        self.rooms = []
        for states in (prompt.keys, prompt.values):
            own = states[:, :, None, : self.begin]
            # (B, key heads, W, columns, d)
            self.rooms.append(pad(own, (0, 0, 0, more, 0, width - 1)))

    def update(self, key_states, value_states, *args, **kwargs):
        """Writes keys and values (B, key heads, W, d); returns all keys, all values."""
        shown = []
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room.index_copy_(3, self.begin + self.columns.newest, states[:, :, :, None])
            shown.append(room[:, :, :, : self.begin + self.columns.shown])
        if self.apart:
            return (self.keys, shown[0]), (self.values, shown[1])
        self.keys, self.values = (own[:, :, 0] for own in shown)
        return self.keys, self.values

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.rooms = [room[beam_idx] for room in self.rooms]

    def narrow(self, order):
        """Keeps the completions order (B, fewer) of each prompt."""
        order = order[:, None, :, None, None]
        self.rooms = [room.take_along_dim(order, 2) for room in self.rooms]


# Columns of a fixed KV cache come in multiples of it: odd ones make a GPU's bfloat16 products slow.
ALIGNED = 8


class Decoder:
    """Prompts in a KV cache, and the steps behind them.

    Args:
        width: completions of each prompt, W.
        fixed: whether all columns are read from the first step on.
    """

    def __init__(self, policy, prompts, settings, width, fixed):
        self.policy = policy
        self.settings = settings
        device = prompts.input_ids.device
        self.eos = torch.tensor(settings.eos_ids, dtype=torch.long, device=device)
        self.banned = torch.tensor(settings.banned_ids, dtype=torch.long, device=device)
        language = policy.model.model.language_model
        self.cache = DynamicCache(config=language.config)
        self.options = dict(use_cache=True, **cache_argument(language, self.cache))
        # encode and prefill: no completion yet
        nothing = prompts.input_ids[:, :0, None]  # (B, 0, 1)
        output = policy.run(prompts, nothing, nothing.bool(), **self.options)
        self.hidden = output.last_hidden_state[:, -1:]  # (B, 1, D)
        self.mask = prompts.mask  # (B, P)
        self.position = prompts.position_ids.amax(dim=(0, 2)) + 1  # (B,) of the first new token
        # room for all tokens but the last, and fixed columns in multiples of ALIGNED
        room = settings.max_new_tokens - 1
        more = 0
        if fixed:
            room += -room % ALIGNED
            more = -self.mask.shape[1] % ALIGNED
            self.mask = pad(self.mask, (more, 0))
        self.columns = Columns(torch.tensor([-1], device=device), room)
        # one by one, so that no two whole caches exist; recurrent layers do not grow
        for index, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer:
                if more:
                    layer.keys = pad(layer.keys, (0, 0, more, 0))
                    layer.values = pad(layer.values, (0, 0, more, 0))
                roomy = RoomyLayer(layer, width, room, self.columns, policy.packs)
                self.cache.layers[index] = roomy

    def step(self, tokens, seen):
        """tokens (B, W), seen (B, P + columns shown) or (B, 1) bool -> hidden (B, W, D)."""
        model = self.policy.model
        positions = (self.position + self.columns.newest)[None, :, None]
        output = model.model.language_model(
            inputs_embeds=model.get_input_embeddings()(tokens),
            position_ids=positions.expand(3, -1, tokens.shape[1]),
            attention_mask=seen[:, None, None] if self.policy.packs else seen.long(),
            **self.options,
        )
        return output.last_hidden_state

    def choose(self, hidden, uniform):
        """hidden (n, D), uniform (n,) -> tokens (n,), their log-probs (n,)."""
        logits = self.policy.model.lm_head(hidden)  # (n, V)
        allowed = logits.index_fill(-1, self.banned, float("-inf"))
        token = sample_tokens(allowed, uniform, self.settings)
        logp = torch.log_softmax(logits.float(), dim=-1)
        return token, logp.gather(-1, token[:, None]).squeeze(-1)


@torch.no_grad()
def rollout(model, prompts, counts, seeds, settings):
    """Sample completions: encode and prefill a prompt once; its completions share one KV cache.

    A step appends a column to every completion's own cache and reads it and the prompt's, which
    exists once, whatever the number of completions.

    Args:
        model: the bare model (see sampling()).
        prompts: Prompts of B rows.
        counts: completions of each prompt, B ints.
        seeds: one int per completion, sum(counts) of them.
        settings: Sampling.
    Returns:
        Samples with N = sum(counts) rows.
    """
    policy = Policy(model)
    if not policy.packs:
        prompts = prompts.repeat(counts)
        counts = [1] * sum(counts)
    device = prompts.input_ids.device
    # W places a prompt, the largest count
    fixed = settings.graph and policy.packs
    decoder = Decoder(policy, prompts, settings, max(counts), fixed)
    places = torch.arange(max(counts), device=device)
    there = places < torch.tensor(counts, device=device)[:, None]  # (B, W) holds a completion
    uniforms = row_uniforms(seeds, settings.max_new_tokens).to(device)
    decode = sample_fixed if fixed else sample_shrinking
    tokens, logp = decode(decoder, there, uniforms)
    # a completion goes up to the first token that ends it
    ends = torch.isin(tokens, decoder.eos)
    mask = ends.cumsum(1) - ends.long() == 0  # (N, steps)
    longest = int(mask.any(0).sum())
    mask = mask[:, :longest]
    padding = settings.eos_ids[0] if settings.eos_ids else 0
    tokens = tokens[:, :longest].masked_fill(~mask, padding)
    logp = logp[:, :longest].masked_fill(~mask, 0.0)
    return Samples(tokens, mask, logp, ends.any(1))


def sample_shrinking(decoder, there, uniforms):
    """Sample step by step in a batch that shrinks with every completion that ends.

    Args:
        decoder: Decoder of B prompts.
        there: (B, W) bool, places that hold a completion.
        uniforms: (N, steps) random numbers.
    Returns:
        tokens (N, steps), log-probs (N, steps); behind a completion's end anything.
    """
    steps = uniforms.shape[1]
    tokens = torch.zeros_like(uniforms, dtype=torch.long)
    logps = torch.zeros_like(uniforms)
    # without padding a packing model needs no mask
    hides = not (decoder.policy.packs and bool(decoder.mask.all()))
    # (B, W) the completion that a query belongs to, -1: none
    numbers = there.flatten().cumsum(0).view(there.shape) - 1
    active = torch.where(there, numbers, -1)
    hidden = decoder.hidden.expand(-1, there.shape[1], -1)  # (B, W, D)
    for step in range(steps):
        alive = active >= 0
        rows = active[alive]  # (n,) completions
        token, logp = decoder.choose(hidden[alive], uniforms[rows, step])
        tokens[rows, step] = token
        logps[rows, step] = logp
        rows = rows.masked_fill(torch.isin(token, decoder.eos), -1)
        if step + 1 == steps or bool((rows < 0).all()):
            break
        active[alive] = rows
        # ended completions go to the end of their row and are cut off
        ended = active < 0
        width = int((~ended).sum(1).max())
        if width < active.shape[1]:
            order = ended.int().argsort(dim=1, stable=True)[:, :width]
            active = active.gather(1, order)
            for layer in decoder.cache.layers:
                layer.narrow(order)
        # prompts whose completions have all ended leave the batch, once they are half of it
        keep = (active >= 0).any(1).nonzero().squeeze(1)
        if len(keep) * 2 <= len(active):
            decoder.cache.reorder_cache(keep)  # every kind of layer has it
            decoder.position = decoder.position[keep]
            decoder.mask = decoder.mask[keep]
            active = active[keep]
        decoder.columns.newest.fill_(step)
        decoder.columns.shown = step + 1
        seen = pad(decoder.mask, (0, step + 1), value=True) if hides else decoder.mask[:, :1]
        # what an ended completion is given is not read
        hidden = decoder.step(tokens[active, step], seen)
    return tokens, logps


def sample_fixed(decoder, there, uniforms):
    """Sample as sample_shrinking, in shapes that never change, so that a CUDA graph can replay it.

    A completion that has ended goes on until all have; what it writes then is not read.
    """
    batch, width = there.shape
    steps = uniforms.shape[1]
    prompt = decoder.mask.shape[1]
    there = there.flatten()  # (B * W,)
    # what a step reads and writes, in place
    alive = there.clone()
    spread = uniforms[there.cumsum(0) - 1]  # (B * W, steps) the numbers of each place
    tokens = torch.zeros_like(spread, dtype=torch.long)
    logps = torch.zeros_like(spread)
    newest = decoder.columns.newest  # (1,) column of the step, -1 before the first
    seen = pad(decoder.mask, (0, decoder.columns.shown))  # (B, P + room)

    def pick(hidden):
        at = newest + 1
        uniform = spread.index_select(1, at).squeeze(1)
        token, logp = decoder.choose(hidden.flatten(0, 1), uniform)
        tokens.index_copy_(1, at, token[:, None])
        logps.index_copy_(1, at, logp[:, None])
        # not isin: with many eos ids it sorts, which a graph cannot capture
        alive.logical_and_((token[:, None] != decoder.eos).all(1))

    def step():
        newest.add_(1)
        seen.index_fill_(1, prompt + newest, True)
        pick(decoder.step(tokens.index_select(1, newest).view(batch, width), seen))

    pick(decoder.hidden.expand(-1, width, -1))
    replay(step, steps - 1, lambda: bool(alive.any()), alive.device)
    return tokens[there], logps[there]


def replay(step, steps, going, device):
    """Call step() `steps` times, or until going() is false, which is asked every 16 steps.

    On a GPU the fourth and later calls are one captured CUDA graph: nothing is launched kernel by
    kernel, and the host waits for the device only where it asks.

    Raises:
        RuntimeError: the step cannot be captured.
    """
    for done in range(steps):
        if done % 16 == 0 and not going():
            return
        if done == 3 and device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            try:
                # thread_local: other threads, such as NCCL's, may go on
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    step()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    "the decode step cannot be captured as a CUDA graph; "
                    "--cuda_graph false samples without one"
                ) from error
            step = graph.replay
        step()


class Turn(NamedTuple):
    """How a checkpoint's chat template frames the assistant's turn."""

    opening: str  # what the prompt already ends with: "<think>\n" or ""
    end: int  # id of the token that ends the turn


@cache
def read_turn(processor):
    """Read the assistant's Turn from the checkpoint's chat template, once per processor."""
    tokenizer = processor.tokenizer
    user = {"role": "user", "content": [{"type": "text", "text": "question"}]}
    prompt = processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    opening = re.search(r"(<think>\s*)?\Z", prompt).group()
    # a special token that the template writes right behind an answer ends the turn
    assistant = {"role": "assistant", "content": [{"type": "text", "text": "an answer"}]}
    dialogue = processor.apply_chat_template([user, assistant], tokenize=False)
    behind = tokenizer(dialogue.rpartition("an answer")[2], add_special_tokens=False).input_ids
    end = tokenizer.eos_token_id
    added = tokenizer.added_tokens_decoder
    if behind and behind[0] in added and added[behind[0]].special:
        end = behind[0]
    return Turn(opening, end)


def stop_tokens(model, processor):
    """Ids that end a completion: generation config, tokenizer and chat template, each once."""
    stops = model.generation_config.eos_token_id
    if not isinstance(stops, list):
        stops = [stops]
    stops = [*stops, processor.tokenizer.eos_token_id, read_turn(processor).end]
    return list(dict.fromkeys(token for token in stops if token is not None))


def sample_texts(model, processor, prompts, counts, seeds, settings):
    """rollout() with the checkpoint's stop tokens and without vision tokens -> Samples with texts.

    A text begins with what the prompt already says in the assistant's place (Turn.opening), so that
    a think block is whole. Vision placeholders are banned because they break the next forward.
    """
    settings = replace(
        settings, eos_ids=stop_tokens(model, processor), banned_ids=vision_tokens(model.config)
    )
    samples = rollout(model, prompts, counts, seeds, settings)
    opening = read_turn(processor).opening
    texts = []
    for row, valid in zip(samples.tokens, samples.mask, strict=True):
        texts.append(opening + processor.tokenizer.decode(row[valid], skip_special_tokens=True))
    return samples._replace(texts=texts)


@dataclass
class Answers:
    """A batch of answers, one to each of B prompts."""

    places: list  # B, of the prompts among the inputs
    prompts: Prompts
    samples: Samples
    scored: Scored | None  # with one completion a prompt; None if no layer was asked for


@torch.no_grad()
def answer_inputs(model, processor, inputs, seeds, settings, budget=BATCH_TOKENS, **layers):
    """Sample one answer to each question, as evaluation, held-out scoring and figures do.

    Args:
        inputs: list of media.ModelInputs.
        seeds: an int for each.
        settings: Sampling.
        budget: see token_batches.
        layers: hidden_layers and attention_layer of Policy.forward; a second forward over the
            answers reads them.
    Yields:
        Answers.
    """
    device = model.get_input_embeddings().weight.device
    lengths = [len(one.input_ids) for one in inputs]
    for places in token_batches(lengths, settings.max_new_tokens, budget):
        prompts = collate([inputs[place] for place in places], model).to(device)
        chosen = [seeds[place] for place in places]
        samples = sample_texts(model, processor, prompts, [1] * len(places), chosen, settings)
        scored = None
        if layers:
            completions = (samples.tokens[:, None], samples.mask[:, None])
            scored = Policy(model)(prompts, *completions, **layers)
        yield Answers(places, prompts, samples, scored)
