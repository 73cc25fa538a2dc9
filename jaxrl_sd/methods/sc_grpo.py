"""SC-GRPO: self-conditioned credit assignment (arXiv 2606.18810).

GRPO whose tokens are weighted by how much the policy changes its mind there when it is shown a
verified answer of its own group.

    D_t  = kl(sg pi(. | x, tau, o_<t) || pi(. | x, o_<t)),  tau a verified sibling  Sec. 5.1
    f    = D / (D + c),  c = max(P75(D over active tokens), c_min)
    loss = - mean_i mean_t f(D_it) min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i)

    solved in the group | reference shown                  | advantage      | weight
    2 .. G - 1          | a verified sibling, never itself | A              | f
    0                   | one failed sibling for the group | alpha A_div    | f
    1 or G              | none                             | A              | 1

    A_div = standardised s_i, s_i = mean of f over the first min(|o_i|, |o_r|) tokens    Eq. 5

Since f >= 0, f min(..) = min over f A: the weight goes into the token advantage.

Deviations from the paper:
  - The percentile is taken over the whole batch (Algorithm 1 says all tokens, the text the current
    micro-batch), so that the micro-batch size changes nothing.
  - D is computed at the start of the step; with one update a batch that is the live policy.
  - Unstated there and chosen here: f carries no gradient; full vocabulary; the shown failure itself
    has no s, enters no mean and gets advantage 0; standard deviations with n - 1 and 1e-6; eps 0.2;
    the solve-none reference gets a neutral wording. Algorithm 1 line 16 averages s over the whole
    response; the text's min(|o_i|, |o_r|) is followed, and tokens beyond it keep their f.

Found in the paper:
  - f < 1 is not renormalised, so weighted groups have smaller gradients than GRPO's, and a group
    that was solved once has the largest weight, 1.
  - "Infeasible average" (App. A): what is exact is that kl(teacher||student) to several teachers is
    that to their mean plus a constant, and kl(student||teacher) that to their geometric mean plus
    -log Z (tests/test_theory.py). Infeasible is not defined, and that the target inherits the
    references' artefacts is an argument.
"""

import jax.numpy as jnp

from jaxrl_sd import contexts, groups, losses, stats, teachers
from jaxrl_sd.contexts import Context, Hint
from jaxrl_sd.methods.base import (
    Method,
    NonNegative,
    Positive,
    Share,
    Teacher,
    advantage,
    policy_gradient,
)
from jaxrl_sd.types import Array, Batch, Credit


def reference_trajectory() -> Context:
    """The routing table above: a verified sibling, one shared failure, or silence."""

    def write(problem, samples, rng):
        solved = sum(s.correct is True for s in samples)
        graded = sum(s.correct is not None for s in samples)
        if 2 <= solved < graded:
            return contexts.verified_sibling().write(problem, samples, rng)
        if solved > 0 or graded < 2:
            return [None] * len(samples)
        r = contexts.draw_peer(samples, -1, rng, correct=False)
        shown = Hint("attempt", {"peer": samples[r].text}, r)
        return [None if i == r else shown for i in range(len(samples))]

    return Context(write)


def saturating_weight(D_t: Array, active_t: Array, quantile: float, c_min: float):
    """f = D / (D + c) f32[B, T], 0 where inactive, and c = max(quantile of active D, c_min)."""
    D_t = jnp.where(active_t != 0, jnp.maximum(D_t, 0.0), 0.0)  # rounding can leave -1e-8
    c = jnp.maximum(stats.masked_quantile(D_t, active_t, quantile), c_min)
    return D_t / (D_t + c), c


def diversity_advantage(f_t: Array, batch: Batch, scored: Array) -> Array:
    """A_div f32[B] (Eq. 5): rows with scored = 1 compared with their group's shown failure."""
    mask_t, source = batch.rollouts.mask_t, batch.hints["teacher"].source
    length = mask_t.sum(axis=1)
    L = jnp.minimum(length, length[jnp.maximum(source, 0)])
    position = jnp.cumsum(mask_t, axis=1)  # 1 at the first trained token
    within = mask_t * (position <= L[:, None])
    s = (f_t * within).sum(axis=1) / jnp.maximum(within.sum(axis=1), 1)
    return groups.standardized(s, scored, batch.rollouts.group_size)


def sc_grpo(
    alpha: NonNegative = 0.1,
    quantile: Share = 0.75,
    c_min: Positive = 1e-4,
    clip_low: NonNegative = 0.2,
    clip_high: NonNegative = 0.2,
) -> Method:
    """Tokens weigh more where a verified sibling changes the policy's mind.

    Args:
      alpha: scale of the diversity advantage in groups that nobody solved.
      quantile: of the active divergences, becomes c.
      c_min: lower bound of c, in nats.
      clip_low: PPO clip below 1.
      clip_high: PPO clip above 1.
    """

    def credit(batch, step):
        del step
        r, shown = batch.rollouts, batch.hints["teacher"].shown
        f_t, c = saturating_weight(
            batch.scores["divergence"], r.mask_t * shown[:, None], quantile, c_min
        )
        solved = groups.num_correct(r.correct, r.graded, r.group_size)
        none_solved = shown * r.graded * (solved == 0)
        A_div = diversity_advantage(f_t, batch, none_solved)
        A = jnp.where(solved == 0, alpha * A_div, advantage(batch))
        weight_t = jnp.where(shown[:, None] != 0, f_t, 1.0)
        metrics = {
            "c": c,
            "mean_weight": losses.weighted_sum(f_t, losses.token_mean(r.mask_t * shown[:, None])),
            "none_solved": (solved == 0).mean(),
        }
        adv_t = A[:, None] * weight_t * r.mask_t
        return Credit(adv_t, 0 * adv_t), metrics

    return Method(
        teachers={"teacher": Teacher(reference_trajectory(), teachers.current())},
        score={"divergence": ("teacher", stats.forward_kl)},
        credit=credit,
        loss=policy_gradient(clip_low, clip_high),
    )
