"""The papers' theorems on small vocabularies, by enumeration, with the package's own functions.

One section a paper; what estimators and surrogates estimate is in test_theory_estimators.py.

Where a paper's statement is not exactly true, the exact form is tested and the paper's is shown to
fail.
"""

from itertools import product
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumeration import (
    binomial,
    divergence,
    gaps,
    gradient,
    kl,
    log,
    log_prob_gradients,
    one_group_of_each_count,
    random_distributions,
    slope,
    softmax,
)

from jaxrl_sd import groups, stats
from jaxrl_sd.methods.cast import cast, token_advantage
from jaxrl_sd.methods.rlsd import evidence_weight

# RLSD: a teacher that knows one of two answers.

P_T = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])  # given answer 0, given answer 1
P_S = np.array([0.4, 0.35, 0.25])
P_MEAN = np.array([0.4, 0.25, 0.35])


def mean_divergence(stat, student):
    return np.mean([divergence(stat, student, p) for p in P_T])


def test_rlsd_theorem_1_mutual_information_is_a_floor_of_forward_kl():
    total, best = mean_divergence(stats.forward_kl, P_S), divergence(stats.forward_kl, P_S, P_MEAN)
    floor = mean_divergence(stats.forward_kl, P_MEAN)
    np.testing.assert_allclose(
        [total, best, floor], [0.264292711566, 0.033647223662, 0.230645487904], atol=1e-6
    )
    information = np.mean([kl(p, P_MEAN) for p in P_T])  # of token and answer
    assert floor == pytest.approx(information, abs=1e-6)
    rng = np.random.default_rng(0)
    for student in random_distributions(rng, 20, 3):
        gap = mean_divergence(stats.forward_kl, student)
        gap -= divergence(stats.forward_kl, student, P_MEAN)
        assert gap == pytest.approx(floor, abs=1e-5)


def test_rlsd_theorem_1_has_another_floor_under_reverse_kl():
    geometric = np.exp(np.log(P_T).mean(0))
    normalizer = geometric.sum()
    geometric /= normalizer
    np.testing.assert_allclose(geometric, [0.350675, 0.324662, 0.324662], atol=1e-6)
    assert normalizer == pytest.approx(0.754473, abs=1e-6)
    floor = mean_divergence(stats.reverse_kl, geometric)
    assert floor == pytest.approx(0.281736, abs=1e-6)
    assert floor == pytest.approx(-np.log(normalizer), abs=1e-6)
    for student in (P_S, P_MEAN, *random_distributions(np.random.default_rng(0), 20, 3)):
        excess = divergence(stats.reverse_kl, student, geometric)
        total = mean_divergence(stats.reverse_kl, student)
        assert total == pytest.approx(floor + excess, abs=1e-5)
        assert total > floor


def deviations(student, teachers):
    """Each answer's gradient minus the mean gradient, and d log P_S / d logits."""
    gradients = np.array([gradient(stats.forward_kl, log(student), log(p)) for p in teachers])
    return gradients - gradients.mean(0), log_prob_gradients(log(student))


def variance_of_gradient(student, teachers):
    """E||delta||^2, its exact form tr(J^T Cov J), and the paper's diagonal form."""
    delta, J = deviations(student, teachers)
    cov = np.cov(teachers.T, bias=True)
    diagonal = (np.diag(cov) * (J**2).sum(1)).sum()
    return (delta**2).sum(1).mean(), np.trace(J.T @ cov @ J), diagonal


def test_rlsd_proposition_1_gradient_and_its_deviation():
    g = np.array([gradient(stats.forward_kl, log(P_S), log(p)) for p in P_T])
    np.testing.assert_allclose(g, P_S - P_T, atol=1e-6)
    np.testing.assert_allclose(g.mean(0), [0, 0.1, -0.1], atol=1e-6)
    delta, _ = deviations(P_S, P_T)
    np.testing.assert_allclose(delta, P_MEAN - P_T, atol=1e-6)


def test_rlsd_proposition_1_variance_is_neither_the_diagonal_form_nor_bounded_by_it():
    actual, exact, diagonal = variance_of_gradient(P_S, P_T)
    assert actual == pytest.approx(0.155, abs=1e-6)
    assert exact == pytest.approx(0.155, abs=1e-6)
    assert P_T.var(0).sum() == pytest.approx(0.155)
    assert diagonal == pytest.approx(0.103475, abs=1e-6)
    above = []
    for distributions in random_distributions(np.random.default_rng(0), 20, 3, 3):
        actual, exact, diagonal = variance_of_gradient(distributions[0], distributions[1:])
        assert actual == pytest.approx(exact, rel=1e-4)
        above.append(actual > diagonal)
    assert 0 < sum(above) < len(above)


