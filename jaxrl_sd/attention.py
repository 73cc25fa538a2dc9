"""Attention over packed streams, in blocks, without the blocks in which no query sees a key.

A stream has N tokens of many segments back to back: prompts, then responses. The keys of a stream
are those of its own tokens and C more, the prefix: keys of prompts, gathered for the responses that
continue them. [N, N + C] never exists: softmax is summed up block by block, and the backward pass
computes the blocks again (FlashAttention-2, 2307.08691).

R streams, N tokens, C prefix keys, Q query heads, K key-value heads, G = Q / K, H head size,
B tokens of a block, I query blocks, J key blocks.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jax.sharding import Mesh, PartitionSpec

from jaxrl_sd.types import Array

CPU_BLOCK = 64
BLOCK = 128  # on accelerators; with larger ones float32 compiles for minutes on TPUs
KERNEL_BLOCK = 512
MASKED = -1e30  # finite, so that MASKED - MASKED is 0 and not NaN
NO_SEGMENT = jnp.iinfo(jnp.int32).max  # behind all that callers have, as sorted ids have to be
KEPT = "attention"  # the name, for policies of `jax.checkpoint`, of what a backward pass needs


def attention(
    q: Array, k: Array, v: Array, segment: Array, prefix_segment: Array, *, mesh: Mesh | None = None
) -> Array:
    """Softmax attention with scale 1 / sqrt(H), [R, N, Q, H] in q's type.

    Query i of a stream sees key j < N of its own segment with j <= i, and key N + c of the prefix
    if prefix_segment[c] == segment[i]. Scores and sums are float32.

    Args:
      q: [R, N, Q, H], float32 or bfloat16.
      k, v: [R, N + C, K, H], of q's type; K divides Q, query head h reads head h // (Q / K).
      segment: i32[R, N], non-negative, not decreasing along N.
      prefix_segment: i32[R, C], not decreasing along C; C may be 0.
      mesh: splits streams over `data` and `fsdp` and, if it divides Q and K, heads over `tensor`;
        each device computes its own. None for a single device.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    of_stream = partial(_in_blocks, block=CPU_BLOCK if platform == "cpu" else BLOCK)
    # The kernel would round float32 factors to bfloat16.
    if platform == "tpu" and q.dtype == jnp.bfloat16:
        of_stream = partial(_in_kernel, block=KERNEL_BLOCK)

    def local(*streams):
        return jax.lax.map(lambda stream: of_stream(*stream), streams)

    if mesh is None:
        return local(q, k, v, segment, prefix_segment)
    size = mesh.shape["tensor"]
    heads = "tensor" if q.shape[2] % size == k.shape[2] % size == 0 else None
    rows = PartitionSpec(("data", "fsdp"))
    split = PartitionSpec(("data", "fsdp"), None, heads)
    in_specs = (split, split, split, rows, rows)
    local = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=split, check_vma=False)
    return local(q, k, v, segment, prefix_segment)


