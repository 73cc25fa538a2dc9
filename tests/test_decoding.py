"""Decoding token by token against whole sequences."""

import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_sd import decoding, hlo, model, sharding
from jaxrl_sd.model import Compute, Lora, ModelConfig

CONFIG = ModelConfig(32, 29, 16, 24, 2, 4, 2, 8, 1e4, 1e-6, True)
U, N, S, T = 3, 2, 5, 6
LENGTH = np.array([2, 5, 3], np.int32)
PLAIN = Compute()


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: 2 * x, model.init_params(jax.random.key(0), CONFIG))


@pytest.fixture(scope="module")
def rows():
    """Left-padded prompts, and a response for each lane."""
    rng = np.random.default_rng(1)
    return rng.integers(29, size=(U, S)), rng.integers(29, size=(U, N, T))


@pytest.fixture(scope="module")
def want(params, rows):
    """Hidden states that predict each response token, [U, N, T, D]."""
    prompt, response = rows
    prompt, length = np.repeat(prompt, N, axis=0), np.repeat(LENGTH, N)
    whole = jax.jit(model.response_hidden, static_argnames="config")
    hidden = whole(params, prompt, length, response.reshape(U * N, T), config=CONFIG)
    return np.asarray(hidden).reshape(U, N, T, -1)


class Decoder:
    """A cache and the functions that change it, compiled for one setting."""

    def __init__(self, params, columns, compute=PLAIN):
        self.compute = compute
        fixed = dict(config=CONFIG, compute=compute)
        self.params = jax.jit(partial(decoding.unstack, **fixed))(params)
        self.cache = decoding.empty_cache(U, N, S, columns, CONFIG, compute)
        self.prefill = jax.jit(partial(decoding.prefill, **fixed))
        self.decode = jax.jit(partial(decoding.decode, **fixed))

    def fill(self, prompt, slots=range(U)):
        first, prompts = self.prefill(self.params, prompt, LENGTH)
        self.cache = decoding.fill(self.cache, jnp.array(slots), prompts, self.compute)
        return np.asarray(first)

    def step(self, token, t, column):
        hidden, self.cache = self.decode(
            self.params, token, jnp.asarray(t), LENGTH, self.cache, jnp.int32(column)
        )
        return np.asarray(hidden)


def test_lanes_at_different_tokens_on_a_ring_equal_whole_sequences(params, rows, want):
    """The second lane starts two tokens later, and the ring in its middle."""
    prompt, response = rows
    decoder, late = Decoder(params, columns=T), np.array([0, 2])
    decoder.cache = jax.tree.map(lambda x: x + 5, decoder.cache)  # what was there is not seen
    np.testing.assert_allclose(decoder.fill(prompt), want[:, 0, 0], rtol=1e-5, atol=1e-5)
    for step in range(T + 1):
        t = np.broadcast_to(np.maximum(step - late, 0) % T, (U, N))
        token = np.take_along_axis(response, t[..., None], axis=-1)[..., 0]
        hidden = decoder.step(token, t, (step + 4) % T)
        for n in range(N):
            if 0 <= step - late[n] < T - 1:
                expected = want[:, n, step - late[n] + 1]
                np.testing.assert_allclose(hidden[:, n], expected, rtol=1e-5, atol=1e-5)
    assert abs(want[:, 0, 1:] - want[:, 1, 1:]).max() > 0.1  # lanes do differ


def test_a_cache_that_grows_keeps_what_it_has(params, rows, want):
    prompt, response = rows
    decoder, column = Decoder(params, columns=3), 1
    decoder.fill(prompt)
    for t in range(T - 1):
        if t == 3:
            for i, old in enumerate(decoder.cache):
                k, v, column = decoding.widen(*old[2:], jnp.int32(1), T, decoder.compute)
                decoder.cache[i] = old._replace(response_k=k, response_v=v)
            assert column == 3 and decoding.columns_of(decoder.cache) == T
        hidden = decoder.step(response[:, :, t], np.full((U, N), t), column)
        column = (column + 1) % (3 if t < 3 else T)
        np.testing.assert_allclose(hidden, want[:, :, t + 1], rtol=1e-5, atol=1e-5)


