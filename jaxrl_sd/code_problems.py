"""Rows of code benchmarks as problems of the verifier `code`.

LiveCodeBench (its own columns, public and private tests together) and HumanEval or HumanEval+ are
recognised by their columns. The wording of the prompts is ours: neither benchmark's own prompts are
for chat models. Time limits are the verifier's, which are stricter than LiveCodeBench's 6 s a test.
"""

import base64
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from typing import Any

from jaxrl_sd.tokens import is_text
from jaxrl_sd.types import InputError

LIVE_CODE_BENCH = {"question_content", "public_test_cases", "private_test_cases"}
HUMAN_EVAL = {"prompt", "test", "entry_point"}

BLOCK = "Give the whole program in one fenced code block."


def standard(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with `prompt`, `answer` and `verifier`; a row of another form as it is.

    Raises:
      InputError: a column without text, or tests that cannot be read.
    """
    for columns, problem in ((LIVE_CODE_BENCH, _live_code_bench), (HUMAN_EVAL, _human_eval)):
        if row.keys() >= columns:
            _check_texts(row, columns)
            return {**row, **problem(row)}
    return row


def _check_texts(row: Mapping[str, Any], columns: set[str]) -> None:
    for column in sorted(columns):
        if not is_text(row[column]) or not row[column].strip():
            raise InputError(f"{column}: expected text, got {row[column]!r:.60}")


def _human_eval(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "prompt": "Complete this Python function. Give all of it, with what it imports, in one "
        f"fenced code block.\n\n```python\n{row['prompt'].rstrip()}\n```",
        "answer": json.dumps({"tests": row["test"], "entry_point": row["entry_point"]}),
        "verifier": "code",
    }


def _live_code_bench(row: Mapping[str, Any]) -> dict[str, str]:
    tests = [*_tests(row, "public_test_cases"), *_tests(row, "private_test_cases")]
    if not tests:
        raise InputError("tests: expected at least one, public or private")
    try:
        answer = {name + "s": [test[name] for test in tests] for name in ("input", "output")}
        name = json.loads(row.get("metadata") or "{}").get("func_name")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"tests: expected inputs and outputs, and JSON in metadata: {error!r}"
        ) from error
    if name:
        answer["fn_name"] = name
        form = (
            f"Complete this Python code. {BLOCK}\n\n```python\n{row.get('starter_code', '')}\n```"
        )
    else:
        form = (
            "Write a Python program that reads its input from standard input and prints the "
            f"output. {BLOCK}"
        )
    return {
        "prompt": f"{row['question_content'].strip()}\n\n{form}",
        "answer": json.dumps(answer),
        "verifier": "code",
    }


def _tests(row: Mapping[str, Any], column: str) -> list[dict[str, str]]:
    """The tests in a column: JSON, or where it is large a pickled text of JSON, packed."""
    text = row[column]
    try:
        if not text.lstrip().startswith("["):
            packed = zlib.decompress(base64.b64decode(text, validate=True))
            text = _TextUnpickler(io.BytesIO(packed)).load()
        tests = json.loads(text)
    except (
        ValueError,
        TypeError,
        AttributeError,
        zlib.error,
        pickle.UnpicklingError,
        EOFError,
    ) as e:
        raise InputError(f"{column}: cannot be read: {e}") from e
    if not isinstance(tests, list):
        raise InputError(f"{column}: expected a list of tests, got {text[:60]!r}")
    return tests


class _TextUnpickler(pickle.Unpickler):
    """Reads plain values and nothing else: other pickles can run any code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"expected a text, got an object of {module}.{name}")
