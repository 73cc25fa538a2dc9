"""Dr.GRPO: GRPO done right (arXiv 2503.20783).

    A_i  = R_i - mean R
    loss = - 1/(N L) sum_it min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i),  L constant

Deviations from the paper:
  - L is the generation budget, as in the released code (the equation writes the plain sum); N
    counts rows that have any trained token.
"""

from jaxrl_sd import groups, losses
from jaxrl_sd.methods.base import Count, Method, NonNegative, policy_gradient
from jaxrl_sd.types import Credit


def dr_grpo(
    max_tokens: Count | None = None, clip_low: NonNegative = 0.2, clip_high: NonNegative = 0.2
) -> Method:
    """GRPO without its two normalisers: no standard deviation, no response length.

    Args:
      max_tokens: L; None is the width of the responses, `rollout.max_response`.
      clip_low: eps below 1.
      clip_high: eps above 1.
    """

    def credit(batch, step):
        del step
        r = batch.rollouts
        adv_t = groups.centered(r.reward, r.graded, r.group_size)[:, None] * r.mask_t
        return Credit(adv_t, 0 * adv_t), {}

    def weight(mask_t):
        return losses.constant_length(max_tokens or mask_t.shape[1])(mask_t)

    return Method(credit=credit, loss=policy_gradient(clip_low, clip_high), weight=weight)