def test_a_prompt_goes_to_its_slot_and_to_no_other(params, rows):
    decoder, other = Decoder(params, columns=T), np.flip(rows[0])
    decoder.fill(rows[0])
    before = decoder.cache
    decoder.fill(other, slots=[1, U, U])
    _, want = decoder.prefill(decoder.params, other, LENGTH)
    for new, old, (k, v) in zip(decoder.cache, before, want, strict=True):
        np.testing.assert_array_equal(new.prompt_k[1], k[0])
        np.testing.assert_array_equal(new.prompt_v[1], v[0])
        for name in ("prompt_k", "prompt_v"):
            np.testing.assert_array_equal(getattr(new, name)[::2], getattr(old, name)[::2])


def test_weights_cache_and_states_have_the_type_to_compute_in(params, rows, want):
    decoder = Decoder(params, T, Compute(dtype="bfloat16"))
    first, prompts = decoder.prefill(decoder.params, rows[0], LENGTH)
    hidden, cache = decoder.decode(
        decoder.params, rows[1][..., 0], jnp.zeros((U, N), int), LENGTH, decoder.cache, jnp.int32(0)
    )
    arrays = first, prompts, hidden, cache, decoder.params["embed"]
    assert {x.dtype for x in jax.tree.leaves(arrays)} == {jnp.dtype("bfloat16")}
    assert decoding.logits(decoder.params, hidden, CONFIG, decoder.compute).dtype == jnp.float32
    np.testing.assert_allclose(first.astype(jnp.float32), want[:, 0, 0], rtol=0, atol=0.1)


def test_a_tied_head_takes_no_memory_of_its_own(params):
    prepared = decoding.unstack(params, CONFIG, PLAIN)
    assert set(prepared) == {"embed", "layers", "final_norm"}
    hidden = jax.random.normal(jax.random.key(2), (U, N, CONFIG.hidden_size))
    got = decoding.logits(prepared, hidden, CONFIG, PLAIN)
    np.testing.assert_allclose(got, model.logits(params, hidden, CONFIG), rtol=1e-5, atol=1e-5)


def split(params, config, compute):
    """How `unstack` splits the decoder's weights, and their shapes."""
    placed = sharding.of_state(params, compute.mesh)
    unstack = partial(decoding.unstack, config=config, compute=compute)
    lowered = jax.jit(unstack, in_shardings=(placed,)).lower(params)
    return lowered.compile().output_shardings, lowered.out_info


def abstract_params(config):
    params = jax.eval_shape(partial(model.init_params, config=config), jax.random.key(0))
    if config.lora is None:
        return params
    adapter = jax.eval_shape(partial(model.init_adapter, config=config), jax.random.key(0))
    return model.join(params, adapter)


@pytest.mark.parametrize("lora", [None, Lora(8, 8.0, ("q", "o", "gate", "up", "down"))])
def test_a_token_moves_neither_weights_nor_feed_forward_units_between_devices(lora):
    """The largest thing that a step gathers is smaller than the smallest matrix of a layer.

    And all that is sent is less than a device's sums of one feed-forward product.
    """
    config = ModelConfig(256, 256, 64, 8192, 1, 8, 4, 64, 1e4, 1e-6, True, lora)
    compute = Compute(mesh=sharding.make_mesh(data=1, fsdp=4, tensor=2))
    placed, params = split(abstract_params(config), config, compute)

    def step(params):
        cache = decoding.empty_cache(4, 1, 4, 4, config, compute)
        zeros = jnp.zeros((4, 1), jnp.int32)
        hidden, cache = decoding.decode(
            params, zeros, zeros, jnp.full(4, 4), cache, jnp.int32(0), config, compute
        )
        return decoding.logits(params, hidden, config, compute)

    text = jax.jit(step, in_shardings=(placed,)).lower(params).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in gathered]
    assert sizes and max(sizes) < 64 * 4 * 64 / 4
    assert sum(hlo.cost(text).sent.values()) < 4 * 8192 / 2 * 4


