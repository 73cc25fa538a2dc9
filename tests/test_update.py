"""Whole steps of a tiny model: score, credit, update, refresh."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from oracles import ORACLES, Case

from jaxrl_sd import contexts, losses, model, stats, teachers, update
from jaxrl_sd.methods import METHODS
from jaxrl_sd.methods.base import Method, Teacher, group_advantage
from jaxrl_sd.model import ModelConfig
from jaxrl_sd.scoring import token_stats
from jaxrl_sd.types import Batch, Hints, Rollouts
from jaxrl_sd.update import ALWAYS_PROBED, Steps, init_state, make_steps

CONFIG = ModelConfig(
    vocab_size=14,
    num_tokens=11,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_embeddings=True,
)
G, B, T, PAD, STEP = 4, 8, 4, 10, 1
VERDICTS = [True, True, False, False] + [False] * 4
LENGTH = [4, 1, 2, 3, 0, 4, 2, 3]  # of the responses; nothing of row 4 is trained
TEMPERATURE, CHUNK = 0.8, 12
# After one update the parameters have moved by the gradient.
OPTIMIZER = optax.sgd(1.0, momentum=0.9)
# Settings with which every term of a loss is visible.
HYPER = {
    "grpo": {"kl_coef": 0.5},
    "sdpg": {"beta": 1.0, "alpha": 0.5, "warmup": 1},
    "hsd": {"beta": 0.5},
}
SYNCED = {"sync_every": STEP + 1}
every_method = pytest.mark.parametrize("name", METHODS)


def method_of(name: str) -> Method:
    synced = SYNCED if name in ("rlsd", "cast") else {}
    return METHODS[name](**HYPER.get(name, {}), **synced)


@cache
def compiled(name: str, micro_batches: int = 1) -> Steps:
    return make_steps(
        method_of(name),
        OPTIMIZER,
        CONFIG,
        micro_batches=micro_batches,
        temperature=TEMPERATURE,
        chunk=CHUNK,
    )


@cache
def draw_params(seed: int):
    """Larger embeddings than at initialisation, so that distributions are far from uniform."""
    params = model.init_params(jax.random.key(seed), CONFIG)
    return {**params, "embed": 15 * params["embed"]}


def start(name: str, step: int = STEP):
    """The student, and teachers that differ from it. New arrays on every call: updates donate."""
    params = jax.tree.map(jnp.copy, draw_params(0))
    state = init_state(params, OPTIMIZER, method_of(name).teachers, seed=0)
    others = {
        source: jax.tree.map(lambda x, y: 0.8 * x + 0.2 * y, copies, draw_params(1 + n))
        for n, (source, copies) in enumerate(sorted(state.teachers.items()))
        if copies
    }
    return state.replace(teachers={**state.teachers, **others}, step=jnp.int32(step))


def rows(lengths, seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(PAD, size=n).tolist() for n in lengths]


PROMPTS = np.repeat(np.array(rows([3, 2], 1), object), G).tolist()
RESPONSES = rows(LENGTH, 2)
HINTS = {"teacher": rows([5, 4, 6, 3] * 2, 3), "reference": PROMPTS}


def pad(rows, left: bool, pad_id: int) -> np.ndarray:
    width = max(map(len, rows))
    out = np.full((len(rows), width), pad_id, np.int32)
    for i, row in enumerate(rows):
        out[i, width - len(row) if left else 0 :][: len(row)] = row
    return out


def shown_and_source(name: str):
    if name == "sc_grpo":
        return oracles.sc_grpo_hints(VERDICTS, G)
    return np.ones(B, bool), np.full(B, -1)


def draw_batch(name: str, pad_id: int = PAD, garbage: float = 0.0) -> Batch:
    def lengths(rows):
        return jnp.array([len(row) for row in rows], jnp.int32)

    mask_t = np.arange(T) < np.array(LENGTH)[:, None]
    logp_t = jnp.where(mask_t, -1.0, garbage)
    correct = jnp.array(VERDICTS, jnp.float32)
    rollouts = Rollouts(
        prompt=jnp.asarray(pad(PROMPTS, True, pad_id)),
        prompt_length=lengths(PROMPTS),
        response=jnp.asarray(pad(RESPONSES, False, pad_id)),
        mask_t=jnp.asarray(mask_t, jnp.float32),
        sampler_logp_t=logp_t,
        behaviour_logp_t=logp_t,
        reward=correct,
        correct=correct,
        graded=jnp.ones(B),
        group_size=G,
    )
    shown, source = shown_and_source(name)
    hints = {
        teacher: Hints(
            jnp.asarray(pad(HINTS[teacher], True, pad_id)),
            lengths(HINTS[teacher]),
            jnp.asarray(shown, jnp.float32),
            jnp.asarray(source, jnp.int32),
        )
        for teacher in method_of(name).teachers
    }
    return Batch(rollouts, hints)


def credited(name: str, batch: Batch | None = None) -> Batch:
    steps = compiled(name)
    state = start(name)
    return steps.credit(steps.score(state, batch or draw_batch(name)), state.step)[0]


credited_once = cache(credited)


def assert_trees_close(got, want):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-6), got, want)


def assert_trees_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def float64_logits(params, prompts) -> np.ndarray:
    """f64[B, T, V] from every row's own unpadded sequence."""
    out = np.zeros((B, T, CONFIG.num_tokens))
    for i, (prompt, response) in enumerate(zip(prompts, RESPONSES, strict=True)):
        if response:
            of_row = oracles.response_logits(params, prompt, response, CONFIG)
            out[i, : len(response)] = of_row / TEMPERATURE
    return out


