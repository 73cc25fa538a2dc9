"""REINFORCE++ (arXiv 2501.03262).

    r_t  = 1[t last] R_i - beta (log pi - log pi_ref)        reward of a token
    A_t  = sum over s >= t of r_s, whitened over all tokens of the batch
    loss = - mean over tokens of min(rho A_t, clip(rho, 1 - eps, 1 + eps) A_t)

Deviations from the paper:
  - The average is not stated; all tokens of a mini-batch are averaged.
  - The KL term is taken at the start of the step, as rewards are.
  - Whitening divides by sqrt(var + 1e-8), var with n - 1, as in verl. With fewer than two tokens,
    where verl raises, the advantage is 0.
"""

import jax
import jax.numpy as jnp

from jaxrl_sd import groups, losses, stats
from jaxrl_sd.methods.base import REFERENCE, Method, NonNegative, policy_gradient
from jaxrl_sd.types import Array, Credit


def whitened(x_t: Array, mask_t: Array) -> Array:
    """(x - mean) / sqrt(var + 1e-8) over all tokens with mask 1, f32[B, T], 0 where masked."""
    n = mask_t.sum()
    x_t = jnp.where(mask_t != 0, x_t, 0.0)
    deviation = (x_t - x_t.sum() / jnp.maximum(n, 1)) * mask_t
    variance = (deviation**2).sum() / jnp.maximum(n - 1, 1)
    return deviation * jax.lax.rsqrt(variance + 1e-8)


def return_to_go(reward: Array, penalty_t: Array, mask_t: Array) -> Array:
    """The reward f32[B] of a row's end, minus the penalties f32[B, T] from each token on."""
    penalty_t = jnp.where(mask_t != 0, penalty_t, 0.0)
    to_come = jnp.cumsum(penalty_t[:, ::-1], axis=1)[:, ::-1]
    return reward[:, None] - to_come


def reinforce_pp(
    kl_coef: NonNegative = 1e-3,
    clip_low: NonNegative = 0.2,
    clip_high: NonNegative = 0.2,
    group_baseline: bool = False,
) -> Method:
    """One baseline for the whole batch instead of one a group.

    Args:
      kl_coef: beta, of the log-ratio to the frozen initial policy in each token's reward.
      clip_low: PPO clip below 1.
      clip_high: PPO clip above 1.
      group_baseline: subtract the group's mean reward first (the paper's "baseline" variant).
    """

    def credit(batch, step):
        del step
        r, scores = batch.rollouts, batch.scores
        reward = r.reward
        if group_baseline:
            reward = groups.centered(reward, r.graded, r.group_size)
        log_w_t = losses.k1(scores["old_logp"], scores["reference_logp"])
        adv_t = whitened(return_to_go(reward, kl_coef * log_w_t, r.mask_t), r.mask_t)
        return Credit(adv_t, 0 * adv_t), {}

    return Method(
        teachers={"reference": REFERENCE},
        score={"reference_logp": ("reference", stats.teacher_log_prob)},
        credit=credit,
        loss=policy_gradient(clip_low, clip_high),
        weight=losses.token_mean,
        min_group_size=2 if group_baseline else 1,
    )