@pytest.mark.parametrize(
    ("units", "spec"), [(512, (("tensor", "fsdp"),)), (514, ("tensor", "fsdp"))]
)
def test_units_that_the_devices_do_not_divide_stay_as_they_are(units, spec):
    config = ModelConfig(256, 256, 64, units, 1, 8, 4, 64, 1e4, 1e-6, True)
    compute = Compute(mesh=sharding.make_mesh(data=1, fsdp=4, tensor=2))
    placed, _ = split(abstract_params(config), config, compute)
    assert tuple(placed["layers"][0]["gate"].spec) == spec


@pytest.mark.parametrize("rows", [1, decoding.FEW, decoding.FEW + 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_is_that_of_its_rows_and_weights(rows, dtype):
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.normal(size=(n, 8)), dtype) for n in (rows, 5))
    product = jax.jit(partial(decoding.product, preferred_element_type=jnp.float32))
    got, want = product(x, weight), np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "platform", "shape"),
    [(decoding.FEW, "cpu", "5,128"), (decoding.FEW + 1, "cpu", "129,5"), (8, "tpu", "8,5")],
)
def test_few_rows_are_the_second_factor_on_a_cpu_alone(rows, platform, shape):
    """In what XLA is given, and on a CPU in what it makes of it."""
    arguments = jnp.zeros((rows, 512)), jnp.zeros((5, 512))
    traced = jax.jit(decoding.product).trace(*arguments)
    text = traced.lower(lowering_platforms=(platform,)).as_text("hlo")
    assert f"f32[{shape}]" in re.search(r".* dot\(.*", text)[0]
    if platform == "cpu":
        compiled = jax.jit(decoding.product).lower(*arguments).compile().as_text()
        dot = re.search(r".* dot\(.*", compiled)[0]
        assert f"f32[{shape}]" in dot
        assert ("rhs_contracting_dims={0}" in dot) == (rows <= decoding.FEW)


def test_a_token_has_its_rows_second_in_all_products_with_weights(params):
    """On a CPU."""
    decoder = Decoder(params, columns=T)
    zeros = jnp.zeros((U, N), jnp.int32)

    def step(params, cache):
        hidden, _ = decoding.decode(params, zeros, zeros, LENGTH, cache, 0, CONFIG, PLAIN)
        return decoding.logits(params, hidden, CONFIG, PLAIN)

    text = jax.jit(step).lower(decoder.params, decoder.cache).compile().as_text()
    shapes = re.findall(r"f32\[(\d+),(\d+)\]\S* dot\(", text)
    assert len(shapes) == len(sharding.LINEAR) * CONFIG.num_layers + 1
    assert {int(columns) for _, columns in shapes} == {U * N}


def test_xla_finds_the_way_to_the_weights_of_a_prefill(capfd):
    config = ModelConfig(256, 256, 64, 512, 1, 8, 4, 64, 1e4, 1e-6, True)
    compute = Compute(mesh=sharding.make_mesh(data=2, fsdp=2, tensor=2))
    placed, params = split(abstract_params(config), config, compute)
    prompt, length = jnp.zeros((4, 8), jnp.int32), jnp.full(4, 8)
    prefill = partial(
        decoding.prefill, prompt=prompt, prompt_length=length, config=config, compute=compute
    )
    jax.jit(prefill, in_shardings=(placed,)).lower(params).compile()
    assert "full rematerialization" not in capfd.readouterr().err


LOWER = """
import hashlib, jax
from functools import partial
from jaxrl_sd import decoding, model, sharding
config = model.ModelConfig(64, 64, 16, 64, 1, 4, 4, 4, 1e4, 1e-6, True)
compute = model.Compute(mesh=sharding.make_mesh(data=1, fsdp=4, tensor=2))
params = jax.eval_shape(partial(model.init_params, config=config), jax.random.key(0))
unstack = jax.jit(partial(decoding.unstack, config=config, compute=compute))
print(hashlib.sha256(unstack.lower(params).as_text().encode()).hexdigest())
"""


def test_all_hosts_compile_the_same_program():
    """Whatever the order of their sets, which is another in every process."""

    def program(seed):
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", LOWER]
        return subprocess.run(command, env=os.environ | flags, capture_output=True, check=True)

    programs = {program(seed).stdout for seed in "012"}
    assert len(programs) == 1 and len(programs.pop().strip()) == 64
