import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_sd import model, rope

CONFIG = model.ModelConfig(
    vocab_size=32,
    num_tokens=29,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_embeddings=False,
)
# Qwen3's published sizes.
QWEN3_8B = model.ModelConfig(
    vocab_size=151936,
    num_tokens=151669,
    hidden_size=4096,
    intermediate_size=12288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    tie_embeddings=False,
)
QWEN3_06B = dataclasses.replace(
    QWEN3_8B,
    hidden_size=1024,
    intermediate_size=3072,
    num_layers=28,
    num_heads=16,
    tie_embeddings=True,
)

P, G, S, T, PAD = 3, 2, 5, 4, 28
LENGTH = np.array([2, 5, 3], np.int32)


def left_pad(rows, S, pad=PAD):
    return np.array([[pad] * (S - len(row)) + list(row) for row in rows], np.int32)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def draw(shape):
        scale = 0.4 if len(shape) > 2 else 1.0
        return jnp.asarray(scale * rng.standard_normal(shape), jnp.float32)

    return jax.tree.map(draw, model.param_shapes(CONFIG), is_leaf=lambda x: isinstance(x, tuple))


@pytest.fixture(scope="module")
def rows():
    """Prompts of LENGTH tokens (no padding id among them) and a group of responses for each."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(PAD, size=n) for n in LENGTH]
    return prompts, rng.integers(PAD, size=(P, G, T), dtype=np.int32)


response_hidden = jax.jit(model.response_hidden, static_argnames="config")
init_params = jax.jit(model.init_params, static_argnums=1)
init_adapter = jax.jit(model.init_adapter, static_argnums=1)


def flat_hidden(params, rows, config=CONFIG, S=S, pad=PAD):
    prompts, responses = rows
    prompt = np.repeat(left_pad(prompts, S, pad), G, axis=0)
    length, response = np.repeat(LENGTH, G), responses.reshape(P * G, T)
    return response_hidden(params, prompt, length, response, config=config)


@pytest.fixture(scope="module")
def jacobian(params):
    """Of one number per hidden state of the left-padded row 1 2 3 | 4 5 6 7: [T, *parameter]."""
    prompt, response = left_pad([[1, 2, 3]], S), np.array([[4, 5, 6, 7]], np.int32)
    direction = jnp.asarray(np.random.default_rng(2).standard_normal(CONFIG.hidden_size))

    def outputs(params):
        length = np.array([3], np.int32)
        return model.response_hidden(params, prompt, length, response, CONFIG)[0] @ direction

    return jax.jit(jax.jacrev(outputs))(params)


def test_hidden_depends_on_what_precedes_and_on_nothing_else(jacobian):
    """Every position has its own id, so a position's influence is its embedding's gradient."""
    influence = jnp.abs(jacobian["embed"]).max(axis=-1)
    for t in range(T):
        seen = np.r_[1 : 4 + t]
        assert influence[t, seen].min() > 1e-3
        unseen = np.setdiff1d(np.arange(CONFIG.vocab_size), seen)  # PAD is among them
        np.testing.assert_array_equal(influence[t, unseen], 0)


def test_gradients_are_finite_with_padding(jacobian):
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(jacobian))


def test_a_row_does_not_depend_on_its_padding(params, rows):
    want = flat_hidden(params, rows)
    np.testing.assert_array_equal(flat_hidden(params, rows, pad=0), want)
    np.testing.assert_allclose(flat_hidden(params, rows, S=S + 6), want, rtol=0, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch_mates(params, rows):
    prompts, responses = rows
    want = flat_hidden(params, rows).reshape(P, G, T, -1)
    prompt = left_pad(prompts, S)
    for p in range(P):
        row = slice(p, p + 1)
        alone = response_hidden(params, prompt[row], LENGTH[row], responses[row, 0], config=CONFIG)
        np.testing.assert_allclose(alone[0], want[p, 0], rtol=0, atol=1e-5)


def test_remat_policies_change_what_is_computed_again_and_nothing_else(params):
    """Products of the backward pass are counted, and exponentials, which attention computes."""
    prompt, response = left_pad([[1, 2, 3]], S), np.array([[4, 5, 6, 7]], np.int32)

    def gradient(policy):
        def loss(params):
            compute = model.Compute(remat=policy)
            length = np.array([3], np.int32)
            x = model.response_hidden(params, prompt, length, response, CONFIG, compute)
            return (x**3).sum()

        jaxpr = str(jax.make_jaxpr(jax.grad(loss))(params))
        counts = np.array([jaxpr.count("dot_general"), jaxpr.count(" exp ")])
        return jax.jit(jax.grad(loss))(params), counts

    expected, at_least = gradient("none")
    again = {}
    for policy in set(model.REMAT) - {"none"}:
        actual, counts = gradient(policy)
        again[policy] = tuple(counts - at_least)
        for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6 * abs(y).max())
    # All projections but the last; with them, the forward pass of attention.
    assert again == {"dots": (0, 0), "attention": (6, 0), "layer": (6 + 2, 2)}


@pytest.mark.parametrize("tied", [True, False])
def test_padding_of_the_vocabulary_gets_no_probability(params, rows, tied):
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    hidden = flat_hidden(params, rows)
    logits = model.logits(params, hidden, config)
    share = jax.nn.softmax(logits)
    np.testing.assert_array_equal(share[..., CONFIG.num_tokens :], 0)
    head = params["embed"] if tied else params["head"]
    want = jax.nn.softmax(hidden @ head[: CONFIG.num_tokens].T)
    np.testing.assert_allclose(share[..., : CONFIG.num_tokens], want, rtol=1e-4, atol=1e-7)


def test_logits_are_float32_sums_of_bfloat16_products():
    """1 + 2^-8 has no bfloat16: it survives only if the product is accumulated in float32."""
    config = dataclasses.replace(CONFIG, hidden_size=2)
    params = {"head": jnp.ones((config.vocab_size, 2), jnp.bfloat16)}
    logits = model.logits(params, jnp.array([1, 2**-8], jnp.bfloat16), config)
    assert logits.dtype == jnp.float32
    assert logits[0] == 1 + 2**-8


def test_rope_theta_matters(params, rows):
    other = dataclasses.replace(CONFIG, rope_theta=1e6)
    difference = jnp.abs(flat_hidden(params, rows) - flat_hidden(params, rows, other))
    assert difference.max() > 0.1


def test_rope_equals_float64():
    """At the longest context of Qwen3, float32 angles keep about 3 digits."""
    theta, H, positions = 1e6, 128, np.array([0, 1, 17, 4095, 40959])
    x = np.random.default_rng(0).standard_normal((len(positions), 1, H))
    angle = positions[:, None, None] * theta ** (-np.arange(H // 2) * 2 / H)
    rotated = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * np.exp(1j * angle)
    want = np.concatenate([rotated.real, rotated.imag], axis=-1)
    got = rope.rope(jnp.asarray(x, jnp.float32), jnp.asarray(positions), theta)
    np.testing.assert_allclose(got[:3], want[:3], rtol=0, atol=1e-5)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-2)


def test_rms_norm_by_hand():
    got = model.rms_norm(jnp.array([3.0, 4.0]), jnp.array([1.0, 10.0]), eps=1.5)
    np.testing.assert_allclose(got, [3 / 14**0.5, 40 / 14**0.5], rtol=1e-6)


@pytest.mark.parametrize(
    "config, count", [(QWEN3_8B, 8_190_735_360), (QWEN3_06B, 596_049_920)], ids=["8B", "0.6B"]
)
def test_parameter_counts_of_published_sizes(config, count):
    shapes = jax.eval_shape(partial(model.init_params, config=config), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count
    assert jax.tree.map(lambda x: x.shape, shapes) == model.param_shapes(config)


def test_random_init_has_the_stated_scales():
    heads = dict(num_heads=8, num_kv_heads=8, head_dim=12)
    config = dataclasses.replace(
        CONFIG, vocab_size=500, hidden_size=64, intermediate_size=96, **heads
    )
    params = model.init_params(jax.random.key(0), config)
    fan_in = {"q": 64, "k": 64, "v": 64, "o": 96, "gate": 64, "up": 64, "down": 96}
    for name, inputs in fan_in.items():
        np.testing.assert_allclose(params["layers"][name].std(), inputs**-0.5, rtol=0.05)
    np.testing.assert_allclose(params["head"].std(), 64**-0.5, rtol=0.05)
    np.testing.assert_allclose(params["embed"].std(), 0.02, rtol=0.05)
    norms = [params["layers"][f"{name}_norm"] for name in ("attn", "mlp", "q", "k")]
    assert all((norm == 1).all() for norm in [*norms, params["final_norm"]])
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_random_biases_are_zero():
    config = dataclasses.replace(CONFIG, biases=("q", "o", "down"), qk_norm=False)
    layers = init_params(jax.random.key(0), config)["layers"]
    shapes = {"q_bias": (2, 4, 6), "o_bias": (2, 16), "down_bias": (2, 16)}
    assert {name: x.shape for name, x in layers.items() if "bias" in name} == shapes
    assert all((layers[name] == 0).all() for name in shapes)
    assert "q_norm" not in layers and "k_norm" not in layers


# Low-rank adapters.

LORA = dataclasses.replace(CONFIG, lora=model.Lora(3, 6.0, tuple(model.LINEAR)))


@pytest.fixture(scope="module")
def adapter():
    rng = np.random.default_rng(3)

    def draw(shape):
        return jnp.asarray(0.3 * rng.standard_normal(shape), jnp.float32)

    return jax.tree.map(draw, model.adapter_shapes(LORA), is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize("targets", [*model.LINEAR, tuple(model.LINEAR)], ids=str)
def test_an_adapter_equals_its_merged_weights(params, adapter, rows, targets):
    targets = targets if isinstance(targets, tuple) else (targets,)
    config = dataclasses.replace(CONFIG, lora=model.Lora(3, 6.0, targets))
    shapes = model.adapter_shapes(config)
    adapter = {"layers": {name: adapter["layers"][name] for name in shapes["layers"]}}
    got = flat_hidden(model.join(params, adapter), rows, config)
    merged = model.merge(params, adapter, config)
    assert jax.tree.map(jnp.shape, merged) == model.param_shapes(config)
    np.testing.assert_allclose(got, flat_hidden(merged, rows), rtol=0, atol=2e-5)
    assert jnp.abs(got - flat_hidden(params, rows)).max() > 0.1


@pytest.mark.parametrize("name", model.LINEAR)
def test_linear_equals_float64(params, adapter, name):
    """x (W + 6 / 3 A B) + bias, of one layer."""
    layer = {key: x[1] for key, x in model.join(params, adapter)["layers"].items()}
    inputs = model.LINEAR[name]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, *layer[name].shape[:inputs]))
    layer[f"{name}_bias"] = jnp.asarray(rng.standard_normal(layer[name].shape[inputs:]))
    w, bias, a, b = (
        np.asarray(layer[f"{name}{end}"], np.float64) for end in ("", "_bias", "_a", "_b")
    )
    want = np.tensordot(x, w + 2 * np.tensordot(a, b, 1), inputs) + bias
    got = model.linear(jnp.asarray(x, jnp.float32), layer, name, LORA)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    half = {key: value.astype(jnp.bfloat16) for key, value in layer.items() if key == name}
    low = {key: value for key, value in layer.items() if key[-2:] in ("_a", "_b")}
    assert model.linear(jnp.asarray(x, jnp.bfloat16), half | low, name, LORA).dtype == jnp.bfloat16


def test_a_new_adapter_changes_nothing(params, rows):
    adapter = init_adapter(jax.random.key(0), LORA)
    assert jax.tree.map(jnp.shape, adapter) == model.adapter_shapes(LORA)
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {np.dtype(np.float32)}
    got = flat_hidden(model.join(params, adapter), rows, LORA)
    np.testing.assert_allclose(got, flat_hidden(params, rows), rtol=0, atol=1e-5)


def test_a_new_adapter_has_the_stated_scales():
    config = dataclasses.replace(LORA, lora=model.Lora(64, 128.0, tuple(model.LINEAR)))
    layers = init_adapter(jax.random.key(0), config)["layers"]
    fan_in = {"q": 16, "k": 16, "v": 16, "o": 24, "gate": 16, "up": 16, "down": 24}
    for name, inputs in fan_in.items():
        a, bound = layers[f"{name}_a"], inputs**-0.5
        assert 0.98 * bound < jnp.abs(a).max() <= bound
        np.testing.assert_allclose(a.std(), bound / 3**0.5, rtol=0.05)
        assert (layers[f"{name}_b"] == 0).all()
    assert (layers["q_a"] != layers["k_a"]).any()


def test_merged_weights_are_rounded_once(params, adapter):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    merged = model.merge(half, adapter, LORA)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    for name in model.LINEAR:
        w = np.asarray(half["layers"][name], np.float64)
        a, b = (np.asarray(adapter["layers"][f"{name}_{end}"], np.float64) for end in "ab")
        want = w + 2 * np.stack([np.tensordot(*ab, 1) for ab in zip(a, b, strict=True)])
        error = np.abs(np.asarray(merged["layers"][name], np.float64) - want)
        assert (error <= 2.0**-8 * np.abs(want) * 1.001 + 1e-7).all()


def test_join_takes_the_leaves_of_both():
    base, adapter = {"embed": 1, "layers": {"q": 2}}, {"layers": {"q_a": 3, "q_b": 4}}
    assert model.join(base, adapter) == {"embed": 1, "layers": {"q": 2, "q_a": 3, "q_b": 4}}
    assert model.join(base, {}) == base and model.join({}, adapter) == adapter
    assert base == {"embed": 1, "layers": {"q": 2}}
