"""GRPO: group-relative policy optimisation (DeepSeekMath, arXiv 2402.03300), the baseline.

    A_i  = (R_i - mean R) / (std R + 1e-6)                                       Sec. 4.1.2
    loss = - mean_i mean_t min(rho A, clip(rho, 1 - eps, 1 + eps) A) + beta k3    Eq. 3, 4

Deviations from the paper:
  - It writes eps without a value; 0.2 by convention. It fixes neither the divisor of the variance
    nor a guard: n - 1 and 1e-6, as in verl and EasyR1.

Found in the paper (tests/test_theory_estimators.py):
  - The mean of k3 is kl(pi||pi_ref); its gradient in the loss is that of kl(pi_ref||pi).
  - Divided by the standard deviation, a prompt solved with probability p follows, in large groups,
    the gradient of 2 asin(sqrt p) and not of p: sqrt(p (1 - p)) by the logit, not p (1 - p).
"""

from jaxrl_sd import losses
from jaxrl_sd.methods.base import Method, NonNegative, add_reference_penalty, policy_gradient


def grpo(
    clip_low: NonNegative = 0.2,
    clip_high: NonNegative = 0.2,
    kl_coef: NonNegative = 0.04,
    average: str = "sequence",
) -> Method:
    """Every token of an answer gets the same credit.

    Args:
      clip_low: eps below 1.
      clip_high: eps above 1; larger than `clip_low` is DAPO's clip-higher.
      kl_coef: beta of the penalty to the frozen initial policy; at 0 there is no reference.
      average: "sequence", the paper's mean of rows' means, or "token", over all tokens at once.

    Raises:
      ValueError: unknown average.
    """
    if average not in losses.AVERAGES:
        raise ValueError(f"average: expected one of {sorted(losses.AVERAGES)}, got {average!r}")
    method = Method(loss=policy_gradient(clip_low, clip_high), weight=losses.AVERAGES[average])
    return add_reference_penalty(method, kl_coef, losses.k3) if kl_coef else method
