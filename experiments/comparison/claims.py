"""The papers' claims that a comparison can test, and what it found.

A claim says of a number that it is above 0, below 0, or within a margin around 0. It *holds* if the
95% interval of the number over the seeds lies there, *does not hold* if it lies outside, and is
*undecided at this scale* otherwise. Not every claim here is the papers' headline: most ask for the
mechanism, since accuracies of a 0.2 M parameter model say nothing about those of an 8B one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.comparison import statistics
from experiments.comparison.plan import FINAL
from experiments.comparison.statistics import Difference, Mean
from jaxrl_sd.report import table

Row = Mapping[str, Any]
Number = Callable[["Runs"], Mean]
HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided at this scale"
NOT_MEASURED = "not measured"


class Claim(NamedTuple):
    """One line of the table."""

    paper: str
    text: str
    task: str
    measured: str  # what the number is, with its unit
    number: Number
    expected: str = "above"  # 0; or "below", or "within" the margin
    margin: float = 0.0
    unit: str = ""  # "points" multiplies by 100


class Runs(NamedTuple):
    """The final runs of a task."""

    rows: Sequence[Row]

    def values(self, arm: str, name: str) -> dict[int, float]:
        """By seed, of the runs that have it. `name` is a path such as metrics.rollout/entropy."""
        of_arm = {row["seed"]: _at(row, name.split(".")) for row in self.rows if row["arm"] == arm}
        return {seed: value for seed, value in of_arm.items() if math.isfinite(value)}


def _at(row: Row, path: Sequence[str]) -> float:
    for key in path:
        row = row.get(key, {})
    return float(row) if row != {} else math.nan


def _with_third(row: Row) -> Row:
    """With `third`, the held-out accuracy after a third of the steps."""
    curve = row.get("curves", {}).get("eval/accuracy", [])
    return row | {"third": curve[len(curve) // 3][1]} if curve else row


def level(arm: str, name: str) -> Number:
    """The mean over the seeds."""
    return lambda runs: statistics.mean(list(runs.values(arm, name).values()))


def change(arm: str, name: str, since: str) -> Number:
    """By how much one number of a run is above another one."""
    return between((arm, name), (arm, since))


def against(arm: str, other: str, name: str) -> Number:
    """The difference of two arms, paired over seeds."""
    return between((arm, name), (other, name))


def between(a: tuple[str, str], b: tuple[str, str]) -> Number:
    """The paired difference of two numbers, each of an arm."""

    def number(runs: Runs) -> Difference:
        of_a, of_b = runs.values(*a), runs.values(*b)
        seeds = sorted(of_a.keys() & of_b.keys())
        return statistics.paired([of_a[s] for s in seeds], [of_b[s] for s in seeds])

    return number


def verdict(claim: Claim, found: Mean) -> str:
    """What an interval says about a claim."""
    if math.isnan(found.value):
        return NOT_MEASURED
    low, high, margin = found.low, found.high, claim.margin
    if claim.expected == "below":
        low, high = -high, -low
    if claim.expected == "within":
        holds, fails = -margin < low and high < margin, low > margin or high < -margin
    else:
        holds, fails = low > 0, high < 0
    return HOLDS if holds else FAILS if fails else UNDECIDED


INTRODUCTION = """# What the papers claim, and what was found

A claim *holds* if the 95% interval of its number over the seeds lies on the claimed side of 0 (or
within the margin), *does not hold* if it lies on the other side, and is *undecided at this scale*
otherwise. Each interval is for itself: with so many claims, one or two verdicts can be wrong by
chance. Differences are paired over seeds; steps, arms and learning rates are in the plans.

Rows of the task countdown come from the first of these commands, those of chains and chains_answer
from the second; the third writes this page.

```bash
python -m experiments.compare --plan=experiments/plans/countdown.py --workers=2 \\
    --output_dir=runs/compare
python -m experiments.compare --plan=experiments/plans/chains.py --workers=2 \\
    --output_dir=runs/chains
python -m experiments.claims --runs=runs/compare/runs.json,runs/chains/runs.json \\
    --output_dir=runs/claims
```

