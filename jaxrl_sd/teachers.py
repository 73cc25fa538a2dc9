"""Whose weights a teacher uses. What it is shown is the other, independent choice (contexts.py).

A source has the shape of an optax transform: a state made once, refreshed after each step, and a
function that gives the teacher's parameters. Sources of the same name share one state. It sees what
is trained and nothing else: where that is an adapter, copies and averages are of the adapter, and
the weights under it are the policy's own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_sd.types import Array, Params
from jaxrl_sd.vocabulary import STUDENT


class Source(NamedTuple):
    """Whose weights.

    Attributes:
      name: equal names mean equal behaviour.
      init: params -> state, at the start of training.
      refresh: (state, params, step) -> state, after step number `step` (1, 2, ...), jitted.
      params: (state, params) -> the teacher's parameters in place of the policy's `params`.
      checkpoint: a folder in Hugging Face format, whose weights and architecture the teacher has;
        `STUDENT` for the policy's own.
    """

    name: str
    init: Callable[[Params], Any]
    refresh: Callable[[Any, Params, Array], Any]
    params: Callable[[Any, Params], Params]
    checkpoint: str = STUDENT


def _copy(params: Params) -> Params:
    # A copy, not an alias: the update donates its arguments' memory.
    return jax.tree.map(jnp.copy, params)


def current() -> Source:
    """The policy itself, as it is now (SDPG, SC-GRPO, HSD)."""
    return Source(
        "current", lambda params: (), lambda state, params, step: (), lambda state, params: params
    )


def frozen() -> Source:
    """The initial policy (OPSD, and every reference policy)."""
    return Source("frozen", _copy, lambda state, params, step: state, lambda state, params: state)


def external(path: str) -> Source:
    """Another model of the same tokenizer, from a folder in Hugging Face format (OPD)."""
    return Source(
        f"external_{path}",
        lambda params: (),
        lambda state, params, step: (),
        lambda state, params: {},
        checkpoint=path,
    )


def synced(every: int) -> Source:
    """A copy of the policy, refreshed after steps `every`, 2 `every`, ... (RLSD, CAST)."""
    if every < 1:
        raise ValueError(f"every: expected at least 1 step, got {every}")

    def refresh(state, params, step):
        due = step % every == 0
        return jax.tree.map(lambda old, new: jnp.where(due, new, old), state, params)

    return Source(f"synced_{every}", _copy, refresh, lambda state, params: state)


def ema(rate: float) -> Source:
    """Exponential moving average, state + rate (policy - state), after each step (SDPO, SDFT).

    Kept in float32: in bfloat16 an increment of 1 % of a weight's change rounds to nothing. Of an
    adapter it averages the two factors, which is not the average of their product.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate: expected a number in (0, 1], got {rate}")

    def init(params):
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), params)

    def refresh(state, params, step):
        return jax.tree.map(lambda s, p: s + rate * (p.astype(jnp.float32) - s), state, params)

    def teacher(state, params):
        return jax.tree.map(lambda s, p: s.astype(p.dtype), state, params)

    return Source(f"ema_{rate}", init, refresh, teacher)
