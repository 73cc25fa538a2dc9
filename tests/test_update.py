"""Whole steps of a tiny model: score, credit, update, refresh."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from oracles import ORACLES, Case
from packed import in_one, in_parts, token_stats

from jaxrl_sd import contexts, losses, model, packing, sharding, stats, teachers, update
from jaxrl_sd.methods import METHODS
from jaxrl_sd.methods.base import (
    Method,
    Teacher,
    Verdicts,
    add_importance_weight,
    group_advantage,
)
from jaxrl_sd.model import LINEAR, Compute, Lora, ModelConfig
from jaxrl_sd.packing import Prompts, Size
from jaxrl_sd.types import Batch, Credit, Hints, Rollouts
from jaxrl_sd.update import ALWAYS_PROBED, Steps, init_state, make_steps
from jaxrl_sd.vocabulary import STUDENT

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
P, G, B, T, PAD, STEP = 2, 4, 8, 4, 10, 1
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
    "dr_grpo": {"max_tokens": 7},
    "rloo": {"kl_coef": 0.5},
    "reinforce_pp": {"kl_coef": 0.5},
    "opd": {"teacher": "a/folder"},
    "opd_top_k": {"teacher": "a/folder", "top_k": 3},
    "opd_sampled": {"teacher": "a/folder", "scale": 1.5},
    "sdpo": {"top_k": 3},
    "sdft": {"skip": 1},
    "gspo": {"clip_low": 0.2, "clip_high": 0.2},
}
SYNCED = {"sync_every": STEP + 1}
every_method = pytest.mark.parametrize("name", METHODS)


def method_of(name: str) -> Method:
    synced = SYNCED if name in ("rlsd", "cast", "rlrt") else {}
    return METHODS[name](**HYPER.get(name, {}), **synced)


def compile_steps(method: Method, mesh=None, config=CONFIG, mini_batches: int = 1) -> Steps:
    return make_steps(
        method,
        OPTIMIZER,
        dict.fromkeys((STUDENT, *method.teachers), config),
        mini_batches=mini_batches,
        temperature=TEMPERATURE,
        compute=Compute(chunk=CHUNK, mesh=mesh),
    )


@cache
def compiled(name: str) -> Steps:
    return compile_steps(method_of(name))


def train_on(steps: Steps, state, batch: Batch, mini_batches: int = 1, epochs: int = 1):
    """`update.update` with each mini-batch in one part."""
    parts = in_parts(batch, rows=B, mini_batches=mini_batches)
    return update.update(steps, state, batch, parts, epochs)


@cache
def draw_params(seed: int):
    """Larger embeddings than at initialisation, so that distributions are far from uniform."""
    params = model.init_params(jax.random.key(seed), CONFIG)
    return {**params, "embed": 15 * params["embed"]}


def start(name: str, step: int = STEP):
    """The student, and teachers that differ from it. New arrays on every call: updates donate."""
    params = jax.tree.map(jnp.copy, draw_params(0))
    external = jax.tree.map(lambda x, y: 0.8 * x + 0.2 * y, params, draw_params(9))
    frozen = {STUDENT: {}, "a/folder": external}
    state = init_state(params, frozen, OPTIMIZER, method_of(name).teachers, seed=0)
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
    routes = {
        "sc_grpo": oracles.sc_grpo_hints,
        "sdpo": oracles.verified_siblings,
        "rlrt": oracles.verified_siblings,
    }
    if name in routes:
        return routes[name](VERDICTS, G)
    return np.ones(B, bool), np.full(B, -1)


def verdicts() -> Verdicts:
    graded = np.ones(B, bool)
    correct = np.array(VERDICTS)
    return Verdicts(correct, graded, 1.0 * correct, np.array(LENGTH), ~graded, G, T)


def draw_batch(name: str, pad_id: int = PAD, garbage: float = 0.0) -> Batch:
    def lengths(rows):
        return jnp.array([len(row) for row in rows], jnp.int32)

    grades = method_of(name).grade(verdicts())
    rows = np.repeat(grades.kept, G) & grades.trained  # a dropped group is as if it were masked
    mask_t = (np.arange(T) < np.array(LENGTH)[:, None]) & rows[:, None]
    logp_t = jnp.where(mask_t, -1.0, garbage)
    correct = jnp.array(VERDICTS, jnp.float32)
    rollouts = Rollouts(
        prompt=jnp.asarray(pad(PROMPTS, True, pad_id)),
        prompt_length=lengths(PROMPTS),
        response=jnp.asarray(pad(RESPONSES, False, pad_id)),
        mask_t=jnp.asarray(mask_t, jnp.float32),
        sampler_logp_t=logp_t,
        behaviour_logp_t=logp_t,
        reward=jnp.asarray(grades.reward, jnp.float32),
        correct=correct,
        graded=jnp.ones(B),
        group_size=G,
    )
    shown, source = shown_and_source(name)
    hints = {
        teacher: Hints(
            jnp.asarray(pad(HINTS[teacher], True, pad_id)),
            lengths(HINTS[teacher]) * jnp.asarray(shown, jnp.int32),
            jnp.asarray(source, jnp.int32),
        )
        for teacher in method_of(name).teachers
    }
    return Batch(rollouts, hints)


def credited(name: str, batch: Batch | None = None) -> Batch:
    steps = compiled(name)
    state = start(name)
    batch = batch or draw_batch(name)
    return steps.credit(update.score(steps, state, batch, in_parts(batch, rows=B)), state.step)[0]


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
        truncated=np.zeros(B, bool),
        length=np.array(LENGTH),
        max_length=T,
    )


def teacher_params(name: str):
    """The student's parameters, and those of each teacher."""
    state = start(name)
    teachers = update.teacher_params(method_of(name).teachers, state)
    return state.params, teachers


