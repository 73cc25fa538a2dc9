"""The ceilings of the machine: matrix products, float32 and bfloat16, and memory bandwidth."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks.records import Row
from experiments.benchmarks.scales import Scale
from experiments.benchmarks.timing import in_turns

TITLE = "Ceilings of this machine"
DTYPES = ("float32", "bfloat16")


class Ceilings(NamedTuple):
    """The largest rates that were found."""

    flops: dict[str, float]  # a second, by type
    bandwidth: float  # bytes a second
    sizes: dict[str, int]  # of the matrices that reached `flops`


def measure(scale: Scale) -> list[Row]:
    """The fastest of a few sizes, and of a few ways to read memory."""
    rows = []
    for dtype in DTYPES:
        for size, rate in matmul_rates(scale, dtype).items():
            rows.append(Row(f"{dtype} product of {size} x {size}", rate / 1e9, "GFLOP/s"))
    for name, rate in bandwidths(scale).items():
        rows.append(Row(f"{name}, {scale.megabytes} MB an array", rate / 1e9, "GB/s"))
    return rows


@functools.cache
def find(scale: Scale) -> Ceilings:
    """What the other figures compare with; measured once a process."""
    rates = {dtype: matmul_rates(scale, dtype) for dtype in DTYPES}
    return Ceilings(
        flops={dtype: max(by_size.values()) for dtype, by_size in rates.items()},
        bandwidth=max(bandwidths(scale).values()),
        sizes={dtype: max(by_size, key=by_size.get) for dtype, by_size in rates.items()},
    )


def matmul(size: int, dtype: str):
    """A function that multiplies two square matrices, and its floating-point operations."""
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    product = jax.jit(lambda a, b: jnp.dot(a, b, precision=precision))
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    return lambda: product(a, a), 2 * size**3


@functools.cache
def matmul_rates(scale: Scale, dtype: str) -> dict[int, float]:
    """Operations a second, by size of the matrices."""
    functions = {size: matmul(size, dtype) for size in scale.matmul}
    seconds = in_turns({size: f for size, (f, _) in functions.items()}, scale.repetitions)
    return {size: flops / seconds[size].best for size, (_, flops) in functions.items()}


@functools.cache
def bandwidths(scale: Scale) -> dict[str, float]:
    """Bytes a second that programs read and write; what a cache does on top is not counted."""
    n = scale.megabytes * 2**20 // 4 // 1024
    arrays = {name: jax.random.normal(jax.random.key(i), (n, 1024)) for i, name in enumerate("abc")}
    triad = jax.jit(lambda a, b, c: b + 3.0 * c, donate_argnums=0, keep_unused=True)
    column, row = jnp.ones(1024), jnp.ones(n)
    total, product = jax.jit(lambda b: b.sum(axis=0)), jax.jit(jnp.dot)

    def write():
        arrays["a"] = triad(arrays["a"], arrays["b"], arrays["c"])  # into the memory of a
        return arrays["a"]

    functions = {
        "a = b + 3 c": (write, 3),
        "sum over rows": (lambda: total(arrays["b"]), 1),
        "matrix times vector": (lambda: product(arrays["b"], column), 1),
        "vector times matrix": (lambda: product(row, arrays["b"]), 1),
    }
    seconds = in_turns({name: f for name, (f, _) in functions.items()}, scale.repetitions)
    size = 4 * 1024 * n
    return {name: count * size / seconds[name].best for name, (_, count) in functions.items()}
