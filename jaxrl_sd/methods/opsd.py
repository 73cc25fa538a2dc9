"""OPSD: On-Policy Self-Distillation (Self-Distilled Reasoner, arXiv 2601.18734v3).

Every answer is distilled towards the frozen initial policy, shown a reference solution.

    L = mean_i mean_t sum_v min(p_T (log p_T - log p_S), tau)                     Eq. 6-8

Deviations from the paper:
  - The equation averages each sequence, the released code all tokens of a micro-batch; the
    equation is followed.
  - tau is not tuned in the paper and 0.05 to 1e-7 in the released scripts; 0.05 here.
  - The teacher's wording joins Fig. 2 with the released code's markers.
  - Settings of the run, not of the method: the paper's sampling temperature 1.1, which also
    divides both logits in the loss (`rollout.temperature`), and thinking, off for the student and
    on for the teacher in its main runs (`thinking`).

Found in the paper (tests/test_theory.py):
  - A capped entry keeps the gradient of the normaliser: p_S times the teacher's mass that is not
    capped. It is positive, so descent lowers the logits of the very tokens that the teacher wants
    most.
  - L is 0 at p_S = p_T and lower for a student that has given up a capped token and agrees on the
    rest.
"""

from jaxrl_sd import contexts, stats, teachers
from jaxrl_sd.methods.base import Method, Positive, Teacher, distill_everything, distillation


def opsd(tau: Positive = 0.05) -> Method:
    """Distils every answer towards the initial policy that saw a reference solution.

    Args:
      tau: cap of each vocabulary entry of the divergence, in nats.
    """
    return Method(
        teachers={"teacher": Teacher(contexts.solution(), teachers.frozen())},
        credit=distill_everything,
        probe={"divergence": ("teacher", stats.clipped_forward_kl(tau))},
        loss=distillation,
        min_group_size=1,
    )
