"""Several processes as one program.

Every process runs the same host program on the same small data (problems, token ids, verdicts), and
all of them own the arrays on the devices together. What is expensive on a host is divided: each
process judges its own answers and reads and writes its devices' part of arrays. The first process
alone writes the other files, so `output_dir` has to be a folder that all of them see.
"""

import os
import pickle
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrl_sd.types import InputError

# A process that says nothing for so long is taken for dead, and all others end.
HEARTBEAT_SECONDS = 30
# How long a process that ends waits for the others: after a failure they may never come.
SHUTDOWN_SECONDS = 20
START_SECONDS = 300


def initialize(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes; call it on each of them before anything touches a device.

    Args:
      coordinator: host:port of the first process, or "auto" where JAX finds all three out itself
        (TPU pods, SLURM, Open MPI).
      num_processes: how many there are.
      process_id: which of them this is, from 0.

    Raises:
      InputError: one of them is missing, or the others were not met.
    """
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            num_processes,
            process_id,
            cluster_detection_method=None if coordinator == "auto" else "deactivate",
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--coordinator={coordinator}, --num_processes={num_processes}, "
            f"--process_id={process_id}: {error}"
        ) from error


def leave(error: str) -> NoReturn:
    """Ends this process with a line on standard error and status 1.

    One of several goes without a farewell: the others wait for it somewhere, and only where its
    connections break, or its heartbeat stops, do they end too.
    """
    if not jax.distributed.is_initialized():
        sys.exit(error)
    print(error, file=sys.stderr, flush=True)
    os._exit(1)


def is_first() -> bool:
    """Whether this process writes the files that all share."""
    return jax.process_index() == 0


def get(tree: Any) -> Any:
    """Arrays on the devices of all processes -> the same arrays in numpy, whole on each."""
    return jax.tree.map(_get, tree) if jax.process_count() > 1 else jax.device_get(tree)


def _get(x: Any) -> np.ndarray:
    whole = not isinstance(x, jax.Array) or x.is_fully_replicated
    return np.asarray(x) if whole else multihost_utils.process_allgather(x, tiled=True)


def put(tree: Any, sharding: Any) -> Any:
    """Arrays in numpy, the same on each process -> arrays on the devices of all of them.

    Args:
      sharding: one for all arrays, or a tree of them.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(_put, tree, sharding)


def _put(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def divide(function: Callable[[Sequence], Sequence], items: Sequence, multiple: int = 1) -> list:
    """`function(items)`, each process on its own part of them.

    Args:
      function: gives one result an item, in their order; results can be pickled. It is not called
        with nothing.
      multiple: so many items stay together.

    Raises:
      Exception: what it raised, on every process.
    """
    ends = np.linspace(0, len(items) // multiple, jax.process_count() + 1).astype(int) * multiple
    mine = items[ends[jax.process_index()] : ends[jax.process_index() + 1]]
    parts = exchange(lambda: function(mine) if mine else [])
    return [result for part in parts for result in part]


def from_first(function: Callable[[], Any]) -> Any:
    """What `function()` gives on the first process, which alone calls it.

    Raises:
      Exception: what it raised, on every process.
    """
    return exchange(lambda: function() if is_first() else None)[0]


def exchange(function: Callable[[], Any]) -> list[Any]:
    """What `function()` gives on each process, by their numbers.

    Raises:
      Exception: what it raised on one of them, on every process: its own there, elsewhere one with
        the same text.
    """
    if jax.process_count() == 1:
        return [function()]
    error = None
    try:
        message = ("value", function())
    except Exception as caught:  # the others wait for a message, whatever went wrong here
        error = caught
        kind = "input" if isinstance(caught, InputError) else "failure"
        message = (kind, f"process {jax.process_index()}: {caught or type(caught).__name__}")
    messages = [pickle.loads(x) for x in _all_gather(pickle.dumps(message))]
    if error is not None:
        raise error
    for kind, value in messages:
        if kind != "value":
            raise (InputError if kind == "input" else RuntimeError)(value)
    return [value for _, value in messages]


def _all_gather(data: bytes) -> list[bytes]:
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    # Few different sizes: each is compiled for.
    padded = np.zeros(1 << int(lengths.max()).bit_length(), np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]