@every_method
def test_update_follows_the_papers_gradient(name):
    """From token ids to parameters, against the oracle behind a float64 decoder."""
    before, shown = jax.tree.map(lambda x: np.asarray(x, np.float64), teacher_params(name))
    teacher, reference = (shown.get(t, before) for t in ("teacher", "reference"))
    case = float64_case(name, before, teacher, reference)
    hyper = {key: x for key, x in HYPER.get(name, {}).items() if key != "teacher"}
    oracle = partial(ORACLES[name], **hyper)
    state, metrics = train_on(compiled(name), start(name), credited_once(name))
    np.testing.assert_allclose(metrics["loss"], oracle(case).loss_t.sum(), rtol=1e-3, atol=1e-6)
    moved = jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, before)
    rng = np.random.default_rng(0)
    for _ in range(3):
        direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), before)

        def loss(step, direction=direction):
            params = jax.tree.map(lambda x, d: x + step * d, before, direction)
            student = float64_logits(params, PROMPTS)
            return oracle(case._replace(student=student, detached=case.student)).loss_t.sum()

        want = (loss(1e-5) - loss(-1e-5)) / 2e-5
        got = -sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.sum(a * b), moved, direction)))
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6)
    assert metrics["skipped"] == 0
    assert metrics["grad_norm"] > 1e-2


def assert_same_update(name, got):
    want = train_on(compiled(name), start(name), credited_once(name))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-5), got, want)


@every_method
def test_parts_on_eight_devices_add_up(name):
    """A row a stream, four streams at a time, heads and vocabulary split; credit sees groups."""
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    steps = compile_steps(method_of(name), mesh)
    batch = credited_once(name).replace(credit=None)
    parts = jax.device_put(in_parts(batch, tokens=24, streams=4, rows=1), sharding.of_rows(mesh))
    assert len(parts[0]) == -(-int(batch.rollouts.mask_t.any(axis=1).sum()) // 4)
    batch = jax.device_put(batch, sharding.of_rows(mesh))
    state = start(name)
    state = jax.device_put(state, sharding.of_state(state, mesh))
    scored = update.score(steps, state, batch, parts)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, scored.scores, credited_once(name).scores)
    batch, _ = steps.credit(batch, STEP)
    assert len(batch.credit.adv_t.sharding.device_set) == 8
    state, metrics = update.update(steps, state, batch, parts, epochs=1)
    assert_same_update(name, (state, metrics))
    update.update(steps, state, batch, parts, epochs=1)
    for function in (steps.score, steps.zeros, steps.add, steps.apply, steps.finish):
        assert function._cache_size() == 1  # what is returned is sharded as what is given


