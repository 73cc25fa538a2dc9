"""RLRT: RLSD with the teacher reversed (arXiv 2605.10781, as CAST App. 8.4 states and runs it).

Correct answers are reinforced where they differ from what a self that saw a correct sibling would
have said.

    d   = log pi_old(y_t | x) - log pi_phi(y_t | x, sibling)
    A_t = A ((1 - lam) + lam clip(exp(sign(A) d), 1 - eps_w, 1 + eps_w))  on correct rows, else A

Deviations from the paper:
  - The paper itself was not read; CAST's description is followed.
  - Not stated there: a correct row without a correct sibling keeps A; clip .2/.28, mean over
    tokens, a copy of the policy every 10 steps and untrained truncated rows are CAST's settings.
"""

import jax.numpy as jnp

from jaxrl_sd import contexts, losses, stats, teachers
from jaxrl_sd.methods.base import (
    Count,
    Method,
    NonNegative,
    Teacher,
    advantage,
    policy_gradient,
    verdict_reward_untruncated,
)
from jaxrl_sd.methods.rlsd import clipped_shares, evidence_weight
from jaxrl_sd.types import Credit


def rlrt(
    lam: NonNegative = 0.5,
    eps_w: NonNegative = 1.0,
    sync_every: Count = 10,
    clip_low: NonNegative = 0.2,
    clip_high: NonNegative = 0.28,
) -> Method:
    """Correct answers gain most where a self that saw a sibling disagrees.

    Args:
      lam: mixing coefficient, constant; 0 is GRPO with a token mean.
      eps_w: half-width of the clip of the weight.
      sync_every: steps between copies of the policy to the teacher.
      clip_low: PPO clip below 1.
      clip_high: PPO clip above 1.
    """

    def credit(batch, step):
        del step
        r, shown = batch.rollouts, batch.hints["teacher"].shown
        A = advantage(batch)[:, None]
        w_t = evidence_weight(A, -batch.scores["gap"], eps_w)
        reversed_rows = (shown * r.correct * r.graded)[:, None] != 0
        adv_t = jnp.where(reversed_rows, A * ((1 - lam) + lam * w_t), A) * r.mask_t
        return Credit(adv_t, 0 * adv_t), clipped_shares(w_t, eps_w, reversed_rows * r.mask_t)

    return Method(
        grade=verdict_reward_untruncated,
        teachers={"teacher": Teacher(contexts.verified_sibling(), teachers.synced(sync_every))},
        score={"gap": ("teacher", stats.log_prob_gap)},
        credit=credit,
        loss=policy_gradient(clip_low, clip_high),
        weight=losses.token_mean,
    )
