"""Chunked statistics of a real vocabulary's size against float64; dtypes, padding, devices."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrl_sd import hlo, stats, vocabulary
from jaxrl_sd.sharding import make_mesh, of_state
from jaxrl_sd.vocabulary import MASKED, STUDENT, chunked, chunked_streams, logits

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


@pytest.mark.parametrize("chunk", [4, 99])
def test_the_block_does_not_matter(chunk, monkeypatch):
    """10 tokens, in chunks of 4 or as one: statistics of 3 at a time, which divides neither."""
    want = evaluate(*small(), chunk=chunk, requests=REQUESTS | TOP_K)
    monkeypatch.setattr(vocabulary, "CPU_LOGITS", 3 * 1003)
    run = evaluator.__wrapped__(chunk, tuple((REQUESTS | TOP_K).items()))  # compiled anew
    (_, out), gradients = run(*small(), 1.0)
    assert_close((out, *gradients), want)


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


def test_a_float32_head_of_bfloat16_hidden_states_is_rounded_but_not_its_gradient():
    hidden, heads, token = small(dtype=jnp.bfloat16)
    masters = {name: head.astype(jnp.float32) for name, head in heads.items()}
    *got, to_masters = evaluate(hidden, masters, token)
    *want, to_heads = evaluate(hidden, heads, token)
    assert_close(got, want)
    assert_close(to_masters, to_heads, 2**-8)
    for gradient in to_masters.values():
        assert gradient.dtype == jnp.float32
        assert (gradient != gradient.astype(jnp.bfloat16).astype(jnp.float32)).any()


# Padding at the end.


def cut(count, hidden, heads, token, chunk):
    """Values and gradients of `evaluate` with a count."""

    def total(hidden, heads, count):
        options = {"num_tokens": NUM_TOKENS, "temperature": 1.0, "chunk": chunk, "count": count}
        out = chunked(REQUESTS, hidden, heads, token, **options)
        weight = jnp.cos(jnp.arange(token.size))
        return sum(jnp.sum(x * weight) for x in out.values()), out

    run = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    (_, out), gradients = run(hidden, heads, count)
    return out, *gradients


@pytest.mark.parametrize("chunk", [3, 99])
@pytest.mark.parametrize("count", [0, 4, 6, 10])
def test_tokens_behind_the_count_are_nothing(count, chunk):
    hidden, heads, token = small()
    hidden = {name: h / 8 for name, h in hidden.items()}  # small logits: programs round differently
    unreal = {name: h.at[count:].set(jnp.nan) for name, h in hidden.items()}
    out, to_hidden, to_heads = cut(jnp.int32(count), unreal, heads, token, chunk)
    if count == 0:
        assert not any(x.any() for x in jax.tree.leaves((out, to_hidden, to_heads)))
        return
    first = {name: h[:count] for name, h in hidden.items()}
    want = cut(None, first, heads, token[:count], 3)
    of_first = [{name: x[:count] for name, x in tree.items()} for tree in (out, to_hidden)]
    assert_close((*of_first, to_heads), want)
    of_rest = [{name: x[count:] for name, x in tree.items()} for tree in (out, to_hidden)]
    assert not any(x.any() for x in jax.tree.leaves(of_rest))


@pytest.mark.parametrize(("count", "chunks"), [(0, 0), (1, 1), (4, 2), (10, 4)])
def test_chunks_behind_the_count_are_not_computed(count, chunks):
    hidden, heads, token = small()
    calls = []

    def counted(student_logits, teacher_logits, token):
        jax.debug.callback(lambda: calls.append(1))
        return stats.log_prob(student_logits, teacher_logits, token)

    @jax.jit
    def run(h, count):
        def values(h):
            options = {"num_tokens": NUM_TOKENS, "temperature": 1.0, "chunk": 3, "count": count}
            head = {STUDENT: heads[STUDENT]}
            return chunked({"": (None, counted)}, {STUDENT: h}, head, token, **options)[""]

        out, vjp = jax.vjp(values, h)
        return out, vjp(jnp.ones_like(out))

    jax.block_until_ready(run(hidden[STUDENT], jnp.int32(count)))
    jax.effects_barrier()
    assert len(calls) == 2 * chunks


# What runs on the devices.


def lower(n, dtype, chunk, argnums=(0, 1), stat=stats.forward_kl, V=4096, D=64):
    """The program for the gradients of a statistic to hidden states and heads."""

    def total(hidden, head, hidden_teacher, head_teacher, token):
        hidden = {STUDENT: hidden, "teacher": hidden_teacher}
        heads = {STUDENT: head, "teacher": head_teacher}
        request, options = {"": ("teacher", stat)}, {"temperature": 1.0, "chunk": chunk}
        return chunked(request, hidden, heads, token, num_tokens=V - 96, **options)[""].sum()

    hidden, head = jax.ShapeDtypeStruct((n, D), dtype), jax.ShapeDtypeStruct((V, D), dtype)
    token = jax.ShapeDtypeStruct((n,), jnp.int32)
    gradient = jax.jit(jax.grad(total, argnums=argnums))
    return gradient.lower(hidden, head, hidden, head, token)


def test_logits_of_all_tokens_never_exist():
    """Backward pass included: less memory than one float32 [N, V]."""

    def megabytes(chunk):
        memory = lower(512, jnp.float32, chunk).compile().memory_analysis()
        return memory.temp_size_in_bytes / 2**20

    block = 512 * 4096 * 4 / 2**20
    assert megabytes(chunk=16) < block / 2
    assert megabytes(chunk=512) > block


def test_memory_is_that_of_the_heads_gradient_and_two_chunks():
    """At the size of a real model; more tokens cost two float32 [N, D]."""
    D, chunk = 1024, 512

    def temporary(n):
        program = lower(n, jnp.bfloat16, chunk, stat=stats.reverse_kl, V=V, D=D)
        return program.compile().memory_analysis().temp_size_in_bytes

    few, many = temporary(1024), temporary(16384)
    assert many < 1.5 * (4 * V * D + 2 * 4 * chunk * V)
    assert many - few < 1.01 * 2 * 4 * (16384 - 1024) * D


@pytest.mark.parametrize("stat", [stats.forward_kl, stats.reverse_kl, stats.generalized_jsd(0.5)])
def test_cpus_keep_no_more_of_a_single_chunk_than_logits_and_their_gradients(stat):
    """Of student and teacher: four arrays. All tokens at a time there are 6, 6 and 13."""
    n, V, mesh = 1024, 32_768, make_mesh(data=1, fsdp=1, tensor=1)
    program = lower_streams(mesh, {"": ("teacher", stat)}, V, 64, n, n)
    memory = program.compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4.6 * 4 * n * V


@pytest.mark.parametrize(("platform", "block"), [("cpu", 13), ("gpu", 512), ("tpu", 512)])
def test_only_cpus_compute_statistics_in_blocks(platform, block):
    heads = {STUDENT: np.zeros((V, 1))}
    assert vocabulary._plan(REQUESTS, heads, V, 512, platform).block == block


def products(dtype, chunk=16, **options):
    text = lower(64, dtype, chunk, **options).as_text()
    return [line for line in text.splitlines() if "dot_general" in line]


def test_only_float32_asks_for_slow_and_precise_products():
    # Logits of student and teacher, then gradients of hidden states and head.
    assert len(products(jnp.float32)) == 4
    assert all("[HIGHEST, HIGHEST]" in line for line in products(jnp.float32))
    # One more for the bits that the gradient of the logits loses as a factor.
    assert len(products(jnp.bfloat16)) == 5
    assert all("[DEFAULT, DEFAULT]" in line for line in products(jnp.bfloat16))
    assert all("bf16" in line and line.endswith("xf32>") for line in products(jnp.bfloat16))


@pytest.mark.parametrize(
    ("argnums", "expected"), [((0,), 3), ((1,), 3), ((0, 1), 4), ((2,), 3), ((0, 1, 2, 3), 6)]
)
def test_only_what_is_asked_for_is_computed(argnums, expected):
    assert len(products(jnp.float32, argnums=argnums)) == expected


def test_logits_of_a_single_chunk_are_kept():
    assert len(products(jnp.float32, chunk=64)) == 4

    def logits_are_computed(chunk):
        hidden, heads, token = small()

        def values(hidden):
            options = {"num_tokens": NUM_TOKENS, "temperature": 1.0, "chunk": chunk}
            return chunked({"": (None, stats.entropy)}, hidden, heads, token, **options)[""]

        jaxpr = str(jax.make_jaxpr(lambda h: jax.vjp(values, h)[1](token * 1.0))(hidden))
        return jaxpr.count("dot_general")

    assert logits_are_computed(chunk=99) < logits_are_computed(chunk=3)


def test_a_statistic_without_gradient_is_not_differentiated():
    @jax.custom_vjp
    def score(student_logits):
        return student_logits[..., 0]

    def refuse(kept, ct):
        raise AssertionError("differentiated")

    score.defvjp(lambda z: (score(z), None), refuse)
    hidden, heads, token = small()
    requests = {"score": (None, lambda z, _, token: score(z)), "logp": (None, stats.log_prob)}

    def total(hidden):
        options = {"num_tokens": NUM_TOKENS, "temperature": 1.0, "chunk": 3}
        out = chunked(requests, hidden, heads, token, **options)
        return jnp.sum(out["logp"] * jax.lax.stop_gradient(out["score"]))

    assert jax.grad(total)(hidden)[STUDENT].any()


# Streams on a mesh.

ALL = {name: ("teacher", stat) for name, (stat, _) in STATS.items()}


def stream_program(mesh, requests, num_tokens, chunk):
    """Values, and gradients of a weighted sum of them, of streams."""
    options = {"num_tokens": num_tokens, "temperature": 2.0, "chunk": chunk, "mesh": mesh}

    def total(hidden, heads, token, count):
        out = chunked_streams(requests, hidden, heads, token, count, **options)
        return sum(jnp.sum(x * weights_of(token)) for x in out.values()), out

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))


def weights_of(token):
    return jnp.cos(jnp.arange(token.size)).reshape(token.shape)


def one_by_one(requests, num_tokens, chunk, hidden, heads, token, count):
    """What `stream_program` gives, each stream alone on one device."""
    options = {"num_tokens": num_tokens, "temperature": 2.0, "chunk": chunk}

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def of_stream(hidden, heads, token, count, weight):
        out = chunked(requests, hidden, heads, token, **options, count=count)
        return sum(jnp.sum(x * weight) for x in out.values()), out

    streams = [
        of_stream({name: h[i] for name, h in hidden.items()}, heads, token[i], count[i], weight)
        for i, weight in enumerate(weights_of(token))
    ]
    (total, out), (to_hidden, to_heads) = jax.tree.map(lambda *x: jnp.stack(x), *streams)
    return (total.sum(), out), (to_hidden, jax.tree.map(lambda x: x.sum(axis=0), to_heads))


def on(mesh, hidden, heads, token, count):
    """The same arrays, or their shapes, where training has them."""
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    of_heads = {n: of_state({"head": head}, mesh)["head"] for n, head in heads.items()}
    return (dict.fromkeys(hidden, rows), of_heads, rows, rows), (hidden, heads, token, count)


@pytest.mark.parametrize("rows", [1008, 1003])
def test_streams_on_a_mesh_equal_those_of_one_device(rows, monkeypatch):
    """Vocabularies that the devices can share, and that they cannot; two tokens at a time."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    hidden = {name: 2 * draw(4, 10, 16) for name in (STUDENT, "teacher")}
    heads = {STUDENT: draw(rows, 16), "teacher": draw(rows + 8, 16)}
    token = jnp.arange(40, dtype=jnp.int32).reshape(4, 10) * 61 % NUM_TOKENS
    arrays = hidden, heads, token, jnp.array([10, 4, 0, 7], jnp.int32)
    requests = {name: ALL[name] for name in ALL if "0.1" not in name and "0.9" not in name}
    want = one_by_one(requests, NUM_TOKENS, 4, *arrays)
    monkeypatch.setattr(vocabulary, "CPU_LOGITS", 2 * rows)
    shardings, arrays = on(mesh, *arrays)
    got = stream_program(mesh, requests, NUM_TOKENS, chunk=4)(*jax.device_put(arrays, shardings))
    assert_close(got, want)