@every_method
def test_padding_does_not_matter(name):
    """Neither other pads nor NaN where the sampler has drawn nothing."""
    want, _ = train_on(compiled(name), start(name), credited_once(name))
    batch = credited(name, draw_batch(name, pad_id=3, garbage=np.nan))
    got, _ = train_on(compiled(name), start(name), batch)
    assert_trees_equal(got, want)


@every_method
def test_no_gradient_reaches_a_teacher(name):
    method, batch = method_of(name), credited_once(name)
    requests = {**ALWAYS_PROBED, **method.probe}
    configs = dict.fromkeys((STUDENT, *method.teachers), CONFIG)
    compute, part = Compute(chunk=CHUNK), in_one(batch)

    @jax.jit
    @jax.grad
    def gradient(teacher_params):
        models = draw_params(0), teacher_params
        probed = token_stats(requests, *models, batch, part, configs, TEMPERATURE, compute)
        loss_t, _ = method.loss(probed, batch, STEP)
        return losses.weighted_sum(loss_t, batch.weight_t)

    shown = {teacher: draw_params(1) for teacher in method.teachers}
    assert not any(x.any() for x in jax.tree.leaves(gradient(shown)))


@every_method
def test_a_gradient_that_is_not_finite_changes_nothing(name):
    """Teachers still follow, from a policy that has stayed as it was."""
    batch = credited_once(name)
    nan = batch.credit.adv_t.at[0, 1].set(jnp.nan)
    broken = batch.replace(credit=Credit(nan, nan))
    state, metrics = train_on(compiled(name), start(name), broken)
    want = start(name)
    assert_trees_equal((state.params, state.opt_state), (want.params, want.opt_state))
    assert (state.step, metrics["skipped"]) == (STEP + 1, 1)
    for source in {t.source for t in method_of(name).teachers.values()}:
        refreshed = source.refresh(want.teachers[source.name], want.params, STEP + 1)
        assert_trees_close(state.teachers[source.name], refreshed)
    state, metrics = train_on(compiled(name), state, batch)
    assert metrics["skipped"] == 0
    assert jnp.abs(state.params["embed"] - want.params["embed"]).max() > 1e-3


def test_a_batch_without_a_token_moves_nothing():
    """Not even by what the optimiser remembers. Every teacher of SDPO is silent."""
    batch = credited_once("sdpo")
    state, _ = train_on(compiled("sdpo"), start("sdpo"), batch)
    before = jax.device_get(state)
    silent = batch.hints["teacher"].replace(prompt_length=jnp.zeros(B, jnp.int32))
    batch, _ = compiled("sdpo").credit(batch.replace(hints={"teacher": silent}), STEP)
    state, metrics = train_on(compiled("sdpo"), state, batch)
    assert_trees_equal((state.params, state.opt_state), (before.params, before.opt_state))
    assert (metrics["loss"], metrics["empty"], metrics["skipped"]) == (0, 1, 0)
    assert state.step == STEP + 2


def test_a_mini_batch_without_a_token_enters_no_mean():
    """The first of two; the metrics and the move are those of the other.

    SDPO's teacher is silent about a group without a right answer, which comes first here.
    """
    half = jax.tree.map(lambda x: jnp.roll(x, G, axis=0), credited_once("sdpo"))
    steps = compile_steps(method_of("sdpo"), mini_batches=2)
    halves, _ = steps.credit(half, STEP)
    state, metrics = train_on(steps, start("sdpo"), halves, mini_batches=2)
    whole, _ = compiled("sdpo").credit(half, STEP)
    want, want_metrics = train_on(compiled("sdpo"), start("sdpo"), whole)
    assert_trees_close(state, want)
    np.testing.assert_allclose(metrics["first_ratio"], 1, atol=1e-6)
    assert (metrics["empty"], want_metrics["empty"]) == (0.5, 0)
    for name in want_metrics.keys() - {"empty"}:
        np.testing.assert_allclose(metrics[name], want_metrics[name], rtol=1e-5, atol=1e-7)


