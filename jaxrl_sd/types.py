"""The records that flow through the pipeline, in the order in which they appear. Read this first.

P prompts, G samples each, B = P * G rows (group-major: rows p * G ... p * G + G - 1 answer prompt
p), S prompt tokens, T response tokens, V vocabulary. Suffix `_t`: one value per response token.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax

Array = jax.Array
Params = Any  # a pytree of arrays


class InputError(ValueError):
    """Bad input from the user. The message names the field, the value and what was expected."""


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for a message of ours."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem as the data set has it. `verifier` names an entry of `verify.VERIFIERS`."""

    id: str
    prompt: str  # what the student is asked, as the text of the last user turn
    answer: str  # what the verifier compares with; also what an `answer` context shows
    solution: str | None = None  # a worked solution, for contexts that show one
    verifier: str = "math"
    turns: tuple[tuple[str, str], ...] = ()  # (role, text) of the conversation before `prompt`
    chat: bool = False  # whether the data set has a list of messages and no text as the prompt
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)  # the row


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sampled answer with its verdict, on the host.

    `correct` and `score` are None when the verifier could not decide (it hung or failed), or no
    reward function could score the answer: such a row takes no part in its group's statistics and
    is not trained on. It is never counted as wrong.
    """

    ids: tuple[int, ...]  # response tokens, the stop token included
    text: str  # the response without its stop token
    correct: bool | None
    truncated: bool  # the length limit came before a stop token
    feedback: str = ""  # what the verifier said about a failure, "" where it says nothing
    status: str = "ok"  # of the verdict: ok, timeout, error or none
    score: float | None = None  # 1 or 0 from a verifier, any number from reward functions
    rewards: Mapping[str, float | None] = dataclasses.field(default_factory=dict, hash=False)


@flax.struct.dataclass
class Rollouts:
    """Sampled responses and their rewards, on the device."""

    prompt: Array  # i32[B, S], left-padded
    prompt_length: Array  # i32[B]
    response: Array  # i32[B, T], right-padded
    mask_t: Array  # f32[B, T], 1 on tokens that train, up to and including the stop token
    sampler_logp_t: Array  # f32[B, T], log softmax(logits / temperature) as the sampler saw it
    behaviour_logp_t: Array  # f32[B, T], the same after top-k and top-p, renormalised
    reward: Array  # f32[B]
    correct: Array  # f32[B], the verdict, whatever `reward` adds to it
    graded: Array  # f32[B], 0 where the verifier could not decide
    group_size: int = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class Hints:
    """What one teacher is shown: its own prompt for the same responses."""

    prompt: Array  # i32[B, S'], left-padded
    prompt_length: Array  # i32[B], 0 where this teacher is silent: it does not read the row
    source: Array  # i32[B], the row whose response is shown, -1 where none is

    @property
    def shown(self) -> Array:
        """f32[B], 0 where this teacher is silent."""
        return (self.prompt_length > 0).astype("float32")


@flax.struct.dataclass
class Credit:
    """Everything a method decides about a token."""

    adv_t: Array  # f32[B, T], multiplies the policy gradient
    distill_t: Array  # f32[B, T], multiplies the divergence to the teacher


@flax.struct.dataclass
class Batch:
    """Grows by one field a stage and is never changed backwards."""

    rollouts: Rollouts
    hints: dict[str, Hints]
    # {name: f32[B, T]}, no gradient, 0 where masked and where the statistic's teacher is silent
    scores: dict[str, Array] | None = None
    credit: Credit | None = None
    weight_t: Array | None = None  # f32[B, T], loss = sum(loss_t * weight_t)


@flax.struct.dataclass
class Stream:
    """Prompts and responses as one model reads them: a row of N tokens on each of R devices.

    First come the prompts, each once, then the responses of their rows, then padding; all are
    segments. A response also sees the C keys of its own prompt, which are gathered from the stream.
    """

    token: Array  # i32[R, N]
    position: Array  # i32[R, N], in the sequence of prompt and response
    segment: Array  # i32[R, N], non-decreasing
    prefix: Array  # i32[R, C], places in the stream of the prompts' keys, once for each response
    prefix_segment: Array  # i32[R, C], of the response that sees the key, non-decreasing
    predictor: Array  # i32[R, M], the place whose hidden state predicts token m, N where none does
    count: Array  # i32[R], tokens before the padding


@flax.struct.dataclass
class Part:
    """What is computed at a time: some rows of a batch, packed. See packing.py.

    The response tokens of R streams, M each of which `count` are real, are in the same order in the
    stream of every model.
    """

    streams: dict[str, Stream]  # of the student, under `vocabulary.STUDENT`, and of each teacher
    rows: Array  # i32[R, W], rows of the batch, B for none
    token: Array  # i32[R, M]
    row: Array  # i32[R, M], index into `rows`, W for none
    t: Array  # i32[R, M], place in the response
    count: Array  # i32[R]
