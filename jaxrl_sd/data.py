"""Problems, and the order in which training sees them."""

import dataclasses
import importlib
import itertools
import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import grain
from absl import logging

from jaxrl_sd import chains, code_problems, countdown
from jaxrl_sd.tokens import is_text
from jaxrl_sd.types import InputError, Problem, first_line

# Built-in tasks: functions of the split, how many problems to draw, and the generator's seed.
TASKS = {
    "countdown": countdown.problems,
    "countdown_hard": partial(countdown.problems, levels=countdown.HARD_LEVELS),
    "chains": chains.problems,
    "chains_answer": partial(chains.problems, terse=True),
}

# Usual names of the columns, in order of preference. A dot reaches into a nested object.
COLUMNS = {
    "prompt": ("prompt", "problem", "question", "input"),
    "answer": (
        *("answer", "ground_truth", "final_answer", "expected_answer"),
        "reward_model.ground_truth",  # verl, DAPO-Math-17k
    ),
    "solution": ("solution", "reference_solution"),
    "verifier": ("verifier",),
}
ID_COLUMNS = ("id", "unique_id", "task_id", "question_id", "extra_info.index")
ROLES = ("system", "user", "assistant")
FILES = (".jsonl", ".json", ".parquet")

Row = Mapping[str, Any]


def load(
    source: str,
    split: str,
    count: int,
    seed: int,
    suffix: str = "",
    *,
    subset: str = "",
    hub_split: str = "",
    columns: Mapping[str, str] | None = None,
    verifier: str = "math",
    answers: bool = True,
) -> list[Problem]:
    """The problems of a split.

    Args:
      source: one of `TASKS`, which are built in; a JSON-lines, JSON or Parquet file; a folder of
        such files, or one that `datasets` has saved; or the name of a data set of the Hugging Face
        hub.
      split: "train" or "test"; a built-in task's splits share no class of problems.
      count: how many to generate (built-in tasks), or to read at most (else; 0 reads all).
      seed: of the generator; data sets ignore it.
      suffix: text that ends every prompt.
      subset: of a data set that has several.
      hub_split: of a data set that has several, `split` where empty.
      columns: the columns that hold the fields of `COLUMNS`, found by those names where empty.
      verifier: of rows that name none.
      answers: whether every row must have an answer.

    Raises:
      InputError: no count for a built-in task; a source that cannot be read; a row that is no
        problem.
    """
    if source in TASKS:
        if count < 1:
            raise InputError(f"data.num_{split}: expected at least 1 of {source}, got {count}")
        problems = TASKS[source](split, count, seed)
    else:
        try:
            rows = _rows(source, subset, hub_split or split, count)
        except InputError as error:
            raise InputError(f"data.{split}: {error}") from error
        problems = parse(rows, columns or {}, verifier, answers)
    return [dataclasses.replace(p, prompt=p.prompt + suffix) for p in problems]


def parse(
    rows: Mapping[str, Row], columns: Mapping[str, str], verifier: str, answers: bool
) -> list[Problem]:
    """The problems in the rows of a data set, by the place of each row.

    Raises:
      InputError: naming the row and what is wrong with it.
    """
    names = dict.fromkeys(name for row in rows.values() for name in row)
    problems = []
    for where, row in rows.items():
        try:
            problem = _problem(code_problems.standard(row), columns, verifier, answers)
        except InputError as error:
            raise InputError(f"data: {where}: {error}") from error
        every_column = {name: row.get(name) for name in names}
        problems.append(dataclasses.replace(problem, id=where, columns=every_column))
    ids = [_identifier(row) for row in rows.values()]
    if None in ids or len(set(ids)) < len(ids):
        return problems
    return [dataclasses.replace(p, id=name) for p, name in zip(problems, ids, strict=True)]


def _identifier(row: Row) -> str | None:
    values = [_get(row, name) for name in ID_COLUMNS]
    return next((str(value) for value in values if isinstance(value, str | int)), None)


def _problem(row: Row, columns: Mapping[str, str], verifier: str, answers: bool) -> Problem:
    turns, prompt, chat = _prompt(_value(row, "prompt", columns))
    verifier = _text("verifier", _value(row, "verifier", columns)) or verifier
    answer = _value(row, "answer", columns)
    if isinstance(answer, list | dict) and verifier != "math":  # such as the tests of a program
        answer = json.dumps(answer)
    answer = _text("answer", answer)
    solution = _text("solution", _value(row, "solution", columns))
    if verifier == "math":
        answer, solution = _math_answer(answer, solution)
        solution = None if solution == answer else solution  # DAPO-Math-17k: nothing worked out
    for field, value in (("prompt", prompt), ("answer", answer)):
        if not value and (field == "prompt" or answers):
            expected = columns.get(field) or f"one of the columns {COLUMNS[field]}"
            raise InputError(f"{field}: expected {expected} with a value, got {[*row]}")
    return Problem("", prompt, answer or "", solution, verifier, turns, chat)


def _get(row: Any, name: str) -> Any:
    """The value in a column, whatever the case of its name; None where there is none."""
    if not isinstance(row, Mapping):
        return None
    if name in row:
        return row[name]
    found = next((value for key, value in row.items() if key.lower() == name.lower()), None)
    first, dot, rest = name.partition(".")
    return _get(_get(row, first), rest) if found is None and dot else found


def _value(row: Row, field: str, columns: Mapping[str, str]) -> Any:
    """What a row has for a field, None where it has nothing."""
    own = columns.get(field, "")
    if own and not _is_filled(_get(row, own)):
        raise InputError(f"data.columns.{field}: expected {own!r} with a value, got {[*row]}")
    values = [_get(row, name) for name in ([own] if own else COLUMNS[field])]
    return next((value for value in values if _is_filled(value)), None)


