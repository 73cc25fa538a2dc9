"""Samples groups of responses: each prompt is prefilled once and shared by its G samples.

A few prompts are decoded at a time, each in a slot of a few lanes. A lane whose response ended
starts the next sample of the same prompt, for which nothing is computed or copied; a slot that has
drawn all its samples takes the next prompt. So long responses keep neither lanes nor keys waiting,
and a prompt's keys are read once for all its lanes. Random numbers belong to the row and the token:
a response does not depend on the schedule, but for rounding.

Two log-probabilities of every sampled token are returned and must not be confused:

* `logp_t`: log softmax(logits / temperature), what the trainer computes for the same token;
* `behaviour_logp_t`: the log-probability under the distribution the token was really drawn from,
  that is after penalty, top-k and top-p, renormalised. It is what importance ratios need.

P prompts, G samples each, T response tokens, U slots, N lanes, D hidden, V vocabulary.
"""

import dataclasses
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_sd import decoding, sharding
from jaxrl_sd.decoding import columns_of
from jaxrl_sd.model import PLAIN, Compute, ModelConfig
from jaxrl_sd.types import Array, Params
from jaxrl_sd.vocabulary import MASKED

NARROWEST = 64  # tokens, of prompts and of the response cache: less would save no time
BLOCK = 128  # tokens of the vocabulary that are drawn from at a time


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How to draw tokens. Hashable: a static argument of everything that is compiled here."""

    max_response: int  # T, in tokens, the stop token included
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps the whole vocabulary
    top_p: float = 1.0
    presence_penalty: float = 0.0  # off the logits of tokens that the response has, as in vLLM
    slots: int = 0  # U, prompts that are decoded at a time; 0 is all
    lanes: int = 0  # N, samples of each of them; 0 is all


@flax.struct.dataclass
class Samples:
    """P x G responses; zero log-probabilities and pads after a row's end."""

    response: Array  # i32[P, G, T]
    length: Array  # i32[P, G], the stop token included
    truncated: Array  # bool[P, G], no stop token within T tokens
    logp_t: Array  # f32[P, G, T]
    behaviour_logp_t: Array  # f32[P, G, T]


@flax.struct.dataclass
class State:
    """What is being decoded, and what was."""

    cache: decoding.Cache
    column: Array  # i32[], the cache's next one
    prompt: Array  # i32[U], the number of the slot's prompt
    prompt_length: Array  # i32[U]
    first: Array  # [U, D], the hidden state at the prompt's end
    sample: Array  # i32[U, N], the number of the lane's sample, at least G where it is idle
    t: Array  # i32[U, N], the number of the token to draw
    hidden: Array  # [U, N, D], what it is drawn from
    seen: Array | None  # bool[U, N, V], tokens that the response has, where they are penalised
    samples: Samples


def sample(
    params: Params,
    key: Array,
    prompt: Array,
    prompt_length: Array,
    *,
    group_size: int,
    sampling: SamplingConfig,
    config: ModelConfig,
    compute: Compute = PLAIN,
) -> Samples:
    """Draws `group_size` responses to each prompt.

    The host only waits for slots to refill and for a cache that is full; tokens are drawn on the
    device. Compiles for at most four widths of prompts and four of the response cache.

    Args:
      key: random key; another key gives other responses.
      prompt: i32[P, S], left-padded.
      prompt_length: i32[P].
      compute: its type is that of weights and cache; on its mesh, P and `sampling.slots` have to be
        multiples of the devices that split rows.
    """
    (P, S), T, mesh = prompt.shape, sampling.max_response, compute.mesh
    slots = min(sampling.slots or P, P)
    at_a_time = 1 if mesh is None else sharding.row_devices(mesh)  # prompts of a refill
    static = dict(sampling=sampling, config=config, compute=compute)
    width = prompt_width(int(jnp.max(prompt_length)), S)
    params = unstack(params, config=config, compute=compute)
    state = start(num_prompts=P, group_size=group_size, width=width, **static)
    new = np.arange(slots)
    state = fill(params, state, prompt, prompt_length, new, new, width=width, **static)
    waiting = P - slots
    while True:
        refill = min(at_a_time, waiting)
        state, free, full = advance(params, key, state, refill or slots, **static)
        free, full = jax.device_get((free, full))
        if full:
            state = grow(state, columns=min(2 * columns_of(state.cache), T), compute=compute)
        elif refill:
            new = np.minimum(P - waiting + np.arange(at_a_time), P - 1)
            places = np.full(at_a_time, slots)  # none
            places[:refill] = np.flatnonzero(free)[:refill]
            state = fill(params, state, prompt, prompt_length, new, places, width=width, **static)
            waiting -= refill
        else:
            return state.samples


