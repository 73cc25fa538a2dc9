"""One self-contained HTML page on which the token credit of several methods can be read."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jaxrl_sd.metrics import strict
from jaxrl_sd.types import InputError

TEMPLATE = Path(__file__).parent / "assets" / "viewer.html"
DATA = "{{data}}"
DIGITS = 5  # significant ones of every number: pages of long answers are large

Record = Mapping[str, Any]  # see records.py


def page(columns: Mapping[str, Sequence[Record]]) -> str:
    """A page that needs nothing else, no network either: a browser opens it from any folder.

    Answers to the same prompt in the same step stand in one block, a column for each entry of
    `columns`. The same answer of several columns stands in one row. Where no two columns have an
    answer in common, as when each is of another model, the first of each stand in one row, and so
    on.

    Args:
      columns: {name: records}, see records.py; "prompt" and "response_tokens" are needed, whatever
        else is missing or None is shown as missing.

    Raises:
      InputError: there is nothing to show.
    """
    if not any(columns.values()):
        raise InputError(f"columns: expected an answer to show, got none in {list(columns)}")
    text = json.dumps(strict(_short(_layout(columns))), allow_nan=False)
    # In a script element, HTML ends at "</script" and changes its rules at "<!--".
    return TEMPLATE.read_text(encoding="utf-8").replace(DATA, text.replace("<", "\\u003c"))


def _layout(columns: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """{"columns": names, "problems": [{"prompt", "answer", "step", "rows"}]}.

    A row has one record a column, None where the column does not have the answer.
    """
    problems: dict[tuple, list[list[Record]]] = {}
    for c, records in enumerate(columns.values()):
        for record in records:
            problem = record.get("step"), record["prompt"]
            problems.setdefault(problem, [[] for _ in columns])[c].append(record)
    return {
        "columns": list(columns),
        "problems": [
            {
                "step": step,
                "prompt": prompt,
                "answer": next(r.get("answer") for records in of_columns for r in records),
                "rows": _rows(of_columns),
            }
            for (step, prompt), of_columns in problems.items()
        ],
    }


def _rows(of_columns: Sequence[Sequence[Record]]) -> list[list[Record | None]]:
    """The same answer of several columns in one row; the first of each where none are the same."""
    rows: dict[tuple, list[Record | None]] = {}
    for c, records in enumerate(of_columns):
        times: Counter = Counter()  # the same answer can be sampled twice
        for record in records:
            answer = tuple(record["response_tokens"])
            times[answer] += 1
            rows.setdefault((answer, times[answer]), [None] * len(of_columns))[c] = record
    if all(row.count(None) == len(row) - 1 for row in rows.values()):
        return [list(row) for row in zip_longest(*of_columns)]
    return list(rows.values())


def _short(value: Any) -> Any:
    """`value` with every float rounded to `DIGITS` significant digits."""
    if isinstance(value, Mapping):
        return {name: _short(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
