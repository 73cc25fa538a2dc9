"""What estimators, surrogates and advantages are estimates of, by enumeration.

The package's gradients, averaged over every sample that could be drawn, against float64 derivatives
of the objective they are meant for; and, where a name promises another objective, by how much the
two differ.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import (
    binomial,
    divergence,
    expected_gradient,
    gradient,
    kl,
    log,
    log_probs,
    one_group_of_each_count,
    random_distributions,
    slope,
    softmax,
)

from jaxrl_sd import groups, losses, stats

# Penalties on the sampled token: k1, k2, k3 and SDPG's four anchors.

Z = jnp.array([0.2, -0.1, 0.4, 0.0])
P = np.array([0.26448367, 0.19593432, 0.32304109, 0.21654092])
TEACHER = log([0.4, 0.3, 0.2, 0.1])
REFERENCE = log([0.25, 0.35, 0.15, 0.25])
PENALTIES = {name: getattr(losses, name) for name in ("k1", "k2", "k3", "fkl", "rkl")}


def nothing(z, reference):
    return 0.0


def to_reference(z, reference):
    """kl(policy||reference)."""
    return kl(softmax(z), reference)


def from_reference(z, reference):
    """kl(reference||policy)."""
    return kl(reference, softmax(z))


def policies_and_references(num_tokens=5):
    """Random (logits f64[V], reference f64[V])."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        yield rng.standard_normal(num_tokens), random_distributions(rng, num_tokens)


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("k1", nothing),
        ("k2", to_reference),
        ("rkl", to_reference),
        ("k3", from_reference),
        ("fkl", from_reference),
    ],
)
def test_expected_gradient_of_a_penalty_in_the_loss(name, objective):
    for z, reference in policies_and_references():
        reference_logp = log_probs(log(reference))
        sampled = expected_gradient(lambda x, r=reference_logp: PENALTIES[name](x, r), jnp.array(z))
        expected = slope(lambda z, r=reference: objective(z, r), z)
        np.testing.assert_allclose(sampled, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "objective"),
    [
        ("k1", to_reference),
        # k3 has k1's mean, and its own slope (see above) is missing from the policy gradient.
        ("k3", lambda z, reference: to_reference(z, reference) - from_reference(z, reference)),
    ],
)
def test_expected_gradient_of_a_penalty_in_the_reward(name, objective):
    for z, reference in policies_and_references():
        reward = -PENALTIES[name](log_probs(jnp.array(z)), log_probs(log(reference)))
        sampled = expected_gradient(lambda x, r=reward: losses.reinforce(x, r), jnp.array(z))
        expected = slope(lambda z, r=reference: objective(z, r), z)
        np.testing.assert_allclose(sampled, expected, atol=1e-6)


def test_k1_and_k3_are_unbiased_values_of_the_kl_whose_gradient_k3_does_not_have():
    for z, reference in policies_and_references():
        logp, reference_logp = log_probs(jnp.array(z)), log_probs(log(reference))
        exact = to_reference(z, reference)
        values = {name: softmax(z) @ f(logp, reference_logp) for name, f in PENALTIES.items()}
        assert values["k1"] == pytest.approx(exact, abs=1e-6)
        assert values["k3"] == pytest.approx(exact, abs=1e-6)
        assert abs(values["k2"] - exact) > 1e-3


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        # UFKL is k3 plus 1, URKL is k2.
        (losses.k3, [0.01448367, -0.15406568, 0.17304109, -0.03345908]),
        (losses.fkl, [0.01448367, -0.15406568, 0.17304109, -0.03345908]),
        (losses.k2, [-0.01629509, -0.13677846, 0.20972302, -0.05664947]),
        (losses.rkl, [-0.01629509, -0.13677846, 0.20972302, -0.05664947]),
        (losses.k1, [0, 0, 0, 0]),
    ],
)
def test_sdpg_golden_expected_gradients_of_the_anchors(penalty, expected):
    reference_logp = log_probs(REFERENCE)
    sampled = expected_gradient(lambda logp: penalty(logp, reference_logp), Z)
    np.testing.assert_allclose(sampled, expected, atol=3e-7)


