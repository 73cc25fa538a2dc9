"""One row of plain data for each run: what is compared, tested and drawn."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_sd import metrics
from jaxrl_sd.evaluate import means

CURVES = ("eval/accuracy", "rollout/accuracy", "rollout/entropy", "rollout/length")
DIGITS = 6  # significant, of every number: what follows is noise
PERCENTILE = 95  # of the baseline's lengths, within which accuracies are compared


def of_run(folder: Path, summary: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a finished run.

    `accuracy` is that of sampled held-out answers after the last step, `best` the highest of all
    evaluations, `metrics` the mean over the last quarter of the steps of everything that was
    logged, `early` the same over the first quarter, and `curves` some of them in full, as
    [step, value].
    """
    log = metrics.read(folder)
    steps = summary["steps"]
    accuracies = [row["eval/accuracy"] for row in log if "eval/accuracy" in row]
    last = [row for row in log if "eval/accuracy" in row][-1]
    verdicts, length = last_answers(folder, steps)
    return {
        "accuracy_before": _round(summary["accuracy_before"]["value"]),
        "accuracy": _round(summary["accuracy_after"]["value"]),
        "greedy": _round(summary["greedy_after"]["value"]),
        "best": _round(max(accuracies)),
        "length": _round(last["eval/length"]),
        "truncated": _round(last["eval/truncated"]),
        "seconds_of_a_step": _round(sum(summary["seconds_of_a_step"].values())),
        "right_lengths": _right_lengths(verdicts, length),
        "longest": float(np.percentile(length, PERCENTILE)),
        "early": _mean(row for row in log if 0 < row["step"] <= steps / 4),
        "metrics": _mean(row for row in log if row["step"] > 3 * steps / 4),
        "curves": {name: _curve(log, name) for name in CURVES},
    }


def last_answers(folder: Path, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts and lengths [N, k] of the sampled held-out answers of an evaluation."""
    record = json.loads((folder / "evaluations" / f"{step:06d}.json").read_text())
    return np.array(record["sampled"], np.float64), np.array(record["sampled_length"])


def match_lengths(rows: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """The rows with `accuracy_within`: what is longer than the baseline's answers counts as wrong.

    The limit is the length within which 95% of the answers of the baseline with the same task and
    seed are, so an arm gains nothing by answering at greater length.
    """
    of = {(r["task"], r["seed"]): r for r in rows if r["arm"] == baseline and "longest" in r}
    out = []
    for row in rows:
        base = of.get((row["task"], row["seed"]))
        if base is not None and row["stage"] == base["stage"] and "right_lengths" in row:
            row = row | {"accuracy_within": _within(row["right_lengths"], base["longest"])}
        out.append(row)
    return out


def _right_lengths(verdicts: np.ndarray, length: np.ndarray) -> list[list[float]]:
    """[[length, share], ...]: of the accuracy, what comes from answers of each length."""
    parts = []
    for n in np.unique(length[verdicts == 1]).tolist():
        right = np.where(np.isnan(verdicts), np.nan, (verdicts == 1) & (length == n))
        parts.append([n, _round(float(np.nanmean(means(right))))])
    return parts


def _within(right_lengths: Sequence[Sequence[float]], limit: float) -> float:
    return _round(sum(share for n, share in right_lengths if n <= limit))


def _mean(rows) -> dict[str, float]:
    """Of each metric over the rows that have a number there."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                found.setdefault(name, []).append(value)
    return {name: _round(sum(values) / len(values)) for name, values in sorted(found.items())}


def _curve(log: Sequence[Mapping[str, float]], name: str) -> list[list[float]]:
    return [[row["step"], _round(row[name])] for row in log if name in row]


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
