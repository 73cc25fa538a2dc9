"""What a method is: one pure function per pipeline stage. The default of every stage is GRPO's."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxrl_sd import contexts, groups, losses, stats, teachers
from jaxrl_sd.contexts import Context
from jaxrl_sd.stats import TokenStat
from jaxrl_sd.teachers import Source
from jaxrl_sd.types import Array, Batch, Credit

Metrics = dict[str, Array]
CreditFn = Callable[[Batch, Array], tuple[Credit, Metrics]]
LossFn = Callable[[dict[str, Array], Batch, Array], tuple[Array, Metrics]]
Request = tuple[str | None, TokenStat]  # a teacher's name (None: no teacher), and a statistic


class Limits(NamedTuple):
    """Values that a hyper-parameter may have; the check of a configuration looks at them."""

    hold: Callable[[Any], bool]
    text: str


Count = Annotated[int, Limits(lambda x: x >= 1, "of at least 1")]
NonNegativeInt = Annotated[int, Limits(lambda x: x >= 0, "of at least 0")]
Positive = Annotated[float, Limits(lambda x: x > 0, "above 0")]
NonNegative = Annotated[float, Limits(lambda x: x >= 0, "of at least 0")]
Rate = Annotated[float, Limits(lambda x: 0 < x <= 1, "in (0, 1]")]
Share = Annotated[float, Limits(lambda x: 0 <= x <= 1, "in [0, 1]")]


class Teacher(NamedTuple):
    """Two independent choices: what it is shown (host) and whose weights it uses (device)."""

    context: Context
    source: Source


class Verdicts(NamedTuple):
    """What is known of the B rows of whole groups when they are graded."""

    correct: np.ndarray  # bool[B], False also where not graded
    graded: np.ndarray  # bool[B], False: the verifier could not decide
    score: np.ndarray  # f64[B], 1 and 0 or a sum of reward functions; 0 where not graded
    length: np.ndarray  # i32[B], tokens, the stop token included
    truncated: np.ndarray  # bool[B], no stop token within `max_length` tokens
    group_size: int
    max_length: int


class Grades(NamedTuple):
    """What the trainer makes of verdicts."""

    reward: np.ndarray  # f32[B], ignored where not graded
    trained: np.ndarray  # bool[B], False: the row's tokens are masked out
    kept: np.ndarray  # bool[P], False: the group is dropped and another problem takes its place


def verdict_reward(verdicts: Verdicts) -> Grades:
    """The reward is the score; every row trains, every group is kept."""
    score, kept = verdicts.score, np.ones(len(verdicts.score) // verdicts.group_size, bool)
    return Grades(score.astype(np.float32), np.ones(len(score), bool), kept)


def verdict_reward_untruncated(verdicts: Verdicts) -> Grades:
    """As `verdict_reward`, but truncated rows count in their group and do not train (CAST)."""
    return verdict_reward(verdicts)._replace(trained=~verdicts.truncated)


def group_advantage(batch: Batch, step: Array) -> tuple[Credit, Metrics]:
    """GRPO: every token of a row gets the row's standardised reward; nothing is distilled."""
    del step
    adv_t = advantage(batch)[:, None] * batch.rollouts.mask_t
    return Credit(adv_t, 0 * adv_t), {}


def advantage(batch: Batch) -> Array:
    """(R - mean) / (std + 1e-6) of each row in its group, f32[B]."""
    r = batch.rollouts
    return groups.standardized(r.reward, r.graded, r.group_size)


def linear_decay(step: Array, start: float, decay_steps: int) -> Array:
    """start max(1 - k / decay_steps, 0) with k = step + 1."""
    return start * jnp.maximum(1 - (step + 1) / decay_steps, 0.0)


def trained_tokens(batch: Batch) -> Array:
    """Every token of the rows that train, f32[B, T]."""
    return batch.rollouts.mask_t


def shown_tokens(batch: Batch) -> Array:
    """The tokens of the rows whose teacher is shown something, f32[B, T]."""
    return batch.rollouts.mask_t * batch.hints["teacher"].shown[:, None]


def distill_everything(batch: Batch, step: Array) -> tuple[Credit, Metrics]:
    """Every token is distilled with weight 1 where the teacher is shown something; no reward."""
    del step
    distill_t = shown_tokens(batch)
    return Credit(0 * distill_t, distill_t), {}


