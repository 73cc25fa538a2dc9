"""Results of an evaluation, from the answers in its folder: `results.json` and `results.md`."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_sd import answers, evaluate, files
from jaxrl_sd.answers import Record
from jaxrl_sd.checkpoint import flat
from jaxrl_sd.metrics import strict
from jaxrl_sd.report import percent, table
from jaxrl_sd.verify import FINAL_ANSWERS


def write(folder: Path) -> dict[str, Any]:
    """Writes the results of the answers in `folder` and returns them; samples nothing.

    Raises:
      InputError: there are no answers, or they are damaged.
    """
    results = summarize(*answers.read(folder))
    text = json.dumps(strict(results), indent=2, allow_nan=False)
    files.replace_text(folder / "results.json", text + "\n")
    files.replace_text(folder / "results.md", markdown(results))
    return results


def summarize(settings: dict[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """Settings, estimates by name, counts, and one row a problem.

    An estimate is a dict of the fields of `evaluate.Estimate`. That of maj@k is None where answers
    are judged by something else than comparing final answers, so that nothing can be voted on.
    """
    correct, truncated = answers.verdicts(records), _values(records, "truncated")
    k = correct.shape[1]
    final = [[sample["final_answer"] for sample in record["samples"]] for record in records]
    by_verifier = not settings["reward"]["functions"]
    can_vote = by_verifier and all(record["verifier"] in FINAL_ANSWERS for record in records)
    estimates = {
        f"avg@{k}": evaluate.avg_at_k(correct),
        **{f"pass@{n}": evaluate.pass_at_k(correct, n) for n in _draws(k)},
        f"maj@{k}": evaluate.maj_at_k(correct, final) if can_vote else None,
        f"avg@{k} of finished answers": evaluate.average(np.where(truncated, np.nan, correct)),
        "truncated": evaluate.average(truncated),
        "length": evaluate.average(_values(records, "length")),
        **_rewards(records),
    }
    status = Counter(sample["status"] for record in records for sample in record["samples"])
    counts = {
        "answers": correct.size,
        "ungraded": int(np.isnan(correct).sum()),
        "verifier timeouts": status["timeout"],
        "verifier errors": status["error"],
    }
    if can_vote:
        counts["without a final answer"] = sum(text is None for row in final for text in row)
    return {
        "settings": settings,
        "num_problems": len(records),
        "estimates": {name: e and e._asdict() for name, e in estimates.items()},
        "counts": counts,
        "problems": [_problem(record, can_vote) for record in records],
    }


def _values(records: Sequence[Record], field: str) -> np.ndarray:
    """f64[N, k], one field of every sample."""
    return np.array([[s[field] for s in r["samples"]] for r in records], np.float64)


def _rewards(records: Sequence[Record]) -> dict[str, evaluate.Estimate]:
    """Means of the score and of each reward function; none where verifiers judge."""
    names = records[0]["samples"][0]["rewards"]
    given = {name: [[s["rewards"][name] for s in r["samples"]] for r in records] for name in names}
    estimates = {f"reward/{name}": evaluate.average(values) for name, values in given.items()}
    return {"score": evaluate.average(_values(records, "score")), **estimates} if names else {}


def _draws(k: int) -> list[int]:
    """2, 4, 8, ... below k, and k; pass@1 is avg@k."""
    return [n for n in range(2, k + 1) if n == k or n.bit_count() == 1]


def _problem(record: Record, can_vote: bool) -> dict[str, Any]:
    correct, samples = answers.verdicts([record])[0], record["samples"]
    final = [sample["final_answer"] for sample in samples]
    return {
        "id": record["id"],
        "correct": int(np.nansum(correct)),
        "graded": int((~np.isnan(correct)).sum()),
        "majority": evaluate.vote(correct, final) if can_vote else None,
        "truncated": sum(sample["truncated"] for sample in samples),
        "length": float(np.mean([sample["length"] for sample in samples])),
    }


# ---- results.md


def markdown(results: dict[str, Any]) -> str:
    """The text of `results.md`. `results` as `summarize` gives them."""
    settings = flat(results["settings"])
    by_functions = "score" in results["estimates"]
    parts = [
        f"# {settings.get('data.test') or settings['data.train']}",
        f"{results['num_problems']} problems, {settings['samples']} answers each, "
        f"by {settings['model.path']}. Intervals are 95%, by bootstrap over problems. Answers that "
        "could not be graded count neither as correct nor as wrong."
        + (f" Correct: a score above {settings['reward.correct_above']}." if by_functions else ""),
        table_of_estimates(results),
        table(("count", ""), results["counts"].items()),
        "## Settings",
        table(("setting", "value"), ((name, json.dumps(x)) for name, x in settings.items())),
        "## Problems",
        table(
            ("problem", "correct", "majority vote", "truncated", "mean length in tokens"),
            map(_problem_row, results["problems"]),
        ),
    ]
    return "\n\n".join(parts) + "\n"


def table_of_estimates(results: dict[str, Any]) -> str:
    """The Markdown table of all estimates with their intervals."""
    rows = [_row(name, estimate) for name, estimate in results["estimates"].items()]
    return table(("", "mean over problems", "problems"), rows)


def _row(name: str, estimate: dict[str, float] | None) -> tuple[str, str, int | str]:
    if estimate is None:
        return name, "not defined: no final answers are compared", "-"
    if name == "length":
        return "length in tokens", _number(estimate, ".1f"), estimate["num_problems"]
    is_reward = name == "score" or name.startswith("reward/")
    text = _number(estimate, ".4g") if is_reward else percent(estimate)
    return name, text, estimate["num_problems"]


def _number(estimate: dict[str, float], form: str) -> str:
    if math.isnan(estimate["value"]):
        return "not measured"
    value, low, high = (format(estimate[key], form) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _problem_row(problem: dict[str, Any]) -> tuple:
    majority = problem["majority"]
    if majority is None or math.isnan(majority):
        vote = "-"
    else:
        vote = {0.0: "wrong", 1.0: "correct"}.get(majority, f"tie, {majority:.2f}")
    return (
        problem["id"],
        f"{problem['correct']}/{problem['graded']}",
        vote,
        problem["truncated"],
        f"{problem['length']:.1f}",
    )