def test_mini_batches_and_epochs_are_updates_in_a_row():
    """Each on whole groups, against the log-probabilities of the start; teachers follow at the end.

    SDPG, because its advantages, its ratio, its weights and its live teacher all show an error.
    """
    batch, steps = credited_once("sdpg"), compile_steps(method_of("sdpg"), mini_batches=2)
    in_two, _ = steps.credit(batch, STEP)
    got, metrics = train_on(steps, start("sdpg"), in_two, mini_batches=2, epochs=2)
    parts = [jax.tree.map(lambda x, p=p: x[p * G : (p + 1) * G], batch) for p in range(P)]
    parts = [compiled("sdpg").credit(part, STEP)[0] for part in parts]
    want, ratios = start("sdpg"), []
    for part in parts * 2:
        want, of_part = train_on(compiled("sdpg"), want.replace(step=jnp.int32(STEP)), part)
        ratios.append(float(of_part["ratio"]))
    assert_trees_close(got, want)
    np.testing.assert_allclose(metrics["first_ratio"], 1, atol=1e-6)
    np.testing.assert_allclose(metrics["ratio"], np.mean(ratios), rtol=1e-5)
    assert np.abs(np.array(ratios[1:]) - 1).max() > 1e-3


def test_a_moving_average_moves_once_a_step():
    """After the last mini-batch, however many there are."""
    steps = compile_steps(method_of("sdft"), mini_batches=2)
    batch, _ = steps.credit(credited_once("sdft"), STEP)
    state, _ = train_on(steps, start("sdft"), batch, mini_batches=2, epochs=2)
    old = start("sdft").teachers["ema_0.01"]
    want = jax.tree.map(lambda s, p: s + 0.01 * (p - s), old, state.params)
    assert_trees_close(state.teachers["ema_0.01"], want)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_scale_the_gradient(level):
    """A sampler that gave every token 2/3 of the trainer's probability; the cap bites from 2 on."""
    batch = credited_once("dr_grpo")
    behaviour_logp_t = batch.scores["old_logp"] - np.log(1.5)
    rollouts = batch.rollouts.replace(behaviour_logp_t=behaviour_logp_t)
    length = np.array(LENGTH)[:, None]
    want = {"token": np.full((B, 1), 1.5), "sequence": np.minimum(1.5**length, 2.0)}[level]
    weighted = batch.replace(credit=jax.tree.map(lambda x: x * want, batch.credit))
    want_state, _ = train_on(compiled("dr_grpo"), start("dr_grpo"), weighted)
    method = add_importance_weight(method_of("dr_grpo"), level, cap=2.0)
    state, _ = train_on(compile_steps(method), start("dr_grpo"), batch.replace(rollouts=rollouts))
    assert_trees_close(state.params, want_state.params)


@pytest.mark.parametrize("name", ["rlsd", "cast", "opsd", "hsd"])
def test_teachers_are_refreshed_after_the_update(name):
    """A synced teacher is the policy after update number `every`, a frozen one never changes."""
    state = start(name, step=0)
    history = [jax.device_get(state)]
    for _ in range(3):
        state, _ = train_on(compiled(name), state, credited_once(name))
        history.append(jax.device_get(state))
    assert [int(x.step) for x in history] == [0, 1, 2, 3]
    for source, first in history[0].teachers.items():
        refreshed = history[2].params if source == "synced_2" else first
        for k, want in [(1, first), (2, refreshed), (3, refreshed)]:
            assert_trees_close(history[k].teachers[source], want)


