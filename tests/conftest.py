"""Settings of every test: eight CPU devices, quick compilation, no silent broadcast of ranks."""

import os

# Read once, when JAX starts its CPU backend; so before anything imports jax.
# Compiling takes most of the suite's time, and what is compiled is tiny: optimising it costs more
# than it saves.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests put NaN where a mask has to silence it, so NaN alone is no error here.
jax.config.update("jax_debug_nans", False)
