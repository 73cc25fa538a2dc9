"""Surrogates, penalties and averaging weights: golden numbers, gradients, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxrl_sd import losses, stats

NAN = np.nan


def f32(*values):
    return jnp.array(values, jnp.float32)


# What each loss and its derivative with respect to logp are, in float64, of scalars.
# rho = exp(logp - old), log_w = logp - ref; `old` serves as both.


def ppo(low, high, dual=None):
    def value(logp, old, adv):
        rho = np.exp(logp - old)
        loss = max(-rho * adv, -np.clip(rho, 1 - low, 1 + high) * adv)
        return min(loss, -dual * adv) if dual and adv < 0 else loss

    return value


def slope_of(value, h=1e-6):
    return lambda logp, *rest: (value(logp + h, *rest) - value(logp - h, *rest)) / (2 * h)


LOSSES = {
    "ppo": (lambda x, old, adv: losses.ppo(x, old, adv, 0.2, 0.28), ppo(0.2, 0.28)),
    "ppo_tight": (lambda x, old, adv: losses.ppo(x, old, adv, 0.01, 0.02), ppo(0.01, 0.02)),
    "ppo_dual": (lambda x, old, adv: losses.ppo(x, old, adv, 0.2, 0.28, 3), ppo(0.2, 0.28, 3)),
    "reinforce": (lambda x, old, adv: losses.reinforce(x, adv), lambda x, old, adv: -adv * x),
    "k1": (lambda x, ref, adv: losses.k1(x, ref), lambda x, ref, adv: x - ref),
    "k2": (lambda x, ref, adv: losses.k2(x, ref), lambda x, ref, adv: (x - ref) ** 2 / 2),
    "k3": (
        lambda x, ref, adv: losses.k3(x, ref),
        lambda x, ref, adv: np.expm1(ref - x) - (ref - x),
    ),
    "fkl": (lambda x, ref, adv: losses.fkl(x, ref), lambda x, ref, adv: np.exp(ref - x)),
    "rkl": (lambda x, ref, adv: losses.rkl(x, ref), lambda x, ref, adv: (x - ref + 1) ** 2 / 2),
}
SLOPES = {name: slope_of(value) for name, (_, value) in LOSSES.items()}
# Clipping by a detached factor: the value says nothing about the slope.
LOSSES["cispo"] = (
    lambda x, old, adv: losses.cispo(x, old, adv, 1.02),
    lambda x, old, adv: -min(np.exp(x - old), 1.02) * adv * x,
)
SLOPES["cispo"] = lambda x, old, adv: -min(np.exp(x - old), 1.02) * adv


@jax.jit
def evaluate_all(logits, old_logits, token, adv):
    """{name: (loss [N], gradient with respect to the student's logits [N, V])}."""
    old = stats.log_prob(old_logits, old_logits, token)

    def both(loss):
        value, vjp = jax.vjp(
            lambda logits: loss(stats.log_prob(logits, logits, token), old, adv), logits
        )
        return value, vjp(jnp.ones_like(value))[0]

    return {name: both(loss) for name, (loss, _) in LOSSES.items()}


@pytest.mark.parametrize("eps", [0.05, 1.0])
@pytest.mark.parametrize("vocab", [7, 151, 20000])
def test_gradients_reach_the_logits_as_in_float64(vocab, eps):
    rng = np.random.default_rng([vocab, 0])
    logits = (10 * rng.standard_normal((8, vocab))).astype(np.float32)
    old_logits = (logits + eps * rng.standard_normal((8, vocab))).astype(np.float32)
    token = np.argsort(logits, axis=-1)[:, -2].astype(np.int32)  # likely, and not certain
    adv = np.array([1, -1, 0.4, -2, 1, -1, 0.4, -2], np.float32)
    log_q, log_old = (log_softmax(x.astype(np.float64), -1) for x in (logits, old_logits))
    results = evaluate_all(logits, old_logits, token, adv)
    for name, (values, gradients) in results.items():
        for i in range(8):
            x, old, A = log_q[i, token[i]], log_old[i, token[i]], float(adv[i])
            onehot = np.arange(vocab) == token[i]
            expected = SLOPES[name](x, old, A) * (onehot - np.exp(log_q[i]))
            error = np.abs(gradients[i] - expected).max()
            assert error <= 1e-3 * np.abs(expected).max(), (name, i)
            # k3 is a difference of numbers near 1.
            np.testing.assert_allclose(
                values[i], LOSSES[name][1](x, old, A), rtol=1e-4, atol=2e-7, err_msg=name
            )


@pytest.mark.parametrize("name", LOSSES)
def test_the_old_log_probability_and_the_advantage_are_constants(name):
    gradients = jax.grad(lambda *args: LOSSES[name][0](*args).sum(), argnums=(1, 2))(
        f32(-1, -2, -0.5), f32(-1.1, -2, -0.9), f32(1, -1, 0.5)
    )
    np.testing.assert_array_equal(gradients, 0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("gap", [1000.0, -1000.0])
@pytest.mark.parametrize("adv", [1.0, -1.0])
def test_huge_log_ratios_stay_finite(name, gap, adv):
    loss = LOSSES[name][0]
    value, slope = jax.value_and_grad(loss)(jnp.float32(-1), jnp.float32(-1 - gap), adv)
    assert np.isfinite(value) and np.isfinite(slope)


# Golden numbers.


@pytest.mark.parametrize(
    ("delta", "k1", "k2", "k3"), [(0.5, 0.5, 0.125, 0.106531), (-0.5, -0.5, 0.125, 0.148721)]
)
def test_golden_penalties(delta, k1, k2, k3):
    logp, ref = f32(-1.0 + delta), f32(-1.0)
    assert losses.k1(logp, ref) == pytest.approx(k1, abs=1e-6)
    assert losses.k2(logp, ref) == pytest.approx(k2, abs=1e-6)
    assert losses.k3(logp, ref) == pytest.approx(k3, abs=1e-6)
    # SDPG's UFKL, 1/w + log w, is k3 + 1; FKL is k3 + 1 - k1, RKL is k2 + k1 + 1/2.
    assert losses.fkl(logp, ref) == pytest.approx(k3 + 1 - k1, abs=1e-6)
    assert losses.rkl(logp, ref) == pytest.approx(k2 + k1 + 0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("adv", "ratio", "expected", "dual"),
    [
        (1, 1.5, -1.28, -1.28),
        (1, 0.5, -0.5, -0.5),
        (-1, 1.5, 1.5, 1.5),
        (-1, 0.5, 0.8, 0.8),
        (-1, 4, 4.0, 3.0),
        (-1, 12, 12.0, 3.0),
        (-2, 12, 24.0, 6.0),
    ],
)
def test_golden_ppo(adv, ratio, expected, dual):
    args = (jnp.log(f32(ratio)), f32(0), f32(adv), 0.2, 0.28)
    assert losses.ppo(*args) == pytest.approx(expected, rel=1e-6)
    assert losses.ppo(*args, dual_clip=3.0) == pytest.approx(dual, rel=1e-6)


@pytest.mark.parametrize(
    ("adv", "ratio", "slope"),
    [
        # On policy the surrogate is REINFORCE; outside, a clipped token has no gradient.
        (1, 1.0, -1.0),
        (-1, 1.0, 1.0),
        (1, 1.3, 0.0),
        (1, 0.5, -0.5),
        (-1, 0.7, 0.0),
        (-1, 1.5, 1.5),
    ],
)
def test_slope_of_ppo(adv, ratio, slope):
    ours = jax.grad(lambda logp: losses.ppo(logp, f32(0), f32(adv), 0.2, 0.28).sum())
    assert ours(jnp.log(f32(ratio)))[0] == pytest.approx(slope, abs=1e-6)


def test_cispo_never_loses_a_gradient():
    slope = jax.grad(lambda logp: losses.cispo(logp, f32(0), f32(1), 5.0).sum())
    for ratio, expected in [(0.1, -0.1), (1.0, -1.0), (4.0, -4.0), (12.0, -5.0)]:
        assert slope(jnp.log(f32(ratio)))[0] == pytest.approx(expected, rel=1e-6)


LOG_RATIO = jnp.array([[0.01, -0.02, 0.03, NAN], [0.2, 0.1, NAN, 1e4]])
RATIO_MASK = jnp.array([[1.0, 1, 1, 0], [1, 1, 0, 0]])


def test_golden_sequence_ratio_and_garbage_behind_the_mask():
    ratio = losses.sequence_ratio(LOG_RATIO, 0 * RATIO_MASK, RATIO_MASK)
    np.testing.assert_allclose(ratio, [[1.0066889], [np.exp(0.15)]], rtol=1e-6)


def test_gspo_clips_the_ratio_of_the_sequence():
    adv_t = jnp.array([[1.0] * 4, [-1.0] * 4])
    weight_t = losses.sequence_mean(RATIO_MASK)

    def loss(logp_t, low, high):
        loss_t = losses.gspo(logp_t, 0 * RATIO_MASK, adv_t, RATIO_MASK, low, high)
        return losses.weighted_sum(loss_t, weight_t)

    ratio = np.exp([0.02 / 3, 0.15])
    value, slope = jax.value_and_grad(loss)(LOG_RATIO, 3e-4, 4e-4)
    # A > 0 above the bound is clipped, A < 0 above it is not.
    np.testing.assert_allclose(value, (-1.0004 + ratio[1]) / 2, rtol=1e-6)
    np.testing.assert_allclose(slope[0], 0, atol=1e-8)
    np.testing.assert_allclose(slope[1], ratio[1] / 4 * RATIO_MASK[1], rtol=1e-5)
    # Unclipped, every token of a row shares the sequence's gradient s A / |y|.
    slope = jax.grad(loss)(LOG_RATIO, 0.2, 0.28)
    expected = np.array([[-ratio[0] / 3], [ratio[1] / 2]]) * RATIO_MASK / 2
    np.testing.assert_allclose(slope, expected, rtol=1e-5)


def test_golden_importance_weights():
    """Ratios 2, 1/2 and, masked, NaN; then a row of 8 and one without tokens."""
    trainer = jnp.log(jnp.array([[0.4, 0.2, 0.1], [0.8, 0.8, 0.8], [0.1, 0.1, 0.1]]))
    sampler = jnp.log(jnp.array([[0.2, 0.4, NAN], [0.4, 0.4, 0.4], [NAN, NAN, NAN]]))
    mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    of_tokens = losses.token_importance(trainer, sampler, mask, 1.5)
    np.testing.assert_allclose(of_tokens, [[1.5, 0.5, 1], [1.5] * 3, [1] * 3], rtol=1e-6)
    of_rows = losses.sequence_importance(trainer, sampler, mask, 5.0)
    np.testing.assert_allclose(of_rows, [[1], [5], [1]], rtol=1e-6)


@pytest.mark.parametrize("importance", [losses.token_importance, losses.sequence_importance])
def test_importance_weights_are_constants_and_finite(importance):
    mask = jnp.ones((1, 2))

    def weight(trainer):
        return importance(trainer, jnp.array([[-2000.0, -1.0]]), mask, 3.0).sum()

    assert jnp.isfinite(weight(jnp.array([[-1.0, -2000.0]])))
    assert not jax.grad(weight)(jnp.array([[-1.0, -1.5]])).any()


@pytest.mark.parametrize(
    ("adv", "ratio", "expected"),
    [(1, 1.5, 1), (1, 0.5, 0), (-1, 1.5, 0), (-1, 0.5, 1), (1, 1.25, 0), (-1, 0.85, 0), (0, 9, 0)],
)
def test_a_clipped_token_is_one_without_a_gradient(adv, ratio, expected):
    logp = jnp.log(ratio)
    assert losses.clipped(logp, 0.0, adv, 0.2, 0.28) == expected
    slope = jax.grad(losses.ppo)(logp, 0.0, float(adv), 0.2, 0.28)
    assert (slope == 0) == (expected == 1 or adv == 0)


@pytest.mark.parametrize(("scale", "expected"), [(1.0, 0.6), (1.25, 0.85)])
def test_golden_distillation_advantage(scale, expected):
    adv = losses.distillation_advantage(f32(-1.0), f32(-1.6), f32(-2.0), scale)
    assert adv == pytest.approx(expected, rel=1e-6)


def test_the_distillation_advantage_is_a_constant():
    slopes = jax.grad(losses.distillation_advantage, argnums=(0, 1, 2))(-1.0, -1.6, -2.0, 1.25)
    np.testing.assert_array_equal(slopes, 0)


def test_distillation_as_a_policy_gradient_is_the_sampled_token_objective():
    # OPSD Eq. 9: -sg(log p_T - log p_S) log p_S.
    def loss(logp_t):
        adv_t = losses.distillation_advantage(f32(-1.0), logp_t, f32(-2.0))
        return losses.reinforce(logp_t, adv_t).sum()

    value, slope = jax.value_and_grad(loss)(f32(-1.6))
    assert value == pytest.approx(0.6 * 1.6, rel=1e-6)
    assert slope[0] == pytest.approx(-0.6, rel=1e-6)


@pytest.mark.parametrize(
    ("length", "expected"), [(100, 0), (16384, 0), (18432, -0.5), (20480, -1), (30000, -1)]
)
def test_golden_overlong_penalty(length, expected):
    assert losses.overlong_penalty(jnp.array(length), 20480, 4096) == expected


# Averages.

X = jnp.array([[1.0, 3, 9, 9], [2, 2, 2, 6]])
MASK = jnp.array([[1.0, 1, 0, 0], [1, 1, 1, 1]])
WEIGHTS = {
    "token_mean": (losses.token_mean, 16 / 6),
    "sequence_mean": (losses.sequence_mean, 2.5),
    "sequence_sum": (losses.sequence_sum, 8.0),
    "constant_length": (losses.constant_length(4), 2.0),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_golden_averages(name):
    weight, expected = WEIGHTS[name]
    assert losses.weighted_sum(X, weight(MASK)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("garbage", [1e4, NAN, np.inf])
def test_padding_is_irrelevant(name, garbage):
    weight, expected = WEIGHTS[name]
    x = jnp.where(MASK != 0, X, garbage)
    value, gradient = jax.value_and_grad(losses.weighted_sum)(x, weight(MASK))
    assert value == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(gradient, weight(MASK), rtol=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
def test_rows_without_tokens_are_left_out(name):
    weight, expected = WEIGHTS[name]
    x, mask = jnp.concatenate([X, NAN * X]), jnp.concatenate([MASK, 0 * MASK])
    assert losses.weighted_sum(x, weight(mask)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", WEIGHTS)
def test_an_empty_batch_has_loss_zero(name):
    assert losses.weighted_sum(NAN * X, WEIGHTS[name][0](0 * MASK)) == 0


@pytest.mark.parametrize("name", WEIGHTS)
def test_parts_of_a_batch_add_up(name):
    weight_t = WEIGHTS[name][0](MASK)
    whole = losses.weighted_sum(X, weight_t)
    parts = sum(losses.weighted_sum(X[i : i + 1], weight_t[i : i + 1]) for i in range(2))
    assert parts == pytest.approx(float(whole), rel=1e-6)


def test_a_token_mean_does_not_care_where_tokens_stand():
    order = np.random.default_rng(0).permutation(8)
    x, mask = (a.ravel()[order].reshape(2, 4) for a in (X, MASK))
    value = losses.weighted_sum(x, losses.token_mean(mask))
    assert value == pytest.approx(16 / 6, rel=1e-6)