def prompt_width(longest: int, limit: int) -> int:
    """The tokens that prompts are padded to: one of four widths up to `limit`."""
    step = max(NARROWEST, -(-limit // 4))
    return min(-(-longest // step) * step, limit)


def first_columns(max_response: int) -> int:
    """The response cache's first width, which is doubled up to three times."""
    return min(max(NARROWEST, -(-max_response // 8)), max_response)


unstack = jax.jit(decoding.unstack, static_argnames=("config", "compute"))


@partial(
    jax.jit,
    static_argnames=("num_prompts", "group_size", "width", "sampling", "config", "compute"),
)
def start(
    num_prompts: int,
    group_size: int,
    width: int,
    sampling: SamplingConfig,
    config: ModelConfig,
    compute: Compute,
) -> State:
    """Empty slots for prompts of `width` tokens, and room for all samples."""
    P, G, T = num_prompts, group_size, sampling.max_response
    U, N = min(sampling.slots or P, P), min(sampling.lanes or G, G)
    zeros = jnp.zeros((P, G, T))
    samples = Samples(
        response=jnp.full((P, G, T), sampling.pad_id, jnp.int32),
        length=jnp.zeros((P, G), jnp.int32),
        truncated=jnp.ones((P, G), bool),
        logp_t=zeros,
        behaviour_logp_t=zeros,
    )
    hidden = jnp.zeros((U, N, config.hidden_size), compute.dtype)
    cache = decoding.empty_cache(U, N, width, first_columns(T), config, compute)
    state = State(
        cache=cache,
        column=jnp.int32(0),
        prompt=jnp.zeros(U, jnp.int32),
        prompt_length=jnp.zeros(U, jnp.int32),
        first=hidden[:, 0],
        sample=jnp.full((U, N), G, jnp.int32),
        t=jnp.zeros((U, N), jnp.int32),
        hidden=hidden,
        seen=jnp.zeros((U, N, config.vocab_size), bool) if sampling.presence_penalty else None,
        samples=samples,
    )
    return _place(state, compute)


@partial(
    jax.jit,
    static_argnames=("width", "sampling", "config", "compute"),
    donate_argnames="state",
)
def fill(
    params: Params,
    state: State,
    prompt: Array,
    prompt_length: Array,
    numbers: Array,
    slots: Array,
    *,
    width: int,
    sampling: SamplingConfig,
    config: ModelConfig,
    compute: Compute,
) -> State:
    """Prefills some prompts into slots, whose lanes start with their first samples.

    Args:
      params: what `unstack` gives.
      prompt: i32[P, S], left-padded, of at most `width` tokens; prompt_length: i32[P].
      numbers: i32[B], of the prompts.
      slots: i32[B]; slot U does not exist and is dropped.
    """
    new, length = prompt[numbers, -width:], prompt_length[numbers]
    first, prompts = decoding.prefill(params, new, length, config, compute)

    def put(old, new):
        new = jnp.broadcast_to(new, (len(slots), *old.shape[1:]))
        return old.at[slots].set(new.astype(old.dtype), mode="drop")

    lanes = jnp.arange(state.t.shape[1])[None]
    state = state.replace(
        cache=decoding.fill(state.cache, slots, prompts, compute),
        prompt=put(state.prompt, numbers),
        prompt_length=put(state.prompt_length, length),
        first=put(state.first, first),
        sample=put(state.sample, lanes),
        t=put(state.t, jnp.zeros_like(lanes)),
        hidden=put(state.hidden, first[:, None]),
        seen=None if state.seen is None else put(state.seen, jnp.zeros((1, 1, 1), bool)),
    )
    return _place(state, compute)


widen = jax.jit(decoding.widen, static_argnames=("columns", "compute"))


def grow(state: State, *, columns: int, compute: Compute) -> State:
    """The same with more columns for responses; frees the columns that `state` has.

    Layer by layer: there may be no room for two caches.
    """
    cache, column = [], state.column
    for layer in state.cache:
        k, v, column = widen(
            layer.response_k, layer.response_v, state.column, columns=columns, compute=compute
        )
        layer.response_k.delete()
        layer.response_v.delete()
        cache.append(layer._replace(response_k=k, response_v=v))
    return state.replace(cache=cache, column=column)


@partial(jax.jit, static_argnames=("sampling", "config", "compute"), donate_argnames="state")
def advance(
    params: Params,
    key: Array,
    state: State,
    wanted: Array,
    *,
    sampling: SamplingConfig,
    config: ModelConfig,
    compute: Compute,
) -> tuple[State, Array, Array]:
    """Decodes until `wanted` slots are free or the response cache is full.

    Returns:
      The new state; which slots are free, bool[U]; whether a lane that goes on needs more columns.
    """
    G = state.samples.response.shape[1]

    def look(state):
        busy = state.sample < G
        return ~busy.any(axis=-1), (busy & (state.t == columns_of(state.cache))).any()

    def going(state):
        free, full = look(state)
        return (free.sum() < wanted) & ~full

    def step(state):
        return _place(_step(params, key, state, sampling, config, compute), compute)

    state = jax.lax.while_loop(going, step, state)
    free, full = look(state)
    # Whole on every device, for every host to read.
    return (
        state,
        sharding.constrain(free, ("slots",), compute.mesh),
        sharding.constrain(full, (), compute.mesh),
    )


def _step(
    params: Params,
    key: Array,
    state: State,
    sampling: SamplingConfig,
    config: ModelConfig,
    compute: Compute,
) -> State:
    """A token in every lane."""
    P, G, T = state.samples.response.shape
    row, t, seen = state.prompt[:, None] * G + state.sample, state.t, state.seen
    logits = decoding.logits(params, state.hidden, config, compute)
    penalised = logits if seen is None else logits - sampling.presence_penalty * seen
    token, logp, behaviour_logp = _draw(_keys(key, row, t), logits, penalised, sampling)
    stopped = jnp.isin(token, jnp.array(sampling.stop_ids, jnp.int32))
    busy = state.sample < G
    ended = busy & (stopped | (t == T - 1))
    hidden, cache = decoding.decode(
        params, token, t, state.prompt_length, state.cache, state.column, config, compute
    )
    if seen is not None:
        seen = (seen | jax.nn.one_hot(token, seen.shape[-1], dtype=bool)) & ~ended[..., None]
    # There is no prompt P: what an idle lane draws is dropped.
    number = jnp.where(busy, state.prompt[:, None], P)
    drawn = number, state.sample, t, token, stopped, logp, behaviour_logp
    # Gathered here, so that every device has all and writes the rows that are its own.
    drawn = [sharding.constrain(x, ("slots", "lanes"), compute.mesh) for x in drawn]
    following = state.sample.max(axis=-1, keepdims=True) + jnp.cumsum(ended, axis=-1)
    return state.replace(
        cache=cache,
        column=(state.column + 1) % columns_of(state.cache),
        sample=jnp.where(ended, following, state.sample),
        t=jnp.where(ended, 0, t + 1),
        hidden=jnp.where(ended[..., None], state.first[:, None], hidden),
        seen=seen,
        samples=_write(state.samples, *drawn),
    )


def _write(samples, prompt, sample, t, token, stopped, logp, behaviour_logp) -> Samples:
    """Puts tokens number t of some samples, all [U, N], into their places."""

    def put(old, new, *place):
        return old.at[prompt, sample, *place].set(new, mode="drop")

    return Samples(
        response=put(samples.response, token, t),
        length=put(samples.length, t + 1),
        truncated=put(samples.truncated, ~stopped),
        logp_t=put(samples.logp_t, logp, t),
        behaviour_logp_t=put(samples.behaviour_logp_t, behaviour_logp, t),
    )


def _place(state: State, compute: Compute) -> State:
    """Splits slots, and the rows of the samples, over the devices that split rows."""

    def split(x):
        return sharding.constrain(x, ("rows", *[""] * (x.ndim - 1)), compute.mesh)

    fields = {name: value for name, value in vars(state).items() if name not in ("cache", "column")}
    return state.replace(**jax.tree.map(split, fields))


def _keys(key: Array, row: Array, t: Array) -> Array:
    """A random key for each token, keys[U, N], of nothing but its row and its place in it."""

    def one(row, t):
        return jax.random.fold_in(jax.random.fold_in(key, row), t)

    return jax.vmap(jax.vmap(one))(row, t)


def _draw(keys: Array, logits: Array, penalised: Array, sampling: SamplingConfig):
    """Token i32[U, N], its logp and its behaviour logp from logits f32[U, N, V]."""
    if sampling.temperature == 0:
        token = jnp.argmax(penalised, axis=-1).astype(jnp.int32)
        return token, _logp(logits, token), jnp.zeros(token.shape)
    kept = truncate_logits(penalised / sampling.temperature, sampling.top_k, sampling.top_p)
    token = jax.vmap(jax.vmap(categorical))(keys, kept)
    return token, _logp(logits / sampling.temperature, token), _logp(kept, token)


def _logp(logits: Array, token: Array) -> Array:
    picked = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def categorical(key: Array, logits: Array) -> Array:
    """A token i32[] with probabilities softmax(logits [V]).

    First a block of the vocabulary and then a token of it: random numbers for all tokens would take
    as long as the decoder.
    """
    blocks = jnp.pad(logits, (0, -len(logits) % BLOCK), constant_values=MASKED).reshape(-1, BLOCK)
    block_key, token_key = jax.random.split(key)
    block = jax.random.categorical(block_key, jax.nn.logsumexp(blocks, axis=-1))
    token = block * BLOCK + jax.random.categorical(token_key, blocks[block])
    return token.astype(jnp.int32)


def truncate_logits(logits: Array, top_k: int, top_p: float) -> Array:
    """Masks all but the top_k likeliest tokens, then all but the smallest set of mass >= top_p.

    Tokens as likely as the last one that is kept are kept.

    Args:
      logits: f32[..., V], already divided by the temperature.
    """
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < kth, MASKED, logits)
    if top_p == 1.0:
        return logits
    weight = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    return jnp.where(weight < _least_kept(weight, top_p), MASKED, logits)


def _least_kept(weight: Array, top_p: float) -> Array:
    """The smallest weight, f32[..., 1], such that all larger ones have less than top_p of the mass.

    Found by bisection, as sorting the vocabulary takes longer than the decoder: floats in [0, 1]
    are ordered as their bits are.
    """
    mass = weight.sum(axis=-1, keepdims=True)

    def halve(_, limits):
        low, high = limits
        middle = (low + high) // 2
        bound = jax.lax.bitcast_convert_type(middle, jnp.float32)
        above = jnp.where(weight > bound, weight, 0.0).sum(axis=-1, keepdims=True)
        enough = above < top_p * mass
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    one = jax.lax.bitcast_convert_type(jnp.ones_like(mass), jnp.int32)
    _, bits = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(one), one))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
