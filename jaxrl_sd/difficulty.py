"""Keeps the problems that a given model solves neither too often nor too seldom.

RLSD trains on problems that a given model failed in each of four attempts (2604.03128; its data is
the part of MMFineReason-1.8M that Qwen3-VL-4B-Thinking never solved): k = 4 and pass rates of 0.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_sd import answers, evaluate, files, metrics
from jaxrl_sd.answers import Record
from jaxrl_sd.types import InputError, Problem


def check(min_pass: float, max_pass: float) -> None:
    """InputError unless 0 <= min_pass <= max_pass <= 1."""
    if not 0 <= min_pass <= max_pass <= 1:
        raise InputError(
            f"min_pass, max_pass: expected 0 <= min_pass <= max_pass <= 1, "
            f"got {min_pass} and {max_pass}"
        )


def write(
    path: Path,
    problems: Sequence[Problem],
    records: Sequence[Record],
    min_pass: float,
    max_pass: float,
) -> dict[str, int]:
    """Writes the problems whose pass rate is in [min_pass, max_pass], one JSON object a line.

    A line holds the columns that the problem came with, and `pass_rate`, the share of correct
    answers among those that could be graded.

    Args:
      records: the answers to the problems, see `answers.collect`.

    Returns:
      How many were kept, too easy, too hard, and ungraded, that is without any graded answer.
    """
    rates = evaluate.means(answers.verdicts(records))
    lines = [
        _line({**problem.columns, "pass_rate": rate})
        for problem, rate in zip(problems, rates.tolist(), strict=True)
        if min_pass <= rate <= max_pass
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace_text(path, "".join(lines))
    return {
        "kept": len(lines),
        "too easy": int(np.sum(rates > max_pass)),
        "too hard": int(np.sum(rates < min_pass)),
        "ungraded": int(np.sum(np.isnan(rates))),
    }


def _line(row: dict[str, Any]) -> str:
    filled = {name: None if value != value else value for name, value in row.items()}  # no NaN
    return json.dumps(metrics.strict(filled), default=str) + "\n"
