"""SDPG: Self-Distilled Policy Gradient (arXiv 2606.04036).

Policy gradient, plus the exact divergence to the policy shown answer and solution on rows that
did better than their group, plus an anchor to the initial policy.

    L     = L_out + beta(k) L_OPD + alpha L_K                                     Eq. 3.1
    L_out = - 1/N sum_it A_i log pi(y_it)                                         Eq. 2.2
    L_OPD =   1/N sum_it 1[A_i > 0] kl(p_it || sg q_it)                           Eq. 3.2, 3.5
    L_K   =   1/N sum_it f(w_it), w = pi / pi_ref;  UFKL f = 1/w + log w, URKL f = (log w)^2 / 2
    beta(k) = beta min(1, k / warmup) min(1, (T - k) / decay)                     Sec. 3.5.2

p is the student and q the teacher (the other modules call the teacher p); N counts all tokens.

Deviations from the paper:
  - UFKL is computed as k3 = 1/w + log w - 1: the same gradient, and 0 at w = 1.
  - k counts from 1, as in the released code.
  - The released script (no gate, constant beta, URKL) is not the paper; the paper is followed:
    gate, triangular schedule. Both settings are arguments.
  - One update a batch, hence no ratio; App. A.3's form for several updates is not implemented.
  - Where the released code clamps each token's divergence at 20, uses bfloat16 log-probabilities
    and averages within micro-batches, this file does none of it, as in the paper.
"""

import jax.numpy as jnp

from jaxrl_sd import contexts, losses, stats, teachers
from jaxrl_sd.methods.base import Method, Teacher, add_reference_penalty, advantage, distillation
from jaxrl_sd.types import Array, Credit

ANCHORS = {"ufkl": losses.k3, "urkl": losses.k2, "fkl": losses.fkl, "rkl": losses.rkl}


def beta_schedule(step: Array, beta: float, warmup: int, decay: int, total_steps: int) -> Array:
    """beta min(1, k / warmup) min(1, (T - k) / decay), at least 0, with k = step + 1."""
    k = step + 1
    rise = jnp.minimum(1.0, k / warmup)
    fall = jnp.clip((total_steps - k) / decay, 0.0, 1.0)
    return beta * rise * fall


def sdpg(
    beta: float = 1e-3,
    alpha: float = 1e-3,
    warmup: int = 50,
    decay: int = 350,
    total_steps: int = 400,
    anchor: str = "ufkl",
    gate: bool = True,
) -> Method:
    """REINFORCE, with reverse KL to the hinted self on better-than-average answers.

    Args:
      beta: peak weight of the distillation term.
      alpha: weight of the anchor to the initial policy.
      warmup: updates over which beta rises.
      decay: updates over which beta falls to 0, ending at `total_steps`.
      total_steps: T.
      anchor: ufkl, urkl, fkl or rkl.
      gate: distil rows with A > 0 only.

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

    def loss(token_stats, batch, step):
        distilled_t, metrics = distillation(token_stats, batch, step)
        return losses.reinforce(token_stats["logp"], batch.credit.adv_t) + distilled_t, metrics

    method = Method(
        teachers={"teacher": Teacher(contexts.answer_and_solution(), teachers.current())},
        credit=credit,
        probe={"divergence": ("teacher", stats.reverse_kl)},
        loss=loss,
        weight=losses.token_mean,
    )
    return add_reference_penalty(method, alpha, ANCHORS[anchor])
