"""A Qwen3 decoder as plain functions over a parameter pytree.

Pre-norm blocks, grouped-query attention with per-head RMSNorm of queries and keys, rotary
positions, SwiGLU. Layers are stacked along a leading axis and run under `lax.scan`, so a teacher
is the same function with other params. Architecture: Qwen3 technical report (2505.09388).

B rows, N tokens, P prompts, G samples a prompt, S prompt tokens, T response tokens, D hidden,
L layers, Q query heads, K key-value heads, R = Q / K, H head size, F feed-forward, V vocabulary.
"""

import dataclasses
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from jaxrl_sd import vocabulary
from jaxrl_sd.types import Array, Params
from jaxrl_sd.vocabulary import MASKED


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


@flax.struct.dataclass
class Cache:
    """Keys and values. A prompt's are stored once and shared by the G samples of its group."""

    prompt_k: Array  # [L, P, S, K, H]
    prompt_v: Array  # [L, P, S, K, H]
    response_k: Array  # [L, P, G, T, K, H]
    response_v: Array  # [L, P, G, T, K, H]


def param_shapes(config: ModelConfig) -> dict:
    """Shape of every parameter, in the tree that all functions here take."""
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
    shapes = {"embed": (c.vocab_size, D), "layers": layers, "final_norm": (D,)}
    if not c.tie_embeddings:
        shapes["head"] = (c.vocab_size, D)
    return shapes


def init_params(key: Array, config: ModelConfig) -> Params:
    """Random float32 parameters: norms 1, embedding std 0.02, matrices variance 1 / fan-in."""
    inputs = {"o": config.num_heads * config.head_dim, "down": config.intermediate_size}
    leaves, treedef = jax.tree.flatten_with_path(
        param_shapes(config), is_leaf=lambda node: isinstance(node, tuple)
    )

    def draw(key, name, shape):
        if name.endswith("norm"):
            return jnp.ones(shape)
        std = 0.02 if name == "embed" else inputs.get(name, config.hidden_size) ** -0.5
        return std * jax.random.normal(key, shape)

    keys = jax.random.split(key, len(leaves))
    params = [draw(k, path[-1].key, shape) for k, (path, shape) in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, params)


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """x / rms(x) * scale over the last axis, computed in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * jnp.broadcast_to(scale, y.shape)).astype(x.dtype)


def rope(x: Array, positions: Array, theta: float) -> Array:
    """Rotates pairs (i, i + H/2) of x [..., heads, H] by positions [...], in float32."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.multiply.outer(positions.astype(jnp.float32), frequency)[..., None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _block(x: Array, layer: Params, positions: Array, attend, config: ModelConfig):
    """One decoder layer. `attend(q, k, v) -> (values [..., Q, H], what the caller keeps)`."""
    norm = partial(rms_norm, eps=config.rms_norm_eps)
    with jax.named_scope("attention"):
        h = norm(x, layer["attn_norm"])
        q = norm(jnp.einsum("...d,dqh->...qh", h, layer["q"]), layer["q_norm"])
        k = norm(jnp.einsum("...d,dkh->...kh", h, layer["k"]), layer["k_norm"])
        v = jnp.einsum("...d,dkh->...kh", h, layer["v"])
        q, k = rope(q, positions, config.rope_theta), rope(k, positions, config.rope_theta)
        values, kept = attend(q, k, v)
        x = x + jnp.einsum("...qh,qhd->...d", values, layer["o"])
    with jax.named_scope("mlp"):
        h = norm(x, layer["mlp_norm"])
        x = x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
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