def _is_filled(value: Any) -> bool:
    if isinstance(value, numbers.Real):
        return not math.isnan(value)  # pandas writes an empty cell as NaN
    return value.strip() != "" if isinstance(value, str) else value is not None


def _text(field: str, value: Any) -> str | None:
    number = isinstance(value, numbers.Real | Decimal) and not isinstance(value, bool)
    if not (value is None or number or is_text(value)):
        raise InputError(f"{field}: expected text, got {value!r:.60}")
    if number and "e" in str(value).lower():  # in 1e-07, verifiers take e for a number
        return f"{Decimal(str(value)):f}"
    return None if value is None else str(value).strip()


def _prompt(value: Any) -> tuple[tuple[tuple[str, str], ...], str | None, bool]:
    """The turns before the last, the text of the last, and whether the prompt is messages."""
    if not isinstance(value, list):
        return (), _text("prompt", value), False
    turns = [_turn(message) for message in value]
    if not turns or turns[-1][0] != "user":
        raise InputError(f"prompt: expected messages that end with the user's, got {value!r:.60}")
    *before, (_, prompt) = turns
    return tuple(before), prompt, True


def _turn(message: Any) -> tuple[str, str]:
    role, content = _get(message, "role"), _get(message, "content")
    if role not in ROLES or not is_text(content):
        raise InputError(
            f"prompt: expected text, or messages with a role of {ROLES} and a text as content, "
            f"got {message!r:.60}"
        )
    return role, content.strip()


def _math_answer(answer: str | None, solution: str | None) -> tuple[str | None, str | None]:
    """The final answer, and the worked solution that the data set has around it or beside it.

    GSM8K's answers are a solution, ####, and a number; MATH has solutions with a boxed answer.
    """
    text = solution if answer is None else answer
    if text and "####" in text:
        working, final = (part.strip() for part in text.rsplit("####", 1))
        if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", final):
            final = final.replace(",", "")
        return final, solution or working or None
    if text and (final := last_boxed(text)) is not None:
        rest = text.replace(f"\\boxed{{{final}}}", "")
        return final, solution or (text if re.search(r"\w", rest) else None)
    return answer, solution


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces are balanced.

    >>> last_boxed(r"\boxed{1}, so \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if depth == 0:
                return text[start : start + brace.start()].strip()
    return None


def _rows(source: str, subset: str, split: str, count: int) -> dict[str, Row]:
    """The first rows of a source by their place; all of them where `count` is 0."""
    path = Path(source).expanduser()
    if path.is_file():
        rows = _read_file(path)
    elif _is_hub_name(source) or (source and path.is_dir()):  # Path("") is this folder
        rows = _read_dataset(path, source, subset, split)
    else:
        raise InputError(
            f"expected {', '.join(map(repr, TASKS))}, a {', '.join(FILES)} file, a folder or the "
            f"name of a data set of the hub, got {source}: no such file or folder"
        )
    if not rows:
        raise InputError(f"expected at least one problem, got an empty data set: {source}")
    if 0 < count < len(rows):
        logging.warning(
            "data: the first %d of the %d rows of %s are read", count, len(rows), source
        )
    return dict(itertools.islice(rows.items(), count or None))


def _is_hub_name(source: str) -> bool:
    return bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source)) and not source.endswith(FILES)


def _read_file(path: Path) -> dict[str, Row]:
    read = _read_parquet if path.suffix == ".parquet" else _read_json
    try:
        values = read(path)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    for number, value in values.items():
        if not isinstance(value, dict):
            raise InputError(f"{path}:{number}: expected a JSON object, got {str(value)[:60]!r}")
    return {f"{path}:{number}": row for number, row in values.items()}


def _read_parquet(path: Path) -> dict[int, Any]:
    return dict(enumerate(_optional("pyarrow.parquet").read_table(path).to_pylist(), start=1))


def _read_json(path: Path) -> dict[int, Any]:
    """The values of a list, or of lines, by their numbers; a line that is no JSON as it is."""
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json" and text.lstrip().startswith("["):
        return dict(enumerate(json.loads(text), start=1))
    lines = enumerate(text.split("\n"), start=1)
    return {number: _parse(line) for number, line in lines if line.strip()}


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


def _read_dataset(path: Path, source: str, subset: str, split: str) -> dict[str, Row]:
    datasets = _optional("datasets")
    try:
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(path)
        elif path.is_dir():
            found = datasets.load_dataset(str(path), subset or None)
        else:
            found = datasets.load_dataset(source, subset or None)
    except Exception as error:  # of the file system, the network, any parser
        what = "the folder" if path.is_dir() else "no file or folder here, and the hub's"
        raise InputError(f"{what} {source} cannot be loaded: {first_line(error)}") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise InputError(f"{source} has the splits {sorted(found)}, and not {split!r}")
        found = found[split]
    return {f"{source}[{split}]:{i}": row for i, row in enumerate(found.to_list())}


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)  # seconds to import
    except ImportError as error:
        raise InputError(
            f"this data set needs a package that is missing: pip install 'jaxrl_sd[data]' ({error})"
        ) from error


def shuffled(problems: Sequence[Problem], seed: int) -> grain.MapDataset:
    """An endless sequence that shuffles anew in each pass; `[i]` is the i-th problem training sees.

    Random access makes the position one integer, which is all that a checkpoint has to hold.
    """
    return grain.MapDataset.source(problems).shuffle(seed=seed).repeat()
