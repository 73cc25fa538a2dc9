"""Parameters after some steps on eight devices, however arranged, beside those of one device.

The devices are threads of a CPU, on every machine: what is asked is whether arrays are divided
rightly, not how fast. Sampling, too, is divided, so that a token that differs would show.
"""

import itertools
import math
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from experiments import program
from experiments.benchmarks.records import Row
from experiments.benchmarks.scales import Scale
from experiments.configs import countdown_small
from experiments.plans import countdown
from jaxrl_sd import config as configuration
from jaxrl_sd import hosts, metrics
from jaxrl_sd.methods import METHODS

TITLE = "Training on eight devices, beside one"
DEVICES, STEPS = 8, 5
LARGEST = 1e-5


class Layout(NamedTuple):
    """How the devices are arranged, and among how many processes."""

    data: int
    fsdp: int
    tensor: int
    processes: int = 1

    def __str__(self) -> str:
        axes = zip(("data", "fsdp", "tensor"), self[:3], strict=True)
        text = " x ".join(f"{name} {size}" for name, size in axes if size > 1) or "one device"
        return text if self.processes == 1 else f"{text}, {self.processes} processes"


ONE = Layout(1, 1, 1)
MESHES = tuple(
    Layout(*sizes)
    for sizes in itertools.product((1, 2, 4, 8), repeat=3)
    if math.prod(sizes) == DEVICES
)
TWO_PROCESSES = Layout(2, 2, 2, processes=2)


def measure(scale: Scale, methods: Sequence[str] = tuple(METHODS)) -> list[Row]:
    """For each method the largest difference of a parameter; the same runs at every scale."""
    del scale
    layouts = (ONE, *MESHES, TWO_PROCESSES)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        jobs = {(name, of): job(root, name, of) for name in ("grpo", *methods) for of in layouts}
        alone = [c for (_, of), c in jobs.items() if of.processes == 1]
        with ProcessPoolExecutor(
            len(os.sched_getaffinity(0)),
            multiprocessing.get_context("spawn"),
            _simulate,
            (DEVICES, root / "pool.txt"),
        ) as pool:
            pool.submit(_train, alone[0]).result()  # whose model is other methods' teacher
            with metrics.progress("meshes", len(alone), 1) as bar:
                for _ in pool.map(_train, alone[1:]):
                    bar.update()
        train_as_one([c for (_, of), c in jobs.items() if of == TWO_PROCESSES], root / "two.txt")
        return [row(root, name, layouts) for name in methods]


def job(root: Path, method: str, layout: Layout) -> ConfigDict:
    """A few steps of the built-in job that eight devices can divide."""
    c = countdown_small.get_config()
    c.output_dir = str(folder_of(root, method, layout))
    c.steps, c.evaluation.every, c.checkpoint.every = STEPS, STEPS, STEPS
    c.rollout.group_size = c.evaluation.samples = 4  # and one shape for the sampler
    c.rollout.max_rounds = 20
    c.data.num_test, c.verifier.workers = 8, 1
    c.optimizer.eps = 1e-6  # or Adam makes full steps of rounding where a gradient is 0
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = layout[:3]
    c.method.name = method
    if method in countdown.EXTERNAL:
        c.method.teacher = str(folder_of(root, "grpo", ONE) / "model")
    return c


def folder_of(root: Path, method: str, layout: Layout) -> Path:
    """Where a run is."""
    return root / method / str(layout)


def row(root: Path, method: str, layouts: Sequence[Layout]) -> Row:
    """What became of one method."""
    start = weights(Path(configuration.TINY_MODEL))
    alone = weights(folder_of(root, method, ONE) / "model")
    others = {of: weights(folder_of(root, method, of) / "model") for of in layouts if of != ONE}
    apart = {of: largest_difference(alone, other) for of, other in others.items()}
    worst = max(apart, key=lambda of: (math.isnan(apart[of]), apart[of]))
    note = f"{worst}; training moves a parameter by up to {largest_difference(start, alone):.1e}"
    return Row(method, apart[worst], "", ("<=", LARGEST), note=note)


def weights(folder: Path) -> dict[str, np.ndarray]:
    """The parameters of a model's folder."""
    return load_file(folder / "model.safetensors")


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Of two models' parameters; a NaN anywhere is NaN."""
    return float(np.max([np.abs(a[name].astype(np.float64) - b[name]).max() for name in a]))


def train_as_one(configs: Sequence[ConfigDict], log: Path) -> None:
    """Trains with all of them, one after the other, in two processes with half the devices each.

    Raises:
      RuntimeError: a process failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_join, args=(address, number, configs, log)) for number in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"one of two processes failed: {log.read_text()[-2000:]}")


def _join(address: str, number: int, configs: Sequence[ConfigDict], log: Path) -> None:
    _simulate(DEVICES // 2, log)
    hosts.initialize(address, 2, number)
    try:
        for config in configs:
            _train(config)
    except Exception as error:
        traceback.print_exc()
        hosts.leave(f"error: {error}")


def _simulate(devices: int, log: Path) -> None:
    """Devices, in a process that has touched none yet. What it prints goes to a file."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), sys.stderr.fileno())
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    program.keep_what_is_compiled()


def _train(config: ConfigDict) -> None:
    from jaxrl_sd.train import train

    train(config)
    jax.clear_caches()
