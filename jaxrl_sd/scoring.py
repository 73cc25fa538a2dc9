"""Token statistics of packed rows: one forward pass a model, then chunks of the vocabulary.

Student and teacher go through this one path, so that rounding does not tell them apart.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxrl_sd import model, vocabulary
from jaxrl_sd.methods.base import Request
from jaxrl_sd.model import Compute, ModelConfig
from jaxrl_sd.types import Array, Params, Part
from jaxrl_sd.vocabulary import STUDENT


def token_stats(
    requests: Mapping[str, Request],
    params: Params,
    teacher_params: Mapping[str, Params],
    part: Part,
    configs: Mapping[str, ModelConfig],
    temperature: float,
    compute: Compute,
) -> dict[str, Array]:
    """The requested statistics of every response token, differentiable in `params` only.

    Args:
      requests: {name: (teacher or None, statistic)}.
      params: the student's.
      teacher_params: by teacher; no gradient reaches them.
      part: packed rows, with a stream for every requested teacher.
      configs: of the student, under `STUDENT`, and of each teacher.
      temperature: divides the logits of student and teachers, as in sampling.

    Returns:
      {name: f32[R, M]}, 0 (and no gradient) from `part.count` on.
    """
    names = sorted({teacher for teacher, _ in requests.values() if teacher is not None})
    # The one place where teachers are cut off from the gradient.
    owners = {STUDENT: params} | {n: jax.lax.stop_gradient(teacher_params[n]) for n in names}
    real = jnp.arange(part.token.shape[1])[None] < part.count[:, None]

    def hidden(name):
        stream = part.streams[name]
        h = model.hidden(owners[name], stream, configs[name], compute)
        h = jnp.take_along_axis(h, stream.predictor[..., None], axis=1)
        # Zeroed at the source: a NaN in padding would survive in the gradient as 0 * NaN.
        return jnp.where(real[..., None], h, 0.0)

    def head(name):
        return model.head(owners[name], configs[name]).astype(compute.dtype)

    flat = {name: hidden(name).reshape(real.size, -1) for name in owners}
    out = vocabulary.chunked(
        requests,
        flat,
        {name: head(name) for name in owners},
        part.token.reshape(-1),
        num_tokens=configs[STUDENT].num_tokens,
        temperature=temperature,
        chunk=compute.chunk,
    )
    return {name: jnp.where(real, x.reshape(real.shape), 0.0) for name, x in out.items()}


def by_row(x: Array, part: Part, num_tokens: int) -> Array:
    """[R, M] -> [R * W, T]: every token at its place in its row, 0 where there is none."""
    (R, W), T = part.rows.shape, num_tokens
    rows = jnp.zeros((R, W, T)).at[jnp.arange(R)[:, None], part.row, part.t].set(x, mode="drop")
    return rows.reshape(R * W, T)
