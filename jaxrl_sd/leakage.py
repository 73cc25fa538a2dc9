"""How much of what a teacher may be shown turns up in the student's answers. Host code, on texts.

Measured for every method alike, whether or not it shows anything to a teacher: correct answers look
like a solution anyway, so what counts is the difference to another problem's solution, and to a
method that shows nothing.
"""

import re
from collections.abc import Mapping, Sequence

from jaxrl_sd.rollout import mean
from jaxrl_sd.tokens import Template
from jaxrl_sd.types import Problem, Sample

N = 3  # words of a phrase
WORDS = re.compile(r"\w+")
WORDS_AND_SIGNS = re.compile(r"\w+|[^\w\s]")  # in 7 * 4 = 28 the signs matter
SLOT = re.compile(r"\{\w+\}")

Phrases = set[tuple[str, ...]]


def describe(
    problems: Sequence[Problem],
    groups: Sequence[Sequence[Sample]],
    templates: Mapping[str, Template],
) -> dict[str, float]:
    """Scalars of P problems and their groups of answers; NaN of nothing.

    `leakage/solution`: mean over answers of the share of their problem's `privileged` phrases that
    they contain, phrases of the prompt left out; problems without any are skipped.
    `leakage/of_correct`: the same over correct answers. `leakage/solution_other`: the same with the
    privileged phrases of the next problem of the batch, the control. `leakage/words`: the share of
    answers that contain a phrase of `wordings` that their prompt does not contain. Answers contain
    some without having seen a hint: compare with a method without teachers.
    """
    of_hints = wordings(templates)
    own, other, of_correct, worded = [], [], [], []
    for p, (problem, group) in enumerate(zip(problems, groups, strict=True)):
        following = problems[(p + 1) % len(problems)]
        asked = "\n".join([*(text for _, text in problem.turns), problem.prompt])
        of_prompt = phrases(split(asked))
        of_problem = privileged(problem) - of_prompt
        of_following = privileged(following) - of_prompt if following != problem else set()
        of_hints_here = of_hints - up_to_n(asked)
        for sample in group:
            said = phrases(split(sample.text))
            own += share(of_problem, said)
            other += share(of_following, said)
            of_correct += share(of_problem, said) if sample.correct else []
            worded.append(not of_hints_here.isdisjoint(up_to_n(sample.text)))
    return {
        "leakage/solution": mean(own),
        "leakage/solution_other": mean(other),
        "leakage/of_correct": mean(of_correct),
        "leakage/words": mean(worded),
    }


def split(text: str) -> list[str]:
    """Words and signs, in lower case.

    >>> split("So 7*4 = 28.")
    ['so', '7', '*', '4', '=', '28', '.']
    """
    return WORDS_AND_SIGNS.findall(text.lower())


def phrases(words: Sequence[str], n: int = N) -> Phrases:
    """All runs of n words; none where there are fewer."""
    return set(zip(*(words[i:] for i in range(n)), strict=False))


def up_to_n(text: str) -> Phrases:
    """All phrases of 1 to `N` words of a text, without signs."""
    words = WORDS.findall(text.lower())
    return set().union(*(phrases(words, n) for n in range(1, N + 1)))


def share(wanted: Phrases, said: Phrases) -> list[float]:
    """The share of the wanted phrases that were said, [] where none is wanted."""
    return [len(wanted & said) / len(wanted)] if wanted else []


def privileged(problem: Problem) -> Phrases:
    """Phrases of the solution; of the answer, where there is no solution of `N` words."""
    return phrases(split(problem.solution or "")) or phrases(split(problem.answer))


def wordings(templates: Mapping[str, Template]) -> Phrases:
    """What hints are announced with: the phrases of the text between the slots of all templates.

    A text of fewer than `N` words is one phrase. What the template "nothing" has is left out.

    >>> sorted(wordings({"answer": Template("{problem} try {answer}"), "nothing": Template()}))
    [('try',)]
    """
    texts = [text for t in templates.values() for text in (t.system, t.user, t.tail)]
    between = [WORDS.findall(part.lower()) for text in texts for part in SLOT.split(text)]
    found = set().union(*(phrases(words, min(N, len(words))) for words in between))
    return found - up_to_n(SLOT.sub("\n", templates["nothing"].text()))
