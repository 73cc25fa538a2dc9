"""The training loop, top to bottom.

    problems -> samples -> verdicts -> grades -> hints -> scores -> credit -> update -> refresh

`train(config)` is the whole program: experiments/train.py only parses flags for it. Everything is a
function of the configuration and the step number, so a run that was killed continues exactly.
"""

import itertools
import json
import platform
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxrl_sd import (
    adapters,
    checkpoint,
    contexts,
    diagnostics,
    evaluate,
    hosts,
    leakage,
    packing,
    records,
    report,
    rollout,
    sampler,
    sharding,
    update,
    weights,
)
from jaxrl_sd import config as configuration
from jaxrl_sd.metrics import Writer, strict
from jaxrl_sd.metrics import read as read_metrics
from jaxrl_sd.model import Compute, merge
from jaxrl_sd.rollout import Judge
from jaxrl_sd.start import Run, batch_size, open_judge, prepare
from jaxrl_sd.types import Batch, InputError, Params, Problem, Rollouts, Sample
from jaxrl_sd.update import Parts, State, init_state
from jaxrl_sd.vocabulary import STUDENT

SHOWN = ("rollout/accuracy", "eval/accuracy", "rollout/entropy")
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds = defaultdict(float)
        self._counted: dict[str, float] = {}

    def add(self, seconds: Mapping[str, float]) -> None:
        """Counts what an earlier process of the same run has spent."""
        for phase, spent in seconds.items():
            self.seconds[phase] += spent

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def lap(self) -> dict[str, float]:
        """Metrics: seconds by phase since the last call."""
        spent = {
            f"time/{phase}": seconds - self._counted.get(phase, 0.0)
            for phase, seconds in self.seconds.items()
            if seconds > self._counted.get(phase, 0.0)
        }
        self._counted = dict(self.seconds)
        return spent


def train(config: ConfigDict) -> dict[str, Any]:
    """Trains, evaluates, saves and reports. A run found in `config.output_dir` is continued.

    The folder then holds metrics.jsonl, tensorboard/, rollouts/ (with the credit of every token),
    evaluations/, checkpoints/, model/ (Hugging Face format) and, where one was trained, adapter/
    (PEFT's format), report.md with its pictures, and summary.json, whose content is returned.

    Raises:
      InputError: anything wrong in the configuration, the model, the data or the folder, before
        the first sample is drawn; later, what only samples show: groups that a method keeps none
        of, a reward that is no number, a prompt without room for a hint. Finished steps are saved.
    """
    clock = Clock()
    with clock("start"):
        run, params, frozen = prepare(config)
        checkpoints = checkpoint.manager(run.folder / "checkpoints", config.checkpoint.keep)
        state, position, seconds = start_or_resume(run, params, frozen, checkpoints)
        del params, frozen  # else one device would hold it all through the run
    clock.add(seconds)
    first = int(state.step)
    hosts.from_first(lambda: forget_after(run.folder, first))
    with (
        checkpoints,
        open_judge(config) as judge,
        open_writer(run, first) as writer,
    ):
        unread = []  # at most one row, and its step: the numbers are still on the devices

        def write_unread() -> None:
            while unread:
                step, row = unread.pop()
                if writer is not None:
                    writer.write(step, row)

        def assess(step: int) -> None:
            write_unread()
            with clock("evaluate"):
                row = measure(run, state, judge, step)
            unread.append((step, row | clock.lap()))

        def save(step: int) -> None:
            write_unread()
            if checkpoints.latest_step() != step:
                with clock("save"):
                    checkpoint.save(checkpoints, state, position, settings(config), clock.seconds)

        clock.lap()
        if first == 0:
            assess(0)
        for step in range(first, config.steps):
            try:
                collected = collect(run, state, judge, position, clock)
                problems, groups = collected.problems, collected.groups
                with clock("context"):
                    hints, hint_metrics = write_hints(run, problems, groups, step)
            except InputError:
                save(step)  # a run with other limits goes on from here
                raise
            with clock("context"):
                batch, parts, pack_metrics = pack(run, Batch(collected.rollouts, hints))
            with clock("score"):
                batch = update.score(run.steps, state, batch, parts)
                batch, credit_metrics = jax.block_until_ready(run.steps.credit(batch, step))
            row = collected.metrics | hint_metrics | pack_metrics
            if step == 0 or is_due(config, step + 1):
                with clock("log"):
                    gaps = run.gaps(state, batch, parts)
                    probes = run.probes(state, batch, parts)
                    records.log_group(run, batch, gaps, probes, problems, groups, step + 1)
                    row |= diagnostics.describe_gaps(batch, gaps, run.sampling.stop_ids)
                    row |= diagnostics.distances(run.method.teachers, state)
            with clock("update"):
                state, update_metrics = update.update(
                    run.steps, state, batch, parts, config.optimizer.epochs
                )
                write_unread()  # the step before's, while the devices work
                row |= leakage.describe(problems, groups, run.templates)
                jax.block_until_ready(state)
            position = collected.position
            row |= diagnostics.describe(batch)
            row |= {f"credit/{name}": x for name, x in credit_metrics.items()}
            row |= {f"update/{name}": x for name, x in update_metrics.items()}
            unread.append((step + 1, row | clock.lap()))
            if is_due(config, step + 1):
                assess(step + 1)
            if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.steps:
                save(step + 1)
        # A run that stopped, and was then told to end where it stopped, has only this left to do.
        if not hosts.from_first(evaluation_file(run.folder, config.steps).exists):
            assess(config.steps)
            write_unread()
        with clock("save"):
            checkpoints.wait_until_finished()
            export(run, state)
    return hosts.from_first(lambda: finish(run, clock))


