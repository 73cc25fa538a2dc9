"""Supervised training of the base model of the modular chains, from scratch.

    python -m experiments.pretrain_chains --output_dir=jaxrl_sd/assets/chains \
        --steps=1000 --plain_rows=48 --hinted_rows=48

Five minutes of one core. Held-out accuracy of the result, sampled and greedy: 54% and 65% without a
hint, from 99.9% with the answer, a solution or a peer, 37% and 52% with a failed attempt; of groups
of eight without a hint 6% are all wrong and 6% all correct.

Rows without a hint imitate flawed work. Where a result has to be reduced, it is sometimes wrong by
chance; products of large numbers are mostly taken for sums; the rest goes on from a wrong result.
Rows with nothing but the answer imitate the same work and end with the answer that is shown,
whatever the steps gave. Rows with worked steps in the prompt copy their results, and come back to
them after one that differs. To make copying the only way, the shown steps of some rows are made up.
What a teacher knows is then what it is shown: it is silent about steps that it does not see.
"""

import random

from absl import app, flags

from experiments import pretraining
from experiments.pretraining import Row
from jaxrl_sd import chains
from jaxrl_sd.chains import TEMPLATES, Chain
from jaxrl_sd.types import Problem
from jaxrl_sd.verify.chains import verify

flags.adopt_module_key_flags(pretraining)

# Shares of the kinds among hinted rows. `marker` shows nothing and is a row without a hint.
KINDS = {
    "answer": 0.2,
    "solution": 0.2,
    "answer_solution": 0.15,
    "answer_peer": 0.15,
    "peer": 0.15,
    "attempt": 0.05,
    "marker": 0.1,
}
TERSE = 0.35  # share of solutions that are the answer and no more
MADE_UP = 0.3  # share of rows whose shown steps have random results, which are copied all the same
# Shares of steps with a mistake where there is no hint: products of two numbers from LARGE on that
# are taken for sums, other results that are reduced, and those that are not.
LARGE = 5
MISCONCEPTIONS, SLIPS, EASY_SLIPS = 0.65, 0.12, 0.02
DETOURS = 0.15  # share of steps with a mistake where they are shown: seen, and not imitated


def slip(rng: random.Random, value: int) -> int:
    """A random result other than this one."""
    return (value + rng.randrange(1, chains.MODULUS)) % chains.MODULUS


def flawed_result(rng: random.Random, value: int, symbol: str, number: int) -> int:
    """The result of a step, or a mistake."""
    exact = chains.OPERATORS[symbol](value, number)
    result = exact % chains.MODULUS
    if symbol == "*" and min(value, number) >= LARGE:
        confused = rng.random() < MISCONCEPTIONS
        return chains.step_result(value, "+", number) if confused else result
    share = EASY_SLIPS if exact == result else SLIPS
    return slip(rng, result) if rng.random() < share else result


def flawed_values(rng: random.Random, chain: Chain) -> list[int]:
    """Results with mistakes, consistent with each other."""
    values = [chain.first]
    for symbol, number in chain.operations:
        values.append(flawed_result(rng, values[-1], symbol, number))
    return values[1:]


def failed_values(rng: random.Random, chain: Chain) -> list[int]:
    """Flawed results that end on a wrong answer."""
    while (values := flawed_values(rng, chain))[-1] == chains.results(chain)[-1]:
        pass
    return values


def with_detours(
    rng: random.Random, values: list[int], share: float
) -> tuple[list[int], list[float]]:
    """The results with mistakes in a share of them, and 0 in place of 1 where they are."""
    keep = [float(rng.random() >= share) for _ in values]
    shown = [value if kept else slip(rng, value) for value, kept in zip(values, keep, strict=True)]
    return shown, keep


def shown_values(rng: random.Random, chain: Chain) -> list[int]:
    """The results in the prompt, which the response copies."""
    if rng.random() < MADE_UP:
        return [rng.randrange(chains.MODULUS) for _ in chain.operations]
    return chains.results(chain)


def draw_row(rng: random.Random, problem: Problem, kind: str, ramp: float) -> Row:
    """A row for one problem with a hint of one kind, or with none."""
    chain = chains.parse_prompt(problem.prompt)
    shown = shown_values(rng, chain)
    terse = kind in ("solution", "answer_solution") and rng.random() < TERSE
    if terse or kind in ("nothing", "marker", "attempt", "answer"):
        values, weight = flawed_values(rng, chain), [1.0] * len(shown)
    else:
        values, weight = with_detours(rng, shown, DETOURS * ramp)
    final = values[-1] if kind in ("nothing", "marker", "attempt") else shown[-1]
    peer = failed_values(rng, chain) if kind == "attempt" else shown
    slots = {
        "problem": problem.prompt,
        "answer": str(shown[-1]),
        "solution": str(shown[-1]) if terse else chains.solution_text(chain, shown),
        "peer": chains.solution_text(chain, peer),
    }
    response = [*chains.solution_text(chain, values).split()[:-1], str(final)]
    per_step = [w for step_weight in weight for w in (1.0, 1.0, 1.0, step_weight)]
    return pretraining.make_row(TEMPLATES[kind], slots, response, [1.0, *per_step, 1.0, 1.0])


def held_out_peer(rng: random.Random, problem: Problem, kind: str) -> str:
    """The problem's own solution stands in for a verified peer."""
    if kind == "attempt":
        chain = chains.parse_prompt(problem.prompt)
        return chains.solution_text(chain, failed_values(rng, chain))
    return problem.solution


TASK = pretraining.Task(
    vocabulary=chains.vocabulary(),
    problems=chains.problems,
    templates=TEMPLATES,
    kinds=KINDS,
    draw_row=draw_row,
    peer=held_out_peer,
    verify=verify,
    plain_prompt=16,
    max_prompt=45,
    max_response=28,
)


def main(_) -> None:
    pretraining.run(TASK)


if __name__ == "__main__":
    app.run(main)