def float64_case(name: str, params, teacher, reference) -> Case:
    """What an oracle needs."""
    student = float64_logits(params, PROMPTS)
    shown, source = shown_and_source(name)
    return Case(
        student=student,
        old=student,
        teacher=float64_logits(teacher, HINTS["teacher"]),
        reference=float64_logits(reference, PROMPTS),
        token=pad(RESPONSES, False, PAD),
        mask=np.arange(T) < np.array(LENGTH)[:, None],
        correct=np.array(VERDICTS),
        graded=np.ones(B, bool),
        shown=shown,
        source=source,
        group_size=G,
        step=STEP,
    )


def teacher_params(name: str):
    """The student's parameters, and those of each teacher."""
    state = start(name)
    return state.params, update.teacher_params(method_of(name).teachers, state)


@every_method
def test_update_follows_the_papers_gradient(name):
    """From token ids to parameters, against the oracle behind a float64 decoder."""
    before, shown = jax.tree.map(lambda x: np.asarray(x, np.float64), teacher_params(name))
    teacher, reference = (shown.get(t, before) for t in ("teacher", "reference"))
    case = float64_case(name, before, teacher, reference)
    oracle = partial(ORACLES[name], **HYPER.get(name, {}))
    state, metrics = compiled(name).update(start(name), credited_once(name))
    np.testing.assert_allclose(metrics["loss"], oracle(case).loss_t.sum(), rtol=1e-3, atol=1e-6)
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, before)
    rng = np.random.default_rng(0)
    for _ in range(3):
        direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), before)

        def loss(step, direction=direction):
            params = jax.tree.map(lambda x, d: x + step * d, before, direction)
            student = float64_logits(params, PROMPTS)
            return oracle(case._replace(student=student)).loss_t.sum()

        want = (loss(1e-5) - loss(-1e-5)) / 2e-5
        got = -sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.sum(a * b), moved, direction)))
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)
    assert metrics["skipped"] == 0
    assert metrics["grad_norm"] > 1e-2


def assert_same_update(name, got):
    want = compiled(name).update(start(name), credited_once(name))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), got, want)


@every_method
def test_four_micro_batches_add_up(name):
    assert_same_update(name, compiled(name, 4).update(start(name), credited_once(name)))


