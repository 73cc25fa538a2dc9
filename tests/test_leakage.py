import math

import numpy as np
import pytest

from jaxrl_sd import config, contexts, leakage
from jaxrl_sd.tokens import Template
from jaxrl_sd.types import Problem, Sample

TEMPLATES = {
    "nothing": Template("{problem} please"),
    "answer": Template(
        "{problem} try {answer}. Now see", "as a reference solution", tail=" please"
    ),
}


def problem(prompt, answer, solution=None):
    return Problem(prompt, prompt, answer, solution)


def sample(text, correct=True):
    return Sample((), text, correct, truncated=False)


def describe(problems, groups, templates=TEMPLATES):
    return leakage.describe(problems, groups, templates)


def test_solution_of_the_problem_and_of_another():
    """Phrases `a b c`, `b c d`, `c d e`, of which the prompt has the first."""
    problems = [problem("a b c", "?", "A b c d e"), problem("x", "?", "p q r")]
    groups = [
        [sample("b c d e"), sample("so b, c c d E", correct=False), sample("a b c p q r", None)],
        [sample("p q s"), sample("p q r", False), sample("x", False)],
    ]
    got = describe(problems, groups)
    shares = [[1, 0.5, 0], [0, 1, 0]]
    np.testing.assert_allclose(got["leakage/solution"], np.mean(shares))
    np.testing.assert_allclose(got["leakage/of_correct"], np.mean([1, 0]))
    np.testing.assert_allclose(got["leakage/solution_other"], np.mean([0, 0, 1, 0, 0, 0]))


def test_signs_are_words_where_solutions_are_compared():
    problems = [problem("4 7 : 28", "4 * 7", "4 * 7 = 28"), problem("x", "?", "a b c")]
    got = describe(problems, [[sample("4+7=28"), sample("4*7=28")], [sample("a b c")] * 2])
    # Of `4 * 7`, `* 7 =` and `7 = 28`.
    np.testing.assert_allclose(got["leakage/solution"], np.mean([1 / 3, 1, 1, 1]))


@pytest.mark.parametrize("solution", [None, "so short"])
def test_the_answer_stands_in_for_a_missing_or_short_solution(solution):
    got = describe([problem("x", "4 * 7", solution)], [[sample("4 * 7"), sample("28")]])
    assert got["leakage/solution"] == 0.5


def test_nothing_to_compare_is_nan():
    """A short answer, a solution that the prompt has, and no other problem."""
    for one in (problem("x", "28"), problem("a b c", "?", "a b c")):
        got = describe([one], [[sample("28"), sample("a b c")]])
        assert all(math.isnan(got[f"leakage/{x}"]) for x in ("solution", "of_correct"))
    known = problem("x", "?", "a b c")
    assert math.isnan(describe([known, known], [[sample("a b c")]] * 2)["leakage/solution_other"])
    assert math.isnan(describe([known], [[sample("a b c", False)]])["leakage/of_correct"])


def test_a_problem_without_a_solution_does_not_count():
    problems = [problem("x", "28"), problem("y", "?", "a b c")]
    got = describe(problems, [[sample("a b c")], [sample("a b c")]])
    assert got["leakage/solution"] == got["leakage/solution_other"] == 1


def slow_share(problems, groups):
    """Of phrases found by comparing words at every place."""

    def said(words, text):
        text = leakage.split(text)
        return any(text[i : i + 3] == words for i in range(len(text)))

    shares = []
    for one, group in zip(problems, groups, strict=True):
        words = one.solution.lower().split()
        wanted = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
        wanted = [list(w) for w in wanted if not said(list(w), one.prompt)]
        if wanted:
            shares += [np.mean([said(w, s.text) for w in wanted]) for s in group]
    return np.mean(shares)


def test_random_texts_against_a_slow_loop():
    rng = np.random.default_rng(0)

    def text(n):
        return " ".join(rng.choice(list("aBc"), n))

    problems = [problem(text(5), "?", text(6)) for _ in range(40)]
    groups = [[sample(text(12)), sample(text(8))] for _ in problems]
    got = describe(problems, groups)["leakage/solution"]
    assert 0.1 < got < 0.9
    np.testing.assert_allclose(got, slow_share(problems, groups))


def test_words_of_hints():
    problems = [problem("see 4 7", "?"), problem("x", "?")]
    texts = ["Try: 7", "tryst", "now, see", "the reference solution", "please", "now"]
    want = [1, 0, 1, 0, 0, 0]  # "now see" and "as a reference" are phrases, their parts are none
    got = [describe(problems[1:], [[sample(text)]])["leakage/words"] for text in texts]
    assert got == want
    assert describe(problems[:1], [[sample("a reference solution")]])["leakage/words"] == 1


def test_a_phrase_of_the_prompt_is_not_a_leak():
    got = describe([problem("try to add", "?")], [[sample("try it"), sample("now see")]])
    assert got["leakage/words"] == 0.5


def test_wordings_of_the_built_in_task_and_of_long_templates():
    found = leakage.wordings(config.templates(config.default()))
    assert {("try",), ("see",), ("peer",), ("think",)} == {x for x in found if len(x) == 1}
    found = leakage.wordings(contexts.TEMPLATES)
    assert ("a", "reference", "solution") in found
    short = {phrase for phrase in found if len(phrase) < leakage.N}
    assert short == {("student", "response"), ("correct", "solution")}
