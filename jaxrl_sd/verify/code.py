"""Programs: a response's Python code is run against the tests of its problem, in a sandbox.

Where a test says what must come out, the expected output or value stays out of the sandbox and is
compared here: no program can know it, so none can pretend. A test program, and an assertion of
another form than `expression == literal`, can only run inside the program's own interpreter. To
exit early or to print anything does not pass those, since the verdict is a random word that the
sandbox sends after the last of the test's lines. But a program that sets out to can return objects
that are equal to everything, change what the tests call, or look the word up in the frames above
it. Prefer the other forms where programs are optimised against the verdict.
"""

import ast
import itertools
import json
import math
import operator
import re
import secrets
import signal
import textwrap
import time
from typing import NamedTuple

from jaxrl_sd.verify import SECONDS
from jaxrl_sd.verify.launcher import OUTPUT_BYTES
from jaxrl_sd.verify.sandbox import Outcome, Sandbox, check, read_value

TEST_SECONDS = 4.0  # for one test
TOTAL_SECONDS = SECONDS["code"]  # for all tests of a program: below `verifier.timeout_s`
TOLERANCE = 1e-6  # relative, or absolute below 1: the usual one of contests; for decimals only

_MAX_SHOWN = 400  # characters of an input, an output or an error in the feedback
_NOT_RUN = "It did not run, since one before it met a limit, or all together ran out of time."
_MAX_FAILURES = 2  # tests that the feedback describes

_EXPECTED = (
    'expected JSON: {"inputs": [...], "outputs": [...]} of one length, with "fn_name" for calls; '
    'or {"tests": a program or a list of assertions}, with "entry_point" for `check(entry_point)`; '
    "or a list of assertions"
)

# What problems with a function to complete take as imported, as their sites do.
_PREAMBLE = """
import bisect, collections, functools, heapq, itertools, math, random, re, string
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
from builtins import *
"""


class Result(NamedTuple):
    """What one test said. `failure` is "" where the program passed it."""

    shown: str  # the test, as the feedback shows it
    failure: str


class _Script(NamedTuple):
    """A run as a script."""

    stdin: str
    expected: str

    @property
    def shown(self) -> str:
        return f"input\n{_clip(self.stdin)}"


class _Call(NamedTuple):
    """The value of `expression` after the program and `setup`."""

    shown: str
    setup: str
    expression: str
    expected: object  # for a test program: the word that `expression` is
    is_json: bool = False  # `expected` was JSON, which has one kind of sequence and of key


def verify(prompt: str, answer: str, response: str) -> tuple[bool, str]:
    """Whether the program in `response` passes all tests of `answer`, and feedback where not.

    The program is the last fenced code block, or all of a response without one. `answer` is JSON:

    - `{"inputs": [...], "outputs": [...]}`: the program reads each input and prints its output,
      each a text or a list of lines. They are compared word by word within lines that are not
      blank; words must be equal, or within `TOLERANCE` where a decimal is expected.
    - the same with `"fn_name"`: a function, or a method of `class Solution`. An input is the list
      of its arguments, an output is what it must return, perhaps as a list of that alone; or both
      are texts of JSON, an input one argument a line.
    - a list of assertions, each a test; other statements of the list run before each that follows.
    - `{"tests": ...}` with such a list, or with a program that must run to its end after the
      response's, as one test; with `"entry_point"`, it may define `check(candidate)`.

    Tests after one that ran out of time or printed too much do not run. `prompt` is not read.

    Raises:
      ValueError: `answer` is none of these.
      RuntimeError: this machine cannot isolate the program (see `sandbox.check`).
    """
    results = run_tests(answer, response)
    return all(not result.failure for result in results), _feedback(results)


