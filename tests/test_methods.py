"""Every method against its paper: one table, and what must hold for all of them.

A method is fed logits: the same statistics, credit, loss and averaging as in training, without a
model (conformance.py). `oracles.py` says what must come out.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from oracles import ORACLES, Case

from jaxrl_sd import conformance, losses
from jaxrl_sd.conformance import MIXED, STEP, G, Shown, T, V
from jaxrl_sd.contexts import Hint
from jaxrl_sd.methods import METHODS, PRESETS, base
from jaxrl_sd.methods.cast import base_advantage, cast, token_advantage
from jaxrl_sd.methods.grpo import grpo
from jaxrl_sd.methods.hsd import hsd
from jaxrl_sd.methods.opsd import opsd
from jaxrl_sd.methods.rlsd import evidence_weight, rlsd
from jaxrl_sd.methods.sc_grpo import (
    diversity_advantage,
    reference_trajectory,
    saturating_weight,
    sc_grpo,
)
from jaxrl_sd.methods.sdpg import beta_schedule, sdpg
from jaxrl_sd.types import Batch, Problem, Sample
from jaxrl_sd.update import weigh

VERDICT = {"1": True, "0": False, "?": None}  # one letter a row
UNGATED = ("sdpg", {"beta": 3.0, "alpha": 0.0, "warmup": 30, "gate": False})
VARIANTS = [
    ("grpo", {}),
    ("grpo", {"kl_coef": 0.0, "clip_low": 0.1, "clip_high": 0.28}),
    ("rlsd", {}),
    ("rlsd", {"lam_0": 1.0, "eps_w": 0.5, "decay_steps": 60, "clip_high": 0.1}),
    ("sdpg", {}),
    ("sdpg", {"beta": 3.0, "alpha": 0.0, "warmup": 1, "decay": 100, "total_steps": 120}),
    UNGATED,
    *[("sdpg", {"alpha": 1.0, "anchor": anchor}) for anchor in ("urkl", "fkl", "rkl")],
    ("cast", {}),
    ("cast", {"lam": 0.5, "clip_positive": (0.7, 1.3), "clip_negative": (1.1, 1.4)}),
    ("cast", {"flip": False, "max_adv": 0.7, "clip_low": 0.1}),
    ("cast", {"cutoff": STEP}),
    ("sc_grpo", {}),
    ("sc_grpo", {"alpha": 1.0, "quantile": 0.5, "c_min": 0.01, "clip_high": 0.1}),
    ("hsd", {}),
    ("hsd", {"beta": 0.0}),
    ("opsd", {}),
    ("dr_grpo", {}),
    ("dr_grpo", {"max_tokens": 20, "clip_low": 0.1, "clip_high": 0.28}),
    ("dapo", {}),
    ("dapo", {"overlong_buffer": 2, "clip_high": 0.1}),
    ("gspo", {}),
    ("gspo", {"clip_low": 0.2, "clip_high": 0.27}),
    ("cispo", {}),
    ("cispo", {"max_ratio": 1.1}),
    ("rloo", {}),
    ("rloo", {"kl_coef": 0.5}),
    ("reinforce_pp", {}),
    ("reinforce_pp", {"kl_coef": 0.5, "clip_low": 0.1, "clip_high": 0.28}),
    ("reinforce_pp", {"group_baseline": True, "kl_coef": 0.1}),
    ("opd", {}),
    ("opd_top_k", {}),
    ("opd_top_k", {"top_k": 2}),
    ("opd_sampled", {}),
    ("opd_sampled", {"scale": 1.25, "clip_low": 0.2, "clip_high": 0.28}),
    ("sdpo", {}),
    *[("sdpo", {"alpha": alpha, "top_k": 2, "is_clip": 1.1}) for alpha in (0.0, 0.3, 1.0)],
    ("sdft", {}),
    ("sdft", {"skip": 0, "alpha": 1.0}),
    ("sdft", {"skip": 3}),
    ("rlrt", {}),
    ("rlrt", {"lam": 1.0, "eps_w": 0.2, "clip_high": 0.1}),
    ("grpo_opsd", {}),
    ("grpo_opsd", {"coef": 2.0, "decay_steps": 20, "tau": 0.01, "clip_high": 0.28}),
    ("grpo_opsd_hsd", {}),
    ("grpo_opsd_hsd", {"coef": 2.0, "beta": 0.5, "clip_low": 0.1}),
    *[(preset.func.__name__, preset.keywords) for preset in PRESETS.values()],
]
IDS = [f"{name}-{'-'.join(f'{k}={v}' for k, v in hyper.items())}" for name, hyper in VARIANTS]
every_method = pytest.mark.parametrize("name", METHODS)
# What a method cannot do without, and what T tokens ask of one.
CHECKPOINT = {"teacher": "a/checkpoint"}
REQUIRED = dict.fromkeys(("opd", "opd_top_k", "opd_sampled"), CHECKPOINT)
SHORT = {"sdft": {"skip": 1}}
# Its advantages are gaps, of log-probabilities that float32 knows to 4e-7 nats; of 30 tokens.
ROUNDING = {"opd_sampled": 4e-7 / 30}
HINTS = {
    "sc_grpo": oracles.sc_grpo_hints,
    "sdpo": oracles.verified_siblings,
    "rlrt": oracles.verified_siblings,
}


def make(name: str, **hyper) -> base.Method:
    return METHODS[name](**REQUIRED.get(name, {}), **SHORT.get(name, {}) | hyper)


def oracle_of(name: str, **hyper) -> Callable[[Case], oracles.Result]:
    """Without the settings of the teacher's weights, whose logits a case has."""
    known = inspect.signature(ORACLES[name]).parameters
    settings = SHORT.get(name, {}) | hyper
    return partial(ORACLES[name], **{k: v for k, v in settings.items() if k in known})


