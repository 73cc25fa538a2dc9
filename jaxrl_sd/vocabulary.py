"""Statistics over the vocabulary from hidden states and the output head, in chunks of tokens.

`[N, V]` never exists: the logits of a few tokens at a time are computed, in float32, and computed
again in the backward pass, which adds up the head's gradient in one float32 array. Knows no model:
hidden states and heads are arrays, so a tied head is the embedding matrix.

N tokens, D hidden, V rows of a head (ids that the tokenizer knows, then padding).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import Mesh, PartitionSpec

from jaxrl_sd.stats import TokenStat
from jaxrl_sd.types import Array

MASKED = -1e30  # finite, so that 0 * (MASKED - MASKED) is 0 and not NaN
STUDENT = ""  # its key beside those of the teachers
CPU_LOGITS = 2**21  # of a model, in a block whose statistics CPUs compute at a time, see `_plan`


def logits(hidden: Array, head: Array, num_tokens: int) -> Array:
    """Logits of hidden states, f32[..., V]; ids from `num_tokens` on are `MASKED`.

    Args:
      hidden: [..., D], bfloat16 or float32: the type of the factors. Sums are float32.
      head: [V, D], bfloat16 or float32.
      num_tokens: ids that the tokenizer knows; the head's rows beyond get no gradient.

    >>> hidden, head = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0], [0.5, 0.5], [9.0, 9.0]])
    >>> print(logits(hidden, head, num_tokens=2))
    [[ 1.0e+00  1.5e+00 -1.0e+30]]
    """
    return mask(_product("...d,vd->...v", hidden, head.astype(hidden.dtype)), num_tokens)


def float32_sums(dtype: jnp.dtype) -> dict[str, Any]:
    """Options of a product whose factors have that type, for sums of exact products in float32."""
    # Accelerators round float32 factors to fewer bits unless told otherwise. bfloat16 has no more
    # bits to lose, and asking for them would slow it down many times.
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return {"precision": precision, "preferred_element_type": jnp.float32}


def _product(subscripts: str, a: Array, b: Array) -> Array:
    return jnp.einsum(subscripts, a, b, **float32_sums(a.dtype))


def mask(z: Array, num_tokens: int) -> Array:
    """Logits f32[..., V] in which ids from `num_tokens` on are `MASKED`."""
    if z.shape[-1] == num_tokens:
        return z
    known = jax.lax.broadcasted_iota(jnp.int32, z.shape, z.ndim - 1) < num_tokens
    return jnp.where(known, z, MASKED)


def chunked(
    requests: Mapping[str, tuple[str | None, TokenStat]],
    hidden: Mapping[str, Array],
    heads: Mapping[str, Array],
    token: Array,
    *,
    num_tokens: int,
    temperature: float | Array,
    chunk: int,
    count: Array | None = None,
) -> dict[str, Array]:
    """Statistics of N tokens, {name: f32[N]}, differentiable in every hidden state and head.

    The backward pass computes logits again, except those of a single chunk, which are kept. Hidden
    states, heads and statistics that are cut off from the gradient cost nothing more.

    Args:
      requests: {name: (teacher or None, statistic)}.
      hidden: {STUDENT: [N, D], teacher: [N, D'], ...}, bfloat16 or float32: the type of the
        factors of all products; sums and statistics are float32.
      heads: {STUDENT: [V, D], teacher: [V', D'], ...}, bfloat16 or float32. Those with more padding
        are cut. The gradient of a head is summed in float32, then has the head's type.
      token: i32[N].
      num_tokens: ids that the tokenizer knows, the same for all models.
      temperature: divides all logits; gets no gradient.
      chunk: tokens whose logits exist at a time; need not divide N.
      count: i32[], how many tokens are real; None for all. Those behind them have value and
        gradient 0 whatever is in them, and chunks of nothing else are not computed.

    Raises:
      ValueError: `chunk` is not positive, or a head has fewer than `num_tokens` rows.

    >>> from jaxrl_sd import stats
    >>> requests = {"logp": (None, stats.log_prob), "kl": ("teacher", stats.forward_kl)}
    >>> hidden = {STUDENT: jnp.zeros((3, 2)), "teacher": jnp.eye(3, 2)}
    >>> heads = {STUDENT: jnp.eye(4, 2), "teacher": jnp.eye(4, 2)}
    >>> token = jnp.array([0, 1, 1])
    >>> out = chunked(requests, hidden, heads, token, num_tokens=4, temperature=1.0, chunk=2)
    >>> print(out["logp"].round(2), out["kl"].round(2))
    [-1.39 -1.39 -1.39] [0.12 0.12 0.  ]
    """
    _check(heads, num_tokens, chunk)
    N = len(token)
    count = jnp.asarray(N if count is None else count, jnp.int32)
    plan = _plan(requests, heads, num_tokens, min(chunk, N), jax.default_backend())
    temperature = jnp.asarray(temperature, jnp.float32)
    inputs = _Inputs(dict(hidden), _cut(heads), token, temperature, count, _chunks(count, plan))
    return _of_any_length(plan, inputs)


def chunked_streams(
    requests: Mapping[str, tuple[str | None, TokenStat]],
    hidden: Mapping[str, Array],
    heads: Mapping[str, Array],
    token: Array,
    count: Array,
    *,
    mesh: Mesh,
    num_tokens: int,
    temperature: float | Array,
    chunk: int,
) -> dict[str, Array]:
    """`chunked` for R streams of N tokens on a mesh, {name: f32[R, N]}.

    Each of the R = data * fsdp groups of devices computes its own stream; the devices of a group
    share the vocabulary, if it divides by `tensor`. XLA adds up statistics over the group, some
    numbers a token; logits stay where they are. Once a call, heads are gathered over `fsdp` and
    their gradients added up over `data` and `fsdp`. All groups compute as many chunks as the
    longest stream has.

    Args:
      hidden: {STUDENT: [R, N, D], teacher: [R, N, D'], ...}.
      token: i32[R, N].
      count: i32[R], real tokens of each stream.
      mesh: of the axes data, fsdp and tensor.
      chunk: tokens of a stream whose logits exist at a time.

    Raises:
      ValueError: as `chunked`, or R is not data * fsdp.
    """
    _check(heads, num_tokens, chunk)
    R, N = token.shape
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    if R != groups:
        raise ValueError(f"token: expected {groups} streams, one for each data and fsdp, got {R}")
    platform = mesh.devices.flat[0].platform
    plan = _plan(requests, heads, num_tokens, min(chunk, N), platform)

    def of_stream(hidden, heads, token, temperature, count, chunks):
        hidden = {name: x[0] for name, x in hidden.items()}
        heads = {name: _split_rows(head[0], mesh) for name, head in heads.items()}
        inputs = _Inputs(hidden, heads, token[0], temperature, count[0], chunks)
        return {name: x[None] for name, x in _of_any_length(plan, inputs).items()}

    streams, whole = PartitionSpec(("data", "fsdp")), PartitionSpec()
    run = jax.shard_map(
        of_stream,
        mesh=mesh,
        in_specs=(streams, streams, streams, whole, streams, whole),
        out_specs=streams,
        axis_names={"data", "fsdp"},
        check_vma=False,
    )
    temperature, chunks = jnp.asarray(temperature, jnp.float32), _chunks(count.max(), plan)
    # A copy for each stream, so that XLA adds up the gradients. Those of a shared input would be
    # added up by an instruction that XLA refuses if there is just one stream.
    heads = {n: jnp.broadcast_to(head, (R, *head.shape)) for n, head in _cut(heads).items()}
    return run(dict(hidden), heads, token, temperature, count, chunks)


def _check(heads: Mapping[str, Array], num_tokens: int, chunk: int) -> None:
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    sizes = {name: head.shape[0] for name, head in heads.items()}
    if min(sizes.values()) < num_tokens:
        raise ValueError(f"heads: expected at least num_tokens={num_tokens} rows, got {sizes}")


def _cut(heads: Mapping[str, Array]) -> dict[str, Array]:
    """All heads with the rows of the smallest."""
    return {name: head[: _num_rows(heads)] for name, head in heads.items()}


def _num_rows(heads: Mapping[str, Array]) -> int:
    return min(len(head) for head in heads.values())


def _split_rows(head: Array, mesh: Mesh) -> Array:
    axis = "tensor" if len(head) % mesh.shape["tensor"] == 0 else None
    return jax.lax.with_sharding_constraint(head, PartitionSpec(axis))


@dataclass(frozen=True)
class _Plan:
    """What is not an array."""

    requests: dict[str, tuple[str | None, TokenStat]]
    num_tokens: int
    chunk: int  # tokens whose logits exist at a time
    block: int  # of them, whose statistics are computed at a time


def _plan(
    requests: Mapping[str, tuple[str | None, TokenStat]],
    heads: Mapping[str, Array],
    num_tokens: int,
    chunk: int,
    platform: str,
) -> _Plan:
    block = chunk
    if platform == "cpu":
        # XLA for CPUs writes what statistics have in common, exponentials for instance, to arrays
        # as large as the logits, which take longer to get from the system than to fill.
        block = min(max(CPU_LOGITS // _num_rows(heads), 1), chunk)
    return _Plan(dict(requests), num_tokens, chunk, block)


class _Inputs(NamedTuple):
    hidden: dict[str, Array]  # [N, D]
    heads: dict[str, Array]  # [V, D], V the same for all
    token: Array  # i32[N]
    temperature: Array  # f32[]
    count: Array  # i32[], real tokens
    chunks: Array  # i32[], chunks to compute


def _chunks(count: Array, plan: _Plan) -> Array:
    return -(-count // plan.chunk)


def _of_any_length(plan: _Plan, x: _Inputs) -> dict[str, Array]:
    """`_over_chunks` of tokens that are padded to whole chunks."""
    N = len(x.token)

    def pad(a):
        return jnp.pad(a, [(0, -N % plan.chunk)] + [(0, 0)] * (a.ndim - 1))

    padded = x._replace(hidden={n: pad(h) for n, h in x.hidden.items()}, token=pad(x.token))
    return {name: values[:N] for name, values in _over_chunks(plan, padded).items()}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_chunks(plan: _Plan, x: _Inputs) -> dict[str, Array]:
    """{name: f32[N]}; `plan.chunk` divides N."""

    def body(i, out):
        part = _part(plan, x, i)
        values = _statistics(plan, plan.requests, part, _products(part))
        return {name: _put(out[name], values[name], i) for name in out}

    return _loop(plan, x, body, {name: jnp.zeros(x.token.shape) for name in plan.requests})


class _Part(NamedTuple):
    """A chunk of n tokens."""

    hidden: dict[str, Array]  # [n, D], 0 where not real
    heads: dict[str, Array]  # [V, D], of the hidden states' type
    token: Array  # i32[n]
    real: Array  # bool[n]
    temperature: Array


def _part(plan: _Plan, x: _Inputs, i: int | Array) -> _Part:
    real = i * plan.chunk + jnp.arange(plan.chunk) < x.count
    # Zeroed at the source: a NaN in padding would survive in a head's gradient as 0 * NaN.
    hidden = {n: jnp.where(real[:, None], _take(h, i, plan.chunk), 0) for n, h in x.hidden.items()}
    heads = {name: x.heads[name].astype(h.dtype) for name, h in hidden.items()}
    return _Part(hidden, heads, _take(x.token, i, plan.chunk), real, x.temperature)


def _products(part: _Part) -> dict[str, Array]:
    return {name: _product("nd,vd->nv", h, part.heads[name]) for name, h in part.hidden.items()}


def _statistics(
    plan: _Plan, names: Iterable[str], part: _Part, products: dict[str, Array]
) -> dict[str, Array]:
    """Those of `names`, {name: f32[n]}, 0 where not real."""
    of_block = partial(_of_block, plan, names, part.temperature)
    return _by_blocks(plan.block, of_block, (part.token, part.real, products))


def _to_products(
    plan: _Plan,
    part: _Part,
    products: dict[str, Array],
    wanted: Iterable[str],
    cotangents: dict[str, Array],
) -> dict[str, Array]:
    """Gradients f32[n, V] of the products that are wanted, from those f32[n] of statistics."""

    def of_block(token, real, products, cotangents):
        def statistics(of_wanted):
            every = products | of_wanted
            return _of_block(plan, cotangents, part.temperature, token, real, every)

        _, vjp = jax.vjp(statistics, {name: products[name] for name in wanted})
        return vjp(cotangents)[0]

    return _by_blocks(plan.block, of_block, (part.token, part.real, products, cotangents))


def _of_block(
    plan: _Plan,
    names: Iterable[str],
    temperature: Array,
    token: Array,
    real: Array,
    products: dict[str, Array],
) -> dict[str, Array]:
    """`_statistics` of some tokens of a chunk."""
    z = {name: mask(x, plan.num_tokens) / temperature for name, x in products.items()}
    out = {}
    for name in names:
        teacher, statistic = plan.requests[name]
        values = statistic(z[STUDENT], None if teacher is None else z[teacher], token)
        out[name] = jnp.where(real, values, 0.0)
    return out


def _by_blocks(block: int, function: Callable, arrays: Any) -> Any:
    """`function(*arrays)` of a tuple of trees of arrays [n, ...], `block` entries at a time."""
    n = len(jax.tree.leaves(arrays)[0])
    if block == n:
        return function(*arrays)

    def of_block(start):
        taken = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, block), arrays)
        return function(*taken)

    def body(i, out):
        start = jnp.minimum(i * block, n - block)  # the last may begin within the one before
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return jax.tree.map(put, out, of_block(start))

    shapes = jax.eval_shape(of_block, 0)
    zeros = jax.tree.map(lambda x: jnp.zeros((n, *x.shape[1:]), x.dtype), shapes)
    return jax.lax.fori_loop(0, -(-n // block), body, zeros)


def _loop(plan: _Plan, x: _Inputs, body: Callable, init: Any) -> Any:
    """`body(i, state)` for every chunk, without a loop if there is just one."""
    with jax.named_scope("chunks"):
        if plan.chunk == len(x.token):
            return body(0, init)
        return jax.lax.fori_loop(0, x.chunks, body, init)


def _take(x: Array, i: int | Array, n: int) -> Array:
    """Entries of chunk i."""
    return jax.lax.dynamic_slice_in_dim(x, i * n, n)


def _put(x: Array, part: Array, i: int | Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), i * len(part), axis=0)


def _forward(plan, primals):
    x = jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: isinstance(p, CustomVJPPrimal))
    # Names, as keys, of what a gradient is wanted of.
    wanted = tuple(
        {name: None for name, primal in tree.items() if primal.perturbed}
        for tree in (primals.hidden, primals.heads)
    )
    if plan.chunk < len(x.token):
        return _over_chunks(plan, x), (x, wanted, None)
    part = _part(plan, x, 0)
    z = _products(part)
    return _statistics(plan, plan.requests, part, z), (x, wanted, z)


def _backward(plan, kept, cotangents):
    x, (of_hidden, of_heads), kept_z = kept
    cotangents = {n: ct for n, ct in cotangents.items() if not isinstance(ct, SymbolicZero)}

    def body(i, sums):
        to_hidden, to_heads = sums
        part = _part(plan, x, i)
        z = _products(part) if kept_z is None else kept_z

        of_chunk = {name: _take(ct, i, plan.chunk) for name, ct in cotangents.items()}
        to_z = _to_products(plan, part, z, of_hidden | of_heads, of_chunk)
        for name in of_hidden:
            g = _to_hidden(to_z[name], part.heads[name])
            to_hidden = to_hidden | {name: _put(to_hidden[name], g, i)}
        for name in of_heads:
            h = part.hidden[name]
            g = _product("nv,nd->vd", to_z[name].astype(h.dtype), h)
            to_heads = to_heads | {name: to_heads[name] + g}
        return to_hidden, to_heads

    zeros = (
        {name: jnp.zeros_like(x.hidden[name]) for name in of_hidden},
        {name: jnp.zeros(x.heads[name].shape) for name in of_heads},
    )
    to_hidden, to_heads = _loop(plan, x, body, zeros)
    to_heads = {name: g.astype(x.heads[name].dtype) for name, g in to_heads.items()}
    hidden, heads = dict.fromkeys(x.hidden) | to_hidden, dict.fromkeys(x.heads) | to_heads
    return (_Inputs(hidden, heads, None, None, None, None),)


def _to_hidden(to_z: Array, head: Array) -> Array:
    """Gradient of hidden states, f32[n, D], from that of logits, f32[n, V]."""
    product = partial(_product, "nv,vd->nd")
    if head.dtype == jnp.float32:
        return product(to_z, head)
    # A few large terms cancel, and bfloat16's rounding of them does not. What it takes away goes
    # through a second product. (XLA would simplify the difference to a cast there and back to 0.)
    rest = to_z - jax.lax.reduce_precision(to_z, exponent_bits=8, mantissa_bits=7)
    return product(to_z.astype(head.dtype), head) + product(rest.astype(head.dtype), head)


_over_chunks.defvjp(_forward, _backward, symbolic_zeros=True)
