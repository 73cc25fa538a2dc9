"""The decoder token by token: prompts are run once, their keys and values shared by their samples.

A slot holds one prompt and decodes it in a few lanes. Layers are a list here and unrolled: out of a
stacked array XLA would copy each layer's weights and cache for every token. The weights of LINEAR
are [*outputs, *inputs] here, as products with few rows read them fastest; adapters stay as is.

U slots, N lanes of a slot, S prompt tokens, C columns of the response cache, D hidden, Q query
heads, K key-value heads, R = Q / K, H head size.
"""

import math
from collections.abc import Sequence
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_sd import model, sharding, vocabulary
from jaxrl_sd.attention import attention
from jaxrl_sd.model import Compute, ModelConfig, block, cast, embed, rms_norm
from jaxrl_sd.sharding import LINEAR, constrain, gather, is_split
from jaxrl_sd.types import Array, Params
from jaxrl_sd.vocabulary import MASKED


class LayerCache(NamedTuple):
    """Keys and values of one layer. The response part is a ring: all lanes write one column.

    Keys have their columns last and values second to last, as the products with them read memory.
    """

    prompt_k: Array  # [U, K, H, S]
    prompt_v: Array  # [U, K, S, H]
    response_k: Array  # [U, K, N, H, C]
    response_v: Array  # [U, K, N, C, H]


Cache = list[LayerCache]
K_AXIS, V_AXIS = 4, 3  # the response's columns

# Slots over the devices that split rows, heads over those that split heads.
CACHE_AXES = LayerCache(
    prompt_k=("rows", "heads", "head_dim", "columns"),
    prompt_v=("rows", "heads", "columns", "head_dim"),
    response_k=("rows", "heads", "lanes", "head_dim", "columns"),
    response_v=("rows", "heads", "lanes", "columns", "head_dim"),
)
# Sums over parts of the hidden side would exchange all feed-forward units for every token.
BY_UNITS = {
    "gate": ("units", "features"),
    "up": ("units", "features"),
    "down": ("features", "units"),
    "down_a": ("units", "rank"),
}
FEW = 128  # rows of all devices, up to which a CPU gains by taking them as the second factor


def _outputs_first(axes: Sequence, name: str) -> tuple:
    """The axes of a weight of LINEAR, [*inputs, *outputs] elsewhere, as this module has them."""
    return (*axes[LINEAR[name] :], *axes[: LINEAR[name]])


WEIGHT_AXES = sharding.PARAM_AXES | {
    name: (layer, *_outputs_first(axes, name))
    for name, (layer, *axes) in sharding.PARAM_AXES.items()
    if name in LINEAR
}


def columns_of(cache: Cache) -> int:
    """C, how many response tokens of a lane it holds."""
    return cache[0].response_v.shape[V_AXIS]


def unstack(params: Params, config: ModelConfig, compute: Compute) -> Params:
    """Parameters as this module takes them: in `compute.dtype`, a list of layers, outputs first."""
    params, mesh = cast(params, compute.dtype), compute.mesh
    layers = [jax.tree.map(itemgetter(i), params["layers"]) for i in range(config.num_layers)]
    by_units = is_split("units", config.intermediate_size, mesh)
    for layer in layers:
        for name in LINEAR:
            layer[name] = layer[name].transpose(_outputs_first(range(layer[name].ndim), name))
        if by_units:
            names = [name for name in BY_UNITS if name in layer]  # in one order on all hosts
            layer.update((name, constrain(layer[name], BY_UNITS[name], mesh)) for name in names)
    # Sums over parts of the hidden side would exchange whole logits, too.
    params = params | {
        name: constrain(params[name], ("ids", "features"), mesh)
        for name in ("embed", "head")
        if name in params
    }
    return params | {"layers": layers}


def linear(x: Array, layer: Params, name: str, config: ModelConfig) -> Array:
    """What `model.linear` computes, of weights [*outputs, *inputs]."""
    inputs, weight = LINEAR[name], layer[name]
    leading, outputs = x.shape[: x.ndim - inputs], weight.shape[: weight.ndim - inputs]
    x = x.reshape(math.prod(leading), -1)
    y = product(x, weight.reshape(-1, x.shape[1]))
    return model.add_terms(y, x, layer, name, config).reshape(*leading, *outputs)