def test_rlsd_theorem_4_gaps_add_up_to_what_the_response_says_about_the_answer():
    # One joint law of 3 answers and 3 tokens out of 5.
    joint = random_distributions(np.random.default_rng(0), 3 * 5**3).reshape(3, 5, 5, 5)
    for r, tokens in product(range(3), product(range(5), repeat=3)):
        total, prior = 0.0, joint[r].sum() / joint.sum()
        for t in range(3):
            prefix = joint[(slice(None), *tokens[:t])].reshape(3, 5, -1).sum(-1)
            gap = stats.log_prob_gap(log(prefix.sum(0)), log(prefix[r]), np.int32(tokens[t]))
            total += float(gap)
            posterior = prefix[r, tokens[t]] / prefix[:, tokens[t]].sum()
            assert total == pytest.approx(np.log(posterior / prior), abs=2e-6)


def multipliers(student, teacher, sign, eps_w):
    A, gap_t = jnp.full((1, 1), float(sign)), jnp.asarray(gaps(student, teacher))[None]
    return np.asarray(evidence_weight(A, gap_t, eps_w))[0]


@pytest.mark.parametrize(
    ("eps_w", "lam", "expected"),
    [
        (np.inf, 1.0, [0.3, -0.15, -0.15]),
        (0.2, 1.0, [0.096, -0.056, -0.040]),
        (0.2, 0.5, [0.048, -0.028, -0.020]),
    ],
)
def test_rlsd_theorem_5_in_expectation_the_answer_does_steer_the_direction(eps_w, lam, expected):
    w = multipliers(P_S, P_T[0], 1, eps_w)
    np.testing.assert_allclose(
        P_S @ (((1 - lam) + lam * w)[:, None] * log_prob_gradients(log(P_S))), expected, atol=1e-6
    )
    if eps_w == np.inf:
        descent = -gradient(stats.forward_kl, log(P_S), log(P_T[0]))
        np.testing.assert_allclose(expected, descent, atol=1e-6)


def test_rlsd_theorem_5_wrong_answers_are_steered_to_the_teacher_too():
    # A = -1: -E[(P_S / P_T) grad log P_S], half the descent of chi2(P_S||P_T).
    for student, teacher in random_distributions(np.random.default_rng(0), 20, 2, 4):
        w = multipliers(student, teacher, -1, np.inf)
        ascent = -student @ (w[:, None] * log_prob_gradients(log(student)))
        descent = -slope(lambda z, p=teacher: (softmax(z) ** 2 / p).sum() / 2, np.log(student))
        np.testing.assert_allclose(ascent, descent, rtol=1e-4, atol=1e-4)
    clipped = multipliers(P_S, P_T[0], -1, 0.2)
    ascent = -P_S @ (clipped[:, None] * log_prob_gradients(log(P_S)))
    np.testing.assert_allclose(ascent, [0.096, -0.056, -0.040], atol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "praise", "blame"),
    [(P_S, P_T[0], 0.96, 1.04), ([0.9, 0.1], [0.99, 0.01], 1.07, 0.93818)],
)
def test_rlsd_clipped_weights_shift_mass_between_praise_and_blame_either_way(
    student, teacher, praise, blame
):
    for sign, mean in [(1, praise), (-1, blame)]:
        assert student @ multipliers(student, teacher, sign, 0.2) == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("teacher", P_T)
def test_rlsd_moments_of_the_gap(teacher):
    gap = gaps(P_S, teacher)
    assert P_S @ np.exp(gap) == pytest.approx(1, abs=1e-6)
    kl = divergence(stats.reverse_kl, P_S, teacher)
    assert P_S @ gap == pytest.approx(-kl, abs=1e-6) and kl > 0
    chi2 = ((P_S - teacher) ** 2 / teacher).sum()
    assert P_S @ np.exp(-gap) == pytest.approx(1 + chi2, abs=1e-5)


# CAST: whose sign the advantage of a token has.


def random_tokens(rng):
    """Random (B [N, 1] > 0, g [N, T] != 0) from rounding to far beyond every bound."""
    scale = rng.choice([1e-6, 0.03, 1, 30], (100, 1))
    return jnp.asarray(rng.uniform(0.01, 3, (100, 1))), jnp.asarray(
        scale * rng.standard_normal((100, 20))
    )


