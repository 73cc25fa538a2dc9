"""What a comparison found: runs.json, summary.md and a self-contained report.html."""

import json
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jinja2

from experiments.comparison import pictures, statistics
from experiments.comparison.plan import FINAL, SEARCH, Plan
from experiments.comparison.rows import PERCENTILE
from experiments.comparison.statistics import Difference, Mean
from jaxrl_sd.report import table

TEMPLATE = Path(__file__).parent / "report.html"
Rows = Sequence[dict[str, Any]]
FIGURES = ("length", "entropy", "rounds", "kl_to_start", "seconds_of_a_step")
PERCENT = ("accuracy", "greedy", "best", "accuracy_within", "truncated")


class Line(NamedTuple):
    """One arm on one task."""

    arm: str
    rate: float
    of: dict[str, Mean]  # over the seeds
    difference: Difference  # of `accuracy`, to the baseline
    p: float  # adjusted for all arms of the task
    within: Difference  # of `accuracy_within`
    cost: float  # time of a step, over the baseline's
    failed: int  # runs

    @property
    def significant(self) -> bool:
        return self.p < statistics.LEVEL


def write(folder: Path, plan: Plan, rows: Rows) -> str:
    """Writes the three files. Returns the summary, in Markdown."""
    text = ",\n".join(map(json.dumps, rows))  # a line for each
    (folder / "runs.json").write_text(f"[\n{text}\n]\n")
    found = {task: lines(plan, rows, task) for task in plan.tasks}
    parts = [markdown(plan, rows, task, found[task]) for task in plan.tasks]
    summary = "\n\n".join(parts) + "\n"
    (folder / "summary.md").write_text(summary)
    (folder / "report.html").write_text(page(plan, rows, found))
    return summary


def lines(plan: Plan, rows: Rows, task: str) -> list[Line]:
    """Every arm of a task, best first."""
    arms = {name: _runs(plan, rows, task, name) for name in plan.arms}
    base = arms[plan.baseline]

    def values(runs, name):
        return [run.get(name, math.nan) for run in runs]

    def difference(runs, name):
        return statistics.paired(values(runs, name), values(base, name))

    names = (*PERCENT, *FIGURES)
    of = {arm: {n: statistics.mean(values(runs, n)) for n in names} for arm, runs in arms.items()}
    differences = {arm: difference(runs, "accuracy") for arm, runs in arms.items()}
    others = [arm for arm in arms if arm != plan.baseline]
    adjusted = dict(zip(others, statistics.holm([differences[a].p for a in others]), strict=True))
    step = of[plan.baseline]["seconds_of_a_step"].value or math.nan  # of runs of one step
    found = [
        Line(
            arm,
            next((run["rate"] for run in runs if "rate" in run), math.nan),
            of[arm],
            differences[arm],
            adjusted.get(arm, math.nan),
            difference(runs, "accuracy_within"),
            of[arm]["seconds_of_a_step"].value / step,
            sum("error" in run for run in runs),
        )
        for arm, runs in arms.items()
    ]
    return sorted(found, key=lambda line: -_or(line.of["accuracy"].value, -1.0))


def _runs(plan: Plan, rows: Rows, task: str, arm: str) -> list[dict[str, Any]]:
    """The final run of each seed, {} where there is none; with entropy and rounds at the end."""
    of = {
        row["seed"]: row
        for row in rows
        if (row["task"], row["stage"], row["arm"]) == (task, FINAL, arm)
    }
    runs = [of.get(seed, {}) for seed in plan.seeds]
    return [
        run | {name: run["metrics"][f"rollout/{name}"] for name in ("entropy", "rounds")}
        if "metrics" in run
        else run
        for run in runs
    ]


class Control(NamedTuple):
    """An arm that another one belongs to, and what the arm has above its control."""

    arm: str
    control: str
    of_arm: Mean  # accuracy
    of_control: Mean
    difference: Difference


def controls(plan: Plan, rows: Rows, task: str) -> list[Control]:
    """Every arm that has another one's learning rate, beside that one."""
    found = []
    for name, arm in plan.arms.items():
        if arm.rate_of:
            of = [
                [run.get("accuracy", math.nan) for run in _runs(plan, rows, task, one)]
                for one in (arm.rate_of, name)
            ]
            means = map(statistics.mean, of)
            found.append(Control(arm.rate_of, name, *means, statistics.paired(*of)))
    return found


# ---- Markdown

HEAD_OF_CONTROLS = ("method", "control", "method, %", "control, %", "difference")
HEAD = (
    "method",
    "rate",
    "accuracy, %",
    "difference",
    "p (Holm)",
    "greedy, %",
    "best, %",
    "length-matched difference",
    "tokens",
    "truncated, %",
    "entropy",
    "KL to start",
    "step time, ratio",
    "batches a step",
)


