"""Three workloads beside TRL and google-tunix, in turns, each in a Python of its own."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from experiments.benchmarks.models import SMALL, TINY, write_folder
from experiments.benchmarks.records import Row
from experiments.benchmarks.scales import Scale
from experiments.benchmarks.timing import Seconds
from experiments.benchmarks.work import Shape
from jaxrl_sd.model import ModelConfig
from jaxrl_sd.types import InputError

TITLE = "Beside TRL and google-tunix"
PROGRAMS = Path(__file__).parents[1] / "peers"
OWN, PEERS = "own", ("trl", "tunix")


class Workload(NamedTuple):
    """What all programs do, and how many times the faster peer's speed we aim at."""

    name: str
    model: ModelConfig
    shape: Shape
    sampling: bool
    aim: float
    repetitions: int
    devices: int  # that share the CPU and split our batch; more pay where products are small


WORKLOADS = (
    Workload("GRPO step, 3 layers of 64", TINY, Shape(24, 8, 16, 32), False, 3.0, 8, 2),
    Workload("GRPO step, 8 layers of 512", SMALL, Shape(4, 8, 64, 64), False, 2.0, 2, 1),
    Workload("sampling, 8 layers of 512", SMALL, Shape(4, 8, 512, 64), True, 4.0, 2, 1),
)
ROUNDS = 2  # processes of each program, in turns


def measure(
    scale: Scale, pythons: Mapping[str, str], workloads=WORKLOADS, rounds: int = ROUNDS
) -> list[Row]:
    """Times of each program, and the faster peer's over ours; the same work at every scale.

    Args:
      pythons: the Python of each peer; one without is not measured.

    Raises:
      InputError: a program failed.
    """
    del scale
    pythons = {OWN: sys.executable, **pythons}
    rows = []
    for workload in workloads:
        seconds = {name: () for name in pythons}
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            write_folder(model, workload.model)
            for _ in range(rounds):
                for name, python in pythons.items():
                    seconds[name] += run(name, python, workload, model, Path(folder))
        rows += describe(workload, {n: Seconds(values) for n, values in seconds.items()})
    return rows


def run(name: str, python: str, workload: Workload, model: Path, folder: Path) -> tuple[float, ...]:
    """Seconds of each repetition that a program reports.

    Raises:
      InputError: it failed.
    """
    shape = workload.shape
    command = [
        python,
        str(PROGRAMS / f"{name}_step.py"),
        f"--model={model}",
        f"--folder={tempfile.mkdtemp(dir=folder)}",
        f"--prompts={shape.prompts}",
        f"--group_size={shape.group_size}",
        f"--prompt_tokens={shape.prompt}",
        f"--response_tokens={shape.response}",
        f"--repetitions={workload.repetitions}",
        f"--devices={workload.devices}",
        *(["--sampling"] if workload.sampling else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise InputError(f"peers_python: {name}: {' '.join(command)} failed: {lines[-1]}")
    return tuple(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def describe(workload: Workload, seconds: Mapping[str, Seconds]) -> list[Row]:
    """A row a program, and one of the comparison."""
    shape = workload.shape
    size = f"{shape.prompts} x {shape.group_size}, {shape.prompt} + {shape.response} tokens"
    rows = []
    for name in (OWN, *PEERS):
        s = seconds.get(name)
        spread = (s.best, "s", None, min(s.values), max(s.values)) if s else (None, "s")
        rows.append(Row(f"{workload.name}: {name}", *spread, note=size))
    peers = [seconds[name].best for name in PEERS if name in seconds]
    faster = min(peers) / seconds[OWN].best if len(peers) == len(PEERS) else None
    rows.append(
        Row(f"{workload.name}: the faster peer's time over ours", faster, "x", (">=", workload.aim))
    )
    return rows
