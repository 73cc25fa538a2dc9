"""What a teacher is shown. Whose weights it uses is the other, independent choice (teachers.py).

A context looks at one problem and at its group of samples and gives, for each sample, one hint or
None (this teacher is silent for that row). A hint names a template and fills its slots; templates
are plain data that the user may replace, so a method says *what* is shown and never how it is
worded. `write` turns hints into token prompts.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxrl_sd import tokens
from jaxrl_sd.tokens import Template
from jaxrl_sd.types import Hints, Problem, Sample


class Hint(NamedTuple):
    """What one teacher is shown about one sample."""

    template: str  # a key of the templates
    slots: Mapping[str, str] = {}  # privileged text by slot name; `problem` is filled by `write`
    source: int = -1  # the sample of the group whose response is shown, -1 for none


class Context(NamedTuple):
    """What a teacher is shown, and which fields of a problem it cannot do without."""

    write: Callable[[Problem, Sequence[Sample], np.random.Generator], list[Hint | None]]
    needs: tuple[str, ...] = ()
    shared: bool = False  # whether all samples of a group are shown the same


# Wordings follow the structure that the papers describe, in our words. {problem} is the student's
# own user turn, so student and teacher prompts differ by the inserted text alone.
TEMPLATES = {
    "nothing": Template(),
    # CAST Sec. 8.4: a line after the student's rendered prompt, and no privileged text at all.
    "marker": Template(tail="\n\n[Student response]\n"),
    # RLSD: the bare answer is announced as a reference solution.
    "answer": Template(
        "{problem}\n\nHere is a reference solution to this problem:\n{answer}\n\n"
        "After understanding the reference solution, solve the problem with your own approach."
    ),
    # OPSD Fig. 2.
    "solution": Template(
        "{problem}\n\nHere is a reference solution to this problem:\n"
        "=== Reference solution begins ===\n{solution}\n=== Reference solution ends ===\n\n"
        "After understanding the reference solution, solve the problem with your own approach. "
        "Do not copy or paraphrase it."
    ),
    # SDPG Fig. 4.
    "answer_solution": Template(
        "{problem}\n\n---\n\nHint: the correct answer is {answer}. One common solution is:\n"
        "{solution}\n\nInstruction: if possible, derive {answer} by a different and equally "
        "rigorous route; otherwise present the standard route very clearly. Do not mention that "
        "an answer or a reference was given."
    ),
    # HSD Sec. 4: the answer stays explicit next to the peer's path.
    "answer_peer": Template(
        "{problem}\n\nThe final answer is {answer}. A successful attempt:\n"
        "=== Attempt begins ===\n{peer}\n=== Attempt ends ===\n\n"
        "Solve the problem yourself, step by step."
    ),
    # SC-GRPO App. E: guide and reference both stand in the system prompt.
    "peer": Template(
        system="A reference solution that was verified to be correct follows. Use it as a "
        "high-level guide to the approach, not as a text to copy: understand it, adopt its "
        "strategy if it is sound and improve on it where you can, and write your own complete "
        "solution.\n\n### Reference Correct Solution\n{peer}\n\n"
        "Take the reference as inspiration only."
    ),
    "attempt": Template(
        system="An earlier attempt at the same problem follows. It was not verified to be "
        "correct.\n\n### Reference Attempt\n{peer}\n\nTake it as inspiration only and write "
        "your own complete solution."
    ),
    # SDPO Table 2.
    "correct_solution": Template(
        "{problem}\n\nCorrect solution:\n\n{peer}\n\nCorrectly solve the original question."
    ),
    "feedback": Template(
        "{problem}\n\nFeedback on an earlier attempt of yours, which failed:\n\n{feedback}\n\n"
        "Correctly solve the original question."
    ),
    # SDFT.
    "demonstration": Template(
        "{problem}\n\nThis is an example of a response to the question:\n\n{solution}\n\n"
        "Now answer with a response of your own, including the thinking process."
    ),
}


def _every_sample(hint: Callable[[Problem], Hint], needs: tuple[str, ...] = ()) -> Context:
    return Context(
        lambda problem, samples, rng: [hint(problem) for _ in samples], needs, shared=True
    )


def nothing() -> Context:
    """The student's own prompt. With frozen weights this is the reference policy."""
    return _every_sample(lambda problem: Hint("nothing"))


def marker() -> Context:
    """A marker line and no privileged text (CAST)."""
    return _every_sample(lambda problem: Hint("marker"))


def answer() -> Context:
    """The final answer only (RLSD)."""
    return _every_sample(lambda problem: Hint("answer", {"answer": problem.answer}), ("answer",))


def solution() -> Context:
    """A reference solution (OPSD)."""
    return _every_sample(
        lambda problem: Hint("solution", {"solution": problem.solution}), ("solution",)
    )


def demonstration() -> Context:
    """A reference solution, announced as an example (SDFT)."""
    return _every_sample(
        lambda problem: Hint("demonstration", {"solution": problem.solution}), ("solution",)
    )


def answer_and_solution() -> Context:
    """The final answer and a worked solution (SDPG)."""
    return _every_sample(
        lambda problem: Hint(
            "answer_solution", {"answer": problem.answer, "solution": problem.solution}
        ),
        ("answer", "solution"),
    )


