"""Token statistics from hidden states, against a float64 decoder that runs row by row."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from packed import in_one, token_stats

from jaxrl_sd import model, scoring, stats
from jaxrl_sd.model import Compute, ModelConfig
from jaxrl_sd.types import Batch, Hints, Rollouts
from jaxrl_sd.vocabulary import STUDENT

CONFIG = ModelConfig(
    vocab_size=18,
    num_tokens=13,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_embeddings=True,
)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
B, S, T, PAD = 5, 6, 4, 12
PROMPT = [2, 6, 3, 1, 4]  # lengths
HINT = [7, 3, 8, 5, 2]
RESPONSE = [4, 1, 3, 0, 2]  # nothing of row 3 is trained
TEMPERATURE = 0.7
REQUESTS = {
    "logp": (None, stats.log_prob),
    "entropy": (None, stats.entropy),
    "gap": ("teacher", stats.log_prob_gap),
    "reverse": ("teacher", stats.reverse_kl),
    "forward": ("reference", stats.forward_kl),
}


def draw_params(seed: int, config: ModelConfig = CONFIG):
    """Larger embeddings than at initialisation, so that distributions are far from uniform."""
    params = model.init_params(jax.random.key(seed), config)
    return {**params, "embed": 25 * params["embed"]}


def rows(lengths: list[int], seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(PAD, size=n).tolist() for n in lengths]


def pad(rows, width: int, left: bool, pad_id=PAD) -> np.ndarray:
    out = np.full((len(rows), width), pad_id, np.int32)
    for i, row in enumerate(rows):
        out[i, width - len(row) if left else 0 :][: len(row)] = row
    return out


def draw_batch(pad_id=PAD, wider=0) -> Batch:
    prompts, responses = rows(PROMPT, 1), rows(RESPONSE, 2)
    mask_t = np.arange(T + wider) < np.array(RESPONSE)[:, None]
    zeros_t, ones = jnp.zeros(mask_t.shape), jnp.ones(B)
    rollouts = Rollouts(
        prompt=pad(prompts, S + wider, True, pad_id),
        prompt_length=np.array(PROMPT, np.int32),
        response=pad(responses, T + wider, False, pad_id),
        mask_t=mask_t.astype(np.float32),
        sampler_logp_t=zeros_t,
        behaviour_logp_t=zeros_t,
        reward=ones,
        correct=ones,
        graded=ones,
        group_size=1,
    )

    def hints(prompts):
        lengths = np.array([len(row) for row in prompts], np.int32)
        width = max(lengths) + wider
        return Hints(pad(prompts, width, True, pad_id), lengths, -np.ones(B, np.int32))

    return Batch(rollouts, {"teacher": hints(rows(HINT, 3)), "reference": hints(prompts)})


PARAMS = {True: draw_params(0), False: draw_params(0, UNTIED)}  # by whether the head is tied
WEIGHT_T = dict(zip(REQUESTS, np.random.default_rng(4).standard_normal((5, B, T)), strict=True))


@cache
def teachers(tied: bool = True):
    config = CONFIG if tied else UNTIED
    return {"teacher": draw_params(5, config), "reference": draw_params(6, config)}


@cache
def scorer(chunk: int, tied: bool = True):
    """Statistics, and the gradients of their weighted sum to student and teachers."""

    def total(params, teachers, batch, part, temperature):
        configs = dict.fromkeys((STUDENT, *teachers), CONFIG if tied else UNTIED)
        compute = Compute(chunk=chunk)
        out = token_stats(REQUESTS, params, teachers, batch, part, configs, temperature, compute)
        return sum(jnp.sum(x[:, :T] * WEIGHT_T[name]) for name, x in out.items()), out

    # As XLA compiles for users: programs that differ behind the mask are equal to the last bit.
    options = {"xla_cpu_use_fusion_emitters": True}
    gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    return jax.jit(gradient, compiler_options=options)


def score(batch=None, chunk=7, tied=True, temperature=TEMPERATURE):
    batch = batch or draw_batch()
    args = PARAMS[tied], teachers(tied), batch, in_one(batch), temperature
    (_, out), gradients = scorer(chunk, tied)(*args)
    return out, *gradients


def slow(params, tied: bool, temperature: float) -> dict[str, np.ndarray]:
    """The same statistics in float64, from every row's own unpadded sequences."""
    config = CONFIG if tied else UNTIED
    out = {name: np.zeros((B, T)) for name in REQUESTS}
    prompts, hints, responses = rows(PROMPT, 1), rows(HINT, 3), rows(RESPONSE, 2)
    for i, (prompt, hint, response) in enumerate(zip(prompts, hints, responses, strict=True)):
        sources = {"student": (params, prompt), "reference": (teachers(tied)["reference"], prompt)}
        sources["teacher"] = (teachers(tied)["teacher"], hint)
        logits = {
            name: oracles.response_logits(weights, ids, response, config) / temperature
            for name, (weights, ids) in sources.items()
        }
        for t, token in enumerate(response):
            z = {name: x[t] for name, x in logits.items()}
            log_q, log_p = oracles.log_softmax(z["student"]), oracles.log_softmax(z["teacher"])
            out["logp"][i, t] = log_q[token]
            out["entropy"][i, t] = -(np.exp(log_q) * log_q).sum()
            out["gap"][i, t] = log_p[token] - log_q[token]
            out["reverse"][i, t] = oracles.kl(z["student"], z["teacher"])
            out["forward"][i, t] = oracles.kl(z["reference"], z["student"])
    return out


