"""Reading problems and the order in which training sees them."""

import json

import pytest

from jaxrl_sd import data
from jaxrl_sd.types import InputError, Problem


def write(tmp_path, *rows):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_usual_column_names_are_recognised(tmp_path):
    path = write(
        tmp_path,
        {"problem": "1+1?", "answer": 2, "solution": "one and one"},
        {"question": "Half of 5,000?", "answer": "Half of 5000 is\n#### 2,500"},
        {"prompt": "x?", "ground_truth": "\\frac{1}{2}"},
        {"prompt": "point?", "answer": "see\n#### (1,2)"},
    )
    first, second, third, fourth = data.read_jsonl(path)
    assert (first.prompt, first.answer, first.solution) == ("1+1?", "2", "one and one")
    assert (second.answer, second.solution) == ("2500", "Half of 5000 is")
    assert fourth.answer == "(1,2)"
    assert (third.answer, third.solution, third.verifier) == ("\\frac{1}{2}", None, "math")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "expected at least one problem"),
        (({"prompt": "x"},), r"jsonl:1: expected one of the fields \('answer'"),
        (({"prompt": "x", "answer": "1"}, {"prompt": "y", "answer": ""}), "jsonl:2"),
        (({"answer": "1"},), r"expected one of the fields \('prompt'"),
        (("{not json",), "jsonl:1: expected a JSON object"),
        (("[1, 2]",), "jsonl:1: expected a JSON object"),
        (({"prompt": [{"role": "user"}], "answer": 1},), "prompt: expected text"),
        (({"prompt": "x", "answer": True},), "answer: expected text, got True"),
        (({"prompt": "x \ud83d", "answer": "1"},), r"prompt: expected text, got 'x \\ud83d'"),
        (("1" * 5000,), "jsonl:1: expected a JSON object"),
        (({"prompt": "x", "answer": "so ####"},), r"expected one of the fields \('answer'"),
    ],
)
def test_bad_files_are_named(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        data.read_jsonl(write(tmp_path, *rows))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.jsonl"):
        data.load(str(tmp_path / "nothing.jsonl"), "train", 0, 0)


def test_generated_problems_need_a_number():
    with pytest.raises(
        InputError, match=r"data\.num_test: expected at least 1 of countdown, got 0"
    ):
        data.load("countdown", "test", 0, 0)


def test_every_pass_sees_every_problem_in_another_order():
    problems = [Problem(str(i), "p", "a") for i in range(50)]
    order = data.shuffled(problems, seed=1)
    passes = [[order[i].id for i in range(k * 50, (k + 1) * 50)] for k in range(3)]
    assert all(sorted(p, key=int) == [str(i) for i in range(50)] for p in passes)
    assert passes[0] != passes[1] != passes[2]
    assert [data.shuffled(problems, seed=1)[i].id for i in range(70, 90)] == [
        order[i].id for i in range(70, 90)
    ]
    assert passes[0] != [data.shuffled(problems, seed=2)[i].id for i in range(50)]


def test_the_suffix_ends_every_prompt(tmp_path):
    path = write(tmp_path, {"prompt": "1+1?", "answer": 2}, {"prompt": "2+2?", "answer": 4})
    problems = data.load(str(path), "train", 1, 0, suffix=" Box it.")
    assert [p.prompt for p in problems] == ["1+1? Box it."]
