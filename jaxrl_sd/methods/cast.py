"""CAST: Clipped Asymmetric Self-Teaching with advantage flipping (arXiv 2606.00172).

A lagged copy of the policy, shown no answer, keeps or flips the sign of each token's advantage.

    g    = sg[log pi_phi(y_t | marker) - log pi_old(y_t)]                         Eq. 4
    B    = A in mixed groups, +1 in all-correct, -1 in all-wrong ones             Eq. 6
    keep = B (1 + lam (clip(exp(sign(B) g), l, u) - 1)), (l, u) by the sign of B  Eq. 7-9
    down = -|B| (1 + lam (clip(exp(-g), max(1, l-), u-) - 1))   if B > 0, g < 0   Eq. 10-11
    up   = +|B| (1 + lam (clip(exp(+g), max(1, l+), u+) - 1))   if B < 0, g > 0   Eq. 12-13
    A_t  = clip(down, up or keep, -1.2, 1.2)                                      Eq. 14-15

With both flips A_t(B, g) = A_t(-B, g) for every g != 0, whatever lam and the bounds are; and the
sign of A_t is that of g if u+ and u- are at least 1, as by default. So the verdict enters through
|B| and through tokens with g = 0 exactly, all-correct and all-wrong groups are trained alike but
for these, and lower bounds up to 1 act with `flip=False` only. The paper does not say so;
tests/test_theory.py shows it. Watch `gap_negative`, `gap_zero` and `gap_positive`.

Deviations from the paper:
  - The copy is made every 10 steps, a step being one batch of rollouts; the paper counts optimiser
    updates, which is the same with one update a batch.
  - Unstated there and chosen here: mean over all trained tokens; standard deviation with n - 1 and
    1e-6; truncated rows count in their group's statistics although their tokens do not train; the
    teacher's `{x}` is the student's rendered chat prompt, with the marker line after it.
  - Eq. 4 shows the teacher the student's own context, so that g = 0 everywhere after each copy;
    App. 8.4 adds the marker line and is followed.
  - Sec. 3.4 flips tokens that are "sufficiently" teacher-positive; Eq. 10 and 12 have the threshold
    0 and are followed. Rounding can decide such signs; the precision is not stated there.
  - Whether log-probabilities are tempered is not stated: logits are divided by the sampling
    temperature, top-k and top-p are left out.
  - g is bounded by +-20 before exp; the clips make this invisible.
  - After `cutoff` the paper says the gap no longer matters, while its Eq. 10 and 12 would still
    flip at lam = 0; flips are switched off there too.
"""

from typing import Annotated

import jax.numpy as jnp

from jaxrl_sd import contexts, groups, losses, stats, teachers
from jaxrl_sd.methods.base import (
    Count,
    Limits,
    Method,
    NonNegative,
    NonNegativeInt,
    Positive,
    Teacher,
    advantage,
    policy_gradient,
    verdict_reward_untruncated,
)
from jaxrl_sd.types import Array, Credit

Bounds = Annotated[
    tuple[float, float], Limits(lambda x: 0 <= x[0] <= x[1], "with 0 <= low <= high")
]


def base_advantage(batch, uniform: float | Array = 1.0) -> Array:
    """B f32[B]: A in mixed groups, +-uniform in all-correct and all-wrong ones. CAST Eq. 6."""
    r = batch.rollouts
    correct = groups.num_correct(r.correct, r.graded, r.group_size)
    graded = groups.num_graded(r.graded, r.group_size)
    B = jnp.where(correct == graded, uniform, jnp.where(correct == 0, -uniform, advantage(batch)))
    return B * r.graded


