"""Group statistics: golden numbers, rows without a verdict, rewards equal up to rounding."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_sd import groups

NAN = np.nan


def rows(*values):
    return jnp.array(values, jnp.float32)


def all_graded(reward):
    return jnp.ones(len(reward))


ONE_OF_FOUR = rows(1, 0, 0, 0)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, [1.499997, -0.499999]),
        ({"eps": 1e-4}, [1.499700, -0.499900]),
        ({"ddof": 0}, [1.732047, -0.577349]),
    ],
)
def test_golden_standardized(kwargs, expected):
    adv = groups.standardized(ONE_OF_FOUR, all_graded(ONE_OF_FOUR), 4, **kwargs)
    np.testing.assert_allclose(adv, [expected[0]] + 3 * [expected[1]], rtol=1e-6)


def test_eps_is_added_to_the_standard_deviation():
    adv = groups.standardized(0.1 * ONE_OF_FOUR, all_graded(ONE_OF_FOUR), 4, eps=0.05)
    np.testing.assert_allclose(adv, [0.75, -0.25, -0.25, -0.25], rtol=1e-6)


def test_golden_centered_and_leave_one_out():
    args = (ONE_OF_FOUR, all_graded(ONE_OF_FOUR), 4)
    np.testing.assert_allclose(groups.centered(*args), [0.75, -0.25, -0.25, -0.25], rtol=1e-6)
    np.testing.assert_allclose(groups.leave_one_out(*args), [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("ddof", "correct", "wrong"), [(1, 1.62018167, -0.54006056), (0, 1.73204681, -0.57734894)]
)
def test_golden_standardized_two_of_eight(ddof, correct, wrong):
    reward = rows(1, 0, 0, 1, 0, 0, 0, 0)
    adv = groups.standardized(reward, all_graded(reward), 8, ddof=ddof)
    np.testing.assert_allclose(adv, np.where(reward == 1, correct, wrong), rtol=1e-6)


@pytest.mark.parametrize(
    ("ddof", "n_correct", "correct", "wrong"),
    [
        (0, 1, 2.6458, -0.3780),
        (0, 2, 1.7321, -0.5774),
        (0, 3, 1.2910, -0.7746),
        (0, 4, 1, -1),
        (1, 1, 2.4749, -0.3536),
        (1, 2, 1.6202, -0.5401),
        (1, 3, 1.2076, -0.7246),
        (1, 4, 0.9354, -0.9354),
    ],
)
def test_golden_table_of_eight_rows(ddof, n_correct, correct, wrong):
    reward = (jnp.arange(8) < n_correct).astype(jnp.float32)
    adv = groups.standardized(reward, all_graded(reward), 8, ddof=ddof, eps=0.0)
    np.testing.assert_allclose(adv, np.where(reward == 1, correct, wrong), atol=5e-5)


ADVANTAGES = [groups.centered, groups.standardized, groups.leave_one_out]


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_groups_do_not_mix(advantage):
    first, second = rows(1, 0, 0, 0), rows(0, 1, 1, 0)
    both = advantage(jnp.concatenate([first, second]), jnp.ones(8), 4)
    apart = [advantage(r, jnp.ones(4), 4) for r in (first, second)]
    np.testing.assert_array_equal(both, np.concatenate(apart))


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.7, -1.0])
def test_equal_rewards_have_an_advantage_of_exactly_zero(advantage, reward):
    # The float32 mean of eight .7s is not .7; divided by its own noise that would be order 1.
    np.testing.assert_array_equal(advantage(jnp.full(8, reward), jnp.ones(8), 8), 0)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_rewards_that_only_rounding_tells_apart_have_no_advantage(advantage):
    # As after a penalty of rounding's size. Divided by its own spread that would be order 1.
    reward = rows(0.7, 0.7 + 1e-6, 0.7, 0.7 - 1e-6)
    assert len(set(reward.tolist())) == 3
    np.testing.assert_array_equal(advantage(reward, all_graded(reward), 4), 0)


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_ungraded_rows_enter_nothing_even_as_nan(advantage):
    adv = advantage(rows(1, NAN, 0, 0, NAN, 0), rows(1, 0, 1, 1, 0, 1), 6)
    np.testing.assert_array_equal(adv[jnp.array([1, 4])], 0)
    expected = advantage(ONE_OF_FOUR, jnp.ones(4), 4)
    np.testing.assert_allclose(adv[jnp.array([0, 2, 3, 5])], expected, rtol=1e-6)


@pytest.mark.parametrize("advantage", ADVANTAGES)
@pytest.mark.parametrize("graded", [(0, 0, 0, 0), (0, 1, 0, 0)])
def test_a_group_with_fewer_than_two_verdicts_has_no_advantage(advantage, graded):
    np.testing.assert_array_equal(advantage(rows(NAN, 1, NAN, NAN), rows(*graded), 4), 0)


@pytest.mark.parametrize("scale_and_shift", [(2.0, -1.0), (0.5, 3.0)])
def test_standardized_ignores_the_scale_of_rewards(scale_and_shift):
    scale, shift = scale_and_shift
    reward = rows(1, 0, 0, 1, 0, 0, 0, 0)
    adv = groups.standardized(reward, jnp.ones(8), 8)
    scaled = groups.standardized(scale * reward + shift, jnp.ones(8), 8)
    np.testing.assert_allclose(scaled, adv, rtol=1e-5)


def test_counts_are_of_graded_rows_and_of_the_own_group():
    correct, graded = rows(1, 1, NAN, 0, 0, 0), rows(1, 1, 0, 1, 1, 1)
    np.testing.assert_array_equal(groups.num_correct(correct, graded, 3), [2, 2, 2, 0, 0, 0])
    np.testing.assert_array_equal(groups.num_graded(graded, 3), [2, 2, 2, 3, 3, 3])


def test_rows_are_group_major():
    np.testing.assert_array_equal(groups.by_group(jnp.arange(6), 3), [[0, 1, 2], [3, 4, 5]])
    assert groups.by_group(jnp.zeros((6, 5)), 3).shape == (2, 3, 5)
