"""CISPO: clipped importance sampling policy optimisation (MiniMax-M1, arXiv 2506.13585).

    loss = - mean over tokens of sg[min(rho, c)] A_i log pi                       Eq. 4, 5

Deviations from the paper:
  - Its bound is not disclosed. c = 5 is an absolute ratio, as in TRL; others state it as 1 + eps.
    There is no bound below, as the paper says of practice.
  - Its runs borrow DAPO's dynamic sampling and length penalty; the reward here is the verdict.
  - 16 updates a batch are `optimizer.mini_batches`.
"""

from jaxrl_sd import losses
from jaxrl_sd.methods.base import Method, Positive


def cispo(max_ratio: Positive = 5.0) -> Method:
    """REINFORCE whose importance ratio is bounded, so that no token loses its gradient.

    Args:
      max_ratio: c.
    """

    def loss(token_stats, batch, step):
        del step
        of_tokens = token_stats["logp"], batch.scores["old_logp"], batch.credit.adv_t
        return losses.cispo(*of_tokens, max_ratio), {}

    return Method(loss=loss, weight=losses.token_mean)
