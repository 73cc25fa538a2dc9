"""Token statistics against float64 numpy: values, gradients, golden numbers, extreme logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxrl_sd import stats
from jaxrl_sd.vocabulary import MASKED

# The pair of distributions whose divergences are known to six digits.
TEACHER = np.array([2.0, 1.0, 0.0, -2.0], np.float32)
STUDENT = np.array([0.5, 1.0, 1.5, 0.0], np.float32)
TOKEN = np.int32(2)


# Every statistic again in float64: (log_q [..., V], log_p [..., V], token) -> [...].


def kl(log_a, log_b):
    return (np.exp(log_a) * (log_a - log_b)).sum(-1)


def jsd(beta):
    def value(log_q, log_p, token):
        log_m = np.log(beta * np.exp(log_p) + (1 - beta) * np.exp(log_q))
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)

    return value


def clipped(cap):
    return lambda q, p, token: np.minimum(np.exp(p) * (p - q), cap).sum(-1)


def on_top_k(divergence, k, of, rest):
    def tail(log_x):
        return np.log1p(-np.exp(log_x).sum(-1, keepdims=True))

    rests = {
        "tail": lambda log_x: np.concatenate([log_x, tail(log_x)], -1),
        "renormalize": lambda log_x: log_softmax(log_x, -1),
        "truncate": lambda log_x: log_x,
    }

    def value(log_q, log_p, token):
        log_q, log_p = np.broadcast_arrays(log_q, log_p)
        ids = np.argsort(-(log_q if of == "student" else log_p), axis=-1)[..., :k]
        q, p = (rests[rest](np.take_along_axis(x, ids, -1)) for x in (log_q, log_p))
        return divergence(q, p, token)

    return value


def reverse_kl(q, p, token):
    return kl(q, p)


def forward_kl(q, p, token):
    return kl(p, q)


RKL, FKL = stats.reverse_kl_of_log_probs, stats.forward_kl_of_log_probs
STATS = {
    "log_prob": (stats.log_prob, lambda q, p, i: q[..., i]),
    "log_prob_gap": (stats.log_prob_gap, lambda q, p, i: p[..., i] - q[..., i]),
    "entropy": (stats.entropy, lambda q, p, i: -(np.exp(q) * q).sum(-1)),
    "reverse_kl": (stats.reverse_kl, reverse_kl),
    "forward_kl": (stats.forward_kl, forward_kl),
    "clipped_forward_kl_loose": (stats.clipped_forward_kl(0.05), clipped(0.05)),
    "clipped_forward_kl_tight": (stats.clipped_forward_kl(1e-4), clipped(1e-4)),
    "jsd_0.1": (stats.generalized_jsd(0.1), jsd(0.1)),
    "jsd_0.5": (stats.generalized_jsd(0.5), jsd(0.5)),
    "jsd_0.9": (stats.generalized_jsd(0.9), jsd(0.9)),
    "rkl_student_tail": (
        stats.on_top_k(RKL, 3, "student", "tail"),
        on_top_k(reverse_kl, 3, "student", "tail"),
    ),
    "fkl_teacher_renormalize": (
        stats.on_top_k(FKL, 3, "teacher", "renormalize"),
        on_top_k(forward_kl, 3, "teacher", "renormalize"),
    ),
    "fkl_student_truncate": (
        stats.on_top_k(FKL, 3, "student", "truncate"),
        on_top_k(forward_kl, 3, "student", "truncate"),
    ),
    "jsd_student_tail": (
        stats.on_top_k(stats.jsd_of_log_probs(0.5), 3, "student", "tail"),
        on_top_k(jsd(0.5), 3, "student", "tail"),
    ),
}
DIVERGENCES = [name for name in STATS if name not in ("log_prob", "log_prob_gap", "entropy")]
WHOLE = [name for name in DIVERGENCES if "truncate" not in name]
ON_TOP_K = [name for name in DIVERGENCES if "student" in name or "teacher" in name]


# As XLA compiles for users: quicker code rounds more where student and teacher agree.
@partial(jax.jit, compiler_options={"xla_cpu_use_fusion_emitters": True})
def evaluate_all(student, teacher, token):
    """{name: (value [...], gradient with respect to the student [..., V])}, compiled together."""

    def both(stat):
        value, vjp = jax.vjp(lambda student: stat(student, teacher, token), student)
        return value, vjp(jnp.ones_like(value))[0]

    return {name: both(stat) for name, (stat, _) in STATS.items()}


def evaluate(name, student, teacher, token):
    value, gradient = evaluate_all(student, teacher, token)[name]
    return np.asarray(value, np.float64), np.asarray(gradient, np.float64)


def random_logits(vocab, eps, rows=4, seed=0):
    """Student randn * 10, teacher = student + eps * randn, tokens sampled from the student."""
    rng = np.random.default_rng([seed, vocab])
    student = (10 * rng.standard_normal((rows, vocab))).astype(np.float32)
    teacher = (student + eps * rng.standard_normal((rows, vocab))).astype(np.float32)
    token = (student + rng.gumbel(size=(rows, vocab))).argmax(-1).astype(np.int32)
    return student, teacher, token


def finite_differences(oracle, student, teacher, token, coordinates, h=1e-5):
    """Central differences in float64 of one row's statistic, [len(coordinates)]."""
    steps = np.zeros((len(coordinates), len(student)))
    steps[np.arange(len(coordinates)), coordinates] = h
    student, log_p = student.astype(np.float64), log_softmax(teacher.astype(np.float64))
    up, down = (oracle(log_softmax(student + s, -1), log_p, token) for s in (steps, -steps))
    return (up - down) / (2 * h)