def draw_case(
    name="rlsd", verdicts=MIXED, eps=1.0, drift=0.3, seed=0, lengths=None, truncated=False
) -> Case:
    """A random batch whose teacher differs from the policy by eps, and the policy from its old
    self by `drift`, in nats."""
    rng = np.random.default_rng(seed)
    verdicts = verdicts.replace(" ", "")
    B = len(verdicts)
    student, noise, moved = rng.standard_normal((3, B, T, V))
    correct, graded = (np.array([c in chars for c in verdicts]) for chars in ("1", "01"))
    lengths = np.resize([3, 2, 1, 3, 2], B) if lengths is None else np.asarray(lengths)
    shown, source = np.ones(B, bool), np.full(B, -1)
    if name in HINTS:
        shown, source = HINTS[name]([VERDICT[c] for c in verdicts], G)
    return Case(
        student=student,
        old=student + drift * moved,
        teacher=student + drift * moved + eps * noise,
        reference=student + rng.standard_normal((B, T, V)),
        token=rng.integers(V, size=(B, T)),
        mask=(np.arange(T) < lengths[:, None]) & graded[:, None],
        correct=correct,
        graded=graded,
        shown=shown,
        source=source,
        group_size=G,
        step=STEP,
        truncated=np.broadcast_to(truncated, B),
        length=lengths,
        max_length=T,
    )


def given(case: Case) -> conformance.Case:
    """The oracles' case as the methods are given it; its reference is what every row is shown."""
    everything = np.ones(len(case.mask), bool), np.full(len(case.mask), -1)
    return conformance.Case(
        student=case.student,
        old=case.old,
        teachers={"teacher": case.teacher, "reference": case.reference},
        token=case.token,
        mask=case.mask,
        correct=case.correct,
        graded=case.graded,
        truncated=case.truncated,
        length=case.length,
        shown={"teacher": Shown(case.shown, case.source), "reference": Shown(*everything)},
        group_size=case.group_size,
        max_length=case.max_length,
        step=case.step,
    )


def batch_of(case: Case, method: base.Method) -> Batch:
    return conformance.batch_of(given(case), method)


@cache
def compiled(name: str, hyper: tuple = ()) -> conformance.Compiled:
    return conformance.compiled(make(name, **dict(hyper)))


def evaluate(name: str, case: Case, **hyper):
    """The loss, its gradient, the credit and its metrics."""
    outcome = conformance.evaluate(compiled(name, tuple(hyper.items())), given(case))
    return outcome.loss_t.sum(), *outcome[1:]


# What the papers' algorithms give.


