"""SDPO: self-distillation policy optimisation (arXiv 2601.20802v2).

Rows for which the group or the verifier has something to show are distilled towards a slow copy of
the policy that sees it; the others do not train. There is no reward term.

    L = mean over tokens of sg[min(pi / pi_old, 2)] D(pi, q),   q: EMA copy, shown
          the first correct sibling; else what the verifier said of the row's own failure

D compares the student's top k tokens and one class for the rest (Eq. 11): JSD with alpha 0.5 in the
experiments without feedback, kl(student||teacher) (alpha 1) in those with it (Table 12).

Deviations from the paper:
  - A row is never shown its own text, as in the released configuration; the paper lets a lone
    success serve as its own solution.
  - The paper's weight on the sampler's mismatch (at most 2) is `importance.level=token`.
  - Over-long hints lose the end of their text; the released code cuts the whole prompt from the
    right, closing instruction included.
  - The hybrid with GRPO's advantage (lambda 0.9, which helped weaker models only) is left out.
"""

from jaxrl_sd import contexts, losses, stats, teachers
from jaxrl_sd.methods.base import (
    Count,
    Method,
    Positive,
    Rate,
    Share,
    Teacher,
    distill_everything,
    distillation,
    shown_tokens,
)


def sdpo(
    alpha: Share = 0.5, top_k: Count = 100, rate: Rate = 0.05, is_clip: Positive = 2.0
) -> Method:
    """Distils answers towards a slow self that saw a correct sibling or the verifier's feedback.

    Args:
      alpha: of the divergence: 0 kl(teacher||student), 1 kl(student||teacher), between them JSD.
      top_k: tokens of the student's support.
      rate: of the teacher's moving average.
      is_clip: bound of the ratio to the policy at the start of the step.
    """
    divergence = stats.on_top_k(stats.jsd_of_log_probs(alpha), top_k, of="student", rest="tail")

    def loss(token_stats, batch, step):
        loss_t, metrics = distillation(token_stats, batch, step)
        of_tokens = token_stats["logp"], batch.scores["old_logp"], batch.rollouts.mask_t
        return losses.token_importance(*of_tokens, is_clip) * loss_t, metrics

    return Method(
        teachers={"teacher": Teacher(contexts.sibling_or_feedback(), teachers.ema(rate))},
        credit=distill_everything,
        probe={"divergence": ("teacher", divergence)},
        loss=loss,
        mask=shown_tokens,
        weight=losses.token_mean,
    )