"""


def page(rows: Sequence[Row], claims: Sequence[Claim]) -> str:
    """The table of claims, with what it means and how to make it."""
    return INTRODUCTION + markdown(rows, claims)


def markdown(rows: Sequence[Row], claims: Sequence[Claim]) -> str:
    """The table of claims, a line each."""
    final = [_with_third(row) for row in rows if row["stage"] == FINAL]
    lines = []
    for number, claim in enumerate(claims, start=1):
        found = claim.number(Runs([row for row in final if row["task"] == claim.task]))
        cells = number, claim.paper, claim.text, claim.measured, _result(claim, found)
        lines.append((*cells, claim.task, found.n, f"**{verdict(claim, found)}**"))
    head = ("", "paper", "claim", "measured", "result [95%]", "task", "seeds", "verdict")
    return table(head, lines) + "\n"


def _result(claim: Claim, found: Mean) -> str:
    if math.isnan(found.value):
        return "-"
    scale = 100 if claim.unit == "points" else 1
    value, low, high = (scale * x for x in (found.value, found.low, found.high))
    if math.isnan(low):  # of one seed
        return f"{value:+.3g} {claim.unit}".strip()
    digits = 1 if max(abs(low), abs(high)) >= 10 or scale == 100 else 3
    return f"{value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] {claim.unit}".strip()


ACCURACY, EARLY = "accuracy", "early.rollout/accuracy"
ENTROPY, LENGTH = "metrics.rollout/entropy", "length"
FINAL_POINTS = "final held-out accuracy"


def _gain(paper: str, arm: str, task: str = "countdown") -> Claim:
    text = f"{arm} ends more accurate than GRPO"
    return Claim(paper, text, task, FINAL_POINTS, against(arm, "grpo", ACCURACY), unit="points")


def _hint(paper: str, arm: str, task: str = "countdown") -> Claim:
    number = against(arm, f"{arm}, exchanged hints", ACCURACY)
    text = f"what {arm} gains needs the hint to belong to the problem"
    return Claim(
        paper, text, task, f"{FINAL_POINTS}, own less exchanged hints", number, unit="points"
    )


def _gap(name: str) -> str:
    return f"early.teacher/teacher/{name}"


CLAIMS = (
    _gain("RLSD", "rlsd"),
    Claim(
        "RLSD",
        "rlsd is ahead of GRPO early",
        "countdown",
        "accuracy of the first quarter's rollouts",
        against("rlsd", "grpo", EARLY),
        unit="points",
    ),
    Claim(
        "RLSD",
        "rlsd keeps more entropy than GRPO",
        "countdown",
        "entropy of the last quarter's rollouts",
        against("rlsd", "grpo", ENTROPY),
        unit="nats a token",
    ),
    Claim(
        "RLSD",
        "the evidence weights are what helps: rlsd ends above itself with lambda 0",
        "countdown",
        FINAL_POINTS,
        against("rlsd", "rlsd, lambda 0", ACCURACY),
        unit="points",
    ),
    Claim(
        "RLSD",
        "rlsd is ahead early of itself with lambda 0 (GRPO without its penalty)",
        "countdown",
        "accuracy of the first quarter's rollouts",
        against("rlsd", "rlsd, lambda 0", EARLY),
        unit="points",
    ),
    Claim(
        "RLSD",
        "rlsd keeps more entropy than itself with lambda 0",
        "countdown",
        "entropy of the last quarter's rollouts",
        against("rlsd", "rlsd, lambda 0", ENTROPY),
        unit="nats a token",
    ),
    _hint("RLSD", "rlsd"),
    Claim(
        "RLSD",
        "rlsd leaks no more of the shown solution into its answers than GRPO",
        "countdown",
        "share of the solution's 3-grams in the last quarter's correct answers",
        against("rlsd", "grpo", "metrics.leakage/of_correct"),
        expected="within",
        margin=0.02,
        unit="points",
    ),
    Claim(
        "RLSD",
        "opsd leaks the shown solution into its answers",
        "countdown",
        "the same share, opsd less GRPO",
        against("opsd", "grpo", "metrics.leakage/of_correct"),
        unit="points",
    ),
    Claim(
        "RLSD",
        "opsd rises early",
        "countdown",
        "held-out accuracy after a third of the steps, less that before training",
        change("opsd", "third", "accuracy_before"),
        unit="points",
    ),
    Claim(
        "RLSD",
        "opsd degrades late",
        "countdown",
        "final held-out accuracy, less that after a third of the steps",
        change("opsd", ACCURACY, "third"),
        expected="below",
        unit="points",
    ),
    _gain("SDPG", "sdpg"),
    _hint("SDPG", "sdpg"),
    Claim(
        "SDPG",
        "the distillation helps: sdpg ends above itself with beta 0",
        "countdown",
        FINAL_POINTS,
        against("sdpg", "sdpg, beta 0", ACCURACY),
        unit="points",
    ),
    Claim(
        "SDPG",
        "sdpg keeps more entropy than GRPO",
        "countdown",
        "entropy of the last quarter's rollouts",
        against("sdpg", "grpo", ENTROPY),
        unit="nats a token",
    ),
    Claim(
        "SDPG",
        "the gate helps: sdpg ends above itself without it",
        "countdown",
        FINAL_POINTS,
        against("sdpg", "sdpg, no gate", ACCURACY),
        unit="points",
    ),
    Claim(
        "SDPG",
        "the anchor bounds the entropy: less than without it",
        "countdown",
        "entropy of the last quarter's rollouts",
        against("sdpg", "sdpg, no anchor", ENTROPY),
        expected="below",
        unit="nats a token",
    ),
    _gain("CAST", "cast"),
    Claim(
        "CAST",
        "cast gives credit in groups that are all correct or all wrong",
        "countdown",
        "share of the credit of the first quarter's steps in such groups",
        level("cast", "early.credit/uniform"),
        unit="points",
    ),
    Claim(
        "CAST",
        "cast makes answers longer",
        "countdown",
        "tokens of a held-out answer, cast less GRPO",
        against("cast", "grpo", LENGTH),
        unit="tokens",
    ),
    Claim(
        "CAST",
        "the sign reversal is what helps: cast ends above itself without flips",
        "countdown",
        FINAL_POINTS,
        against("cast", "cast, no flips", ACCURACY),
        unit="points",
    ),
    _gain("SC-GRPO", "sc_grpo"),
    _hint("SC-GRPO", "sc_grpo"),
    Claim(
        "SC-GRPO",
        "sc_grpo keeps more entropy than DAPO",
        "countdown",
        "entropy of the last quarter's rollouts",
        against("sc_grpo", "dapo", ENTROPY),
        unit="nats a token",
    ),
    Claim(
        "SC-GRPO",
        "the 75th percentile is a better scale than the median",
        "countdown",
        FINAL_POINTS,
        against("sc_grpo", "sc_grpo, median", ACCURACY),
        unit="points",
    ),
    Claim(
        "SC-GRPO",
        "credit for diversity in groups that nobody solved helps",
        "countdown",
        FINAL_POINTS,
        against("sc_grpo", "sc_grpo, no diversity", ACCURACY),
        unit="points",
    ),
    _gain("HSD", "hsd"),
    Claim(
        "HSD",
        "hsd ends more accurate than opsd",
        "countdown",
        FINAL_POINTS,
        against("hsd", "opsd", ACCURACY),
        unit="points",
    ),
    Claim(
        "HSD",
        "the gap of a wrong answer is largest where it leaves a correct one: at that token against "
        "before it",
        "countdown",
        "mean |gap| at the first step",
        change("hsd", _gap("gap_at_divergence"), _gap("gap_before")),
        unit="nats",
    ),
    Claim(
        "HSD",
        "the same against after it",
        "countdown",
        "mean |gap| at the first step",
        change("hsd", _gap("gap_at_divergence"), _gap("gap_after")),
        unit="nats",
    ),
    Claim(
        "HSD",
        "a teacher that sees the answer alone is silent where a wrong answer leaves a correct one "
        "(rlsd's)",
        "chains_answer",
        "mean |gap| at the divergence, first step",
        level("rlsd", _gap("gap_at_divergence")),
        expected="within",
        margin=0.25,
        unit="nats",
    ),
    Claim(
        "HSD",
        "a teacher that sees a correct sibling, too, is not (hsd's)",
        "chains_answer",
        "mean |gap| at the divergence, hsd's teacher less rlsd's",
        against("hsd", "rlsd", _gap("gap_at_divergence")),
        unit="nats",
    ),
    _gain("RLSD", "rlsd", "chains"),
    _gain("RLSD", "rlsd", "chains_answer"),
    _gain("HSD", "hsd", "chains"),
    _gain("HSD", "hsd", "chains_answer"),
)
