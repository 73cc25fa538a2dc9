"""Policy-gradient surrogates, KL penalties on sampled tokens, and the weights that average them.

Losses return one value per token, to be minimised, and never average: `weight_t`, computed once
from the whole batch's mask, does, so micro-batches and shards simply add up. Advantages and old
log-probabilities are constants; gradients flow through `logp_t` only.
"""

import jax
import jax.numpy as jnp

from jaxrl_sd.types import Array

LOG_RATIO_BOUND = 20.0  # exp(20) is finite in float32 and far beyond every clip


def _log_ratio(logp_t: Array, old_logp_t: Array) -> Array:
    old_logp_t = jax.lax.stop_gradient(old_logp_t)
    return jnp.clip(logp_t - old_logp_t, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def ppo(
    logp_t: Array,
    old_logp_t: Array,
    adv_t: Array,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Array:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = exp(logp - old_logp).

    GRPO (2402.03300) Eq. 3, with separate bounds as in DAPO (2503.14476) Eq. 10. With `dual_clip`
    c, tokens with A < 0 lose at most -c A (2005.12729). All arguments f32[..., T].

    >>> print(ppo(jnp.log(1.5), 0.0, 1.0, clip_low=0.2, clip_high=0.28).round(2))
    -1.28
    """
    rho = jnp.exp(_log_ratio(logp_t, old_logp_t))
    return _clipped(rho, jax.lax.stop_gradient(adv_t), clip_low, clip_high, dual_clip)


def _clipped(rho, adv_t, clip_low, clip_high, dual_clip=None):
    loss_t = -jnp.minimum(rho * adv_t, jnp.clip(rho, 1 - clip_low, 1 + clip_high) * adv_t)
    if dual_clip is None:
        return loss_t
    return jnp.where(adv_t < 0, jnp.minimum(loss_t, -dual_clip * adv_t), loss_t)


def clipped(
    logp_t: Array, old_logp_t: Array, adv_t: Array, clip_low: float, clip_high: float
) -> Array:
    """1 where `ppo` is clipped and its token has no gradient, else 0; f32[..., T], for logging."""
    rho = jnp.exp(_log_ratio(logp_t, old_logp_t))
    above, below = (adv_t > 0) & (rho > 1 + clip_high), (adv_t < 0) & (rho < 1 - clip_low)
    return (above | below).astype(jnp.float32)


def sequence_ratio(logp_t: Array, old_logp_t: Array, mask_t: Array) -> Array:
    """Geometric mean of the token ratios, f32[B, 1] from f32[B, T]. GSPO (2507.18071) Eq. 7.

    >>> logp_t = jnp.log(jnp.array([[2.0, 1.0, 0.5, jnp.nan]]))
    >>> print(sequence_ratio(logp_t, 0.0, jnp.array([[1, 1, 1, 0]])))
    [[1.]]
    """
    log_ratio = jnp.where(mask_t != 0, _log_ratio(logp_t, old_logp_t), 0.0)
    length = mask_t.sum(axis=-1, keepdims=True)
    return jnp.exp(log_ratio.sum(axis=-1, keepdims=True) / jnp.maximum(length, 1))


def gspo(
    logp_t: Array,
    old_logp_t: Array,
    adv_t: Array,
    mask_t: Array,
    clip_low: float,
    clip_high: float,
) -> Array:
    """PPO's surrogate with the sequence ratio of each row in place of the token ratios.

    GSPO (2507.18071) Eq. 5. All arguments f32[B, T]; average with `sequence_mean`.

    >>> logp_t, adv_t, mask_t = jnp.array([[0.1, 0.3]]), jnp.ones((1, 2)), jnp.ones((1, 2))
    >>> print(gspo(logp_t, 0.0, adv_t, mask_t, clip_low=3e-4, clip_high=4e-4).round(4))
    [[-1.0004 -1.0004]]
    """
    rho = sequence_ratio(logp_t, old_logp_t, mask_t)
    return _clipped(rho, jax.lax.stop_gradient(adv_t), clip_low, clip_high)


def cispo(logp_t: Array, old_logp_t: Array, adv_t: Array, max_ratio: float) -> Array:
    """-sg[min(rho, max_ratio)] A log pi: clipping never removes a token's gradient.

    CISPO (2506.13585) Eq. 4. The paper does not disclose the bound.

    >>> print(jax.grad(cispo)(jnp.log(8.0), 0.0, 1.0, max_ratio=5.0).round(4))
    -5.0
    """
    rho = jax.lax.stop_gradient(jnp.exp(_log_ratio(logp_t, old_logp_t)))
    return -jnp.minimum(rho, max_ratio) * jax.lax.stop_gradient(adv_t) * logp_t


def reinforce(logp_t: Array, adv_t: Array) -> Array:
    """-A log pi. SDPG Eq. 2.2.

    >>> print(jax.grad(reinforce)(-0.7, 2.0))
    -2.0
    """
    return -jax.lax.stop_gradient(adv_t) * logp_t


# Importance weights for samples that were not drawn from exactly softmax(logits / temperature) of
# the trainer: another kernel or precision, stale weights, top-k or top-p. They multiply the loss.


def token_importance(logp_t: Array, sampled_logp_t: Array, mask_t: Array, cap: float) -> Array:
    """min(exp(logp - sampled_logp), cap) of each token, detached; f32[B, T], 1 where masked.

    Truncated importance sampling: verl and TRL with the sampler's log-probabilities, SDPO's
    `is_clip` with those of the policy at the start of the step.

    >>> logp_t, sampled_logp_t = jnp.log(jnp.array([[0.4, 0.1]])), jnp.log(jnp.array([[0.1, 0.2]]))
    >>> print(token_importance(logp_t, sampled_logp_t, jnp.ones((1, 2)), cap=2.0).round(4))
    [[2.  0.5]]
    """
    log_ratio = jnp.where(mask_t != 0, _log_ratio(logp_t, sampled_logp_t), 0.0)
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_ratio), cap))


def sequence_importance(logp_t: Array, sampled_logp_t: Array, mask_t: Array, cap: float) -> Array:
    """min(prod_t exp(logp - sampled_logp), cap) of each response, detached; f32[B, 1].

    >>> logp_t, sampled_logp_t = jnp.log(jnp.array([[0.3, 0.1]])), jnp.log(jnp.array([[0.1, 0.2]]))
    >>> print(sequence_importance(logp_t, sampled_logp_t, jnp.ones((1, 2)), cap=2.0).round(4))
    [[1.5]]
    """
    log_ratio = row_sum(logp_t - sampled_logp_t, mask_t)[:, None]
    ratio = jnp.exp(jnp.clip(log_ratio, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    return jax.lax.stop_gradient(jnp.minimum(ratio, cap))


# Penalties on the sampled token. log w = logp_t - ref_logp_t. What each one's *gradient* estimates
# matters, not its value (SDPG App. A.2).


def k1(logp_t: Array, ref_logp_t: Array) -> Array:
    """log w. Estimates kl(policy||reference); as a loss its expected gradient is 0.

    >>> print(k1(0.5, 0.0))
    0.5
    """
    return logp_t - jax.lax.stop_gradient(ref_logp_t)


def k2(logp_t: Array, ref_logp_t: Array) -> Array:
    """(log w)^2 / 2; the gradient of kl(policy||reference). SDPG's URKL.

    >>> print(k2(0.5, 0.0))
    0.125
    """
    return 0.5 * k1(logp_t, ref_logp_t) ** 2


def k3(logp_t: Array, ref_logp_t: Array) -> Array:
    """1/w + log w - 1; the gradient of kl(reference||policy). GRPO Eq. 4; SDPG's UFKL minus 1.

    >>> print(k3(0.5, 0.0).round(6))
    0.106531
    """
    log_w = _log_ratio(logp_t, ref_logp_t)
    return jnp.exp(-log_w) + log_w - 1


def fkl(logp_t: Array, ref_logp_t: Array) -> Array:
    """1/w; the gradient of kl(reference||policy), not centred. SDPG Sec. 2.3."""
    return jnp.exp(-_log_ratio(logp_t, ref_logp_t))


def rkl(logp_t: Array, ref_logp_t: Array) -> Array:
    """(log w + 1)^2 / 2; the gradient of kl(policy||reference), not centred. SDPG Sec. 2.3."""
    return 0.5 * (k1(logp_t, ref_logp_t) + 1) ** 2


def distillation_advantage(
    teacher_logp_t: Array, logp_t: Array, ref_logp_t: Array, scale: float = 1.0
) -> Array:
    """(log p_T - log pi) + (scale - 1) (log p_T - log p_ref) on the sampled token, detached.

    On-policy distillation as a policy gradient (scale 1); ExOPD (2602.12125) Eq. 14 otherwise.

    >>> print(f"{distillation_advantage(-1.0, -1.6, -2.0, scale=1.25):.2f}")
    0.85
    """
    adv_t = (teacher_logp_t - logp_t) + (scale - 1) * (teacher_logp_t - ref_logp_t)
    return jax.lax.stop_gradient(adv_t)


def overlong_penalty(length: Array, max_length: int, buffer: int) -> Array:
    """0 up to max_length - buffer tokens, then linear to -1 at max_length. DAPO Eq. 13.

    >>> print(overlong_penalty(jnp.array([16384, 18432, 20480]), 20480, 4096))
    [ 0.  -0.5 -1. ]
    """
    return jnp.clip((max_length - buffer - length) / buffer, -1.0, 0.0)


# Weights f32[B, T] from the whole batch's mask f32[B, T]; loss = sum(loss_t * weight_t). Rows
# without any token are left out of row counts.


def sequence_mean(mask_t: Array) -> Array:
    """Mean over rows of the mean over a row's tokens. GRPO, GSPO, OPSD, SC-GRPO, HSD.

    >>> print(sequence_mean(jnp.array([[1, 0], [1, 1]])))
    [[0.5  0.  ]
     [0.25 0.25]]
    """
    length = mask_t.sum(axis=1, keepdims=True)
    return mask_t / jnp.maximum(length, 1) / jnp.maximum((length > 0).sum(), 1)


def token_mean(mask_t: Array) -> Array:
    """Mean over all tokens of the batch. DAPO, RLSD, SDPG, CAST.

    >>> print(token_mean(jnp.array([[1, 0], [1, 1], [0, 1]])))
    [[0.25 0.  ]
     [0.25 0.25]
     [0.   0.25]]
    """
    return mask_t / jnp.maximum(mask_t.sum(), 1)


def sequence_sum(mask_t: Array) -> Array:
    """Mean over rows of the sum over a row's tokens. RLOO.

    >>> print(sequence_sum(jnp.array([[1, 0], [1, 1]])))
    [[0.5 0. ]
     [0.5 0.5]]
    """
    return mask_t / jnp.maximum((mask_t.sum(axis=1) > 0).sum(), 1)


def constant_length(max_length: int):
    """Sum over tokens divided by rows x `max_length`. Dr.GRPO's code.

    >>> print(constant_length(4)(jnp.array([[1, 0], [1, 1]])))
    [[0.125 0.   ]
     [0.125 0.125]]
    """
    return lambda mask_t: sequence_sum(mask_t) / max_length


AVERAGES = {"sequence": sequence_mean, "token": token_mean}


def row_sum(x_t: Array, mask_t: Array) -> Array:
    """Sum over each row's tokens, f32[B], where a mask of 0 silences even NaN."""
    return jnp.where(mask_t != 0, x_t, 0.0).sum(axis=1)


def weighted_sum(x_t: Array, weight_t: Array) -> Array:
    """sum(x_t * weight_t), where a weight of 0 silences even NaN.

    >>> print(weighted_sum(jnp.array([[2.0, jnp.nan]]), jnp.array([[0.5, 0.0]])))
    1.0
    """
    return jnp.sum(jnp.where(weight_t != 0, x_t, 0.0) * weight_t)
