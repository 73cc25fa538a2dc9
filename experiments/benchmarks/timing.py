"""Times of functions that are compared, measured in turns: a busy machine is fair to all."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax

from experiments.benchmarks.records import Row


class Seconds(NamedTuple):
    """The times of a function, one a repetition."""

    values: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.values)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def plus(self, other: "Seconds") -> "Seconds":
        """Of both functions, repetition by repetition."""
        return Seconds(tuple(a + b for a, b in zip(self.values, other.values, strict=True)))


def in_turns(
    functions: Mapping[Hashable, Callable[[], Any]], repetitions: int, warmup: int = 1
) -> dict[Hashable, Seconds]:
    """Calls every function once a repetition; waits for the arrays that it returns.

    Args:
      warmup: calls of each that do not count, for compilation.
    """
    for _ in range(warmup):
        for function in functions.values():
            jax.block_until_ready(function())
    seconds = {name: [] for name in functions}
    for _ in range(repetitions):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: Seconds(tuple(values)) for name, values in seconds.items()}


def ratio(
    name: str,
    above: Seconds,
    below: Seconds,
    scale: float = 1.0,
    typical: str = "best",
    **fields,
) -> Row:
    """`scale` times the ratio of two times; its spread is over repetitions, pair by pair.

    Args:
      typical: of `Seconds`: best, or median where repetitions do not do the same work.
      fields: others of `Row`; the unit is "x" unless it is among them.
    """
    pairs = [scale * a / b for a, b in zip(above.values, below.values, strict=True)]
    fields = {"unit": "x"} | fields
    value = scale * getattr(above, typical) / getattr(below, typical)
    return Row(name, value, low=min(pairs), high=max(pairs), **fields)
