"""Reward functions with the signature of TRL's GRPOTrainer, so that a user's own run unchanged.

    f(prompts, completions, completion_ids, **columns) -> list[float | None]

A function is called once for all samples of a batch: each argument is a list with one entry a
sample, and so is the result. None says that this function cannot score this sample. It may be a
coroutine function. `prompts` are texts and so are `completions`; where the data set's prompt is a
list of messages, a prompt is such a list and a completion the list of one assistant message.
`columns` are all other columns of the data set, and the problem's `answer` and `solution` where
the data set has none of that name. A function gets those of them that its signature names, or all
of them as `**kwargs`. Not given, unlike TRL: `trainer_state`, `log_extra`, `log_metric` and
`environments`.

The functions run in one process of their own that keeps their state from batch to batch and can be
killed. Whatever goes wrong there ends the run: a reward is never 0 for lack of a better one.
"""

import asyncio
import contextlib
import functools
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrl_sd.verify.pool import Verdict, VerifierPool, input_error

if TYPE_CHECKING:  # it imports JAX, which no worker may
    from jaxrl_sd.types import Problem

OF_SAMPLES = ("prompts", "completions", "completion_ids")
LARGEST = 1e9  # its square is summed in float32
HIDDEN = ("prompt", "completion", *OF_SAMPLES)  # columns that TRL does not pass on


