"""OPD: on-policy distillation from another model (GKD, arXiv 2306.13649; Thinking Machines, 2025).

The student's own answers, every token judged by a larger model that reads the same prompt.

    opd          loss = mean_i mean_t kl(pi || pi_T)                exact, over the vocabulary
    opd_top_k    loss = mean_i mean_t kl(pi_T || pi)     on the teacher's top 32 and one class more
    opd_sampled  A_t  = (log pi_T - log pi) + (lam - 1) (log pi_T - log pi_ref)    detached
                 loss = - mean over tokens of rho A_t

`opd` is GKD with lambda = 1 and the mode-seeking divergence. `opd_sampled` needs the sampled
token's log-probability only; lam = 1 is Thinking Machines' form, lam = 1.25 ExOPD (arXiv
2602.12125, Eq. 14, whose sign is the released code's). Its expected gradient at a fixed prefix is
that of `opd`. Neither has the term that the divergence owes to later tokens, and so ExOPD's
optimum over whole answers, log pi = lam log pi_T + (1 - lam) log pi_ref + const, is not reached
token by token (tests/test_theory_estimators.py).

Deviations from the papers:
  - rho is relative to the trainer's log-probabilities at the start of the step, not to the
    sampler's; `importance.level=token` adds that factor.
  - verl, whose form `opd_top_k` is, drops the tokens outside the support and clamps the sum, which
    can then be negative, at 0; here they are one class, so the divergence is one.
  - The average of `opd_sampled` is not stated; all tokens of a mini-batch are averaged.
"""

import math

from jaxrl_sd import contexts, losses, stats, teachers
from jaxrl_sd.methods.base import (
    REFERENCE,
    Count,
    Method,
    NonNegative,
    Teacher,
    distill_everything,
    distillation,
    policy_gradient,
)
from jaxrl_sd.stats import TokenStat
from jaxrl_sd.types import Credit


def _distilled(teacher: str, divergence: TokenStat) -> Method:
    return Method(
        teachers={"teacher": Teacher(contexts.nothing(), teachers.external(teacher))},
        credit=distill_everything,
        probe={"divergence": ("teacher", divergence)},
        loss=distillation,
        min_group_size=1,
    )


def opd(teacher: str) -> Method:
    """Distils every answer towards another model, over the whole vocabulary.

    Args:
      teacher: a folder in Hugging Face format; its tokenizer must be the policy's.
    """
    return _distilled(teacher, stats.reverse_kl)


def opd_top_k(teacher: str, top_k: Count = 32) -> Method:
    """Distils every answer towards another model's likeliest tokens.

    Args:
      teacher: a folder in Hugging Face format; its tokenizer must be the policy's.
      top_k: tokens of the teacher's support.
    """
    divergence = stats.forward_kl_of_log_probs
    return _distilled(teacher, stats.on_top_k(divergence, top_k, of="teacher", rest="tail"))


def opd_sampled(
    teacher: str,
    scale: NonNegative = 1.0,
    clip_low: NonNegative = 1.0,
    clip_high: NonNegative = math.inf,
) -> Method:
    """Distils towards another model by a policy gradient on the sampled tokens.

    Args:
      teacher: a folder in Hugging Face format; its tokenizer must be the policy's.
      scale: lam; beyond 1 the teacher's lead over the initial policy is extrapolated.
      clip_low: PPO clip below 1; 1 is none.
      clip_high: PPO clip above 1; infinite is none.
    """

    def credit(batch, step):
        del step
        teacher_logp_t, old_logp_t = batch.scores["teacher_logp"], batch.scores["old_logp"]
        # At scale 1 the reference has no part, and no forward pass.
        reference_logp_t = batch.scores.get("reference_logp", teacher_logp_t)
        adv_t = losses.distillation_advantage(teacher_logp_t, old_logp_t, reference_logp_t, scale)
        return Credit(adv_t, 0 * adv_t), {}

    method = Method(
        teachers={"teacher": Teacher(contexts.nothing(), teachers.external(teacher))},
        score={"teacher_logp": ("teacher", stats.teacher_log_prob)},
        credit=credit,
        loss=policy_gradient(clip_low, clip_high),
        weight=losses.token_mean,
        min_group_size=1,
    )
    if scale == 1:
        return method
    return method._replace(
        teachers={**method.teachers, "reference": REFERENCE},
        score={**method.score, "reference_logp": ("reference", stats.teacher_log_prob)},
    )
