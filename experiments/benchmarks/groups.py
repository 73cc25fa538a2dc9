"""What it saves to run the prompt of a group once."""

from experiments.benchmarks.jobs import GRPO, Job, sampling
from experiments.benchmarks.records import Row
from experiments.benchmarks.scales import Scale
from experiments.benchmarks.timing import in_turns, ratio

TITLE = "Shared prompts of groups"


def measure(scale: Scale) -> list[Row]:
    """Sampling and scoring, with and without sharing. Without it every row has its own prompt."""
    shape = scale.groups
    size = (
        f"{shape.prompts} x {shape.group_size} responses of {shape.response} tokens to prompts of "
        f"{shape.prompt}"
    )
    names = {"shared": True, "not shared": False}
    functions = {n: sampling(scale.model, shape, scale.compute, x) for n, x in names.items()}
    drawn = in_turns(functions, scale.repetitions)
    jobs = {n: Job(GRPO, scale.model, shape, scale.compute, shared=x) for n, x in names.items()}
    scored = in_turns({name: job.score for name, job in jobs.items()}, scale.repetitions)
    return [
        ratio(
            "sampling: time without over with",
            drawn["not shared"],
            drawn["shared"],
            target=(">=", 3.0),
            note=size,
        ),
        ratio(
            "scoring: time without over with",
            scored["not shared"],
            scored["shared"],
            target=(">=", 1.5),
            note=size,
        ),
    ]
