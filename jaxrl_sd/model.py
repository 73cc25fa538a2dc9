"""The dense decoder of Qwen3, Qwen2.5 and Llama 3 as plain functions over a parameter pytree.

Pre-norm blocks, grouped-query attention, rotary positions, SwiGLU. RMSNorm of queries and keys
(Qwen3), biases and low-rank adapters are computed where the tree has them. Layers are stacked along
a leading axis and run under `lax.scan`, so a teacher is the same function with other params.
Architectures: Qwen3 (2505.09388), Qwen2.5 (2412.15115), Llama 3 (2407.21783); LoRA (2106.09685).

B rows, N tokens, P prompts, G samples a prompt, S prompt tokens, T response tokens, D hidden,
L layers, Q query heads, K key-value heads, R = Q / K, H head size, F feed-forward, V vocabulary,
r rank of an adapter.
"""

import dataclasses
import math
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxrl_sd import rope, vocabulary
from jaxrl_sd.types import Array, Params
from jaxrl_sd.vocabulary import MASKED

# The projections of a layer: how many leading axes of the weight (the layer's apart) are inputs.
LINEAR = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters: (alpha / rank) A B is added to the weight of each target (2106.09685)."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # of LINEAR

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the decoder. Hashable: a static argument of every jitted function."""

    vocab_size: int  # rows of the embedding
    num_tokens: int  # ids the tokenizer knows; rows beyond are padding and get no probability
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_embeddings: bool
    lora: Lora | None = None
    qk_norm: bool = True
    biases: tuple[str, ...] = ()  # of LINEAR
    rope_scaling: rope.Scaling = rope.UNSCALED
    family: str = "qwen3"  # of architectures.FAMILIES: how its files are written
    max_position_embeddings: int | None = None  # passed on from file to file


@flax.struct.dataclass
class Cache:
    """Keys and values. A prompt's are stored once and shared by the G samples of its group."""

    prompt_k: Array  # [L, P, S, K, H]
    prompt_v: Array  # [L, P, S, K, H]
    response_k: Array  # [L, P, G, T, K, H]
    response_v: Array  # [L, P, G, T, K, H]


def param_shapes(config: ModelConfig) -> dict:
    """Shape of every parameter of the base model, in the tree that all functions here take."""
    c, L, D, H = config, config.num_layers, config.hidden_size, config.head_dim
    F = c.intermediate_size
    layers = {
        "attn_norm": (L, D),
        "q": (L, D, c.num_heads, H),
        "k": (L, D, c.num_kv_heads, H),
        "v": (L, D, c.num_kv_heads, H),
        "q_norm": (L, H),
        "k_norm": (L, H),
        "o": (L, c.num_heads, H, D),
        "mlp_norm": (L, D),
        "gate": (L, D, F),
        "up": (L, D, F),
        "down": (L, F, D),
    }
    if not c.qk_norm:
        del layers["q_norm"], layers["k_norm"]
    layers |= {f"{name}_bias": (L, *layers[name][1 + LINEAR[name] :]) for name in c.biases}
    shapes = {"embed": (c.vocab_size, D), "layers": layers, "final_norm": (D,)}
    if not c.tie_embeddings:
        shapes["head"] = (c.vocab_size, D)
    return shapes


def init_params(key: Array, config: ModelConfig) -> Params:
    """Random float32 parameters: norms 1, biases 0, embedding std 0.02, matrices var 1 / fan-in."""
    inputs = {"o": config.num_heads * config.head_dim, "down": config.intermediate_size}
    leaves, treedef = jax.tree.flatten_with_path(
        param_shapes(config), is_leaf=lambda node: isinstance(node, tuple)
    )

    def draw(key, name, shape):
        if name.endswith("norm"):
            return jnp.ones(shape)
        if name.endswith("bias"):
            return jnp.zeros(shape)
        std = 0.02 if name == "embed" else inputs.get(name, config.hidden_size) ** -0.5
        return std * jax.random.normal(key, shape)

    keys = jax.random.split(key, len(leaves))
    params = [draw(k, path[-1].key, shape) for k, (path, shape) in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, params)


def adapter_shapes(config: ModelConfig) -> dict:
    """Shape of every matrix of `config.lora`, {"layers": {"q_a": (L, D, r), "q_b": ...}}."""
    base, rank = param_shapes(config)["layers"], config.lora.rank
    layers = {}
    for name in config.lora.targets:
        inputs = 1 + LINEAR[name]
        layers[f"{name}_a"] = (*base[name][:inputs], rank)
        layers[f"{name}_b"] = (base[name][0], rank, *base[name][inputs:])
    return {"layers": layers}