def finish(run: Run, clock: Clock) -> dict[str, Any]:
    """Writes the report and returns the summary."""
    summary = summarize(run, clock)
    report.write(run.folder, summary, records.read_rollouts(run.folder))
    return summary


def open_writer(run: Run, first: int) -> AbstractContextManager[Writer | None]:
    """The record of a run that goes on after step `first`; None on all processes but one."""
    if not hosts.is_first():
        return nullcontext()
    return Writer(run.folder, run.config.steps, first + 1 if first else 0, SHOWN)


def forget_after(folder: Path, step: int) -> None:
    """Removes what an aborted run wrote about steps that no checkpoint holds."""
    for path in [*folder.glob("rollouts/*.jsonl"), *folder.glob("evaluations/*.json")]:
        if path.stem.isdecimal() and int(path.stem) > step:
            path.unlink()


def is_due(config: ConfigDict, finished: int) -> bool:
    """Whether to evaluate and to write down a group after so many steps."""
    return finished % config.evaluation.every == 0 or finished == config.steps


def start_or_resume(run: Run, params, frozen, checkpoints) -> tuple[State, int, dict[str, float]]:
    """The state to go on from, the position in the sequence of problems, and seconds spent."""
    optimizer = configuration.optimizer(run.config)
    # Shapes alone: a new state beside the one that is read may be more than a device holds.
    like = state_shapes(run, params, optimizer).replace(frozen=frozen)
    restored = checkpoint.restore(checkpoints, like, settings(run.config), run.folder)
    if restored is None:
        return new_state(run, params, frozen, optimizer), 0, {}
    state, position, seconds = restored
    if state.step > run.config.steps:
        raise InputError(
            f"steps: expected at least the {state.step} that the run in {run.folder} has, "
            f"got {run.config.steps}"
        )
    return state, position, seconds


def new_state(
    run: Run, params: Params, frozen: dict[str, Params], optimizer: optax.GradientTransformation
) -> State:
    """The state before the first step, placed on the run's mesh."""

    def start(params: Params) -> State:
        return _start(run, params, optimizer).replace(params={})  # no copy of what has its place

    placed = sharding.of_state(jax.eval_shape(start, params), run.mesh)
    return jax.jit(start, out_shardings=placed)(params).replace(params=params, frozen=frozen)


def state_shapes(run: Run, params: Params, optimizer: optax.GradientTransformation) -> State:
    """Shapes, types and places on the run's mesh of all that a run changes."""
    shapes = jax.eval_shape(lambda params: _start(run, params, optimizer), params)
    return sharding.placed(shapes, sharding.of_state(shapes, run.mesh))


def _start(run: Run, params: Params, optimizer: optax.GradientTransformation) -> State:
    return init_state(params, {}, optimizer, run.method.teachers, run.config.seed)


def settings(config: ConfigDict) -> dict[str, Any]:
    """The configuration as plain data."""
    return json.loads(config.to_json())


def random_key(state: State, stream: str, index: int) -> jax.Array:
    """A key of its own for each use, so that nothing depends on what ran before."""
    number = {"sample": 0, "evaluate": 1}[stream]
    key = jax.random.wrap_key_data(state.key)
    return jax.random.fold_in(jax.random.fold_in(key, number), index)