def test_an_adapter_has_the_gradient_of_the_weights_that_it_changes():
    """dA = scale dW B', dB = scale A' dW, for the policy and teachers that the weights make up."""
    config = replace(CONFIG, lora=Lora(rank=2, alpha=6.0, targets=tuple(LINEAR)))
    base, whole, copy = draw_params(0), compiled("sdpg"), partial(jax.tree.map, jnp.copy)
    policy, reference = (draw_adapter(seed, config) for seed in (1, 2))
    merged = start("sdpg").replace(
        params=copy(model.merge(base, policy, config)),
        teachers={"current": (), "frozen": copy(model.merge(base, reference, config))},
    )
    method = method_of("sdpg")
    state = init_state(copy(policy), {STUDENT: copy(base)}, OPTIMIZER, method.teachers, seed=0)
    state = state.replace(teachers={"current": (), "frozen": copy(reference)}, step=jnp.int32(STEP))
    steps, batch = compile_steps(method, config=config), draw_batch("sdpg")
    parts = in_parts(batch, rows=B)
    scored = update.score(whole, merged, batch, parts)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, update.score(steps, state, batch, parts).scores, scored.scores)
    batch, _ = whole.credit(scored, merged.step)
    before = copy(merged.params["layers"])
    after, _ = train_on(whole, merged, batch)
    state, _ = train_on(steps, state, batch)
    assert_trees_equal(state.frozen, {STUDENT: base})
    assert_trees_equal(state.teachers["frozen"], reference)
    for name, inputs in LINEAR.items():
        a, b = (policy["layers"][f"{name}_{x}"][0] for x in "ab")
        change = (after.params["layers"][name] - before[name])[0]
        moved = {x: state.params["layers"][f"{name}_{x}"][0] - y for x, y in (("a", a), ("b", b))}
        change = change.reshape(*a.shape[:inputs], -1)  # [*inputs, outputs]
        want_a = 3 * change @ b.reshape(2, -1).T
        want_b = 3 * a.reshape(-1, 2).T @ change.reshape(-1, change.shape[-1])
        np.testing.assert_allclose(moved["a"], want_a, rtol=2e-3, atol=1e-6)
        np.testing.assert_allclose(moved["b"].reshape(2, -1), want_b, rtol=2e-3, atol=1e-6)
        assert jnp.abs(want_a).max() > 1e-5 and jnp.abs(want_b).max() > 1e-5


def draw_adapter(seed: int, config: ModelConfig):
    rng = np.random.default_rng(seed)
    shapes = model.adapter_shapes(config)["layers"]
    return {"layers": {n: jnp.float32(0.3 * rng.standard_normal(s)) for n, s in shapes.items()}}


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
    state, metrics = train_on(compiled("toy"), start("toy"), credited("toy"))
    assert metrics["skipped"] == 0
    old, before, after = start("toy").teachers["ema_0.25"], start("toy").params, state.params
    assert jnp.abs(after["embed"] - before["embed"]).max() > 1e-3
    want = jax.tree.map(lambda s, p: s + 0.25 * (p - s), old, after)
    assert_trees_close(state.teachers["ema_0.25"], want)


@pytest.mark.parametrize(("name", "reads"), [("rlsd", False), ("hsd", True)])
def test_a_stream_of_another_size_compiles_only_what_reads_it(name, reads):
    steps, state, batch = compile_steps(method_of(name)), start(name), credited_once(name)
    sizes = packing.sizes(dict.fromkeys((STUDENT, *batch.hints), Prompts(8, False)), G, T, 128)
    wide = sizes._replace(streams={**sizes.streams, "teacher": Size(256, 256)})
    parts = [packing.pack(jax.device_get(batch), size, 1, range(B)) for size in (sizes, wide)]
    state, want = update.update(steps, state, batch, [parts[0]], 1)
    assert steps.add._cache_size() == 1
    again, got = update.update(steps, start(name), batch, [parts[1]], 1)
    assert steps.add._cache_size() == 1 + reads
    assert_trees_close((again.params, got), (state.params, want))