def markdown(plan: Plan, rows: Rows, task: str, found: Sequence[Line]) -> str:
    """The tables of a task, and what they do not show."""
    parts = [
        f"## {task}: {len(plan.seeds)} seeds, differences to {plan.baseline} in points",
        table(HEAD, (cells(plan, line) for line in found)),
        *conclusions(plan, found),
    ]
    if beside := controls(plan, rows, task):
        parts += ["Methods and their controls:", table(HEAD_OF_CONTROLS, map(_control, beside))]
    return "\n\n".join(parts)


def _control(found: Control) -> list[str]:
    return [
        found.arm,
        found.control,
        interval(found.of_arm),
        interval(found.of_control),
        interval(found.difference, "+"),
    ]


def cells(plan: Plan, line: Line) -> list[str]:
    """One arm, as in `HEAD`; the baseline's differences are left out."""
    of, base = line.of, line.arm == plan.baseline
    return [
        line.arm,
        "-" if math.isnan(line.rate) else f"{line.rate:g}",
        interval(of["accuracy"]),
        "" if base else interval(line.difference, sign="+"),
        "" if base else probability(line.p),
        number(100 * of["greedy"].value),
        number(100 * of["best"].value),
        "" if base else interval(line.within, sign="+"),
        number(of["length"].value),
        number(100 * of["truncated"].value),
        number(of["entropy"].value, 2),
        number(of["kl_to_start"].value, 2),
        number(line.cost, 2),
        number(of["rounds"].value),
    ]


def conclusions(plan: Plan, found: Sequence[Line]) -> list[str]:
    """What differs from the baseline, what was not shown to, and what did not run."""
    others = [x for x in found if x.arm != plan.baseline and not math.isnan(x.p)]
    better = [x.arm for x in others if x.significant and x.difference.value > 0]
    worse = [x.arm for x in others if x.significant and x.difference.value < 0]
    rest = [x.arm for x in others if not x.significant]
    failed = [x.arm for x in found if x.failed]
    level = f"{statistics.LEVEL:.0%}"
    # Up to the rounding of the shares of which `within` is a sum.
    same = others and all(abs(x.within.value - x.difference.value) < 1e-5 for x in others)
    out = [
        f"Better than {plan.baseline} at the level of {level}, after Holm's correction for "
        f"{len(others)} arms: {_names(better)}. Worse: {_names(worse)}.",
        f"Not significant (this comparison does not show that they differ): {_names(rest)}.",
    ]
    if same:
        out.append(
            f"No right answer is longer than {PERCENTILE}% of {plan.baseline}'s, so that the "
            f"length-matched differences are the differences."
        )
    return out + ([f"Did not finish on every seed: {_names(failed)}."] if failed else [])


def _names(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def interval(x: Mean | Difference, sign: str = "") -> str:
    """A share and its interval in percent or points."""
    if math.isnan(x.value):
        return "-"
    if math.isnan(x.low):  # of one seed
        return f"{100 * x.value:{sign}.1f}"
    return f"{100 * x.value:{sign}.1f} [{100 * x.low:{sign}.1f}, {100 * x.high:{sign}.1f}]"


def probability(p: float) -> str:
    """To two digits, and no smaller than a t-test with few seeds can be trusted."""
    return "-" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.2g}"


def number(x: float, digits: int = 1) -> str:
    return "-" if math.isnan(x) else f"{x:.{digits}f}"


def _or(x: float, other: float) -> float:
    return other if math.isnan(x) else x


# ---- HTML


def page(plan: Plan, rows: Rows, found: dict[str, list[Line]]) -> str:
    """One file that needs no other."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    sections = [
        {
            "task": task,
            "steps": plan.tasks[task].steps,
            "rollouts": plan.tasks[task].rollout.prompts * plan.tasks[task].rollout.group_size,
            "problems": plan.tasks[task].data.num_test,
            "samples": plan.tasks[task].evaluation.samples,
            "conclusions": [text.replace("`", "") for text in conclusions(plan, of_task)],
            "forest": pictures.forest(plan.baseline, of_task),
            "curves": pictures.curves(plan, rows, task, [line.arm for line in of_task]),
            "search": pictures.search(rows, task, [line.arm for line in of_task]),
            "lines": [(line, cells(plan, line)) for line in of_task],
            "controls": list(map(_control, controls(plan, rows, task))),
        }
        for task, of_task in found.items()
    ]
    return environment.from_string(TEMPLATE.read_text()).render(
        plan=plan,
        head=HEAD,
        head_of_controls=HEAD_OF_CONTROLS,
        sections=sections,
        num_final=sum(row["stage"] == FINAL for row in rows),
        num_search=sum(row["stage"] == SEARCH for row in rows),
        failures=[row for row in rows if "error" in row],
        machine=f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"JAX {jax.__version__}",
    )