@pytest.mark.parametrize("name, hyper", VARIANTS, ids=IDS)
@pytest.mark.parametrize("eps, drift", [(1.0, 0.3), (0.05, 0.0), (1e-3, 0.0)])
def test_loss_gradient_and_credit_equal_the_papers(name, hyper, eps, drift):
    case = draw_case(name, eps=eps, drift=drift, truncated=np.arange(16) % 5 == 0)
    oracle = oracle_of(name, **hyper)
    want, want_gradient = oracle(case), oracles.gradient(oracle, case)
    loss, gradient, credit, _ = evaluate(name, case, **hyper)
    size = np.abs(want_gradient).max(axis=-1)  # of each token's gradient
    error = np.abs(gradient - want_gradient).max(axis=-1)
    np.testing.assert_array_less(error, 1e-3 * size + ROUNDING.get(name, 1e-12))
    np.testing.assert_allclose(loss, want.loss_t.sum(), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(credit.adv_t, want.adv, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(credit.distill_t, want.distill, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ORACLES)
def test_defaults_are_the_published_ones(name):
    published = dict(list(inspect.signature(ORACLES[name]).parameters.items())[1:])
    ours = inspect.signature(METHODS[name]).parameters
    assert {k: ours[k].default for k in published} == {k: p.default for k, p in published.items()}


@pytest.mark.parametrize(
    "name, source",
    [
        *[("rlsd", "synced_10"), ("cast", "synced_10"), ("rlrt", "synced_10")],
        *[("hsd", "current"), ("sdpg", "current"), ("sc_grpo", "current")],
        *[("opsd", "frozen"), ("sdpo", "ema_0.05"), ("sdft", "ema_0.01")],
    ],
)
def test_weights_of_the_teacher_are_the_published_ones(name, source):
    assert make(name).teachers["teacher"].source.name == source


# What must hold for every method.


@every_method
@pytest.mark.parametrize("rule", conformance.RULES, ids=lambda rule: rule.__name__)
def test_conforms(name, rule):
    # Without a budget of tokens, it divides by the length of the padded responses.
    rule(compiled(name, (("max_tokens", T),) if name == "dr_grpo" else ()))


DISTILS = {
    "hsd": {"beta": 0.0},
    "opsd": {},
    "sdpg": UNGATED[1],
    "opd": {},
    "opd_top_k": {},
    "opd_sampled": {},
    "sdpo": {},
    "sdft": {},
    "grpo_opsd": {},
    "grpo_opsd_hsd": {"beta": 0.0},
}


def fails(name: str) -> Case:
    """No row is correct, so that no advantage remains, and every teacher is shown something."""
    return draw_case(name, "0000 0000 0000 0000")._replace(shown=np.ones(16, bool))


@pytest.mark.parametrize("name", DISTILS)
def test_a_teacher_that_agrees_distils_nothing(name):
    case = fails(name)
    loss, gradient, *_ = evaluate(name, case, **DISTILS[name])
    assert loss != 0
    assert gradient.any()
    agreed = case._replace(teacher=case.student, old=case.student)
    loss, gradient, *_ = evaluate(name, agreed, **DISTILS[name])
    np.testing.assert_allclose(loss, 0, atol=1e-7)
    np.testing.assert_allclose(gradient, 0, atol=1e-8)


@pytest.mark.parametrize("name", sorted(DISTILS.keys() - REQUIRED.keys()))
def test_a_silent_teacher_distils_nothing(name):
    silent = fails(name)._replace(shown=np.zeros(16, bool))
    loss, gradient, *_ = evaluate(name, silent, **DISTILS[name])
    assert loss == 0
    assert not gradient.any()


def same(got, want):
    """Loss, gradient and credit, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, got[:3], want[:3])


def test_what_becomes_grpo_without_its_teacher(monkeypatch):
    """Bit for bit, in loss, gradient and credit."""
    case = draw_case()
    want = evaluate("grpo", case, kl_coef=0.0)
    same(evaluate("grpo_opsd", case, coef=0.0, clip_high=0.2), want)
    same(evaluate("grpo_opsd", case, decay_steps=STEP + 1, clip_high=0.2), want)
    same(evaluate("grpo_opsd_hsd", case, coef=0.0, beta=0.0), want)
    silent = case._replace(shown=np.zeros(16, bool))
    same(evaluate("grpo_opsd", silent, clip_high=0.2), want)
    same(evaluate("sc_grpo", silent), want)
    monkeypatch.setitem(METHODS, "grpo_token_mean", grpo_token_mean)
    want = evaluate("grpo_token_mean", case)
    same(evaluate("rlsd", case, lam_0=0.0), want)
    same(evaluate("rlsd", case, decay_steps=STEP + 1), want)
    same(evaluate("rlrt", case, lam=0.0), want)
    same(evaluate("rlrt", silent), want)


def grpo_token_mean() -> base.Method:
    return grpo(clip_high=0.28, kl_coef=0.0)._replace(weight=losses.token_mean)


@pytest.mark.parametrize(
    "name, hyper, expected",
    [
        ("hsd", {}, 0.368064),
        ("opsd", {"tau": math.inf}, 0.368064),
        ("sc_grpo", {}, 0.368064),
        ("sdpg", {}, 0.510826),
        ("opd", {}, 0.510826),
        ("opd_top_k", {}, 0.368064),
        ("sdpo", {"alpha": 0.0}, 0.368064),
        ("sdpo", {"alpha": 1.0}, 0.510826),
        ("sdft", {}, 0.368064),
        ("sdft", {"alpha": 1.0}, 0.510826),
        ("grpo_opsd", {"tau": math.inf}, 0.368064),
        ("grpo_opsd_hsd", {}, 0.368064),
    ],
)
def test_direction_of_the_divergence(name, hyper, expected):
    """Teacher (0.9, 0.1), student (0.5, 0.5): kl(p||q) = 0.368064, kl(q||p) = 0.510826."""
    got = divergence_of(make(name, **hyper), np.log([0.5, 0.5]), np.log([0.9, 0.1]))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def divergence_of(method: base.Method, student, teacher):
    _, divergence = {**method.score, **method.probe}["divergence"]
    logits = (jnp.asarray(x, jnp.float32) for x in (student, teacher))
    return divergence(*logits, jnp.int32(0))


def test_advantages_of_a_group_of_eight():
    """rlsd.md T7."""
    case = draw_case(verdicts="10010000")._replace(group_size=8)
    got = base.advantage(batch_of(case, grpo()))
    want = np.where(case.correct, 1.62018167, -0.54006056)
    np.testing.assert_allclose(got, want, rtol=1e-6)


# RLSD.


def credit_of_gaps(method, verdicts: str, gap_t, step: int):
    """The token advantages of a group whose teacher's gaps are given, f32[B, 3]."""
    case = draw_case(verdicts=verdicts, lengths=[3] * len(verdicts))
    case = case._replace(group_size=len(verdicts))
    batch = batch_of(case, method).replace(scores={"gap": jnp.asarray(gap_t, jnp.float32)})
    credit, _ = method.credit(batch, step)
    return base.advantage(batch)[:, None], credit.adv_t


def test_rlsd_weights():
    """The paper's toy of three tokens, and the clip on both sides that its Eq. 16 lacks."""
    delta = jnp.log(jnp.array([[0.7, 0.2, 0.1]])) - jnp.log(jnp.array([[0.4, 0.35, 0.25]]))
    for A, raw, clipped in [
        (1.0, [1.75, 0.571429, 0.4], [1.2, 0.8, 0.8]),
        (-1.0, [0.571429, 1.75, 2.5], [0.8, 1.2, 1.2]),
    ]:
        A = jnp.array([[A]])
        np.testing.assert_allclose(evidence_weight(A, delta, math.inf), [raw], rtol=1e-5)
        np.testing.assert_allclose(evidence_weight(A, delta, 0.2), [clipped], rtol=1e-6)
        w = evidence_weight(A, A * jnp.log(jnp.array([[0.5, 0.9, 1.1, 3.0]])), 0.2)
        np.testing.assert_allclose(w, [[0.8, 0.9, 1.1, 1.2]], rtol=1e-6)


@pytest.mark.parametrize(
    "A, Delta, raw, half, whole",
    [
        (1, 0.5, 1.648721, 1.1, 1.2),
        (1, -0.5, 0.606531, 0.9, 0.8),
        (1, 0.1, 1.105171, 1.052585, 1.105171),
        (-2, 0.5, 0.606531, -1.8, -1.6),
        (-2, -0.5, 1.648721, -2.2, -2.4),
    ],
)
def test_rlsd_golden_advantages(A, Delta, raw, half, whole):
    """At lam 1/2 and 1."""
    A, Delta = jnp.full((1, 1), A, jnp.float32), jnp.full((1, 1), Delta, jnp.float32)
    np.testing.assert_allclose(evidence_weight(A, Delta, math.inf), raw, rtol=1e-6)
    w = evidence_weight(A, Delta, 0.2)
    np.testing.assert_allclose(A * w, whole, rtol=1e-6)
    np.testing.assert_allclose(A * (0.5 + 0.5 * w), half, rtol=1e-6)


@pytest.mark.parametrize(
    "decay_steps, values",
    [
        (50, {0: 0.5, 1: 0.49, 10: 0.4, 25: 0.25, 49: 0.01, 50: 0, 51: 0, 1000: 0}),
        (60, {1: 0.491667, 10: 0.416667, 50: 0.083333, 60: 0, 70: 0}),
    ],
)
def test_rlsd_lambda(decay_steps, values):
    for k, value in values.items():
        np.testing.assert_allclose(
            base.linear_decay(jnp.int32(k - 1), 0.5, decay_steps), value, atol=1e-6
        )


def test_rlsd_credit_by_hand():
    """At lam 0.5 and 1. The first row has A > 0, the others A < 0."""
    gap = [[0.5, -0.5, 0.1], [0.5, -0.5, 0.0], [1.0, -0.1, 0.0], [-1.0, 0.1, 0.0]]
    for hyper, step, multiplier in [
        ({}, -1, [[1.1, 0.9, 1.052585], [0.9, 1.1, 1], [0.9, 1.052585, 1], [1.1, 0.952419, 1]]),
        (
            {"lam_0": 1.0},
            -1,
            [[1.2, 0.8, 1.105171], [0.8, 1.2, 1], [0.8, 1.105171, 1], [1.2, 0.904837, 1]],
        ),
        ({}, 49, np.ones((4, 3))),
    ]:
        A, adv_t = credit_of_gaps(rlsd(**hyper), "1000", gap, step)
        np.testing.assert_allclose(adv_t, A * np.array(multiplier), rtol=1e-5)


def test_rlsd_keeps_the_sign_within_bounds():
    gap = np.random.default_rng(0).standard_cauchy((8, 3))
    gap[0, 0] = 1000.0
    A, adv_t = credit_of_gaps(rlsd(), "11010001", gap, -1)
    multiplier = adv_t / A
    assert multiplier.min() >= 0.9 - 1e-6
    assert multiplier.max() <= 1.1 + 1e-6
    assert (jnp.sign(multiplier - 1) == jnp.sign(A) * jnp.sign(gap)).all()
    _, adv_t = credit_of_gaps(rlsd(), "00000000", gap, -1)
    assert not adv_t.any()


# SDPG.


def test_sdpg_beta():
    values = {
        0: 0, 1: 2e-5, 25: 5e-4, 50: 1e-3, 100: 8.571e-4, 225: 5e-4, 399: 2.857e-6, 400: 0, 500: 0
    }  # fmt: skip
    for k, value in values.items():
        got = beta_schedule(jnp.int32(k - 1), 1e-3, 50, 350, 400)
        np.testing.assert_allclose(got, value, rtol=1e-3, atol=1e-12)


def test_sdpg_gate():
    """Only rows that beat their group are distilled; all tokens stay in the denominator."""
    method = sdpg()
    case = draw_case("sdpg")
    _, _, credit, _ = evaluate("sdpg", case)
    beats = case.correct & (np.repeat([3, 4, 4, 4], G) > np.repeat([2, 0, 1, 4], G))
    np.testing.assert_array_equal(credit.distill_t != 0, beats[:, None] & case.mask)
    np.testing.assert_array_equal(credit.distill_t.max(), beta_schedule(STEP, 1e-3, 50, 350, 400))
    weight_t = weigh(method, batch_of(case, method), 1).weight_t
    np.testing.assert_allclose(weight_t, case.mask / case.mask.sum(), rtol=1e-6)


def test_sdpg_without_its_parts():
    """beta 0 leaves the policy gradient and the anchor, alpha 0 takes the anchor away."""
    logp, ref, divergence = (jnp.full((1, 1), x) for x in (-1.0, -1.5, 0.3))
    credit = base.Credit(jnp.full((1, 1), 2.0), jnp.full((1, 1), 0.25))
    rollouts = SimpleNamespace(mask_t=jnp.ones((1, 1)))
    scores = {"old_logp": logp, "reference_logp": ref}
    batch = Batch(rollouts, {}, scores=scores, credit=credit)
    probed = {"logp": logp, "divergence": divergence}
    loss_t, _ = sdpg(alpha=0.0).loss(probed, batch, 0)
    np.testing.assert_allclose(loss_t, 2.0 + 0.25 * 0.3, rtol=1e-6)
    loss_t, _ = sdpg(alpha=1.0, anchor="urkl").loss(probed, batch, 0)
    np.testing.assert_allclose(loss_t, 2.0 + 0.25 * 0.3 + 0.125, rtol=1e-6)


def test_grpo_unknown_average():
    with pytest.raises(ValueError, match=r"average: expected one of .*'token'.*, got 'row'"):
        grpo(average="row")


def test_sdpg_unknown_anchor():
    with pytest.raises(ValueError, match=r"anchor: expected one of .*'kl'"):
        sdpg(anchor="kl")


# CAST.

GAPS = [-1, -0.1, -0.03, 0, 0.03, 0.1, 1]
CAST_TABLE = {
    1: [-1.2, -1.105171, -1.030455, 1, 1.030455, 1.05, 1.05],
    -1: [-1.2, -1.105171, -1.030455, -1, 1.030455, 1.05, 1.05],
    0.377964: [-0.453557, -0.417715, -0.389475, 0.377964, 0.389475, 0.396862, 0.396862],
    -0.377964: [-0.453557, -0.417715, -0.389475, -0.377964, 0.389475, 0.396862, 0.396862],
    2.645751: [-1.2, -1.2, -1.2, 1.2, 1.2, 1.2, 1.2],
    0: [0] * 7,
}


def column(values):
    return jnp.array(values, jnp.float32)[:, None]


def test_cast_token_advantages():
    got = token_advantage(column(list(CAST_TABLE)), jnp.array([GAPS] * len(CAST_TABLE)))
    np.testing.assert_allclose(got, list(CAST_TABLE.values()), atol=1.5e-6)


def test_cast_without_sign_reversal():
    got = token_advantage(column([1, -1]), jnp.array([[-1, -0.1, 0.1]] * 2), flip=False)
    np.testing.assert_allclose(got, [[0.8, 0.904837, 1.05], [-1.2, -1.105171, -0.95]], atol=1e-6)


def test_cast_sign_is_the_gaps():
    """For g != 0, A(B, g) = A(-B, g): the verifier's sign does not matter."""
    rng = np.random.default_rng(0)
    B = jnp.asarray(rng.uniform(0.01, 3, size=(1000, 1)), jnp.float32)
    g = jnp.asarray(rng.standard_normal((1000, 20)) * rng.choice([0.01, 0.1, 1], (1000, 1)))
    shaping = jnp.asarray(rng.uniform(size=(1000, 1)), jnp.float32)
    got = token_advantage(B, g, shaping)
    np.testing.assert_array_equal(got, token_advantage(-B, g, shaping))
    w = np.minimum(np.exp(np.abs(g)), np.where(g > 0, 1.05, 1.2))
    want = np.clip(np.sign(g) * B * (1 + shaping * (w - 1)), -1.2, 1.2)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert jnp.abs(got).max() <= 1.2


def test_cast_without_a_gap_is_the_clipped_base():
    case = draw_case("cast")
    _, _, credit, metrics = evaluate("cast", case._replace(teacher=case.old))
    B = base_advantage(batch_of(case, cast()))
    np.testing.assert_array_equal(credit.adv_t, jnp.clip(B, -1.2, 1.2)[:, None] * case.mask)
    assert jnp.abs(B).max() > 1.2  # one of four is correct
    assert (metrics["base_flipped"], metrics["gap_zero"]) == (0, 1)


@pytest.mark.parametrize("verdicts", ["1111 1111 1111 1111", "0000 0000 0000 0000"])
def test_cast_learns_from_uniform_groups(verdicts):
    case = draw_case("cast", verdicts)
    _, gradient, *_ = evaluate("cast", case)
    assert (jnp.abs(gradient).max(axis=-1) > 0)[case.mask].mean() > 0.5  # the rest is clipped
    _, gradient, *_ = evaluate("grpo", case, kl_coef=0.0, clip_low=0.1, clip_high=0.28)
    assert not gradient.any()


@pytest.mark.parametrize("flip", [True, False])
def test_cast_counts_clipped_weights(flip):
    case = draw_case("cast")
    method, batch = cast(flip=flip), batch_of(case, cast())
    gap = np.random.default_rng(0).standard_normal(case.mask.shape) * 0.2
    _, metrics = method.credit(batch.replace(scores={"gap": jnp.asarray(gap)}), 0)
    B = np.asarray(base_advantage(batch))[:, None]
    agrees = np.sign(B) * gap
    if flip:  # towards the gap: 1.05 upwards, 1.2 downwards; a weight below 1 does not occur
        low, high = agrees > np.inf, (gap > np.log(1.05)) | (gap < -np.log(1.2))
    else:
        low = agrees < np.log(np.where(B > 0, 0.8, 0.95))
        high = agrees > np.log(np.where(B > 0, 1.05, 1.2))
    trained = np.asarray(batch.rollouts.mask_t) != 0
    np.testing.assert_allclose(metrics["weight_clipped_low"], low[trained].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["weight_clipped_high"], high[trained].mean(), rtol=1e-6)


def test_cast_without_flips_and_weights_is_clipped_grpo():
    case = draw_case()
    _, _, want, _ = evaluate("grpo", case)
    g = np.random.default_rng(0).standard_normal((16, T))
    A = base.advantage(batch_of(case, grpo()))[:, None]
    got = token_advantage(A, g, 1.0, (1.0, 1.0), (1.0, 1.0), flip=False) * case.mask
    np.testing.assert_array_equal(got, jnp.clip(want.adv_t, -1.2, 1.2))


def test_cast_after_the_cutoff_is_clipped_grpo():
    case = draw_case("cast")
    _, _, want, _ = evaluate("grpo", case)
    _, _, got, metrics = evaluate("cast", case, cutoff=STEP)
    np.testing.assert_array_equal(got.adv_t, jnp.clip(want.adv_t, -1.2, 1.2))
    assert not got.adv_t[12:].any()  # all correct
    assert metrics["base_flipped"] == 0
    _, _, want, _ = evaluate("cast", case)
    _, _, got, _ = evaluate("cast", case._replace(step=STEP - 1), cutoff=STEP)
    np.testing.assert_array_equal(got.adv_t, want.adv_t)


@pytest.mark.parametrize(
    "A, rho, slope",
    [
        *[(0.5, 1.0, -0.5), (0.5, 0.5, -0.25), (0.5, 1.27, -0.635), (0.5, 1.29, 0)],
        *[(-0.5, 1.0, 0.5), (-0.5, 2.0, 1.0), (-0.5, 0.81, 0.405), (-0.5, 0.79, 0)],
    ],
)
@pytest.mark.parametrize("name", ["rlsd", "cast"])
def test_clip_of_the_surrogate(name, A, rho, slope):
    """0.2 below and 0.28 above; what is clipped has no gradient."""
    old = jnp.full((1, 1), -2.0)
    credit = base.Credit(jnp.full((1, 1), A), jnp.zeros((1, 1)))
    batch = Batch(None, {}, scores={"old_logp": old}, credit=credit)

    def loss(logp):
        return METHODS[name]().loss({"logp": logp}, batch, 0)[0].sum()

    np.testing.assert_allclose(jax.grad(loss)(old + math.log(rho)), slope, rtol=1e-5)


@pytest.mark.parametrize("name", ["cast", "rlrt"])
def test_truncated_rows_count_in_their_group_only(name):
    truncated = np.arange(16) % 4 >= 2
    case = draw_case(name, "0000 1000 1000 1111", lengths=[3] * 16, truncated=truncated)
    _, gradient, credit, _ = evaluate(name, case)
    assert gradient[~truncated].any()
    assert not gradient[truncated].any()
    assert not credit.adv_t[truncated].any()
    batch = batch_of(case, make(name))
    np.testing.assert_array_equal(batch.rollouts.reward, case.correct)
    np.testing.assert_allclose(weigh(make(name), batch, 1).weight_t[~truncated], 1 / 24, rtol=1e-6)
    A = base.advantage(batch)
    np.testing.assert_allclose(A[4:8], [1.499997] + [-0.499999] * 3, rtol=1e-6)


def test_cast_ungraded_rows_do_not_make_a_group_mixed():
    B = base_advantage(batch_of(draw_case("cast", "11?1 ?0?0 ???? 10??"), cast()))
    half = [0.707106, -0.707106]
    np.testing.assert_allclose(B, [1, 1, 0, 1, 0, -1, 0, -1, *[0] * 4, *half, 0, 0], rtol=1e-5)


# SC-GRPO.


def test_sc_grpo_weights():
    D = [0, 1e-6, 1e-4, 0.01, 0.1, 0.5, 2, 0.035]
    want = [0, 2.857e-5, 0.002849, 0.222222, 0.740741, 0.934579, 0.982801, 0.5]
    D = jnp.array([D])
    f, c = saturating_weight(D, jnp.ones_like(D), quantile=0.0, c_min=0.035)
    np.testing.assert_allclose(f[0], want, rtol=2e-4)
    np.testing.assert_allclose(c, 0.035)


def test_sc_grpo_percentile():
    """At most a quarter of the active tokens weigh more than a half; the others do not count."""
    rng = np.random.default_rng(0)
    for n in range(1, 30):
        D = rng.lognormal(sigma=2, size=(5, 6)).astype(np.float32)
        active = rng.permutation(30).reshape(5, 6) < n
        f, c = saturating_weight(D, active, 0.75, 1e-4)
        np.testing.assert_allclose(c, np.percentile(D[active], 75), rtol=1e-6)
        assert (f > 0.5 + 1e-6).sum() <= math.ceil((n - 1) / 4)
        assert f.max() < 1
    f, c = saturating_weight(jnp.zeros((5, 6)), jnp.ones((5, 6)), 0.75, 1e-4)
    assert not f.any()
    np.testing.assert_allclose(c, 1e-4)


def test_sc_grpo_whose_reference_changes_nothing_learns_nothing():
    """Weight 0 where the teacher agrees; weight 1 and so GRPO where it is silent."""
    case = draw_case("sc_grpo", "1100 1100 1110 1110")
    _, gradient, *_ = evaluate("sc_grpo", case._replace(teacher=case.old))
    np.testing.assert_allclose(gradient, 0, atol=1e-4)
    _, _, silent, _ = evaluate("sc_grpo", case._replace(shown=np.zeros(16, bool)))
    _, _, want, _ = evaluate("grpo", case)
    np.testing.assert_array_equal(silent.adv_t, want.adv_t)


def test_sc_grpo_scales_grpos_gradient():
    """By f of its token, whatever the ratio: the sign never changes."""
    case = draw_case("sc_grpo", "1100 1100 1110 1000")
    _, plain, *_ = evaluate("grpo", case, kl_coef=0.0, clip_low=0.2, clip_high=0.2)
    _, scaled, credit, _ = evaluate("sc_grpo", case)
    _, _, grpo_credit, _ = evaluate("grpo", case)
    f = np.where(case.mask, credit.adv_t / np.where(case.mask, grpo_credit.adv_t, 1), 0)
    assert f.min() >= 0
    assert f[:12].max() < 1
    np.testing.assert_allclose(f[12:], case.mask[12:], rtol=1e-6)
    np.testing.assert_allclose(scaled, f[..., None] * plain, atol=1e-8)


def test_sc_grpo_judges_groups_that_nobody_solved_by_diversity_alone():
    """Also where reward functions graded their answers between right and wrong."""
    case, method = draw_case("sc_grpo", "1100 0000 0000 1000"), METHODS["sc_grpo"]()
    batch = batch_of(case, method)
    divergence = jnp.asarray(np.random.default_rng(0).random(case.mask.shape), jnp.float32)
    batch = batch.replace(scores={"divergence": divergence})
    between = jnp.where(jnp.arange(16) // 4 == 1, jnp.linspace(0, 0.4, 16), batch.rollouts.reward)
    graded = batch.replace(rollouts=batch.rollouts.replace(reward=between))
    want, got = (method.credit(b, 0)[0].adv_t for b in (batch, graded))
    assert np.abs(want[4:8]).max() > 0
    np.testing.assert_array_equal(got, want)


def samples_of(verdicts: str) -> list[Sample]:
    return [Sample((), f"response {i}", VERDICT[c], False) for i, c in enumerate(verdicts)]


PROBLEM = Problem("id", "question", "42", "because")


@pytest.mark.parametrize(
    "verdicts", ["0000", "0100", "0110", "1011", "1111", "00?0", "0?1?", "01?1", "11?1", "0???"]
)
def test_sc_grpo_routes(verdicts):
    samples = samples_of(verdicts)
    context = reference_trajectory()
    rng = np.random.default_rng(0)
    draws = [context.write(PROBLEM, samples, rng) for _ in range(200)]
    for i, hints in enumerate(zip(*draws, strict=True)):
        kind, rows = oracles.sc_grpo_route([s.correct for s in samples], i)
        shown = [hint for hint in hints if hint is not None]
        assert {hint.source for hint in shown} == rows - {i}
        template = {"sibling": "peer", "failure": "attempt", "silent": None}[kind]
        assert all(hint.template == template for hint in shown)
        assert all(hint.slots["peer"] == f"response {hint.source}" for hint in shown)
        assert len(shown) == 200 or (kind == "failure" and i in rows) or kind == "silent"
    if kind == "failure":  # one reference for the whole group, itself not scored
        for hints in draws:
            (r,) = {hint.source for hint in hints if hint is not None}
            assert [i for i, hint in enumerate(hints) if hint is None] == [r]


def test_sc_grpo_solve_none():
    """alpha A_div: of mean 0 over the scored rows, none for the one that is shown."""
    case = draw_case("sc_grpo", "0000 0000 00?0 0000", lengths=[2, 3, 1, 3] * 4)
    f_t = jnp.asarray(np.random.default_rng(0).uniform(size=(16, T)), jnp.float32)
    batch = batch_of(case, sc_grpo())
    scored = jnp.asarray(case.shown & case.graded, jnp.float32)
    A = diversity_advantage(f_t, batch, scored)
    np.testing.assert_allclose(A.reshape(-1, G).sum(axis=1), 0, atol=1e-6)
    assert not A[~np.asarray(scored, bool)].any()
    s = [f_t[1, :2].mean(), f_t[2, 0], f_t[3, :2].mean()]  # the row shown has two tokens
    np.testing.assert_allclose(A[1:4], (s - np.mean(s)) / (np.std(s, ddof=1) + 1e-6), rtol=1e-5)
    beyond = f_t.at[:, 2].set(0.9)
    np.testing.assert_array_equal(diversity_advantage(beyond, batch, scored), A)
    same = diversity_advantage(jnp.full((16, T), 0.3), batch, scored)
    assert not same.any()
    _, _, credit, _ = evaluate("sc_grpo", case)
    assert not credit.adv_t[::4].any()
    assert credit.adv_t[1:4][case.mask[1:4]].all()


# The baselines.


def test_dr_grpo_divides_by_the_budget_and_not_by_lengths():
    case = draw_case("dr_grpo")
    loss, _, credit, _ = evaluate("dr_grpo", case)
    of_ten, _, same_credit, _ = evaluate("dr_grpo", case, max_tokens=10)
    np.testing.assert_allclose(of_ten, loss * T / 10, rtol=1e-6)
    np.testing.assert_array_equal(same_credit.adv_t, credit.adv_t)
    np.testing.assert_allclose(credit.adv_t[8:12, 0], [0.75, -0.25, -0.25, -0.25], rtol=1e-6)
    weight_t = weigh(make("dr_grpo"), batch_of(case, make("dr_grpo")), 1).weight_t
    np.testing.assert_allclose(weight_t[case.mask], 1 / (15 * T), rtol=1e-6)


def grade(verdicts: str, lengths: list[int], max_length: int, **hyper) -> base.Grades:
    case = draw_case("dapo", verdicts, lengths=lengths)._replace(max_length=max_length)
    return make("dapo", **hyper).grade(conformance.verdicts_of(given(case)))


def test_dapo_rewards():
    """+-1, and from a fifth below the limit on down to 1 less."""
    lengths = [100, 16384, 18432, 20480]
    grades = grade("1010", lengths, 20480)
    np.testing.assert_allclose(grades.reward, [1, -1, 0.5, -2])
    assert grades.trained.all()
    np.testing.assert_allclose(grade("1010", lengths, 20480, overlong_buffer=8192).reward[1], -1.5)
    np.testing.assert_array_equal(
        grade("1010", lengths, 20480, overlong_buffer=0).reward, [1, -1, 1, -1]
    )


def test_dapo_keeps_mixed_groups():
    """By the verdicts: neither lengths nor rows without a verdict make a group mixed."""
    verdicts = "1111 0000 1000 1110 11?1 00?0 1?0? ???? 1???"
    kept = grade(verdicts, [1, 2, 3] * 12, 3).kept
    np.testing.assert_array_equal(kept, [0, 0, 1, 1, 0, 0, 1, 0, 0])


def test_rloo_golden_advantages():
    case = draw_case("rloo", "1000 1000 0000 1111", lengths=[3] * 16)
    _, _, credit, _ = evaluate("rloo", case, kl_coef=0.0)
    want = [1, -1 / 3, -1 / 3, -1 / 3] * 2 + [0] * 8
    np.testing.assert_allclose(credit.adv_t, np.tile(want, (T, 1)).T, rtol=1e-6)


def test_reinforce_pp_whitens_over_all_tokens():
    case = draw_case("reinforce_pp")
    _, _, credit, _ = evaluate("reinforce_pp", case)
    np.testing.assert_allclose(credit.adv_t[case.mask].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(credit.adv_t[case.mask].std(ddof=1), 1, rtol=1e-5)


@pytest.mark.parametrize("lengths", [[1] + [0] * 15, [0] * 16])
def test_reinforce_pp_has_no_advantage_of_fewer_than_two_tokens(lengths):
    case = draw_case("reinforce_pp", "1000 0000 0000 0000", lengths=lengths)
    _, gradient, credit, _ = evaluate("reinforce_pp", case)
    assert not credit.adv_t.any()
    assert not gradient.any()


def test_reinforce_pp_penalises_what_is_still_to_come():
    """With equal rewards, A is minus the sum from each token on, up to shift and scale."""
    case = draw_case("reinforce_pp", "1111 1111 1111 1111", lengths=[3] * 16)
    _, _, credit, _ = evaluate("reinforce_pp", case, kl_coef=1.0)
    k1 = np.array([[oracles.old_k1(case, i, t) for t in range(T)] for i in range(16)])
    to_come = np.array([[row[t:].sum() for t in range(T)] for row in k1])
    assert np.corrcoef(np.ravel(credit.adv_t), -to_come.ravel())[0, 1] > 0.99999


STUDENT, TEACHER = [0.5, 1, 1.5, 0], [2.0, 1, 0, -2]


@pytest.mark.parametrize("alpha, expected", [(0.0, 0.432969), (0.5, 0.112048), (1.0, 0.534165)])
def test_sdpo_on_the_students_two_likeliest_tokens_and_the_tail(alpha, expected):
    got = divergence_of(make("sdpo", alpha=alpha, top_k=2), STUDENT, TEACHER)
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("alpha, expected", [(0.0, 0.695976), (0.5, 0.165875), (1.0, 0.766924)])
def test_sdpo_whose_support_is_the_whole_vocabulary(alpha, expected):
    for top_k in (4, 100):
        got = divergence_of(make("sdpo", alpha=alpha, top_k=top_k), STUDENT, TEACHER)
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_sdpo_rows_without_a_teacher_are_not_averaged():
    case = draw_case("sdpo", lengths=[3] * 16)
    loss, gradient, credit, _ = evaluate("sdpo", case)
    shown = case.shown & case.graded
    assert 0 < shown.sum() < 15
    np.testing.assert_array_equal(credit.distill_t, shown[:, None] * np.ones(T))
    assert not gradient[~shown].any()
    alone = case._replace(mask=case.mask & case.shown[:, None])
    np.testing.assert_allclose(evaluate("sdpo", alone)[0], loss, rtol=1e-6)


def test_sdft_does_not_learn_first_tokens():
    """Rows that are no longer than they are not averaged either."""
    case = draw_case("sdft", lengths=[3, 1] * 8)
    loss, gradient, *_ = evaluate("sdft", case)
    assert not gradient[:, 0].any()
    assert gradient[0, 1:].any()
    long = case._replace(mask=case.mask & (np.arange(16) % 2 == 0)[:, None])
    np.testing.assert_allclose(evaluate("sdft", long)[0], loss, rtol=1e-6)
    assert evaluate("sdft", case, skip=T)[0] == 0


def test_rlrt_counts_clipped_weights_among_those_it_gives():
    batch = batch_of(draw_case("rlrt"), METHODS["rlrt"]())
    gap = np.random.default_rng(0).standard_normal(batch.rollouts.mask_t.shape) * 0.3
    _, metrics = METHODS["rlrt"](eps_w=0.2).credit(batch.replace(scores={"gap": gap}), 0)
    r, hint = batch.rollouts, batch.hints["teacher"]
    weighted = np.asarray(r.mask_t * (hint.shown * r.correct * r.graded)[:, None]) != 0
    # Correct answers with others in their group that are wrong have A > 0, the others A = 0.
    weight = np.exp(-np.sign(np.asarray(base.advantage(batch)))[:, None] * gap)[weighted]
    np.testing.assert_allclose(metrics["weight_clipped_low"], (weight <= 0.8).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["weight_clipped_high"], (weight >= 1.2).mean(), rtol=1e-6)
    assert 0 < weighted.sum() < np.asarray(r.mask_t).sum()


def test_rlrt_raises_what_the_teacher_would_not_have_said():
    """On correct rows that have a correct sibling; all others keep GRPO's advantage."""
    case = draw_case("rlrt", lengths=[3] * 16)
    _, _, got, _ = evaluate("rlrt", case)
    _, _, want, _ = evaluate("grpo", case)
    correct = case.correct & case.shown & case.graded & (np.arange(16) < 12)
    np.testing.assert_array_equal(np.flatnonzero(correct), [0, 1])
    np.testing.assert_array_equal(got.adv_t[~correct], want.adv_t[~correct])
    gap = [
        [
            oracles.logp(case.teacher, case, i, t) - oracles.logp(case.old, case, i, t)
            for t in range(T)
        ]
        for i in (0, 1)
    ]
    np.testing.assert_array_equal(np.sign(got.adv_t - want.adv_t)[:2], -np.sign(gap))
    assert (got.adv_t[:2] >= 0.5 * want.adv_t[:2] - 1e-6).all()
    assert (got.adv_t[:2] <= 1.5 * want.adv_t[:2] + 1e-6).all()


@pytest.mark.parametrize("step, a", [(0, 0.196), (24, 0.1), (48, 0.004), (49, 0), (1000, 0)])
def test_grpo_opsd_fades(step, a):
    case = draw_case("grpo_opsd")._replace(step=step)
    _, _, credit, _ = evaluate("grpo_opsd", case)
    np.testing.assert_allclose(credit.distill_t, a * case.mask, atol=1e-7)


# HSD and OPSD.


@pytest.mark.parametrize("verdicts", ["0000", "0100", "0110", "1111", "0?00", "1?0?"])
def test_hsd_contexts(verdicts):
    """The answer, with a uniformly drawn other success if there is one."""
    samples = samples_of(verdicts)
    context = hsd().teachers["teacher"].context
    rng = np.random.default_rng(0)
    draws = [context.write(PROBLEM, samples, rng) for _ in range(600)]
    for i, hints in enumerate(zip(*draws, strict=True)):
        peers = [j for j in range(4) if j != i and verdicts[j] == "1"]
        if not peers:
            assert set(map(str, hints)) == {str(Hint("answer", {"answer": "42"}))}
        for j in peers:
            path = Hint("answer_peer", {"answer": "42", "peer": f"response {j}"}, j)
            np.testing.assert_allclose(hints.count(path) / 600, 1 / len(peers), atol=0.1)


def test_hsd_penalty_alone_when_the_teacher_agrees():
    case = draw_case("hsd")
    case = case._replace(teacher=case.student)
    loss, *_ = evaluate("hsd", case)
    rows = [
        np.mean([oracles.kl(case.student[i, t], case.reference[i, t]) for t in np.flatnonzero(m)])
        for i, m in enumerate(case.mask)
        if m.any()
    ]
    np.testing.assert_allclose(loss, 1e-3 * np.mean(rows), rtol=1e-5)


@pytest.mark.parametrize("tau, value", [(0.05, -0.152870), (0.3, 0.097130), (math.inf, 0.695976)])
def test_opsd_cap(tau, value):
    """Each vocabulary entry is capped before the sum, which can then be negative."""
    _, divergence = opsd(tau).probe["divergence"]
    q, p = jnp.array([0.5, 1, 1.5, 0]), jnp.array([2.0, 1, 0, -2])
    got, gradient = jax.value_and_grad(divergence)(q, p, jnp.int32(0))
    np.testing.assert_allclose(got, value, atol=1e-6)
    if tau == 0.05:
        want = [0.057381, -0.147177, 0.067031, 0.022766]
        np.testing.assert_allclose(gradient, want, atol=1e-6)