def draw(run: Run, state: State, key, prompt, prompt_length, samples: int, temperature: float):
    """Responses to the prompts, `samples` each, still on the device."""
    prompt = hosts.put((prompt, prompt_length), sharding.of_rows(run.mesh))
    sampling = replace(run.sampling, temperature=temperature)
    return sampler.sample(
        state.policy(),
        key,
        *prompt,
        group_size=samples,
        sampling=sampling,
        config=run.model,
        compute=Compute(dtype=run.config.compute.dtype, mesh=run.mesh),
    )


def sample(run: Run, state: State, problems: Sequence[Problem], position: int):
    """Prompts (ids and lengths) of the problems, and a group of samples for each."""
    settings = run.config.rollout
    prompt = rollout.encode(problems, run.tokenizer, run.templates["nothing"], settings.max_prompt)
    key = random_key(state, "sample", position)
    samples = draw(run, state, key, *prompt, settings.group_size, settings.temperature)
    return prompt, hosts.get(samples)


class Collected(NamedTuple):
    """P kept groups, and where in the sequence of problems to go on."""

    problems: Sequence[Problem]
    groups: Sequence[Sequence[Sample]]
    rollouts: Rollouts
    position: int
    metrics: dict[str, float]


def collect(run: Run, state: State, judge: Judge, position: int, clock: Clock) -> Collected:
    """Samples and grades, P prompts a round, until the method has kept P groups.

    A method that keeps every group needs one round. Groups kept beyond P are dropped.

    Raises:
      InputError: there are fewer after `rollout.max_rounds` rounds.
    """
    settings, sampled, kept, parts = run.config.rollout, [], [], []
    for _ in range(settings.max_rounds):
        with clock("sample"):
            problems = [run.problems[position + i] for i in range(settings.prompts)]
            prompt, samples = sample(run, state, problems, position)
        position += settings.prompts
        with clock("verify"):
            groups = rollout.verify(problems, samples, run.tokenizer, run.sampling.stop_ids, judge)
            rollouts, chosen = rollout.grade(*prompt, samples, groups, run.method.grade)
        sampled += groups
        kept += itertools.compress(zip(problems, groups, strict=True), chosen)
        parts.append(rollout.keep(rollouts, chosen))
        if len(kept) >= settings.prompts:
            break
    else:
        ungraded = rollout.describe(sampled)["rollout/ungraded"]
        raise InputError(
            f"rollout.max_rounds: {run.config.method.name} kept {len(kept)} of the "
            f"{len(sampled)} groups of {settings.max_rounds} rounds and needs {settings.prompts} "
            f"({ungraded:.0%} of the answers could not be graded); allow more rounds, or choose "
            f"problems that are neither too hard nor too easy"
        )
    problems, groups = zip(*kept[: settings.prompts], strict=True)
    metrics = {
        **rollout.describe(sampled),
        "rollout/kept": len(kept) / len(sampled),
        "rollout/rounds": len(parts),
    }
    return Collected(problems, groups, rollout.join(parts, settings.prompts), position, metrics)


def write_hints(run: Run, problems: Sequence[Problem], groups, step: int):
    """What each teacher is shown, and how often that was nothing or was cut."""
    return contexts.write(
        {name: teacher.context for name, teacher in run.method.teachers.items()},
        problems,
        groups,
        np.random.default_rng([run.config.seed, step]),
        run.tokenizer,
        run.templates,
        run.config.rollout.max_hint_prompt,
        run.config.exchange_hints,
    )


def pack(run: Run, batch: Batch) -> tuple[Batch, Parts, dict[str, float]]:
    """A batch on the devices, and the parts in which it is computed, by mini-batch."""
    rows = np.arange(len(batch.rollouts.response))
    parts = [
        packing.pack(batch, run.sizes, sharding.row_devices(run.mesh), of_mini_batch)
        for of_mini_batch in np.split(rows, run.config.optimizer.mini_batches)
    ]
    everything = list(itertools.chain(*parts))
    metrics = {"compute/parts": len(everything)} | {
        f"compute/{name}_padding" if name else "compute/padding": packing.padding(everything, name)
        for name in run.sizes.streams
    }
    return *hosts.put((batch, parts), sharding.of_rows(run.mesh)), metrics


