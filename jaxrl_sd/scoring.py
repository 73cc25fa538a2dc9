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
      {name: f32[R, M]}, 0 (and no gradient) from `part.count` on and where the statistic's teacher
      does not read the row.
    """
    names = sorted({teacher for teacher, _ in requests.values() if teacher is not None})
    # The one place where teachers are cut off from the gradient.
    owners = {STUDENT: params} | {n: jax.lax.stop_gradient(teacher_params[n]) for n in names}

    def hidden(name):
        stream = part.streams[name]
        h = model.hidden(owners[name], stream, configs[name], compute)
        return jnp.take_along_axis(h, stream.predictor[..., None], axis=1, mode="clip")

    hiddens = {name: hidden(name) for name in owners}
    heads = {name: model.head(owners[name], configs[name]) for name in owners}
    settings = {
        "num_tokens": configs[STUDENT].num_tokens,
        "temperature": temperature,
        "chunk": compute.chunk,
    }
    if compute.mesh is not None:
        streams = part.token, part.count
        out = vocabulary.chunked_streams(
            requests, hiddens, heads, *streams, mesh=compute.mesh, **settings
        )
    else:
        (token,), (count,) = part.token, part.count
        hiddens = {name: h[0] for name, h in hiddens.items()}
        out = vocabulary.chunked(requests, hiddens, heads, token, count=count, **settings)
        out = {name: x[None] for name, x in out.items()}
    return {name: _where_read(x, part, requests[name][0]) for name, x in out.items()}


def _where_read(x: Array, part: Part, teacher: str | None) -> Array:
    """Statistics [R, M], 0 for tokens of rows that the teacher does not read."""
    if teacher is None:
        return x
    stream = part.streams[teacher]
    return jnp.where(stream.predictor < stream.token.shape[1], x, 0.0)


def by_row(x: Array, part: Part, num_tokens: int) -> Array:
    """[R, M] -> [R * W, T]: every token at its place in its row, 0 where there is none."""
    (R, W), T = part.rows.shape, num_tokens
    rows = jnp.zeros((R, W, T)).at[jnp.arange(R)[:, None], part.row, part.t].set(x, mode="drop")
    return rows.reshape(R * W, T)