@pytest.mark.parametrize(
    ("penalty", "coefficient"),
    [(losses.k3, 0), (losses.k2, 0), (losses.fkl, -1), (losses.rkl, 1), (losses.k1, 1)],
)
def test_sdpg_only_the_centred_anchors_are_silent_token_by_token_at_the_reference(
    penalty, coefficient
):
    logp = log_probs(Z)
    slopes = jax.grad(lambda x: penalty(x, logp).sum())(logp)
    np.testing.assert_allclose(slopes, coefficient, atol=3e-7)
    np.testing.assert_allclose(expected_gradient(lambda x: penalty(x, logp), Z), 0, atol=3e-7)


def test_sdpg_reverse_kl_gradient_is_a_policy_gradient_over_the_vocabulary():
    expected = [-0.14361225, -0.10880408, 0.11311483, 0.13930150]
    reverse_kl = float(stats.reverse_kl(Z, TEACHER, np.int32(0)))
    assert reverse_kl == pytest.approx(0.12930597, abs=3e-7)
    np.testing.assert_allclose(gradient(stats.reverse_kl, Z, TEACHER), expected, atol=3e-7)

    teacher_logp, logp = log_probs(TEACHER), log_probs(Z)
    A = reverse_kl + losses.distillation_advantage(teacher_logp, logp, logp)
    np.testing.assert_allclose(A, [0.54299100, 0.55530893, -0.35015618, -0.64330336], atol=1e-6)
    np.testing.assert_allclose(P @ A, 0, atol=3e-7)
    surrogate = expected_gradient(lambda logp: losses.reinforce(logp, A), Z)
    np.testing.assert_allclose(surrogate, expected, atol=3e-7)


# Divergences over the vocabulary.


@pytest.mark.parametrize(
    ("stat", "objective"),
    [(stats.reverse_kl, to_reference), (stats.forward_kl, from_reference)],
)
def test_gradients_of_the_two_kls(stat, objective):
    for z, teacher in policies_and_references():
        expected = slope(lambda z, p=teacher: objective(z, p), z)
        np.testing.assert_allclose(gradient(stat, jnp.array(z), log(teacher)), expected, atol=1e-6)