class RewardFunctions:
    """Judges answers by the weighted sum of reward functions, as `VerifierPool` does by verifiers.

    A sample's score is the sum over the functions that could score it, and None where none could.
    Use it as a context manager.

    Args:
      functions: "file.py:name" or "module:name", each with a name of its own.
      weights: one a function; all 1 where empty.
      correct_above: a sample with a higher score counts as correct.
      timeout_s: for one function on one batch.
    """

    def __init__(
        self,
        functions: Sequence[str],
        weights: Sequence[float],
        correct_above: float,
        timeout_s: float,
    ):
        self._weights = dict(zip(functions, weights or [1.0] * len(functions), strict=True))
        self._correct_above = correct_above
        self._timeout_s = timeout_s
        self._pool = VerifierPool(1, timeout_s, memory_bytes=None)

    def __enter__(self) -> "RewardFunctions":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process of the functions."""
        self._pool.close()

    def check(self, problems: Sequence["Problem"]) -> None:
        """Whether the functions load, and these problems have what their signatures ask for.

        Raises:
          InputError: naming the function and what is wrong.
        """
        rows = [_row(problem) for problem in problems]
        known = {*OF_SAMPLES, *(name for row in rows for name in row)}
        required = self._run("required", [(target,) for target in self._weights])
        for target, names in required.items():
            for name in names:
                if name not in known:
                    raise input_error(
                        f"reward.functions: {target} needs the argument {name!r}, and there are "
                        f"{sorted(known)}"
                    )

    def judge(
        self, problems: Sequence["Problem"], texts: Sequence[str], ids: Sequence[Sequence[int]]
    ) -> list[Verdict]:
        """The score of one response to each problem, and what each function gave.

        Args:
          problems: one a response.
          texts: of the responses.
          ids: their tokens.

        Raises:
          InputError: a function raised, died, took too long, or did not return one number or None
            a sample.
        """
        arguments = batch_arguments(problems, texts, ids)
        given = self._run("call", [(target, arguments) for target in self._weights])
        return [
            self._verdict(dict(zip(given, rewards, strict=True)))
            for rewards in zip(*given.values(), strict=True)
        ]

    def _verdict(self, rewards: Mapping[str, float | None]) -> Verdict:
        named = {_name(target): reward for target, reward in rewards.items()}
        terms = [self._weights[target] * x for target, x in rewards.items() if x is not None]
        if not terms:
            return Verdict(None, "none", rewards=named)
        score = float(sum(terms))
        return Verdict(score > self._correct_above, "ok", "", score, named)

    def _run(self, function: str, arguments: Sequence[tuple]) -> dict[str, Any]:
        """What a function of this module returns in the process, for each target."""
        outcomes = self._pool.run(f"{__name__}:{function}", arguments)
        for (target, *_), outcome in zip(arguments, outcomes, strict=True):
            if outcome.status == "timeout":
                raise input_error(
                    f"reward.functions: {target} took longer than the {self._timeout_s} seconds "
                    "of reward.timeout_s"
                )
            if outcome.status == "error":
                reason = outcome.error.splitlines() or ["its process died"]
                raise input_error(f"reward.functions: {target} failed: {reason[0]}")
        return {a[0]: o.value for a, o in zip(arguments, outcomes, strict=True)}


def batch_arguments(
    problems: Sequence["Problem"], texts: Sequence[str], ids: Sequence[Sequence[int]]
) -> dict[str, list]:
    """The keyword arguments of a call, each a list with one entry a sample."""
    rows = [_row(problem) for problem in problems]
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        "prompts": [_prompt(problem) for problem in problems],
        "completions": [
            [{"role": "assistant", "content": text}] if problem.chat else text
            for problem, text in zip(problems, texts, strict=True)
        ],
        "completion_ids": [list(row) for row in ids],
        **{name: [row.get(name) for row in rows] for name in names},
    }


def _prompt(problem: "Problem") -> str | list[dict[str, str]]:
    if not problem.chat:
        return problem.prompt
    turns = (*problem.turns, ("user", problem.prompt))
    return [{"role": role, "content": text} for role, text in turns]


def _row(problem: "Problem") -> dict[str, Any]:
    own = {"answer": problem.answer, "solution": problem.solution}
    row = {name: text for name, text in own.items() if text} | problem.columns
    return {name: value for name, value in row.items() if name not in HIDDEN}


def _name(target: str) -> str:
    return target.rpartition(":")[2]


# Below: what runs in the process of the functions.


def required(target: str) -> list[str]:
    """Parameters that a function cannot do without."""
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, parameter in inspect.signature(load(target)).parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in optional
    ]


def call(target: str, arguments: Mapping[str, list]) -> list[float | None]:
    """What a function gives for a batch.

    Raises:
      ValueError: it is not one finite number or None a sample.
      Exception: whatever the function raises; its traceback goes to standard error.
    """
    function, count = load(target), len(arguments["completions"])
    parameters = inspect.signature(function).parameters.values()
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
        arguments = {p.name: arguments[p.name] for p in parameters if p.name in arguments}
    with contextlib.redirect_stdout(sys.stderr):  # the process has no standard output
        try:
            rewards = function(**arguments)
            if inspect.isawaitable(rewards):
                rewards = _event_loop().run_until_complete(_result(rewards))
        except Exception:
            traceback.print_exc()
            raise
    return _numbers(rewards, count)


def _numbers(rewards: Any, count: int) -> list[float | None]:
    try:
        rewards = list(rewards)
    except TypeError:
        raise ValueError(f"expected a list of rewards, got {rewards!r:.80}") from None
    if len(rewards) != count:
        raise ValueError(f"expected {count} rewards, one a completion, got {len(rewards)}")
    return [None if reward is None else _number(reward) for reward in rewards]


def _number(reward: Any) -> float:
    try:
        number = math.nan if isinstance(reward, str | bytes) else float(reward)
    except (TypeError, ValueError, RuntimeError):  # the last of a tensor with several elements
        number = math.nan
    if not abs(number) <= LARGEST:  # nor NaN
        raise ValueError(
            f"expected None or numbers of at most {LARGEST:.0e} as rewards, got {reward!r:.80}"
        )
    return number


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()  # one for all batches: clients belong to their event loop


async def _result(awaitable: Awaitable) -> Any:
    return await awaitable


@functools.cache
def load(target: str) -> Callable[..., Any]:
    """The function that "file.py:name" or "module:name" names.

    Raises:
      Exception: whatever the import raises.
    """
    source, name = target.rsplit(":", 1)
    if not source.endswith(".py"):
        return getattr(importlib.import_module(source), name)
    return getattr(_import_file(Path(source).resolve()), name)


@functools.cache
def _import_file(path: Path) -> Any:
    sys.path.insert(0, str(path.parent))  # as for a script
    # Not under the file's own name, which may be that of another module.
    spec = importlib.util.spec_from_file_location(str(path), path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
