"""Every number against a slow loop over the tokens of small random batches."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_sd import contexts, diagnostics, losses, teachers
from jaxrl_sd.methods import METHODS
from jaxrl_sd.methods.base import Teacher, advantage
from jaxrl_sd.types import Batch, Credit, Hints, Rollouts
from jaxrl_sd.update import init_state
from jaxrl_sd.vocabulary import STUDENT

P, G, T = 6, 4, 7
B = P * G
STOP = 5
STOP_IDS = (STOP, 6)
SEEDS = range(4)


def draw(seed) -> tuple[Batch, dict]:
    """A credited batch and gaps: few different tokens, so that answers share prefixes.

    Group 0 has no correct answer, group 1 only correct ones, group 2 one row that nobody graded,
    group 3 a silent row of each verdict; a row of group 4 does not train. Gaps are NaN in masked
    places, and some are 0.
    """
    rng = np.random.default_rng(seed)
    correct = rng.integers(0, 2, B).astype(np.float32)
    correct[:G], correct[G : 2 * G] = 0, 1
    correct[3 * G : 4 * G] = 0, 0, 1, 1
    graded, trains, shown = np.ones((3, B), np.float32)
    graded[2 * G + 1] = correct[2 * G + 1] = trains[2 * G + 1] = 0
    shown[3 * G], shown[3 * G + 2], trains[4 * G + 3] = 0, 0, 0
    length = rng.integers(2, T + 1, B)
    response = rng.integers(1, 3, (B, T))
    stopped = (length < T) | (rng.random(B) < 0.5)
    response[stopped, length[stopped] - 1] = rng.choice(STOP_IDS, stopped.sum())
    response[np.arange(T) >= length[:, None]] = STOP  # which pads, too
    mask_t = (np.arange(T) < length[:, None]) * trains[:, None]
    logp_t = rng.normal(size=(B, T))

    def masked(x_t):
        return jnp.asarray(np.where(mask_t != 0, x_t, np.nan), jnp.float32)

    rollouts = Rollouts(
        prompt=jnp.zeros((B, 1), jnp.int32),
        prompt_length=jnp.ones(B, jnp.int32),
        response=jnp.asarray(response, jnp.int32),
        mask_t=jnp.asarray(mask_t, jnp.float32),
        sampler_logp_t=masked(logp_t + rng.normal(size=(B, T)) * 0.01),
        behaviour_logp_t=masked(logp_t),
        reward=jnp.asarray(correct + 0.25 * rng.integers(0, 2, B), jnp.float32),
        correct=jnp.asarray(correct),
        graded=jnp.asarray(graded),
        group_size=G,
    )
    gaps = {}
    for name in ("teacher", "reference"):
        gap_t = rng.normal(size=(B, T))
        gaps[name] = masked(np.where(rng.random((B, T)) < 0.2, 0, gap_t))
    hints = {
        name: Hints(rollouts.prompt, jnp.asarray(x, jnp.int32), jnp.full(B, -1))
        for name, x in (("teacher", shown), ("reference", np.ones(B)))
    }
    adv_t, distill_t = rng.normal(size=(2, B, T)) * (rng.random((2, B, T)) < 0.5) * mask_t
    return Batch(
        rollouts,
        hints,
        scores={"old_logp": masked(logp_t), "entropy": masked(logp_t**2)},
        credit=Credit(jnp.asarray(adv_t, jnp.float32), jnp.asarray(distill_t, jnp.float32)),
        # As of a method that does not train the first token.
        weight_t=losses.sequence_mean(rollouts.mask_t.at[:, 0].set(0)),
    ), gaps


def mean(values):
    return np.mean(values) if len(values) else math.nan


def tokens(batch):
    """(row, place) of what trains and was graded."""
    r = batch.rollouts
    return [(i, t) for i, t in np.argwhere(r.mask_t != 0).tolist() if r.graded[i]]


def uniform_groups(r):
    found = set()
    for p in range(P):
        verdicts = {bool(r.correct[i]) for i in range(p * G, p * G + G) if r.graded[i]}
        found |= {p} if len(verdicts) < 2 else set()
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_credit_shares(seed):
    batch, _ = draw(seed)
    r, A = batch.rollouts, np.asarray(advantage(batch))
    adv_t, distill_t = np.asarray(batch.credit.adv_t), np.asarray(batch.credit.distill_t)
    weight_t = np.asarray(batch.weight_t)
    flipped, zero, all_credit, of_uniform = [], [], 0, 0
    for i, t in tokens(batch):
        if weight_t[i, t] == 0:
            continue
        flipped.append((adv_t[i, t] > 0 > A[i]) or (adv_t[i, t] < 0 < A[i]))
        zero.append(adv_t[i, t] == 0 and distill_t[i, t] == 0)
        credit = (abs(adv_t[i, t]) + abs(distill_t[i, t])) * weight_t[i, t]
        all_credit += credit
        of_uniform += credit * (i // G in uniform_groups(r))
    got = diagnostics.describe(batch)
    want = {"flipped": mean(flipped), "zero": mean(zero), "uniform": of_uniform / all_credit}
    assert 0 < min(want.values())
    assert all(np.isfinite(x) for x in got.values())  # whatever stands where nothing trains
    for name, value in want.items():
        np.testing.assert_allclose(got[f"credit/{name}"], value, rtol=1e-5)


def test_grpo_gives_nothing_to_uniform_groups_and_flips_nothing():
    batch, _ = draw(0)
    batch = batch.replace(rollouts=batch.rollouts.replace(reward=batch.rollouts.correct))
    credit, _ = METHODS["grpo"]().credit(batch, 0)
    got = diagnostics.describe(batch.replace(credit=credit))
    assert got["credit/uniform"] == got["credit/flipped"] == 0 < got["credit/zero"]


def test_no_credit_has_no_share():
    batch, _ = draw(0)
    nothing = jax.tree.map(jnp.zeros_like, batch.credit)
    assert math.isnan(diagnostics.describe(batch.replace(credit=nothing))["credit/uniform"])


def slow_divergence(r):
    """{wrong row: the first place where it leaves the correct answer that it follows longest}."""
    ids = [r.response[i][r.mask_t[i] != 0].tolist() for i in range(B)]
    graded = [i for i in range(B) if r.graded[i]]
    places = {}
    for i in graded:
        for j in graded:
            if i // G == j // G and r.correct[j] and not r.correct[i]:
                differ = [t for t, (a, b) in enumerate(zip(ids[i], ids[j], strict=False)) if a != b]
                if differ:
                    places[i] = max(places.get(i, -1), differ[0])
    return places


@pytest.mark.parametrize("seed", SEEDS)
def test_divergence(seed):
    r = jax.device_get(draw(seed)[0].rollouts)
    want = slow_divergence(r)
    assert {i // G for i in want}.isdisjoint({0, 1}) and len(set(want.values())) > 1
    got = diagnostics.divergence(r)
    np.testing.assert_array_equal(got, [want.get(i, -1) for i in range(B)])


def test_an_answer_does_not_diverge_from_its_continuation():
    batch, _ = draw(0)
    r = batch.rollouts
    response, length = jnp.ones_like(r.response), np.full(B, T)
    length[::2] = 3
    r = r.replace(
        response=response, mask_t=jnp.asarray(np.arange(T) < length[:, None], jnp.float32)
    )
    assert (diagnostics.divergence(r) == -1).all()


def slow_gaps(batch, gap_t, shown):
    batch, gap_t = jax.device_get((batch, gap_t))
    r = batch.rollouts
    kept = [(i, t) for i, t in tokens(batch) if shown[i]]
    error = [abs(batch.scores["old_logp"][i, t] - r.sampler_logp_t[i, t]) for i, t in tokens(batch)]
    want = {
        "gap_abs": mean([abs(gap_t[i, t]) for i, t in kept]),
        "gap_zero": mean([gap_t[i, t] == 0 for i, t in kept]),
        "information": mean(row_sums(gap_t, kept)),
    }
    want["gap_over_noise"] = want["gap_abs"] / mean(error)
    for verdict in ("correct", "wrong"):
        of = [(i, t) for i, t in kept if bool(r.correct[i]) == (verdict == "correct")]
        want[f"gap_{verdict}_up"] = mean([max(gap_t[i, t], 0) for i, t in of])
        want[f"gap_{verdict}_down"] = mean([min(gap_t[i, t], 0) for i, t in of])
        want[f"information_{verdict}"] = mean(row_sums(gap_t, of))
        want[f"gap_stop_{verdict}"] = mean(
            [gap_t[i, t] for i, t in of if r.response[i, t] in STOP_IDS]
        )
    at = slow_divergence(r)
    sizes = [(t - at[i], abs(gap_t[i, t])) for i, t in kept if i in at]
    want["gap_before"] = mean([size for offset, size in sizes if offset < 0])
    want["gap_at_divergence"] = mean([size for offset, size in sizes if offset == 0])
    want["gap_after"] = mean([size for offset, size in sizes if offset > 0])
    for k in range(-2, 5):
        want[f"divergence_profile/{k}"] = mean([size for offset, size in sizes if offset == k])
    return want


def row_sums(x_t, places):
    rows = {}
    for i, t in places:
        rows[i] = rows.get(i, 0) + x_t[i, t]
    return list(rows.values())


@pytest.mark.parametrize("seed", SEEDS)
def test_gaps(seed):
    batch, gaps = draw(seed)
    got = diagnostics.describe_gaps(batch, gaps, STOP_IDS)
    names = set()
    for name, gap_t in gaps.items():
        for key, value in slow_gaps(batch, gap_t, batch.hints[name].shown).items():
            names.add(f"teacher/{name}/{key}")
            np.testing.assert_allclose(
                got[f"teacher/{name}/{key}"], value, rtol=1e-5, atol=1e-6, err_msg=key
            )
    assert names == got.keys()


def test_gaps_of_nothing_are_nan():
    """A silent teacher, and a batch without a correct answer."""
    batch, gaps = draw(0)
    silent = batch.hints["teacher"].replace(prompt_length=jnp.zeros(B, jnp.int32))
    r = batch.rollouts.replace(correct=jnp.zeros(B))
    batch = batch.replace(rollouts=r, hints={**batch.hints, "teacher": silent})
    got = diagnostics.describe_gaps(batch, gaps, STOP_IDS)
    for name, value in got.items():
        kind = ("teacher/teacher", "correct", "divergence", "before", "after")
        assert math.isnan(value) == any(part in name for part in kind), name


def test_up_and_down_add_up_to_the_mean_gap():
    batch, gaps = draw(1)
    got = diagnostics.describe_gaps(batch, gaps, STOP_IDS)
    r, gap_t = batch.rollouts, np.asarray(gaps["reference"])
    of_correct = (np.asarray(r.mask_t) * np.asarray(r.correct)[:, None]) != 0
    up, down = (got[f"teacher/reference/gap_correct_{x}"] for x in ("up", "down"))
    np.testing.assert_allclose(up + down, gap_t[of_correct].mean(), rtol=1e-5)


def weights(seed, dtype):
    a, b = jax.random.normal(jax.random.key(seed), (2, 4, 8))
    return {"layers": {"q": a.astype(dtype)}, "head": b.astype(dtype)}


def distances(before, now, frozen):
    """Of one teacher of each kind, since the policy's weights were `before`."""
    sources = [teachers.current(), teachers.frozen(), teachers.synced(3), teachers.ema(0.25)]
    sources += [teachers.external(path) for path in frozen if path != STUDENT]
    of_method = {source.name: Teacher(contexts.nothing(), source) for source in sources}
    state = init_state(before, {}, optax.identity(), of_method, 0)
    state = state.replace(params=now, frozen=frozen)
    return {
        name.split("/")[1]: float(x) for name, x in diagnostics.distances(of_method, state).items()
    }


