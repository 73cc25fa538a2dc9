import itertools
import math

import numpy as np
import pytest

from jaxrl_sd.evaluate import Estimate, average, avg_at_k, difference, maj_at_k, pass_at_k, vote

NAN = math.nan


def one_problem(num_correct, num_samples):
    return [[1.0] * num_correct + [0.0] * (num_samples - num_correct)]


def test_avg_at_k_by_hand():
    estimate = avg_at_k([[1, 0, 0, 0], [1, 1, 1, 0]])
    assert estimate.value == 0.5
    assert (estimate.low, estimate.high) == (0.25, 0.75)  # half of all resamples are mixed
    assert estimate.num_problems == 2


def test_ungraded_samples_count_neither_way():
    estimate = avg_at_k([[1, NAN, 0, NAN], [1, 1, NAN, 1], [NAN] * 4])
    assert estimate.value == 0.75  # (1/2 + 3/3) / 2
    assert estimate.num_problems == 2


def test_none_means_ungraded():
    assert avg_at_k([[True, None], [False, False]]) == avg_at_k([[1, NAN], [0, 0]])


@pytest.mark.parametrize("correct", [np.empty((0, 4)), np.full((3, 4), NAN)])
def test_nothing_graded_is_not_measured(correct):
    for estimate in (avg_at_k(correct), pass_at_k(correct, 2)):
        assert np.isnan(estimate.value) and estimate.num_problems == 0


def test_one_dimension_is_an_error():
    with pytest.raises(ValueError, match=r"expected \[problems, samples\]"):
        avg_at_k([True, False])


@pytest.mark.parametrize("n, k", [(1, 1), (5, 1), (5, 3), (8, 8)])
def test_pass_at_k_closed_forms(n, k):
    assert pass_at_k(one_problem(0, n), k).value == 0.0
    assert pass_at_k(one_problem(n, n), k).value == 1.0
    assert pass_at_k(one_problem(1, n), k).value == pytest.approx(k / n, rel=1e-12)


@pytest.mark.parametrize("n, k", [(4, 2), (6, 1), (6, 3), (7, 5), (7, 7)])
def test_pass_at_k_equals_enumeration(n, k):
    for num_correct in range(n + 1):
        samples = one_problem(num_correct, n)[0]
        draws = list(itertools.combinations(samples, k))
        expected = sum(any(draw) for draw in draws) / len(draws)
        assert pass_at_k([samples], k).value == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_stable_for_many_samples():
    # With c = 1 the estimator is k / n, while C(10000, 5000) overflows a float.
    assert pass_at_k(one_problem(1, 10_000), 5000).value == pytest.approx(0.5, rel=1e-9)


def test_pass_at_1_is_avg_at_k():
    correct = np.random.default_rng(1).random((20, 6)) < 0.4
    np.testing.assert_allclose(pass_at_k(correct, 1), avg_at_k(correct), rtol=1e-12)


def test_pass_at_k_leaves_out_problems_with_fewer_than_k_graded():
    estimate = pass_at_k([[1, 0, NAN, NAN], [1, 0, 0, NAN], [0, 0, 0, 0]], 3)
    assert estimate.value == 0.5 and estimate.num_problems == 2


def test_pass_at_0_is_an_error():
    with pytest.raises(ValueError, match="k: got 0"):
        pass_at_k([[1, 0]], 0)


@pytest.mark.parametrize(
    ("correct", "answers", "value"),
    [
        ([1, 0, 0], ["3", "4", "4"], 0.0),  # though one sample was right
        ([1, 0, 0, 1, 0], ["3", "4", "5", "3", None], 1.0),
        ([1, 0, 1, 0], ["3", "4", "3", "4"], 0.5),  # a tie
        ([1, 0, 0, NAN], ["3", "4", "5", None], 1 / 3),
        ([0, 0], [None, None], 0.0),  # nothing to hand in
        ([1, NAN, NAN], ["3", "4", "4"], NAN),  # the winner was not judged
        ([1, NAN, 1], ["3", "3", "3"], 1.0),
        ([NAN, NAN], ["3", None], NAN),
        ([NAN, NAN], [None, None], NAN),
    ],
)
def test_vote_by_hand(correct, answers, value):
    assert vote(correct, answers) == pytest.approx(value, nan_ok=True)