def random_bounds(rng, least_high=0.0):
    low = rng.uniform(0, 2)
    return low, max(low, least_high) + rng.uniform(0, 2)


def test_cast_the_sign_of_the_verdict_does_not_matter_where_there_is_a_gap():
    # For every strength and all bounds, not the default ones alone.
    rng = np.random.default_rng(0)
    for _ in range(20):
        B, g = random_tokens(rng)
        knobs = rng.uniform(0, 3), random_bounds(rng), random_bounds(rng), rng.uniform(0.1, 3)
        correct, wrong = (token_advantage(sign * B, g, *knobs) for sign in (1, -1))
        np.testing.assert_array_equal(correct, wrong)
    without_a_gap = [token_advantage(sign * B, 0 * g) for sign in (1, -1)]
    np.testing.assert_array_equal(without_a_gap[0], -without_a_gap[1])
    without_flips = [token_advantage(sign * B, g, flip=False) for sign in (1, -1)]
    assert (jnp.sign(without_flips[0]) == -jnp.sign(without_flips[1])).all()


def test_cast_the_sign_is_that_of_the_gap_if_the_upper_bounds_are_at_least_1():
    rng = np.random.default_rng(1)
    for _ in range(20):
        B, g = random_tokens(rng)
        bounds = random_bounds(rng, 1.0), random_bounds(rng, 1.0)
        for sign in (1, -1):
            A = token_advantage(sign * B, g, rng.uniform(0, 3), *bounds)
            assert (jnp.sign(A) == jnp.sign(g)).all()
    B, g = jnp.ones((1, 1)), jnp.ones((1, 1))
    below = token_advantage(B, g, 3.0, (0.4, 0.5))
    assert below[0, 0] == pytest.approx(-0.5)  # 1 + 3 (0.5 - 1)


def test_cast_lower_bounds_up_to_1_do_nothing_once_both_flips_are_on():
    B, g = random_tokens(np.random.default_rng(2))
    for sign in (1, -1):
        default = token_advantage(sign * B, g)
        without = token_advantage(sign * B, g, 1.0, (0.0, 1.05), (0.0, 1.2))
        np.testing.assert_array_equal(default, without)


def test_cast_trains_all_correct_and_all_wrong_groups_alike_but_for_tokens_without_a_gap():
    g = np.random.default_rng(0).standard_normal((4, 6))
    g[:, 0] = 0.0
    ones = jnp.ones(4)

    def credit(correct):
        rollouts = SimpleNamespace(
            mask_t=jnp.ones((4, 6)), reward=correct, correct=correct, graded=ones, group_size=4
        )
        batch = SimpleNamespace(rollouts=rollouts, scores={"gap": jnp.asarray(g)})
        return cast().credit(batch, 0)[0].adv_t

    correct, wrong = credit(ones), credit(0 * ones)
    np.testing.assert_array_equal(correct[:, 1:], wrong[:, 1:])
    np.testing.assert_array_equal(correct[:, 0], 1)
    np.testing.assert_array_equal(wrong[:, 0], -1)


# OPSD: what capping each vocabulary entry does.


def capped_forward_kl(z, p, tau):
    return np.minimum(p * np.log(p / softmax(z)), tau).sum()


@pytest.mark.parametrize("tau", [0.01, 0.05, 0.3])
def test_opsd_a_capped_token_is_always_pushed_down(tau):
    capped_kl, num_capped = stats.clipped_forward_kl(tau), 0
    for q, p in random_distributions(np.random.default_rng(0), 10, 2, 5):
        ours = gradient(capped_kl, log(q), log(p))
        np.testing.assert_allclose(
            ours, slope(lambda z, p=p: capped_forward_kl(z, p, tau), np.log(q)), atol=1e-6
        )
        # Those whom the teacher wants most lose to the others: q times the mass not capped.
        capped = p * np.log(p / q) > tau
        np.testing.assert_allclose(ours[capped], q[capped] * p[~capped].sum(), atol=1e-6)
        assert (ours[capped] > 0).all()
        num_capped += capped.sum()
    assert num_capped > 5