def draw_peer(
    samples: Sequence[Sample], i: int, rng: np.random.Generator, correct: bool
) -> int | None:
    """A sample other than i with the given verdict, drawn uniformly; None if there is none."""
    peers = [j for j, s in enumerate(samples) if j != i and s.correct is correct]
    return peers[rng.integers(len(peers))] if peers else None


def verified_sibling() -> Context:
    """A correct response of the same group, never the row's own; silence if there is none."""

    def write(problem, samples, rng):
        peers = [draw_peer(samples, i, rng, correct=True) for i in range(len(samples))]
        return [None if j is None else Hint("peer", {"peer": samples[j].text}, j) for j in peers]

    return Context(write)


_THOUGHTS = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


def sibling_or_feedback() -> Context:
    """The first correct response of the group that is not the row's own, without its thoughts.

    Where there is none, what the verifier said about the row's own failed attempt; where it said
    nothing, silence. SDPO (2601.20802) Table 2, with the routing of its released configuration.
    """

    def write(problem, samples, rng):
        def hint(i):
            for j, sample in enumerate(samples):
                if j != i and sample.correct is True:
                    return Hint("correct_solution", {"peer": _THOUGHTS.sub("", sample.text)}, j)
            if samples[i].correct is False and samples[i].feedback:
                return Hint("feedback", {"feedback": samples[i].feedback})
            return None

        return [hint(i) for i in range(len(samples))]

    return Context(write)


def answer_and_peer() -> Context:
    """The answer with a correct response of the group, never the row's own; else the answer.

    HSD Eq. 9.
    """

    def write(problem, samples, rng):
        def hint(i):
            j = draw_peer(samples, i, rng, correct=True)
            if j is None:
                return Hint("answer", {"answer": problem.answer})
            return Hint("answer_peer", {"answer": problem.answer, "peer": samples[j].text}, j)

        return [hint(i) for i in range(len(samples))]

    return Context(write, ("answer",))


def _of_batch(context: Context, problems, groups, rng) -> list[list[Hint | None]]:
    """The hints of every group, with `source` counted over the whole batch."""
    first, out = 0, []
    for problem, samples in zip(problems, groups, strict=True):
        hints = context.write(problem, samples, rng)
        moved = [h and (h if h.source < 0 else h._replace(source=first + h.source)) for h in hints]
        out.append(moved)
        first += len(samples)
    return out


def exchange(hints: Sequence[Sequence[Hint | None]]) -> list[list[Hint | None]]:
    """A control: every hint of a batch, [P][G], is replaced by one that another problem has.

    It is of the same template and of the next problem, cyclically, that has one; of that problem's
    same sample if it is there, else of its first. So who is shown something, and in which words,
    stays, and what the text says about the problem goes. A hint that no other problem can replace
    stays.
    """

    def of(p: int, g: int) -> Hint | None:
        own = hints[p][g]
        if own is None:
            return None
        for others in [*hints[p + 1 :], *hints[:p]]:
            for hint in (others[g], *others):
                if hint is not None and hint.template == own.template:
                    return hint
        return own

    return [[of(p, g) for g in range(len(row))] for p, row in enumerate(hints)]


def write(
    contexts: Mapping[str, Context],
    problems: Sequence[Problem],
    groups: Sequence[Sequence[Sample]],
    rng: np.random.Generator,
    tokenizer,
    templates: Mapping[str, Template],
    width: int,
    exchanged: bool = False,
) -> tuple[dict[str, Hints], dict[str, float]]:
    """Prompts of every teacher for every row, empty where it is silent.

    Args:
      contexts: by teacher name.
      problems: P problems.
      groups: their P groups of G samples.
      templates: by the names that hints use.
      width: S', the length in tokens to which every teacher prompt is padded. A prompt that is
        longer loses the end of its longest privileged slot, nothing else, and is counted.
      exchanged: a control: every hint is another problem's, see `exchange`.

    Returns:
      {teacher name: Hints} with host arrays, and metrics.

    Raises:
      InputError: a prompt does not fit even without its privileged text.
    """
    hints, metrics = {}, {}
    for name, context in contexts.items():
        prompts, source, num_cut = [], [], 0
        written = _of_batch(context, problems, groups, rng)
        if exchanged:
            written = exchange(written)
        for problem, of_group in zip(problems, written, strict=True):
            # Samples of a group are often shown the same, and a silent teacher has no prompt.
            rendered = {None: ((), False)}
            for hint in of_group:
                what = hint and (hint.template, *sorted(hint.slots.items()))
                if what not in rendered:
                    rendered[what] = tokens.render_within(
                        tokenizer, templates[hint.template], problem, hint.slots, width
                    )
                prompt, cut = rendered[what]
                prompts.append(prompt)
                source.append(-1 if hint is None else hint.source)
                num_cut += cut
        padded, lengths = tokens.left_pad(prompts, width, tokenizer.pad_token_id)
        hints[name] = Hints(padded, lengths, np.asarray(source, np.int32))
        metrics[f"context/{name}/shown"] = float(hints[name].shown.mean())
        metrics[f"context/{name}/cut"] = num_cut
    return hints, metrics
