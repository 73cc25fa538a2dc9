"""DAPO: decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476).

    R_i  = 2 score - 1 + overlong penalty                                         Eq. 13
    A_i  = (R_i - mean R) / (std R + 1e-6),  groups with 0 < #correct < G only    Eq. 9, 11
    loss = - mean over tokens of min(rho A, clip(rho, 1 - .2, 1 + .28) A)         Eq. 8

Groups in which all are right or all are wrong are dropped, and sampling goes on with other problems
until the batch is full.

Deviations from the paper:
  - Eq. 8 read literally averages over the tokens of each group; all tokens of a mini-batch are
    averaged, as in the released code.
  - A group is dropped by its verdicts, before the length penalty, as in the released code; one
    whose only spread is in answers that could not be graded is dropped too.
  - The paper's reward is +-1 by the verdict, which the scores 1 and 0 give.
  - The paper's length limits (20480, of which 4096 are penalised) are expressed by
    `rollout.max_response` and a fifth of it. At the limit the penalty is -1, as everywhere beyond.
  - 16 updates a batch, and 512 prompts by 16 samples, are settings of the run
    (`optimizer.mini_batches`, `rollout.*`).
"""

import numpy as np

from jaxrl_sd import losses
from jaxrl_sd.methods.base import Grades, Method, NonNegative, Verdicts, policy_gradient


def mixed_groups(verdicts: Verdicts) -> np.ndarray:
    """Whether a group has a correct and a wrong answer, bool[P]."""
    correct, graded = (
        x.reshape(-1, verdicts.group_size).sum(axis=1) for x in (verdicts.correct, verdicts.graded)
    )
    return (correct > 0) & (correct < graded)


def dapo(
    overlong_buffer: int | None = None, clip_low: NonNegative = 0.2, clip_high: NonNegative = 0.28
) -> Method:
    """GRPO on mixed groups only, with clip-higher, a token mean and a penalty near the limit.

    Args:
      overlong_buffer: the last tokens below the length limit, over which the penalty falls from 0
        to -1; None is a fifth of the limit, 0 is no penalty.
      clip_low: PPO clip below 1.
      clip_high: PPO clip above 1.
    """

    def grade(verdicts):
        limit = verdicts.max_length
        buffer = limit // 5 if overlong_buffer is None else overlong_buffer
        if not 0 <= buffer < limit:
            raise ValueError(
                f"overlong_buffer: expected at least 0 and less than the {limit} tokens of a "
                f"response, got {buffer}"
            )
        reward = 2 * verdicts.score - 1
        if buffer:
            reward = reward + np.asarray(losses.overlong_penalty(verdicts.length, limit, buffer))
        return Grades(reward, np.ones_like(verdicts.correct), mixed_groups(verdicts))

    return Method(grade=grade, loss=policy_gradient(clip_low, clip_high), weight=losses.token_mean)
