"""All figures, and the order in which they are measured."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.benchmarks import (
    ceilings,
    efficiency,
    flatness,
    groups,
    head,
    meshes,
    methods,
    padding,
    peers,
    records,
    scales,
)
from experiments.benchmarks.records import Figure
from experiments.benchmarks.scales import Scale
from jaxrl_sd.types import InputError

FIGURES = {
    "ceilings": ceilings,
    "head": head,
    "methods": methods,
    "groups": groups,
    "efficiency": efficiency,
    "flatness": flatness,
    "padding": padding,
    "meshes": meshes,
    "peers": peers,
}


def parse_pythons(arguments: Sequence[str]) -> dict[str, str]:
    """["trl:/path/to/python"] -> {"trl": "/path/to/python"}.

    Raises:
      InputError: an unknown peer, or no such file.
    """
    pythons = dict(argument.partition(":")[::2] for argument in arguments)
    for name, python in pythons.items():
        if name not in peers.PEERS:
            raise InputError(f"--peers_python: {name}: expected some of {', '.join(peers.PEERS)}")
        if not Path(python).is_file():
            raise InputError(f"--peers_python: {name}: no such file: {python!r}")
    return pythons


def measure(
    names: Sequence[str], pythons: Mapping[str, str], folder: Path, scale: Scale | None = None
) -> str:
    """Measures some figures one by one; writes what there is after each. Returns the Markdown."""
    scale = scale or scales.of_this_machine()
    found, text = [], ""
    for name in names:
        module, start = FIGURES[name], time.perf_counter()
        extra = {"pythons": pythons} if module is peers else {}
        rows = module.measure(scale, **extra)
        seconds = time.perf_counter() - start
        print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        found.append(Figure(name, module.TITLE, rows, seconds))
        text = records.write(folder, found)
    return text
