"""How large the measured work is: on a CPU, on an accelerator, and in the tests."""

from typing import NamedTuple

import jax

from experiments.benchmarks.models import MEDIUM, QWEN3_1_7B, SMALL, TOY
from experiments.benchmarks.work import Shape
from jaxrl_sd.model import Compute, ModelConfig


class Head(NamedTuple):
    """Sizes for the memory of the head's gradient."""

    vocab: int
    hidden: int
    chunk: int
    tokens: tuple[int, int]  # few and many


class Scale(NamedTuple):
    """Hashable: ceilings are measured once for each."""

    model: ModelConfig  # of the figures against ceilings
    light: ModelConfig  # of those that need many runs
    compute: Compute
    matmul: tuple[int, ...]  # sizes of square matrices
    megabytes: int  # of an array that no cache holds
    head: Head
    update: Shape
    decode: tuple[Shape, ...]
    methods: Shape
    groups: Shape
    flat: Shape
    longer: int  # the factor of T in the figure on growth
    steps: int  # whole steps of the built-in job that are timed
    repetitions: int


PAPER_HEAD = Head(151_936, 1024, 512, (1024, 16_384))
CPU = Scale(
    model=SMALL,
    light=MEDIUM,
    compute=Compute(dtype="float32", remat="dots", chunk=4096),
    matmul=(1024, 2048, 4096),
    megabytes=256,
    head=PAPER_HEAD,
    update=Shape(4, 8, 64, 64),
    decode=(Shape(1, 8, 64, 64), Shape(4, 8, 64, 64), Shape(16, 8, 64, 64)),
    methods=Shape(2, 8, 64, 192),
    groups=Shape(4, 8, 512, 64),
    flat=Shape(2, 8, 64, 128),
    longer=8,
    steps=60,
    repetitions=7,
)
ACCELERATOR = Scale(
    model=QWEN3_1_7B,
    light=SMALL,
    compute=Compute(dtype="bfloat16", remat="dots", chunk=2048),
    matmul=(4096, 8192, 16_384),
    megabytes=4096,
    head=PAPER_HEAD,
    update=Shape(4, 8, 512, 1024),
    decode=(Shape(8, 8, 512, 512), Shape(32, 8, 512, 512)),
    methods=Shape(2, 8, 256, 512),
    groups=Shape(8, 8, 512, 64),
    flat=Shape(4, 8, 128, 512),
    longer=8,
    steps=10,
    repetitions=5,
)
TOY_SCALE = Scale(
    model=TOY,
    light=TOY,
    compute=Compute(chunk=32),
    matmul=(64, 128),
    megabytes=1,
    head=Head(512, 32, 16, (64, 128)),
    update=Shape(1, 2, 4, 4),
    decode=(Shape(1, 2, 4, 4),),
    methods=Shape(1, 2, 4, 4),
    groups=Shape(1, 2, 4, 4),
    flat=Shape(1, 2, 4, 4),
    longer=2,
    steps=1,
    repetitions=1,
)


def of_this_machine() -> Scale:
    """CPU, or what an accelerator can take."""
    return CPU if jax.default_backend() == "cpu" else ACCELERATOR
