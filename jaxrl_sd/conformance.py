"""What must hold for every method, whatever its idea: checks to put a new one through.

    conformance.check(mine())

The method is fed the logits of a small random batch in place of models: statistics, credit, loss
and averaging are those of training. `RULES` are the checks one by one.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl_sd import losses
from jaxrl_sd.methods.base import Method, Metrics, Verdicts
from jaxrl_sd.model import Compute
from jaxrl_sd.types import Array, Batch, Credit, Hints, Problem, Rollouts, Sample
from jaxrl_sd.update import ALWAYS_PROBED, ALWAYS_SCORED, make_steps, take_rows, weigh

G, T, V = 4, 3, 5
STEP = 10  # finished steps
# One letter a row: correct, wrong, not graded. A mixed group with a row that could not be graded,
# a group without, with one, and with nothing but correct answers.
MIXED = "110? 0000 1000 1111"
PROBLEM = Problem("id", "question", answer="42", solution="6 * 7 = 42")


class Shown(NamedTuple):
    """What one teacher is shown, see `types.Hints`."""

    shown: np.ndarray  # bool[B]
    source: np.ndarray  # i[B], -1 none


class Case(NamedTuple):
    """One tiny batch with the logits of every model. Rows are group-major, B = P * group_size."""

    student: np.ndarray  # f[B, T, V] logits that are trained
    old: np.ndarray  # f[B, T, V] logits at the start of the step
    teachers: Mapping[str, np.ndarray]  # {teacher: f[B, T, V]}
    token: np.ndarray  # i[B, T]
    mask: np.ndarray  # bool[B, T], tokens of graded rows
    correct: np.ndarray  # bool[B]
    graded: np.ndarray  # bool[B]
    truncated: np.ndarray  # bool[B], no stop token within max_length
    length: np.ndarray  # i[B], sampled tokens
    shown: Mapping[str, Shown]  # {teacher: of each row}
    group_size: int = G
    max_length: int = T  # tokens
    step: int = STEP


class Outcome(NamedTuple):
    """What a method makes of a case."""

    loss_t: Array  # f32[B, T], each token's part of the loss
    gradient: Array  # f32[B, T, V], of the loss to the student's logits
    credit: Credit
    metrics: Metrics  # of `credit`


def draw(
    method: Method,
    verdicts: str = MIXED,
    lengths=(3, 2, 1, 3, 2),
    truncated=(False,),
    eps: float = 1.0,
    drift: float = 0.3,
) -> Case:
    """A random case of B = 16 rows; teachers see what their contexts show them.

    Args:
      method: whose teachers there are.
      verdicts: 1, 0 or ? for each row.
      lengths: tokens of each row, repeated as often as needed.
      truncated: of each row, likewise.
      eps: size of the difference between teachers and policy, in nats.
      drift: likewise between the policy and what it was at the start of the step.
    """
    rng = np.random.default_rng(0)
    verdicts = verdicts.replace(" ", "")
    B, lengths = len(verdicts), np.resize(lengths, len(verdicts))
    student, moved = rng.standard_normal((2, B, T, V))
    graded = np.array([c != "?" for c in verdicts])
    old = student + drift * moved
    return Case(
        student=student,
        old=old,
        teachers={name: old + eps * rng.standard_normal(old.shape) for name in method.teachers},
        token=rng.integers(V, size=(B, T)),
        mask=(np.arange(T) < lengths[:, None]) & graded[:, None],
        correct=np.array([c == "1" for c in verdicts]),
        graded=graded,
        truncated=np.resize(truncated, B),
        length=lengths,
        shown={name: _shown(t.context, verdicts, rng) for name, t in method.teachers.items()},
    )


def _shown(context, verdicts: str, rng: np.random.Generator) -> Shown:
    """What a context shows of the groups with these verdicts."""
    verdict = {"1": True, "0": False, "?": None}
    samples = [Sample((), f"response {i}", verdict[c], False) for i, c in enumerate(verdicts)]
    source = []
    for first in range(0, len(samples), G):
        hints = context.write(PROBLEM, samples[first : first + G], rng)
        source += [(hint is not None, first, -1 if hint is None else hint.source) for hint in hints]
    shown, first, peer = np.array(source).T
    return Shown(shown.astype(bool), np.where(peer < 0, -1, first + peer))


def verdicts_of(case: Case) -> Verdicts:
    """What the method grades."""
    return Verdicts(
        case.correct,
        case.graded,
        np.where(case.correct & case.graded, 1.0, 0.0),
        case.length,
        case.truncated,
        case.group_size,
        case.max_length,
    )


def batch_of(case: Case, method: Method, garbage: float = 0.0) -> Batch:
    """As training makes it, but groups that are not kept stay, masked, in their places.

    Args:
      garbage: stands where no value may matter.
    """
    B = len(case.mask)
    grades = method.grade(verdicts_of(case))
    rows = grades.trained & np.repeat(grades.kept, case.group_size)
    ones, nothing = jnp.ones(B, jnp.int32), jnp.zeros((B, 1), jnp.int32)
    unused_t = jnp.where(case.mask, 0.0, garbage)
    rollouts = Rollouts(
        prompt=nothing,
        prompt_length=ones,
        response=jnp.asarray(case.token, jnp.int32),
        mask_t=jnp.asarray(case.mask & rows[:, None], jnp.float32),
        sampler_logp_t=unused_t,
        behaviour_logp_t=unused_t,
        reward=jnp.asarray(np.where(case.graded, grades.reward, garbage), jnp.float32),
        correct=jnp.asarray(case.correct, jnp.float32),
        graded=jnp.asarray(case.graded, jnp.float32),
        group_size=case.group_size,
    )

    def hints(of: Shown) -> Hints:
        return Hints(nothing, jnp.asarray(of.shown, jnp.int32), jnp.asarray(of.source, jnp.int32))

    return Batch(rollouts, {name: hints(case.shown[name]) for name in method.teachers})


class Compiled(NamedTuple):
    """A method and its stages as one jitted function, see `evaluate`."""

    method: Method
    run: Callable[..., Outcome]


def compiled(method: Method) -> Compiled:
    """Prepares a method for `evaluate` and for `RULES`."""
    steps = make_steps(
        method, optax.identity(), {}, mini_batches=1, temperature=1.0, compute=Compute()
    )

    @partial(jax.jit, static_argnames="num_parts")
    def run(student, old, teachers, batch, step, garbage, num_parts) -> Outcome:
        def measure(requests, student):
            def of(teacher, statistic):
                x = statistic(student, teachers.get(teacher), batch.rollouts.response)
                if teacher is not None:
                    x = jnp.where(batch.hints[teacher].shown[:, None] != 0, x, 0.0)
                return jnp.where(batch.rollouts.mask_t != 0, x, garbage)

            return {name: of(*request) for name, request in requests.items()}

        scores = measure({**ALWAYS_SCORED, **method.score}, old)
        credited, metrics = steps.credit(batch.replace(scores=scores), step)

        def loss(student):
            probed = measure({**ALWAYS_PROBED, **method.probe}, student)

            def of_part(rows):
                part = take_rows(credited, rows)
                return method.loss({name: x[rows] for name, x in probed.items()}, part, step)[0]

            parts = np.array_split(np.arange(len(student)), num_parts)
            loss_t = jnp.concatenate([of_part(rows) for rows in parts])
            weighted_t = jnp.where(credited.weight_t != 0, loss_t * credited.weight_t, 0.0)
            return losses.weighted_sum(loss_t, credited.weight_t), weighted_t

        gradient, loss_t = jax.grad(loss, has_aux=True)(student)
        return Outcome(loss_t, gradient, credited.credit, metrics)

    return Compiled(method, run)


def evaluate(of: Compiled, case: Case, garbage: float = 0.0, num_parts: int = 1) -> Outcome:
    """What the method makes of a case.

    Args:
      garbage: stands where no value may matter.
      num_parts: of the rows whose losses are computed one after the other and added.
    """
    logits = {"student": case.student, "old": case.old, "teachers": dict(case.teachers)}
    return of.run(
        **jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), logits),
        batch=batch_of(case, of.method, garbage),
        step=jnp.int32(case.step),
        garbage=garbage,
        num_parts=num_parts,
    )


def check(method: Method) -> None:
    """Puts a method through all `RULES`; in some seconds, on any device.

    Raises:
      AssertionError: the name of the first rule that it breaks, what the rule says, and how.
    """
    subject = compiled(method)
    for rule in RULES:
        try:
            rule(subject)
        except AssertionError as error:
            raise AssertionError(f"{rule.__name__}: {rule.__doc__} Here {error}.") from error


SITUATIONS = {  # verdicts, lengths, truncated
    "all correct": ("1111 1111 1111 1111", [3, 1], [False]),
    "all wrong": ("0000 0000 0000 0000", [3, 1], [False]),
    "one row": ("1100 0000 1000 1111", [3] + [0] * 15, [False]),
    "one token": ("1100 0000 1000 1111", [1] + [0] * 15, [False]),
    "no token": ("1100 0000 1000 1111", [0], [False]),
    "a truncated group": ("0000 0000 1000 1111", [3], [True] * 4 + [False] * 12),
    "truncated groups": ("1100 0000 1000 1111", [3], [True] * 4 + [False] * 8 + [True] * 4),
    "ungraded rows": ("???? ?1?? ??0? 01??", [3, 1], [False]),
    "no graded row": ("???? ???? ???? ????", [3, 1], [False]),
}


def is_finite(of: Compiled) -> None:
    """No batch makes NaN or infinity; one without a token to train on has no loss and gradient."""
    for name, (verdicts, lengths, truncated) in SITUATIONS.items():
        case = draw(of.method, verdicts, lengths, truncated)
        outcome = evaluate(of, case)
        finite = all(jnp.isfinite(x).all() for x in jax.tree.leaves(outcome))
        assert finite, f"something is not finite in a batch with {name}"
        if not weigh(of.method, batch_of(case, of.method), 1).weight_t.any():
            moved = bool(outcome.loss_t.any()) or bool(outcome.gradient.any())
            assert not moved, f"a batch with {name} has a loss"


def ignores_what_is_masked(of: Compiled) -> None:
    """Tokens that do not train, and rewards that nobody gave, get no credit and change nothing."""
    case = draw(of.method)
    want = evaluate(of, case)
    unmasked_t = np.asarray(of.method.mask(batch_of(case, of.method)) != 0)
    for name, x in _of_tokens(want).items():
        assert not x[~unmasked_t].any(), f"masked tokens have {name}"
    for garbage in (math.nan, math.inf, -math.inf, 1e4):
        got = evaluate(of, case, garbage)
        same = jax.tree.map(np.array_equal, got, want)
        assert all(jax.tree.leaves(same)), f"{garbage} at masked tokens changes the result"


def ignores_padding(of: Compiled) -> None:
    """Responses padded to a greater length give the same."""
    case, rng = draw(of.method), np.random.default_rng(1)
    B = len(case.mask)

    def wider(x):
        return np.concatenate([x, rng.standard_normal((B, 2, V))], axis=1)

    padded = case._replace(
        student=wider(case.student),
        old=wider(case.old),
        teachers={name: wider(x) for name, x in case.teachers.items()},
        token=np.concatenate([case.token, rng.integers(V, size=(B, 2))], axis=1),
        mask=np.concatenate([case.mask, np.zeros((B, 2), bool)], axis=1),
    )
    want, got = evaluate(of, case), evaluate(of, padded, garbage=math.nan)
    for name, x in _of_tokens(got).items():
        assert not x[:, T:].any(), f"padding has {name}"
    _expect_same(want, jax.tree.map(lambda x: x[:, :T] if np.ndim(x) > 1 else x, got))


def ignores_the_order_of_groups(of: Compiled) -> None:
    """Groups in another order give the same."""
    case = draw(of.method)
    rows = (np.array([2, 0, 3, 1])[:, None] * G + np.arange(G)).ravel()

    def move(shown: Shown) -> Shown:
        source = shown.source[rows]
        return Shown(shown.shown[rows], np.where(source < 0, -1, np.argsort(rows)[source]))

    arrays = case._replace(shown={}, group_size=None, max_length=None, step=None)
    moved = jax.tree.map(lambda x: x[rows], arrays)._replace(
        shown={name: move(shown) for name, shown in case.shown.items()},
        group_size=case.group_size,
        max_length=case.max_length,
        step=case.step,
    )
    want, got = evaluate(of, case), evaluate(of, moved)
    _expect_same(jax.tree.map(lambda x: x[rows] if np.ndim(x) > 1 else x, want), got)


def ignores_the_order_of_the_vocabulary(of: Compiled) -> None:
    """Numbers of tokens mean nothing."""
    case, order = draw(of.method), np.array([3, 1, 4, 0, 2])
    moved = _map_logits(case, lambda x: x[..., order])._replace(token=np.argsort(order)[case.token])
    want, got = evaluate(of, case), evaluate(of, moved)
    _expect_same(want._replace(gradient=want.gradient[..., order]), got, atol=1e-7)


def ignores_shifts_of_logits(of: Compiled) -> None:
    """Logits and logits plus a constant are the same distribution."""
    case, rng = draw(of.method), np.random.default_rng(1)
    shifted = _map_logits(case, lambda x: x + rng.uniform(-5, 5, size=(*x.shape[:2], 1)))
    _expect_same(evaluate(of, case), evaluate(of, shifted), rtol=1e-5, atol=1e-6)


def adds_up_over_parts(of: Compiled) -> None:
    """The loss of a row knows no other row, so that a batch may be computed in parts."""
    case = draw(of.method)
    _expect_same(evaluate(of, case), evaluate(of, case, num_parts=3))


def trains_only_through_probes(of: Compiled) -> None:
    """No gradient of the loss reaches scores or credit; else weights would be trained, too."""
    method, rng = of.method, np.random.default_rng(1)
    case = draw(method, eps=0.1)
    B = len(case.mask)

    def values(requests):
        x = rng.standard_normal((len(requests), B, T)) * 0.1
        return dict(zip(requests, jnp.asarray(x, jnp.float32), strict=True))

    scores = values({**ALWAYS_SCORED, **method.score})
    probed = values({**ALWAYS_PROBED, **method.probe})
    credit = Credit(values(["adv_t"])["adv_t"], jnp.ones((B, T)))
    batch = batch_of(case, method)

    def loss(scores, credit, probed):
        return method.loss(probed, batch.replace(scores=scores, credit=credit), 0)[0].sum()

    to_scores, to_credit, to_probed = jax.grad(loss, argnums=(0, 1, 2))(scores, credit, probed)
    for name, x in {**to_scores, "the advantage": to_credit.adv_t}.items():
        assert not x.any(), f"a gradient reaches {name}"
    assert any(x.any() for x in to_probed.values()), "no gradient reaches a probe"


def averages(of: Compiled) -> None:
    """Weights are an average's: none where nothing trains, and halved in a batch given twice."""
    batch = batch_of(draw(of.method), of.method)
    mask_t = of.method.mask(batch)
    weight_t = np.asarray(of.method.weight(mask_t))
    assert not weight_t[np.asarray(mask_t) == 0].any(), "masked tokens have a weight"
    assert (weight_t >= 0).all(), "a weight is negative"
    twice = np.asarray(of.method.weight(jnp.concatenate([mask_t, mask_t])))
    _expect_close("twice the weight", 2 * twice[: len(mask_t)], weight_t, rtol=1e-6)


