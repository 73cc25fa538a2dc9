"""What runs in a sandbox's own processes, see `sandbox`; imports nothing but the standard library.

The launcher isolates itself and starts the first process of the process namespace, which starts one
process a test. Its requests and replies are lines of JSON on its standard input and output; no
process of the program has either.
"""

import atexit
import contextlib
import ctypes
import errno
import gc
import json
import linecache
import math
import os
import platform
import resource
import select
import signal
import site
import struct
import sys
import threading
import time
import traceback
import types
from pathlib import Path
from typing import NoReturn

PROCESSES = 4  # at a time, threads included
MEMORY_BYTES = 1 << 30  # address space of one process
SCRATCH_BYTES = 32 << 20  # the only writable folder, in memory; also the longest file
SCRATCH_FILES = 1024
OPEN_FILES = 64
OUTPUT_BYTES = 4 << 20  # a program that writes more is stopped

_NOBODY = 65534
_CLONE_NEW = 0x7E020000  # a mount, cgroup, host name, IPC, user, process and network namespace
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
_MNT_DETACH = 2
_MOUNT_READ_ONLY = 1 | 2 | 4  # MOUNT_ATTR_RDONLY, NOSUID, NODEV
_AT_RECURSIVE = 0x8000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_FILTER, _SECCOMP_ERRNO, _SECCOMP_KILL, _SECCOMP_ALLOW = 2, 0x50000, 0x80000000, 0x7FFF0000
_CAPABILITY_VERSION = 0x20080522
_MOUNT_SETATTR = 442  # the same number on every architecture

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, audit number
_SYSCALLS = {  # x86_64, aarch64
    "clone": (56, 220),
    "clone3": (435, 435),
    "pivot_root": (155, 41),
    "prlimit64": (302, 261),
}
# Ways to new privileges, to another process (the first one has the same user), to the network (a
# virtual machine's host is reached by sockets that no namespace holds), and to memory that no limit
# counts.
_DENIED = {
    "unshare": (272, 97),
    "setns": (308, 268),
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "ioprio_set": (251, 30),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}