def _in_blocks(q, k, v, segment, prefix_segment, block):
    """`attention` of one stream, q [N, Q, H], in plain XLA."""
    (N, Q, H), K = q.shape, k.shape[1]
    segment, prefix_segment = _pad_segments(segment, prefix_segment, block)
    q = _pad(q, block).reshape(-1, block, K, Q // K, H).transpose(0, 2, 3, 1, 4)
    k, v = (_pad_keys(x, N, block).reshape(-1, block, K, H).swapaxes(1, 2) for x in (k, v))
    out = _flash(q.reshape(len(q), K, -1, H), k, v, segment, prefix_segment)
    out = out.reshape(-1, K, Q // K, block, H).transpose(0, 3, 1, 2, 4)
    return out.reshape(-1, Q, H)[:N]


def _in_kernel(q, k, v, segment, prefix_segment, block):
    """`attention` of one stream, q bfloat16[N, Q, H], in the SplashAttention kernel for TPUs."""
    N, _, H = q.shape
    segment, prefix_segment = _pad_segments(segment, prefix_segment, block)
    seen = _seen_blocks(segment, prefix_segment, block)
    by_query = _block_lists(seen)
    by_key = jax.tree.map(lambda x: x.mT, _block_lists(seen.T))
    index = jnp.arange(len(segment))
    by_query, by_key = (
        MaskInfo(to_load, None, counts, None, index) for to_load, counts in (by_query, by_key)
    )
    kernel = splash.SplashAttentionKernel(
        fwd_mask_info=by_query,
        dq_mask_info=by_query,
        dkv_mask_info=by_key,
        block_sizes=splash.BlockSizes(*[block] * 8),
        is_mqa=False,
        save_residuals=False,
        mask_value=MASKED,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=KEPT,
        mask_function=partial(_in_order, N=len(segment)),
        interpret=False,
    )
    q = _pad((q * H**-0.5).astype(q.dtype), block)
    q, k, v = (x.swapaxes(0, 1) for x in (q, _pad_keys(k, N, block), _pad_keys(v, N, block)))
    segments = splash.SegmentIds(segment, jnp.concatenate([segment, prefix_segment]))
    return kernel(q, k, v, segments).swapaxes(0, 1)[:N]


def _pad(x: Array, block: int, **how) -> Array:
    """Pads the first axis to whole blocks."""
    return jnp.pad(x, [(0, -len(x) % block)] + [(0, 0)] * (x.ndim - 1), **how)


def _pad_keys(x: Array, N: int, block: int) -> Array:
    """Pads the stream's own keys and those of the prefix, each to whole blocks."""
    return jnp.concatenate([_pad(x[:N], block), _pad(x[N:], block)])


def _pad_segments(segment: Array, prefix_segment: Array, block: int) -> tuple[Array, Array]:
    # Tokens behind the stream join its last segment, of which no query sees them.
    own = _pad(segment, block, mode="edge")
    return own, _pad(prefix_segment, block, constant_values=NO_SEGMENT)


def _key_blocks(segment: Array, prefix_segment: Array, block: int) -> tuple[Array, Array, Array]:
    """The key blocks that some query of each query block sees, i32[I] each.

    Query block i sees own blocks start[i] ... i, and blocks first[i] ... stop[i] - 1 of the prefix.
    """
    lowest, highest = segment[::block], segment[block - 1 :: block]
    start = jnp.searchsorted(segment, lowest) // block
    left = jnp.searchsorted(prefix_segment, lowest)
    right = jnp.searchsorted(prefix_segment, highest, side="right")
    first = left // block
    return start, first, jnp.where(left < right, (right + block - 1) // block, first)


def _seen_blocks(segment: Array, prefix_segment: Array, block: int) -> Array:
    """Whether some query of a query block sees some key of a key block, bool[I, J]."""
    start, first, stop = (x[:, None] for x in _key_blocks(segment, prefix_segment, block))
    own, behind = len(start), len(prefix_segment) // block
    i, j = jnp.arange(own)[:, None], jnp.arange(own + behind)[None]
    return ((j >= start) & (j <= i)) | ((j >= own + first) & (j < own + stop))


def _block_lists(seen: Array) -> tuple[Array, Array]:
    """The kernel's lists of the seen blocks of each row: which to load next, and which count.

    Behind its seen blocks a row repeats the last one, which costs no load.
    """
    count = seen.sum(-1, keepdims=True)
    step = jnp.arange(seen.shape[1])[None]
    order = jnp.argsort(~seen, axis=-1, stable=True)
    order = jnp.take_along_axis(order, jnp.clip(step, max=jnp.maximum(count - 1, 0)), axis=-1)
    return order.astype(jnp.int32)[None], (step < count).astype(jnp.int32)[None]


def _in_order(query: Array, key: Array, N: int) -> Array:
    """Whether a query may see a key of its segment, by their indices: of the prefix or earlier."""
    return (key <= query) | (key >= N)


@jax.custom_vjp
def _flash(q: Array, k: Array, v: Array, segment: Array, prefix_segment: Array) -> Array:
    """Attention of q [I, K, G * B, H] over k and v [J, K, B, H], like q."""
    return _forward(q, k, v, segment, prefix_segment)[0]


def _forward(q, k, v, segment, prefix_segment):
    """The values, and the logarithm of each query's sum of exp(score), f32[I, K, G * B]."""
    dot = _dot_of(q.dtype)

    def of_queries(inputs):
        i, q, blocks = inputs
        scores = _scores_of(i, q, k, segment, prefix_segment)

        def add(t, sums):
            top, total, out = sums
            j = _nth_block(t, i, blocks, len(segment) // k.shape[2])
            s = scores(j)
            new_top = jnp.maximum(top, s.max(-1))
            p, shrink = jnp.exp(s - new_top[..., None]), jnp.exp(top - new_top)
            out = shrink[..., None] * out + dot("kqj,kjh->kqh", p.astype(v.dtype), v[j])
            return new_top, shrink * total + p.sum(-1), out

        nothing = jnp.full(q.shape[:2], MASKED), jnp.zeros(q.shape[:2]), jnp.zeros(q.shape)
        top, total, out = jax.lax.fori_loop(0, _num_blocks(i, blocks), add, nothing)
        return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

    blocks = _key_blocks(segment, prefix_segment, k.shape[2])
    return jax.lax.map(of_queries, (jnp.arange(len(q)), q, blocks))


def _keep(q, k, v, segment, prefix_segment):
    out, log_sum = _forward(q, k, v, segment, prefix_segment)
    out, log_sum = checkpoint_name(out, KEPT), checkpoint_name(log_sum, KEPT)
    return out, (q, k, v, segment, prefix_segment, out, log_sum)


def _backward(kept, d_out):
    """The gradients of q, k and v, from the shares exp(score - log_sum) computed again."""
    q, k, v, segment, prefix_segment, out, log_sum = kept
    dot, scale = _dot_of(q.dtype), q.shape[-1] ** -0.5
    mean = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)

    def of_queries(d_keys, inputs):
        i, q, d_out, log_sum, mean, blocks = inputs
        scores = _scores_of(i, q, k, segment, prefix_segment)

        def add(t, sums):
            dq, dk, dv = sums
            j = _nth_block(t, i, blocks, len(segment) // k.shape[2])
            p = jnp.exp(scores(j) - log_sum[..., None])
            dp = dot("kqh,kjh->kqj", d_out, v[j])
            ds = (scale * p * (dp - mean[..., None])).astype(q.dtype)
            dk = dk.at[j].add(dot("kqj,kqh->kjh", ds, q))
            dv = dv.at[j].add(dot("kqj,kqh->kjh", p.astype(q.dtype), d_out))
            return dq + dot("kqj,kjh->kqh", ds, k[j]), dk, dv

        sums = jnp.zeros(q.shape), *d_keys
        dq, *d_keys = jax.lax.fori_loop(0, _num_blocks(i, blocks), add, sums)
        return tuple(d_keys), dq.astype(q.dtype)

    blocks = _key_blocks(segment, prefix_segment, k.shape[2])
    inputs = jnp.arange(len(q)), q, d_out, log_sum, mean, blocks
    (dk, dv), dq = jax.lax.scan(of_queries, (jnp.zeros(k.shape), jnp.zeros(v.shape)), inputs)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_flash.defvjp(_keep, _backward)


def _num_blocks(i, blocks):
    """How many key blocks query block i sees, of its entry in `_key_blocks`."""
    start, first, stop = blocks
    return i + 1 - start + stop - first


def _nth_block(t, i, blocks, own):
    """The t-th key block that query block i sees; `own` blocks come before the prefix."""
    start, first, _ = blocks
    behind = t - (i + 1 - start)
    return jnp.where(behind < 0, start + t, own + first + behind)


def _scores_of(i, q, k, segment, prefix_segment):
    """A function of j: scores f32[K, G * B, B] of query block i, q [K, G * B, H], for block j."""
    dot, scale, block = _dot_of(q.dtype), q.shape[-1] ** -0.5, k.shape[2]
    segments, index = jnp.concatenate([segment, prefix_segment]), jnp.arange(block)

    def segment_of(j):
        return jax.lax.dynamic_slice_in_dim(segments, j * block, block)

    def scores(j):
        query, key = i * block + index[:, None], j * block + index[None]
        seen = segment_of(i)[:, None] == segment_of(j)[None]
        seen &= _in_order(query, key, len(segment))
        seen = jnp.tile(seen, (q.shape[1] // block, 1))[None]
        return jnp.where(seen, scale * dot("kqh,kjh->kqj", q, k[j]), MASKED)

    return scores


def _dot_of(dtype):
    """einsum that sums in float32. Accelerators round float32 factors unless told otherwise."""
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