def init_adapter(key: Array, config: ModelConfig) -> Params:
    """float32 matrices of an adapter that changes nothing yet.

    B is 0 and A uniform in +-1 / sqrt(fan-in), as peft 0.21 draws it (Kaiming with a = sqrt 5).
    """
    shapes = adapter_shapes(config)["layers"]

    def draw(key, name):
        shape = shapes[name]
        if name.endswith("_b"):
            return jnp.zeros(shape)
        bound = math.prod(shape[1:-1]) ** -0.5
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    keys = jax.random.split(key, len(shapes))
    return {"layers": {name: draw(k, name) for name, k in zip(sorted(shapes), keys, strict=True)}}


def join(base: Params, adapter: Params) -> Params:
    """One tree with the leaves of both, what every forward pass takes; {} adds nothing."""
    return unflatten_dict({**flatten_dict(base), **flatten_dict(adapter)})


def merge(params: Params, adapter: Params, config: ModelConfig) -> Params:
    """Weights W + (alpha / r) A B, computed in float32, in the types of `params`."""
    layers = dict(params["layers"])
    for name in config.lora.targets:
        a, b = adapter["layers"][f"{name}_a"], adapter["layers"][f"{name}_b"]
        # The default precision of an accelerator would round the factors to bfloat16.
        product = jax.vmap(partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST))
        update = config.lora.scale * product(a.astype(jnp.float32), b.astype(jnp.float32))
        layers[name] = (layers[name].astype(jnp.float32) + update).astype(layers[name].dtype)
    return {**params, "layers": layers}


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / rms(x) * scale over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


def linear(x: Array, layer: Params, name: str, config: ModelConfig) -> Array:
    """x W + bias + (alpha / r) (x A) B: the terms that the layer has, in x's type.

    Args:
      x: [..., *inputs].
      layer: W [*inputs, *outputs] under `name`; bias [*outputs] under `{name}_bias`; A [*inputs, r]
        and B [r, *outputs], of any type, under `{name}_a` and `{name}_b`.
      name: of LINEAR.

    Returns:
      [..., *outputs].
    """
    inputs = range(LINEAR[name])
    # Last axis first: another order of summation would round differently.
    axes = [-1 - i for i in inputs], list(reversed(inputs))
    product = partial(jnp.tensordot, x, axes=axes)
    y = product(layer[name])
    if f"{name}_bias" in layer:
        y += jnp.broadcast_to(layer[f"{name}_bias"], y.shape)
    if f"{name}_a" in layer:
        a, b = (layer[f"{name}_{factor}"].astype(x.dtype) for factor in "ab")
        y += config.lora.scale * jnp.tensordot(product(a), b, 1)
    return y


def _block(x: Array, layer: Params, positions: Array, attend, config: ModelConfig):
    """One decoder layer. `attend(q, k, v) -> (values [..., Q, H], what the caller keeps)`."""
    norm = partial(rms_norm, eps=config.rms_norm_eps)
    project = partial(linear, layer=layer, config=config)
    theta, scaling = config.rope_theta, config.rope_scaling
    rotate = partial(rope.rope, positions=positions, theta=theta, scaling=scaling)
    with jax.named_scope("attention"):
        h = norm(x, layer["attn_norm"])
        q, k, v = (project(h, name=name) for name in "qkv")
        if "q_norm" in layer:
            q, k = norm(q, layer["q_norm"]), norm(k, layer["k_norm"])
        values, kept = attend(rotate(q), rotate(k), v)
        x = x + project(values, name="o")
    with jax.named_scope("mlp"):
        h = norm(x, layer["mlp_norm"])
        h = jax.nn.silu(project(h, name="gate")) * project(h, name="up")
        x = x + project(h, name="down")
    return x, kept


def _causal(params: Params, tokens: Array, start: Array, config: ModelConfig):
    """Whole sequences [B, N] whose first `start` [B] tokens are padding.

    Returns hidden states [B, N, D] before the final norm, and keys and values [L, B, N, K, H].
    """
    index = jnp.arange(tokens.shape[1])
    positions = jnp.maximum(index[None] - start[:, None], 0)
    valid = index[None] >= start[:, None]
    # A padding query sees itself only: a softmax over nothing would be NaN.
    itself = jnp.eye(len(index), dtype=bool)[None]
    mask = (index[:, None] >= index[None])[None] & (valid[:, None, :] | itself)

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None]), (k, v)

    def step(x, layer):
        return _block(x, layer, positions, attend, config)

    return jax.lax.scan(step, params["embed"][tokens], params["layers"])