def product(x: Array, weight: Array, **options) -> Array:
    """x [M, inputs] times the transpose of weight [outputs, inputs]; options of `jnp.matmul`.

    XLA's products on CPUs rearrange their second factor every time. With few rows, rearranging the
    weights would take up to a third of the time; so the rows are the second factor there. The outer
    barrier keeps XLA from changing the order back, the inner one has it write the rows as columns.
    """
    multiply, barrier = partial(jnp.matmul, **options), jax.lax.optimization_barrier
    if len(x) > FEW:
        return multiply(x, weight.T)
    return jax.lax.platform_dependent(
        x,
        weight,
        cpu=lambda x, weight: barrier(multiply(weight, barrier(x.T))).T,
        default=lambda x, weight: multiply(x, weight.T),
    )


def prefill(
    params: Params, prompt: Array, prompt_length: Array, config: ModelConfig, compute: Compute
) -> tuple[Array, list[tuple[Array, Array]]]:
    """Runs prompts i32[U, S], left-padded, once.

    Returns:
      The last hidden state [U, D], after the final norm; keys [U, K, H, S] and values [U, K, S, H]
      of each layer.
    """
    U, S = prompt.shape
    position = jnp.arange(S)[None] - (S - prompt_length)[:, None]
    segment, none = (position >= 0).astype(jnp.int32), jnp.zeros((U, 0), jnp.int32)
    place = partial(constrain, axes=("rows", "tokens", "features"), mesh=compute.mesh)

    def attend(q, k, v):
        values = attention(q, k, v, segment, none, mesh=compute.mesh)
        return values, (k.transpose(0, 2, 3, 1), v.swapaxes(1, 2))

    x, kept = place(embed(params, prompt, compute)), []
    for layer in params["layers"]:
        layer = gather(layer, compute.mesh, WEIGHT_AXES)
        x, keys_values = block(x, layer, jnp.maximum(position, 0), attend, config, linear)
        x = place(x)
        kept.append(keys_values)
    return rms_norm(x[:, -1], params["final_norm"], config.rms_norm_eps), kept


def empty_cache(
    slots: int, lanes: int, width: int, columns: int, config: ModelConfig, compute: Compute
) -> Cache:
    """A cache of zeros for prompts of `width` tokens and responses of up to `columns`."""
    K, H = config.num_kv_heads, config.head_dim
    shapes = LayerCache(
        prompt_k=(slots, K, H, width),
        prompt_v=(slots, K, width, H),
        response_k=(slots, K, lanes, H, columns),
        response_v=(slots, K, lanes, columns, H),
    )

    def layer():
        return _place(LayerCache(*(jnp.zeros(shape, compute.dtype) for shape in shapes)), compute)

    return [layer() for _ in range(config.num_layers)]


def fill(cache: Cache, slots: Array, prompts: list[tuple[Array, Array]], compute: Compute) -> Cache:
    """Puts what `prefill` gave into some slots, i32[B]; slot U does not exist and is dropped."""

    def put(cache, prompt):
        k, v = (
            old.at[slots].set(new, mode="drop") for old, new in zip(cache[:2], prompt, strict=True)
        )
        return _place(cache._replace(prompt_k=k, prompt_v=v), compute)

    return [put(*layer) for layer in zip(cache, prompts, strict=True)]


def widen(
    k: Array, v: Array, column: Array, columns: int, compute: Compute
) -> tuple[Array, Array, Array]:
    """A layer's `response_k` and `response_v` with more columns, in the order of time.

    Returns:
      Both, and the next column to write.
    """
    C = v.shape[V_AXIS]

    def wider(x, axis, axes):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, columns - C)
        return constrain(jnp.pad(jnp.roll(x, -column, axis), padding), axes, compute.mesh)

    k = wider(k, K_AXIS, CACHE_AXES.response_k)
    return k, wider(v, V_AXIS, CACHE_AXES.response_v), jnp.int32(C)


