"""GSPO: group sequence policy optimisation (arXiv 2507.18071).

    s_i  = exp(1/|y_i| sum_t log pi / pi_old)                                     Eq. 7
    loss = - mean_i min(s_i A_i, clip(s_i, 1 - 3e-4, 1 + 4e-4) A_i)               Eq. 5

Deviations from the paper: none known. Its 4 updates a batch are `optimizer.mini_batches`.
"""

from jaxrl_sd import losses
from jaxrl_sd.methods.base import Method, NonNegative


def gspo(clip_low: NonNegative = 3e-4, clip_high: NonNegative = 4e-4) -> Method:
    """GRPO whose ratio, and so its clip, is that of the whole answer.

    Args:
      clip_low: clip of the sequence ratio below 1.
      clip_high: clip of the sequence ratio above 1.
    """

    def loss(token_stats, batch, step):
        del step
        of_rows = batch.scores["old_logp"], batch.credit.adv_t, batch.rollouts.mask_t
        return losses.gspo(token_stats["logp"], *of_rows, clip_low, clip_high), {}

    return Method(loss=loss)
