"""Settings of every test: eight CPU devices, quick compilation, no silent broadcast of ranks."""

import atexit
import os
import shutil
import tempfile

# Read once, when JAX starts its CPU backend; so before anything imports jax. Tests compile
# for longer than they compute.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
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


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    """Each program maps memory, and a process may have only so many maps."""
    yield
    jax.clear_caches()