def first_of_the_most_frequent(correct, answers):
    """A vote that breaks ties by the order of the samples, as most programs do."""
    winner = max((a for a in answers if a), key=answers.count, default=None)
    return correct[answers.index(winner)] if winner else 0.0


def test_vote_is_the_mean_of_ordered_votes_over_all_orders():
    rng = np.random.default_rng(6)
    for _ in range(60):
        answers = [rng.choice([None, "a", "b", "c"]) for _ in range(5)]
        correct = [float(answer == "a") for answer in answers]
        orders = [
            first_of_the_most_frequent(*zip(*order, strict=True))
            for order in itertools.permutations(zip(correct, answers, strict=True))
        ]
        assert vote(correct, answers) == pytest.approx(np.mean(orders), abs=1e-12)


def test_maj_at_k_leaves_out_what_was_not_judged():
    correct = [[1, 1, 0], [0, 0, 1], [NAN, NAN, 0]]
    estimate = maj_at_k(correct, [["3", "3", "4"], ["3", "3", "4"], ["3", "3", "4"]])
    assert estimate == Estimate(0.5, 0.0, 1.0, 2)


def test_maj_at_1_is_avg_at_1_where_every_sample_has_an_answer():
    correct = np.random.default_rng(7).random((20, 1)) < 0.5
    assert maj_at_k(correct, [["3"]] * 20) == avg_at_k(correct)


def test_answers_of_another_number_of_samples_are_an_error():
    with pytest.raises(ValueError, match=r"answers: got shape \(2, 1\), expected \(2, 2\)"):
        maj_at_k([[1, 0], [1, 0]], [["3"], ["4"]])


def test_average_of_lengths():
    estimate = average([[10, 20], [30, NAN], [NAN, NAN]])
    assert estimate.value == 22.5 and estimate.num_problems == 2


def test_the_interval_has_the_width_of_the_normal_approximation():
    correct = np.random.default_rng(2).random((400, 4)) < 0.3
    estimate = avg_at_k(correct)
    half_width = 1.96 * correct.mean(axis=1).std() / math.sqrt(400)
    assert estimate.high - estimate.value == pytest.approx(half_width, rel=0.1)
    assert estimate.value - estimate.low == pytest.approx(half_width, rel=0.1)


def test_the_interval_covers_the_truth_95_times_in_100():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        chance = rng.beta(0.6, 1.4, size=(100, 1))  # mean 0.3 over all problems of this kind
        estimate = avg_at_k(rng.random((100, 4)) < chance)
        covered += estimate.low <= 0.3 <= estimate.high
    assert 0.92 <= covered / 400 <= 0.98


def test_the_same_input_gives_the_same_interval():
    correct = np.random.default_rng(4).random((30, 4)) < 0.5
    assert avg_at_k(correct) == avg_at_k(correct)


def test_difference_by_hand():
    estimate = difference([[0, 0], [1, 0], [NAN, NAN]], [[1, 0], [1, 1], [1, 1]])
    assert estimate == Estimate(0.5, 0.5, 0.5, 2)


def test_difference_is_antisymmetric_and_zero_on_itself():
    rng = np.random.default_rng(5)
    before, after = rng.random((50, 4)) < 0.3, rng.random((50, 8)) < 0.6
    there, back = difference(before, after), difference(after, before)
    assert there.value == pytest.approx(-back.value)
    assert there.low == pytest.approx(-back.high) and there.high == pytest.approx(-back.low)
    assert difference(before, before) == Estimate(0.0, 0.0, 0.0, 50)


def test_pairing_removes_the_difficulty_of_the_problems():
    # Every problem gains exactly one correct sample of ten, whatever its difficulty.
    before = np.arange(10) < np.arange(9)[:, None]
    after = np.arange(10) < np.arange(1, 10)[:, None]
    estimate = difference(before, after)
    assert (estimate.low, estimate.high) == pytest.approx((0.1, 0.1))
    assert avg_at_k(before).high > avg_at_k(after).low  # the unpaired intervals overlap


def test_difference_needs_the_same_problems():
    with pytest.raises(ValueError, match="got 2 before, 3 after"):
        difference(np.ones((2, 4)), np.ones((3, 4)))
