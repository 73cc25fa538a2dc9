"""Numbers that say whether a run is healthy. They change nothing."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from jaxrl_sd import losses, stats
from jaxrl_sd.methods.base import Method
from jaxrl_sd.model import Compute, ModelConfig
from jaxrl_sd.types import Array, Batch
from jaxrl_sd.update import Parts, State, fill, make_score


@jax.jit
def describe(batch: Batch) -> dict[str, Array]:
    """Scalars of a credited batch: reward, entropy, advantages, sampler error.

    `rollout/sampler_logp_error_*` compares the sampler's and the trainer's log-probability of the
    same tokens under the same weights: what is left is rounding, or a bug.
    """
    r = batch.rollouts
    mean = partial(losses.weighted_sum, weight_t=losses.token_mean(r.mask_t))
    error_t = jnp.where(r.mask_t != 0, jnp.abs(batch.scores["old_logp"] - r.sampler_logp_t), 0.0)
    adv_t, distill_t = batch.credit.adv_t, batch.credit.distill_t
    return {
        "rollout/reward": (r.reward * r.graded).sum() / r.graded.sum(),  # NaN of nothing graded
        "rollout/entropy": mean(batch.scores["entropy"]),
        "rollout/sampler_logp_error_mean": mean(error_t),
        "rollout/sampler_logp_error_max": error_t.max(),
        "credit/adv_abs": mean(jnp.abs(adv_t)),
        "credit/adv_positive": mean(adv_t > 0),
        "credit/distill": mean(distill_t),
        **{f"score/{name}": mean(x) for name, x in batch.scores.items()},
    }


def make_gaps(
    method: Method, configs: Mapping[str, ModelConfig], temperature: float, compute: Compute
) -> Callable[[State, Batch, Parts], dict[str, Array]]:
    """(state, batch, parts) -> {teacher: f32[B, T]}: log p_T - log p_S of the sampled tokens.

    For pictures, whatever the method itself computes.
    """
    requests = {name: (name, stats.log_prob_gap) for name in method.teachers}
    score = make_score(requests, method, configs, temperature, compute)
    return partial(fill, score, tuple(requests))


def gap_sizes(batch: Batch, gaps: dict[str, Array]) -> dict[str, Array]:
    """Mean absolute gap of each teacher over the trained tokens."""
    weight_t = losses.token_mean(batch.rollouts.mask_t)
    return {
        f"teacher/{name}/gap_abs": losses.weighted_sum(jnp.abs(gap_t), weight_t)
        for name, gap_t in gaps.items()
    }
