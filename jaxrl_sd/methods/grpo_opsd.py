"""GRPO + OPSD: the sum of the two losses, the baseline of CAST, HSD and RLSD.

    loss = L_GRPO + a_k L_OPSD

    grpo_opsd      CAST (arXiv 2606.00172) App. 8.4: a_k from 0.2 linearly to 0 in 50 steps, a
                   reference solution is shown; clip .2/.28, truncated rows do not train
    grpo_opsd_hsd  HSD (arXiv 2606.15576) Table 1: a = 0.5, the answer is shown to the live policy,
                   plus 1e-3 kl(pi||pi_0), which HSD gives to every method it compares

RLSD's own mixture has a tuned coefficient that it does not disclose.

Deviations from the papers:
  - CAST does not state the divergence: OPSD's, with its cap of each vocabulary entry and its frozen
    teacher. HSD does not state its PPO clip: 0.2.
"""

from jaxrl_sd import contexts, stats, teachers
from jaxrl_sd.methods.base import (
    Count,
    Method,
    NonNegative,
    Positive,
    Teacher,
    add_reference_kl,
    distillation,
    group_advantage,
    linear_decay,
    policy_gradient,
    shown_tokens,
    verdict_reward_untruncated,
)
from jaxrl_sd.stats import TokenStat
from jaxrl_sd.types import Array


def _sum(teacher: Teacher, divergence: TokenStat, coef, clip_low: float, clip_high: float):
    """GRPO plus `coef(step)` times the divergence to the teacher."""
    policy_loss = policy_gradient(clip_low, clip_high)

    def credit(batch, step):
        of_rewards, metrics = group_advantage(batch, step)
        a_k = coef(step)
        return of_rewards.replace(distill_t=a_k * shown_tokens(batch)), {**metrics, "coef": a_k}

    def loss(token_stats, batch, step):
        policy_t, policy_metrics = policy_loss(token_stats, batch, step)
        distilled_t, metrics = distillation(token_stats, batch, step)
        return policy_t + distilled_t, {**policy_metrics, **metrics}

    return Method(
        teachers={"teacher": teacher},
        credit=credit,
        probe={"divergence": ("teacher", divergence)},
        loss=loss,
    )


def grpo_opsd(
    coef: NonNegative = 0.2,
    decay_steps: Count = 50,
    tau: Positive = 0.05,
    clip_low: NonNegative = 0.2,
    clip_high: NonNegative = 0.28,
) -> Method:
    """GRPO plus a fading OPSD term (CAST's baseline).

    Args:
      coef: weight of OPSD at k = 0.
      decay_steps: steps after which it is 0.
      tau: cap of each vocabulary entry of the divergence, in nats.
      clip_low: PPO clip below 1.
      clip_high: PPO clip above 1.
    """
    teacher = Teacher(contexts.solution(), teachers.frozen())

    def a(step: Array) -> Array:
        return linear_decay(step, coef, decay_steps)

    method = _sum(teacher, stats.clipped_forward_kl(tau), a, clip_low, clip_high)
    return method._replace(grade=verdict_reward_untruncated)


def grpo_opsd_hsd(
    coef: NonNegative = 0.5,
    beta: NonNegative = 1e-3,
    clip_low: NonNegative = 0.2,
    clip_high: NonNegative = 0.2,
) -> Method:
    """GRPO plus a constant OPSD term (HSD's baseline).

    Args:
      coef: weight of OPSD.
      beta: weight of kl(policy||initial policy).
      clip_low: PPO clip below 1.
      clip_high: PPO clip above 1.
    """
    teacher = Teacher(contexts.answer(), teachers.current())
    method = _sum(teacher, stats.forward_kl, lambda step: coef, clip_low, clip_high)
    return add_reference_kl(method, beta)
