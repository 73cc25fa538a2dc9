"""What is compared: arms (methods with settings) on tasks, with seeds, as a list of runs.

A run's folder says what it is: <task>/<stage>/<arm>/<learning rate>-<seed>. Stages follow each
other:

* `before`: runs whose models others need, as teachers of another kind;
* `search`: every arm with every learning rate, on seeds of its own;
* `final`: every arm with the rate that it did best with, on every seed.

All runs of a task see the same problems in the same order for a seed, have the same budget of
steps and rollouts, and are evaluated on the same held-out problems.
"""

import itertools
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxrl_sd import config as configuration
from jaxrl_sd.types import InputError, first_line

Settings = Mapping[str, Any]  # by field, as in {"method.name": "rlsd"}
BEFORE, SEARCH, FINAL = "before", "search", "final"
RATE = "optimizer.learning_rate"


class Arm(NamedTuple):
    """One line of the comparison.

    In a text among `settings`, `{name}` is the model of the run `name` made before. `rate_of` names
    another arm whose learning rate is used, so that a control differs in its settings alone.
    """

    settings: Settings
    rate_of: str = ""


class Plan(NamedTuple):
    """What experiments/plans/*.py give."""

    tasks: Mapping[str, ConfigDict]
    arms: Mapping[str, Arm]
    seeds: tuple[int, ...]
    baseline: str = "grpo"
    before: Mapping[str, Settings] = {}  # runs that are made first
    rates: tuple[float, ...] = ()  # that every arm tries; none: each task's own
    search_seeds: tuple[int, ...] = ()


class Job(NamedTuple):
    """One training run."""

    task: str
    stage: str
    arm: str
    rate: float
    seed: int
    config: ConfigDict

    def folder(self) -> Path:
        """Where the run is."""
        return Path(self.config.output_dir)


def load(path: str) -> Plan:
    """What `get_plan()` of a Python file gives.

    Raises:
      InputError: there is no such file or function, or it fails.
    """
    try:
        return runpy.run_path(path)["get_plan"]()
    except Exception as error:  # a program
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"--plan: {path} gives no plan: {reason}") from error


def before(plan: Plan, root: Path) -> list[Job]:
    """The runs whose models others need. They have a seed that no other run has."""
    seed = 1 + max((*plan.seeds, *plan.search_seeds))
    return [
        _job(plan, root, task, BEFORE, name, of_task.optimizer.learning_rate, seed)
        for (task, of_task), name in itertools.product(plan.tasks.items(), plan.before)
    ]


def search(plan: Plan, root: Path) -> list[Job]:
    """Every rate of every arm that has its own."""
    arms = [name for name, arm in plan.arms.items() if not arm.rate_of]
    every = itertools.product(plan.tasks, arms, plan.rates, plan.search_seeds)
    return [_job(plan, root, task, SEARCH, *of_run) for task, *of_run in every]


def final(plan: Plan, root: Path, rates: Mapping[tuple[str, str], float]) -> list[Job]:
    """Every seed of every arm. A seed's runs follow each other, so that arms grow alike.

    Args:
      rates: by task and arm; those of arms with a `rate_of` are looked up there.
    """

    def rate(task: str, arm: str) -> float:
        if not plan.rates:
            return plan.tasks[task].optimizer.learning_rate
        return rates[task, plan.arms[arm].rate_of or arm]

    every = itertools.product(plan.seeds, plan.tasks, plan.arms)
    return [_job(plan, root, task, FINAL, arm, rate(task, arm), seed) for seed, task, arm in every]


def check(plan: Plan, root: Path) -> None:
    """Every run's configuration is right, before the first one starts.

    Raises:
      InputError: naming the part of the plan, or the run.
    """
    if plan.baseline not in plan.arms:
        raise InputError(f"baseline: expected one of {list(plan.arms)}, got {plan.baseline!r}")
    if shared := set(plan.seeds) & set(plan.search_seeds):
        raise InputError(f"search_seeds: {sorted(shared)[0]} is one of seeds, too")
    if bool(plan.rates) != bool(plan.search_seeds):
        raise InputError("rates: a search needs both rates and search_seeds")
    for name, arm in plan.arms.items():
        if arm.rate_of and (arm.rate_of not in plan.arms or plan.arms[arm.rate_of].rate_of):
            raise InputError(
                f"arms: rate_of of {name}: {arm.rate_of!r} is no arm with its own rate"
            )
    one_rate = {(task, arm): 1e-4 for task in plan.tasks for arm in plan.arms}
    for run in (*before(plan, root), *search(plan, root), *final(plan, root, one_rate)):
        c = run.config
        c.output_dir = str(root)  # the check makes it, and rates of final runs are not known yet
        try:
            configuration.check(c)
        except InputError as error:
            raise InputError(f"{run.task}, {run.arm}: {error}") from error
        if plan.rates and not 0 < c.steps * c.rollout.prompts <= c.data.num_train:
            raise InputError(
                f"data.num_train: {run.task}: the search judges a rate by rollouts, which should "
                f"be on problems not seen before: expected at least "
                f"{c.steps * c.rollout.prompts}, got {c.data.num_train}"
            )


def _job(plan: Plan, root: Path, task: str, stage: str, arm: str, rate: float, seed: int) -> Job:
    settings = plan.before[arm] if stage == BEFORE else plan.arms[arm].settings
    folder = root / task / stage / arm / f"{rate:g}-{seed}"
    of_run = {"output_dir": folder, RATE: rate, "seed": seed}
    if stage == SEARCH:  # which is judged by its rollouts
        of_run["evaluation.every"] = plan.tasks[task].steps
    models = (
        {} if stage == BEFORE else {j.arm: j.folder() for j in before(plan, root) if j.task == task}
    )
    c = ConfigDict(plan.tasks[task].to_dict())
    for field, value in {**of_run, **settings}.items():
        text = str(value)
        for name, made in models.items():
            text = text.replace(f"{{{name}}}", str(made / "model"))
        configuration.override(c, field, text)
    return Job(task, stage, arm, rate, seed, c)
