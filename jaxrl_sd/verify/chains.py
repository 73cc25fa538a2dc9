"""Modular chains: the number after the last step, whatever the steps."""

import re

_NUMBER = re.compile(r"0|[1-9][0-9]*")


def verify(prompt: str, answer: str, response: str) -> bool:
    """Whether `response` ends with `# <answer>`. How it got there is not read.

    Words are separated by white space. The word `#` stands once in a response, before its last
    word, which is a natural number without leading zeros: who writes two answers has given none.

    Raises:
      ValueError: the answer is no such number.
    """
    check_problem(prompt, answer)
    return final_answer(response) == answer


def final_answer(response: str) -> str | None:
    """The number that a well-formed response ends with, None where the form is wrong."""
    words = response.split()
    if words.count("#") != 1 or words[-2:-1] != ["#"] or not _NUMBER.fullmatch(words[-1]):
        return None
    return words[-1]


def check_problem(prompt: str, answer: str) -> None:
    """ValueError where no response could be right."""
    if not _NUMBER.fullmatch(answer):
        raise ValueError(f"answer: got {answer!r}, expected a natural number such as '7'")