def run_tests(answer: str, response: str) -> list[Result]:
    """The result of each test of `answer`, in their order; see `verify`."""
    deadline = time.monotonic() + TOTAL_SECONDS
    tests = _read_answer(answer)
    is_function = isinstance(tests[0], _Call) and tests[0].is_json
    check()
    results = []
    with Sandbox(_program(response), _PREAMBLE if is_function else "") as sandbox:
        for test in tests:
            seconds = min(TEST_SECONDS, max(deadline - time.monotonic(), 0.0))
            outcome = _run(sandbox, test, seconds)
            results.append(Result(test.shown, _failure(test, outcome, seconds)))
            if outcome.status != "ended":
                break
    return results + [Result(test.shown, _NOT_RUN) for test in tests[len(results) :]]


_FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


def _program(response: str) -> str:
    blocks = _FENCED.findall(response)
    return textwrap.dedent(blocks[-1]) if blocks else response


def check_problem(prompt: str, answer: str) -> None:
    """ValueError where the answer holds no tests."""
    _read_answer(answer)


def _read_answer(answer: str) -> list[_Script] | list[_Call]:
    try:
        tests = _read_tests(json.loads(answer))
    except (ValueError, TypeError, SyntaxError) as error:
        raise ValueError(f"answer: got {_clip(answer)!r}, {_EXPECTED} ({error})") from error
    if any(isinstance(test, _Script) and len(test.expected) > OUTPUT_BYTES // 4 for test in tests):
        raise ValueError(f"answer: expected outputs of at most {OUTPUT_BYTES // 4} characters")
    return tests


def _read_tests(data: object) -> list[_Script] | list[_Call]:
    match data:
        case {"inputs": [_, *_] as inputs, "outputs": [_, *_] as outputs}:
            pairs = zip(inputs, outputs, strict=True)
            if "fn_name" in data:
                return [_read_call(data["fn_name"], *pair) for pair in pairs]
            return [_read_script(*pair) for pair in pairs]
        case {"tests": [_, *_] as statements} | ([_, *_] as statements):
            return _read_assertions(statements)
        case {"tests": str(source)}:
            if "entry_point" in data and re.search(r"^def check\(", source, re.MULTILINE):
                if not str(data["entry_point"]).isidentifier() or data["entry_point"] is None:
                    raise ValueError(f"entry_point is {data['entry_point']!r}")
                source += f"\ncheck({data['entry_point']})"
            return [_read_program("the test program", source)]
    raise ValueError("none of these")


def _read_script(stdin: object, expected: object) -> _Script:
    texts = ["\n".join(text) if isinstance(text, list) else text for text in (stdin, expected)]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("an input or output is no text")
    return _Script(*texts)


def _read_call(name: str, arguments: object, expected: object) -> _Call:
    if isinstance(arguments, str):
        arguments = [json.loads(line) for line in arguments.split("\n") if line.strip()]
        expected = json.loads(expected)
    if not str(name).isidentifier() or not isinstance(arguments, list):
        raise ValueError("no name of a function, or no list of arguments")
    call = f"{name}({', '.join(map(repr, arguments))})"
    function = f"(Solution().{name} if 'Solution' in globals() else {name})"
    return _Call(call, "", call.replace(name, function, 1), expected, is_json=True)


def _read_assertions(statements: list[str]) -> list[_Call]:
    tests, setup = [], ""
    for statement in statements:
        lines = ast.parse(statement).body
        match lines:
            case [ast.Assert(ast.Compare(left, [ast.Eq()], [right]))] if _is_literal(right):
                expected = ast.literal_eval(right)
                tests.append(_Call(ast.unparse(left), setup, ast.unparse(left), expected))
            case _ if any(isinstance(line, ast.Assert) for line in lines):
                tests.append(_read_program(statement, setup + statement))
            case _:
                setup += statement + "\n"
    if not tests:
        raise ValueError("no assertion")
    return tests


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError):
        return False
    return True


def _read_program(shown: str, source: str) -> _Call:
    ast.parse(source)
    word = secrets.token_hex(16)
    return _Call(shown, source, repr(word), word)


