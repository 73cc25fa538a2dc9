"""How time grows with the batch, and with the length of responses."""

from collections.abc import Sequence

import jax.numpy as jnp

from experiments.benchmarks import ceilings, work
from experiments.benchmarks.jobs import GRPO, Job, sampling
from experiments.benchmarks.records import Row
from experiments.benchmarks.scales import Scale
from experiments.benchmarks.timing import in_turns, ratio
from experiments.benchmarks.work import Shape

TITLE = "Growth with batch and length"
TIMES = 8  # the larger batch


def measure(scale: Scale, phases: Sequence[str] = ("update", "score", "sampling")) -> list[Row]:
    """Time per token of a larger batch, and of longer responses against what they need."""
    small = scale.flat
    large = small._replace(prompts=TIMES * small.prompts)
    long = small._replace(response=scale.longer * small.response)
    shapes = {"small": small, "large": large, "long": long}
    jobs = {name: job(scale, shape) for name, shape in shapes.items()}
    functions = {
        "update": {name: job.update for name, job in jobs.items()},
        "score": {name: job.score for name, job in jobs.items()},
        "sampling": {n: sampling(scale.light, s, scale.compute) for n, s in shapes.items()},
    }
    rows = []
    for phase in phases:
        seconds = in_turns(functions[phase], scale.repetitions)
        needed = sampling_seconds if phase == "sampling" else flops
        growth = needed(scale, long) / needed(scale, small)
        rows += [
            ratio(
                f"{phase}: time a token at {TIMES} times the batch, over that at one",
                seconds["large"],
                seconds["small"],
                scale=1 / TIMES,
                target=("<=", 1.2),
            ),
            ratio(
                f"{phase}: growth at {scale.longer} times the length, over that of the work",
                seconds["long"],
                seconds["small"],
                scale=1 / growth,
                target=("<=", 1.2),
                note=f"{growth:.1f} times the work, attention included",
            ),
        ]
    return rows


def job(scale: Scale, shape: Shape) -> Job:
    """Computes as many tokens at a time as the small batch has, or one row of the longer ones."""
    tokens = max(scale.flat.tokens, shape.prompt + shape.response)
    return Job(GRPO, scale.light, shape, scale.compute, tokens=tokens)


def flops(scale: Scale, shape: Shape) -> float:
    """Forward; the backward pass has the same factor for all shapes."""
    return work.forward_flops(scale.light, shape)


def sampling_seconds(scale: Scale, shape: Shape) -> float:
    """The roofline of decoding alone: the prompts' part is small."""
    found, dtype = ceilings.find(scale), scale.compute.dtype
    item = jnp.dtype(dtype).itemsize
    return work.decode_seconds(scale.light, shape, item, found.flops[dtype], found.bandwidth)
