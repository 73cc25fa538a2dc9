"""Countdown: combine all the given numbers, by + - *, into the target."""

import re

_PROBLEM = re.compile(r"\b([0-9]+(?: +[0-9]+)*) *: *([0-9]+)\b")
# Nine digits are more than any solution needs and keep the arithmetic on hostile text cheap.
_STEP = re.compile(r"([0-9]{1,9}) ([-+*]) ([0-9]{1,9}) = ([0-9]{1,9})")

_OPERATORS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def verify(prompt: str, answer: str, response: str) -> bool:
    """Whether the steps of `response` turn all the numbers of `prompt` into its target.

    The problem is the last match in the prompt of numbers, a colon and the target on one line, as
    in `4 7 4 : 32` (the regular expression `_PROBLEM`). A response is a list of steps
    `4 * 7 = 28 ; 28 + 4 = 32`, all tokens separated by spaces, with an optional `;` at the end. A
    step takes two of the numbers that are left and puts back its result, which is never negative.
    The word `no` takes back everything before it: only the attempt after the last `no` counts.

    `answer` is not read, since any solution is correct.

    Raises:
      ValueError: the prompt holds no problem.
    """
    numbers, target = _read_problem(prompt)
    for step in _last_attempt(response):
        match = _STEP.fullmatch(step.strip())
        if match is None or not _apply_step(numbers, *match.groups()):
            return False
    return numbers == [target]


def check_problem(prompt: str, answer: str) -> None:
    """ValueError where the prompt holds no problem."""
    _read_problem(prompt)


def _read_problem(prompt: str) -> tuple[list[int], int]:
    matches = _PROBLEM.findall(prompt)
    if not matches:
        raise ValueError(f"prompt: got {prompt!r}, expected a problem such as '4 7 4 : 32' in it")
    numbers, target = matches[-1]
    return [int(number) for number in numbers.split()], int(target)


def _last_attempt(response: str) -> list[str]:
    words = response.split()
    while "no" in words:
        words = words[words.index("no") + 1 :]
    return " ".join(words).removesuffix(";").split(";")


def _apply_step(numbers: list[int], left: str, operator: str, right: str, result: str) -> bool:
    """Replaces two of `numbers` by the result, in place; False where the step is not legal."""
    operands, value = (int(left), int(right)), int(result)
    for operand in operands:
        if operand not in numbers:
            return False
        numbers.remove(operand)
    numbers.append(value)
    return _OPERATORS[operator](*operands) == value
