"""Problems, and the order in which training sees them."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import grain

from jaxrl_sd import countdown
from jaxrl_sd.tokens import is_text
from jaxrl_sd.types import InputError, Problem

# Column names in use, in order of preference.
PROMPT_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("answer", "ground_truth")
SOLUTION_COLUMNS = ("solution",)


def load(source: str, split: str, count: int, seed: int, suffix: str = "") -> list[Problem]:
    """The problems of a split.

    Args:
      source: "countdown" for the built-in task, or the path of a JSON-lines file.
      split: "train" or "test"; the built-in task's splits share no class of problems.
      count: how many to generate (built-in task), or to read at most (file; 0 reads all).
      seed: of the generator; files ignore it.
      suffix: text that ends every prompt.

    Raises:
      InputError: no count for the built-in task; a bad file, see `read_jsonl`.
    """
    if source == "countdown":
        if count < 1:
            raise InputError(f"data.num_{split}: expected at least 1 of countdown, got {count}")
        problems = countdown.problems(split, count, seed)
    else:
        problems = read_jsonl(Path(source))
        problems = problems[:count] if count else problems
    return [dataclasses.replace(p, prompt=p.prompt + suffix) for p in problems]


def read_jsonl(path: Path) -> list[Problem]:
    """One problem a line: an object with a prompt, an answer and perhaps a solution.

    Raises:
      InputError: missing or empty file, a line that is no object, or one without prompt or answer.
    """
    if not path.is_file():
        raise InputError(f"data: expected 'countdown' or a JSON-lines file, got {path}")
    problems = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data: {path}: expected UTF-8 text, {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            problems.append(_problem(line, f"{path}:{number}"))
    if not problems:
        raise InputError(f"data: expected at least one problem, got an empty file: {path}")
    return problems


def _problem(line: str, where: str) -> Problem:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"data: {where}: expected a JSON object, got {line[:60]!r}") from error
    if not isinstance(row, dict):
        raise InputError(f"data: {where}: expected a JSON object, got {line[:60]!r}")

    def first(columns: Sequence[str]) -> str | None:
        for column in columns:
            value = row.get(column)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (value is None or number or is_text(value)):
                raise InputError(f"data: {where}: {column}: expected text, got {value!r:.60}")
            if value is not None and str(value).strip():
                return str(value).strip()
        return None

    prompt, answer, solution = map(first, (PROMPT_COLUMNS, ANSWER_COLUMNS, SOLUTION_COLUMNS))
    if answer is not None and "####" in answer:  # GSM8K: a worked solution, ####, the number
        working, answer = (part.strip() for part in answer.rsplit("####", 1))
        solution = solution or working or None
        if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", answer):
            answer = answer.replace(",", "")
    for value, columns in ((prompt, PROMPT_COLUMNS), (answer, ANSWER_COLUMNS)):
        if not value:
            raise InputError(f"data: {where}: expected one of the fields {columns}, got {[*row]}")
    return Problem(where, prompt, answer, solution, str(row.get("verifier", "math")))


def shuffled(problems: Sequence[Problem], seed: int) -> grain.MapDataset:
    """An endless sequence that shuffles anew in each pass; `[i]` is the i-th problem training sees.

    Random access makes the position one integer, which is all that a checkpoint has to hold.
    """
    return grain.MapDataset.source(problems).shuffle(seed=seed).repeat()
