"""Every family and option against transformers: fields, rotary frequencies, logits."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_sd import architectures, decoding, model, sharding, weights
from jaxrl_sd.types import InputError

FILE = Path("models/x/config.json")
SIZES = dict(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LLAMA3_1 = {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
QWEN3_YARN = dict(
    rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768
)
YARN = dict(
    rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16, beta_fast=4.0
)

# A family and its fields of config.json.
MODELS = {
    "qwen3": ("qwen3", dict(head_dim=6)),
    "qwen3 tied": ("qwen3", dict(head_dim=16, tie_word_embeddings=True, rms_norm_eps=1e-2)),
    "qwen3 biases": ("qwen3", dict(head_dim=8, attention_bias=True)),
    "qwen3 yarn": ("qwen3", dict(head_dim=16, rope_parameters=YARN)),
    "qwen2": ("qwen2", dict(rope_theta=1e6)),
    "qwen2 tied yarn": ("qwen2", dict(tie_word_embeddings=True, rope_parameters=YARN)),
    "llama": ("llama", {}),
    "llama3": ("llama", dict(head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    "llama biases": ("llama", dict(attention_bias=True, num_key_value_heads=4)),
    "llama mlp biases": ("llama", dict(mlp_bias=True, num_key_value_heads=1)),
    "llama linear": (
        "llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=1e3, factor=3.0)),
    ),
}
# Fields of config.json that say how positions are rotated, in the forms of transformers 4 and 5.
ROTATIONS = {
    "absent": {},
    "old theta": dict(rope_theta=777.0),
    "old theta, integer": dict(rope_theta=777),
    "old, not scaled": dict(rope_theta=777.0, rope_scaling=None),
    "new theta": dict(rope_parameters=dict(rope_theta=777.0, rope_type="default")),
    "theta beside the new field": dict(rope_parameters=dict(rope_type="default"), rope_theta=777.0),
    "old linear": dict(rope_scaling=dict(type="linear", factor=2.5)),
    "old llama3": dict(rope_scaling=LLAMA3, rope_theta=1e3),
    "llama3.1": dict(rope_parameters=LLAMA3_1, max_position_embeddings=131072),
    "llama3 of its whole context": dict(
        rope_parameters={**LLAMA3, "original_max_position_embeddings": None},
        max_position_embeddings=16,
    ),
    "yarn": dict(rope_parameters=YARN),
    "yarn of qwen3": dict(rope_parameters=QWEN3_YARN, max_position_embeddings=131072),
    "old yarn": dict(rope_scaling={"type": "yarn", "factor": 4.0}, rope_theta=1e4),
    "yarn, context beside it": dict(
        rope_scaling=YARN, original_max_position_embeddings=40, rope_theta=1e4
    ),
    "yarn, attention factor": dict(rope_parameters={**YARN, "attention_factor": 0.7}),
    "yarn, mscales": dict(rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}),
    "yarn, one mscale": dict(rope_parameters={**YARN, "mscale": 0.7}),
    "yarn, no truncation": dict(rope_parameters={**QWEN3_YARN, "truncate": False}),
    "yarn, betas": dict(rope_parameters={**QWEN3_YARN, "beta_fast": 8, "beta_slow": 0.5}),
    "yarn, a step": dict(rope_parameters={**QWEN3_YARN, "beta_fast": 1e9, "beta_slow": 1e9}),
    "yarn, a ramp past the last": dict(rope_parameters={**QWEN3_YARN, "beta_slow": 1e-9}),
    "yarn, factor 1": dict(rope_parameters={**YARN, "factor": 1.0}),
}
LENGTH, T = np.array([7, 21, 24, 12]), 5


@pytest.fixture
def torch_models():
    pytest.importorskip("torch")
    import make_fixtures

    return make_fixtures


def prompts_and_responses(ids):
    """Rows cut before their last T tokens: prompts left-padded with another token."""
    S = LENGTH.max() - T
    prompt = np.full((len(ids), S), 7, np.int32)
    for row, n in enumerate(LENGTH - T):
        prompt[row, S - n :] = ids[row, :n]
    response = np.stack([row[n - T : n] for row, n in zip(ids, LENGTH, strict=True)])
    return jnp.asarray(prompt), jnp.asarray(LENGTH - T, jnp.int32), jnp.asarray(response)


def at_once(params, config, prompt, length, response):
    return model.logits(
        params, model.response_hidden(params, prompt, length, response, config), config
    )


def step_by_step(params, config, compute, prompt, length, response):
    params = decoding.unstack(params, config, compute)
    last, prompts = decoding.prefill(params, prompt, length, config, compute)
    cache = decoding.empty_cache(len(prompt), 1, prompt.shape[1], T, config, compute)
    cache = decoding.fill(cache, jnp.arange(len(prompt)), prompts, compute)
    hidden = [last[:, None]]
    for t in range(T - 1):
        steps = jnp.full((len(prompt), 1), t)
        state, cache = decoding.decode(
            params, response[:, None, t], steps, length, cache, jnp.int32(t), config, compute
        )
        hidden.append(state)
    return decoding.logits(params, jnp.concatenate(hidden, axis=1), config, compute)


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(torch_models, tmp_path, name):
    """Whole sequences on one device, then token by token on a mesh of eight; and back again."""
    family, fields = MODELS[name]
    theirs = torch_models.random_model(family, **{**SIZES, **fields})
    theirs.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(24, size=(4, LENGTH.max()), dtype=np.int32)
    want = [
        torch_models.row_logits(theirs, ids[i, :n])[n - T - 1 : -1] for i, n in enumerate(LENGTH)
    ]
    batch = prompts_and_responses(ids)

    params, config = weights.load(tmp_path)
    got = jax.jit(at_once, static_argnums=1)(params, config, *batch)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)

    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params, config = weights.load(tmp_path, mesh)
    batch = jax.device_put(batch, sharding.of_rows(mesh))
    compute = model.Compute(mesh=mesh)
    got = jax.jit(step_by_step, static_argnums=(1, 2))(params, config, compute, *batch)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)

    from transformers import AutoModelForCausalLM

    weights.save(tmp_path / "ours", params, config, eos_token_id=None)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(opened) is type(theirs)
    np.testing.assert_array_equal(
        torch_models.row_logits(opened, ids[0]), torch_models.row_logits(theirs, ids[0])
    )


def read(fields, family="llama", **sizes):
    """Our reading of a config.json and transformers' own, of the same text."""
    from transformers import AutoConfig

    fields = {**SIZES, "rms_norm_eps": 1e-6, **sizes, **fields}
    text = json.dumps(fields)
    theirs = AutoConfig.for_model(family, **json.loads(text))
    return architectures.from_json(FILE, {"model_type": family, **json.loads(text)}), theirs


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_rotary_frequencies_equal_transformers(torch_models, name):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    fields = {k: drop_none(v) for k, v in ROTATIONS[name].items()}
    ours, theirs = read(fields, head_dim=64)
    want = LlamaRotaryEmbedding(theirs)
    frequency = ours.rope_theta ** (-np.arange(32, dtype=np.float32) / 32)
    got = ours.rope_scaling.scale(jnp.asarray(frequency), ours.rope_theta)
    np.testing.assert_allclose(got, want.inv_freq.numpy(), rtol=1e-6)
    assert ours.rope_scaling.amplitude() == want.attention_scaling


