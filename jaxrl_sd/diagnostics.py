"""Numbers that say what a method did and whether a run is healthy. They change nothing.

A gap is log p_T - log p_S of a sampled token, of one teacher. Means of nothing are NaN.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxrl_sd import groups, losses, stats
from jaxrl_sd.methods.base import Method, Teacher, advantage
from jaxrl_sd.model import Compute, ModelConfig
from jaxrl_sd.types import Array, Batch, Rollouts
from jaxrl_sd.update import Parts, State, fill, make_score, teacher_params

PROFILE = range(-2, 5)  # offsets in tokens from an answer's divergence


@jax.jit
def describe(batch: Batch) -> dict[str, Array]:
    """Scalars of a credited batch: reward, entropy, credit, sampler error.

    `rollout/sampler_logp_error_*` compares the sampler's and the trainer's log-probability of the
    same tokens under the same weights: what is left is rounding, or a bug.
    """
    r = batch.rollouts
    mean = partial(losses.weighted_sum, weight_t=losses.token_mean(r.mask_t))
    error_t = sampler_error(batch)
    adv_t, distill_t = batch.credit.adv_t, batch.credit.distill_t
    return {
        "rollout/reward": _mean(r.reward, r.graded),
        "rollout/entropy": mean(batch.scores["entropy"]),
        "rollout/sampler_logp_error_mean": mean(error_t),
        "rollout/sampler_logp_error_max": error_t.max(),
        "credit/adv_abs": mean(jnp.abs(adv_t)),
        "credit/adv_positive": mean(adv_t > 0),
        "credit/distill": mean(distill_t),
        **credit_shares(batch),
        **{f"score/{name}": mean(x) for name, x in batch.scores.items()},
    }


def _mean(x: Array, weight: Array) -> Array:
    return losses.weighted_sum(x, weight) / weight.sum()


def sampler_error(batch: Batch) -> Array:
    """|log p of the sampler - log p of the trainer|, f32[B, T], 0 where masked."""
    r = batch.rollouts
    return jnp.where(r.mask_t != 0, jnp.abs(batch.scores["old_logp"] - r.sampler_logp_t), 0.0)


def credit_shares(batch: Batch) -> dict[str, Array]:
    """Where the credit of a batch goes.

    `credit/flipped`: of the tokens that the method trains, those whose advantage has the opposite
    sign of their row's group-relative advantage. `credit/zero`: those with neither advantage nor
    distillation. `credit/uniform`: of |adv_t| + |distill_t|, as the loss weighs it, the share of
    groups whose graded answers are all correct or all wrong.
    """
    r, weight_t, credit = batch.rollouts, batch.weight_t, batch.credit
    trained_t = (weight_t != 0).astype(jnp.float32)
    flipped_t = jnp.sign(credit.adv_t) * jnp.sign(advantage(batch))[:, None] < 0
    size_t = jnp.abs(credit.adv_t) + jnp.abs(credit.distill_t)
    correct = groups.num_correct(r.correct, r.graded, r.group_size)
    uniform = (correct == 0) | (correct == groups.num_graded(r.graded, r.group_size))
    return {
        "credit/flipped": _mean(flipped_t, trained_t),
        "credit/zero": _mean(size_t == 0, trained_t),
        "credit/uniform": _mean(jnp.where(uniform[:, None], 1.0, 0.0), size_t * weight_t),
    }


def make_gaps(
    method: Method, configs: Mapping[str, ModelConfig], temperature: float, compute: Compute
) -> Callable[[State, Batch, Parts], dict[str, Array]]:
    """(state, batch, parts) -> {teacher: f32[B, T]}: log p_T - log p_S of the sampled tokens.

    Whatever the method itself computes.
    """
    requests = {name: (name, stats.log_prob_gap) for name in method.teachers}
    score = make_score(requests, method, configs, temperature, compute)
    return partial(fill, score, tuple(requests))


@partial(jax.jit, static_argnames="stop_ids")
def describe_gaps(
    batch: Batch, gaps: dict[str, Array], stop_ids: tuple[int, ...]
) -> dict[str, Array]:
    """Scalars of each teacher's gaps f32[B, T], as `teacher/<name>/...`.

    In nats, over the tokens that train (only graded rows do) and whose teacher is shown something.

    gap_abs, gap_zero: mean size, and share of exact zeros.
    gap_over_noise: gap_abs over `rollout/sampler_logp_error_mean`; near 1 the gaps are rounding.
      Infinite where sampler and trainer agree exactly.
    gap_correct_up, gap_correct_down, gap_wrong_up, gap_wrong_down: mean of max(gap, 0) and of
      min(gap, 0) over all tokens of correct and of wrong answers; up + down is the mean gap.
    gap_stop_correct, gap_stop_wrong: mean gap at the stop token of answers that have one.
    gap_before, gap_at_divergence, gap_after: mean size over the tokens of wrong answers before, at
      and after their `divergence`.
    divergence_profile/<offset>: the same at so many tokens from it.
    information, information_correct, information_wrong: see `information`.
    """
    at = divergence(batch.rollouts)
    stop_t = jnp.isin(batch.rollouts.response, jnp.array(stop_ids))  # no answer goes on after one
    noise = _mean(sampler_error(batch), batch.rollouts.mask_t)
    metrics = {}
    for name, gap_t in gaps.items():
        mask_t = batch.rollouts.mask_t * batch.hints[name].shown[:, None]
        size = _mean(jnp.abs(gap_t), mask_t)
        of_teacher = {
            "gap_abs": size,
            "gap_zero": _mean(gap_t == 0, mask_t),
            "gap_over_noise": size / noise,
            "information": information(gap_t, mask_t),
            **around(at, jnp.abs(gap_t), mask_t),
        }
        correct = batch.rollouts.correct[:, None]
        for verdict, of_verdict_t in (
            ("correct", mask_t * correct),
            ("wrong", mask_t * (1 - correct)),
        ):
            of_teacher |= {
                f"gap_{verdict}_up": _mean(jnp.maximum(gap_t, 0.0), of_verdict_t),
                f"gap_{verdict}_down": _mean(jnp.minimum(gap_t, 0.0), of_verdict_t),
                f"gap_stop_{verdict}": _mean(gap_t, of_verdict_t * stop_t),
                f"information_{verdict}": information(gap_t, of_verdict_t),
            }
        metrics |= {f"teacher/{name}/{key}": x for key, x in of_teacher.items()}
    return metrics


def information(gap_t: Array, mask_t: Array) -> Array:
    """Mean over rows of the summed gaps: nats that the context adds to an answer's log-probability.

    HSD (2606.15576) Prop. 2: if answers o come from the teacher that sees c, and the student is the
    mean of that teacher over c, then E[log p_T(o) - log p_S(o)] = I(o; c) <= H(c), at most log k
    for a final answer c with k values: little for an answer-only context, whatever the length.

    The bound is about that mean over both contexts and the teacher's own answers. It is not about
    this number: these answers are the student's, for which E[log p_T(o) - log p_S(o)] is
    -kl(p_S||p_T) <= 0 where c was written without looking at them; a model that reads c need not
    have the student as its mean; the parts of correct and of wrong answers are means of selected
    answers; and single answers or tokens are not bounded at all.
    """
    return _mean(losses.row_sum(gap_t, mask_t), mask_t.max(axis=1))


def divergence(r: Rollouts) -> Array:
    """Where each wrong answer leaves the path of a correct one, i32[B], -1 for nowhere.

    The first token that differs from the correct answer of its group that shares the longest prefix
    with it. An answer that is a prefix of another does not differ from it.
    """
    G = r.group_size
    mask_t, token = groups.by_group(r.mask_t != 0, G), groups.by_group(r.response, G)
    correct = groups.by_group(r.correct != 0, G)
    pair = ~correct[:, :, None] & correct[:, None]  # [P, G, G]
    both_t = mask_t[:, :, None] & mask_t[:, None] & pair[..., None]  # no row trains ungraded
    differ_t = both_t & (token[:, :, None] != token[:, None])  # [P, G, G, T]
    first = jnp.where(differ_t.any(axis=-1), differ_t.argmax(axis=-1), -1)
    return first.max(axis=2).reshape(-1)


def around(at: Array, size_t: Array, mask_t: Array) -> dict[str, Array]:
    """Means of sizes f32[B, T] before, at, after and near the places i32[B], -1 for none."""
    offset_t = jnp.arange(size_t.shape[1])[None] - at[:, None]
    mask_t = mask_t * (at >= 0)[:, None]
    return {
        "gap_before": _mean(size_t, mask_t * (offset_t < 0)),
        "gap_at_divergence": _mean(size_t, mask_t * (offset_t == 0)),
        "gap_after": _mean(size_t, mask_t * (offset_t > 0)),
        **{f"divergence_profile/{k}": _mean(size_t, mask_t * (offset_t == k)) for k in PROFILE},
    }


def distances(teachers: Mapping[str, Teacher], state: State) -> dict[str, Array]:
    """`teacher/<name>/distance`: L2 distance of its weights from the student's, over their norm.

    An adapter counts by its two factors. Left out for a teacher whose weights have other shapes.
    """
    return _distances(tuple(teachers.items()), state)


@partial(jax.jit, static_argnums=0)
def _distances(teachers: tuple[tuple[str, Teacher], ...], state: State) -> dict[str, Array]:
    student = _float32(state.policy())
    params = {name: _float32(x) for name, x in teacher_params(dict(teachers), state).items()}
    return {
        f"teacher/{name}/distance": optax.tree.norm(optax.tree.sub(x, student))
        / optax.tree.norm(student)
        for name, x in params.items()
        if jax.tree.map(jnp.shape, x) == jax.tree.map(jnp.shape, student)
    }


def _float32(params):
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)