def response_hidden(
    params: Params, prompt: Array, prompt_length: Array, response: Array, config: ModelConfig
) -> Array:
    """Hidden states that predict each response token.

    Args:
      prompt: i32[B, S], left-padded.
      prompt_length: i32[B].
      response: i32[B, T], right-padded; what follows a row's end does not change what precedes.

    Returns:
      [B, T, D], after the final norm; entry t has seen the prompt and the response before t.
    """
    S = prompt.shape[1]
    tokens = jnp.concatenate([prompt, response[:, :-1]], axis=1)
    x, _ = _causal(params, tokens, S - prompt_length, config)
    return rms_norm(x[:, S - 1 :], params["final_norm"], config.rms_norm_eps)


def head(params: Params, config: ModelConfig) -> Array:
    """The matrix [V, D] from hidden states to logits."""
    return params["embed"] if config.tie_embeddings else params["head"]


def logits(params: Params, hidden: Array, config: ModelConfig) -> Array:
    """float32 logits [..., V] of hidden states [..., D]; padding rows of the head are masked."""
    return vocabulary.logits(hidden, head(params, config), config.num_tokens)


def prefill(
    params: Params,
    prompt: Array,
    prompt_length: Array,
    group_size: int,
    max_response: int,
    config: ModelConfig,
) -> tuple[Array, Cache]:
    """Runs prompts i32[P, S] once. Returns the last hidden state [P, D] and the cache."""
    P, S = prompt.shape
    x, (k, v) = _causal(params, prompt, S - prompt_length, config)
    L, K, H = config.num_layers, config.num_kv_heads, config.head_dim
    empty = (jnp.zeros((L, P, group_size, max_response, K, H), k.dtype) for _ in "kv")
    last = rms_norm(x[:, -1], params["final_norm"], config.rms_norm_eps)
    return last, Cache(k, v, *empty)


def decode(
    params: Params, token: Array, t: Array, prompt_length: Array, cache: Cache, config: ModelConfig
) -> tuple[Array, Cache]:
    """Appends response token number t, i32[P, G]. Returns hidden [P, G, D] and the new cache."""
    S, T = cache.prompt_k.shape[2], cache.response_k.shape[3]
    positions = jnp.broadcast_to((prompt_length + t)[:, None], token.shape)
    in_prompt = jnp.arange(S)[None] >= (S - prompt_length)[:, None]  # [P, S]
    in_prompt = in_prompt[:, None, None, None, :]
    in_response = (jnp.arange(T) <= t)[None, None, None, None, :]

    def step(x, layer_and_cache):
        layer, prompt_k, prompt_v, response_k, response_v = layer_and_cache

        def attend(q, k, v):
            keys = jax.lax.dynamic_update_slice_in_dim(response_k, k[:, :, None], t, axis=2)
            values = jax.lax.dynamic_update_slice_in_dim(response_v, v[:, :, None], t, axis=2)
            q = q.reshape(*q.shape[:2], config.num_kv_heads, -1, config.head_dim)
            q = q * config.head_dim**-0.5
            einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)
            to_prompt = einsum("pgkrh,pskh->pgkrs", q, prompt_k)
            to_response = einsum("pgkrh,pgtkh->pgkrt", q, keys)
            scores = jnp.concatenate(
                [
                    jnp.where(in_prompt, to_prompt, MASKED),
                    jnp.where(in_response, to_response, MASKED),
                ],
                axis=-1,
            )
            share = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
            out = jnp.einsum("pgkrs,pskh->pgkrh", share[..., :S], prompt_v)
            out += jnp.einsum("pgkrt,pgtkh->pgkrh", share[..., S:], values)
            return out.reshape(*out.shape[:2], -1, config.head_dim), (keys, values)

        return _block(x, layer, positions, attend, config)

    layers = (
        params["layers"],
        cache.prompt_k,
        cache.prompt_v,
        cache.response_k,
        cache.response_v,
    )
    x, (response_k, response_v) = jax.lax.scan(step, params["embed"][token], layers)
    cache = cache.replace(response_k=response_k, response_v=response_v)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps), cache
