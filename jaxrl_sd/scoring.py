"""Token statistics of a batch, from hidden states, in chunks of tokens.

`[B, T, V]` never exists: every statistic that needs the vocabulary is computed from the hidden
states of a few tokens at a time, in float32, and the logits are computed again in the backward
pass. Student and teacher go through this one path, so that rounding does not tell them apart.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxrl_sd import model
from jaxrl_sd.methods.base import Request
from jaxrl_sd.model import ModelConfig
from jaxrl_sd.types import Array, Batch, Params

STUDENT = ""  # its key beside those of the teachers


def token_stats(
    requests: Mapping[str, Request],
    params: Params,
    teacher_params: Mapping[str, Params],
    batch: Batch,
    config: ModelConfig,
    temperature: float,
    chunk: int,
) -> dict[str, Array]:
    """The requested statistics of every response token, differentiable in `params` only.

    Args:
      requests: {name: (teacher or None, statistic)}.
      params: the student's.
      teacher_params: by teacher; no gradient reaches them.
      batch: rollouts and the hints of every requested teacher.
      temperature: divides the logits of student and teachers, as in sampling.
      chunk: tokens whose logits exist at a time; need not divide B * T.

    Returns:
      {name: f32[B, T]}, 0 where the mask is 0 (and no gradient from there).
    """
    r = batch.rollouts
    B, T = r.response.shape
    names = sorted({teacher for teacher, _ in requests.values() if teacher is not None})
    student = model.response_hidden(params, r.prompt, r.prompt_length, r.response, config)
    hidden, heads = {STUDENT: student}, {STUDENT: params}
    for name in names:
        # The one place where teachers are cut off from the gradient.
        heads[name] = jax.lax.stop_gradient(teacher_params[name])
        hint = batch.hints[name]
        hidden[name] = model.response_hidden(
            heads[name], hint.prompt, hint.prompt_length, r.response, config
        )
    mask_t = r.mask_t != 0
    # Zeroed at the source: a NaN in a masked place would survive in the gradient as 0 * NaN.
    hidden = {name: jnp.where(mask_t[..., None], h, 0.0) for name, h in hidden.items()}

    @jax.checkpoint
    def of_chunk(inputs):
        hidden, token = inputs
        logits = {n: model.logits(heads[n], h, config) / temperature for n, h in hidden.items()}
        return {
            name: statistic(logits[STUDENT], logits.get(teacher), token)
            for name, (teacher, statistic) in requests.items()
        }

    chunk = min(chunk, B * T)
    in_chunks = jax.tree.map(lambda x: _chunks(x, B * T, chunk), (hidden, r.response))
    out = jax.lax.map(of_chunk, in_chunks)
    out = jax.tree.map(lambda x: x.reshape(-1)[: B * T].reshape(B, T), out)
    return {name: jnp.where(mask_t, x, 0.0) for name, x in out.items()}


def _chunks(x: Array, tokens: int, chunk: int) -> Array:
    """[B, T, ...] -> [ceil(B T / chunk), chunk, ...], zero-padded."""
    x = x.reshape(tokens, *x.shape[2:])
    padding = [(0, -tokens % chunk)] + [(0, 0)] * (x.ndim - 1)
    return jnp.pad(x, padding).reshape(-1, chunk, *x.shape[1:])
