"""What distillation costs beside GRPO: the update, and whole steps of the built-in job."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax

from experiments.benchmarks.jobs import GRPO, Job
from experiments.benchmarks.records import Row
from experiments.benchmarks.scales import Scale
from experiments.benchmarks.timing import in_turns, ratio
from jaxrl_sd import config as configuration
from jaxrl_sd import sharding, train, update
from jaxrl_sd.methods import METHODS
from jaxrl_sd.methods.base import Method
from jaxrl_sd.start import open_judge, prepare
from jaxrl_sd.types import Batch

BUILT_IN = Path(__file__).parents[1] / "configs" / "tiny.py"
PLAIN = {"grpo": {"kl_coef": 0.0}}  # settings that are not the default
TITLE = "Methods beside GRPO"


def measure(scale: Scale) -> list[Row]:
    """Updates of SDPG and HSD, and whole steps of methods that only score with their teacher."""
    plain = {"SDPG": METHODS["sdpg"](), "HSD": METHODS["hsd"](beta=0.0)}
    penalised = {"HSD": METHODS["hsd"]()}
    stepped = {"RLSD": "rlsd", "CAST": "cast", "SC-GRPO": "sc_grpo"}
    return [
        *updates(scale, "no penalty to a reference", GRPO, plain),
        *updates(scale, "both with their penalty", METHODS["grpo"](), penalised),
        *whole_steps(scale, stepped),
    ]


def updates(scale: Scale, setting: str, grpo: Method, methods: Mapping[str, Method]) -> list[Row]:
    """The update, which has the distilling teachers' forward passes; and score and update together.

    These two hold every pass of a step: a penalty's reference is read in the score where it needs
    no more than log-probabilities, in the update where it is over the vocabulary.
    """
    jobs = {
        name: Job(method, scale.model, scale.methods, scale.compute)
        for name, method in {"GRPO": grpo, **methods}.items()
    }
    phases = {
        (name, phase): getattr(job, phase)
        for phase in ("score", "update")
        for name, job in jobs.items()
    }
    seconds = in_turns(phases, scale.repetitions)
    base = jobs["GRPO"].tokens[""]

    def note(job: Job) -> str:
        read = [f"{n / base:.2f}" for name, n in job.tokens.items() if name]
        return f"teachers read {' and '.join(read)} times the student's tokens"

    update = {name: seconds[name, "update"] for name in jobs}
    both = {name: seconds[name, "score"].plus(update[name]) for name in jobs}
    rows = []
    for name in methods:
        what, read = f"of {name}, {setting}", note(jobs[name])
        rows += [
            ratio(f"update {what}", update[name], update["GRPO"], target=("<=", 1.5), note=read),
            ratio(f"score and update {what}", both[name], both["GRPO"]),
        ]
    return rows


def whole_steps(scale: Scale, methods: Mapping[str, str]) -> list[Row]:
    """Sampling, verdicts, hints, scores, credit and update of the built-in job.

    Every step is another batch, so the median counts: the best has the shortest answers.
    """
    names = {"GRPO": "grpo", **methods}
    with tempfile.TemporaryDirectory() as folder:
        steps = {shown: Stepper(name, Path(folder)) for shown, name in names.items()}
        seconds = in_turns(steps, scale.steps, warmup=2)
        for step in steps.values():
            step.judge.close()
    return [
        ratio(
            f"step of {name}, no penalty to a reference",
            seconds[name],
            seconds["GRPO"],
            typical="median",
            target=("<=", 1.15),
        )
        for name in methods
    ]


class Stepper:
    """The next training step of the built-in job at each call, as `train.train` has it."""

    def __init__(self, method: str, folder: Path):
        config = configuration.load(BUILT_IN)
        config.output_dir = str(folder / method)
        config.method.name = method
        if method in PLAIN:
            config.method.update(PLAIN[method])
        self.run, params, frozen = prepare(config)
        optimizer = configuration.optimizer(config)
        state = update.init_state(params, frozen, optimizer, self.run.method.teachers, seed=0)
        self.state = jax.device_put(state, sharding.of_state(state, self.run.mesh))
        self.judge = open_judge(config)
        self.step, self.position = 0, 0

    def __call__(self):
        run, clock = self.run, train.Clock()
        collected = train.collect(run, self.state, self.judge, self.position, clock)
        hints, _ = train.write_hints(run, collected.problems, collected.groups, self.step)
        batch, parts, _ = train.pack(run, Batch(collected.rollouts, hints))
        batch = update.score(run.steps, self.state, batch, parts)
        batch, _ = run.steps.credit(batch, self.step)
        epochs = run.config.optimizer.epochs
        self.state, metrics = update.update(run.steps, self.state, batch, parts, epochs)
        self.step, self.position = self.step + 1, collected.position
        return metrics
