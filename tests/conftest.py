"""Settings of every test: eight CPU devices, quick compilation, no silent broadcast of ranks."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Read once, when JAX starts its CPU backend; so before anything imports jax. Tests compile
# for longer than they compute, and without fusion emitters XLA compiles in half the time.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false"
)
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

# What one test has compiled no other compiles again, in this process or one that it starts.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests put NaN where a mask has to silence it, so NaN alone is no error here.
jax.config.update("jax_debug_nans", False)


# Imports what programs import and forks for each line that it reads, with what Python is given.
FORKING = """
import json, os, runpy, signal, sys
import jaxrl_sd.answers, jaxrl_sd.train

for line in sys.stdin:
    arguments, *outputs = json.loads(line)
    child = os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    signal.alarm(300)
    for number, path in enumerate([os.devnull, *outputs]):
        os.dup2(os.open(path, os.O_RDWR), number)
    sys.argv = arguments
    if arguments[0] == "-m":
        del arguments[0]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        exec(arguments.pop(1), {"__name__": "__main__"})
    else:
        runpy.run_path(arguments[0], run_name="__main__")
    sys.exit()
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Runs Python in a process of its own, as subprocess.run does, but without most imports.

    Its arguments are `-m` and a module, `-c` and a program, or a file; and what follows. It ends
    with its module: other tests count the children of this process.
    """
    tests = Path(__file__).parent
    server = subprocess.Popen(
        [sys.executable, "-c", FORKING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=tests.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *filter(None, sys.path)])},
    )

    def run(*arguments) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp("process")
        outputs = [folder / name for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        arguments = [str(argument) for argument in arguments]
        print(json.dumps([arguments, *map(str, outputs)]), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(
            arguments, status, *(path.read_text() for path in outputs)
        )

    with server:
        yield run
        server.stdin.close()


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """Each program maps memory, and a process may have only so many maps."""
    yield
    jax.clear_caches()
