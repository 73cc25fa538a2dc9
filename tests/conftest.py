"""Settings of every test: eight CPU devices, and no silent broadcast between ranks."""

import os

# Read once, when JAX starts its CPU backend; so before anything imports jax.
DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tests put NaN where a mask has to silence it, so NaN alone is no error here.
jax.config.update("jax_debug_nans", False)