def measure(run: Run, state: State, judge: Judge, step: int) -> dict[str, float]:
    """Held-out accuracy, sampled and greedy; verdicts and lengths go to evaluations/."""
    k, settings = run.config.evaluation.samples, run.config.rollout
    verdicts, lengths, metrics = {}, {}, {}
    for name, samples, temperature in (("sampled", k, settings.temperature), ("greedy", 1, 0.0)):
        answered = rollout.answer(
            lambda *prompt, n=samples, t=temperature: draw(run, state, *prompt, n, t),
            random_key(state, "evaluate", step),
            run.held_out,
            run.tokenizer,
            run.templates["nothing"],
            judge,
            max_prompt=settings.max_prompt,
            batch=batch_size(run.config, len(run.held_out)),
            stop_ids=run.sampling.stop_ids,
        )
        groups = list(itertools.chain.from_iterable(answered))
        verdicts[name], metrics[name] = rollout.measure(groups)
        lengths[name] = [[len(sample.ids) for sample in group] for group in groups]
    if hosts.is_first():
        path = evaluation_file(run.folder, step)
        path.parent.mkdir(exist_ok=True)
        record = {name: v.tolist() for name, v in verdicts.items()}
        record |= {f"{name}_length": of_groups for name, of_groups in lengths.items()}
        path.write_text(json.dumps(strict(record), allow_nan=False))
    accuracy = evaluate.avg_at_k(verdicts["sampled"])
    return {
        "eval/accuracy": accuracy.value,
        "eval/accuracy_low": accuracy.low,
        "eval/accuracy_high": accuracy.high,
        "eval/greedy_accuracy": evaluate.avg_at_k(verdicts["greedy"]).value,
        f"eval/pass_at_{k}": evaluate.pass_at_k(verdicts["sampled"], k).value,
        **{f"eval/{name}": x for name, x in metrics["sampled"].items()},
    }


def evaluation_file(folder: Path, step: int) -> Path:
    """Where the verdicts of an evaluation are."""
    return folder / "evaluations" / f"{step:06d}.json"


def export(run: Run, state: State) -> None:
    """Writes the policy to model/ in Hugging Face format, with its tokenizer.

    Where an adapter was trained, model/ has it merged, and adapter/ has it alone, for `peft`.
    """
    folder, policy = run.folder / "model", state.params
    if run.model.lora is not None:
        adapters.save(run.folder / "adapter", policy, run.model, base=run.config.model.path)
        policy = merge(state.frozen[STUDENT], policy, run.model)
    weights.save(folder, policy, run.model, eos_token_id=run.sampling.stop_ids)
    if hosts.is_first():
        run.tokenizer.save_pretrained(folder)


def mean_seconds(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """By phase, of all steps but the run's first, which compiles; without evaluations."""
    steps = [row for row in rows if "time/update" in row][1:]
    names = dict.fromkeys(name for row in steps for name in row if name.startswith("time/"))
    return {
        name.removeprefix("time/"): float(np.mean([row.get(name, 0.0) for row in steps]))
        for name in names
    }


def summarize(run: Run, clock: Clock) -> dict[str, Any]:
    """The results of a finished run, from what it wrote."""
    config = run.config
    ends = [
        {
            name: np.array(verdicts, np.float64)
            for name, verdicts in json.loads(evaluation_file(run.folder, step).read_text()).items()
        }
        for step in (0, config.steps)
    ]
    before, after = ends

    def estimate(function, *arguments):
        return function(*arguments)._asdict()

    k = config.evaluation.samples
    return {
        "method": config.method.name,
        "steps": config.steps,
        "seed": config.seed,
        "num_problems": len(run.held_out),
        "samples_per_problem": k,
        "accuracy_before": estimate(evaluate.avg_at_k, before["sampled"]),
        "accuracy_after": estimate(evaluate.avg_at_k, after["sampled"]),
        "greedy_before": estimate(evaluate.avg_at_k, before["greedy"]),
        "greedy_after": estimate(evaluate.avg_at_k, after["greedy"]),
        f"pass_at_{k}_before": estimate(evaluate.pass_at_k, before["sampled"], k),
        f"pass_at_{k}_after": estimate(evaluate.pass_at_k, after["sampled"], k),
        "difference": estimate(evaluate.difference, before["sampled"], after["sampled"]),
        "seconds": {**clock.seconds, "total": sum(clock.seconds.values())},
        "seconds_of_a_step": mean_seconds(read_metrics(run.folder)),
        "device": str(jax.devices()[0].device_kind),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    }
