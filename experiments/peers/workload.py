"""What the programs of this folder share, so that all do the same work. Standard library only.

Each program loads the same model folder (experiments/benchmarks/models.py writes it), whose end
token is practically impossible, so that every response has exactly `--response_tokens` tokens. It
prints one line of JSON, {"program": ..., "versions": ..., "seconds": [...]}, one number a
repetition, the warm-up not among them.

A step of GRPO lasts from one call of the reward function to the next: the update with one batch,
and the sampling of the following one, with all that the trainer does in between. Sampling alone
lasts from the prompts' texts to the responses' tokens and texts on the host.
"""

import argparse
import json
import os
import random
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

STAMPS = "BENCHMARK_STAMPS"  # the environment variable with the file that `reward` writes


def flags(description: str) -> argparse.Namespace:
    """The sizes of the work, from the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="folder in Hugging Face form")
    parser.add_argument("--folder", required=True, help="where to write what has to be written")
    parser.add_argument("--prompts", type=int, default=4, help="a step")
    parser.add_argument("--group_size", type=int, default=8, help="samples a prompt")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--response_tokens", type=int, default=64)
    parser.add_argument("--devices", type=int, default=1, help="that this package makes of a CPU")
    parser.add_argument("--sampling", action="store_true", help="sampling alone, no training")
    parser.add_argument("--warmup", type=int, default=1, help="repetitions that do not count")
    parser.add_argument("--repetitions", type=int, default=2)
    args = parser.parse_args()
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    os.environ[STAMPS] = str(Path(args.folder) / f"stamps-{os.getpid()}")
    return args


def texts(count: int, args: argparse.Namespace) -> list[str]:
    """Different prompts of exactly `args.prompt_tokens` tokens of the models' tokenizer."""
    words = random.Random(0)
    return [
        " ".join(f"w{words.randrange(200)}" for _ in range(args.prompt_tokens))
        for _ in range(count)
    ]


def reward(prompts, completions, **columns):
    """Writes down when it was called, and for how many completions; the reward means nothing."""
    del prompts, columns
    with open(os.environ[STAMPS], "a", encoding="utf-8") as file:
        file.write(f"{time.monotonic()} {len(completions)}\n")
    return [float(len(text) % 2) for text in completions]


def step_seconds(args: argparse.Namespace) -> list[float]:
    """The time between successive calls of `reward` for whole batches, without the warm-up's."""
    lines = Path(os.environ[STAMPS]).read_text(encoding="utf-8").splitlines()
    calls = [line.split() for line in lines]
    times = [float(t) for t, count in calls if int(count) == args.prompts * args.group_size]
    return [b - a for a, b in pairwise(times)][args.warmup :]


def num_steps(args: argparse.Namespace) -> int:
    """Training steps after which `step_seconds` has all repetitions."""
    return args.warmup + args.repetitions + 1


def repeat(sample, args: argparse.Namespace) -> list[float]:
    """The time of each call of `sample()`, without the warm-up's."""
    seconds = []
    for _ in range(args.warmup + args.repetitions):
        start = time.monotonic()
        sample()
        seconds.append(time.monotonic() - start)
    return seconds[args.warmup :]


def report(packages: tuple[str, ...], seconds: list[float]) -> None:
    """Prints the line."""
    versions = {name: version(name) for name in packages}
    print(json.dumps({"versions": versions, "seconds": seconds}), flush=True)
