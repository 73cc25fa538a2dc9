"""RLOO: REINFORCE leave-one-out (arXiv 2402.14740).

    R'_i = R_i - beta sum_t (log pi - log pi_ref)
    A_i  = R'_i - mean of the other R'_j of the group
    loss = - mean_i A_i sum_t log pi

Deviations from the paper:
  - The KL term of the reward is taken at the start of the step and carries no gradient, as rewards
    do; with one update a batch that is the live policy.
  - beta is 0.03 or 0.10 there, by task; 0.03 here.
"""

from jaxrl_sd import groups, losses, stats
from jaxrl_sd.methods.base import REFERENCE, Method, NonNegative
from jaxrl_sd.types import Credit


def rloo(kl_coef: NonNegative = 0.03) -> Method:
    """A whole answer is one action, and its baseline the mean reward of the others.

    Args:
      kl_coef: beta, weight in the reward of the log-ratio to the frozen initial policy.
    """

    def credit(batch, step):
        del step
        r, scores = batch.rollouts, batch.scores
        log_w_t = losses.k1(scores["old_logp"], scores["reference_logp"])
        log_w = losses.row_sum(log_w_t, r.mask_t)
        A = groups.leave_one_out(r.reward - kl_coef * log_w, r.graded, r.group_size)
        adv_t = A[:, None] * r.mask_t
        return Credit(adv_t, 0 * adv_t), {}

    def loss(token_stats, batch, step):
        del step
        return losses.reinforce(token_stats["logp"], batch.credit.adv_t), {}

    return Method(
        teachers={"reference": REFERENCE},
        score={"reference_logp": ("reference", stats.teacher_log_prob)},
        credit=credit,
        loss=loss,
        weight=losses.sequence_sum,
    )
