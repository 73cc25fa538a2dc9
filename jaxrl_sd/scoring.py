"""Token statistics of a batch: one forward pass a model, then chunks of the vocabulary.

Student and teacher go through this one path, so that rounding does not tell them apart.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxrl_sd import model, vocabulary
from jaxrl_sd.methods.base import Request
from jaxrl_sd.model import ModelConfig
from jaxrl_sd.types import Array, Batch, Params
from jaxrl_sd.vocabulary import STUDENT


def token_stats(
    requests: Mapping[str, Request],
    params: Params,
    teacher_params: Mapping[str, Params],
    batch: Batch,
    configs: Mapping[str, ModelConfig],
    temperature: float,
    chunk: int,
) -> dict[str, Array]:
    """The requested statistics of every response token, differentiable in `params` only.

    Args:
      requests: {name: (teacher or None, statistic)}.
      params: the student's.
      teacher_params: by teacher; no gradient reaches them.
      batch: rollouts and the hints of every requested teacher.
      configs: of the student, under `STUDENT`, and of each teacher.
      temperature: divides the logits of student and teachers, as in sampling.
      chunk: tokens whose logits exist at a time; need not divide B * T.

    Returns:
      {name: f32[B, T]}, 0 where the mask is 0 (and no gradient from there).
    """
    r = batch.rollouts
    B, T = r.response.shape
    names = sorted({teacher for teacher, _ in requests.values() if teacher is not None})
    # The one place where teachers are cut off from the gradient.
    owners = {STUDENT: params} | {n: jax.lax.stop_gradient(teacher_params[n]) for n in names}
    prompts = {STUDENT: r} | {n: batch.hints[n] for n in names}
    mask_t = r.mask_t != 0

    def hidden(name):
        h = model.response_hidden(
            owners[name],
            prompts[name].prompt,
            prompts[name].prompt_length,
            r.response,
            configs[name],
        )
        # Zeroed at the source: a NaN in a masked place would survive in the gradient as 0 * NaN.
        return jnp.where(mask_t[..., None], h, 0.0).reshape(B * T, -1)

    out = vocabulary.chunked(
        requests,
        {name: hidden(name) for name in owners},
        {name: model.head(owners[name], configs[name]) for name in owners},
        r.response.reshape(-1),
        num_tokens=configs[STUDENT].num_tokens,
        temperature=temperature,
        chunk=chunk,
    )
    return {name: jnp.where(mask_t, x.reshape(B, T), 0.0) for name, x in out.items()}
