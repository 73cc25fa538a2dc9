"""The credit that several methods give to the tokens of the same answers. Nothing is trained."""

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax
from ml_collections import ConfigDict

from jaxrl_sd import config as configuration
from jaxrl_sd import records, rollout, train, update
from jaxrl_sd.records import Record
from jaxrl_sd.sampler import Samples
from jaxrl_sd.start import Run, open_judge, prepare
from jaxrl_sd.types import Batch, InputError, Problem, Sample


class Answers(NamedTuple):
    """Groups of samples with their verdicts, on the host."""

    problems: Sequence[Problem]  # P
    prompt: tuple[np.ndarray, np.ndarray]  # i32[P, S] and lengths i32[P]
    samples: Samples
    groups: Sequence[Sequence[Sample]]


def of_methods(
    config: ConfigDict, methods: Sequence[str | Mapping[str, Any]], num_problems: int = 1
) -> dict[str, list[Record]]:
    """What each method makes of the first batch of a run, before its first update.

    `rollout.prompts` groups are sampled once, as the first step of training with this seed samples
    them. Every method then grades all of them, shows its teachers what it shows them, and gives
    credit, with the schedules of the first step; copied and averaged teachers are still the policy.
    Groups that a method would not keep get credit too. `output_dir` is not used.

    Args:
      config: everything but the method.
      methods: names of METHODS or PRESETS, or {"name": name, hyper-parameter: value, ...}.
      num_problems: how many groups to give; those with correct and wrong answers come first.

    Returns:
      {method: records of its groups, see records.py}, of the same answers in the same order. A
      method is called by its name, and by its hyper-parameters where some were given.

    Raises:
      InputError: a method or a setting is wrong, before anything is sampled; a problem lacks what
        a method shows its teachers.
    """
    if not 1 <= num_problems <= config.rollout.prompts:
        raise InputError(
            f"num_problems: expected 1 to {config.rollout.prompts} (rollout.prompts), "
            f"got {num_problems}"
        )
    if not methods:
        raise InputError("methods: expected at least one")
    answers, found = None, {}
    with tempfile.TemporaryDirectory() as folder:
        configs = _configs(config, methods, folder)
        for label, of_method in configs.items():
            answers, found[label] = _of_method(of_method, answers, num_problems)
    return found


def _configs(
    config: ConfigDict, methods: Sequence[str | Mapping[str, Any]], folder: str
) -> dict[str, ConfigDict]:
    """A configuration for each method, once all were found right."""
    configs = {}
    for method in methods:
        method = {"name": method} if isinstance(method, str) else dict(method)
        hyper = [f"{name}={value}" for name, value in method.items() if name != "name"]
        label = " ".join([str(method.get("name")), *hyper])
        if label in configs:
            raise InputError(f"methods: {label} is there twice")
        configs[label] = of_method = ConfigDict(config.to_dict())
        of_method.method, of_method.output_dir = ConfigDict(method), folder
        configuration.check(of_method)
    return configs


def _of_method(
    config: ConfigDict, answers: Answers | None, num_problems: int
) -> tuple[Answers, list[Record]]:
    """The answers, sampled now where there are none, and one method's records of them."""
    run, params, frozen = prepare(config)
    state = train.new_state(run, params, frozen, optax.identity())
    answers = answers or _sample(run, state)
    chosen = records.mixed_first(answers.groups)[:num_problems]
    return answers, _credit(run, state, answers, chosen)


def _sample(run: Run, state: update.State) -> Answers:
    problems = [run.problems[i] for i in range(run.config.rollout.prompts)]
    prompt, samples = train.sample(run, state, problems, position=0)
    with open_judge(run.config) as judge:
        groups = rollout.verify(problems, samples, run.tokenizer, run.sampling.stop_ids, judge)
    return Answers(problems, prompt, samples, groups)


def _credit(run: Run, state: update.State, answers: Answers, chosen: Sequence[int]) -> list[Record]:
    """The records of the chosen groups; credit may depend on the whole batch."""
    problems, prompt, samples, groups = answers
    rollouts, _ = rollout.grade(*prompt, samples, groups, run.method.grade)
    hints, _ = train.write_hints(run, problems, groups, step=0)
    batch, parts, _ = train.pack(run, Batch(rollouts, hints))
    batch = update.score(run.steps, state, batch, parts)
    batch, _ = run.steps.credit(batch, 0)
    gaps, probes = run.gaps(state, batch, parts), run.probes(state, batch, parts)
    return [
        record
        for p in chosen
        for record in records.of_group(run, batch, gaps, probes, p, problems[p], groups[p], step=1)
    ]