def test_opsd_the_capped_divergence_is_not_lowest_at_the_teacher():
    p = softmax([2, 1, 0, -2])
    capped = stats.clipped_forward_kl(0.05)
    assert divergence(capped, p, p) == pytest.approx(0, abs=1e-6)
    # A student that has given up the teacher's first choice, and agrees on the rest.
    q = np.where(np.arange(4) == 0, 1e-4, p * (1 - 1e-4) / (1 - p[0]))
    assert divergence(capped, q, p) == pytest.approx(0.05 + (1 - p[0]) * np.log(1 - p[0]), abs=1e-4)
    assert divergence(capped, q, p) < -0.3
    assert divergence(stats.forward_kl, q, p) > 5


# SC-GRPO: what an average over several verified solutions converges to.

TWO = np.array([[0.8999, 1e-4, 0.1], [1e-4, 0.8999, 0.1]])


def mixtures(rng):
    """Random (weights mu [J], teachers p [J, V], student q [V])."""
    for _ in range(20):
        mu, q = random_distributions(rng, 4), random_distributions(rng, 6)
        yield mu, random_distributions(rng, 4, 6), q


def weighted(stat, mu, student, teachers):
    return sum(m * divergence(stat, student, p) for m, p in zip(mu, teachers, strict=True))


def geometric_mean(mu, teachers):
    g = np.exp(mu @ np.log(teachers))
    return g / g.sum(), g.sum()


def test_sc_grpo_forward_kl_to_several_teachers_is_forward_kl_to_their_mean_and_a_constant():
    for mu, teachers, q in mixtures(np.random.default_rng(0)):
        mean = mu @ teachers
        disagreement = weighted(stats.forward_kl, mu, mean, teachers)
        expected = disagreement + divergence(stats.forward_kl, q, mean)
        total = weighted(stats.forward_kl, mu, q, teachers)
        assert total == pytest.approx(expected, rel=1e-5)
        slopes = [gradient(stats.forward_kl, log(q), log(p)) for p in teachers]
        np.testing.assert_allclose(
            mu @ slopes, gradient(stats.forward_kl, log(q), log(mean)), atol=1e-6
        )


def test_sc_grpo_reverse_kl_to_several_teachers_is_reverse_kl_to_their_geometric_mean():
    for mu, teachers, q in mixtures(np.random.default_rng(1)):
        g, normalizer = geometric_mean(mu, teachers)
        expected = divergence(stats.reverse_kl, q, g) - np.log(normalizer)
        total = weighted(stats.reverse_kl, mu, q, teachers)
        assert total == pytest.approx(expected, rel=1e-5)


def test_sc_grpo_golden_example():
    half = np.array([0.5, 0.5])
    mean = half @ TWO
    g, normalizer = geometric_mean(half, TWO)
    np.testing.assert_allclose(mean, [0.45, 0.45, 0.1], atol=1e-6)
    np.testing.assert_allclose(g, [0.079735, 0.079735, 0.840530], atol=1e-6)
    assert normalizer == pytest.approx(0.1189726, abs=1e-7)
    forward_min = weighted(stats.forward_kl, half, mean, TWO)
    reverse_min = weighted(stats.reverse_kl, half, g, TWO)
    assert forward_min == pytest.approx(0.622822, abs=1e-6)
    assert reverse_min == pytest.approx(2.128862, abs=1e-6)
    # The forward minimum is the Jensen-Shannon divergence of the two teachers.
    jsd = divergence(stats.generalized_jsd(0.5), *TWO)
    assert forward_min == pytest.approx(jsd, abs=1e-6)

    q = jnp.asarray(log(random_distributions(np.random.default_rng(0), 1000, 3)))
    tokens = jnp.zeros(1000, int)
    for stat, minimum in [(stats.forward_kl, forward_min), (stats.reverse_kl, reverse_min)]:
        each = [stat(q, jnp.broadcast_to(log(p), q.shape), tokens) for p in TWO]
        assert np.mean(each, axis=0).min() > minimum
    for stat, optimum in [(stats.forward_kl, mean), (stats.reverse_kl, g)]:
        slopes = [gradient(stat, log(optimum), log(p)) for p in TWO]
        np.testing.assert_allclose(half @ slopes, 0, atol=1e-6)


# HSD: hindsight on a binary tree. A tree is {prefix: next-token distribution} and a set of
# successful leaves.


def value(tree, successes, prefix):
    """Pr[success | prefix]."""
    if prefix not in tree:
        return float(prefix in successes)
    return sum(
        p * value(tree, successes, prefix + c) for c, p in zip("ab", tree[prefix], strict=True)
    )


