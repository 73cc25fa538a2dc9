"""What every program shares: one process or several, and errors in one line."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
from absl import app, flags, logging

from jaxrl_sd import hosts
from jaxrl_sd.types import InputError, first_line

COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "For several processes, the same on each: host:port of the first, or auto where JAX finds "
    "everything out itself (TPU pods, SLURM, Open MPI).",
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")

MIN_COMPILE_SECONDS = 0.1  # what takes longer is kept
CPU_DEVICES = 2  # any machine has two cores; and results do not depend on how many more


def run(program: Callable[[list[str]], None]) -> None:
    """Runs a program on what is left of the command line when absl has taken its flags.

    Bad input ends the process with one line on standard error and status 1. Where one of several
    processes ends, all end; the same command on each continues a run.
    """

    def main(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # orbax reports each file it writes
        keep_what_is_compiled()
        divide_cpu()
        try:
            if COORDINATOR.value is not None:
                hosts.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
            program(argv[1:])
        except InputError as error:
            hosts.leave(f"error: {error}")
        except Exception as error:
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            hosts.leave(
                f"error: process {jax.process_index()} of {jax.process_count()} cannot go on, "
                f"perhaps because another one ended: {first_line(error)}"
            )

    app.run(main, flags_parser=_parse)


def keep_what_is_compiled() -> None:
    """In the user's cache folder, for the next run, unless JAX was told of another."""
    if jax.config.jax_compilation_cache_dir is None:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(caches, "jaxrl_sd")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


def divide_cpu() -> None:
    """Makes the CPU so many devices, for those meshes that use them, unless JAX was told a number.

    Call it before anything touches a device.
    """
    told = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if jax.config.jax_num_cpu_devices < 0 and not told:
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv, known_only=True)
    except flags.Error as error:
        sys.exit(f"error: {error}")
