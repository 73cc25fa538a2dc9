"""Rows, rewards and masks of a batch from verdicts."""

from dataclasses import replace

import numpy as np
import pytest

from jaxrl_sd import config, rollout
from jaxrl_sd.contexts import TEMPLATES
from jaxrl_sd.methods.base import Grades, verdict_reward, verdict_reward_untruncated
from jaxrl_sd.sampler import Samples
from jaxrl_sd.tokens import load_tokenizer
from jaxrl_sd.types import Problem, Sample

P, G, T, S = 3, 2, 4, 3
LENGTH = np.array([[1, 4], [2, 4], [3, 0]])
TRUNCATED = np.array([[False, True], [False, False], [False, False]])
VERDICTS = [[True, None], [False, False], [True, False]]
SCORE = {True: 1.0, False: 0.0, None: None}


def draw():
    """Prompts, samples and their verdicts; token p * 100 + g * 10 + t stands at (p, g, t)."""
    number = np.arange(P)[:, None, None] * 100 + np.arange(G)[:, None] * 10 + np.arange(T)
    samples = Samples(number, LENGTH, TRUNCATED, -0.1 * number, -0.2 * number)
    groups = [
        [
            Sample(tuple(ids[:n].tolist()), "", verdict, cut, score=SCORE[verdict])
            for ids, n, verdict, cut in zip(*rows, strict=True)
        ]
        for rows in zip(number, LENGTH, VERDICTS, TRUNCATED, strict=True)
    ]
    prompt = np.arange(P)[:, None] * np.ones((1, S), int)
    return prompt, np.array([1, 2, 3]), samples, groups


def test_rows_are_group_major_and_masks_follow_lengths_and_verdicts():
    rows, kept = rollout.grade(*draw(), verdict_reward)
    np.testing.assert_array_equal(rows.prompt[:, 0], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(rows.prompt_length, [1, 1, 2, 2, 3, 3])
    np.testing.assert_array_equal(rows.response[:, 1], [1, 11, 101, 111, 201, 211])
    np.testing.assert_allclose(rows.sampler_logp_t, -0.1 * rows.response)
    np.testing.assert_allclose(rows.behaviour_logp_t, -0.2 * rows.response)
    # The second row could not be graded: it trains nothing and is not wrong.
    np.testing.assert_array_equal(rows.mask_t.sum(axis=1), [1, 0, 2, 4, 3, 0])
    assert (np.diff(rows.mask_t, axis=1) <= 0).all()
    np.testing.assert_array_equal(rows.graded, [1, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(rows.correct, [1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(rows.reward, rows.correct)
    assert kept.all()


def test_a_rule_decides_what_trains_and_sees_what_it_needs():
    prompt, length, samples, groups = draw()
    groups[0][1] = Sample((10, 11, 12, 13), "", True, True, score=1.0)  # but truncated
    rows, _ = rollout.grade(prompt, length, samples, groups, verdict_reward_untruncated)
    np.testing.assert_array_equal(rows.mask_t.sum(axis=1), [1, 0, 2, 4, 3, 0])
    np.testing.assert_array_equal(rows.correct, [1, 1, 0, 0, 1, 0])

    def rule(verdicts):
        np.testing.assert_array_equal(verdicts.length, LENGTH.ravel())
        np.testing.assert_array_equal(verdicts.truncated, TRUNCATED.ravel())
        assert (verdicts.group_size, verdicts.max_length) == (G, T)
        return Grades(10.0 * verdicts.length, verdicts.length > 0, np.array([True, False, True]))

    rows, kept = rollout.grade(prompt, length, samples, groups, rule)
    np.testing.assert_array_equal(rows.reward, 10 * LENGTH.ravel())
    np.testing.assert_array_equal(kept, [True, False, True])


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_students_prompt_shows_nothing_but_the_problem(name):
    """Whatever slots a template has."""
    problem = Problem("id", "2 3 5 = 10", "2", "3")
    other = replace(problem, answer="5", solution="10")
    tokenizer = load_tokenizer(config.TINY_MODEL)
    prompt, length = rollout.encode([problem, other], tokenizer, TEMPLATES[name], 300)
    np.testing.assert_array_equal(prompt[0], prompt[1])
    assert length[0] == length[1]


def test_kept_groups_of_several_rounds_fill_a_batch():
    rows, _ = rollout.grade(*draw(), verdict_reward)
    full = rollout.join([rollout.keep(rows, kept == 1) for kept in np.eye(3)[[1, 0, 2]]], 2)
    np.testing.assert_array_equal(full.prompt[:, 0], [1, 1, 0, 0])
    np.testing.assert_array_equal(full.response[:, 0], [100, 110, 0, 10])
    assert full.group_size == G


def test_description_of_everything_that_was_sampled():
    *_, groups = draw()
    groups[0][1] = replace(groups[0][1], status="timeout")
    got = rollout.describe([*groups, [Sample((), "", None, False)] * 2])
    want = {
        "rollout/accuracy": 2 / 5,
        "rollout/score": 2 / 5,
        "rollout/all_correct": 1 / 3,  # of the groups with a verdict
        "rollout/all_wrong": 1 / 3,
        "rollout/mixed": 1 / 3,
        "rollout/length": 14 / 8,
        "rollout/truncated": 1 / 8,
        "rollout/ungraded": 3 / 8,
        "verifier/timeout": 1,
        "verifier/error": 0,
    }
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, err_msg=name)