def main() -> None:
    sys.path.pop()  # this package; a program imports the standard library and numpy
    for name in [name for name in sys.modules if __name__.startswith(name)]:
        del sys.modules[name]
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process gets what it has handlers for
    requests = open(0, "rb", closefd=False)
    try:
        _call("new namespaces", "unshare", _CLONE_NEW)
        _reply({})
        line = requests.readline()
        if not line:
            os._exit(1)  # the parent is gone, or could not map the users
        sources = json.loads(line)
        stdin = os.memfd_create("stdin")
        _isolate(packages=sys.argv[1:])
    except OSError as error:
        _reply({"error": str(error)})
        sys.exit(1)
    _die_with_parent()
    first = os.fork()
    if first:
        os.waitpid(first, 0)
    else:
        _die_with_parent()
        _call("no look inside", "prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
        _reply({})
        gc.freeze()  # what is here stays shared with the processes that are forked off
        for request in requests:
            _reply(_run_test(sources, stdin, json.loads(request)))
    os._exit(0)  # at once: Python's own end takes longer than a test


def _reply(message: dict) -> None:
    data = memoryview(json.dumps(message).encode() + b"\n")
    while data:
        data = data[os.write(1, data) :]


def _call(step: str, function: str, *arguments) -> None:
    """Calls a function of the C library.

    Raises:
      OSError: it failed; `step` and the reason.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{step}: {os.strerror(code)}")


def _die_with_parent() -> None:
    _call("death with its parent", "prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
    if select.select([0], [], [], 0)[0]:  # no request can be there yet, so it is the end
        os._exit(1)  # the parent was gone before


def _isolate(packages: list[str]) -> None:
    _enter_file_tree(packages)
    if os.geteuid() == 0:
        _call("unprivileged user", "setgroups", 0, None)
        _call("unprivileged user", "setresgid", _NOBODY, _NOBODY, _NOBODY)
        _call("unprivileged user", "setresuid", _NOBODY, _NOBODY, _NOBODY)
    header = struct.pack("Ii", _CAPABILITY_VERSION, 0)
    _call("no privileges", "capset", header, bytes(24))
    _call("no new privileges", "prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _filter_system_calls()


def _enter_file_tree(packages: list[str]) -> None:
    """Makes a file tree of the libraries and an empty scratch folder, and leaves the old one."""
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    folders = {path: path for path in [*sys.path, *_library_folders()] if os.path.isdir(path)}
    folders |= {path: f"/packages/{os.path.basename(path)}" for path in packages}
    sources = {target: os.path.realpath(path) for path, target in folders.items()}
    links = {path: os.readlink(path) for path in ("/lib", "/lib64") if os.path.islink(path)}

    _mount_memory("/tmp", "size=1m,mode=755")
    os.mkdir("/tmp/old")
    os.chdir("/tmp")
    _call("new root", "syscall", _syscall(_SYSCALLS["pivot_root"]), b".", b"old")
    os.chdir("/")
    for path, link in links.items():
        os.symlink(link, path)
    for target, source in sources.items():
        os.makedirs(target, exist_ok=True)
        _mount(f"/old{source}", target, None, _MS_BIND | _MS_REC)
    for path in sys.path:
        for hidden in ("site-packages", "dist-packages"):
            if os.path.isdir(f"{path}/{hidden}"):
                _mount_memory(f"{path}/{hidden}", "size=1m,mode=755")
    _call("no old root", "umount2", b"/old", _MNT_DETACH)
    os.rmdir("/old")
    os.mkdir("/tmp")
    attributes = struct.pack("QQQQ", _MOUNT_READ_ONLY, 0, 0, 0)
    arguments = -1, b"/", _AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes))
    _call("read-only file tree", "syscall", _MOUNT_SETATTR, *arguments)
    _mount_memory("/tmp", f"size={SCRATCH_BYTES},nr_inodes={SCRATCH_FILES},mode=1777")
    os.chdir("/tmp")
    sys.path.append("/packages")


def _library_folders() -> set[str]:
    """Folders of the shared libraries that Python itself needs."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {os.path.dirname(line.split(maxsplit=5)[-1]) for line in lines if ".so" in line}


def _mount_memory(target: str, options: str) -> None:
    _mount("tmpfs", target, "tmpfs", _MS_NOSUID | _MS_NODEV, options)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    texts = [text and text.encode() for text in (source, target, kind, options)]
    _call(f"mount {target}", "mount", *texts[:3], ctypes.c_ulong(flags), texts[3] or None)


def _syscall(numbers: tuple[int, int]) -> int:
    return numbers[ARCHITECTURES[platform.machine()][0]]


def _filter_system_calls() -> None:
    """Has the kernel refuse `_DENIED`, new namespaces, and other machines' system calls."""
    load, equal, at_least, any_bit, end = 0x20, 0x15, 0x35, 0x45, 0x06
    _, architecture = ARCHITECTURES[platform.machine()]
    refuse = (end, 0, 0, _SECCOMP_ERRNO | errno.EPERM)
    lines = [
        (load, 0, 0, 4),  # the architecture
        (equal, 1, 0, architecture),
        (end, 0, 0, _SECCOMP_KILL),
        (load, 0, 0, 0),  # the number of the system call
        (at_least, 0, 1, 0x40000000),  # x32: other numbers for the same calls
        (end, 0, 0, _SECCOMP_KILL),
        (equal, 0, 1, _syscall(_SYSCALLS["clone3"])),
        (end, 0, 0, _SECCOMP_ERRNO | errno.ENOSYS),  # its flags are out of sight; clone's are not
    ]
    for numbers in _DENIED.values():
        lines += [(equal, 0, 1, _syscall(numbers)), refuse]
    for name, forbidden in (("clone", _CLONE_NEW), ("prlimit64", 0xFFFFFFFF)):  # a process, not 0
        lines += [
            (equal, 0, 4, _syscall(_SYSCALLS[name])),
            (load, 0, 0, 16),  # the first argument
            (any_bit, 0, 1, forbidden),
            refuse,
            (end, 0, 0, _SECCOMP_ALLOW),
        ]
    lines.append((end, 0, 0, _SECCOMP_ALLOW))
    code = b"".join(struct.pack("HBBI", *line) for line in lines)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HxxxxxxP", len(lines), ctypes.addressof(buffer))
    _call("system call filter", "prctl", _PR_SET_SECCOMP, _SECCOMP_FILTER, program, 0, 0)


# The first process of the namespace: from here on nothing can be trusted but this process.


def _run_test(sources: dict[str, str], stdin: int, test: dict) -> dict:
    os.ftruncate(stdin, 0)
    os.pwrite(stdin, test["stdin"].encode(errors="surrogatepass"), 0)
    os.lseek(stdin, 0, os.SEEK_SET)
    pipes = [os.pipe() for _ in range(3)]  # standard output, standard error, the value
    child = os.fork()
    if not child:
        _become_candidate([stdin, *(write for _, write in pipes)], test["seconds"])
        _run_program(sources, test)
    for _, write in pipes:
        os.close(write)
    outputs = {read: bytearray() for read, _ in pipes}
    status = _collect(child, outputs, test["seconds"])
    code = _kill_all(child)
    for read in outputs:
        os.close(read)
    stdout, stderr, value = (bytes(data).decode(errors="replace") for data in outputs.values())
    return {
        "status": status,
        "code": code,
        "stdout": stdout,
        "stderr": stderr[-4000:],
        "value": value,
    }


def _collect(child: int, outputs: dict[int, bytearray], seconds: float) -> str:
    """Reads until the child ended and its output is read, or a limit is met: the status."""
    deadline = time.monotonic() + seconds
    ended = os.pidfd_open(child)
    poller = select.poll()
    for descriptor in (ended, *outputs):
        poller.register(descriptor, select.POLLIN)
    try:
        while (left := deadline - time.monotonic()) > 0:
            ready = [descriptor for descriptor, _ in poller.poll(left * 1000)]
            if ready == [ended]:
                return "ended"
            for descriptor in outputs.keys() & ready:
                data = os.read(descriptor, 1 << 16)
                if not data:
                    poller.unregister(descriptor)
                outputs[descriptor] += data
                if len(outputs[descriptor]) > OUTPUT_BYTES:
                    return "output"
        return "time"
    finally:
        os.close(ended)


def _kill_all(child: int) -> int:
    """Ends every other process of the namespace; the exit code of `child`."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)
    code = 0
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return code
        if pid == child:
            code = os.waitstatus_to_exitcode(status)


def _become_candidate(descriptors: list[int], seconds: float) -> None:
    os.setsid()
    for number, descriptor in enumerate([os.dup(descriptor) for descriptor in descriptors]):
        os.dup2(descriptor, number)
    os.closerange(len(descriptors), OPEN_FILES)
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_NPROC: PROCESSES + 2,  # the launcher and the first process
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_FSIZE: SCRATCH_BYTES,
        resource.RLIMIT_CPU: math.ceil(seconds) + 1,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    sys.stdin = open(0, closefd=False, encoding="utf-8", errors="surrogateescape")
    sys.stdout = open(1, "w", closefd=False, encoding="utf-8", errors="surrogateescape")
    sys.argv = ["program.py"]
    site.setquit()


def _run_program(sources: dict[str, str], test: dict) -> NoReturn:
    is_script = "expression" not in test
    module = types.ModuleType("__main__" if is_script else "program")
    sys.modules[module.__name__] = module
    code = 0
    try:
        _execute(sources["preamble"], "preamble.py", module)
        _execute(sources["program"], "program.py", module)
        if not is_script:
            _execute(test["setup"], "tests.py", module)
            value = eval(test["expression"], vars(module))
            os.write(3, json.dumps(tag(value)).encode())
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        frames = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        traceback.print_exception(error.with_traceback(frames))
        code = 1
    _end(module, code)


def _end(module: types.ModuleType, code: object) -> NoReturn:
    """Ends the process as Python does, but does not free its memory: 2 ms a test, not 10."""
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # waits for threads, as multiprocessing has it do
    atexit._run_exitfuncs()
    vars(module).clear()
    gc.collect()  # files that the program opened are written when they are freed
    with contextlib.suppress(AttributeError, ValueError):  # the program replaced or closed it
        sys.stdout.flush()
    os._exit(code & 0xFF if isinstance(code, int) else int(code is not None))


def _execute(source: str, name: str, module: types.ModuleType) -> None:
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), vars(module))


def tag(value: object) -> object:
    """Plain data as JSON can hold it: what JSON lacks is a dictionary from its kind to a list."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list):
        return [tag(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[tag(key), tag(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [tag(item) for item in value]}
    if isinstance(value, set | frozenset):
        return {"set": [tag(item) for item in value]}
    if isinstance(value, bytes):
        return {"bytes": list(value)}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if hasattr(value, "tolist"):  # of numpy
        return tag(value.tolist())
    raise TypeError(f"the result is a {type(value).__name__}, expected plain data such as a list")