def assert_trees_close(got, want, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


@pytest.mark.parametrize("chunk, tied", [(1, True), (7, True), (7, False), (99, True)])
def test_values_equal_a_loop_over_rows(chunk, tied):
    got, *_ = score(chunk=chunk, tied=tied)
    want = slow(PARAMS[tied], tied, TEMPERATURE)
    assert_trees_close(got, want, rtol=1e-4, atol=1e-5)
    assert min(np.abs(x).max() for x in want.values()) > 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_equals_float64_differences(tied):
    """Along random directions, one for each kind of parameter."""
    _, gradient, _ = score(tied=tied)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS[tied])
    leaves, tree = jax.tree.flatten(params)
    rng, h = np.random.default_rng(0), 1e-5
    for n, leaf in enumerate(leaves):
        direction = rng.standard_normal(leaf.shape)

        def total(step, n=n, direction=direction):
            moved = [x + step * direction if m == n else x for m, x in enumerate(leaves)]
            out = slow(jax.tree.unflatten(tree, moved), tied, TEMPERATURE)
            return sum((x * WEIGHT_T[name]).sum() for name, x in out.items())

        want = (total(h) - total(-h)) / (2 * h)
        got = np.sum(jax.tree.leaves(gradient)[n] * direction)
        np.testing.assert_allclose(got, want, rtol=1e-3)


@pytest.mark.parametrize("chunk", [1, 99])
def test_gradient_does_not_depend_on_the_chunk(chunk):
    _, want, _ = score()
    _, got, _ = score(chunk=chunk)
    size = max(jnp.abs(x).max() for x in jax.tree.leaves(want))
    assert_trees_close(got, want, rtol=0, atol=1e-6 * size)


def test_a_chunk_larger_than_the_batch_is_the_batch():
    batch = draw_batch()
    args = PARAMS[True], teachers(), batch, in_one(batch), TEMPERATURE
    assert scorer(999).lower(*args).as_text() == scorer(128).lower(*args).as_text()


@pytest.mark.parametrize("tied", [True, False])
def test_no_gradient_reaches_a_teacher(tied):
    _, student, teacher = score(tied=tied)
    assert not any(x.any() for x in jax.tree.leaves(teacher))
    assert all(x.any() for x in jax.tree.leaves(student))