def lower_streams(mesh, requests, V, D, N, chunk):
    """`stream_program` for a stream of N tokens on each device."""
    R = mesh.shape["data"] * mesh.shape["fsdp"]
    shape = jax.ShapeDtypeStruct
    hidden = {name: shape((R, N, D), jnp.float32) for name in (STUDENT, "teacher")}
    heads = {name: shape((V, D), jnp.float32) for name in hidden}
    arrays = hidden, heads, shape((R, N), jnp.int32), shape((R,), jnp.int32)
    shardings, arrays = on(mesh, *arrays)
    placed = jax.tree.map(lambda a, s: shape(a.shape, a.dtype, sharding=s), arrays, shardings)
    return stream_program(mesh, requests, V - 96, chunk).lower(*placed)


def communicated(*of_program):
    """Elements of the result of each collective: (inside loops, outside, by kind)."""
    program = lower_streams(*of_program).compile()
    computations, entry = hlo.parse(program.as_text())
    found = [
        (name == entry, x.opcode.removesuffix("-start"), a.size)
        for name, instructions in computations.items()
        for x in instructions.values()
        if x.opcode.removesuffix("-start") in hlo.COLLECTIVES
        for a in x.arrays
    ]
    inside = [size for in_entry, _, size in found if not in_entry]
    return inside, [(kind, size) for in_entry, kind, size in found if in_entry]


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 8), (1, 8, 1), (8, 1, 1)])
def test_logits_stay_where_they_are_and_gradients_are_added_up_once(shape, monkeypatch):
    V, D, N, chunk, mesh = 4096, 64, 96, 32, make_mesh(*shape)
    monkeypatch.setattr(vocabulary, "CPU_LOGITS", 8 * V)  # tokens at a time
    data, fsdp, tensor = shape
    names = ("log_prob_gap", "entropy", "reverse_kl", "reverse_kl_student_tail")
    inside, outside = communicated(mesh, {name: ALL[name] for name in names}, V, D, N, chunk)
    # A few numbers a token; the largest are hidden states' gradients and candidates of a top-k.
    assert max(inside, default=0) <= chunk * max(D, 100 * tensor)
    assert bool(inside) == (tensor > 1)
    share = V * D // tensor
    assert sum(kind == "all-gather" for kind, size in outside if size >= share // 2) == 2 * (
        fsdp > 1
    )
    of_gradients = [size for kind, size in outside if kind != "all-gather" and size >= share // 2]
    assert sum(of_gradients) == 2 * share * (data * fsdp > 1)


def test_a_number_of_streams_that_the_mesh_does_not_have_is_refused():
    hidden, heads, token = small()
    options = {"num_tokens": NUM_TOKENS, "temperature": 1.0, "chunk": 3}
    streams = {name: h[None] for name, h in hidden.items()}
    with pytest.raises(ValueError, match=r"token: expected 2 streams, .*, got 1"):
        mesh = make_mesh(data=2, fsdp=1, tensor=4)
        count = jnp.array([10])
        chunked_streams(REQUESTS, streams, heads, token[None], count, mesh=mesh, **options)