def hindsight(tree, successes, prefix):
    """pi+(.|prefix): the law of the next token among successful continuations. Prop. 1."""
    values = np.array([value(tree, successes, prefix + c) for c in "ab"])
    return np.array(tree[prefix]) * values / value(tree, successes, prefix)


def ideal_credit(tree, successes, prefix, token):
    """log pi+(token) - log pi(token): the gap to a teacher that has seen the future."""
    teacher = log(hindsight(tree, successes, prefix))
    return float(stats.log_prob_gap(log(tree[prefix]), teacher, np.int32("ab".index(token))))


def random_tree(rng, depth=4):
    prefixes = ["".join(p) for n in range(depth) for p in product("ab", repeat=n)]
    tree = {prefix: rng.dirichlet([1, 1]) for prefix in prefixes}
    leaves = ["".join(p) for p in product("ab", repeat=depth)]
    return tree, {leaf for leaf in leaves if rng.random() < 0.3} | {"a" * depth}


GOLDEN_TREE = {"": [0.6, 0.4], "a": [0.5, 0.5], "b": [0.25, 0.75]}
GOLDEN_SUCCESSES = {"aa", "bb"}


def test_hsd_proposition_1_golden_tree():
    args = (GOLDEN_TREE, GOLDEN_SUCCESSES)
    values = [value(*args, prefix) for prefix in ("", "a", "b")]
    np.testing.assert_allclose(values, [0.6, 0.5, 0.75])
    np.testing.assert_allclose(hindsight(*args, ""), [0.5, 0.5])
    np.testing.assert_allclose(hindsight(*args, "a"), [1, 0])
    assert ideal_credit(*args, "", "a") == pytest.approx(-0.182322, abs=1e-6)
    assert ideal_credit(*args, "", "b") == pytest.approx(0.223144, abs=1e-6)


