"""Sampling: a group of completions from one KV cache."""

import inspect
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import deepspeed
import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from common.policy import Layout, Policy


def sample_tokens(logits, uniform, temperature=1.0, top_p=1.0, top_k=0):
    """Inverse-CDF sampling: logits (N, V), uniform (N,) in [0, 1) -> (N,). temperature 0 is greedy; top_k keeps the k likeliest (0: all),
    top_p then the nucleus of their distribution, as in transformers."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, order = torch.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True)
    if top_k:
        probs, order = (
            probs[:, :top_k] / probs[:, :top_k].sum(dim=-1, keepdim=True),
            order[:, :top_k],
        )
    cumulative = probs.cumsum(dim=-1)
    probs = probs.masked_fill(
        cumulative - probs >= top_p, 0.0
    )  # the token that crosses top_p stays
    cumulative = probs.cumsum(dim=-1)
    chosen = (
        (cumulative <= uniform[:, None] * cumulative[:, -1:])
        .sum(dim=-1)
        .clamp(max=probs.shape[-1] - 1)
    )
    return order.gather(-1, chosen[:, None]).squeeze(-1)


def row_uniforms(seeds, length):
    """One stream of random numbers per row, from its own seed: (N, length). A row's sample does not depend on its neighbours or rank."""
    return torch.stack(
        [torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


class RoomyLayer(DynamicLayer):
    """A layer of the KV cache with room for tokens to come: transformers' copies the whole cache for every one of them."""

    def update(self, key_states, value_states, *args, **kwargs):
        """Appends (B, key heads, n, d) each -> all keys, all values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = [states[:, :, :0] for states in (key_states, value_states)]
        before = self.get_seq_length()
        after = before + key_states.shape[2]
        if after > self.room[0].shape[2]:
            self.room = [
                pad(states[:, :, :before], (0, 0, 0, after - before + 1024)) for states in self.room
            ]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, before:after] = states
        self.keys, self.values = (room[:, :, :after] for room in self.room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx):
        self.room = [states[beam_idx] for states in self.room]


class FixedLayer(DynamicLayer):
    """A layer of the KV cache as large as it will ever be, written at the columns that a tensor names: a CUDA graph can replay it."""

    def __init__(self, prompt, room, columns):
        super().__init__()
        self.keys, self.values = (
            pad(states, (0, 0, 0, room)) for states in (prompt.keys, prompt.values)
        )
        self.columns, self.is_initialized = columns, True

    def update(self, key_states, value_states, *args, **kwargs):
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            room.index_copy_(2, self.columns, states)
        return self.keys, self.values


def replay(step, steps, going, device):
    """Calls step() `steps` times, or until going() is false, which is asked every 16 steps. On a GPU from the fourth time on as one CUDA
    graph: no kernel is launched by itself then, and nothing waited for between two questions. RuntimeError if it cannot be captured."""
    for done in range(steps):
        if done % 16 == 0 and not going():
            return
        if done == 3 and device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(
                    graph, capture_error_mode="thread_local"
                ):  # records the step; other threads, NCCL's, may go on
                    step()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    "the decode step cannot be captured as a CUDA graph; --cuda_graph false samples without one"
                ) from error
            step = graph.replay
        step()


def sample_fixed(model, cache, hidden, prompt_mask, position, counts, uniforms, choose, eos):
    """What rollout() does after the prompt, in shapes that never change: what has ended goes on until all have. hidden (B, 1, D),
    prompt_mask (B, P), position (B,), uniforms (N, steps), choose as rollout()'s -> tokens (N, steps), log-probs, lengths (N,)."""
    device, (batch, prompt), width, steps = (
        hidden.device,
        prompt_mask.shape,
        max(counts),
        uniforms.shape[1],
    )
    there = (
        torch.arange(width, device=device) < torch.tensor(counts, device=device)[:, None]
    )  # (B, W)
    spread = torch.zeros(batch, width, steps, device=device).masked_scatter(
        there[..., None], uniforms
    )
    tokens, logps = torch.full(spread.shape, eos[0].item(), device=device), torch.zeros_like(spread)
    alive, lengths = there.clone(), torch.zeros_like(there, dtype=torch.long)
    at, own = torch.zeros(1, dtype=torch.long, device=device), torch.arange(width, device=device)
    columns = own + prompt
    for index, layer in enumerate(cache.layers):  # one by one, so that the old ones go
        cache.layers[index] = FixedLayer(layer, width * (steps - 1), columns)
    seen = pad(
        prompt_mask[:, None, None].expand(-1, 1, width, -1), (0, width * (steps - 1))
    )  # (B, 1, W, all columns)
    cached = cache_argument(model.model.language_model, cache)

    def pick(hidden):
        logits = model.lm_head(hidden).flatten(0, 1)  # (B*W, V)
        token, logp = choose(logits, spread.index_select(2, at).flatten())
        tokens.index_copy_(2, at, token.view(batch, width, 1))
        logps.index_copy_(2, at, logp.view(batch, width, 1))
        lengths.add_(alive)
        alive.logical_and_(
            (token[:, None] != eos).all(1).view(batch, width)
        )  # isin sorts where there are many, and waits

    def step():
        columns.copy_(prompt + at * width + own)
        seen.scatter_(3, columns.expand(batch, 1, -1)[..., None], True)
        embeds = model.get_input_embeddings()(tokens.index_select(2, at).squeeze(2))
        output = model.model.language_model(
            inputs_embeds=embeds,
            attention_mask=seen,
            use_cache=True,
            **cached,
            position_ids=(position + at)[None, :, None].expand(3, -1, width),
        )
        at.add_(1)
        pick(output.last_hidden_state)

    pick(hidden.expand(-1, width, -1))
    replay(step, steps - 1, lambda: bool(alive.any()), device)
    ended = torch.arange(steps, device=device) >= lengths[..., None]
    return (
        tokens.masked_fill(ended, eos[0])[there],
        logps.masked_fill(ended, 0.0)[there],
        lengths[there],
    )


def cache_argument(language, cache):
    """{name: cache} of a language model's forward: past_key_values, which transformers 5.24 calls cache and 5.40 ends."""
    return {
        "cache"
        if "cache" in inspect.signature(language.forward).parameters
        else "past_key_values": cache
    }


@torch.no_grad()
def rollout(
    model,
    prompts,
    counts,
    seeds,
    max_new_tokens,
    eos_ids,
    banned_ids=(),
    temperature=1.0,
    top_p=0.95,
    top_k=0,
    return_logp=False,
    graph=False,
):
    """Sample `counts[b]` completions of prompt b: encode and prefill once; all completions of a prompt then read the one KV cache.

    A step appends one column a completion to its prompt's cache, [prompt | first tokens | second tokens | ...], and a completion sees the
    prompt and its own columns. So the prompt's keys and values exist once, not once a completion, and what has ended just leaves.
    seeds: one int per completion (sum of counts). banned_ids are never sampled (vision placeholders break the next forward). graph: the
    same in shapes that never change, on a GPU as one CUDA graph, if the family packs; False shrinks with what has ended, kernel by kernel.
    Returns completions (N, T) right-padded with eos, mask (N, T), and with return_logp the model's log-probabilities (N, T) of the tokens
    (0 where masked): before temperature, top-k, top-p and bans, as a forward on the completions gives them.
    """
    policy = Policy(model)
    if not policy.packs:
        prompts, counts = prompts.repeat(counts), [1] * sum(counts)
    language, device = model.model.language_model, prompts.input_ids.device
    cache = DynamicCache(config=language.config)
    cache.layers = [
        RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    embeds, more = policy.embed(prompts)
    more |= (
        {"layout": Layout(prompts.padding())}
        if policy.packs
        else {"attention_mask": prompts.mask.long()}
    )
    cached = cache_argument(language, cache)
    output = language(
        inputs_embeds=embeds, position_ids=prompts.position_ids, use_cache=True, **cached, **more
    )
    position, mask, uniforms = (
        prompts.position_ids.amax(dim=(0, 2)) + 1,
        prompts.mask,
        row_uniforms(seeds, max_new_tokens).to(device),
    )
    eos, banned = (
        torch.tensor(eos_ids, device=device),
        torch.tensor(list(banned_ids), dtype=torch.long, device=device),
    )

    def choose(logits, uniform):  # (n, V), (n,) -> tokens, their log-probs (n,)
        token = sample_tokens(
            logits.index_fill(-1, banned, float("-inf")), uniform, temperature, top_p, top_k
        )
        return token, torch.log_softmax(logits.float(), dim=-1).gather(-1, token[:, None]).squeeze(
            -1
        )

    def finish(tokens, logps, lengths):
        longest = int(lengths.max())
        valid = torch.arange(longest, device=device)[None] < lengths[:, None]
        return (
            (tokens[:, :longest], valid, logps[:, :longest])
            if return_logp
            else (tokens[:, :longest], valid)
        )

    if graph and policy.packs:
        return finish(
            *sample_fixed(
                model,
                cache,
                output.last_hidden_state[:, -1:],
                mask,
                position,
                counts,
                uniforms,
                choose,
                eos,
            )
        )
    active = torch.full(
        (len(counts), max(counts)), -1, device=device
    )  # (B, W): the completion that a query belongs to, -1: none
    for row, (count, before) in enumerate(zip(counts, accumulate(counts, initial=0), strict=False)):
        active[row, :count] = torch.arange(before, before + count, device=device)
    hidden = output.last_hidden_state[:, -1:].expand(-1, active.shape[1], -1)  # (B, W, D)
    owners = active[:, :0]  # (B, cached columns)
    tokens = torch.full((sum(counts), max_new_tokens), eos_ids[0], device=device)
    lengths, logps = (
        torch.zeros(sum(counts), dtype=torch.long, device=device),
        torch.zeros(sum(counts), max_new_tokens, device=device),
    )
    for step in range(max_new_tokens):
        alive = active >= 0
        rows = active[alive]  # (n,) completions
        logits = model.lm_head(hidden[alive])  # (n, V)
        token, logps[rows, step] = choose(logits, uniforms[rows, step])
        tokens[rows, step], lengths[rows] = token, step + 1
        rows = rows.masked_fill(torch.isin(token, eos), -1)
        if step + 1 == max_new_tokens or bool((rows < 0).all()):
            break
        inputs = torch.zeros_like(active)
        inputs[alive], active[alive] = token, rows
        order = (
            (active < 0).int().argsort(dim=1, stable=True)[:, : int((active >= 0).sum(1).max())]
        )  # what has ended goes to the end
        active, inputs = active.gather(1, order), inputs.gather(1, order)
        going = (active >= 0).any(1)
        if int(going.sum()) * 2 <= len(
            going
        ):  # prompts whose completions have all ended leave the batch
            keep = going.nonzero().squeeze(1)
            cache.reorder_cache(keep)  # which every kind of layer has
            active, inputs, position, mask, owners = (
                tensor[keep] for tensor in (active, inputs, position, mask, owners)
            )
        owners = torch.cat([owners, active], dim=1)
        own = (owners[:, None] == active[..., None]) & (active >= 0)[..., None]  # (B, W, columns)
        seen = torch.cat(
            [mask[:, None].expand(-1, active.shape[1], -1), own], dim=2
        )  # (B, W, P + columns)
        seen = seen[:, None] if policy.packs else seen[:, 0].long()
        output = language(
            inputs_embeds=model.get_input_embeddings()(inputs),
            attention_mask=seen,
            **cached,
            position_ids=(position + step)[None, :, None].expand(3, -1, active.shape[1]),
            use_cache=True,
        )
        hidden = output.last_hidden_state
    return finish(tokens, logps, lengths)


@dataclass(frozen=True)
class Turn:
    """How a checkpoint's chat template frames what the assistant says."""

    opening: (
        str  # what the prompt says already: "<think>\n" for templates that think first, else ""
    )
    end: int  # id of the token that ends the turn: the template's, else the tokenizer's end of sequence


@cache
def read_turn(processor):
    """The assistant's turn of a checkpoint, read off its chat template once -> Turn."""
    tokenizer = processor.tokenizer
    user = {"role": "user", "content": [{"type": "text", "text": "question"}]}
    prompt = processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    opening = re.search(r"<think>\s*$", prompt)
    # what the template writes behind an answer; its first token, if it is a special one, ends the turn
    assistant = {"role": "assistant", "content": [{"type": "text", "text": "an answer"}]}
    dialogue = processor.apply_chat_template([user, assistant], tokenize=False)
    behind = tokenizer(dialogue.rpartition("an answer")[2], add_special_tokens=False).input_ids
    added = tokenizer.added_tokens_decoder
    ends = bool(behind) and behind[0] in added and added[behind[0]].special
    return Turn(opening.group() if opening else "", behind[0] if ends else tokenizer.eos_token_id)


def stop_tokens(model, processor):
    """Ids that end a completion: those of the generation config, the tokenizer's and the end of the template's turn, without repeats."""
    told = model.generation_config.eos_token_id
    told = told if isinstance(told, list) else [told]
    wanted = [*told, processor.tokenizer.eos_token_id, read_turn(processor).end]
    return list(dict.fromkeys(token for token in wanted if token is not None))


def special_tokens(model, processor):
    """-> ids that end a completion, and the vision placeholders that none may contain."""
    config = model.config
    banned = [
        config.image_token_id,
        config.video_token_id,
        config.vision_start_token_id,
        config.vision_end_token_id,
    ]
    return stop_tokens(model, processor), banned


def sample_texts(
    model,
    processor,
    prompts,
    counts,
    seeds,
    max_new_tokens,
    temperature=1.0,
    top_p=0.95,
    top_k=0,
    return_logp=False,
    graph=False,
):
    """rollout() with the checkpoint's own stop and vision tokens -> completions (N, T), mask (N, T), texts[, log-probs (N, T)].

    The texts begin with what the prompt says in the assistant's place (Turn.opening), so that a think block is whole.
    """
    stop_and_banned = special_tokens(model, processor)
    tokens, mask, *logp = rollout(
        model,
        prompts,
        counts,
        seeds,
        max_new_tokens,
        *stop_and_banned,
        temperature,
        top_p,
        top_k,
        return_logp,
        graph,
    )
    opening = read_turn(processor).opening
    texts = [
        opening + processor.tokenizer.decode(row[valid], skip_special_tokens=True)
        for row, valid in zip(tokens, mask, strict=True)
    ]
    return tokens, mask, texts, *logp


@contextmanager
def sampling(engine):
    """The bare model for a rollout phase: ZeRO-3 parameters gathered once, its hooks and its torch.nn.functional.linear (an autograd
    function that binds a signature on every call) off; all put back on leaving."""
    offload = getattr(
        engine.optimizer, "parameter_offload", engine.optimizer
    )  # an engine for inference has it in the optimizer's place
    model = engine.module.model
    training = model.training
    model.eval()
    try:
        if not hasattr(offload, "setup_zero_stage3_hooks"):  # not ZeRO-3
            yield model
        else:
            with deepspeed.zero.GatheredParameters(list(model.parameters())):
                offload._remove_module_hooks()
                offload.forward_hooks.clear()
                offload.backward_hooks.clear()
                linear, torch.nn.functional.linear = torch.nn.functional.linear, torch._C._nn.linear
                try:
                    yield model
                finally:
                    torch.nn.functional.linear = linear
                    offload.setup_zero_stage3_hooks()
    finally:
        model.train(training)
