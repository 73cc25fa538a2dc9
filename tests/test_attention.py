"""Attention over packed streams against a dense one in float64; skipped blocks, memory, devices."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from jaxrl_sd import attention as lib
from jaxrl_sd.attention import attention

BLOCK = lib.CPU_BLOCK


def may_see(segment, prefix_segment):
    """Which query sees which key, bool[R, N, N + C]."""
    i = np.arange(segment.shape[1])
    own = (segment[:, :, None] == segment[:, None]) & (i <= i[:, None])
    return np.concatenate([own, segment[:, :, None] == prefix_segment[:, None]], axis=-1)


def dense(q, k, v, segment, prefix_segment, d_out):
    """Values, and the gradients of sum(values * d_out) in q, k and v; all float64."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    (R, N, Q, H), K = q.shape, k.shape[2]
    q, d_out = (x.reshape(R, N, K, Q // K, H) for x in (q, d_out))
    s = np.einsum("rikgh,rjkh->rkgij", q, k) / np.sqrt(H)
    s = np.where(may_see(segment, prefix_segment)[:, None, None], s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("rikgh,rjkh->rkgij", d_out, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) / np.sqrt(H)
    out = np.einsum("rkgij,rjkh->rikgh", p, v).reshape(R, N, Q, H)
    dq = np.einsum("rkgij,rjkh->rikgh", ds, k).reshape(R, N, Q, H)
    dk = np.einsum("rkgij,rikgh->rjkh", ds, q)
    return out, dq, dk, np.einsum("rkgij,rikgh->rjkh", p, d_out)


def values_and_gradients(function, q, k, v, segment, prefix_segment, d_out):
    out, pullback = jax.vjp(lambda *qkv: function(*qkv, segment, prefix_segment), q, k, v)
    return out, *pullback(d_out)


blockwise = jax.jit(partial(values_and_gradients, attention))


def draw(seed, R=2, N=200, C=100, Q=4, K=2, H=8, dtype=np.float32):
    """Streams of segments of 1 to 150 tokens, the last one padding; prefixes with and without.

    Even ids are segments of the stream, odd ones and those beyond are prefixes that none sees.
    """
    rng = np.random.default_rng(seed)
    segments, prefixes = [], []
    for _ in range(R):
        lengths = rng.choice([1, 2, 5, 20, 70, 150], N)
        segments.append(2 * np.repeat(np.arange(N), lengths)[:N])
        prefixes.append(np.sort(rng.integers(0, segments[-1].max() + 4, C)))
    normal = (rng.normal(size=(R, n, h, H)) for n, h in [(N, Q), (N + C, K), (N + C, K), (N, Q)])
    q, k, v, d_out = (jnp.asarray(x, dtype) for x in normal)
    return q, k, v, np.stack(segments).astype(np.int32), np.stack(prefixes).astype(np.int32), d_out


def worst(actual, expected):
    """The largest error in an array, relative to its largest entry or 1."""
    return max(
        np.abs(np.asarray(a, np.float64) - b).max() / max(1, np.abs(b).max())
        for a, b in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize("seed", range(6))
def test_values_and_gradients_of_random_segments(seed):
    case = draw(seed)
    assert worst(blockwise(*case), dense(*case)) < 2e-6


@pytest.mark.parametrize(
    "sizes",
    [
        {"N": 37, "C": 5, "Q": 3, "K": 1},  # less than a block
        {"N": 2 * BLOCK + 1, "C": BLOCK - 1, "Q": 2, "R": 1},
        {"N": 130, "C": 0},
        {"N": 1, "C": 1, "R": 3},
    ],
    ids=str,
)
def test_values_and_gradients_of_any_sizes(sizes):
    case = draw(7, **sizes)
    assert worst(blockwise(*case), dense(*case)) < 2e-6


def test_one_segment_longer_than_many_blocks():
    q, k, v, segment, prefix_segment, d_out = draw(8)
    case = q, k, v, np.full_like(segment, 3), np.full_like(prefix_segment, 3), d_out
    assert worst(blockwise(*case), dense(*case)) < 2e-6


def test_large_scores_do_not_overflow():
    q, *rest = draw(9)
    case = 1000 * q, *rest
    assert all(np.isfinite(x).all() for x in blockwise(*case))
    assert worst(blockwise(*case)[:1], dense(*case)[:1]) < 2e-4  # of scores up to 1e4


def test_bfloat16_rounds_what_goes_in_and_out_only():
    """Shares, values, their gradients and results are rounded to 8 bits: four roundings at most."""
    q, *rest = draw(10, dtype=jnp.bfloat16)
    case = 8 * q, *rest  # scores of up to 50, which 8 bits would round by up to 0.1
    actual = blockwise(*case)
    assert {x.dtype for x in actual} == {jnp.dtype("bfloat16")}
    assert worst(actual, dense(*case)) < 4 * 2**-9


def test_sums_over_blocks_of_bfloat16_are_float32():
    """The mean of 4096 equal values is exact: in bfloat16 a sum of ones stops at 256."""
    ones = jnp.ones((1, 4096, 1, 8), jnp.bfloat16)
    segment, none = np.zeros((1, 4096), np.int32), np.zeros((1, 0), np.int32)
    out, _, dk, dv = blockwise(0 * ones, ones, ones, segment, none, ones)
    assert (out == 1).all() and (dk == 0).all()
    # Key j has a share 1 / (i + 1) in query i >= j.
    harmonic = np.cumsum(1 / np.arange(4096, 0, -1.0))[::-1]
    np.testing.assert_allclose(np.asarray(dv[0, :, 0, 0], float), harmonic, rtol=2**-7)


@cache
def whole_blocks():
    """Whole blocks; every prefix has queries, so that no block is seen for a gap's sake."""
    q, k, v, segment, _, d_out = draw(11, R=1, N=6 * BLOCK, C=4 * BLOCK)
    prefix_segment = np.sort(np.random.default_rng(0).choice(segment[0], (1, 4 * BLOCK)))
    return q, k, v, segment, prefix_segment, d_out


def true_blocks(segment, prefix_segment):
    seen = may_see(segment, prefix_segment)[0]
    queries, keys = (size // BLOCK for size in seen.shape)
    return seen.reshape(queries, BLOCK, keys, BLOCK).any((1, 3))


def test_blocks_that_are_seen():
    *_, segment, prefix_segment, _ = whole_blocks()
    seen = lib._seen_blocks(segment[0], prefix_segment[0], BLOCK)
    expected = true_blocks(segment, prefix_segment)
    assert expected.any() and not expected.all()
    np.testing.assert_array_equal(seen, expected)


def test_values_and_gradients_of_whole_blocks():
    assert worst(blockwise(*whole_blocks()), dense(*whole_blocks())) < 2e-6


def test_no_other_block_is_touched():
    """NaN in one block of keys and values reaches the queries that the block matters to only."""
    q, k, v, segment, prefix_segment, d_out = whole_blocks()
    seen = true_blocks(segment, prefix_segment)
    for j in range(seen.shape[1]):
        inside = slice(j * BLOCK, (j + 1) * BLOCK)
        poisoned = k.at[:, inside].set(np.nan), v.at[:, inside].set(np.nan)
        out, dq, *_ = blockwise(q, *poisoned, segment, prefix_segment, d_out)
        for x in (out, dq):
            touched = np.isnan(x).reshape(len(seen), -1).any(-1)
            np.testing.assert_array_equal(touched, seen[:, j])


def test_memory_does_not_grow_with_the_square():
    N, C = 4096, 1024
    q, k, v, *_, d_out = draw(12, R=1, N=N, C=C, Q=2, K=1)
    segments = jnp.zeros((1, N), jnp.int32), jnp.zeros((1, C), jnp.int32)
    compiled = blockwise.lower(q, k, v, *segments, d_out).compile()
    # A mask alone would take a byte for each of the N * (N + C) pairs.
    assert compiled.memory_analysis().temp_size_in_bytes < N * (N + C) / 8


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)], ids=["split", "whole"])
def test_a_mesh_changes_nothing(heads):
    Q, K = heads
    case = draw(13, R=4, Q=Q, K=K)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    compiled = jax.jit(partial(values_and_gradients, partial(attention, mesh=mesh)))
    actual = compiled(*case)
    for x, y in zip(actual, blockwise(*case), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)
    streams, _, heads, _ = actual[0].sharding.shard_shape(actual[0].shape)
    assert (streams, heads) == ((1, 2) if Q == 4 else (1, 3))


def test_a_checkpoint_policy_keeps_the_values():
    """Under the policy the backward pass has its own loop only, and not the forward's again."""
    case = draw(14)
    policy = jax.checkpoint_policies.save_only_these_names(lib.KEPT)

    def loops(function):
        return str(jax.make_jaxpr(partial(values_and_gradients, function))(*case)).count("exp ")

    assert loops(jax.checkpoint(attention, policy=policy)) == loops(attention)
    assert loops(jax.checkpoint(attention)) > loops(attention)


def test_the_kernel_of_tpus_as_simulated():
    """Its lists of blocks, its mask and its gradients."""
    case = draw(15, R=1, N=256, C=100, Q=2, K=1)
    one = [x[0] for x in case]
    segments = lib._pad_segments(*one[3:5], 128)
    assert not lib._seen_blocks(*segments, 128).all()
    with pltpu.force_tpu_interpret_mode():
        actual = values_and_gradients(partial(lib._in_kernel, block=128), *one)
    assert worst([x[None] for x in actual], dense(*case)) < 2e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_tpus_use_the_kernel_for_bfloat16(dtype, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    case = draw(16, H=128, dtype=dtype)
    traced = jax.jit(partial(values_and_gradients, attention)).trace(*case)
    kernels = traced.lower(lowering_platforms=("tpu",)).as_text().count("tpu_custom_call")
    assert bool(kernels) == (dtype == "bfloat16")