def token_weight(
    B: Array, g_t: Array, clip_positive: Bounds, clip_negative: Bounds, flip: bool | Array
) -> tuple[Array, Array, Array, Array]:
    """The sign of each A_t, its weight before the clip, and the bounds of the clip; f32[B, T] each.

    A flipped token has the bounds of its new sign, the lower one at least 1. CAST Eq. 7-13.
    """
    flipped_t = flip & (jnp.sign(B) * g_t < 0)
    sign_t = jnp.where(flipped_t, -jnp.sign(B), jnp.sign(B))
    z_t = jnp.exp(jnp.clip(sign_t * g_t, -losses.LOG_RATIO_BOUND, losses.LOG_RATIO_BOUND))
    (l_pos, u_pos), (l_neg, u_neg) = clip_positive, clip_negative
    low_t = jnp.where(sign_t > 0, l_pos, l_neg)
    low_t = jnp.where(flipped_t, jnp.maximum(low_t, 1.0), low_t)
    return sign_t, z_t, low_t, jnp.where(sign_t > 0, u_pos, u_neg)


def token_advantage(
    B: Array,
    g_t: Array,
    lam: float | Array = 1.0,
    clip_positive: Bounds = (0.8, 1.05),
    clip_negative: Bounds = (0.95, 1.2),
    max_adv: float = 1.2,
    flip: bool | Array = True,
) -> Array:
    """A_t f32[B, T] from B f32[B, 1] and g_t f32[B, T]. CAST Eq. 7-15."""
    sign_t, z_t, low_t, high_t = token_weight(B, g_t, clip_positive, clip_negative, flip)
    w_t = jnp.clip(z_t, low_t, high_t)
    return jnp.clip(sign_t * jnp.abs(B) * (1 + lam * (w_t - 1)), -max_adv, max_adv)


def cast(
    lam: NonNegative = 1.0,
    clip_positive: Bounds = (0.8, 1.05),
    clip_negative: Bounds = (0.95, 1.2),
    max_adv: Positive = 1.2,
    flip: bool = True,
    cutoff: NonNegativeInt | None = None,
    sync_every: Count = 10,
    clip_low: NonNegative = 0.2,
    clip_high: NonNegative = 0.28,
) -> Method:
    """The sign of each token's advantage follows a lagged self that sees no answer.

    Args:
      lam: shaping strength.
      clip_positive: (l+, u+), bounds of the weight where B > 0.
      clip_negative: (l-, u-), bounds of the weight where B < 0.
      max_adv: bound of the final token advantage.
      flip: False is the paper's "no sign reversal" ablation.
      cutoff: from this step on (counted from 0) shaping, flips and the +-1 of uniform groups are
        off; None never.
      sync_every: steps between copies of the policy to the teacher.
      clip_low: PPO clip below 1.
      clip_high: PPO clip above 1.
    """

    def credit(batch, step):
        mask_t = batch.rollouts.mask_t
        on = jnp.array(True) if cutoff is None else step < cutoff
        B = base_advantage(batch, uniform=jnp.where(on, 1.0, 0.0))[:, None]
        g_t = batch.scores["gap"]
        adv_t = token_advantage(
            B, g_t, jnp.where(on, lam, 0.0), clip_positive, clip_negative, max_adv, on & flip
        )
        _, z_t, low_t, high_t = token_weight(B, g_t, clip_positive, clip_negative, on & flip)
        tokens = jnp.maximum(mask_t.sum(), 1)

        def share(condition):
            return (condition * mask_t).sum() / tokens

        metrics = {
            "gap_negative": share(g_t < 0),
            "gap_zero": share(g_t == 0),
            "gap_positive": share(g_t > 0),
            "base_flipped": share(adv_t * B < 0),
            "weight_clipped_low": share(z_t < low_t),
            "weight_clipped_high": share(z_t > high_t),
        }
        return Credit(adv_t * mask_t, 0 * adv_t), metrics

    return Method(
        grade=verdict_reward_untruncated,
        teachers={"teacher": Teacher(contexts.marker(), teachers.synced(sync_every))},
        score={"gap": ("teacher", stats.log_prob_gap)},
        credit=credit,
        loss=policy_gradient(clip_low, clip_high),
        weight=losses.token_mean,
    )
