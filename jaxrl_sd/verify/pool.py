"""Runs verifiers, and other functions, in worker processes that can be killed (Linux).

A process that can be killed is the only safe bound on the time of a computer algebra system:
`signal.alarm` works on the main thread only and never interrupts a computation in C. So every
answer has a deadline, and a worker that misses it, or dies, costs that one answer and is replaced.
"""

import dataclasses
import fcntl
import importlib
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxrl_sd.verify import VERIFIERS

if TYPE_CHECKING:  # it imports JAX, which no worker may
    from jaxrl_sd.types import Problem

_START_SECONDS = 120.0  # to start Python and import a verifier, which no answer pays for
_MAX_CHUNK = 16  # answers sent to a worker at a time: one round trip for many cheap answers

Job = tuple[str, tuple]  # "module:function", its arguments


class Outcome(NamedTuple):
    """What became of one call."""

    value: Any  # what the function returned, None unless status is "ok"
    status: str  # "ok"; "timeout": killed at its deadline; "error": the function raised or died
    error: str = ""  # what it raised


class Verdict(NamedTuple):
    """What became of one answer."""

    correct: bool | None  # None unless status is "ok"
    status: str  # of an `Outcome`; "none": no reward function could score the answer
    feedback: str = ""  # what the verifier said about the answer
    score: float | None = None  # 1 or 0 from a verifier, None where `correct` is None
    rewards: Mapping[str, float | None] = {}  # of each reward function, by name


@dataclasses.dataclass
class _Worker:
    process: subprocess.Popen
    channel: Connection
    pending: deque[int]  # indices of the jobs it has and did not finish yet, in their order
    imported: bool = False  # whether it works on `pending` by now
    deadline: float = 0.0  # of its next message, on the monotonic clock