def _run(sandbox: Sandbox, test: _Script | _Call, seconds: float) -> Outcome:
    if isinstance(test, _Script):
        return sandbox.run_main(test.stdin, seconds)
    return sandbox.evaluate(test.setup, test.expression, seconds)


def _failure(test: _Script | _Call, outcome: Outcome, seconds: float) -> str:
    if outcome.status == "time":
        return f"It ran out of time ({seconds:.1f} s)."
    if outcome.status == "output":
        return f"It printed more than {OUTPUT_BYTES >> 20} MB."
    if outcome.code < 0:
        return f"It was ended by signal {-outcome.code} ({signal.strsignal(-outcome.code)})."
    if outcome.code > 0:
        return f"Error:\n{_clip_end(outcome.stderr) or f'exit code {outcome.code}'}"
    if isinstance(test, _Script):
        is_right = _same_output(test.expected, outcome.stdout)
        return "" if is_right else _difference(test.expected, outcome.stdout)
    return _value_failure(test, outcome.value)


def _value_failure(test: _Call, text: str) -> str:
    if not text:
        return "It ended before the test did."
    try:
        value = read_value(text)
        if (_same_json if test.is_json else operator.eq)(test.expected, value):
            return ""
        return _difference(repr(test.expected), repr(value))
    except (ValueError, RecursionError):  # it wrote the value itself, or nested it deeply
        return "Its result cannot be read."


def _difference(expected: str, got: str) -> str:
    return f"Expected:\n{_clip(expected)}\nGot:\n{_clip(got)}"


_DECIMAL = re.compile(r"[-+]?[0-9]*\.[0-9]+(?:[eE][-+]?[0-9]+)?")
_NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|" + _DECIMAL.pattern)


def _same_output(expected: str, got: str) -> bool:
    expected_lines, got_lines = _words(expected), _words(got)
    if [len(line) for line in expected_lines] != [len(line) for line in got_lines]:
        return False
    words = zip(itertools.chain(*expected_lines), itertools.chain(*got_lines), strict=True)
    return all(_same_word(*pair) for pair in words)


def _words(text: str) -> list[list[str]]:
    return [line.split() for line in text.split("\n") if line.strip()]


def _same_word(expected: str, got: str) -> bool:
    if expected == got:
        return True
    return bool(_DECIMAL.fullmatch(expected) and _NUMBER.fullmatch(got)) and _is_close(
        float(expected), float(got)
    )


def _is_close(expected: float, got: float) -> bool:
    return math.isclose(expected, got, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def _same_json(expected: object, got: object) -> bool:
    """Whether a value is the one expected, or the only one of the list expected (as in APPS)."""
    if isinstance(expected, list) and len(expected) == 1 and _same_item(expected[0], got):
        return True
    return _same_item(expected, got)


def _same_item(expected: object, got: object) -> bool:
    if isinstance(expected, list) and isinstance(got, list | tuple):
        return len(expected) == len(got) and all(map(_same_item, expected, got))
    if isinstance(expected, dict) and isinstance(got, dict):
        got = {str(key): value for key, value in got.items()}
        return expected.keys() == got.keys() and all(
            _same_item(value, got[key]) for key, value in expected.items()
        )
    if isinstance(expected, float) and isinstance(got, float):
        return _is_close(expected, got)
    return expected == got


def _feedback(results: list[Result]) -> str:
    """The first failures, and how many tests passed; "" where all did."""
    failed = [number for number, result in enumerate(results, 1) if result.failure]
    if not failed:
        return ""
    parts = [
        f"Test {number} of {len(results)} failed: {_clip(results[number - 1].shown)}\n"
        f"{results[number - 1].failure}"
        for number in failed[:_MAX_FAILURES]
    ]
    return "\n\n".join([*parts, f"{len(results) - len(failed)} of {len(results)} tests passed."])


def _clip(text: str) -> str:
    text = text.strip("\n")
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _clip_end(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _MAX_SHOWN else f"...{text[-_MAX_SHOWN:]}"
