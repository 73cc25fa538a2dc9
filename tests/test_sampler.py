"""Sampling: what is drawn, from which distribution, and what is reported about it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from jaxrl_sd import decoding, model, sampler, sharding, vocabulary
from jaxrl_sd.model import Compute, ModelConfig
from jaxrl_sd.sampler import SamplingConfig

P, G, S, T, V = 3, 4, 6, 7, 13
CONFIG = ModelConfig(V + 3, V, 16, 32, 2, 4, 2, 8, 1e4, 1e-6, True)
PLAIN = SamplingConfig(max_response=T, stop_ids=(1, 2), pad_id=0)
LENGTH = jnp.array([6, 4, 1])


@pytest.fixture(scope="module")
def params():
    # Larger embeddings than at initialisation, so that the distributions are far from uniform.
    return jax.tree.map(lambda x: 3 * x, model.init_params(jax.random.key(0), CONFIG))


@pytest.fixture(scope="module")
def prompt():
    tokens = np.random.default_rng(0).integers(3, V, (P, S))
    return jnp.asarray(
        np.where(np.arange(S) < S - np.asarray(LENGTH)[:, None], 0, tokens), jnp.int32
    )


def draw(params, prompt, sampling=PLAIN, key=0, group_size=G, length=LENGTH, compute=sampler.PLAIN):
    return sampler.sample(
        params,
        jax.random.key(key),
        prompt,
        length,
        group_size=group_size,
        sampling=sampling,
        config=CONFIG,
        compute=compute,
    )


def trainer_logits(params, prompt, response):
    """f32[P, G, T, V'] from whole sequences, without a cache."""
    hidden = model.response_hidden(
        params,
        jnp.repeat(prompt, response.shape[1], axis=0),
        jnp.repeat(LENGTH, response.shape[1]),
        response.reshape(-1, T),
        CONFIG,
    )
    return model.logits(params, hidden, CONFIG).reshape(*response.shape, -1)


def exact_logits(params, prompt, response):
    """The same in float64, token by token."""
    out = []
    for row, length, responses in zip(prompt, LENGTH, response, strict=True):
        known = [int(token) for token in row[S - int(length) :]]
        out.append([oracles.response_logits(params, known, r.tolist(), CONFIG) for r in responses])
    return np.array(out)


def pick(logp, token):
    return jnp.take_along_axis(logp, token[..., None], axis=-1)[..., 0]


def valid(samples):
    return np.arange(T) < np.asarray(samples.length)[..., None]


def test_greedy_takes_the_trainers_likeliest_token(params, prompt):
    samples = draw(params, prompt, replace(PLAIN, temperature=0.0), group_size=1)
    expected = trainer_logits(params, prompt, samples.response).argmax(axis=-1)
    np.testing.assert_array_equal(
        jnp.where(valid(samples), samples.response, 0), jnp.where(valid(samples), expected, 0)
    )


def test_logp_is_the_trainers_and_behaviour_logp_that_of_the_draw(params, prompt):
    samples = draw(params, prompt, replace(PLAIN, temperature=0.7, top_k=5, top_p=0.9))
    logits = trainer_logits(params, prompt, samples.response) / 0.7
    kept = slow_truncate(np.asarray(logits, np.float64), 5, 0.9)
    for name, distribution in (("logp_t", logits), ("behaviour_logp_t", kept)):
        expected = pick(jax.nn.log_softmax(jnp.asarray(distribution)), samples.response)
        got = getattr(samples, name)
        np.testing.assert_allclose(
            jnp.where(valid(samples), got, 0), jnp.where(valid(samples), expected, 0), atol=1e-5
        )
        assert (jnp.where(valid(samples), 0, got) == 0).all()
    assert (samples.behaviour_logp_t >= samples.logp_t).all()
    assert (samples.behaviour_logp_t > samples.logp_t + 1e-3).any()


def test_a_penalty_lowers_what_the_response_has(params, prompt):
    sampling = replace(PLAIN, temperature=0.7, top_k=5, presence_penalty=2.0)
    # Key 0 draws a token of which rounding to float32 alone takes more than 1e-5.
    samples = draw(params, prompt, sampling, key=1)
    logits = exact_logits(params, prompt, samples.response)
    penalised = logits.copy()
    for p, g, t in np.ndindex(P, G, T):
        for token in {int(x) for x in samples.response[p, g, :t]}:
            penalised[p, g, t, token] -= 2.0
    for name, distribution in (
        ("logp_t", logits / 0.7),
        ("behaviour_logp_t", slow_truncate(penalised / 0.7, 5, 1.1)),
    ):
        expected = pick(jax.nn.log_softmax(jnp.asarray(distribution)), samples.response)
        got = getattr(samples, name)
        np.testing.assert_allclose(
            jnp.where(valid(samples), got, 0), jnp.where(valid(samples), expected, 0), atol=1e-5
        )
    greedy = draw(params, prompt, replace(PLAIN, temperature=0.0, presence_penalty=100.0))
    for row in greedy.response[:, 0]:
        row = [int(x) for x in row if x]
        assert len(set(row)) == len(row)


def slow_truncate(logits, top_k, top_p):
    out = np.full_like(logits, -np.inf)
    for index in np.ndindex(logits.shape[:-1]):
        row, mass = logits[index], 0.0
        order = np.argsort(-row)[: top_k or None]
        share = np.exp(row[order] - row.max())
        share /= share.sum()
        for token, p in zip(order, share, strict=True):
            if mass >= top_p:
                break
            out[index][token] = row[token]
            mass += p
    return out


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.6), (5, 0.8), (99, 0.99)])
def test_truncation_keeps_the_right_tokens(top_k, top_p):
    logits = np.random.default_rng(1).normal(size=(40, V)) * 2
    kept = sampler.truncate_logits(jnp.asarray(logits, jnp.float32), top_k, top_p)
    expected = np.isfinite(slow_truncate(logits, top_k, top_p))
    np.testing.assert_array_equal(np.asarray(kept) > vocabulary.MASKED / 2, expected)