RULES = (
    is_finite,
    ignores_what_is_masked,
    ignores_padding,
    ignores_the_order_of_groups,
    ignores_the_order_of_the_vocabulary,
    ignores_shifts_of_logits,
    adds_up_over_parts,
    trains_only_through_probes,
    averages,
)


def _of_tokens(outcome: Outcome) -> dict[str, np.ndarray]:
    credit = outcome.credit
    of_tokens = {"advantage": credit.adv_t, "distillation": credit.distill_t}
    return {name: np.asarray(x) for name, x in {**of_tokens, "gradient": outcome.gradient}.items()}


def _map_logits(case: Case, change: Callable[[np.ndarray], np.ndarray]) -> Case:
    return case._replace(
        student=change(case.student),
        old=change(case.old),
        teachers={name: change(x) for name, x in case.teachers.items()},
    )


def _expect_same(want: Outcome, got: Outcome, rtol: float = 1e-6, atol: float = 1e-8) -> None:
    """`atol` is the gradient's."""
    _expect_close("the loss of a token", got.loss_t, want.loss_t, rtol, 1e-8)
    _expect_close("the gradient", got.gradient, want.gradient, rtol, atol)
    _expect_close("the advantage", got.credit.adv_t, want.credit.adv_t, rtol)
    _expect_close("the distillation", got.credit.distill_t, want.credit.distill_t, rtol)


def _expect_close(what: str, got, want, rtol: float, atol: float = 0.0) -> None:
    """Up to `atol` + `rtol` times the largest: float32 rounds sums by the size of their terms."""
    difference, size = np.abs(got - want).max(), np.abs(want).max()
    assert difference <= atol + rtol * size, f"{what} differs by up to {difference:.3g}"
