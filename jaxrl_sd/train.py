"""The training loop, top to bottom.

    problems -> samples -> verdicts -> grades -> hints -> scores -> credit -> update -> refresh

`train(config)` is the whole program: experiments/train.py only parses flags for it. Everything is a
function of the configuration and the step number, so a run that was killed continues exactly.
"""

import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from jaxrl_sd import (
    checkpoint,
    contexts,
    data,
    diagnostics,
    evaluate,
    report,
    rollout,
    sampler,
    sharding,
    tokens,
    weights,
)
from jaxrl_sd import config as configuration
from jaxrl_sd.methods import Method
from jaxrl_sd.metrics import Writer
from jaxrl_sd.model import ModelConfig
from jaxrl_sd.sampler import SamplingConfig
from jaxrl_sd.tokens import Template, load_tokenizer, stop_ids
from jaxrl_sd.types import Batch, InputError, Params, Problem, Sample
from jaxrl_sd.update import State, Steps, init_state, make_steps
from jaxrl_sd.verify import VERIFIERS
from jaxrl_sd.verify.pool import VerifierPool

SHOWN = ("rollout/accuracy", "eval/accuracy", "rollout/entropy")
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


class Run(NamedTuple):
    """What is read and compiled before the first step and never changes."""

    config: ConfigDict
    method: Method
    params: Params  # initial
    model: ModelConfig
    tokenizer: Any
    problems: grain.MapDataset  # [i] is the i-th that training sees
    held_out: list[Problem]
    templates: dict[str, Template]
    sampling: SamplingConfig
    mesh: jax.sharding.Mesh
    steps: Steps
    gaps: Callable[[State, Batch], dict[str, jax.Array]]
    folder: Path


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds = defaultdict(float)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Counts what an earlier process of the same run has spent."""
        for phase, spent in seconds.items():
            self.seconds[phase] += spent

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start


def train(config: ConfigDict) -> dict[str, Any]:
    """Trains, evaluates, saves and reports. A run found in `config.output_dir` is continued.

    The folder then holds metrics.jsonl, tensorboard/, rollouts/ (with the credit of every token),
    evaluations/, checkpoints/, model/ (Hugging Face format), report.md with its pictures, and
    summary.json, whose content is returned.

    Raises:
      InputError: anything wrong in the configuration, the model, the data or the folder, before
        the first sample is drawn.
    """
    clock = Clock()
    with clock("start"):
        run = prepare(config)
        checkpoints = checkpoint.manager(run.folder / "checkpoints", config.checkpoint.keep)
        state, position, seconds = start_or_resume(run, checkpoints)
    clock.add(seconds)
    first = int(state.step)
    with (
        checkpoints,
        VerifierPool(config.verifier.workers, config.verifier.timeout_s) as pool,
        Writer(run.folder, config.steps, first + 1 if first else 0, SHOWN) as writer,
    ):

        def assess(step: int) -> None:
            with clock("evaluate"):
                writer.write(step, measure(run, state, pool, step))

        if first == 0:
            assess(0)
        for step in range(first, config.steps):
            with clock("sample"):
                problems = [run.problems[position + i] for i in range(config.rollout.prompts)]
                prompt, samples = sample(run, state, problems, step)
            with clock("verify"):
                groups, verdict_metrics = rollout.verify(
                    problems, samples, run.tokenizer, run.sampling.stop_ids, pool
                )
                rollouts = rollout.grade(*prompt, samples, groups, run.method.grade)
            with clock("context"):
                hints, hint_metrics = write_hints(run, problems, groups, step)
            with clock("score"):
                batch = jax.device_put(Batch(rollouts, hints), sharding.of_rows(run.mesh))
                batch = run.steps.score(state, batch)
                batch, credit_metrics = jax.block_until_ready(run.steps.credit(batch, step))
            row = verdict_metrics | hint_metrics
            if step == 0 or is_due(config, step + 1):
                with clock("log"):
                    gaps = jax.device_get(run.gaps(state, batch))
                    log_group(run, batch, gaps, problems, groups, step + 1)
                    row |= diagnostics.gap_sizes(batch, gaps)
            with clock("update"):
                state, update_metrics = jax.block_until_ready(run.steps.update(state, batch))
            position += len(problems)
            with clock("log"):
                row |= diagnostics.describe(batch)
                row |= {f"credit/{name}": x for name, x in credit_metrics.items()}
                row |= {f"update/{name}": x for name, x in update_metrics.items()}
                row["rollout/length"] = samples.length.mean()
                row["rollout/truncated"] = samples.truncated.mean()
                writer.write(step + 1, row)
            if is_due(config, step + 1):
                assess(step + 1)
            if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.steps:
                with clock("save"):
                    checkpoint.save(checkpoints, state, position, settings(config), clock.seconds)
        with clock("save"):
            checkpoints.wait_until_finished()
            export(run, state)
    summary = summarize(run, clock)
    report.write(run.folder, summary, read_rollouts(run.folder))
    return summary


def is_due(config: ConfigDict, finished: int) -> bool:
    """Whether to evaluate and to write down a group after so many updates."""
    return finished % config.evaluation.every == 0 or finished == config.steps


def prepare(config: ConfigDict) -> Run:
    """Checks everything and reads model, tokenizer and problems."""
    method = configuration.check(config)
    mesh = sharding.make_mesh(**config.mesh)
    params, model = weights.load(config.model.path)
    tokenizer = load_tokenizer(config.model.path)
    if len(tokenizer) > model.vocab_size:
        raise InputError(
            f"model.path: the tokenizer in {config.model.path} has {len(tokenizer)} tokens, the "
            f"model {model.vocab_size}: they do not belong together"
        )
    model = replace(model, num_tokens=len(tokenizer))
    train, held_out = (
        data.load(
            config.data[split],
            split,
            config.data[f"num_{split}"],
            config.data.seed,
            config.data.suffix,
        )
        for split in ("train", "test")
    )
    templates = configuration.templates(config)
    check_problems([*train, *held_out], method, tokenizer, templates["nothing"], config)
    sampling = SamplingConfig(
        max_response=config.rollout.max_response,
        stop_ids=stop_ids(tokenizer, config.model.path),
        pad_id=tokenizer.pad_token_id,
        temperature=config.rollout.temperature,
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
    )
    steps = make_steps(
        method,
        configuration.optimizer(config),
        model,
        micro_batches=config.compute.micro_batches,
        temperature=config.rollout.temperature,
        chunk=config.compute.chunk,
    )
    gaps = diagnostics.make_gaps(method, model, config.rollout.temperature, config.compute.chunk)
    problems = data.shuffled(train, config.seed)
    folder = Path(config.output_dir)
    return Run(
        *(config, method, params, model, tokenizer, problems, held_out),
        *(templates, sampling, mesh, steps, gaps, folder),
    )


def check_problems(
    problems: Sequence[Problem], method: Method, tokenizer, template: Template, config: ConfigDict
) -> None:
    """Every problem has what the method shows its teachers, and its prompt fits.

    Raises:
      InputError: naming the problem.
    """
    try:
        rollout.encode(problems, tokenizer, template, config.rollout.max_prompt)
    except InputError as error:
        raise InputError(f"rollout.max_prompt: {error}") from error
    for problem in problems:
        if problem.verifier not in VERIFIERS:
            raise InputError(
                f"data: {problem.id}: verifier: expected one of {sorted(VERIFIERS)}, "
                f"got {problem.verifier!r}"
            )
    for name, teacher in method.teachers.items():
        for problem in problems:
            for field in teacher.context.needs:
                if not getattr(problem, field):
                    raise InputError(
                        f"data: {problem.id}: {config.method.name} shows its {name} the {field} "
                        f"of each problem, and this one has none"
                    )
        check_hints_fit(problems, name, teacher, tokenizer, configuration.templates(config), config)


def check_hints_fit(problems, name, teacher, tokenizer, templates, config) -> None:
    """The longest problem leaves room for each wording that this teacher can be shown."""
    longest = max(problems, key=lambda problem: len(problem.prompt))
    # All verdict patterns that a context can tell apart: nobody, somebody, several were right.
    verdicts = [[False] * 4, [True] + [False] * 3, [True, True, False, False], [True] * 4]
    for group in verdicts:
        samples = [Sample((), "", correct, False) for correct in group]
        for hint in teacher.context.write(longest, samples, np.random.default_rng(0)):
            hint = hint or contexts.Hint("nothing")
            empty = dict.fromkeys(hint.slots, "")
            try:
                tokens.render_within(
                    tokenizer,
                    templates[hint.template],
                    longest.prompt,
                    empty,
                    config.rollout.max_hint_prompt,
                )
            except InputError as error:
                raise InputError(
                    f"rollout.max_hint_prompt: {name}, template {hint.template}: {error}"
                ) from error


def start_or_resume(run: Run, checkpoints) -> tuple[State, int, dict[str, float]]:
    """The state to go on from, the position in the sequence of problems, and seconds spent."""
    optimizer = configuration.optimizer(run.config)
    state = init_state(run.params, optimizer, run.method.teachers, run.config.seed)
    state = jax.device_put(state, sharding.of_state(state, run.mesh))
    restored = checkpoint.restore(checkpoints, state, settings(run.config), run.folder)
    state, position, seconds = restored or (state, 0, {})
    if state.step > run.config.steps:
        raise InputError(
            f"steps: expected at least the {state.step} that the run in {run.folder} has, "
            f"got {run.config.steps}"
        )
    return state, position, seconds


def settings(config: ConfigDict) -> dict[str, Any]:
    """The configuration as plain data."""
    return json.loads(config.to_json())


def random_key(state: State, stream: str, step: int) -> jax.Array:
    """A key of its own for each use and step, so that nothing depends on what ran before."""
    number = {"sample": 0, "evaluate": 1}[stream]
    key = jax.random.wrap_key_data(state.key)
    return jax.random.fold_in(jax.random.fold_in(key, number), step)


def draw(run: Run, state: State, key, prompt, prompt_length, samples: int, temperature: float):
    """Responses to the prompts, `samples` each, still on the device."""
    prompt = jax.device_put((prompt, prompt_length), sharding.of_rows(run.mesh))
    sampling = replace(run.sampling, temperature=temperature)
    return sampler.sample(
        state.params, key, *prompt, group_size=samples, sampling=sampling, config=run.model
    )


def sample(run: Run, state: State, problems: Sequence[Problem], step: int):
    """Prompts (ids and lengths) of the problems, and a group of samples for each."""
    settings = run.config.rollout
    prompt = rollout.encode(problems, run.tokenizer, run.templates["nothing"], settings.max_prompt)
    key = random_key(state, "sample", step)
    samples = draw(run, state, key, *prompt, settings.group_size, settings.temperature)
    return prompt, jax.device_get(samples)


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
    )


def measure(run: Run, state: State, pool: VerifierPool, step: int) -> dict[str, float]:
    """Held-out accuracy, sampled and greedy; every verdict goes to evaluations/."""
    k, settings = run.config.evaluation.samples, run.config.rollout
    verdicts, metrics = {}, {}
    for name, samples, temperature in (("sampled", k, settings.temperature), ("greedy", 1, 0.0)):
        verdicts[name], metrics[name] = rollout.measure(
            lambda *prompt, n=samples, t=temperature: draw(run, state, *prompt, n, t),
            random_key(state, "evaluate", step),
            run.held_out,
            run.tokenizer,
            run.templates["nothing"],
            pool,
            max_prompt=settings.max_prompt,
            batch=settings.prompts,
            stop_ids=run.sampling.stop_ids,
        )
    path = evaluation_file(run.folder, step)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({name: v.tolist() for name, v in verdicts.items()}))
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


def log_group(run: Run, batch: Batch, gaps, problems, groups, step: int) -> None:
    """Writes a group of update `step`, mixed if there is one, with each token's credit and gap."""
    mixed = [len({s.correct for s in group}) > 1 for group in groups]
    p = int(np.argmax(mixed))
    credit, reward = jax.device_get((batch.credit, batch.rollouts.reward))
    records = []
    for i, answer in enumerate(groups[p], start=p * run.config.rollout.group_size):
        n = len(answer.ids)
        records.append(
            {
                "step": step,
                "prompt": problems[p].prompt,
                "answer": problems[p].answer,
                "response": answer.text,
                "response_tokens": [run.tokenizer.decode([t]) for t in answer.ids],
                "correct": answer.correct,
                "truncated": answer.truncated,
                "reward": float(reward[i]),
                "advantage": credit.adv_t[i, :n].tolist(),
                "distill": credit.distill_t[i, :n].tolist(),
                "gap": {name: gap[i, :n].tolist() for name, gap in gaps.items()},
            }
        )
    path = run.folder / "rollouts" / f"{step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_rollouts(folder: Path) -> list[dict[str, Any]]:
    """Everything that `log_group` wrote, in order."""
    paths = sorted((folder / "rollouts").glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def export(run: Run, state: State) -> None:
    """Writes the policy to model/ in Hugging Face format, with its tokenizer."""
    folder = run.folder / "model"
    weights.save(folder, state.params, run.model, eos_token_id=run.sampling.stop_ids)
    run.tokenizer.save_pretrained(folder)


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
        "device": str(jax.devices()[0].device_kind),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        },
    }