def test_temperature_divides_all_logits():
    got, *_ = score(temperature=1.3)
    assert_trees_close(got, slow(PARAMS[True], True, 1.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pad_id", [0, 15])
def test_content_of_the_padding_does_not_matter(pad_id):
    """Not even to gradients; except that the embedding of a padding token is looked up."""
    jax.tree.map(np.testing.assert_array_equal, score(draw_batch(pad_id=pad_id)), score())


def test_amount_of_padding_does_not_matter():
    got, gradient, _ = score(draw_batch(wider=3))
    want, want_gradient, _ = score()
    assert_trees_close({k: x[:, :T] for k, x in got.items()}, want, rtol=0, atol=1e-5)
    assert not any(x[:, T:].any() for x in got.values())
    size = max(jnp.abs(x).max() for x in jax.tree.leaves(want_gradient))
    assert_trees_close(gradient, want_gradient, rtol=0, atol=1e-5 * size)


def test_masked_tokens_give_zero_and_no_gradient():
    batch = draw_batch()
    trained = batch.rollouts.mask_t * (np.arange(B) != 0)[:, None]
    got, gradient, _ = score(batch.replace(rollouts=batch.rollouts.replace(mask_t=trained)))
    want, want_gradient, _ = score()
    assert not any(x[0].any() for x in got.values())
    assert_trees_close(
        {k: x[1:] for k, x in got.items()}, {k: x[1:] for k, x in want.items()}, rtol=0, atol=1e-5
    )
    assert jnp.abs(gradient["final_norm"] - want_gradient["final_norm"]).max() > 1e-3


def test_nan_behind_the_mask_reaches_no_gradient(monkeypatch):
    """Masked after the head instead, it would reach the head's gradient as 0 * NaN."""
    hidden, batch = model.hidden, draw_batch()

    def broken(params, stream, *others):
        behind = jnp.arange(stream.token.shape[1])[None] >= stream.count[:, None]
        return jnp.where(behind[..., None], jnp.nan, hidden(params, stream, *others))

    part = in_one(batch)
    for stream in part.streams.values():  # what is behind the last token looks at padding
        stream.predictor[:, int(part.count[0]) :] = 127
    want, want_gradient, _ = score()
    monkeypatch.setattr(model, "hidden", broken)
    args = PARAMS[True], teachers(), batch, part, TEMPERATURE
    (_, out), (gradient, _) = scorer.__wrapped__(7)(*args)  # compiled anew
    jax.tree.map(np.testing.assert_array_equal, (out, gradient), (want, want_gradient))


def test_where_a_teacher_is_silent_its_statistics_are_0_without_a_gradient(monkeypatch):
    batch, silent = draw_batch(), [1, 4]
    lengths = batch.hints["teacher"].prompt_length.copy()
    lengths[silent] = 0
    hints = {**batch.hints, "teacher": batch.hints["teacher"].replace(prompt_length=lengths)}
    part = in_one(batch.replace(hints=hints))
    got, gradient, _ = score(batch.replace(hints=hints))
    assert (part.streams["teacher"].count < in_one(batch).streams["teacher"].count).all()
    for name in ("gap", "reverse"):
        weight_t = WEIGHT_T[name].copy()
        weight_t[silent] = 0
        monkeypatch.setitem(WEIGHT_T, name, weight_t)
    args = PARAMS[True], teachers(), batch, in_one(batch), TEMPERATURE
    (_, out), (want_gradient, _) = scorer.__wrapped__(7)(*args)  # compiled anew
    for name in ("gap", "reverse"):
        assert jnp.abs(out[name][jnp.array(silent)]).max() > 0.01
        out[name] = out[name].at[jnp.array(silent)].set(0)
    assert_trees_close(got, out, rtol=0, atol=1e-5)
    assert_trees_close(gradient, want_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", [0, RESPONSE[0] - 1])
def test_a_token_is_predicted_before_it_is_seen(t):
    """Another token at t changes its own log-probability and everything after, no more."""
    batch = draw_batch()
    response = batch.rollouts.response.copy()
    response[0, t] = (response[0, t] + 1) % PAD
    got, *_ = score(batch.replace(rollouts=batch.rollouts.replace(response=response)))
    want, *_ = score()
    changed = {name: got[name] != want[name] for name in want}
    position = np.arange(T)
    np.testing.assert_array_equal(changed["logp"][0], position >= t)
    np.testing.assert_array_equal(changed["entropy"][0], position > t)
    assert not any(x[1:].any() for x in changed.values())


def test_padding_of_the_vocabulary_is_not_trained():
    for tied, name in [(True, "embed"), (False, "head")]:
        _, gradient, _ = score(tied=tied)
        trained = gradient[name].any(axis=1)
        np.testing.assert_array_equal(trained, np.arange(18) < 13)


def test_logits_of_all_tokens_never_exist():
    """Backward pass included: less memory than one float32 [N, V]."""
    config = dataclasses.replace(CONFIG, vocab_size=4096, num_tokens=4000, num_layers=1)
    tokens = 512
    shapes = jax.eval_shape(lambda: draw_params(0, config))
    part = in_one(draw_batch(), tokens)
    requests = {"kl": ("teacher", stats.forward_kl)}

    def megabytes(chunk):
        def loss(params, teacher, part):
            configs = dict.fromkeys((STUDENT, "teacher"), config)
            teachers, compute = {"teacher": teacher}, Compute(chunk=chunk)
            out = scoring.token_stats(requests, params, teachers, part, configs, 1.0, compute)
            return out["kl"].sum()

        compiled = jax.jit(jax.grad(loss)).lower(shapes, shapes, part).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 2**20

    block = tokens * config.vocab_size * 4 / 2**20
    assert megabytes(chunk=16) < block / 2
    assert megabytes(chunk=tokens) > block
