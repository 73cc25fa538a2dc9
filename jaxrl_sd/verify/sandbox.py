"""Runs an untrusted Python program with nothing of the machine within its reach (Linux).

One sandbox holds one program, and runs it as often as there are tests, each time in a new process;
only the scratch folder stays from test to test. Around it are new user, process, mount, network,
IPC and host name namespaces: the process namespace ends with its first process, so nothing outlives
it, and no process outside can be seen or signalled. The file tree holds Python's standard library,
numpy and the system's shared libraries, all read-only, and a scratch folder in memory; there is no
/proc and no /dev. The program has no privilege, an unprivileged user id (root becomes nobody), a
system call filter, and limits on all that it could use up. What it may have in memory at a time is
`PROCESSES * MEMORY_BYTES`, the scratch folder, and some tens of MB of pipes.

What it does not hide: the processor and its timing, the kernel's version, the machine's size, the
names of the folders that Python is in, and `launcher`, whose code runs beside the program. A bug
of the kernel is a way out. Where the kernel or the container refuses a part of this, no program
runs. RLIMIT_NPROC counts the processes of a user namespace, not of a user, since Linux 5.14.
"""

import contextlib
import functools
import importlib.util
import json
import os
import platform
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from jaxrl_sd.verify import launcher
from jaxrl_sd.verify.launcher import MEMORY_BYTES, OPEN_FILES, PROCESSES, SCRATCH_BYTES

_START_SECONDS = 30.0
_GRACE_SECONDS = 10.0  # beyond a test's time, until the sandbox itself counts as broken
_ROOT = str(Path(__file__).parents[2])
_LAUNCH = f"import sys; sys.path.append({_ROOT!r}); from {launcher.__name__} import main; main()"


class Outcome(NamedTuple):
    """What one run of the program did."""

    status: str  # "ended"; "time" or "output": stopped at that limit
    code: int  # exit code of the process, negative: the signal that ended it
    stdout: str
    stderr: str  # its end
    value: str  # the value of `expression` as `read_value` takes it, "" where there was none


class Sandbox:
    """A sandbox with one program in it, to be used as a context manager, from one thread.

    Each run starts with `preamble`, in the program's namespace: imports that it may count on. All
    processes are killed when the sandbox is closed, or when the thread that made it ends, however.

    Raises:
      RuntimeError: some isolation is not to be had on this machine, named in the message, or the
        sandbox broke; no program ran with less.
    """

    def __init__(self, program: str, preamble: str = ""):
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _LAUNCH, *_packages()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"OPENBLAS_NUM_THREADS": "1"},  # numpy's threads would count as processes
            start_new_session=True,
        )
        self._buffer = bytearray()
        try:
            self._receive(_START_SECONDS)  # it is in its namespaces
            _map_users(self._process.pid)
            self._send({"preamble": preamble, "program": program})
            self._receive(_START_SECONDS)  # it is isolated
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Kills every process of the sandbox and waits for them."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # its first process then ends, and with it all others
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the first process is killed with its parent
            self._process.wait()
        self._process.stdout.close()

    def run_main(self, stdin: str, seconds: float) -> Outcome:
        """Runs the program as Python does a script, with `stdin` as its standard input."""
        return self._run({"stdin": stdin}, seconds)

    def evaluate(self, setup: str, expression: str, seconds: float) -> Outcome:
        """Imports the program, then runs `setup` and evaluates `expression` in its namespace."""
        return self._run({"stdin": "", "setup": setup, "expression": expression}, seconds)

    def _run(self, test: dict, seconds: float) -> Outcome:
        self._send({**test, "seconds": seconds})
        return Outcome(**self._receive(seconds + _GRACE_SECONDS))

    def _send(self, message: dict) -> None:
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise RuntimeError("sandbox: it ended before its program did") from error

    def _receive(self, seconds: float) -> dict:
        deadline = time.monotonic() + seconds
        while not self._buffer.endswith(b"\n"):
            left = max(deadline - time.monotonic(), 0.0)
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise RuntimeError(f"sandbox: it did not answer within {seconds:.0f} s")
            data = os.read(self._process.stdout.fileno(), 1 << 16)
            if not data:
                raise RuntimeError("sandbox: it ended before its program did")
            self._buffer += data
        message = json.loads(self._buffer)
        self._buffer.clear()
        if "error" in message:
            raise RuntimeError(f"sandbox: missing on this machine: {message['error']}")
        return message


