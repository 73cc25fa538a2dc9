"""Countdown: reach a target from a few numbers. The built-in task, with many solutions a problem.

The prompt `4 7 4 : 32` asks for 32 from 4, 7 and 4, each used once. A response is a list of steps,
`7 * 4 = 28 ; 28 + 4 = 32`. The word `no` takes back everything before it and starts over with all
numbers. Results are integers from 0 to `MAX_VALUE`. Generated solutions write the larger operand
first, so that each distinct step has one text; the verifier accepts any order.
"""

import random
import zlib
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from jaxrl_sd.types import InputError, Problem

MAX_VALUE = 50
RETRY = "no"


class Level(NamedTuple):
    """A kind of problem: how many numbers, drawn from 1 ... largest, and its share of the task."""

    share: float
    numbers: int
    largest: int


class Step(NamedTuple):
    """One line of arithmetic, `left op right = result`."""

    left: int
    op: str
    right: int
    result: int


LEVELS = (Level(0.2, 2, 20), Level(0.7, 3, 9), Level(0.1, 4, 9))
HARD_LEVELS = (Level(0.3, 3, 9), Level(0.4, 3, 15), Level(0.3, 4, 9))

# The words around a hint are few: teacher prompts are the longest sequences of a run.
TEMPLATES = {
    "nothing": {"user": "{problem}"},
    "answer": {"user": "{problem} try {answer}"},
    "solution": {"user": "{problem} see {solution}"},
    "answer_solution": {"user": "{problem} try {answer} see {solution}"},
    "answer_peer": {"user": "{problem} try {answer} peer {peer}"},
    "peer": {"user": "{problem} peer {peer}"},
    "attempt": {"user": "{problem} peer {peer}"},
    "correct_solution": {"user": "{problem} peer {peer}"},
    "demonstration": {"user": "{problem} see {solution}"},
    "marker": {"user": "{problem}", "tail": " think"},
}


def vocabulary() -> list[str]:
    """Every word of the task: numbers, symbols, and the words of `TEMPLATES`."""
    numbers = [str(value) for value in range(MAX_VALUE + 1)]
    return [*numbers, "+", "-", "*", "=", ";", ":", RETRY, "try", "see", "peer", "think"]


def legal_steps(numbers: tuple[int, ...]) -> list[tuple[Step, tuple[int, ...]]]:
    """Every step possible with sorted `numbers`, and the sorted numbers that it leaves."""
    found = {}
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            small, large = numbers[i], numbers[j]
            others = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
            for op, result in (("+", large + small), ("-", large - small), ("*", large * small)):
                if result <= MAX_VALUE:
                    left = tuple(sorted((*others, result)))
                    found[Step(large, op, small, result)] = left
    return list(found.items())


@cache
def solutions(numbers: tuple[int, ...], target: int) -> tuple[tuple[Step, ...], ...]:
    """Every solution with sorted `numbers`, in a fixed order; empty where there is none."""
    if len(numbers) == 1:
        return ((),) if numbers[0] == target else ()
    return tuple(
        (step, *rest) for step, left in legal_steps(numbers) for rest in solutions(left, target)
    )


def prompt_text(numbers: list[int], target: int) -> str:
    """The text of the user turn."""
    return f"{' '.join(map(str, numbers))} : {target}"


def parse_prompt(prompt: str) -> tuple[tuple[int, ...], int]:
    """Sorted numbers and target of a prompt that `prompt_text` wrote."""
    numbers, target = prompt.split(" : ")
    return tuple(sorted(map(int, numbers.split()))), int(target)


def solution_text(steps: tuple[Step, ...]) -> str:
    """`7 * 4 = 28 ; 28 + 4 = 32`."""
    return " ; ".join(f"{s.left} {s.op} {s.right} = {s.result}" for s in steps)


def answer_text(steps: tuple[Step, ...]) -> str:
    """The plan without its working: `7 * 4 28 + 4`."""
    return " ".join(f"{s.left} {s.op} {s.right}" for s in steps)


def _class_hash(numbers: list[int], target: int) -> int:
    return zlib.crc32(repr((sorted(numbers), target)).encode())


def check_draw(split: str, count: int) -> None:
    """InputError where a built-in task has no such split, or no problem is asked for."""
    if split not in ("train", "test"):
        raise InputError(f"split: got {split!r}, expected 'train' or 'test'")
    if count < 1:
        raise InputError(f"count: got {count}, expected at least 1")


def _draw(rng: random.Random, levels: Sequence[Level]) -> tuple[list[int], int]:
    """Numbers, and a target that random steps reach from them (0 included)."""
    level = rng.choices(levels, [level.share for level in levels])[0]
    numbers = [rng.randint(1, level.largest) for _ in range(level.numbers)]
    left = tuple(sorted(numbers))
    while len(left) > 1:
        _, left = rng.choice(legal_steps(left))
    return numbers, left[0]


def problems(
    split: str, count: int, seed: int, *, levels: Sequence[Level] = LEVELS
) -> list[Problem]:
    """Draws `count` problems, the same for the same arguments.

    One class in eight is held out, a class being all prompts with the same numbers, in any order,
    and the same target. The solution shown is one of the class's solutions, fixed by its hash.

    Raises:
      InputError: split is neither "train" nor "test", or count is not positive.
    """
    check_draw(split, count)
    rng = random.Random(f"{split} {seed}")
    drawn = []
    while len(drawn) < count:
        numbers, target = _draw(rng, levels)
        code = _class_hash(numbers, target)
        if target == 0 or (code % 8 == 0) != (split == "test"):
            continue
        ways = solutions(tuple(sorted(numbers)), target)
        steps = ways[code // 8 % len(ways)]
        row = {
            "prompt": prompt_text(numbers, target),
            "answer": answer_text(steps),
            "solution": solution_text(steps),
            "verifier": "countdown",
        }
        drawn.append(Problem(f"countdown/{split}/{seed}/{len(drawn)}", **row, columns=row))
    return drawn
