"""Rows of code benchmarks become problems that a right program solves and a wrong one does not."""

import base64
import json
import os
import pickle
import zlib

import pytest

from jaxrl_sd import data
from jaxrl_sd.types import InputError
from jaxrl_sd.verify.code import verify


def cases(*pairs, kind):
    return json.dumps([{"input": i, "output": o, "testtype": kind} for i, o in pairs])


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


STDIN = {
    "question_title": "Sum",
    "question_content": "Print the sum of the numbers.",
    "question_id": "abc_1",
    "starter_code": "",
    "public_test_cases": cases(("1 2\n", "3\n"), kind="stdin"),
    "private_test_cases": packed(cases(("4 5 6\n", "15\n"), kind="stdin")),
    "metadata": "{}",
}
FUNCTIONAL = {
    "question_content": "Add two numbers.",
    "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:",
    "public_test_cases": cases(("1\n2", "3"), kind="functional"),
    "private_test_cases": cases(("[1]\n[2, 3]", "[1, 2, 3]"), kind="functional"),
    "metadata": json.dumps({"func_name": "add"}),
}
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    for x in range(9):\n        assert candidate(x) == x + x\n",
}


def load(tmp_path, row):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    (problem,) = data.load(str(file), "test", 0, 0)
    return problem


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        (STDIN, "print(sum(map(int, input().split())))", "print(3)"),
        (
            FUNCTIONAL,
            "class Solution:\n    def add(self, a, b):\n        return a + b",
            "class Solution:\n    def add(self, a, b):\n        return 3",
        ),
        (HUMAN_EVAL, "def double(x):\n    return 2 * x", "def double(x):\n    return x * x"),
    ],
)
def test_a_row_becomes_a_problem(tmp_path, row, right, wrong):
    problem = load(tmp_path, row)
    assert problem.verifier == "code" and problem.columns == row
    for program, verdict in ((right, True), (wrong, False)):
        correct, _ = verify(problem.prompt, problem.answer, f"So:\n```python\n{program}\n```")
        assert correct is verdict


def test_prompts_show_what_to_write(tmp_path):
    text = load(tmp_path, STDIN).prompt
    assert text.startswith("Print the sum of the numbers.\n\nWrite a Python program that reads")
    assert FUNCTIONAL["starter_code"] in load(tmp_path, FUNCTIONAL).prompt
    prompt = load(tmp_path, HUMAN_EVAL).prompt
    assert f"```python\n{HUMAN_EVAL['prompt'].rstrip()}\n```" in prompt
    for hidden in ("15", "assert", "return"):
        assert hidden not in text and hidden not in prompt


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"private_test_cases": packed(Hostile())},
            "expected a text, got an object of posix",
        ),
        ({"private_test_cases": "nonsense!"}, "private_test_cases: cannot be read"),
        ({"private_test_cases": packed({"a": 1})}, "private_test_cases: cannot be read"),
        ({"public_test_cases": '[{"input": "1"}]'}, "tests: expected inputs and outputs"),
        ({"metadata": "{"}, "tests: expected inputs and outputs, and JSON in metadata"),
        ({"question_content": None}, "question_content: expected text, got None"),
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "tests: expected at least one"),
    ],
)
def test_tests_that_cannot_be_read_are_named(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"data: .*rows.jsonl:1: .*{message}"):
        load(tmp_path, STDIN | changes)
    assert not (tmp_path / "made_by_a_pickle").exists()


@pytest.mark.parametrize("column", ["prompt", "test", "entry_point"])
@pytest.mark.parametrize("value", [None, " ", [{"role": "user", "content": "?"}]])
def test_a_row_of_human_eval_is_text(tmp_path, column, value):
    """Without an entry point, `check` would never be called and any program pass."""
    with pytest.raises(InputError, match=rf"rows.jsonl:1: {column}: expected text, got"):
        load(tmp_path, HUMAN_EVAL | {column: value})