def test_tokens_are_drawn_with_their_probability(params, prompt):
    one = replace(PLAIN, max_response=1, top_p=0.8)
    samples = draw(params, prompt[:1].repeat(P, 0), one, group_size=4000)
    drawn = np.bincount(samples.response[0].ravel(), minlength=V) / 4000
    logp = np.full(V, -np.inf)
    logp[np.asarray(samples.response[0, :, 0])] = np.asarray(samples.behaviour_logp_t[0, :, 0])
    expected = np.exp(logp)
    assert abs(expected.sum() - 1) < 1e-5  # the support is complete and renormalised
    # 5 standard errors: false alarms are rarer than one in a million.
    assert (abs(drawn - expected) < 5 * np.sqrt(expected * (1 - expected) / 4000) + 1e-9).all()


def test_rows_end_at_any_stop_token_and_only_there(params, prompt):
    samples = draw(params, prompt)
    for row, length, truncated in zip(
        samples.response.reshape(-1, T),
        samples.length.ravel(),
        samples.truncated.ravel(),
        strict=True,
    ):
        stops = np.flatnonzero(np.isin(row, PLAIN.stop_ids))
        assert length == (stops[0] + 1 if len(stops) else T)
        assert truncated == (len(stops) == 0)
        assert (row[length:] == PLAIN.pad_id).all()
    assert {1, 2} <= set(np.asarray(samples.response).ravel().tolist())


def test_a_stop_token_that_is_also_the_pad_counts_once(params, prompt):
    samples = draw(params, prompt, replace(PLAIN, stop_ids=tuple(range(V)), pad_id=1))
    assert (samples.length == 1).all() and not samples.truncated.any()


@pytest.fixture
def steps(monkeypatch):
    """Grows by 1 with every token that is decoded by what is compiled from now on."""
    steps, decode = [], decoding.decode

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return decode(*args)

    monkeypatch.setattr(decoding, "decode", counted)
    return steps


def test_stops_when_every_row_has_stopped(params, prompt, steps):
    sampling = replace(PLAIN, stop_ids=tuple(range(V)), max_response=T + 1)  # a fresh compilation
    draw(params, prompt, sampling).length.block_until_ready()
    jax.effects_barrier()
    assert len(steps) == 1


def test_a_lane_that_stopped_makes_room_and_then_its_slot(params, prompt, steps, monkeypatch):
    """Responses of one token: 2 slots of 3 lanes draw 3 x 4 of them in 4 steps, not in 12."""
    rounds, advance = [], sampler.advance
    monkeypatch.setattr(sampler, "advance", lambda *a, **k: rounds.append(1) or advance(*a, **k))
    everything = tuple(range(V))
    sampling = replace(PLAIN, stop_ids=everything, max_response=T + 1, slots=2, lanes=3)
    samples = draw(params, prompt, sampling)
    assert (samples.length == 1).all() and not samples.truncated.any()
    jax.effects_barrier()
    assert len(steps) == 2 * 2  # two prompts at once, then the third: 3 samples and the 4th each
    assert len(rounds) == 2  # and no more often does the host look


LONG = replace(PLAIN, max_response=23, stop_ids=(1,), presence_penalty=0.3, top_p=0.95)


@pytest.mark.parametrize(("slots", "lanes"), [(1, 0), (2, 3), (0, 1)])
def test_responses_do_not_depend_on_the_schedule(params, prompt, slots, lanes):
    want = draw(params, prompt, LONG)
    got = draw(params, prompt, replace(LONG, slots=slots, lanes=lanes))
    assert len(set(np.asarray(want.length).ravel().tolist())) > 3
    compare(got, want)


