"""Modular chains: evaluate an expression from left to right, modulo 10. The second built-in task.

The prompt `3 + 5 * 4 - 7` asks for ((3 + 5) * 4 - 7) mod 10. A response works step by step and ends
with the final answer, `3 + 5 = 8 * 4 = 2 - 7 = 5 # 5`. Only the final answer is verified, so that a
response whose steps are wrong and whose answer is right counts as correct. Of the problems there
are two variants, with a full solution and with a terse one: the answer, which says nothing about
the middle of a chain.
"""

import operator
import random
import zlib
from typing import NamedTuple

from jaxrl_sd import countdown
from jaxrl_sd.types import Problem

MODULUS = 10
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
FINAL = "#"


class Level(NamedTuple):
    """A kind of problem: how many operations, and its share of the task."""

    share: float
    operations: int


class Chain(NamedTuple):
    """An expression: the first number, and what is done to it."""

    first: int
    operations: tuple[tuple[str, int], ...]  # (operator, number)


LEVELS = (Level(0.3, 4), Level(0.4, 5), Level(0.3, 6))

# A failed attempt is announced by a word of its own: unlike countdown's target, nothing in the
# prompt lets a teacher see that it failed.
TEMPLATES = countdown.TEMPLATES | {"attempt": {"user": "{problem} not {peer}"}}


def vocabulary() -> list[str]:
    """Every word of the task: numbers, symbols, and the words of `TEMPLATES`."""
    numbers = [str(value) for value in range(MODULUS)]
    return [*numbers, *OPERATORS, "=", FINAL, "try", "see", "peer", "not", "think"]


def step_result(value: int, symbol: str, number: int) -> int:
    """One operation on the value so far."""
    return OPERATORS[symbol](value, number) % MODULUS


def results(chain: Chain) -> list[int]:
    """The value after each operation."""
    values = [chain.first]
    for symbol, number in chain.operations:
        values.append(step_result(values[-1], symbol, number))
    return values[1:]


def prompt_text(chain: Chain) -> str:
    """The text of the user turn."""
    return " ".join([str(chain.first), *(f"{symbol} {n}" for symbol, n in chain.operations)])


def parse_prompt(prompt: str) -> Chain:
    """The chain of a prompt that `prompt_text` wrote."""
    first, *rest = prompt.split()
    return Chain(int(first), tuple(zip(rest[::2], map(int, rest[1::2]), strict=True)))


def solution_text(chain: Chain, values: list[int]) -> str:
    """The response whose steps have these results: `3 + 5 = 8 * 4 = 2 # 2`."""
    steps = zip(chain.operations, values, strict=True)
    worked = " ".join(f"{symbol} {number} = {value}" for (symbol, number), value in steps)
    return f"{chain.first} {worked} {FINAL} {values[-1]}"


def _draw(rng: random.Random) -> Chain:
    """No operation leaves every value as it is."""
    level = rng.choices(LEVELS, [level.share for level in LEVELS])[0]
    symbols = rng.choices(list(OPERATORS), k=level.operations)
    smallest = {"+": 1, "-": 1, "*": 2}
    numbers = [rng.randint(smallest[symbol], MODULUS - 1) for symbol in symbols]
    return Chain(rng.randint(1, MODULUS - 1), tuple(zip(symbols, numbers, strict=True)))


def problems(split: str, count: int, seed: int, *, terse: bool = False) -> list[Problem]:
    """Draws `count` problems, the same for the same arguments; one expression in eight is held out.

    Where `terse`, the solution is the answer and no more; all else is the same.

    Raises:
      InputError: split is neither "train" nor "test", or count is not positive.
    """
    countdown.check_draw(split, count)
    rng = random.Random(f"{split} {seed}")
    drawn = []
    while len(drawn) < count:
        chain = _draw(rng)
        prompt = prompt_text(chain)
        if (zlib.crc32(prompt.encode()) % 8 == 0) != (split == "test"):
            continue
        values = results(chain)
        answer = str(values[-1])
        row = {
            "prompt": prompt,
            "answer": answer,
            "solution": answer if terse else solution_text(chain, values),
            "verifier": "chains",
        }
        drawn.append(Problem(f"chains/{split}/{seed}/{len(drawn)}", **row, columns=row))
    return drawn