def slow_distance(a, b):
    a, b = (np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(y)]) for y in (a, b))
    return math.sqrt(((a - b) ** 2).sum() / (b**2).sum())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_distances(dtype):
    before, now, alike = (weights(seed, dtype) for seed in range(3))
    other = {"layers": {"q": now["layers"]["q"][:2]}, "head": now["head"]}
    got = distances(before, now, {STUDENT: {}, "alike": alike, "other": other})
    moved, apart = slow_distance(before, now), slow_distance(alike, now)
    want = {"frozen": moved, "synced_3": moved, "ema_0.25": moved, "external_alike": apart}
    assert got == {"current": 0.0} | {name: pytest.approx(x, rel=1e-5) for name, x in want.items()}


def test_distances_of_adapters():
    base = {"layers": {"q": jnp.ones((4, 4))}}
    before, now = ({"layers": {"q_a": jnp.full((4, 2), x)}} for x in (1.0, 2.0))
    got = distances(before, now, {STUDENT: base, "alike": base})
    assert got.keys() == {"current", "frozen", "synced_3", "ema_0.25"}  # "alike" has no adapter
    assert got["current"] == 0
    # 8 entries moved by 1; the norm is of 16 ones and 8 twos.
    assert got["frozen"] == pytest.approx(math.sqrt(8 / (16 + 8 * 4)))
