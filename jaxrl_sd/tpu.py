"""What a jitted function would need on a TPU pod, found by compiling it on a machine without one.

libtpu compiles for a topology that is only described: `pip install 'jaxrl_sd[tpu_aot]'`. Memory is
what its compiler allocates; FLOPs, bytes and communication are read from the program (hlo.py); the
roofline is what these take at the chip's peaks, each alone. Nothing is run.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from jaxrl_sd import hlo, sharding
from jaxrl_sd.types import InputError

GB = 1e9


class Chip(NamedTuple):
    """Public figures of one chip."""

    memory: float  # bytes that a program can have
    flops: float  # bfloat16, per second
    bandwidth: float  # of the memory, bytes per second
    link: float  # one direction of one axis of the interconnect, bytes per second


# Peaks: cloud.google.com/tpu/docs/v5e, /v5p, /v6e; links: jax-ml.github.io/scaling-book/tpus.
# Memory: what libtpu 0.0.42 leaves of 16, 95 and 32 GB, as its compiler says when it is not enough.
CHIPS = {
    "v5e": Chip(15.75 * 2**30, 1.97e14, 8.1e11, 4.5e10),
    "v5p": Chip(95.74 * 2**30, 4.59e14, 2.77e12, 9e10),
    "v6e": Chip(31.25 * 2**30, 9.2e14, 1.6e12, 9e10),
}
# The smallest topology of so many chips.
SLICES = {
    "v5e": {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"},
}
SLICES["v6e"] = SLICES["v5e"]
# Several processes may compile at a time, and none looks for the TPU that it would run on.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
}
SHOWN = ("prefill", "decode", "score", "update", "apply")
MARGIN = 0.05  # of the memory, left for what the runtime itself needs and for fragments


@dataclass(frozen=True)
class Report:
    """One function on one chip of a mesh. Bytes and FLOPs are of that chip, times in seconds."""

    function: str
    topology: str
    arguments: float
    outputs: float  # those that do not reuse an argument's memory
    temporaries: float  # at the peak
    code: float
    resident: float  # what else lives on the chip meanwhile
    total: float
    fits: bool
    flops: float
    bytes: float
    collectives: Mapping[str, float]  # how often
    sent: Mapping[str, float]  # bytes
    compute_s: float
    memory_s: float
    network_s: float
    roofline_s: float  # the largest of the three
    unbounded: tuple[str, ...]  # loops of unknown length, counted once
    kernels: tuple[str, ...]  # custom kernels, whose FLOPs are not counted
    error: str = ""  # what the compiler said; nothing is known but that it does not fit


def slice_of(topology: str, chips: int) -> str:
    """The topology, or the smallest with so many chips where only a generation is named.

    Raises:
      InputError: there is no such generation, or no such slice of it.

    >>> slice_of("v5p", 16), slice_of("v5e:4x8", 32)
    ('v5p:2x2x4', 'v5e:4x8')
    """
    generation, _, sizes = topology.partition(":")
    if generation not in CHIPS:
        raise InputError(f"topology: expected one of {sorted(CHIPS)}, got {topology!r}")
    if not sizes and chips not in SLICES[generation]:
        known = list(SLICES[generation])
        raise InputError(f"topology: {generation} has slices of {known} chips, mesh has {chips}")
    return f"{generation}:{sizes or SLICES[generation][chips]}"


def make_mesh(topology: str, data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh over the devices of a topology, such as v5e:4x8, that is only described.

    Raises:
      InputError: libtpu is missing or has no such topology, or it is of another size or grid.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        devices = topologies.get_topology_desc(topology, platform="tpu").devices
    except ImportError as error:
        raise InputError(f"topology: {error} (pip install 'jaxrl_sd[tpu_aot]')") from error
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise InputError(f"topology: libtpu has no {topology!r}: {error}") from error
    sizes = (data, fsdp, tensor)
    if len(devices) != math.prod(sizes):
        raise InputError(
            f"topology: {topology} has {len(devices)} chips, and mesh data={data}, fsdp={fsdp}, "
            f"tensor={tensor} needs {math.prod(sizes)}"
        )
    return sharding.lay_out(sizes, devices)


def bytes_of(tree: Any) -> float:
    """Bytes that a chip has of abstract arrays with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def report(
    name: str,
    lowered: jax.stages.Lowered,
    topology: str,
    resident: float = 0.0,
    trips: Mapping[str, float] | None = None,
    kernel: hlo.Kernel | None = None,
) -> Report:
    """Compiles a function for its topology.

    Args:
      name: of the function, for tables.
      lowered: with arguments on a mesh of the topology.
      resident: bytes a chip has beside this function's arguments and results.
      trips, kernel: see `hlo.cost`.
    """
    chip = CHIPS[topology.partition(":")[0]]
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _too_large(name, topology, resident, str(error))
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = dict(
        arguments=arguments,
        outputs=outputs,
        # Not temp_size, which adds up some that never exist together: where that makes 32 GB with
        # the arguments, the compiler itself, refusing, says 21.9 GiB, and the peak is 23.1 GB.
        temporaries=memory.peak_memory_in_bytes - arguments - outputs,
        code=memory.generated_code_size_in_bytes,
        resident=resident,
    )
    cost = hlo.cost(compiled.as_text(), trips, kernel)
    times = roofline(cost, chip)
    return Report(
        function=name,
        topology=topology,
        **sizes,
        total=sum(sizes.values()),
        fits=sum(sizes.values()) <= (1 - MARGIN) * chip.memory,
        flops=cost.flops,
        bytes=cost.bytes,
        collectives=dict(cost.collectives),
        sent=dict(cost.sent),
        **times,
        roofline_s=max(times.values()),
        unbounded=tuple(sorted(cost.unbounded)),
        kernels=tuple(sorted(cost.kernels)),
    )