class VerifierPool:
    """Judges answers in `workers` processes, each answer within `timeout_s` seconds.

    The processes start at once and in the background, are started afresh rather than forked (JAX
    has threads), and import nothing but the verifiers that they are asked for. They do not outlive
    this process, however it ends. Use the pool as a context manager, from any thread.

    Args:
      workers: how many processes.
      timeout_s: for one answer.
      memory_bytes: address space of one process, None without a limit.

    Raises:
      InputError: `workers` or `timeout_s` is not positive.
    """

    def __init__(self, workers: int, timeout_s: float, memory_bytes: int | None = 4 << 30):
        if workers < 1:
            raise input_error(f"workers: got {workers}, expected at least 1")
        if not timeout_s > 0:
            raise input_error(f"timeout_s: got {timeout_s}, expected more than 0 seconds")
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._workers = [_start_worker(memory_bytes) for _ in range(workers)]

    def __enter__(self) -> "VerifierPool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Ends the worker processes; the pool cannot be used any more."""
        with self._lock:
            while self._workers:
                _stop_worker(self._workers.pop())

    def grade(self, items: Sequence[tuple[str, str, str, str]]) -> list[Verdict]:
        """Judges `items`, each (name of a verifier, prompt, answer, response), in their order.

        Raises:
          InputError: a verifier's name is unknown; nothing was judged.
          RuntimeError: a verifier cannot be imported, or the pool is closed.
        """
        jobs = [(_target(name), tuple(texts)) for name, *texts in items]
        return [_verdict(outcome) for outcome in self._run(jobs, _judgement)]

    def judge(
        self,
        problems: Sequence["Problem"],
        texts: Sequence[str],
        ids: Sequence[Sequence[int]] = (),
    ) -> list[Verdict]:
        """What each problem's own verifier says about one response to it.

        Args:
          problems: one a response.
          texts: of the responses.
          ids: their tokens, which no verifier looks at.

        Raises:
          InputError: as `grade`.
        """
        del ids
        pairs = zip(problems, texts, strict=True)
        return self.grade([(p.verifier, p.prompt, p.answer, text) for p, text in pairs])

    def map(self, target: str, arguments: Sequence[tuple]) -> list[Any]:
        """`target(*a)` for each a of `arguments`; None where it raised, died or took too long.

        Args:
          target: "module:function"; values have to be plain data.

        Raises:
          RuntimeError: it cannot be imported, or the pool is closed.
        """
        return [outcome.value for outcome in self.run(target, arguments)]

    def run(self, target: str, arguments: Sequence[tuple]) -> list[Outcome]:
        """As `map`, and says what went wrong."""
        return self._run([(target, tuple(each)) for each in arguments], _as_it_is)

    def _run(self, jobs: list[Job], read: Callable[[Any], Any]) -> list[Outcome]:
        """Outcomes of the jobs in their order; `read` is applied to each value by the worker."""
        with self._lock:
            if not self._workers:
                raise RuntimeError("the verifier pool is closed")
            try:
                return self._run_all(jobs, read)
            finally:
                # Work is left only after an exception: its late results must meet no later call.
                self._replace(lambda worker: bool(worker.pending))

    def _run_all(self, jobs: list[Job], read: Callable[[Any], Any]) -> list[Outcome]:
        self._replace(lambda worker: worker.process.poll() is not None)
        outcomes: list[Outcome | None] = [None] * len(jobs)
        queue = deque(range(len(jobs)))
        while queue or any(worker.pending for worker in self._workers):
            self._hand_out(jobs, read, queue)
            busy = [worker for worker in self._workers if worker.pending]
            seconds = min(worker.deadline for worker in busy) - time.monotonic()
            readable = wait([worker.channel for worker in busy], max(seconds, 0.0))
            now = time.monotonic()  # once: to replace one worker must not cost another its answer
            for worker in busy:
                if worker.channel in readable:
                    failure = _receive(worker, outcomes, self._timeout_s)
                else:
                    failure = "timeout" if now > worker.deadline else None
                if failure is not None:
                    self._give_up(worker, failure, outcomes, queue)
        return outcomes

    def _hand_out(self, jobs: list[Job], read: Callable[[Any], Any], queue: deque[int]) -> None:
        """Sends work to the idle workers, in chunks that shrink so that they finish together."""
        for worker in self._workers:
            if queue and not worker.pending:
                size = min(_MAX_CHUNK, -(-len(queue) // (2 * len(self._workers))))
                worker.pending.extend(queue.popleft() for _ in range(size))
                worker.imported = False
                worker.deadline = time.monotonic() + _START_SECONDS
                try:
                    worker.channel.send((read, [jobs[index] for index in worker.pending]))
                except OSError as error:
                    raise RuntimeError("a verifier process died as it started") from error

    def _give_up(
        self, worker: _Worker, status: str, outcomes: list[Outcome | None], queue: deque[int]
    ) -> None:
        """Blames the job that the worker was at, and hands its others to a new worker."""
        if not worker.imported:
            raise RuntimeError(f"a verifier process was lost as it started ({status})")
        outcomes[worker.pending.popleft()] = Outcome(None, status)
        queue.extendleft(reversed(worker.pending))
        self._replace(lambda other: other is worker)

    def _replace(self, is_lost: Callable[[_Worker], bool]) -> None:
        for position, worker in enumerate(self._workers):
            if is_lost(worker):
                _stop_worker(worker)
                self._workers[position] = _start_worker(self._memory_bytes)


def _receive(worker: _Worker, outcomes: list[Outcome | None], timeout_s: float) -> str | None:
    """Takes one message of the worker; returns "error" where the worker is dead."""
    try:
        message = worker.channel.recv()
    except (EOFError, OSError):
        return "error"
    if isinstance(message, str):
        raise RuntimeError(f"a verifier cannot be imported: {message}")
    if isinstance(message, Outcome):
        outcomes[worker.pending.popleft()] = message
    worker.imported = True
    worker.deadline = time.monotonic() + timeout_s
    return None


def _verdict(outcome: Outcome) -> Verdict:
    if outcome.status != "ok":
        return Verdict(None, outcome.status)
    correct, feedback = outcome.value
    return Verdict(correct, "ok", feedback, float(correct))


def _target(name: str) -> str:
    if name not in VERIFIERS:
        raise input_error(f"verifier: got {name!r}, expected one of {sorted(VERIFIERS)}")
    return VERIFIERS[name]


def input_error(message: str) -> ValueError:
    from jaxrl_sd.types import InputError  # here, because it imports JAX, which no worker may

    return InputError(message)


def _start_worker(memory_bytes: int | None) -> _Worker:
    # Not multiprocessing.Process: its "spawn" imports the main module, hence JAX, once a worker.
    ours, theirs = Pipe()
    serve = f"from {__name__} import _serve; _serve({theirs.fileno()}, {memory_bytes})"
    process = subprocess.Popen(
        [sys.executable, "-c", serve],
        stdin=subprocess.PIPE,  # never written to: `_die_with_parent` watches it
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        pass_fds=[theirs.fileno()],
        process_group=0,  # an interrupt from the keyboard is for the parent to handle
    )
    theirs.close()
    return _Worker(process, ours, deque())


def _stop_worker(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.wait()
    worker.process.stdin.close()
    worker.channel.close()


# Below: what runs in a worker. To each list of jobs it answers with None once their functions are
# imported, then with one outcome a job, in order; or with a string, the reason why it cannot.


def _serve(descriptor: int, memory_bytes: int | None) -> None:
    _die_with_parent()
    if memory_bytes is not None:
        _limit_memory(memory_bytes)
    channel = Connection(descriptor)
    while True:
        read, jobs = channel.recv()
        try:
            functions = {target: _import_target(target) for target, _ in jobs}
        except Exception as error:
            channel.send(f"{type(error).__name__}: {error}")
            continue
        channel.send(None)
        for target, arguments in jobs:
            channel.send(_call(functions[target], arguments, read))


def _call(function: Callable, arguments: tuple, read: Callable[[Any], Any]) -> Outcome:
    try:
        return Outcome(read(function(*arguments)), "ok")
    except MemoryError:
        os._exit(1)  # a cache may still hold what filled the memory, so start afresh
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        print(f"{function.__module__}: {reason}", file=sys.stderr)
        return Outcome(None, "error", reason)


def _judgement(outcome: bool | tuple[bool, str]) -> tuple[bool, str]:
    correct, feedback = outcome if isinstance(outcome, tuple) else (outcome, "")
    return bool(correct), str(feedback)


def _as_it_is(value: Any) -> Any:
    return value


def _import_target(target: str) -> Callable:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


def _die_with_parent() -> None:
    """Has the kernel kill this process when the parent's end of its standard input closes.

    A thread that watches would not do: a computation in C keeps it from running. Nor would
    PR_SET_PDEATHSIG, which fires when the *thread* that started this process ends.
    """
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([0], [], [], 0)[0]:
        os._exit(1)  # the parent was gone before


def _limit_memory(memory_bytes: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