@pytest.mark.parametrize("eps", [0.05, 3.0])
@pytest.mark.parametrize("vocab", [7, 151, 20000])
@pytest.mark.parametrize("name", STATS)
def test_value_and_gradient_equal_float64(name, vocab, eps):
    oracle = STATS[name][1]
    student, teacher, token = random_logits(vocab, eps)
    values, gradients = evaluate(name, student, teacher, token)
    # Only a whole distribution cancels the rounding of its normaliser.
    atol = 1e-8 if name in WHOLE else 3e-7
    for q, p, i, value, gradient in zip(student, teacher, token, values, gradients, strict=True):
        expected = oracle(log_softmax(q.astype(float)), log_softmax(p.astype(float)), i)
        np.testing.assert_allclose(value, expected, rtol=1e-3, atol=atol)
        # The whole vocabulary where it is small, else the entries that matter and a few that don't.
        coordinates = np.argsort(-np.abs(gradient))[: vocab if vocab < 1000 else 20]
        coordinates = np.unique([*coordinates, i, *range(0, vocab, vocab // 5)])
        expected = finite_differences(oracle, q, p, i, coordinates)
        error = np.abs(gradient[coordinates] - expected).max()
        assert error <= 1e-3 * np.abs(expected).max() + (atol if "truncate" in name else 0)


@pytest.mark.parametrize("eps", [1e-3, 1.0])
@pytest.mark.parametrize("vocab", [7, 20000])
def test_gradients_equal_their_closed_forms_on_every_entry(vocab, eps):
    student, teacher, token = random_logits(vocab, eps)
    log_q, log_p = (log_softmax(x.astype(np.float64), -1) for x in (student, teacher))
    q, p = np.exp(log_q), np.exp(log_p)
    onehot = (np.arange(vocab) == token[:, None]).astype(np.float64)
    expected = {
        "log_prob": onehot - q,
        "log_prob_gap": q - onehot,
        "entropy": -q * (log_q - (q * log_q).sum(-1, keepdims=True)),
        "reverse_kl": q * ((log_q - log_p) - kl(log_q, log_p)[:, None]),
        "forward_kl": q - p,
    }
    for name, gradient in expected.items():
        ours = evaluate(name, student, teacher, token)[1]
        np.testing.assert_allclose(
            np.linalg.norm(ours - gradient), 0, atol=1e-3 * np.linalg.norm(gradient), err_msg=name
        )


def test_a_nearly_equal_and_peaked_pair_keeps_its_digits():
    # One token has almost all mass, so the gradient is far below float32's rounding of 1.
    student = np.zeros((4, 7), np.float32)
    student[:, 0] = [12, 13, 14, 15]
    teacher = student + np.float32([0.05, -0.03, 0.04, 0.01, -0.05, 0.02, 0])
    log_q, log_p = (log_softmax(x.astype(np.float64), -1) for x in (student, teacher))
    gradient = np.exp(log_q) - np.exp(log_p)
    value, ours = evaluate("forward_kl", student, teacher, np.zeros(4, np.int32))
    np.testing.assert_allclose(value, kl(log_p, log_q), rtol=1e-2)
    for row in range(4):
        np.testing.assert_allclose(ours[row], gradient[row], atol=1e-2 * gradient[row].max())


def test_a_gap_is_as_exact_as_the_log_probabilities_and_not_the_logits():
    # Likely tokens of a large vocabulary: logits near 40, log-probabilities near 0.
    student, teacher, _ = random_logits(20000, 0.05)
    token = student.argmax(-1).astype(np.int32)
    log_q, log_p = (log_softmax(x.astype(np.float64), -1) for x in (student, teacher))
    expected = (log_p - log_q)[np.arange(4), token]
    ours = evaluate("log_prob_gap", student, teacher, token)[0]
    np.testing.assert_allclose(ours, expected, atol=4e-7)


def test_teacher_log_prob_ignores_the_student():
    student, teacher, token = map(jnp.asarray, random_logits(7, 1.0))
    value, gradient = jax.value_and_grad(
        lambda student: stats.teacher_log_prob(student, teacher, token).sum()
    )(student)
    np.testing.assert_allclose(value, stats.log_prob(teacher, student, token).sum(), rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0)


# Golden numbers of the pair above.


def golden(stat):
    return float(jax.jit(stat)(STUDENT, TEACHER, TOKEN))


def test_golden_distributions():
    p = [0.657233, 0.241783, 0.088947, 0.012038]
    q = [0.167405, 0.276004, 0.455054, 0.101536]
    tokens = jnp.arange(4)
    logits = [jnp.broadcast_to(x, (4, 4)) for x in (STUDENT, TEACHER)]
    np.testing.assert_allclose(np.exp(stats.log_prob(*logits, tokens)), q, atol=1e-6)
    np.testing.assert_allclose(np.exp(stats.teacher_log_prob(*logits, tokens)), p, atol=1e-6)
    np.testing.assert_allclose(
        stats.log_prob_gap(*logits, tokens), np.log(np.array(p) / q), atol=1e-4
    )


@pytest.mark.parametrize(
    ("stat", "expected"),
    [
        (stats.forward_kl, 0.695976),
        (stats.reverse_kl, 0.766924),
        (stats.generalized_jsd(0.1), 0.061101),
        (stats.generalized_jsd(0.5), 0.165875),
        (stats.generalized_jsd(0.9), 0.065407),
        # The ends are the two KLs, not the formula's limits, which are 0.
        (stats.generalized_jsd(0), 0.695976),
        (stats.generalized_jsd(1), 0.766924),
        (stats.clipped_forward_kl(0.05), -0.152870),
        (stats.clipped_forward_kl(0.3), 0.097130),
        (stats.clipped_forward_kl(float("inf")), 0.695976),
    ],
)
def test_golden_divergences(stat, expected):
    assert golden(stat) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("stat", "expected"),
    [
        (stats.forward_kl, [-0.489828, 0.034222, 0.366107, 0.089499]),
        (stats.reverse_kl, [-0.357334, -0.175138, 0.393828, 0.138643]),
        (stats.generalized_jsd(0.5), [-0.088836, -0.013241, 0.080696, 0.021382]),
        # The only positive entry is capped and silent: the gradient pushes down the student's
        # logit of the teacher's likeliest token.
        (stats.clipped_forward_kl(0.05), [0.057381, -0.147177, 0.067031, 0.022766]),
    ],
)
def test_golden_gradients(stat, expected):
    gradient = jax.jit(jax.grad(stat))(STUDENT, TEACHER, TOKEN)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_golden_entries_of_the_clipped_forward_kl():
    entries = [0.898846, -0.032007, -0.145195, -0.025669]
    # Lowering the cap below an entry removes exactly the excess of that entry.
    for cap in (0.5, 0.05, -0.01, -0.03, -0.1):
        expected = np.minimum(entries, cap).sum()
        assert golden(stats.clipped_forward_kl(cap)) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("divergence", "of", "rest", "expected"),
    [
        (RKL, "student", "tail", 0.534165),
        (FKL, "student", "tail", 0.432969),
        (stats.jsd_of_log_probs(0), "student", "tail", 0.432969),
        (stats.jsd_of_log_probs(1), "student", "tail", 0.534165),
        (stats.jsd_of_log_probs(0.5), "student", "tail", 0.112048),
        (RKL, "student", "renormalize", 0.272874),
        (FKL, "student", "renormalize", 0.257403),
        (stats.jsd_of_log_probs(0.5), "student", "renormalize", 0.064713),
        (FKL, "student", "truncate", -0.177202),
        (stats.jsd_of_log_probs(0), "student", "truncate", -0.177202),
        (RKL, "teacher", "tail", 0.757614),
        (FKL, "teacher", "tail", 0.694473),
        (stats.jsd_of_log_probs(0.5), "teacher", "tail", 0.165229),
        (FKL, "teacher", "truncate", 0.866840),
    ],
)
def test_golden_divergences_on_the_two_likeliest_tokens(divergence, of, rest, expected):
    assert golden(stats.on_top_k(divergence, 2, of, rest)) == pytest.approx(expected, abs=1e-6)


def test_golden_classes_on_the_two_likeliest_tokens_and_the_tail():
    def classes(pick):
        def divergence(*log_qp, whole):
            assert whole
            return jnp.exp(log_qp[pick])

        stat = stats.on_top_k(divergence, 2, "student", "tail")
        return stat(jnp.array(STUDENT), jnp.array(TEACHER), TOKEN)

    np.testing.assert_allclose(classes(0), [0.455054, 0.276004, 0.268941], atol=1e-6)
    np.testing.assert_allclose(classes(1), [0.088947, 0.241783, 0.669271], atol=1e-6)


def test_the_kl_of_two_coins_shows_its_direction():
    half, coin = jnp.zeros(2), jnp.log(jnp.array([0.9, 0.1]))
    assert stats.forward_kl(half, coin, TOKEN) == pytest.approx(0.368064, abs=1e-6)
    assert stats.reverse_kl(half, coin, TOKEN) == pytest.approx(0.510826, abs=1e-6)


# Properties.


@pytest.mark.parametrize("eps", [0.05, 3.0])
def test_jsd_half_is_symmetric_and_at_most_log_2(eps):
    student, teacher, token = random_logits(151, eps)
    there, back = (
        evaluate("jsd_0.5", *pair, token)[0] for pair in ((student, teacher), (teacher, student))
    )
    np.testing.assert_allclose(there, back, rtol=1e-4, atol=1e-9)
    assert there.max() <= np.log(2) + 1e-6


def test_jsd_of_disjoint_distributions_is_log_2():
    far = jnp.array([200.0, -200.0])
    value = stats.generalized_jsd(0.5)(far, -far, TOKEN)
    assert value == pytest.approx(np.log(2), abs=1e-6)


# A truncated KL is not flat at equality: moving mass onto the support lowers it.
@pytest.mark.parametrize("name", WHOLE)
def test_equal_distributions_have_no_divergence_and_no_gradient(name):
    student, _, token = random_logits(151, 0.0)
    value, gradient = evaluate(name, student, student, token)
    np.testing.assert_allclose(value, 0, atol=1e-12)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_equal_logits_have_a_gap_of_exactly_zero():
    student, _, token = random_logits(151, 0.0)
    np.testing.assert_array_equal(evaluate("log_prob_gap", student, student, token)[0], 0)


@pytest.mark.parametrize("name", STATS)
def test_the_gradient_sums_to_zero_over_the_vocabulary(name):
    gradient = evaluate(name, *random_logits(151, 3.0))[1]
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-5)