def policy_gradient(
    clip_low: float = 0.2, clip_high: float = 0.2, dual_clip: float | None = None
) -> LossFn:
    """PPO's clipped surrogate of the advantages."""

    def loss(token_stats, batch, step):
        del step
        of_tokens = token_stats["logp"], batch.scores["old_logp"], batch.credit.adv_t
        loss_t = losses.ppo(*of_tokens, clip_low, clip_high, dual_clip)
        return loss_t, {"clipped": losses.clipped(*of_tokens, clip_low, clip_high)}

    return loss


def distillation(token_stats: dict[str, Array], batch: Batch, step: Array):
    """The divergence to the teacher, weighted by `distill_t`."""
    del step
    divergence_t = token_stats["divergence"]
    return batch.credit.distill_t * divergence_t, {"divergence": divergence_t}


class Method(NamedTuple):
    """A training method.

    Attributes:
      grade: verdicts -> rewards, rows that train, groups that are kept; on the host.
      teachers: by name.
      score: statistics used without gradient, read by `credit` and `loss` from `batch.scores`; 0
        where their teacher is silent. `old_logp` and `entropy` are always there.
      credit: (batch, step) -> (Credit, metrics), once a batch, sees whole groups, jitted.
        `step` counts finished steps (batches), so it is 0 at the first one.
      probe: statistics that are differentiated with respect to the student, given to `loss`; 0
        where their teacher is silent. `logp` is always there.
      loss: ({name: f32[b, T]}, batch, step) -> (loss_t f32[b, T], metrics f32[b, T] each).
      mask: batch -> mask_t f32[B, T], the trained tokens that are averaged over.
      weight: mask_t -> weight_t, how they are averaged.
      min_group_size: the smallest number of samples a prompt with which the method makes sense.
    """

    grade: Callable[[Verdicts], Grades] = verdict_reward
    teachers: Mapping[str, Teacher] = {}
    score: Mapping[str, Request] = {}
    credit: CreditFn = group_advantage
    probe: Mapping[str, Request] = {}
    loss: LossFn = policy_gradient()
    mask: Callable[[Batch], Array] = trained_tokens
    weight: Callable[[Array], Array] = losses.sequence_mean
    min_group_size: int = 2


REFERENCE = Teacher(contexts.nothing(), teachers.frozen())


def add_reference_penalty(
    method: Method, coef: float, estimator: Callable[[Array, Array], Array]
) -> Method:
    """Adds coef * estimator(logp_t, reference_logp_t) to the loss; estimators are in losses.py."""

    def loss(token_stats, batch, step):
        loss_t, metrics = method.loss(token_stats, batch, step)
        penalty_t = estimator(token_stats["logp"], batch.scores["reference_logp"])
        return loss_t + coef * penalty_t, {**metrics, "reference_penalty": penalty_t}

    return method._replace(
        teachers={**method.teachers, "reference": REFERENCE},
        score={**method.score, "reference_logp": ("reference", stats.teacher_log_prob)},
        loss=loss,
    )


def add_reference_kl(method: Method, coef: float) -> Method:
    """Adds coef * kl(policy||reference), exact over the vocabulary at every token, to the loss."""

    def loss(token_stats, batch, step):
        loss_t, metrics = method.loss(token_stats, batch, step)
        kl_t = token_stats["reference_kl"]
        return loss_t + coef * kl_t, {**metrics, "reference_kl": kl_t}

    return method._replace(
        teachers={**method.teachers, "reference": REFERENCE},
        probe={**method.probe, "reference_kl": ("reference", stats.reverse_kl)},
        loss=loss,
    )


IMPORTANCE = {"token": losses.token_importance, "sequence": losses.sequence_importance}


def add_importance_weight(method: Method, level: str, cap: float) -> Method:
    """Multiplies the loss by pi_old / pi_behaviour, truncated at `cap`; averages stay as they are.

    Args:
      level: "token" or "sequence".
    """

    def loss(token_stats, batch, step):
        loss_t, metrics = method.loss(token_stats, batch, step)
        old_logp_t, r = batch.scores["old_logp"], batch.rollouts
        w_t = IMPORTANCE[level](old_logp_t, r.behaviour_logp_t, r.mask_t, cap)
        w_t = jnp.broadcast_to(w_t, loss_t.shape)
        return w_t * loss_t, {**metrics, "importance": w_t}

    return method._replace(loss=loss)
