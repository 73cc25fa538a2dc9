"""Programs that attack the sandbox. Each attempts what its name says and prints "escaped" where it
gets its way, and bounds itself too, in processes, memory and time, should the sandbox fail.
"""

import json
import textwrap

# What a program may use: N (its variant), PORT (of a listening server), PATHS (files outside).
_HELPERS = """
import ctypes, os, resource, signal, socket, sys, threading, time
LIBC = ctypes.CDLL(None, use_errno=True)
END = time.monotonic() + 6

def works(action, *arguments):
    try:
        return action(*arguments) not in (-1, None)
    except (OSError, MemoryError, ValueError, RuntimeError, ImportError):
        return False

def report(*successes):
    print("escaped" if any(successes) else "contained", flush=True)

def fork(action, *arguments):
    child = os.fork()
    if not child:
        action(*arguments)
        os._exit(0)
    return child

def count(action, limit):
    for number in range(limit):
        if not works(action):
            return number
    return limit
"""

ATTACKS = {
    "fork bomb": """
        def child():
            count(lambda: fork(time.sleep, 2), 3)
            time.sleep(2)
        report(count(lambda: fork(child), 100 + N) > 3)
    """,
    "thread bomb": """
        def start():
            threading.Thread(target=time.sleep, args=(0.2,), daemon=True).start()
            return True
        report(count(start, 100 + N) > 3)
    """,
    "endless output": """
        while time.monotonic() < END:
            os.write(1 + N % 2, b"x" * 60000)
        report(True)
    """,
    "memory bomb": """
        blocks = []
        report(count(lambda: blocks.append(bytearray(1 << 20 + N % 5)) or True, 4096) > 1024)
    """,
    "memory that no limit counts": """
        report(
            works(os.memfd_create, "memory"),
            LIBC.shmget(0, 1 << 20, 0o1600) != -1,
            LIBC.msgget(0, 0o1600) != -1,
            LIBC.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None) != -1,
        )
    """,
    "raised limits": """
        def lift(limit):
            resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return True
        report(*(works(lift, limit) for limit in (
            resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE,
            resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_CORE)))
    """,
    "endless loop": """
        while time.monotonic() < END:
            pass
        report(True)
    """,
    "sleep that no signal ends": """
        for number in set(range(1, 64)) - {9, 19, 32, 33}:
            signal.signal(number, signal.SIG_IGN)
        while time.monotonic() < END:
            time.sleep(1)
        report(True)
    """,
    "end of its parent": """
        for number in range(1, 65):
            works(os.kill, os.getppid(), number)
        time.sleep(0.05)
        report(os.getppid() != 1)
    """,
    "end of everything": """
        try:
            os.kill(-1, signal.SIGKILL)
        except OSError:
            pass
        for pid in range(3, 3000 + N):
            works(os.kill, pid, signal.SIGKILL) if pid != os.getpid() else None
        report(os.getppid() != 1)
    """,
    "links": """
        successes = []
        for number, path in enumerate(PATHS):
            os.symlink(path, f"link{number}")
            os.symlink("../" * (N + 1) + path, f"far{number}")
            successes += [works(open, f"link{number}"), works(open, f"far{number}", "a")]
            works(os.link, path, f"hard{number}")
            successes.append(os.path.lexists(f"hard{number}"))
        report(*successes)
    """,
    "files of others": """
        devices = ["/proc/1", "/dev/mem", "/sys/kernel", "/etc/passwd"]
        report(*(works(open, path) or os.path.exists(path) for path in PATHS + devices))
    """,
    "code of the verifier": """
        sys.path += ["/", os.path.dirname(os.__file__) + "/site-packages", *PATHS]
        def load(name):
            return __import__(name)
        report(*(works(load, name) for name in ("jaxrl_sd", "jaxrl_sd.verify", "jax", "pytest")))
    """,
    "writes elsewhere": """
        folders = {os.path.dirname(path) for path in PATHS + [os.__file__]}
        folders |= {"/", "/dev/shm", "/root", "/home", "/var/tmp", "/packages", "/usr/lib"}
        report(*(works(open, folder + "/hostile", "w") for folder in folders),
               *(works(lambda: os.mkdir(folder + "/hostile2") or 1) for folder in folders))
        open("/tmp/hostile", "w").write("here it is the scratch folder")
    """,
    "network": """
        def connect(family, address):
            with socket.socket(family, [socket.SOCK_STREAM, socket.SOCK_DGRAM][N % 2]) as client:
                client.settimeout(1)
                client.connect(address)
            return True
        report(works(connect, socket.AF_INET, ("127.0.0.1", PORT)),
               works(connect, socket.AF_INET6, ("::1", PORT)),
               works(connect, socket.AF_UNIX, "/run/docker.sock"),
               LIBC.socket(40, 1, 0) != -1, LIBC.socket(16, 3, 0) != -1)
    """,
    "full disk": """
        def fill():
            with open(f"file{time.monotonic_ns()}", "wb") as file:
                file.write(bytes(1 << 20))
                file.flush()
            return True
        report(count(fill, 200 + N) > 32)
    """,
    "long file": """
        with open("file", "wb") as file:
            def allocate():
                os.posix_fallocate(file.fileno(), 0, (1 << 30) + N)
                return True
            report(works(file.truncate, 1 << 40), works(allocate))
    """,
    "many files": """
        def nest():
            os.mkdir("d")
            os.chdir("d")
            return True
        report(count(nest, 3000 + N) > 1024)
    """,
    "daemons": """
        def daemon():
            os.setsid()
            fork(time.sleep, 30)
        for _ in range(1 + N % 2):
            fork(daemon)
        report(False)
    """,
    "deep recursion": """
        sys.setrecursionlimit(1 << 30)
        def descend(value):
            return descend([value])
        if N % 2:
            descend([])
        value = []
        for _ in range(1 << 20):
            value = [value]
        repr(value)
    """,
    "look into its parent": """
        buffer = ctypes.create_string_buffer(64)
        vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 64)
        report(LIBC.ptrace(16, 1, 0, 0) != -1, LIBC.ptrace(0x4206, 1, 0, 0) != -1,
               LIBC.process_vm_readv(1, vector, 1, vector, 1, 0) != -1, works(open, "/proc/1/mem"))
    """,
    "limits of its parent": """
        def limit(kind):
            resource.prlimit(1, kind, (N, N))
            return True
        kinds = (resource.RLIMIT_AS, resource.RLIMIT_NOFILE, resource.RLIMIT_CPU)
        report(*(works(limit, kind) for kind in kinds),
               works(lambda: os.setpriority(os.PRIO_PROCESS, 1, 19) or 1),
               works(lambda: os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0)) or 1))
    """,
    "all descriptors": """
        held, action = [], [lambda: os.dup(0), os.pipe, socket.socketpair][N % 3]
        report(count(lambda: held.append(action()) or True, 5000) > 64)
    """,
    "children that no signal ends": """
        def stay():
            os.setsid()
            for number in set(range(1, 64)) - {9, 19, 32, 33}:
                signal.signal(number, signal.SIG_IGN)
            os.kill(os.getpid(), signal.SIGSTOP) if N % 2 else time.sleep(6)
        count(lambda: fork(stay), 3)
        report(False)
    """,
    "new privileges": """
        report(*(LIBC.unshare(flag) != -1 for flag in (0x10000000, 0x20000, 0x40000000)),
               works(lambda: os.setuid(0) or 1), works(lambda: os.setgroups([N]) or 1),
               works(lambda: os.chroot("/tmp") or 1), LIBC.umount2(b"/tmp", 2) != -1)
    """,
    "forged replies": """
        reply = b'{"status": "ended", "code": 0, "stdout": "escaped", "stderr": "", "value": ""}'
        for descriptor in range(3, 64):
            works(os.write, descriptor, reply + bytes([10]))
        report(False)
    """,
    "other programs": """
        paths = [sys.executable, "/bin/sh", "/usr/bin/env", "/proc/self/exe"]
        report(*(works(os.execv, path, [path]) for path in paths), os.system("true") == 0)
    """,
    "noise": """
        os.write(2, os.urandom(100_000 + N))
        os.write(1, os.urandom(60_000) + bytes(1000))
        numbers = [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGRTMIN, signal.SIGSTOP]
        os.kill(os.getpid(), numbers[N % 5])
        time.sleep(6)
        report(True)
    """,
}


def source(name: str, variant: int, port: int, paths: list[str]) -> str:
    """The program of an attack. `paths` are absolute paths of files that it is to get at."""
    constants = f"N, PORT, PATHS = {variant}, {port}, {paths!r}\n"
    return constants + _HELPERS + textwrap.dedent(ATTACKS[name])


def programs(count: int, port: int, paths: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """`count` attacks in turn: the name of each, and the item that a pool grades."""
    answer = json.dumps({"inputs": [""], "outputs": ["contained"]})
    names = [list(ATTACKS)[number % len(ATTACKS)] for number in range(count)]
    sources = [
        source(name, number // len(ATTACKS), port, paths) for number, name in enumerate(names)
    ]
    return [
        (name, ("code", "", answer, f"```python\n{text}\n```"))
        for name, text in zip(names, sources, strict=True)
    ]