def decode(
    params: Params,
    token: Array,
    t: Array,
    prompt_length: Array,
    cache: Cache,
    column: Array,
    config: ModelConfig,
    compute: Compute,
) -> tuple[Array, Cache]:
    """Appends a token to every lane.

    Args:
      token: i32[U, N], number t of the response in its lane.
      t: i32[U, N], less than C; the lane wrote tokens 0 ... t - 1 in the columns before `column`.
      prompt_length: i32[U].
      column: i32[], of the ring, where this token's keys and values go.

    Returns:
      Hidden states [U, N, D] after the final norm, and the new cache.
    """
    S, C = cache[0].prompt_v.shape[2], columns_of(cache)
    in_prompt = jnp.arange(S)[None] >= (S - prompt_length)[:, None]
    age = (column - jnp.arange(C)) % C
    in_response = age[None, None] <= t[..., None]
    in_prompt = jnp.broadcast_to(in_prompt[:, None], (*token.shape, S))
    seen = jnp.concatenate([in_prompt, in_response], axis=-1)[:, None, :, None]
    # Split like the weights of attention: what is exchanged for a token are then hidden states,
    # queries and keys, never weights.
    place = partial(constrain, axes=("replicas", "lanes", "hidden"), mesh=compute.mesh)
    x, kept = place(params["embed"][token]), []
    for layer, old in zip(params["layers"], cache, strict=True):
        attend = partial(_attend, cache=old, column=column, seen=seen, compute=compute)
        x, new = block(x, layer, prompt_length[:, None] + t, attend, config, linear)
        x = place(x)
        kept.append(new)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps), kept


def logits(params: Params, hidden: Array, config: ModelConfig, compute: Compute) -> Array:
    """float32 logits [U, N, V] of hidden states [U, N, D]."""
    hidden = constrain(hidden, ("replicas", "lanes", "features"), compute.mesh)
    options = vocabulary.float32_sums(hidden.dtype)
    flat, head = hidden.reshape(-1, hidden.shape[-1]), model.head(params, config)
    out = vocabulary.mask(product(flat, head, **options), config.num_tokens)
    out = out.reshape(*hidden.shape[:-1], -1)
    out = constrain(out, ("replicas", "lanes", "ids"), compute.mesh)
    return constrain(out, ("rows", "lanes", "vocabulary"), compute.mesh)


def _attend(q, k, v, cache: LayerCache, column, seen, compute):
    """Attention of q [U, N, Q, H] to the prompt and to what its lane has written, k and v last."""
    (U, N, Q, H), K, S = q.shape, k.shape[2], cache.prompt_v.shape[2]

    def write(old, new, axis):
        new = jnp.expand_dims(new.swapaxes(1, 2), axis)
        return jax.lax.dynamic_update_slice_in_dim(old, new, column, axis)

    k, v = write(cache.response_k, k, K_AXIS), write(cache.response_v, v, V_AXIS)
    cache = _place(cache._replace(response_k=k, response_v=v), compute)
    q = (q * H**-0.5).reshape(U, N, K, Q // K, H).swapaxes(1, 2)
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
    to_prompt = einsum("uknrh,ukhs->uknrs", q, cache.prompt_k)
    to_response = einsum("uknrh,uknhc->uknrc", q, cache.response_k)
    scores = jnp.concatenate([to_prompt, to_response], axis=-1)
    share = jax.nn.softmax(jnp.where(seen, scores, MASKED), axis=-1).astype(v.dtype)
    out = einsum("uknrs,uksh->uknrh", share[..., :S], cache.prompt_v)
    out += einsum("uknrc,uknch->uknrh", share[..., S:], cache.response_v)
    return out.astype(v.dtype).swapaxes(1, 2).reshape(U, N, Q, H), cache


def _place(cache: LayerCache, compute: Compute) -> LayerCache:
    return LayerCache(*map(partial(constrain, mesh=compute.mesh), cache, CACHE_AXES))
