"""Samples groups of responses: each prompt is prefilled once and shared by its G samples.

Two log-probabilities of every sampled token are returned and must not be confused:

* `logp_t`: log softmax(logits / temperature), what the trainer computes for the same token;
* `behaviour_logp_t`: the log-probability under the distribution the token was really drawn from,
  that is after penalty, top-k and top-p, renormalised. It is what importance ratios need.
"""

import dataclasses
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl_sd import model
from jaxrl_sd.model import MASKED, ModelConfig
from jaxrl_sd.types import Array, Params


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to draw tokens. Hashable: a static argument of `sample`."""

    max_response: int  # T, in tokens, the stop token included
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps the whole vocabulary
    top_p: float = 1.0
    presence_penalty: float = 0.0  # off the logits of tokens that the response has, as in vLLM


@flax.struct.dataclass
class Samples:
    """P x G responses; zero log-probabilities and pads after a row's end."""

    response: Array  # i32[P, G, T]
    length: Array  # i32[P, G], the stop token included
    truncated: Array  # bool[P, G], no stop token within T tokens
    logp_t: Array  # f32[P, G, T]
    behaviour_logp_t: Array  # f32[P, G, T]


def truncate_logits(logits: Array, top_k: int, top_p: float) -> Array:
    """Masks all but the top_k likeliest tokens, then all but the smallest set of mass >= top_p.

    Args:
      logits: f32[..., V], already divided by the temperature.
    """
    if top_k == 0 and top_p == 1.0:
        return logits
    descending = jnp.sort(logits, axis=-1, descending=True)
    if top_k:
        kth = descending[..., min(top_k, logits.shape[-1]) - 1, None]
        logits = jnp.where(logits < kth, MASKED, logits)
        descending = jnp.where(descending < kth, MASKED, descending)
    share = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(share, axis=-1) - share
    least_kept = jnp.min(jnp.where(before < top_p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least_kept, MASKED, logits)


def _draw(key: Array, logits: Array, penalised: Array, sampling: SamplingConfig):
    """Token i32[...], its logp and its behaviour logp from logits f32[..., V]."""
    if sampling.temperature == 0:
        token = jnp.argmax(penalised, axis=-1)
        logp = jax.nn.log_softmax(logits)
        return token, _pick(logp, token), jnp.zeros(token.shape)
    logp = jax.nn.log_softmax(logits / sampling.temperature)
    kept = truncate_logits(penalised / sampling.temperature, sampling.top_k, sampling.top_p)
    token = jax.random.categorical(key, kept)
    return token, _pick(logp, token), _pick(jax.nn.log_softmax(kept), token)


def _pick(logp: Array, token: Array) -> Array:
    return jnp.take_along_axis(logp, token[..., None], axis=-1)[..., 0]


@partial(jax.jit, static_argnames=("group_size", "sampling", "config"))
def sample(
    params: Params,
    key: Array,
    prompt: Array,
    prompt_length: Array,
    *,
    group_size: int,
    sampling: SamplingConfig,
    config: ModelConfig,
) -> Samples:
    """Draws `group_size` responses to each prompt.

    Args:
      key: random key; another key gives other responses.
      prompt: i32[P, S], left-padded.
      prompt_length: i32[P].

    Stops as soon as every row has stopped.
    """
    P, T = prompt.shape[0], sampling.max_response
    hidden, cache = model.prefill(params, prompt, prompt_length, group_size, T, config)
    hidden = jnp.broadcast_to(hidden[:, None], (P, group_size, hidden.shape[-1]))
    stop_ids = jnp.array(sampling.stop_ids, jnp.int32)
    zeros = jnp.zeros((P, group_size, T))
    penalty = sampling.presence_penalty
    seen = jnp.zeros((P, group_size, config.vocab_size if penalty else 0), bool)
    samples = Samples(
        response=jnp.full((P, group_size, T), sampling.pad_id, jnp.int32),
        length=jnp.zeros((P, group_size), jnp.int32),
        truncated=jnp.ones((P, group_size), bool),
        logp_t=zeros,
        behaviour_logp_t=zeros,
    )

    def running(carry):
        t, *_, samples = carry
        return (t < T) & samples.truncated.any()

    def step(carry):
        t, hidden, cache, seen, samples = carry
        logits = model.logits(params, hidden, config)
        penalised = logits - penalty * seen if penalty else logits
        token, logp, behaviour_logp = _draw(jax.random.fold_in(key, t), logits, penalised, sampling)
        going = samples.truncated  # not stopped yet
        token = jnp.where(going, token, sampling.pad_id).astype(jnp.int32)
        samples = Samples(
            response=samples.response.at[..., t].set(token),
            length=samples.length + going,
            truncated=going & ~jnp.isin(token, stop_ids),
            logp_t=samples.logp_t.at[..., t].set(jnp.where(going, logp, 0.0)),
            behaviour_logp_t=samples.behaviour_logp_t.at[..., t].set(
                jnp.where(going, behaviour_logp, 0.0)
            ),
        )
        if penalty:
            seen |= jax.nn.one_hot(token, config.vocab_size, dtype=bool)
        hidden, cache = model.decode(params, token, t, prompt_length, cache, config)
        return t + 1, hidden, cache, seen, samples

    *_, samples = jax.lax.while_loop(running, step, (jnp.int32(0), hidden, cache, seen, samples))
    return samples
