"""SDPG: Self-Distilled Policy Gradient (arXiv 2606.04036).

Policy gradient, plus the exact divergence to the policy shown answer and solution on rows that
did better than their group, plus an anchor to the initial policy.

    L     = L_out + beta(k) L_OPD + alpha L_K                                     Eq. 3.1
    L_out = - 1/N sum_it A_i log pi(y_it)                                         Eq. 2.2
    L_OPD =   1/N sum_it 1[A_i > 0] kl(p_it || sg q_it)                           Eq. 3.2, 3.5
    L_K   =   1/N sum_it f(w_it), w = pi / pi_ref;  UFKL f = 1/w + log w, URKL f = (log w)^2 / 2
    beta(k) = beta min(1, k / warmup) min(1, (T - k) / decay)                     Sec. 3.5.2

With several updates a batch, rho = pi / pi_old (App. A.3; at rho = 1 it is the same):

    L_out = 1/N sum_it SG[l_clip] log pi,  l_clip of dual-clip PPO;  L_OPD and L_K times SG[rho]

p is the student and q the teacher (the other modules call the teacher p); N counts all tokens.

Deviations from the paper:
  - App. A.3 gives no bounds: 0.2, 0.28 and 10, as released.
  - UFKL is computed as k3 = 1/w + log w - 1: the same gradient, and 0 at w = 1.
  - k counts from 1, as in the released code.
  - The released script (no gate, constant beta, URKL) is not the paper; the paper is followed:
    gate, triangular schedule. Both settings are arguments.
  - Eq. 2.1 does not give the divisor of the variance: n - 1, as released. Rewards are 0 and 1 as in
    the text (+-1 in the code): the same once standardised, up to 1e-6.
  - The teacher is shown Fig. 4's answer and solution; the released README describes a context with
    the answer alone.
  - A later option of the code, no L_OPD at stop tokens, is not in the paper and not here.
  - Where the released code clamps each token's divergence at 20, uses bfloat16 log-probabilities
    and averages within micro-batches, this file does none of it, as in the paper.

Found in the paper (tests/test_theory_estimators.py):
  - That FKL and RKL are not minimal at pi = pi_ref is true of single tokens. In expectation FKL has
    UFKL's gradient, kl(pi_ref||pi)'s, and RKL has URKL's, kl(pi||pi_ref)'s.
  - The mutual-information gap it cites from RLSD is that of kl(q||p). The floor of its own kl(p||q)
    is -log Z of the teachers' geometric mean (tests/test_theory.py).
  - L_OPD's gradient is taken at fixed prefixes. That a token decides the prefixes to come is
    dropped as negligible at weight beta (App. A.4); at weight 1 it is not.
  - SG[l_clip] log pi of App. A.3 is not PPO: a clipped token keeps a gradient, as in CISPO. The
    released code has PPO.
  - The released code calls kl(p||q) "forward KL".
"""

import math

import jax.numpy as jnp

from jaxrl_sd import contexts, losses, stats, teachers
from jaxrl_sd.methods.base import (
    Count,
    Method,
    NonNegative,
    Positive,
    Teacher,
    add_reference_penalty,
    advantage,
    distillation,
)
from jaxrl_sd.types import Array, Credit

ANCHORS = {"ufkl": losses.k3, "urkl": losses.k2, "fkl": losses.fkl, "rkl": losses.rkl}


def beta_schedule(step: Array, beta: float, warmup: int, decay: int, total_steps: int) -> Array:
    """beta min(1, k / warmup) min(1, (T - k) / decay), at least 0, with k = step + 1."""
    k = step + 1
    rise = jnp.minimum(1.0, k / warmup)
    fall = jnp.clip((total_steps - k) / decay, 0.0, 1.0)
    return beta * rise * fall


def sdpg(
    beta: NonNegative = 1e-3,
    alpha: NonNegative = 1e-3,
    warmup: Count = 50,
    decay: Count = 350,
    total_steps: Count = 400,
    anchor: str = "ufkl",
    gate: bool = True,
    clip_low: NonNegative = 0.2,
    clip_high: NonNegative = 0.28,
    dual_clip: Positive = 10.0,
) -> Method:
    """REINFORCE, with reverse KL to the hinted self on better-than-average answers.

    Args:
      beta: peak weight of the distillation term.
      alpha: weight of the anchor to the initial policy.
      warmup: steps over which beta rises.
      decay: steps over which beta falls to 0, ending at `total_steps`.
      total_steps: T.
      anchor: ufkl, urkl, fkl or rkl.
      gate: distil rows with A > 0 only.
      clip_low: PPO clip below 1.
      clip_high: PPO clip above 1.
      dual_clip: bound of the ratio where A < 0.

    Raises:
      ValueError: unknown anchor.
    """
    if anchor not in ANCHORS:
        raise ValueError(f"anchor: expected one of {sorted(ANCHORS)}, got {anchor!r}")

    def credit(batch, step):
        mask_t, shown = batch.rollouts.mask_t, batch.hints["teacher"].shown[:, None]
        A = advantage(batch)[:, None]
        beta_k = beta_schedule(step, beta, warmup, decay, total_steps)
        open_gate = (A > 0) if gate else jnp.ones_like(A)
        metrics = {"beta": beta_k, "gate_open": open_gate.mean()}
        return Credit(A * mask_t, beta_k * open_gate * shown * mask_t), metrics

    regularized = add_reference_penalty(
        Method(
            teachers={"teacher": Teacher(contexts.answer_and_solution(), teachers.current())},
            credit=credit,
            probe={"divergence": ("teacher", stats.reverse_kl)},
            loss=distillation,
            weight=losses.token_mean,
        ),
        alpha,
        ANCHORS[anchor],
    )

    def loss(token_stats, batch, step):
        of_tokens = token_stats["logp"], batch.scores["old_logp"]
        l_clip_t = losses.ppo(*of_tokens, batch.credit.adv_t, clip_low, clip_high, dual_clip)
        rho_t = losses.token_importance(*of_tokens, batch.rollouts.mask_t, math.inf)
        regularizers_t, metrics = regularized.loss(token_stats, batch, step)
        return losses.reinforce(of_tokens[0], -l_clip_t) + rho_t * regularizers_t, metrics

    return regularized._replace(loss=loss)