def jsd(q, p, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


@pytest.mark.parametrize(("beta", "end"), [(1e-3, 0), (1 - 1e-3, 1)])
def test_the_ends_of_the_jsd_are_kls_which_the_formula_reaches_only_when_scaled(beta, end):
    stat_at_end, stat_near = stats.generalized_jsd(end), stats.generalized_jsd(beta)
    for z, p in policies_and_references():
        q = softmax(z)
        at_end, near = divergence(stat_at_end, q, p), divergence(stat_near, q, p)
        assert at_end == pytest.approx(kl(p, q) if end == 0 else kl(q, p), abs=1e-6)
        assert near == pytest.approx(jsd(q, p, beta), rel=1e-3)
        # The formula goes to 0 like its distance to the end, so learning rates do not transfer.
        assert near / min(beta, 1 - beta) == pytest.approx(at_end, rel=1e-2)


# Advantages of a group, on one prompt that is solved with probability p.

ADVANTAGES = {name: getattr(groups, name) for name in ("leave_one_out", "centered", "standardized")}


@partial(jax.jit, static_argnums=(0, 3))
def _ascent(name, logit, law, G):
    verdicts = one_group_of_each_count(G)
    A = ADVANTAGES[name](verdicts.ravel(), jnp.ones(verdicts.size), G).reshape(verdicts.shape)
    weight_t = losses.sequence_mean(jnp.ones((G, 1)))

    def loss(logit):
        logp = log_probs(jnp.stack([0.0, logit]))[verdicts.astype(int)]
        return law @ losses.ppo(logp, logp, A, 0.2, 0.2) @ weight_t[:, 0]

    return -jax.grad(loss)(logit)


def expected_ascent(name, p, G):
    """-d/dlogit of the mean surrogate over all groups, for a policy that is right with p."""
    return float(_ascent(name, np.log(p / (1 - p)), binomial(p, G).astype(np.float32), G))


def test_leave_one_out_is_the_centred_reward_times_g_over_g_minus_1():
    rng = np.random.default_rng(0)
    G = 5
    reward = rng.standard_normal((2, G))
    others = [[np.delete(row, i).mean() for i in range(G)] for row in reward]
    args = (jnp.asarray(reward.ravel(), jnp.float32), jnp.ones(2 * G), G)
    ours = groups.leave_one_out(*args)
    np.testing.assert_allclose(ours, (reward - others).ravel(), atol=1e-6)
    np.testing.assert_allclose(ours, G / (G - 1) * groups.centered(*args), rtol=1e-6)


@pytest.mark.parametrize("G", [2, 8])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_expected_gradient_of_a_group_of_verdicts(p, G):
    # RLOO's is exact; without the standard deviation the own reward shrinks it.
    assert expected_ascent("leave_one_out", p, G) == pytest.approx(p * (1 - p), rel=1e-5)
    assert expected_ascent("centered", p, G) == pytest.approx((G - 1) / G * p * (1 - p), rel=1e-5)
    # GRPO's is the mean standard deviation of a group, not a gradient of the success rate.
    solved = np.arange(G + 1)
    std = np.sqrt(solved * (G - solved) / G / (G - 1))
    expected = (G - 1) / G * binomial(p, G) @ std
    assert expected_ascent("standardized", p, G) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_standardised_groups_ascend_the_arcsine_of_the_root_of_the_success_rate(p):
    # d/dlogit of 2 asin(sqrt(p)) is sqrt(p (1 - p)): hard and easy prompts count more than by p.
    assert expected_ascent("standardized", p, 400) == pytest.approx((p * (1 - p)) ** 0.5, rel=0.01)


# On-policy distillation: every response of two tokens.

V = 3


def unpack(z):
    """Logits of the first token [V] and, for each first token, of the second [V, V]."""
    return z[:V], z[V:].reshape(V, V)


def token_log_probs(z):
    """Log-probabilities of both tokens of every response, f32[V, V, 2]."""
    first, second = map(log_probs, unpack(z))
    return jnp.stack([jnp.broadcast_to(first[:, None], (V, V)), second], axis=-1)


def mean_over_responses(loss, z):
    """E over responses of the sum of both tokens' losses, f32[V, V, 2]; the law is a constant."""
    law = jax.lax.stop_gradient(jnp.exp(token_log_probs(z).sum(-1)))
    return (law[..., None] * loss).sum()


@jax.jit
@jax.grad
def distilled(z, teacher, reference, scale=1.0, discount=0.0):
    """Expected gradient of the distillation advantage; discount 1 adds that of later tokens."""
    logp = token_log_probs(z)
    adv = losses.distillation_advantage(
        token_log_probs(teacher), logp, token_log_probs(reference), scale
    )
    later = jnp.stack([adv[..., 1], jnp.zeros((V, V))], axis=-1)
    return mean_over_responses(losses.reinforce(logp, adv + discount * later), z)


@jax.jit
@jax.grad
def exact(z, teacher):
    """Expected gradient of kl(student||teacher) over the vocabulary at both visited prefixes."""
    (first, second), (first_p, second_p) = unpack(z), unpack(teacher)
    kl_first = stats.reverse_kl(first, first_p, jnp.int32(0))
    kl_second = stats.reverse_kl(second, second_p, jnp.zeros(V, jnp.int32))
    both = jnp.stack([jnp.broadcast_to(kl_first, V), kl_second], axis=-1)
    return mean_over_responses(jnp.broadcast_to(both[:, None], (V, V, 2)), z)


def response_law(z):
    """Probability of every response, f64[V, V]."""
    first, second = map(softmax, unpack(z))
    return first[:, None] * second


def sequence_kl(z, teacher):
    """kl(student||teacher) of whole responses."""
    return kl(response_law(z).ravel(), response_law(teacher).ravel())


def fixed_prefix_kl(z, teacher, visited):
    """Sum of both tokens' kl(student||teacher), prefixes drawn from `visited` [V]."""
    kl_first, kl_second = (
        kl(softmax(a), softmax(b)) for a, b in zip(unpack(z), unpack(teacher), strict=True)
    )
    return kl_first + visited @ kl_second


def students_and_teachers():
    rng = np.random.default_rng(0)
    for _ in range(3):
        yield rng.standard_normal((2, V + V * V))


def test_opd_expected_gradient_is_that_of_the_kl_at_fixed_prefixes():
    for z, teacher in students_and_teachers():
        visited = softmax(unpack(z)[0])
        expected = slope(lambda z, p=teacher, v=visited: fixed_prefix_kl(z, p, v), z)
        np.testing.assert_allclose(distilled(z, teacher, teacher), expected, atol=1e-6)
        np.testing.assert_allclose(exact(z, teacher), expected, atol=1e-6)


def test_opd_expected_gradient_is_not_that_of_the_kl_of_responses():
    for z, teacher in students_and_teachers():
        expected = slope(lambda z, p=teacher: sequence_kl(z, p), z)
        ours = distilled(z, teacher, teacher)
        # What is missing is that the first token decides which prefix comes next.
        first, second = map(softmax, unpack(z))
        later = kl(second, softmax(unpack(teacher)[1]))
        np.testing.assert_allclose(
            (expected - ours)[:V], first * (later - first @ later), atol=1e-6
        )
        np.testing.assert_allclose((expected - ours)[V:], 0, atol=1e-6)
        assert np.abs(expected - ours).max() > 0.04
        # With the later tokens' advantages added, nothing is.
        ours = distilled(z, teacher, teacher, discount=1.0)
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_opd_does_not_avoid_a_prefix_at_which_it_differs_from_the_teacher():
    # Both draw the first token alike; after token 0 alone they differ, by log 2 nats.
    student = np.array([[1, 1, 1], [1, 1, 1e-9], [1, 1, 1], [1, 1, 1]]) / 3
    teacher = np.array([[1, 1, 1], [1, 1e-9, 1e-9], [1, 1, 1], [1, 1, 1]]) / 3
    student, teacher = (np.log(x / x.sum(1, keepdims=True)).ravel() for x in (student, teacher))
    later = sequence_kl(student, teacher) * 3
    expected = slope(lambda z: sequence_kl(z, teacher), student)[:V]
    np.testing.assert_allclose(expected, later * np.array([2, -1, -1]) / 9, atol=1e-6)
    np.testing.assert_allclose(distilled(student, teacher, teacher)[:V], 0, atol=1e-6)


# ExOPD: a reward of `scale` times the teacher's log-ratio to a reference.


def exopd_objective(z, teacher, reference, scale):
    """kl(policy||reference) - scale E log(teacher / reference); to be minimised."""
    q = softmax(z)
    return kl(q, reference) - scale * q @ np.log(teacher / reference)


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.25])
def test_exopd_expected_gradient_and_optimum_at_one_position(scale):
    rng = np.random.default_rng(0)
    teacher, reference = random_distributions(rng, 2, V)
    teacher_logp, reference_logp = log_probs(log(teacher)), log_probs(log(reference))

    def advantage(logp):
        return losses.distillation_advantage(teacher_logp, logp, reference_logp, scale)

    z = rng.standard_normal(V)
    sampled = expected_gradient(lambda x: losses.reinforce(x, advantage(x)), jnp.array(z))
    expected = slope(lambda z: exopd_objective(z, teacher, reference, scale), z)
    np.testing.assert_allclose(sampled, expected, atol=1e-6)

    # log pi = scale log p_T + (1 - scale) log p_ref + const: no token is better than another.
    best = scale * np.log(teacher) + (1 - scale) * np.log(reference)
    A = np.asarray(advantage(log_probs(jnp.array(best))))
    np.testing.assert_allclose(A, np.log(np.exp(best).sum()), atol=1e-6)
    others = [exopd_objective(x, teacher, reference, scale) for x in rng.standard_normal((200, V))]
    assert exopd_objective(best, teacher, reference, scale) < min(others)


