"""Supervised training of the tiny base model of the built-in task, from scratch.

    python -m experiments.pretrain_tiny --output_dir=jaxrl_sd/assets/tiny

About five minutes on two free cores. The rows teach to use a hint in the prompt, to go on sensibly
after a step that the hint did not suggest, so that a teacher is of use off its own path, and to
take back a dead end with `no`. Rows without a hint imitate flawed work: half of those with three
or more numbers begin with random steps, and most that end on a wrong result stop there. That is
what reinforcement learning then improves on.
"""

import random

from absl import app, flags

from experiments import pretraining
from experiments.pretraining import Row
from jaxrl_sd import countdown
from jaxrl_sd.countdown import TEMPLATES, Step
from jaxrl_sd.types import Problem
from jaxrl_sd.verify.countdown import verify

flags.adopt_module_key_flags(pretraining)

MAX_RESPONSE = 24
MAX_STEPS = 4  # steps of arithmetic that fit in MAX_RESPONSE, with their separators and the end
# Shares of the kinds among hinted rows. `marker` shows nothing and is a row without a hint.
KINDS = {
    "answer": 0.25,
    "solution": 0.15,
    "answer_solution": 0.15,
    "answer_peer": 0.15,
    "peer": 0.15,
    "attempt": 0.05,
    "marker": 0.1,
}
# Shares of rows that begin with random steps. With a hint these are shown and not imitated, so that
# a teacher can go on from anywhere; without one they are the mistakes of imperfect demonstrations.
HINTED_DETOURS = 0.4
PEER_DETOURS = 0.2
PLAIN_MISTAKES = 0.5
GIVE_UP = 0.75  # share of wrong complete attempts without a hint that are not taken back


def right_steps(steps: tuple[Step, ...]) -> tuple[list[str], list[float]]:
    """Words and weights of steps to imitate."""
    words = countdown.solution_text(steps).split()
    return words, [1.0] * len(words)


def random_steps(steps: list[Step], choice: float) -> tuple[list[str], list[float]]:
    """Words and weights of random steps: `choice` is the weight of all but their arithmetic."""
    words = countdown.solution_text(steps).split()
    return words, ([choice, choice, choice, 1.0, 1.0, choice] * len(steps))[:-1]


def wander(
    rng: random.Random, numbers: tuple[int, ...], count: int
) -> tuple[list[Step], tuple[int, ...]]:
    """`count` random legal steps, and the numbers they leave."""
    steps = []
    for _ in range(count):
        step, numbers = rng.choice(countdown.legal_steps(numbers))
        steps.append(step)
    return steps, numbers


def stumble(
    rng: random.Random, numbers: tuple[int, ...], target: int, goal: tuple[Step, ...], hinted: bool
) -> tuple[list[str], list[float]]:
    """A response that begins with random steps and makes the best of them.

    It goes on to a solution if there still is one, else it starts over and reaches `goal`; but
    without a hint it often gives up on a wrong result.
    """
    longest = min(len(goal), MAX_STEPS - len(goal))
    steps, left = wander(rng, numbers, rng.randint(1, longest))
    words, weight = random_steps(steps, choice=0.0 if hinted else 1.0)
    ways = countdown.solutions(left, target)
    if ways:
        ending = rng.choice(ways)
        joint = [";"] if ending else []
    elif len(left) == 1 and not hinted and rng.random() < GIVE_UP:
        joint, ending = [], ()
    else:
        joint, ending = [countdown.RETRY], goal
    more, more_weight = right_steps(ending)
    return words + joint + more, weight + [1.0] * len(joint) + more_weight


def failed_attempt(rng: random.Random, numbers: tuple[int, ...], target: int) -> str:
    """A complete attempt that misses the target; the last one drawn if all are right."""
    for _ in range(8):
        steps, left = wander(rng, numbers, len(numbers) - 1)
        if left != (target,):
            break
    return countdown.solution_text(steps)


def peer_text(
    rng: random.Random, numbers: tuple[int, ...], target: int, goal: tuple[Step, ...], kind: str
) -> str:
    """A peer's response: a failure for the kind `attempt`, else right, some after a detour."""
    if kind == "attempt":
        return failed_attempt(rng, numbers, target)
    if rng.random() < PEER_DETOURS:
        return " ".join(stumble(rng, numbers, target, goal, hinted=True)[0])
    return countdown.solution_text(goal)


def draw_row(rng: random.Random, problem: Problem, kind: str, ramp: float) -> Row:
    """A row for one problem with a hint of one kind, or with none."""
    numbers, target = countdown.parse_prompt(problem.prompt)
    ways = countdown.solutions(numbers, target)
    goal = rng.choice(ways)
    hinted = kind not in ("nothing", "marker")
    response, weight = right_steps(goal)
    share = HINTED_DETOURS if hinted else PLAIN_MISTAKES * (len(numbers) > 2)
    if rng.random() < share * ramp:
        response, weight = stumble(rng, numbers, target, goal, hinted)
    peer = peer_text(rng, numbers, target, goal, kind)
    # A peer's way is seldom the one that the answer names; the peer is followed.
    named = rng.choice(ways) if kind == "answer_peer" else goal
    slots = {
        "problem": problem.prompt,
        "answer": countdown.answer_text(named),
        "solution": countdown.solution_text(goal),
        "peer": peer,
    }
    return pretraining.make_row(TEMPLATES[kind], slots, response, weight)


def held_out_peer(rng: random.Random, problem: Problem, kind: str) -> str:
    """The problem's own solution stands in for a verified peer."""
    if kind == "attempt":
        return failed_attempt(rng, *countdown.parse_prompt(problem.prompt))
    return problem.solution


TASK = pretraining.Task(
    vocabulary=countdown.vocabulary(),
    problems=countdown.problems,
    templates=TEMPLATES,
    kinds=KINDS,
    draw_row=draw_row,
    peer=held_out_peer,
    verify=verify,
    plain_prompt=9,
    max_prompt=44,
    max_response=MAX_RESPONSE,
)


def main(_) -> None:
    pretraining.run(TASK)


if __name__ == "__main__":
    app.run(main)