def _packages() -> list[str]:
    """numpy's folders, for tests that import it."""
    spec = importlib.util.find_spec("numpy")
    if spec is None:
        return []
    folder = os.path.realpath(spec.submodule_search_locations[0])
    return [path for path in (folder, f"{folder}.libs") if os.path.isdir(path)]


def _map_users(pid: int) -> None:
    """Gives the user namespace of `pid` the ids of this one, or this user's where it is not root.

    Raises:
      RuntimeError: the kernel refuses.
    """
    folder = Path(f"/proc/{pid}")
    own = {
        "gid_map": f"{os.getegid()} {os.getegid()} 1",
        "uid_map": f"{os.geteuid()} {os.geteuid()} 1",
    }
    try:
        if os.geteuid() != 0:
            (folder / "setgroups").write_text("deny")  # else no user may set gid_map
        for name, ids in own.items():
            if os.geteuid() == 0:
                lines = Path(f"/proc/self/{name}").read_text().splitlines()
                ids = "\n".join("{0} {0} {2}".format(*line.split()) for line in lines)
            (folder / name).write_text(ids)
    except OSError as error:
        raise RuntimeError(f"sandbox: missing on this machine: user ids: {error}") from error


_VALUES = {
    "tuple": tuple,
    "set": set,
    "dict": dict,
    "bytes": bytes,
    "complex": lambda parts: complex(*parts),
}


def read_value(text: str) -> object:
    """The plain data in `Outcome.value`; ValueError where it is none.

    The program itself may have written that text, so nothing but plain data can come out of it.
    """
    try:
        return json.loads(text, object_hook=_read_tagged)
    except Exception as error:  # whatever the text makes fail, memory and recursion included
        raise ValueError("not plain data") from error


def _read_tagged(tagged: dict) -> object:
    ((kind, items),) = tagged.items()
    if not isinstance(items, list):  # bytes(10**9) would be a GB
        raise ValueError(kind)
    return _VALUES[kind](items)


# What it proves is asked of the sandbox itself, since kernels and containers differ in what they
# silently ignore. Each line of the result is one isolation and whether it holds.
_PROBE = f"""
import decimal, os, socket, sys, time, zlib

def refuses(action, *errors):
    try:
        action()
    except errors:
        return True
    return False

def fork_all():
    children = 0
    while children < {PROCESSES + 8}:
        try:
            if not os.fork():
                time.sleep(5)
                os._exit(0)
        except BlockingIOError:
            break
        children += 1
    return children

def fill(name):
    with open(name, "wb") as file:
        file.write(bytes({SCRATCH_BYTES}))

def probe():
    return {{
        "process namespace": os.getpid() < 10 and os.getppid() == 1,
        "unprivileged user": 0 not in (os.getuid(), os.geteuid(), os.getgid()),
        "no privileges": refuses(lambda: os.chroot("."), PermissionError),
        "private file tree": not any(map(os.path.exists, ["/old", "/proc", "/etc", {__file__!r}])),
        "read-only file tree": all(os.statvfs(path).f_flag & os.ST_RDONLY for path in sys.path[1:])
        and refuses(lambda: open("/file", "w"), OSError),
        "scratch folder": os.getcwd() == "/tmp" and open("file", "w").write("text") == 4,
        "scratch limit": refuses(lambda: [fill(name) for name in "ab"], OSError),
        "system call filter": refuses(socket.socket, PermissionError)
        and refuses(lambda: os.memfd_create("memory"), PermissionError),
        "memory limit": refuses(lambda: bytearray({MEMORY_BYTES}), MemoryError),
        "file limit": refuses(lambda: [os.dup(0) for _ in range({OPEN_FILES})], OSError),
        "process limit (RLIMIT_NPROC, Linux 5.14)": fork_all() == {PROCESSES - 1},
    }}
"""


@functools.cache
def check() -> None:
    """Proves, by a probe in a sandbox, that programs are isolated here; once per process.

    Raises:
      RuntimeError: the isolation that is missing.
    """
    if sys.platform != "linux" or platform.machine() not in launcher.ARCHITECTURES:
        raise RuntimeError(
            f"sandbox: got {sys.platform} on {platform.machine()}, "
            f"expected linux on one of {sorted(launcher.ARCHITECTURES)}"
        )
    with Sandbox(_PROBE) as sandbox:
        outcome = sandbox.evaluate("", "probe()", _GRACE_SECONDS)
    if not outcome.value:
        raise RuntimeError(f"sandbox: its probe failed: {outcome.status}: {outcome.stderr}")
    missing = [name for name, holds in read_value(outcome.value).items() if not holds]
    if missing:
        raise RuntimeError(f"sandbox: missing on this machine: {', '.join(missing)}")
