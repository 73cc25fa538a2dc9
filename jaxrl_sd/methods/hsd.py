"""HSD: Hindsight Self-Distillation (arXiv 2606.15576).

Every answer is distilled towards the same policy, shown the final answer and another successful
answer of the group; there is no reward term.

    c_i  = (a*, o+), o+ uniform over the group's other successes;  a* alone if there is none  Eq. 9
    L    = mean_i mean_t kl(sg pi(. | q, c_i, o_<t) || pi(. | q, o_<t))                   Eq. 10, 13
           + beta kl(pi || pi_0)

Deviations from the paper:
  - The text says "reverse KL"; Eq. 10 and 13 put the teacher first and are followed.
  - Unstated there and chosen here: the beta term is the exact kl(pi||pi_0) at every token, averaged
    like the distillation term; the wording of the context; over-length answers are distilled like
    the others; a peer that does not fit loses its end.
  - In runs of 2000 updates and more the authors move pi_0 by an average every 200; here it stays.

Found in the paper (tests/test_theory.py):
  - Table 2 contradicts its own formula (1 - p)(1 - (1 - p)^(G - 1)): the best coverage rises with
    G, 0.47 at 4 to 0.92 at 64; the printed one falls, 0.42 to 0.17.
  - That gradients towards single peers average to that of pi+ needs a prefix not chosen for what
    follows it. At the divergence the peer's token is never the own one, so the average is to pi+
    without it.
  - Proposition 2 bounds the mean of the summed gaps; one token's gap can exceed log V_k.
  - Fig. 4b and Table 6 differ at G = 16 (28.9 and 30.8).
"""

from jaxrl_sd import contexts, stats, teachers
from jaxrl_sd.methods.base import (
    Method,
    NonNegative,
    Teacher,
    add_reference_kl,
    distill_everything,
    distillation,
)


def hsd(beta: NonNegative = 1e-3) -> Method:
    """Distils every answer towards the self that saw the answer and a successful sibling.

    Args:
      beta: weight of kl(policy||initial policy); at 0 there is no reference.
    """
    method = Method(
        teachers={"teacher": Teacher(contexts.answer_and_peer(), teachers.current())},
        credit=distill_everything,
        probe={"divergence": ("teacher", stats.forward_kl)},
        loss=distillation,
    )
    return add_reference_kl(method, beta) if beta else method
