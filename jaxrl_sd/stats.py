"""Token statistics: what can be said about one token from the student's and the teacher's logits.

Every public function of logits has the type

    TokenStat = (student_logits [..., V], teacher_logits [..., V], token i32[...]) -> f32[...]

so any of them can be a score (used without gradient) or a probe (differentiated with respect to
the student). The factories (`generalized_jsd(beta)` ...) return such functions; `on_top_k` makes
them of those that end in `_of_log_probs`. q is the student, p the teacher. Directions are named by
formula, since papers use "forward" and "reverse" both ways.

Everything is computed in float32 whatever the inputs' type: the gaps and divergences these methods
use are as small as bfloat16's rounding. Vocabulary padding must carry large finite negative logits
(`vocabulary.MASKED`), not -inf.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxrl_sd.types import Array

TokenStat = Callable[[Array, Array, Array], Array]


def _log_softmax(logits: Array) -> Array:
    return _float32_log_softmax(logits.astype(jnp.float32))


@jax.custom_jvp
def _float32_log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True))


@_float32_log_softmax.defjvp
def _log_softmax_jvp(primals, tangents):
    # `jax.nn.log_softmax` keeps the exponentials for the backward pass: a third array as large as
    # the logits and the result.
    (logits,), (tangent,) = primals, tangents
    out = _float32_log_softmax(logits)
    return out, tangent - jnp.sum(jnp.exp(out) * tangent, axis=-1, keepdims=True)


def _pick(logits: Array, token: Array) -> Array:
    """Log-probability of `token` [...] under `logits` [..., V]."""
    logits = logits.astype(jnp.float32)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)
    # Shifted before the subtraction, so that rounding is that of small numbers: a gap is a
    # difference of two such values.
    return (chosen - top)[..., 0] - jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1))


def log_prob(student_logits: Array, teacher_logits: Array, token: Array) -> Array:
    """log q(token).

    >>> print(f"{log_prob(jnp.log(jnp.array([0.9, 0.1])), None, jnp.array(1)):.4f}")
    -2.3026
    """
    del teacher_logits
    return _pick(student_logits, token)


def teacher_log_prob(student_logits: Array, teacher_logits: Array, token: Array) -> Array:
    """log p(token).

    >>> print(f"{teacher_log_prob(None, jnp.log(jnp.array([0.9, 0.1])), jnp.array(1)):.4f}")
    -2.3026
    """
    del student_logits
    return _pick(teacher_logits, token)


def log_prob_gap(student_logits: Array, teacher_logits: Array, token: Array) -> Array:
    """log p(token) - log q(token). RLSD Eq. 13, CAST Eq. 4, HSD Eq. 2.

    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> print(f"{log_prob_gap(student, teacher, jnp.array(1)):.4f}")
    -1.6094
    """
    return _pick(teacher_logits, token) - _pick(student_logits, token)


def entropy(student_logits: Array, teacher_logits: Array, token: Array) -> Array:
    """Entropy of the student in nats, - sum_v q log q.

    >>> print(f"{entropy(jnp.zeros(8), None, jnp.array(3)):.4f}")
    2.0794
    """
    del teacher_logits, token
    log_q = _log_softmax(student_logits)
    return -jnp.sum(jnp.exp(log_q) * log_q, axis=-1)


def reverse_kl(student_logits: Array, teacher_logits: Array, token: Array) -> Array:
    """kl(student||teacher) = sum_v q (log q - log p). SDPG Eq. 3.2.

    Its gradient with respect to the student's logits is q ((log q - log p) - kl).

    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> print(f"{reverse_kl(student, teacher, jnp.array(0)):.4f}")
    0.5108
    """
    del token
    return _kl(_log_softmax(student_logits), _log_softmax(teacher_logits))


def forward_kl(student_logits: Array, teacher_logits: Array, token: Array) -> Array:
    """kl(teacher||student) = sum_v p (log p - log q). HSD Eq. 13, SC-GRPO Sec. 5.1, OPSD Eq. 7.

    Its gradient with respect to the student's logits is q - p.

    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> print(f"{forward_kl(student, teacher, jnp.array(0)):.4f}")
    0.3681
    >>> print(f"{jax.grad(forward_kl)(student, teacher, jnp.array(0))[1]:.4f}")
    0.4000
    """
    del token
    return _kl(_log_softmax(teacher_logits), _log_softmax(student_logits))


def _kl(log_a: Array, log_b: Array) -> Array:
    """kl(a||b) of two distributions as sum_v (a (log a - log b) - a + b).

    The last two terms sum to 0. With them every entry is flat where a = b, so that the rounding of
    a normaliser does not count; without, a nearly equal pair keeps no correct digit in float32,
    nor does the gradient where one token has almost all mass.
    """
    gap = log_a - log_b
    near = jnp.abs(gap) < 1
    a = jnp.exp(log_a)
    b_minus_a_near = a * jnp.expm1(-jnp.where(near, gap, 0.0))  # overflows far from 0
    b_minus_a = jnp.where(near, b_minus_a_near, jnp.exp(log_b) - a)
    return jnp.sum(a * gap + b_minus_a, axis=-1)


def _partial_kl(log_a: Array, log_b: Array) -> Array:
    """sum_v a (log a - log b) of parts of two distributions.

    What `_kl` adds sums to 0 for distributions only, so a part must do without its exactness.
    """
    return jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)


def clipped_forward_kl(cap: float) -> TokenStat:
    """sum_v min(p (log p - log q), cap): each vocabulary entry capped before the sum. OPSD Sec. 3.

    One-sided: negative entries are kept, so the total can be negative. A capped entry adds no
    gradient of its own, so its logit is left with the normaliser's, which lowers it (opsd.py).
    `cap=inf` is `forward_kl`.

    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> print(f"{clipped_forward_kl(0.05)(student, teacher, jnp.array(0)):.4f}")
    -0.1109
    """

    def clipped(student_logits: Array, teacher_logits: Array, token: Array) -> Array:
        del token
        log_q, log_p = _log_softmax(student_logits), _log_softmax(teacher_logits)
        excess = jnp.maximum(jnp.exp(log_p) * (log_p - log_q) - cap, 0.0)
        return _kl(log_p, log_q) - jnp.sum(excess, axis=-1)

    return clipped


def generalized_jsd(beta: float) -> TokenStat:
    """beta kl(p||m) + (1 - beta) kl(q||m), m = beta p + (1 - beta) q. GKD (2306.13649), OPSD Eq. 7.

    As in every published implementation the ends are special cases and not limits: beta = 0 is
    kl(teacher||student), beta = 1 is kl(student||teacher). The formula itself tends to 0 there.

    Raises:
      ValueError: beta is not in [0, 1].

    >>> student, teacher = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> print(f"{generalized_jsd(0.5)(student, teacher, jnp.array(0)):.4f}")
    0.1017
    >>> print(f"{generalized_jsd(1)(student, teacher, jnp.array(0)):.4f}")
    0.5108
    """
    divergence = jsd_of_log_probs(beta)

    def jsd(student_logits: Array, teacher_logits: Array, token: Array) -> Array:
        del token
        return divergence(_log_softmax(student_logits), _log_softmax(teacher_logits), whole=True)

    return jsd


def on_top_k(divergence: Callable[..., Array], k: int, of: str, rest: str) -> TokenStat:
    """A divergence on the k likeliest tokens only. SDPO Eq. 11 is of="student", rest="tail".

    Args:
      divergence: (log_q [..., K], log_p [..., K], whole=bool) -> [...]: `reverse_kl_of_log_probs`,
        `forward_kl_of_log_probs` or `jsd_of_log_probs(beta)`; `whole` says that both sum to 1.
      k: size of the support; all of the vocabulary if that is smaller.
      of: whose k likeliest tokens, "student" or "teacher".
      rest: "tail" adds one class with the remaining mass of each; "renormalize" divides both by
        their mass on the support; "truncate" leaves the rest out (a KL can then be negative).

    Raises:
      ValueError: k is not positive; of or rest is none of the above.

    >>> student = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    >>> teacher = jnp.log(jnp.array([0.2, 0.6, 0.1, 0.1]))
    >>> reverse_kl_and_tail = on_top_k(reverse_kl_of_log_probs, 2, of="student", rest="tail")
    >>> print(f"{reverse_kl_and_tail(student, teacher, jnp.array(0)):.4f}")
    0.2502
    """
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    choices = {"of": (of, ("student", "teacher")), "rest": (rest, tuple(_REST))}
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")

    def stat(student_logits: Array, teacher_logits: Array, token: Array) -> Array:
        del token
        log_q, log_p = _log_softmax(student_logits), _log_softmax(teacher_logits)
        ranked = jax.lax.stop_gradient(log_q if of == "student" else log_p)
        ids = _top_k(ranked, min(k, ranked.shape[-1]))
        q_k, p_k = (_REST[rest](x, ids) for x in (log_q, log_p))
        return divergence(q_k, p_k, whole=rest != "truncate")

    return stat


def _top_k(x: Array, k: int) -> Array:
    """Ids of the k largest of [..., V], i32[..., k].

    Where devices share V (see `vocabulary.chunked_streams`), each proposes its k largest: XLA would
    collect whole rows.
    """
    devices = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    V = x.shape[-1]
    if devices == 1 or V % devices:
        return jax.lax.top_k(x, k)[1]

    def propose(x, start):
        values, ids = jax.lax.top_k(x, min(k, V // devices))
        return values, ids + start

    split = PartitionSpec(*[None] * (x.ndim - 1), "tensor")
    starts = jax.lax.broadcasted_iota(jnp.int32, (1,) * (x.ndim - 1) + (devices,), x.ndim - 1)
    propose = jax.shard_map(
        propose, in_specs=(split, split), out_specs=split, axis_names={"tensor"}, check_vma=False
    )
    values, ids = propose(x, starts * (V // devices))
    _, best = jax.lax.top_k(values, k)
    return jnp.take_along_axis(ids, best, axis=-1)


def _truncate(log_x: Array, ids: Array) -> Array:
    return jnp.take_along_axis(log_x, ids, axis=-1)


def _renormalize(log_x: Array, ids: Array) -> Array:
    return jax.nn.log_softmax(_truncate(log_x, ids), axis=-1)


def _add_tail(log_x: Array, ids: Array) -> Array:
    # Summed over the tail itself: 1 - the support's mass would lose a tail below 1e-7.
    tail = jax.nn.logsumexp(_drop(log_x, ids), axis=-1, keepdims=True)
    return jnp.concatenate([_truncate(log_x, ids), tail], axis=-1)


@partial(jnp.vectorize, signature="(v),(k)->(v)")
def _drop(log_x: Array, ids: Array) -> Array:
    # Finite, so that a tail of no token has mass 0 and no gradient instead of NaN. Row by row,
    # since `put_along_axis` would collect the rows of all devices on each.
    return log_x.at[ids].set(-1e30)


_REST = {"tail": _add_tail, "renormalize": _renormalize, "truncate": _truncate}


def reverse_kl_of_log_probs(log_q: Array, log_p: Array, whole: bool = True) -> Array:
    """kl(student||teacher) from log-probabilities [..., K]; for `on_top_k`.

    `whole`: both sum to 1; else they are parts of distributions and the KL can be negative.

    >>> log_q, log_p = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> print(f"{reverse_kl_of_log_probs(log_q, log_p):.4f}")
    0.5108
    """
    return _kl(log_q, log_p) if whole else _partial_kl(log_q, log_p)


def forward_kl_of_log_probs(log_q: Array, log_p: Array, whole: bool = True) -> Array:
    """kl(teacher||student) from log-probabilities [..., K]; for `on_top_k`.

    `whole`: both sum to 1; else they are parts of distributions and the KL can be negative.

    >>> log_q, log_p = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> print(f"{forward_kl_of_log_probs(log_q, log_p):.4f}")
    0.3681
    >>> print(f"{forward_kl_of_log_probs(log_q[1:], log_p[1:], whole=False):.4f}")
    -0.1609
    """
    return _kl(log_p, log_q) if whole else _partial_kl(log_p, log_q)


def jsd_of_log_probs(beta: float) -> Callable[..., Array]:
    """`generalized_jsd` from log-probabilities [..., K], ends included; for `on_top_k`.

    Raises:
      ValueError: beta is not in [0, 1].

    >>> log_q, log_p = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
    >>> print(f"{jsd_of_log_probs(0.5)(log_q, log_p):.4f}")
    0.1017
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected a number in [0, 1], got {beta}")
    if beta == 0:
        return forward_kl_of_log_probs
    if beta == 1:
        return reverse_kl_of_log_probs

    def jsd(log_q: Array, log_p: Array, whole: bool = True) -> Array:
        del whole  # the two KLs' shares of b - a cancel, whatever the masses
        log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
        return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)

    return jsd


def masked_quantile(x: Array, mask: Array, q: float) -> Array:
    """The q-quantile of the entries of x where mask is nonzero, linearly interpolated.

    Equals `np.quantile(x[mask != 0], q)`; 0 if the mask is empty. Works on any shape, under jit.

    >>> print(masked_quantile(jnp.array([3.0, 1.0, 99.0]), jnp.array([1, 1, 0]), 0.5))
    2.0
    """
    values = jnp.sort(jnp.where(mask != 0, x, jnp.inf).ravel())
    count = jnp.sum(mask != 0)
    position = q * jnp.maximum(count - 1, 0)
    low = jnp.floor(position).astype(int)
    high = jnp.minimum(low + 1, jnp.maximum(count - 1, 0))
    share = position - low
    value = values[low] * (1 - share) + values[high] * share
    return jnp.where(count > 0, value, 0.0)