def compare(got, want):
    for name in ("response", "length", "truncated"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    for name in ("logp_t", "behaviour_logp_t"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=0, atol=1e-5)


def test_responses_do_not_depend_on_widths(params, prompt, monkeypatch):
    """Prompts are cut to the longest, and the cache grows as the responses do."""
    short, length = prompt[1:], LENGTH[1:]
    sampling = replace(LONG, slots=1, lanes=2)
    want = draw(params, short, sampling, length=length)
    monkeypatch.setattr(sampler, "NARROWEST", 2)
    widths, fill, grow = [], sampler.fill, sampler.grow

    def seen_fill(*args, **kwargs):
        widths.append(kwargs["width"])
        return fill(*args, **kwargs)

    def seen_grow(state, columns, **kwargs):
        widths.append(columns)
        wider = grow(state, columns=columns, **kwargs)
        assert all(x.is_deleted() for layer in state.cache for x in layer[2:])
        return wider

    monkeypatch.setattr(sampler, "fill", seen_fill)
    monkeypatch.setattr(sampler, "grow", seen_grow)
    sampling = replace(sampling, pad_id=2)  # a fresh compilation
    drawn = np.arange(LONG.max_response) < np.asarray(want.length)[..., None]
    compare(
        draw(params, short, sampling, length=length),
        want.replace(response=jnp.where(drawn, want.response, 2)),
    )
    assert set(widths) == {4, 6, 12, 23}  # of 6; and 3 columns, doubled


def test_widths_are_few_and_wide_enough():
    widths = {n: sampler.prompt_width(n, 1000) for n in range(1, 1001)}
    assert sorted(set(widths.values())) == [250, 500, 750, 1000]
    assert all(n <= width < n + 250 for n, width in widths.items())
    assert sampler.prompt_width(3, 12) == 12
    assert [sampler.first_columns(T) for T in (24, 64, 300, 4096)] == [24, 64, 64, 512]


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 2)])
def test_a_mesh_draws_the_same(params, prompt, shape):
    """Eight prompts in four slots: with two devices of rows, two are refilled at a time."""
    many, length = jnp.tile(prompt[:2], (4, 1)), jnp.tile(LENGTH[:2], 4)
    sampling = replace(LONG, slots=4, lanes=3)
    want = draw(params, many, sampling, length=length)
    mesh = sharding.make_mesh(*shape)
    got = draw(
        jax.device_put(params, sharding.of_state(params, mesh)),
        *(jax.device_put(many, sharding.of_rows(mesh)), sampling),
        length=jax.device_put(length, sharding.of_rows(mesh)),
        compute=Compute(mesh=mesh),
    )
    compare(got, want)


def test_the_state_is_changed_in_place(params, prompt):
    static = dict(sampling=PLAIN, config=CONFIG, compute=sampler.PLAIN)
    prepared = sampler.unstack(params, config=CONFIG, compute=sampler.PLAIN)
    state = sampler.start(num_prompts=P, group_size=G, width=S, **static)
    numbers = np.arange(P)
    filled = sampler.fill(prepared, state, prompt, LENGTH, numbers, numbers, width=S, **static)
    assert state.cache[0].prompt_k.is_deleted()
    run = sampler.advance.lower(prepared, jax.random.key(0), filled, P, **static).compile()
    memory = run.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(filled))
    advanced, _, _ = sampler.advance(prepared, jax.random.key(0), filled, P, **static)
    assert filled.cache[0].response_k.is_deleted() and not prepared["embed"].is_deleted()
    assert advanced.samples.length.all()


def test_bfloat16_is_near_and_its_log_probabilities_are_float32(params, prompt):
    sampling = replace(PLAIN, max_response=1)
    want = draw(params, prompt, sampling)
    got = draw(params, prompt, sampling, compute=Compute(dtype="bfloat16"))
    assert got.logp_t.dtype == jnp.float32
    same = got.response == want.response
    assert same.mean() > 0.5
    assert 1e-4 < abs(jnp.where(same, got.logp_t - want.logp_t, 0)).max() < 0.3


def test_a_block_and_then_a_token_is_a_token_of_the_whole():
    """Of 300 tokens in three blocks, a third of them impossible."""
    rng = np.random.default_rng(0)
    logits = np.where(rng.random(300) < 0.3, vocabulary.MASKED, 2 * rng.normal(size=300))
    expected, n = np.asarray(jax.nn.softmax(jnp.asarray(logits))), 100_000
    keys = jax.random.split(jax.random.key(0), n)
    draws = jax.jit(jax.vmap(sampler.categorical, (0, None)))(keys, jnp.asarray(logits))
    drawn = np.bincount(draws, minlength=300) / n
    assert len(drawn) == 300 and (drawn[expected == 0] == 0).all()
    assert (abs(drawn - expected) < 5 * np.sqrt(expected * (1 - expected) / n) + 1e-5).all()


def test_a_prompt_is_prefilled_once_for_its_group(params, prompt, monkeypatch):
    rows = []
    prefill = decoding.prefill

    def seen(params, prompt, *args):
        rows.append(prompt.shape[0])
        return prefill(params, prompt, *args)

    monkeypatch.setattr(decoding, "prefill", seen)
    draw(params, prompt, replace(PLAIN, max_response=T + 2))
    assert rows == [P]


def test_randomness_follows_the_key(params, prompt):
    first, again, other = (draw(params, prompt, key=k).response for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[:, 0] != first[:, 1]).any()  # the samples of a group differ
