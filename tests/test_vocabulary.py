"""Chunked statistics of a real vocabulary's size against float64; dtypes, padding, devices."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxrl_sd import stats
from jaxrl_sd.vocabulary import MASKED, STUDENT, chunked, logits

# Every statistic again, as plain formulas for float64: (log_q [N, V], log_p [N, V], token) -> [N].


def pick(log_x, token):
    return jnp.take_along_axis(log_x, token[:, None], axis=-1)[:, 0]


def kl(log_a, log_b):
    return jnp.sum(jnp.exp(log_a) * (log_a - log_b), -1)


def reverse_kl(q, p, token):
    return kl(q, p)


def forward_kl(q, p, token):
    return kl(p, q)


def clipped(cap):
    return lambda q, p, token: jnp.sum(jnp.minimum(jnp.exp(p) * (p - q), cap), -1)


def jsd(beta):
    def value(q, p, token):
        m = jnp.log(beta * jnp.exp(p) + (1 - beta) * jnp.exp(q))
        return beta * kl(p, m) + (1 - beta) * kl(q, m)

    return value


def on_top_k(divergence, k, of, rest):
    def with_tail(log_x):
        return jnp.concatenate([log_x, jnp.log1p(-jnp.sum(jnp.exp(log_x), -1, keepdims=True))], -1)

    rests = {"tail": with_tail, "renormalize": jax.nn.log_softmax, "truncate": lambda log_x: log_x}

    def value(q, p, token):
        ids = jnp.argsort(-(q if of == "student" else p), axis=-1)[:, :k]
        return divergence(*(rests[rest](jnp.take_along_axis(x, ids, -1)) for x in (q, p)), token)

    return value


RKL, FKL = stats.reverse_kl_of_log_probs, stats.forward_kl_of_log_probs
JSD = stats.jsd_of_log_probs(0.5)
ON_TOP_100 = {
    "reverse_kl_student_tail": (RKL, reverse_kl, "student", "tail"),
    "forward_kl_student_tail": (FKL, forward_kl, "student", "tail"),
    "jsd_student_tail": (JSD, jsd(0.5), "student", "tail"),
    "reverse_kl_student_truncate": (RKL, reverse_kl, "student", "truncate"),
    "jsd_student_renormalize": (JSD, jsd(0.5), "student", "renormalize"),
    "forward_kl_teacher_tail": (FKL, forward_kl, "teacher", "tail"),
    "forward_kl_teacher_renormalize": (FKL, forward_kl, "teacher", "renormalize"),
    "forward_kl_teacher_truncate": (FKL, forward_kl, "teacher", "truncate"),
}
STATS = {
    "log_prob": (stats.log_prob, lambda q, p, i: pick(q, i)),
    "log_prob_gap": (stats.log_prob_gap, lambda q, p, i: pick(p, i) - pick(q, i)),
    "entropy": (stats.entropy, lambda q, p, i: -jnp.sum(jnp.exp(q) * q, -1)),
    "reverse_kl": (stats.reverse_kl, reverse_kl),
    "forward_kl": (stats.forward_kl, forward_kl),
    "clipped_forward_kl_loose": (stats.clipped_forward_kl(0.05), clipped(0.05)),
    "clipped_forward_kl_tight": (stats.clipped_forward_kl(0.005), clipped(0.005)),
    "jsd_0.1": (stats.generalized_jsd(0.1), jsd(0.1)),
    "jsd_0.5": (stats.generalized_jsd(0.5), jsd(0.5)),
    "jsd_0.9": (stats.generalized_jsd(0.9), jsd(0.9)),
    **{
        name: (stats.on_top_k(ours, 100, of, rest), on_top_k(oracle, 100, of, rest))
        for name, (ours, oracle, of, rest) in ON_TOP_100.items()
    },
}
FIRST_ORDER = [name for name in STATS if any(s in name for s in ("gap", "clipped", "truncate"))]


# A real vocabulary, half precision, a student and a teacher that nearly agree.

N, V, D = 15, 151_936, 64
# The goal is 1%. The gradients' type rounds by 2^-9, and so does each chunk's part of a head's.
TOLERANCE = 2**-8


def draw(rows, *shape, dtype=jnp.float32):
    """Standard normal numbers, whose seed is their shape."""
    rng = np.random.default_rng([rows, *shape])
    return jnp.asarray(rng.standard_normal((rows, *shape)), dtype)


@cache
def problem(n):
    """The first n tokens: logits have standard deviation 10, student and teacher differ by 0.05."""
    rng = np.random.default_rng(0)
    hidden = 10 * rng.standard_normal((N, D))
    head = rng.standard_normal((V, D)) / D**0.5
    head_teacher = head + 0.005 * rng.standard_normal((V, D)) / D**0.5
    token = (hidden @ head.T + rng.gumbel(size=(N, V))).argmax(1)
    hidden, head, head_teacher = (
        jnp.asarray(x, jnp.bfloat16) for x in (hidden, head, head_teacher)
    )
    return hidden[:n], head, hidden[:n], head_teacher, jnp.asarray(token[:n], jnp.int32)


def float64(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


@cache
def float64_statistics():
    """{name: (value [N], gradient to the student's logits [N, V])} from the same bfloat16."""
    hidden, head, hidden_teacher, head_teacher, token = problem(N)
    z_q = float64(hidden) @ float64(head).T
    z_p = float64(hidden_teacher) @ float64(head_teacher).T
    assert z_q.std() == pytest.approx(10, rel=0.1)
    assert (z_p - z_q).std() == pytest.approx(0.05, rel=0.1)

    @jax.jit
    def evaluate(z_q, z_p, token):
        def both(oracle):
            def value(z_q):
                return oracle(jax.nn.log_softmax(z_q), jax.nn.log_softmax(z_p), token)

            out, vjp = jax.vjp(value, z_q)
            return out, vjp(jnp.ones_like(out))[0].astype(jnp.float32)

        return {name: both(oracle) for name, (_, oracle) in STATS.items()}

    with jax.enable_x64(True):
        return jax.device_get(evaluate(z_q, z_p, token))


@cache
def bfloat16_statistics(chunk):
    """(problem, weight of each statistic of each token) -> values, gradients to hidden and head."""

    @jax.jit
    def evaluate(problem, weight):
        hidden, head, hidden_teacher, head_teacher, token = problem

        def values(hidden, head):
            return chunked(
                {name: ("teacher", stat) for name, (stat, _) in STATS.items()},
                {STUDENT: hidden, "teacher": hidden_teacher},
                {STUDENT: head, "teacher": head_teacher},
                token,
                num_tokens=V,
                temperature=1.0,
                chunk=chunk,
            )

        out, vjp = jax.vjp(values, hidden, head)
        return out, vjp(weight)

    return evaluate


@jax.jit
def relative_errors(gradients, problem, expected_z):
    """In L2: of the worst token's hidden state, and of the head. Float32 is enough to tell them."""
    hidden, head = (x.astype(jnp.float32) for x in problem[:2])

    def error(got, want, axis):
        return jnp.linalg.norm(got - want, axis=axis) / jnp.linalg.norm(want, axis=axis)

    of_hidden = error(gradients[0], expected_z @ head, 1)
    return jnp.max(of_hidden), error(gradients[1], expected_z.T @ hidden, None)


def assert_gradient(n, chunk, weight, expected_z, name):
    _, gradients = bfloat16_statistics(chunk)(problem(n), weight)
    errors = relative_errors(gradients, problem(n), expected_z)
    assert max(errors) < TOLERANCE, (name, errors)


@pytest.mark.parametrize(("n", "chunk"), [(1, 1), (N, 1), (N, 7), (N, N)])
def test_every_value_equals_float64(n, chunk):
    weight = {name: jnp.zeros(n) for name in STATS}
    got, _ = bfloat16_statistics(chunk)(problem(n), weight)
    for name, (expected, _) in float64_statistics().items():
        # Whole divergences are flat where student and teacher agree: the rounding of the logits,
        # 2^-18 near 40, does not count. It does in differences and in parts of a divergence.
        atol = 2**-18 if name in FIRST_ORDER else 0
        np.testing.assert_allclose(got[name], expected[:n], TOLERANCE, atol, err_msg=name)


def test_every_gradient_equals_float64():
    for name, (_, expected_z) in float64_statistics().items():
        weight = {other: jnp.full(N, float(other == name)) for other in STATS}
        assert_gradient(N, 7, weight, expected_z, name)


@pytest.mark.parametrize(("n", "chunk"), [(1, 1), (N, 1), (N, N)])
def test_all_gradients_at_once_equal_float64_at_other_chunks(n, chunk):
    """Each scaled to length 1, so that none hides among the others."""
    rng = np.random.default_rng(0)
    expected_z, weight = np.zeros((n, V), np.float32), {}
    for name, (_, z) in float64_statistics().items():
        weight[name] = rng.choice([-1, 1], n).astype(np.float32) / np.linalg.norm(z[:n], axis=1)
        expected_z += weight[name][:, None] * z[:n]
    assert_gradient(n, chunk, weight, expected_z, "all")


# Small vocabularies that divide nothing.

REQUESTS = {
    "log_prob": (None, stats.log_prob),
    "gap": ("other", stats.log_prob_gap),
    "reverse_kl": ("teacher", stats.reverse_kl),
}
TOP_K = {"top_k": ("teacher", stats.on_top_k(RKL, 20, "student", "tail"))}
NUM_TOKENS = 997
ROWS = {STUDENT: (1003, 16), "teacher": (1008, 16), "other": (1003, 24)}  # V and D of each model


def small(n=10, dtype=jnp.float32):
    """Hidden states, heads and tokens; the heads' padding is no smaller than the rest."""
    hidden = {name: 2 * draw(n, d, dtype=dtype) for name, (_, d) in ROWS.items()}
    heads = {name: draw(*shape, dtype=dtype) for name, shape in ROWS.items()}
    return hidden, heads, jnp.arange(n, dtype=jnp.int32) * 61 % NUM_TOKENS


@cache
def evaluator(chunk, requests):
    """Values, and the gradients of a weighted sum of them to hidden states and heads."""

    def total(hidden, heads, token, temperature):
        options = {"num_tokens": NUM_TOKENS, "temperature": temperature, "chunk": chunk}
        out = chunked(dict(requests), hidden, heads, token, **options)
        weight = jnp.cos(jnp.arange(token.size))
        return sum(jnp.sum(x * weight) for x in out.values()), out

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


def evaluate(hidden, heads, token, chunk=3, temperature=1.0, requests=REQUESTS):
    run = evaluator(chunk, tuple(requests.items()))
    (_, out), gradients = run(hidden, heads, token, temperature)
    return out, *gradients


def assert_close(got, want, tolerance=1e-5):
    """Every array within `tolerance` of its largest entry."""

    def check(a, b):
        a, b = float64(a), float64(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())

    jax.tree.map(check, got, want)


@pytest.mark.parametrize("chunk", [1, 99])
def test_the_chunk_does_not_matter(chunk):
    assert_close(evaluate(*small(), chunk=chunk), evaluate(*small(), chunk=3))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_padding_has_no_probability_and_no_gradient(dtype):
    hidden, heads, token = small(dtype=dtype)
    out, to_hidden, to_heads = evaluate(hidden, heads, token)
    cut = {name: head[:NUM_TOKENS] for name, head in heads.items()}
    expected = evaluate(hidden, cut, token)
    assert not any(gradient[NUM_TOKENS:].any() for gradient in to_heads.values())
    assert all(x.dtype == jnp.float32 for x in out.values())
    to_cut = {name: gradient[:NUM_TOKENS] for name, gradient in to_heads.items()}
    assert_close((out, to_hidden, to_cut), expected, 1e-5 if dtype == jnp.float32 else 2**-8)
    assert all(x.dtype == dtype for x in jax.tree.leaves((to_hidden, to_heads)))


def test_logits_of_padding_are_masked_and_finite():
    hidden, heads, _ = small()
    out = logits(hidden[STUDENT], heads[STUDENT], NUM_TOKENS)
    expected = float64(hidden[STUDENT]) @ float64(heads[STUDENT]).T
    np.testing.assert_allclose(out[:, :NUM_TOKENS], expected[:, :NUM_TOKENS], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[:, NUM_TOKENS:], np.float32(MASKED))
    assert np.isfinite(MASKED)


def test_temperature_divides_the_logits_of_all_models():
    hidden, heads, token = small()
    cold = {name: h / 2 for name, h in hidden.items()}
    got, want = evaluate(hidden, heads, token, temperature=2.0), evaluate(cold, heads, token)
    assert_close(got[0], want[0])
    assert_close(got[1], {name: g / 2 for name, g in want[1].items()})


def test_the_gradient_to_a_teacher_is_that_of_the_other_direction():
    hidden, heads, token = small()
    _, *got = evaluate(hidden, heads, token, requests={"": ("teacher", stats.reverse_kl)})
    swap = {STUDENT: "teacher", "teacher": STUDENT, "other": "other"}
    hidden, heads = ({swap[name]: x for name, x in tree.items()} for tree in (hidden, heads))
    _, *want = evaluate(hidden, heads, token, requests={"": ("teacher", stats.forward_kl)})
    for a, b in zip(got, want, strict=True):
        assert jnp.abs(a["teacher"]).max() > 1e-2
        assert_close({name: a[name] for name in swap}, {name: b[swap[name]] for name in swap})


def test_wrong_sizes_are_refused():
    hidden, heads, token = small()
    with pytest.raises(ValueError, match="chunk: expected at least 1, got 0"):
        evaluate(hidden, heads, token, chunk=0)
    heads["other"] = heads["other"][: NUM_TOKENS - 1]
    with pytest.raises(
        ValueError, match=r"heads: expected at least num_tokens=997 rows, got .*996"
    ):
        evaluate(hidden, heads, token)


# The head's gradient is a sum over all tokens.


def error_of_head_gradient(total):
    """Of 4096 tokens whose parts all point the same way, which is where a sum stops growing."""
    head = draw(32, 8, dtype=jnp.bfloat16)
    hidden = jnp.abs(draw(4096, 8, dtype=jnp.bfloat16))
    got = float64(jax.jit(jax.grad(total, argnums=1))(hidden, head))
    h, w = float64(hidden), float64(head)
    q = np.exp(h @ w.T)
    q /= q.sum(1, keepdims=True)
    expected = (np.eye(32)[0] - q).T @ h
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


TOKEN_0 = jnp.zeros(4096, jnp.int32)


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_a_heads_gradient_is_summed_in_float32(chunk):
    def total(hidden, head):
        options = {"num_tokens": 32, "temperature": 1.0, "chunk": chunk}
        request, hidden, head = {"": (None, stats.log_prob)}, {STUDENT: hidden}, {STUDENT: head}
        return chunked(request, hidden, head, TOKEN_0, **options)[""].sum()

    assert error_of_head_gradient(total) < TOLERANCE


def test_a_sum_in_bfloat16_would_be_seen():
    def total(hidden, head):
        @jax.checkpoint
        def of_token(h):
            return stats.log_prob(logits(h, head, 32), None, TOKEN_0[0])

        return jax.lax.map(of_token, hidden).sum()

    assert error_of_head_gradient(total) > 10 * TOLERANCE


# What runs on the devices.


def lower(n, dtype, chunk, sharding=lambda *axes: None):
    """The program for the gradients of a KL to hidden states and head, V = 4096."""

    def total(hidden, head, hidden_teacher, head_teacher, token):
        hidden = {STUDENT: hidden, "teacher": hidden_teacher}
        heads = {STUDENT: head, "teacher": head_teacher}
        request, options = {"": ("teacher", stats.forward_kl)}, {"temperature": 1.0, "chunk": chunk}
        return chunked(request, hidden, heads, token, num_tokens=4000, **options)[""].sum()

    hidden = jax.ShapeDtypeStruct((n, 64), dtype, sharding=sharding("data"))
    head = jax.ShapeDtypeStruct((4096, 64), dtype, sharding=sharding("tensor"))
    token = jax.ShapeDtypeStruct((n,), jnp.int32, sharding=sharding("data"))
    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    return gradient.lower(hidden, head, hidden, head, token)


def test_logits_of_all_tokens_never_exist():
    """Backward pass included: less memory than one float32 [N, V]."""

    def megabytes(chunk):
        memory = lower(512, jnp.float32, chunk).compile().memory_analysis()
        return memory.temp_size_in_bytes / 2**20

    block = 512 * 4096 * 4 / 2**20
    assert megabytes(chunk=16) < block / 2
    assert megabytes(chunk=512) > block


def test_only_float32_asks_for_slow_and_precise_products():
    def products(dtype):
        text = lower(64, dtype, 16).as_text()
        return [line for line in text.splitlines() if "dot_general" in line]

    assert len(products(jnp.float32)) == len(products(jnp.bfloat16)) == 4
    assert all("[HIGHEST, HIGHEST]" in line for line in products(jnp.float32))
    assert all("[DEFAULT, DEFAULT]" in line for line in products(jnp.bfloat16))
    # Forwards for student and teacher; backwards the gradient to the logits is float32.
    assert sum("bf16" in line and line.endswith("xf32>") for line in products(jnp.bfloat16)) == 2


@pytest.fixture(scope="module")
def sharding():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    return lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))


def test_eight_devices_compute_the_same(sharding):
    hidden, heads, token = small(40)
    heads = {name: jnp.pad(x, ((0, 1008 - len(x)), (0, 0))) for name, x in heads.items()}
    options = {"chunk": 12, "requests": REQUESTS | TOP_K}
    want = evaluate(hidden, heads, token, **options)
    hidden, token = jax.device_put((hidden, token), sharding("data"))
    got = evaluate(hidden, jax.device_put(heads, sharding("tensor")), token, **options)
    assert_close(got, want)


def test_eight_devices_share_the_work_of_every_chunk(sharding):
    one = lower(512, jnp.float32, 64).compile().cost_analysis()["flops"]
    eight = lower(512, jnp.float32, 64, sharding).compile().cost_analysis()["flops"]
    assert eight < one / 6
