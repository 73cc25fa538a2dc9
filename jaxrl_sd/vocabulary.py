"""Statistics over the vocabulary from hidden states and the output head, in chunks of tokens.

`[N, V]` never exists: the logits of a few tokens at a time are computed, in float32, and computed
again in the backward pass. Knows no model: hidden states and heads are arrays, so a tied head is
the embedding matrix.

N tokens, D hidden, V rows of a head (ids that the tokenizer knows, then padding).
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from jaxrl_sd.stats import TokenStat
from jaxrl_sd.types import Array

MASKED = -1e30  # finite, so that 0 * (MASKED - MASKED) is 0 and not NaN
STUDENT = ""  # its key beside those of the teachers


def logits(hidden: Array, head: Array, num_tokens: int) -> Array:
    """Logits of hidden states, f32[..., V]; ids from `num_tokens` on are `MASKED`.

    Args:
      hidden: [..., D], bfloat16 or float32. Products are summed in float32 in either case.
      head: [V, D], bfloat16 or float32.
      num_tokens: ids that the tokenizer knows; the head's rows beyond get no gradient.

    >>> hidden, head = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0], [0.5, 0.5], [9.0, 9.0]])
    >>> print(logits(hidden, head, num_tokens=2))
    [[ 1.0e+00  1.5e+00 -1.0e+30]]
    """
    # Accelerators round float32 factors to fewer bits unless told otherwise. bfloat16 has no more
    # bits to lose, and asking for them would slow its backward pass down many times.
    exact = jnp.promote_types(hidden.dtype, head.dtype) == jnp.float32
    out = jnp.einsum(
        "...d,vd->...v",
        hidden,
        head,
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )
    known = jax.lax.broadcasted_iota(jnp.int32, out.shape, out.ndim - 1) < num_tokens
    return jnp.where(known, out, MASKED)


def chunked(
    requests: Mapping[str, tuple[str | None, TokenStat]],
    hidden: Mapping[str, Array],
    heads: Mapping[str, Array],
    token: Array,
    *,
    num_tokens: int,
    temperature: float | Array,
    chunk: int,
) -> dict[str, Array]:
    """Statistics of N tokens, {name: f32[N]}, differentiable in every hidden state and head.

    Args:
      requests: {name: (teacher or None, statistic)}.
      hidden: {STUDENT: [N, D], teacher: [N, D'], ...}, bfloat16 or float32.
      heads: {STUDENT: [V, D], teacher: [V', D'], ...}. Those with more padding are cut. The
        gradient of a head is summed over chunks in float32, then has the head's type.
      token: i32[N].
      num_tokens: ids that the tokenizer knows, the same for all models.
      temperature: divides all logits.
      chunk: tokens whose logits exist at a time, on all devices together; need not divide N.

    Raises:
      ValueError: `chunk` is not positive, or a head has fewer than `num_tokens` rows.

    >>> from jaxrl_sd import stats
    >>> requests = {"logp": (None, stats.log_prob), "kl": ("teacher", stats.forward_kl)}
    >>> hidden = {STUDENT: jnp.zeros((3, 2)), "teacher": jnp.eye(3, 2)}
    >>> heads = {STUDENT: jnp.eye(4, 2), "teacher": jnp.eye(4, 2)}
    >>> token = jnp.array([0, 1, 1])
    >>> out = chunked(requests, hidden, heads, token, num_tokens=4, temperature=1.0, chunk=2)
    >>> print(out["logp"].round(2), out["kl"].round(2))
    [-1.39 -1.39 -1.39] [0.12 0.12 0.  ]
    """
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    sizes = {name: head.shape[0] for name, head in heads.items()}
    rows = min(sizes.values())
    if rows < num_tokens:
        raise ValueError(f"heads: expected at least num_tokens={num_tokens} rows, got {sizes}")
    # The loop below sums a head's gradient over chunks in the type that the head has outside of it.
    wide = {name: head[:rows].astype(jnp.float32) for name, head in heads.items()}

    # The loop keeps the two passes apart by itself; a barrier against merging them would also keep
    # the float32 copies of the heads from being optimised away.
    @partial(jax.checkpoint, prevent_cse=False)
    def of_chunk(inputs):
        hidden, token = inputs
        z = {
            name: logits(h, wide[name].astype(heads[name].dtype), num_tokens) / temperature
            for name, h in hidden.items()
        }
        return {
            name: statistic(z[STUDENT], None if teacher is None else z[teacher], token)
            for name, (teacher, statistic) in requests.items()
        }

    N = token.shape[0]
    chunk = min(chunk, N)
    in_chunks = jax.tree.map(lambda x: _split(x, chunk), (dict(hidden), token))
    out = jax.lax.map(of_chunk, in_chunks)
    return {name: x.swapaxes(0, 1).reshape(-1)[:N] for name, x in out.items()}


def _split(x: Array, chunk: int) -> Array:
    """[N, ...] -> [C, chunk, ...], C = ceil(N / chunk), zero-padded.

    A chunk is every C-th token: where the N tokens are spread over devices, each device has its
    share of every chunk, and none waits for another.
    """
    padding = [(0, -len(x) % chunk)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(chunk, -1, *x.shape[1:]).swapaxes(0, 1)