def drop_none(value):
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


@pytest.mark.parametrize("family", architectures.FAMILIES)
@pytest.mark.parametrize("absent", ["head_dim", "num_key_value_heads", "tie_word_embeddings"])
def test_absent_fields_mean_what_they_mean_in_transformers(family, absent):
    fields = {**SIZES, "head_dim": 8, "num_attention_heads": 32, "hidden_size": 64}
    fields = {**fields, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "model_type": family}
    del fields[absent]
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(**fields)
    ours = architectures.from_json(FILE, fields)
    assert ours.head_dim == getattr(theirs, "head_dim", 64 // 32)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.tie_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize("name", MODELS)
def test_fields_survive_a_round_trip(name):
    family, fields = MODELS[name]
    config, _ = read(fields, family)
    written = json.loads(json.dumps(architectures.to_json(config, "bfloat16")))
    for forms in ((), ("rope_parameters",), ("rope_scaling", "rope_theta")):  # both, old, new
        assert architectures.from_json(FILE, written | dict.fromkeys(forms)) == config
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert written["max_position_embeddings"] == 64


@pytest.mark.parametrize(
    "family, changes, message",
    [
        ("gemma3", {}, "model_type is 'gemma3', supported are qwen3, qwen2, llama"),
        ("qwen3_moe", {}, "model_type is 'qwen3_moe', supported are"),
        ("llama", {"architectures": ["Qwen2ForCausalLM"]}, "supported is .'LlamaForCausalLM'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', supported is 'silu'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True, supported is False"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, supported is 1.0"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
        ("qwen2", {"layer_types": ["sliding_attention"]}, "'sliding_attention', supported is"),
        ("llama", {"attention_bias": 1}, "attention_bias is 1, expected bool"),
        ("llama", {"head_dim": 7}, "head_dim is 7, expected an even int"),
        ("llama", {"max_position_embeddings": "8k"}, "max_position_embeddings is '8k'"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "'dynamic', supp.* de",
        ),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "'longrope'.*depend on the len"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ("llama", {"rope_scaling": {"type": ["linear"]}}, "rope_type is .'linear'., expected str"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0.0, expected a p"),
        ("llama", {"rope_parameters": {**YARN, "truncate": 0}}, "truncate is 0, expected bool"),
        (
            "llama",
            {"rope_parameters": {**YARN, "mystery": 1}},
            "mystery is not a field of .*'yarn'",
        ),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "full_attention is not a field of"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "factor is 0.5, supported"),
        (
            "llama",
            {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}},
            "expected more than low",
        ),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear', expected"),
    ],
)
def test_unsupported_fields(family, changes, message):
    fields = {"model_type": family, **SIZES, "rms_norm_eps": 1e-6, **changes}
    with pytest.raises(InputError, match=message) as error:
        architectures.from_json(FILE, fields)
    assert "\n" not in str(error.value) and str(FILE) in str(error.value)


def test_what_a_family_cannot_say_is_refused():
    config, _ = read({}, "qwen2")
    for change in (dict(biases=("q",)), dict(qk_norm=True)):
        with pytest.raises(InputError, match="a qwen2 cannot be saved with"):
            architectures.to_json(dataclasses.replace(config, **change), "float32")