@every_method
def test_two_micro_batches_on_eight_devices_add_up(name):
    """Rows on different devices; groups, and so credit, span four of them."""
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["rows"], []))
    batch = jax.device_put(credited_once(name).replace(credit=None, weight_t=None), split)
    batch, _ = compiled(name, 2).credit(batch, STEP)
    assert len(batch.credit.adv_t.sharding.device_set) == 8
    assert_same_update(name, compiled(name, 2).update(jax.device_put(start(name), whole), batch))


@every_method
def test_padding_does_not_matter(name):
    """Neither other pads nor NaN where the sampler has drawn nothing."""
    want, _ = compiled(name).update(start(name), credited_once(name))
    batch = credited(name, draw_batch(name, pad_id=3, garbage=np.nan))
    got, _ = compiled(name).update(start(name), batch)
    assert_trees_equal(got, want)


@every_method
def test_no_gradient_reaches_a_teacher(name):
    method, batch = method_of(name), credited_once(name)
    requests = {**ALWAYS_PROBED, **method.probe}

    @jax.jit
    @jax.grad
    def gradient(teacher_params):
        probed = token_stats(
            requests, draw_params(0), teacher_params, batch, CONFIG, TEMPERATURE, CHUNK
        )
        loss_t, _ = method.loss(probed, batch, STEP)
        return losses.weighted_sum(loss_t, batch.weight_t)

    shown = {teacher: draw_params(1) for teacher in method.teachers}
    assert not any(x.any() for x in jax.tree.leaves(gradient(shown)))


@every_method
def test_a_gradient_that_is_not_finite_changes_nothing(name):
    """At a step at which lagging teachers would be refreshed."""
    batch = credited_once(name)
    broken = batch.replace(weight_t=batch.weight_t.at[7, 0].set(jnp.nan))
    state, metrics = compiled(name, 4).update(start(name), broken)
    want = start(name)
    assert_trees_equal(state, want.replace(step=want.step + 1))
    assert metrics["skipped"] == 1
    state, metrics = compiled(name, 4).update(state, batch)
    assert metrics["skipped"] == 0
    assert jnp.abs(state.params["embed"] - want.params["embed"]).max() > 1e-3


@pytest.mark.parametrize("name", ["rlsd", "cast", "opsd", "hsd"])
def test_teachers_are_refreshed_after_the_update(name):
    """A synced teacher is the policy after update number `every`, a frozen one never changes."""
    state = start(name, step=0)
    history = [jax.device_get(state)]
    for _ in range(3):
        state, _ = compiled(name).update(state, credited_once(name))
        history.append(jax.device_get(state))
    assert [int(x.step) for x in history] == [0, 1, 2, 3]
    for source, first in history[0].teachers.items():
        refreshed = history[2].params if source == "synced_2" else first
        for k, want in [(1, first), (2, refreshed), (3, refreshed)]:
            assert_trees_close(history[k].teachers[source], want)


def test_an_eighth_method_is_one_function_and_one_entry(monkeypatch):
    def toy(rate: float = 0.25) -> Method:
        """GRPO with an entropy bonus where a slow copy of the policy is surer than the policy."""

        def credit(batch, step):
            credit, metrics = group_advantage(batch, step)
            return credit.replace(distill_t=(batch.scores["gap"] > 0) * 1.0), metrics

        def loss(token_stats, batch, step):
            loss_t, metrics = Method().loss(token_stats, batch, step)
            return loss_t - 0.1 * batch.credit.distill_t * token_stats["entropy"], metrics

        return Method(
            teachers={"teacher": Teacher(contexts.marker(), teachers.ema(rate))},
            score={"gap": ("teacher", stats.log_prob_gap)},
            credit=credit,
            probe={"entropy": (None, stats.entropy)},
            loss=loss,
        )

    monkeypatch.setitem(METHODS, "toy", toy)
    state, metrics = compiled("toy", 2).update(start("toy"), credited("toy"))
    assert metrics["skipped"] == 0
    old, before, after = start("toy").teachers["ema_0.25"], start("toy").params, state.params
    assert jnp.abs(after["embed"] - before["embed"]).max() > 1e-3
    want = jax.tree.map(lambda s, p: s + 0.25 * (p - s), old, after)
    assert_trees_close(state.teachers["ema_0.25"], want)
