"""Group-relative statistics. A group is the G rows that answer one prompt; rows are group-major.

`graded` f32[B] is 0 for rows whose verdict is unknown: they enter no mean, no spread and no count,
and their advantage is 0.
"""

import jax.numpy as jnp

from jaxrl_sd.types import Array

# Rewards that differ by less are equal: float32 noise of a mean must not become an advantage of
# order 1 after division by a standard deviation that is itself noise.
SPREAD = 1e-5


def by_group(x: Array, group_size: int) -> Array:
    """[B, ...] -> [P, G, ...].

    >>> print(by_group(jnp.arange(4), group_size=2))
    [[0 1]
     [2 3]]
    """
    return x.reshape(-1, group_size, *x.shape[1:])


def num_correct(correct: Array, graded: Array, group_size: int) -> Array:
    """For each row [B], the number of correct rows in its group.

    >>> print(num_correct(jnp.array([1, 0, 1, 1.0]), jnp.array([1, 1, 0, 1.0]), group_size=2))
    [1. 1. 1. 1.]
    """
    correct = jnp.where(graded != 0, correct, 0.0)
    return _spread(by_group(correct, group_size).sum(axis=1), group_size)


def num_graded(graded: Array, group_size: int) -> Array:
    """For each row [B], the number of graded rows in its group.

    >>> print(num_graded(jnp.array([1, 1, 0, 1.0]), group_size=2))
    [2. 2. 1. 1.]
    """
    return _spread(by_group(graded, group_size).sum(axis=1), group_size)


def _spread(per_group: Array, group_size: int) -> Array:
    return jnp.repeat(per_group, group_size, axis=0)


def centered(reward: Array, graded: Array, group_size: int) -> Array:
    """R - mean(R) in each group [B]. Dr.GRPO (2503.20783).

    >>> print(centered(jnp.array([1.0, 0, 0, 0]), jnp.ones(4), group_size=4))
    [ 0.75 -0.25 -0.25 -0.25]
    """
    # where, not a product: the reward of an ungraded row may be NaN.
    reward = jnp.where(graded != 0, reward, 0.0)
    r, g = by_group(reward, group_size), by_group(graded, group_size)
    mean = r.sum(axis=1, keepdims=True) / jnp.maximum(g.sum(axis=1, keepdims=True), 1)
    low = jnp.where(g != 0, r, jnp.inf).min(axis=1, keepdims=True)
    high = jnp.where(g != 0, r, -jnp.inf).max(axis=1, keepdims=True)
    return jnp.where((high - low > SPREAD) & (g != 0), r - mean, 0.0).reshape(-1)


def standardized(
    reward: Array, graded: Array, group_size: int, ddof: int = 1, eps: float = 1e-6
) -> Array:
    """(R - mean(R)) / (std(R) + eps) in each group [B]; 0 where all rewards are equal.

    GRPO (2402.03300) Sec. 4.1.2, RLSD Eq. 1, SDPG Eq. 2.1. The papers leave the divisor of the
    variance open; released code uses n - 1, hence `ddof=1`.

    >>> print(standardized(jnp.array([1.0, 0, 0, 0]), jnp.ones(4), group_size=4).round(4))
    [ 1.5 -0.5 -0.5 -0.5]
    """
    deviation = by_group(centered(reward, graded, group_size), group_size)
    n = by_group(graded, group_size).sum(axis=1, keepdims=True)
    variance = (deviation**2).sum(axis=1, keepdims=True) / jnp.maximum(n - ddof, 1)
    # Without the guard, eps=0 would make NaN of equal rewards.
    return (deviation / jnp.where(variance > 0, jnp.sqrt(variance) + eps, 1.0)).reshape(-1)


def leave_one_out(reward: Array, graded: Array, group_size: int) -> Array:
    """R_i - mean of the other rewards of the group [B]. RLOO (2402.14740).

    >>> print(leave_one_out(jnp.array([1.0, 0, 0, 0]), jnp.ones(4), group_size=4).round(4))
    [ 1.     -0.3333 -0.3333 -0.3333]
    """
    n = num_graded(graded, group_size)
    return centered(reward, graded, group_size) * n / jnp.maximum(n - 1, 1)
