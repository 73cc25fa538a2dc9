"""Where arrays live: one table, nothing split twice, copies of parameters split like them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxrl_sd import model, sharding
from jaxrl_sd.methods import METHODS
from jaxrl_sd.model import LINEAR, Lora, ModelConfig
from jaxrl_sd.sampler import SamplingConfig, sample
from jaxrl_sd.types import InputError
from jaxrl_sd.update import init_state
from jaxrl_sd.vocabulary import STUDENT

CONFIG = ModelConfig(20, 18, 16, 24, 2, 4, 2, 4, 1e4, 1e-6, False)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def test_every_matrix_has_its_axes_and_none_is_split_twice():
    lora = Lora(3, 6.0, tuple(LINEAR))
    config = replace(CONFIG, biases=tuple(LINEAR), lora=lora)
    shapes = model.param_shapes(config)
    named = {**shapes.pop("layers"), **shapes, **model.adapter_shapes(config)["layers"]}
    matrices = {name: shape for name, shape in named.items() if not name.endswith("norm")}
    assert matrices.keys() == sharding.PARAM_AXES.keys()
    for name, axes in sharding.PARAM_AXES.items():
        assert len(axes) == len(matrices[name])
        assert len(sharding.mesh_axes(axes)) == len(axes)


def test_biases_and_adapters_are_split_like_their_weights(mesh):
    config = replace(CONFIG, biases=("q", "o", "down"), lora=Lora(4, 8.0, ("q", "o", "down")))
    shapes = model.join(model.param_shapes(config), model.adapter_shapes(config))["layers"]
    arrays = {name: np.zeros(shape) for name, shape in shapes.items()}
    specs = {name: tuple(s.spec) for name, s in sharding.of_state(arrays, mesh).items()}
    assert (specs["q"], specs["q_bias"]) == ((None, "fsdp", "tensor"), (None, "tensor"))
    assert (specs["q_a"], specs["q_b"]) == ((None, "fsdp"), (None, None, "tensor"))
    for name in ("o", "down"):
        assert specs[name][1] == "tensor" and specs[name][-1] == "fsdp"
        assert specs[f"{name}_bias"] == (None, "fsdp")
        assert (specs[f"{name}_a"], specs[f"{name}_b"]) == ((None, "tensor"), (None, None, "fsdp"))


def test_a_collision_is_refused():
    with pytest.raises(ValueError, match="two array axes to one mesh axis"):
        sharding.mesh_axes(("heads", "feed_forward"))


def test_too_many_devices_are_refused():
    with pytest.raises(InputError, match="mesh: data=3, fsdp=3, tensor=1 need 9 devices, there"):
        sharding.make_mesh(data=3, fsdp=3, tensor=1)


def test_moments_and_teachers_are_split_like_the_parameters(mesh):
    params = model.init_params(jax.random.key(0), CONFIG)
    state = init_state(params, {STUDENT: {}}, optax.adamw(1e-3), METHODS["rlsd"]().teachers, seed=0)
    specs = jax.tree.map(lambda s: s.spec, sharding.of_state(state, mesh))
    assert specs.params["layers"]["q"] == PartitionSpec(None, "fsdp", "tensor")
    assert specs.params["layers"]["down"] == PartitionSpec(None, "tensor", "fsdp")
    assert specs.params["layers"]["q_norm"] == PartitionSpec()
    assert specs.opt_state[0].mu == specs.opt_state[0].nu == specs.params
    assert specs.teachers["synced_10"] == specs.params
    assert specs.step == PartitionSpec()


def test_a_layer_is_gathered_along_its_hidden_side_alone(mesh):
    shapes = model.param_shapes(CONFIG)["layers"]
    layer = {name: jnp.zeros(shape[1:]) for name, shape in shapes.items()}
    out = jax.jit(lambda layer: sharding.gather(layer, mesh))(layer)
    specs = {name: tuple(x.sharding.spec) for name, x in out.items()}
    assert (specs["q"], specs["down"]) == ((None, "tensor"), ("tensor",))


def test_xla_finds_the_way_from_the_table_to_the_rows(mesh, capfd):
    compute = model.Compute(mesh=mesh)
    split = sharding.of_state({"embed": np.zeros((20, 16))}, mesh)["embed"]

    def loss(table, token):
        x = model.embed({"embed": table}, token, compute)
        axes = ("rows", "tokens", "features")
        return (sharding.constrain(x, axes, mesh) ** 2).sum()

    table = jax.ShapeDtypeStruct((20, 16), jnp.float32, sharding=split)
    token = jax.ShapeDtypeStruct((8, 6), jnp.int32, sharding=sharding.of_rows(mesh))
    jax.jit(jax.grad(loss), out_shardings=split).lower(table, token).compile()
    assert "full rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize(("backend", "warned"), [("tpu", True), ("cpu", False)])
def test_idle_chips_are_warned_of_and_devices_of_a_cpu_are_not(monkeypatch, backend, warned):
    warnings = []
    monkeypatch.setattr(sharding.logging, "warning", lambda *what: warnings.append(what))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    sharding.make_mesh(data=2, fsdp=1, tensor=1)
    assert warnings == [("mesh: %d of %d devices are used", 2, 8)] * warned
    sharding.make_mesh(data=2, fsdp=2, tensor=2)
    assert len(warnings) == warned


def test_one_device_is_told_nothing():
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1)
    x = jnp.zeros((8, 6))
    assert sharding.constrain(x, ("rows", "tokens"), mesh) is x
    assert not sharding.is_split("rows", 8, mesh)


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(data=1, fsdp=3, tensor=2)
    embed = sharding.of_state({"embed": np.zeros((20, 16))}, mesh)["embed"]
    assert embed.spec == PartitionSpec("tensor")


def test_a_sharded_sampler_draws_the_same_tokens(mesh):
    params = model.init_params(jax.random.key(0), CONFIG)
    prompt, length = jnp.arange(24, dtype=jnp.int32).reshape(4, 6) % 18, jnp.array([6, 5, 4, 3])
    sampling = SamplingConfig(max_response=5, stop_ids=(1,), pad_id=0)

    def draw(params, prompt, length):
        key = jax.random.key(1)
        return sample(params, key, prompt, length, group_size=2, sampling=sampling, config=CONFIG)

    one = draw(params, prompt, length)
    split = draw(
        jax.device_put(params, sharding.of_state(params, mesh)),
        *jax.device_put((prompt, length), sharding.of_rows(mesh)),
    )
    np.testing.assert_array_equal(one.response, split.response)
    np.testing.assert_allclose(one.logp_t, split.logp_t, atol=1e-5)
