"""Media decoded ahead of their turn, and batches of prompts of like length.

inputs = Inputs(encoder, workers=2, timeout=300.0)
for batch in inputs.each(batches):                 # lists of Ready, decoded a batch ahead
    ready, broken = inputs.take(batch)
"""

import math
import pickle
from dataclasses import dataclass, replace
from functools import partial

from common.data import Example, MediaError, Prior
from common.media import ModelInputs
from common.workers import Pool


@dataclass
class Ready:
    """An example whose turn comes, and then what the processor has made of it."""

    place: int  # in the run's order of examples; seeds what is random about it
    example: Example
    prior: Prior | None  # None for text and for demonstrations
    order: list | None = None  # of the control's frames; None without a control
    inputs: ModelInputs | None = None
    control: ModelInputs | None = None  # the same with shuffled frames
    spare: bool = False  # another rank's: this one takes part in a forward, and learns nothing


def keep_encoder(encoder):
    """Initializer of a worker: its encoder stays, with the media that it has decoded."""
    global worker_encoder
    worker_encoder = encoder


def encode(encoder, one):
    """Model inputs of a Ready and of its control (or None)."""
    control = None
    inputs = encoder.encode(one.example, one.prior)
    if one.order is not None:
        control = encoder.encode(one.example, one.prior, shuffle=one.order)
    return inputs, control


def in_worker(encode, one):
    """bytes of a pickle of what encode() makes: tensors as such would be passed on in shared memory
    that lives as long as the worker."""
    return pickle.dumps(encode(worker_encoder, one))


class Inputs:
    """Model inputs of examples, encoded by workers ahead of their turn.

    The accelerator does not wait for decoding, and a decoder that hangs costs only its example.
    With 0 workers an example is encoded in this process at its turn.

    Args:
        encoder: media.Encoder.
        workers: number of processes.
        timeout: seconds that a worker may take for an example.
        encode: function of the encoder and a Ready that returns its inputs and its control.
    """

    def __init__(self, encoder, workers, timeout, encode=encode):
        if workers > 0:
            # A copy without the media that this process has decoded.
            encoder = replace(encoder)
        self.pool = Pool(workers, timeout, initializer=partial(keep_encoder, encoder))
        self.encode = encode
        self.tasks = {}

    def each(self, batches):
        """Yields lists of Ready in their order; the next one is encoded meanwhile."""
        waiting = []
        try:
            for batch in batches:
                for one in batch:
                    self.tasks[one.place] = self.pool.submit(in_worker, self.encode, one)
                yield from waiting
                waiting = [batch]
            yield from waiting
        finally:
            self.pool.stop()

    def take(self, requests, limit=math.inf):
        """Waits for the inputs of a list of Ready that each() has yielded, or of a part of it.

        Args:
            limit: most tokens of a prompt.
        Returns:
            those that have their inputs; {problem_id: cause} of those that cannot be decoded or are
            too long.
        """
        found = []
        broken = {}
        for one in requests:
            try:
                made = self.pool.result(self.tasks.pop(one.place), one.example.path)
                one.inputs, one.control = pickle.loads(made)
                length = len(one.inputs.input_ids)
                if length > limit:
                    raise MediaError(
                        f"{one.example.path}: the prompt has {length} tokens "
                        f"(--max_prompt_length {limit})"
                    )
                found.append(one)
            except MediaError as error:
                broken[one.example.id] = str(error)
        return found, broken


def run_seed(arguments, place):
    """Seed of what is random about one example, wherever it is sampled; the same in every run."""
    return arguments.seed * 1_000_003 + place


BATCH_TOKENS = 1 << 17  # of prompts and answers in one cache: 7 GB for a 7B model


def token_batches(lengths, more, budget=BATCH_TOKENS):
    """Batch prompts of like length, so that a cache has at most `budget` tokens, padding included.

    Args:
        lengths: tokens of the prompts.
        more: most tokens of a completion.
    Returns:
        Lists of places in `lengths`, the longest prompts first; one that is too long is alone.

    >>> token_batches([10, 500, 480, 20], 100, 1200)
    [[1, 2], [3, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    batches = []
    while order:
        rows = max(1, budget // (lengths[order[0]] + more))
        batches.append(order[:rows])
        order = order[rows:]
    return batches