@pytest.mark.parametrize("name", STATS)
def test_a_constant_added_to_logits_changes_nothing(name):
    student, teacher, token = random_logits(151, 3.0)
    # Multiples of 1/64, so that the shift itself is exact in float32.
    student, teacher = (np.round(64 * x) / 64 for x in (student, teacher))
    value, gradient = evaluate(name, student, teacher, token)
    shifted, shifted_gradient = evaluate(name, student + 512, teacher - 256, token)
    np.testing.assert_allclose(shifted, value, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(shifted_gradient, gradient, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", STATS)
def test_renaming_the_vocabulary_changes_nothing(name):
    student, teacher, token = random_logits(151, 3.0)
    order = np.random.default_rng(1).permutation(151)
    value, gradient = evaluate(name, student, teacher, token)
    renamed = evaluate(name, student[:, order], teacher[:, order], np.argsort(order)[token])
    np.testing.assert_allclose(renamed[0], value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(renamed[1], gradient[:, order], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", STATS)
def test_vocabulary_padding_changes_nothing(name):
    student, teacher, token = random_logits(7, 3.0)
    padding = np.full((len(student), 144), MASKED, np.float32)
    value, gradient = evaluate(name, student, teacher, token)
    padded = [np.concatenate([x, padding], -1) for x in (student, teacher)]
    padded_value, padded_gradient = evaluate(name, *padded, token)
    np.testing.assert_allclose(padded_value, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(padded_gradient[:, :7], gradient, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(padded_gradient[:, 7:], 0)


def test_bfloat16_logits_are_computed_in_float32():
    student, teacher, token = random_logits(151, 3.0)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (student, teacher)]
    expected = evaluate_all(*(x.astype(jnp.float32) for x in rounded), token)
    for name, (value, gradient) in evaluate_all(*rounded, token).items():
        assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, expected[name][0], err_msg=name)
        in_bfloat16 = expected[name][1].astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_allclose(gradient.astype(jnp.float32), in_bfloat16, rtol=2**-7)


@pytest.mark.parametrize("gap", [1000.0, -1000.0])
@pytest.mark.parametrize("name", STATS)
def test_huge_gaps_stay_finite(name, gap):
    student, teacher = np.zeros((2, 4, 7), np.float32)
    # The teacher alone, the student alone, both apart, both together.
    teacher[0, 0] = student[1, 0] = student[2, 0] = teacher[2, 1] = gap
    student[3, 0] = teacher[3, 0] = gap
    value, gradient = evaluate(name, student, teacher, np.zeros(4, np.int32))
    assert np.isfinite(value).all() and np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ON_TOP_K)
def test_a_support_that_holds_all_mass_stays_finite(name):
    student = np.full((4, 7), -200.0, np.float32)
    student[:, :3] = [2.0, 1.0, 0.0]
    value, gradient = evaluate(name, student, student[:, ::-1], np.zeros(4, np.int32))
    assert np.isfinite(value).all() and np.isfinite(gradient).all()


@pytest.mark.parametrize("divergence", [RKL, FKL])
def test_a_tail_of_tiny_mass_keeps_its_digits(divergence):
    # The two likeliest tokens agree, so that everything comes from the rest: its mass is 1e-12.
    student = np.array([1, 0, -28, -29, -30, -27], np.float32)
    teacher = np.array([1, 0, -28.5, -27, -31, -29], np.float32)
    stat = stats.on_top_k(divergence, 2, "student", "tail")
    value, gradient = jax.jit(jax.value_and_grad(stat))(student, teacher, TOKEN)
    q, p = (np.exp(log_softmax(x.astype(np.float64)))[2:] for x in (student, teacher))
    gap = np.log(q.sum() / p.sum())
    expected = {
        RKL: (q.sum() * gap - q.sum() + p.sum(), q * gap),
        FKL: (-p.sum() * gap - p.sum() + q.sum(), q - p.sum() * q / q.sum()),
    }[divergence]
    np.testing.assert_allclose(value, expected[0], rtol=1e-4)
    np.testing.assert_allclose(gradient[2:], expected[1], rtol=1e-4)


@pytest.mark.parametrize(("k", "padding"), [(7, 0), (9, 0), (9, 4)])
def test_a_support_of_the_whole_vocabulary_leaves_nothing_out(k, padding):
    student, teacher, token = random_logits(7, 3.0)
    pad = ((0, 0), (0, padding))
    student, teacher = (np.pad(x, pad, constant_values=MASKED) for x in (student, teacher))
    whole = [stats.on_top_k(FKL, k, "student", r) for r in ("tail", "renormalize", "truncate")]

    @jax.jit
    def evaluate(student):
        def total(stat):
            return lambda student: stat(student, teacher, token).sum()

        return [jax.value_and_grad(total(stat))(student) for stat in (stats.forward_kl, *whole)]

    expected, *others = evaluate(student)
    for value, gradient in others:
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["log_prob_gap", "reverse_kl", "rkl_student_tail"])
def test_any_leading_shape_will_do(name):
    student, teacher, token = random_logits(7, 1.0)
    value = evaluate(name, student, teacher, token)[0].reshape(2, 2)
    shaped = (x.reshape(2, 2, *x.shape[1:]) for x in (student, teacher, token))
    np.testing.assert_allclose(jax.jit(STATS[name][0])(*shaped), value, rtol=1e-6)


@pytest.mark.parametrize("beta", [-0.1, 1.1])
@pytest.mark.parametrize("factory", [stats.generalized_jsd, stats.jsd_of_log_probs])
def test_a_jsd_weight_outside_0_to_1_is_refused(factory, beta):
    with pytest.raises(ValueError, match=rf"beta: expected a number in \[0, 1\], got {beta}"):
        factory(beta)


@pytest.mark.parametrize(("of", "rest"), [("policy", "tail"), ("student", "drop")])
def test_an_unknown_support_is_refused(of, rest):
    with pytest.raises(ValueError, match="policy" if of == "policy" else "drop"):
        stats.on_top_k(RKL, 2, of, rest)


def test_an_empty_support_is_refused():
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        stats.on_top_k(RKL, 0, "student", "tail")


# Quantile.


@pytest.mark.parametrize("q", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_masked_quantile_is_numpys(q):
    rng = np.random.default_rng(0)
    quantile = jax.jit(stats.masked_quantile, static_argnums=2)
    for share in (0.0, 0.02, 0.1, 0.5, 1.0):
        for _ in range(5):
            x = (1e5 * rng.standard_normal((6, 9))).astype(np.float32)
            mask = (rng.random((6, 9)) < share).astype(np.float32)
            expected = np.quantile(x[mask != 0], q, method="linear") if mask.any() else 0.0
            # What lies outside the mask must not matter, whatever it is.
            x = np.where(mask != 0, x, rng.choice([np.nan, np.inf, -np.inf, 1e4], (6, 9)))
            np.testing.assert_allclose(quantile(x, mask, q), expected, rtol=1e-5)


def test_masked_quantile_of_none_and_of_one():
    x = jnp.array([3.0, jnp.nan, 5.0])
    assert stats.masked_quantile(x, jnp.zeros(3), 0.75) == 0
    assert stats.masked_quantile(x, jnp.array([0.0, 0.0, 1.0]), 0.75) == 5