@pytest.mark.parametrize(("scale", "stays"), [(1.0, True), (1.25, False)])
def test_exopd_token_by_token_has_another_optimum_than_the_papers_unless_it_is_opd(scale, stays):
    teacher, reference = np.random.default_rng(0).standard_normal((2, V + V * V))
    best = response_law(teacher) ** scale * response_law(reference) ** (1 - scale)
    first = best.sum(1)
    z = np.concatenate([np.log(first), np.log(best / first[:, None]).ravel()])
    for discount in (0.0, 1.0):
        size = np.abs(distilled(z, teacher, reference, scale, discount)).max()
        assert size < 1e-6 if stays or discount else size > 0.01


# Surrogates away from the policy that sampled.

LOG_RATIO = jnp.array([[0.01, -0.02, 0.03, 0.0], [0.2, -0.1, 0.0, 0.0], [-0.4, -0.1, -0.2, 0.1]])
MASK = jnp.array([[1.0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])


def gspo_and_gspo_token(adv_t, low=0.2, high=0.28):
    """d (averaged loss) / d logp of GSPO and of its token variant (2507.18071 Eq. 13, 14)."""
    old = jnp.zeros_like(LOG_RATIO)
    s = losses.sequence_ratio(LOG_RATIO, old, MASK)
    # sg[s] pi / sg[pi] is PPO's ratio to an old policy that is s times less likely everywhere.
    detached = LOG_RATIO - jnp.log(s)

    def gspo(logp):
        return losses.gspo(logp, old, adv_t, MASK, low, high)

    def gspo_token(logp):
        return losses.ppo(logp, detached, adv_t, low, high)

    weight = losses.sequence_mean(MASK)
    return [
        np.asarray(jax.grad(lambda x, f=f: losses.weighted_sum(f(x), weight))(LOG_RATIO))
        for f in (gspo, gspo_token)
    ]


def test_gspo_token_has_gspos_gradient_when_a_row_has_one_advantage():
    A = np.array([1.0, -2.0, 0.5])
    sequence, token = gspo_and_gspo_token(jnp.broadcast_to(A[:, None], MASK.shape))
    mask, length = np.asarray(MASK), np.asarray(MASK).sum(1)
    s = np.exp((np.asarray(LOG_RATIO, np.float64) * mask).sum(1) / length)
    expected = -(s * A / length / 3)[:, None] * mask
    np.testing.assert_allclose(sequence, expected, atol=1e-7)
    np.testing.assert_allclose(token, expected, atol=1e-7)
    # Both clip whole rows: the second row's ratio is 1.05, the others' stay within 4 %.
    for ours in gspo_and_gspo_token(jnp.ones_like(MASK), 0.2, 0.04):
        np.testing.assert_array_equal(ours.any(1), [True, False, True])


def test_gspo_spreads_the_credit_of_tokens_over_their_row_and_gspo_token_does_not():
    adv_t = jnp.array([[3.0, 0, 0, 0], [1, 1, 0, 0], [1, -1, 1, -1]])
    sequence, token = gspo_and_gspo_token(adv_t)
    mean = (np.asarray(adv_t) * MASK).sum(1, keepdims=True) / np.asarray(MASK).sum(1, keepdims=True)
    even, _ = gspo_and_gspo_token(jnp.asarray(mean) * jnp.ones_like(MASK))
    np.testing.assert_allclose(sequence, even, atol=1e-7)
    assert (token[0, 1:] == 0).all() and (sequence[0, :3] != 0).all()
    # A row whose credits cancel has no gradient left, whatever they were.
    np.testing.assert_allclose(sequence[2], 0, atol=1e-7)
    assert token[2].all()


def test_cispo_keeps_the_gradient_of_tokens_that_ppo_drops():
    old, new = np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.3, 0.3, 0.2]])
    A, z = np.array([1.0, -1.0, 2.0, -1.0]), np.log(new)
    old_logp, adv = log_probs(log(old)), jnp.asarray(A, jnp.float32)
    # Uncapped, averaged over the old policy, it is the policy gradient of the new one.
    sampled = expected_gradient(lambda x: losses.cispo(x, old_logp, adv, np.inf), jnp.array(z), old)
    np.testing.assert_allclose(sampled, slope(lambda z: -softmax(z) @ A, z), atol=1e-6)

    # d log pi(v) / d z = e_v - pi; each token contributes ratio times advantage times that.
    ratio = new / old  # 2, 1.5, 1, 0.5
    each = -(old * ratio * A)[:, None] * (np.eye(4) - new)
    capped = np.minimum(ratio, 1.28) / ratio
    ours = expected_gradient(lambda x: losses.cispo(x, old_logp, adv, 1.28), jnp.array(z), old)
    np.testing.assert_allclose(ours, capped @ each, atol=1e-6)
    ours = expected_gradient(lambda x: losses.ppo(x, old_logp, adv, 0.2, 0.28), jnp.array(z), old)
    np.testing.assert_allclose(ours, each[1] + each[2], atol=1e-6)