def roofline(cost: hlo.Cost, chip: Chip) -> dict[str, float]:
    """Seconds of arithmetic, of the memory and of the interconnect at the chip's peaks.

    A collective has one direction of one axis: slices without wrap-around links have no more, and
    groups that lie over two axes could have twice as much.
    """
    return {
        "compute_s": cost.passes / chip.flops,
        "memory_s": cost.bytes / chip.bandwidth,
        "network_s": sum(cost.sent.values()) / chip.link,
    }


def _too_large(name: str, topology: str, resident: float, error: str) -> Report:
    used = re.search(r"[Uu]sed ([\d.]+)([MGT])|\(([\d.]+)([MGT])\) exceeds", error)
    number, unit = (used[1] or used[3], used[2] or used[4]) if used else ("nan", "G")
    total = float(number) * 2.0 ** {"M": 20, "G": 30, "T": 40}[unit] + resident
    unknown = dict.fromkeys((f.name for f in fields(Report)), math.nan)
    known = dict(function=name, topology=topology, resident=resident, total=total, fits=False)
    sums = dict(collectives={}, sent={}, unbounded=(), kernels=())
    return Report(**{**unknown, **known, **sums, "error": error.splitlines()[0]})


def summary(records: Sequence[Mapping[str, Any]]) -> str:
    """What compile_for_tpu.py wrote of several configurations, in Markdown, a line for each."""
    head = (
        "| config | topology | mesh | tokens a chip | GB of | fits | needs most | GB | prefill s "
        "| token s | score s | update s | apply s |"
    )
    lines = [head, "|" + "---|" * 13]
    for record in records:
        of = {r["function"]: r for r in record["functions"]}
        worst = max(of.values(), key=lambda r: (not r["fits"], r["total"]))
        times = [f"{of[name]['roofline_s']:.3g}" if name in of else "" for name in SHOWN]
        chip, sizes = CHIPS[record["topology"].partition(":")[0]], record["mesh"]
        lines.append(
            f"| {record['config']} | {record['topology']} "
            f"| {' x '.join(f'{name} {n}' for name, n in sizes.items() if n > 1)} "
            f"| {record['compute']['tokens']:,} | {chip.memory / GB:.1f} "
            f"| {'yes' if all(r['fits'] for r in of.values()) else 'no'} | {worst['function']} "
            f"| {worst['total'] / GB:.1f} | " + " | ".join(times) + " |"
        )
    return "\n".join(lines) + "\n"


def table(reports: list[Report]) -> str:
    """The reports in Markdown: GB, FLOPs and seconds of one chip."""
    head = (
        "| function | topology | arguments | temporaries | outputs | elsewhere | total GB | fits "
        "| TFLOP | GB moved | GB sent | roofline s |"
    )
    lines = [head, "|" + "---|" * 12]
    for r in reports:
        gb = (r.arguments, r.temporaries, r.outputs, r.resident, r.total)
        times = {"compute": r.compute_s, "memory": r.memory_s, "network": r.network_s}
        bound = max(times, key=times.get)
        lines.append(
            f"| {r.function} | {r.topology} | "
            + " | ".join(f"{x / GB:.2f}" for x in gb)
            + f" | {'yes' if r.fits else 'no'} | {r.flops / 1e12:.2f} | {r.bytes / GB:.1f} | "
            f"{sum(r.sent.values()) / GB:.2f} | {r.roofline_s:.4f} ({bound}) |"
        )
    return "\n".join(lines) + "\n"
