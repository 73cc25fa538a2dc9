"""Runs verifiers in worker processes that can be killed (Linux).

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
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import NamedTuple

from jaxrl_sd.verify import VERIFIERS

_MEMORY_BYTES = 4 << 30  # address space of one worker
_START_SECONDS = 120.0  # to start Python and import a verifier, which no answer pays for
_MAX_CHUNK = 16  # answers sent to a worker at a time: one round trip for many cheap answers

Job = tuple[str, str, str, str]  # "module:function", prompt, answer, response


class Verdict(NamedTuple):
    """What became of one answer."""

    correct: bool | None  # None unless status is "ok"
    status: str  # "ok"; "timeout": killed at its deadline; "error": the verifier raised or died
    feedback: str = ""  # what the verifier said about the answer


@dataclasses.dataclass
class _Worker:
    process: subprocess.Popen
    channel: Connection
    pending: deque[int]  # indices of the answers it has and did not judge yet, in their order
    imported: bool = False  # whether it works on `pending` by now
    deadline: float = 0.0  # of its next message, on the monotonic clock


class VerifierPool:
    """Judges answers in `workers` processes, each answer within `timeout_s` seconds.

    The processes start at once and in the background, are started afresh rather than forked (JAX
    has threads), and import nothing but the verifiers that they are asked for. They do not outlive
    this process, however it ends. Use the pool as a context manager, from any thread.

    Raises:
      InputError: `workers` or `timeout_s` is not positive.
    """

    def __init__(self, workers: int, timeout_s: float):
        if workers < 1:
            raise _input_error(f"workers: got {workers}, expected at least 1")
        if not timeout_s > 0:
            raise _input_error(f"timeout_s: got {timeout_s}, expected more than 0 seconds")
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._workers = [_start_worker() for _ in range(workers)]

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
        jobs = [(_target(name), *texts) for name, *texts in items]
        with self._lock:
            if not self._workers:
                raise RuntimeError("the verifier pool is closed")
            try:
                return self._grade(jobs)
            finally:
                # Work is left only after an exception: its late results must meet no later call.
                self._replace(lambda worker: bool(worker.pending))

    def _grade(self, jobs: list[Job]) -> list[Verdict]:
        self._replace(lambda worker: worker.process.poll() is not None)
        verdicts: list[Verdict | None] = [None] * len(jobs)
        queue = deque(range(len(jobs)))
        while queue or any(worker.pending for worker in self._workers):
            self._hand_out(jobs, queue)
            busy = [worker for worker in self._workers if worker.pending]
            seconds = min(worker.deadline for worker in busy) - time.monotonic()
            readable = wait([worker.channel for worker in busy], max(seconds, 0.0))
            now = time.monotonic()  # once: to replace one worker must not cost another its answer
            for worker in busy:
                if worker.channel in readable:
                    failure = _receive(worker, verdicts, self._timeout_s)
                else:
                    failure = "timeout" if now > worker.deadline else None
                if failure is not None:
                    self._give_up(worker, failure, verdicts, queue)
        return verdicts

    def _hand_out(self, jobs: list[Job], queue: deque[int]) -> None:
        """Sends work to the idle workers, in chunks that shrink so that they finish together."""
        for worker in self._workers:
            if queue and not worker.pending:
                size = min(_MAX_CHUNK, -(-len(queue) // (2 * len(self._workers))))
                worker.pending.extend(queue.popleft() for _ in range(size))
                worker.imported = False
                worker.deadline = time.monotonic() + _START_SECONDS
                try:
                    worker.channel.send([jobs[index] for index in worker.pending])
                except OSError as error:
                    raise RuntimeError("a verifier process died as it started") from error

    def _give_up(
        self, worker: _Worker, status: str, verdicts: list[Verdict | None], queue: deque[int]
    ) -> None:
        """Blames the answer that the worker was at, and hands its others to a new worker."""
        if not worker.imported:
            raise RuntimeError(f"a verifier process was lost as it started ({status})")
        verdicts[worker.pending.popleft()] = Verdict(None, status)
        queue.extendleft(reversed(worker.pending))
        self._replace(lambda other: other is worker)

    def _replace(self, is_lost: Callable[[_Worker], bool]) -> None:
        for position, worker in enumerate(self._workers):
            if is_lost(worker):
                _stop_worker(worker)
                self._workers[position] = _start_worker()


def _receive(worker: _Worker, verdicts: list[Verdict | None], timeout_s: float) -> str | None:
    """Takes one message of the worker; returns "error" where the worker is dead."""
    try:
        message = worker.channel.recv()
    except (EOFError, OSError):
        return "error"
    if isinstance(message, str):
        raise RuntimeError(f"a verifier cannot be imported: {message}")
    if isinstance(message, Verdict):
        verdicts[worker.pending.popleft()] = message
    worker.imported = True
    worker.deadline = time.monotonic() + timeout_s
    return None


def _target(name: str) -> str:
    if name not in VERIFIERS:
        raise _input_error(f"verifier: got {name!r}, expected one of {sorted(VERIFIERS)}")
    return VERIFIERS[name]


def _input_error(message: str) -> ValueError:
    from jaxrl_sd.types import InputError  # here, because it imports JAX, which no worker may

    return InputError(message)


def _start_worker() -> _Worker:
    # Not multiprocessing.Process: its "spawn" imports the main module, hence JAX, once a worker.
    ours, theirs = Pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import _serve; _serve({theirs.fileno()})"],
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


# Below: what runs in a worker. To each list of jobs it answers with None once their verifiers are
# imported, then with one verdict a job, in order; or with a string, the reason why it cannot.


def _serve(descriptor: int) -> None:
    _die_with_parent()
    _limit_memory()
    channel = Connection(descriptor)
    while True:
        jobs = channel.recv()
        try:
            verifiers = {target: _import_target(target) for target, *_ in jobs}
        except Exception as error:
            channel.send(f"{type(error).__name__}: {error}")
            continue
        channel.send(None)
        for target, *texts in jobs:
            channel.send(_judge(verifiers[target], *texts))


def _judge(verify: Callable[[str, str, str], bool | tuple[bool, str]], *texts: str) -> Verdict:
    try:
        outcome = verify(*texts)
        correct, feedback = outcome if isinstance(outcome, tuple) else (outcome, "")
        return Verdict(bool(correct), "ok", str(feedback))
    except MemoryError:
        os._exit(1)  # a cache may still hold what filled the memory, so start afresh
    except Exception as error:
        print(f"{verify.__module__}: {type(error).__name__}: {error}", file=sys.stderr)
        return Verdict(None, "error")


def _import_target(target: str) -> Callable[[str, str, str], bool]:
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


def _limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
