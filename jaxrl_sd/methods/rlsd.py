"""RLSD: Self-Distilled RLVR (arXiv 2604.03128).

The policy, shown the final answer, says how much each sampled token of its own answer is worth;
the verifier alone says in which direction.

    Delta_t = sg[log P_T(y_t) - log P_S(y_t)]                                     Eq. 13
    w_t     = exp(sign(A) Delta_t)                                                Eq. 14
    A_t     = A ((1 - lam) + lam clip(w_t, 1 - eps_w, 1 + eps_w))        Eq. 15, Alg. 1 line 17
    loss    = - mean over tokens of min(rho A_t, clip(rho, 1 - eps_low, 1 + eps_high) A_t)

Deviations from the paper:
  - Eq. 16 and Alg. 1 line 22 contain constants only, so their gradient is zero, and the min of
    Eq. 16 would clip w on one side. The gradient meant is Eq. 38's; the ratio surrogate is Sec.
    4.2's ("drop-in for the uniform advantage") and the released code's.
  - The paper averages each sequence first (1/|y_i|); the released code averages all tokens of the
    batch. The code's reading is followed here.
  - Schedule: the paper's 50 and 10 (the released script has 60 and 20). As in the code, k counts
    from 1 and the teacher is copied after update k when k is a multiple of `sync_every`.
  - Delta is taken at the start of the step. The released code takes it in each micro-batch, from
    the current policy; with one update a batch the two are the same.
  - Delta is bounded by +-20 before exp; the clip of w makes this invisible.
  - Eq. 1 prints no guard and no divisor: standard deviation with n - 1 and 1e-6, as released.
    Groups with equal rewards are not mentioned: advantage 0, and their tokens stay in the mean.
  - Only in the released code, and left out: dual clip 3; a tenth of the reward for format and a
    length term (the paper's R is 0 or 1); a teacher prompt without the student's instructions
    (here the two prompts differ by the reference alone).

Found in the paper (tests/test_theory.py):
  - Theorem 1's floor, the mutual information, is that of kl(teacher||student) and of a teacher that
    stands still. Under kl(student||teacher) it is -log Z, at the teachers' geometric mean.
  - Proposition 1 (ii) drops cross terms. E|delta|^2 = tr(J^T Cov J); the printed diagonal form is
    neither that nor a lower bound of it.
  - Theorem 4 needs a student that is the mean of its teachers and the exponent +1 (A > 0).
  - Theorem 5 holds token by token only. In expectation with A fixed and w unclipped, the answer
    does steer: the update is P_T - P_S, that of uncapped OPSD, for A > 0, and half the descent of
    chi2(P_S||P_T) for A < 0. The clip makes it smaller, 3.1 times on the toy of the tests, and lam
    in proportion.
  - The mean of the clipped w is not 1, so credit is not only moved between tokens.
"""

import jax.numpy as jnp

from jaxrl_sd import contexts, losses, stats, teachers
from jaxrl_sd.methods.base import (
    Count,
    Method,
    Metrics,
    NonNegative,
    Teacher,
    advantage,
    linear_decay,
    policy_gradient,
)
from jaxrl_sd.types import Array, Credit


def evidence_weight(A: Array, Delta_t: Array, eps_w: float) -> Array:
    """clip(exp(sign(A) Delta_t), 1 - eps_w, 1 + eps_w), f32[B, T]. RLSD Eq. 14 and 15.

    Args:
      A: f32[B, 1], advantage of each row.
      Delta_t: f32[B, T].
    """
    w_t = jnp.exp(jnp.clip(jnp.sign(A) * Delta_t, -losses.LOG_RATIO_BOUND, losses.LOG_RATIO_BOUND))
    return jnp.clip(w_t, 1 - eps_w, 1 + eps_w)


def clipped_shares(w_t: Array, eps_w: float, weighted_t: Array) -> Metrics:
    """Shares of the tokens with a weight, f32[B, T], whose weight is at a bound of its clip."""
    tokens = jnp.maximum(weighted_t.sum(), 1)
    return {
        "weight_clipped_low": ((w_t <= 1 - eps_w) * weighted_t).sum() / tokens,
        "weight_clipped_high": ((w_t >= 1 + eps_w) * weighted_t).sum() / tokens,
    }


def rlsd(
    lam_0: NonNegative = 0.5,
    decay_steps: Count = 50,
    eps_w: NonNegative = 0.2,
    sync_every: Count = 10,
    clip_low: NonNegative = 0.2,
    clip_high: NonNegative = 0.28,
) -> Method:
    """The advantage of each token is scaled by what the answer-conditioned self thinks of it.

    Args:
      lam_0: mixing coefficient at k = 0; 0 is GRPO with a token mean.
      decay_steps: number of steps after which lam is 0.
      eps_w: half-width of the clip of the evidence weight.
      sync_every: steps between copies of the policy to the teacher.
      clip_low: PPO clip below 1.
      clip_high: PPO clip above 1.
    """

    def credit(batch, step):
        mask_t = batch.rollouts.mask_t
        A = advantage(batch)[:, None]
        w_t = evidence_weight(A, batch.scores["gap"], eps_w)
        lam_k = linear_decay(step, lam_0, decay_steps)  # Sec. 5.1
        adv_t = A * ((1 - lam_k) + lam_k * w_t) * mask_t
        metrics = {"lam": lam_k, **clipped_shares(w_t, eps_w, mask_t)}
        return Credit(adv_t, 0 * adv_t), metrics

    return Method(
        teachers={"teacher": Teacher(contexts.answer(), teachers.synced(sync_every))},
        score={"gap": ("teacher", stats.log_prob_gap)},
        credit=credit,
        loss=policy_gradient(clip_low, clip_high),
        weight=losses.token_mean,
    )
