"""SDFT: self-distillation fine-tuning (arXiv 2601.19897).

One answer a prompt, distilled towards a slow copy of the policy that sees a demonstration.

    L = mean_i mean_t kl(pi_ema(. | x, c, y_<t) || pi(. | x, y_<t)),  t > 3

Deviations from the paper:
  - It states kl(policy||teacher); by the authors' erratum every result used the direction above.
    alpha = 1 is the text's.
  - The first 3 tokens are out of the loss, as in the released code, since they would learn phrases
    that refer to the demonstration.
  - The released code's weight on the sampler's mismatch (at most 2, averaged over each sequence) is
    `importance.level`.
"""

import jax.numpy as jnp

from jaxrl_sd import contexts, stats, teachers
from jaxrl_sd.methods.base import (
    Method,
    NonNegativeInt,
    Rate,
    Share,
    Teacher,
    distill_everything,
    distillation,
)


def sdft(alpha: Share = 0.0, rate: Rate = 0.01, skip: NonNegativeInt = 3) -> Method:
    """Distils every answer towards a slow self that saw a demonstration.

    Args:
      alpha: of the divergence: 0 kl(teacher||student), 1 kl(student||teacher), between them JSD.
      rate: of the teacher's moving average.
      skip: tokens at the start of each answer that are not trained.
    """

    def mask(batch):
        mask_t = batch.rollouts.mask_t
        return mask_t * (jnp.arange(mask_t.shape[1]) >= skip)[None]

    return Method(
        teachers={"teacher": Teacher(contexts.demonstration(), teachers.ema(rate))},
        credit=distill_everything,
        probe={"divergence": ("teacher", stats.generalized_jsd(alpha))},
        loss=distillation,
        mask=mask,
        min_group_size=1,
    )