def test_hsd_ideal_credit_is_the_relative_advantage():
    tree, successes = random_tree(np.random.default_rng(0))
    for prefix in tree:
        V = value(tree, successes, prefix)
        for token in "ab":
            V_next = value(tree, successes, prefix + token)
            if V_next > 0:
                credit = ideal_credit(tree, successes, prefix, token)
                assert credit == pytest.approx(np.log1p((V_next - V) / V), abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hsd_rejection_sampling_is_the_hindsight_policy(seed):
    tree, successes = random_tree(np.random.default_rng(seed))
    Z = value(tree, successes, "")
    for leaf in successes:
        policy_logp = credit = 0.0
        for t, token in enumerate(leaf):
            policy_logp += np.log(tree[leaf[:t]]["ab".index(token)])
            credit += ideal_credit(tree, successes, leaf[:t], token)
        # pi+(o) = pi(o) R(o) / Z: along every success the credits add up to -log Z.
        assert credit == pytest.approx(-np.log(Z), abs=1e-5)
        assert np.exp(policy_logp + credit) == pytest.approx(np.exp(policy_logp) / Z, rel=1e-5)


def test_hsd_a_successful_peer_marks_a_supported_direction():
    tree, successes = random_tree(np.random.default_rng(3))
    for peer in successes:
        for t in range(len(peer)):
            token, rest = "ab".index(peer[t]), 1.0
            assert hindsight(tree, successes, peer[:t])[token] > 0
            for s in range(t + 1, len(peer)):
                rest *= tree[peer[:s]]["ab".index(peer[s])]
            assert value(tree, successes, peer[: t + 1]) >= rest * (1 - 1e-9)


def test_hsd_proposition_2_information_about_the_answer_is_the_mean_sum_of_gaps():
    # 4 answers, 3 binary tokens.
    joint = random_distributions(np.random.default_rng(0), 4 * 8).reshape(4, 2, 2, 2)
    information = 0.0
    for a, tokens in product(range(4), product(range(2), repeat=3)):
        for t in range(3):
            prefix = joint[(slice(None), *tokens[:t])].reshape(4, 2, -1).sum(-1)
            gap = stats.log_prob_gap(log(prefix.sum(0)), log(prefix[a]), np.int32(tokens[t]))
            information += joint[(a, *tokens)] * float(gap)
    answer, response = joint.sum((1, 2, 3)), joint.sum(0)
    independent = answer[:, None, None, None] * response
    assert information == pytest.approx((joint * np.log(joint / independent)).sum(), abs=1e-6)
    entropy = stats.entropy(log(answer), log(answer), np.int32(0))
    assert 0 < information <= entropy <= np.log(4)


def test_hsd_proposition_2_bounds_the_mean_and_not_the_gap_of_one_token():
    # A rare answer whose first token gives it away.
    answer, token = np.array([0.01, 0.99]), np.array([[0.98, 0.02], [0.02, 0.98]])
    gap = stats.log_prob_gap(log(answer @ token), log(token[0]), np.int32(0))
    assert float(gap) > 3 > np.log(2) > -(answer @ np.log(answer))


def test_hsd_the_answer_of_an_aime_problem_holds_at_most_7_nats():
    uniform = jnp.zeros(1000)
    assert stats.entropy(uniform, uniform, np.int32(0)) == pytest.approx(6.9, abs=0.01)


def test_hsd_gradients_towards_single_peers_average_to_the_hindsight_policy():
    rng = np.random.default_rng(0)
    student = jnp.asarray(rng.standard_normal(5), jnp.float32)
    pi_plus = random_distributions(rng, 5)
    to_peer = np.array([gradient(stats.forward_kl, student, log(row)) for row in np.eye(5)])
    softmax = np.asarray(jax.nn.softmax(student))
    np.testing.assert_allclose(to_peer, softmax - np.eye(5), atol=1e-6)
    averaged = pi_plus @ to_peer
    np.testing.assert_allclose(averaged, softmax - pi_plus, atol=1e-6)
    np.testing.assert_allclose(
        averaged, gradient(stats.forward_kl, student, log(pi_plus)), atol=1e-6
    )
    # At a position chosen *because* peer and rollout part there, the peer's token is another one.
    own = 2
    parted = np.where(np.arange(5) == own, 0, pi_plus) / (1 - pi_plus[own])
    np.testing.assert_allclose(parted @ to_peer, softmax - parted, atol=1e-6)
    assert np.abs(parted @ to_peer - averaged).max() > 0.01


def test_hsd_gradient_of_the_loss_is_student_minus_teacher():
    rng = np.random.default_rng(1)
    student, teacher = random_distributions(rng, 2, 9)
    ours = gradient(stats.forward_kl, log(student), log(teacher))
    np.testing.assert_allclose(ours, student - teacher, atol=1e-6)


def coverage(p, G):
    """Probabilities, over groups whose rows succeed with probability p each, that a row
    (fails and has a successful peer, has a successful peer)."""
    correct = one_group_of_each_count(G)
    n_correct = groups.num_correct(jnp.asarray(correct.ravel()), jnp.ones(correct.size), G)
    peers = np.asarray(n_correct).reshape(correct.shape) - correct
    failing = ((correct == 0) & (peers > 0)).mean(1)
    return binomial(p, G) @ failing, binomial(p, G) @ (peers > 0).mean(1)


def coverage_formula(p, G):
    return (1 - p) * (1 - (1 - p) ** (G - 1))


@pytest.mark.parametrize(
    ("p", "G", "expected"), [(0.22, 8, 0.642989), (0.25, 8, 0.649887), (0.8, 8, 0.199997)]
)
def test_hsd_golden_coverage(p, G, expected):
    failing, any_row = coverage(p, G)
    assert failing == pytest.approx(expected, abs=1e-6)
    assert failing == pytest.approx(coverage_formula(p, G), abs=1e-6)
    assert any_row == pytest.approx(1 - (1 - p) ** (G - 1), abs=1e-6)


@pytest.mark.parametrize(
    ("G", "p_best", "best", "p_printed", "printed"),
    [
        (4, 0.3700, 0.4725, 0.370, 0.422),
        (8, 0.2570, 0.6501, 0.250, 0.344),
        (16, 0.1688, 0.7793, 0.171, 0.272),
        (32, 0.1058, 0.8663, 0.119, 0.214),
        (64, 0.0639, 0.9215, 0.085, 0.167),
    ],
)
def test_hsd_best_coverage_is_the_formulas_and_not_table_2s(G, p_best, best, p_printed, printed):
    assert 1 - G ** (-1 / (G - 1)) == pytest.approx(p_best, abs=5e-5)
    assert (G - 1) * G ** (-G / (G - 1)) == pytest.approx(best, abs=5e-5)
    assert coverage(p_best, G)[0] == pytest.approx(best, abs=1e-4)
    # A maximum indeed, and Table 2's numbers are not those of the paper's own formula.
    assert coverage(p_best, G)[0] > max(coverage(p_best + step, G)[0] for step in (-0.02, 0.02))
    assert coverage(p_printed, G)[0] > printed + 0.04
