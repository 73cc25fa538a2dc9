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
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from jaxrl_sd import attention, rope, sharding, vocabulary
from jaxrl_sd.sharding import LINEAR
from jaxrl_sd.types import Array, Params, Stream

_POLICIES = jax.checkpoint_policies
_PROJECTIONS = _POLICIES.dots_with_no_batch_dims_saveable
_ATTENTION = _POLICIES.save_only_these_names(attention.KEPT)
# What the backward pass finds of a layer and need not compute again, beside the layer's input.
REMAT = {
    "none": _POLICIES.everything_saveable,
    # No product is repeated. On CPUs faster than "none", whose arrays take longer to keep.
    "dots": _POLICIES.save_from_both_policies(_PROJECTIONS, _ATTENTION),
    "attention": _ATTENTION,
    "layer": _POLICIES.nothing_saveable,
}


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


@dataclasses.dataclass(frozen=True)
class Compute:
    """How forward and backward passes are computed. Hashable."""

    dtype: str = "float32"  # of weights and activations; sums, statistics and gradients: float32
    remat: str = "dots"  # of REMAT
    chunk: int = 4096  # tokens of a device whose logits exist at a time
    mesh: Mesh | None = None  # None is one device


PLAIN = Compute()


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
    leading = x.shape[: x.ndim - LINEAR[name]]
    outputs = layer[name].shape[LINEAR[name] :]
    # As matrices: of more axes XLA writes some gradients out transposed, which takes CPUs longer
    # than the products.
    x = x.reshape(math.prod(leading), -1)
    y = x @ layer[name].reshape(x.shape[1], -1)
    return add_terms(y, x, layer, name, config).reshape(*leading, *outputs)


def add_terms(y: Array, x: Array, layer: Params, name: str, config: ModelConfig) -> Array:
    """y + bias + (alpha / r) (x A) B, of matrices x [M, inputs] and y [M, outputs]."""
    if f"{name}_bias" in layer:
        y += jnp.broadcast_to(layer[f"{name}_bias"].reshape(-1), y.shape)
    if f"{name}_a" in layer:
        a, b = (layer[f"{name}_{factor}"].astype(x.dtype) for factor in "ab")
        y += config.lora.scale * (x @ a.reshape(x.shape[1], -1) @ b.reshape(len(b), -1))
    return y


def block(x: Array, layer: Params, positions: Array, attend, config: ModelConfig, linear=linear):
    """One decoder layer, for callers that have their own attention or their own order of weights.

    Args:
      attend: (q, k, v) -> (values [..., Q, H], what the caller keeps).
      linear: (x, layer, name, config) -> [..., *outputs], like the function of that name.
    """
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


def embed(params: Params, token: Array, compute: Compute) -> Array:
    """Embeddings [R, N, D] of i32[R, N], split along D as the table is.

    Every device looks tokens up in its columns, and adds their gradients up there. From here XLA
    finds the way to split rows; from the table, on some meshes, only by way of all rows everywhere.
    """
    # Rounded after the lookup, so that the gradients of a token's places add up in float32.
    x = params["embed"][token].astype(compute.dtype)
    return sharding.constrain(x, ("replicas", "tokens", "hidden"), compute.mesh)


def hidden(params: Params, stream: Stream, config: ModelConfig, compute: Compute) -> Array:
    """Hidden states of all tokens of a stream, [R, N, D] in `compute.dtype`, after the final norm.

    A prompt is computed once, whatever the number of its responses; each of them then sees the
    keys and values that the prompt has in every layer.
    """
    place = partial(sharding.constrain, axes=("rows", "tokens", "features"), mesh=compute.mesh)

    def attend(q, k, v):
        k, v = (jnp.concatenate([x, _take(x, stream.prefix)], axis=1) for x in (k, v))
        segments = stream.segment, stream.prefix_segment
        return attention.attention(q, k, v, *segments, mesh=compute.mesh), None

    def step(x, layer):
        layer = sharding.gather(layer, compute.mesh)
        x, _ = block(x, layer, stream.position, attend, config)
        return place(x), None

    if compute.remat != "none":
        # Inside a scan, XLA cannot merge the two computations anyway.
        step = jax.checkpoint(step, policy=REMAT[compute.remat], prevent_cse=False)
    layers = cast(params["layers"], compute.dtype)
    x, _ = jax.lax.scan(step, place(embed(params, stream.token, compute)), layers)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps)


def _take(x: Array, places: Array) -> Array:
    """x [R, N, ...] at places [R, C]."""
    return jnp.take_along_axis(x, places.reshape(*places.shape, *[1] * (x.ndim - 2)), axis=1)


def response_hidden(
    params: Params,
    prompt: Array,
    prompt_length: Array,
    response: Array,
    config: ModelConfig,
    compute: Compute = PLAIN,
) -> Array:
    """Hidden states that predict each response token, for rows that share nothing.

    Args:
      prompt: i32[B, S], left-padded.
      prompt_length: i32[B].
      response: i32[B, T], right-padded; what follows a row's end does not change what precedes.

    Returns:
      [B, T, D], after the final norm; entry t has seen the prompt and the response before t.
    """
    (B, S), T = prompt.shape, response.shape[1]
    tokens = jnp.concatenate([prompt, response[:, :-1]], axis=1)
    position = jnp.arange(S + T - 1)[None] - (S - prompt_length)[:, None]
    segment = 2 * jnp.arange(B)[:, None] + (position >= 0)
    none = jnp.zeros((1, 0), jnp.int32)
    flat = (x.reshape(1, -1) for x in (tokens, jnp.maximum(position, 0), segment))
    stream = Stream(*flat, none, none, none, jnp.full(1, tokens.size))
    x = hidden(params, stream, config, compute).reshape(B, S + T - 1, -1)
    return x[:, S - 1 :]


def cast(params: Params, dtype: Any) -> Params:
    """Weights in the type to compute in; norms, which are computed in float32, as they are."""

    def of(path, x):
        return x if path[-1].key.endswith("norm") else x.astype(dtype)

    return jax.tree.map_with_path(of, params)


def head(params: Params, config: ModelConfig) -> Array:
    """The matrix [V, D] from hidden states to logits."""
    return params["embed"] if config.tie_embeddings else params["head"]


def logits(params: Params, hidden: Array, config: ModelConfig) -> Array:
    """float32 logits [..., V] of hidden states [..., D]; padding rows of the head are masked."""
    return vocabulary.logits(hidden, head(params, config), config.num_tokens)
