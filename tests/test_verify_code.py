"""The verifier of programs, and the sandbox that they run in."""

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from experiments.hostile.programs import ATTACKS, source
from experiments.hostile.watch import adopt_orphans, changed_since, running_children
from jaxrl_sd import config as configuration
from jaxrl_sd.start import check_judges
from jaxrl_sd.types import InputError, Problem
from jaxrl_sd.verify import code, launcher, sandbox
from jaxrl_sd.verify.pool import VerifierPool

REPOSITORY = Path(__file__).parents[1]

try:
    sandbox.check()
    MISSING = ""
except RuntimeError as error:
    MISSING = str(error)
isolated = pytest.mark.skipif(MISSING != "", reason=MISSING)


def verify(answer: object, program: str) -> tuple[bool, str]:
    response = f"I think\n```python\n{textwrap.dedent(program)}\n```\nis right."
    return code.verify("", json.dumps(answer), response)


def scripts(*pairs: tuple[str, str]) -> dict:
    return {"inputs": [stdin for stdin, _ in pairs], "outputs": [stdout for _, stdout in pairs]}


SUM = scripts(("10 20\n", "30\n"), ("3 4", "7\n"))
CHECK = "def check(candidate):\n    for x in range(3):\n        assert candidate(x) == x * x\n"

FORMS = {
    "scripts": (SUM, "print(sum(map(int, open(0).read().split())))", "print(7)"),
    "lines": (
        {"inputs": [["1", "2"]], "outputs": [["2", "1"]]},
        "a, b = input(), input()\nprint(b)\nprint(a)",
        "print(2)",
    ),
    "function": (
        {"fn_name": "f", "inputs": [[1, 2], [[3], 4]], "outputs": [[1, 2], [[3], 4]]},
        "def f(a, b): return a, b",
        "def f(a, b): return a, 2",
    ),
    "value in a list": (
        {"fn_name": "f", "inputs": [[1], [2]], "outputs": [[1], [4]]},
        "def f(a): return a * a",
        "def f(a): return a",
    ),
    "method and texts of JSON": (
        {"fn_name": "f", "inputs": ["[1, 2]\n4", "[3]\n5"], "outputs": ['{"4": 3}', '{"5": 3}']},
        "from __future__ import annotations\nclass Solution:\n"
        "    def f(self, a: list[int], b: int): return Counter({b: sum(a)})",
        "class Solution:\n    def f(self, a, b): return {b: 3, 1: 1}",
    ),
    "assertions": (
        ["import math", "assert f(4) == (2.0, {4})", "assert math.isclose(f(9)[0], 3)"],
        "def f(x): return x ** 0.5, {x}",
        "def f(x): return [2.0, {4}] if x == 4 else (3, x)",
    ),
    "list of tests": ({"tests": ["assert f() == 1"]}, "def f(): return 1", "def f(): return 2"),
    "test program": (
        {"tests": "assert f(0) == 0\nassert f(1) == 1"},
        "def f(x): return x",
        "def f(x): return 0",
    ),
    "check function": (
        {"tests": CHECK, "entry_point": "f"},
        "def f(x): return x * x",
        "def f(x): return x",
    ),
}


@isolated
@pytest.mark.parametrize("form", FORMS)
def test_right_and_wrong_programs_of_each_form(form):
    answer, right, wrong = FORMS[form]
    assert verify(answer, right) == (True, "")
    passed, feedback = verify(answer, wrong)
    assert not passed
    assert feedback.startswith("Test ")


@isolated
def test_each_test_has_its_result():
    program = "x = int(input())\nprint(x if x < 3 else 1 // 0)"
    answer = scripts(("1", "1"), ("2", "1"), ("3", "3"), ("0", "0"))
    results = code.run_tests(json.dumps(answer), program)
    assert [result.failure for result in results[:2]] == ["", "Expected:\n1\nGot:\n2"]
    assert results[2].failure.endswith("ZeroDivisionError: integer division or modulo by zero")
    assert "sandbox.py" not in results[2].failure
    assert results[3].failure == ""


@isolated
def test_feedback_names_the_first_failures():
    passed, feedback = verify(["assert f(1) == 1", "assert f(2) == 4"], "def f(x): return x")
    assert not passed
    assert feedback == ("Test 2 of 2 failed: f(2)\nExpected:\n4\nGot:\n2\n\n1 of 2 tests passed.")
    answer = scripts(*[("x" * 10_000, "y" * 10_000)] * 9)
    passed, feedback = verify(answer, "print('z' * 10_000)")
    assert len(feedback) < 3000
    assert feedback.endswith("0 of 9 tests passed.")


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("```python\n1\n```\nor\n```\n2\n```", "2\n"),
        ("```py\n1\n```\n```cut", "1\n"),
        ("- so\n  ```python\n  if x:\n    y\n  ```", "if x:\n  y\n"),
        ("print(1)", "print(1)"),
    ],
)
def test_the_program_is_the_last_block_or_everything(response, program):
    assert code._program(response) == program


@pytest.mark.parametrize(
    ("expected", "got", "is_same"),
    [
        ("1 2\n3\n", "1  2 \r\n\n3", True),
        ("1 2\n3", "1\n2 3", False),
        ("1", "1 1", False),
        ("0.5", "0.5000004", True),
        ("0.5", ".50", True),
        ("2.0", "2", True),
        ("0.5", "0.50001", False),
        ("1e6", "1000001", False),
        ("1000000.5", "1000000.7", True),
        ("2", "2.0", False),
        ("10000000", "10000001", False),
        ("yes", "YES", False),
        ("0.5", "nan", False),
    ],
)
def test_outputs_are_compared_by_words(expected, got, is_same):
    assert code._same_output(expected, got) == is_same


@pytest.mark.parametrize(
    "answer",
    [
        "72",
        "no JSON",
        "[]",
        '{"inputs": ["1"], "outputs": []}',
        '{"inputs": ["1"], "outputs": ["1", "2"]}',
        '{"inputs": [1], "outputs": ["1"]}',
        '{"inputs": [1], "outputs": [1], "fn_name": "f"}',
        '{"inputs": [[1]], "outputs": [1], "fn_name": "f(x"}',
        '{"inputs": [[1]], "outputs": [1], "fn_name": 2}',
        '{"tests": 3}',
        '{"tests": "assert f("}',
        '{"tests": "def check(f): pass", "entry_point": null}',
        '["import math"]',
        "[3]",
    ],
)
def test_an_answer_of_another_form_is_an_error(answer):
    with pytest.raises(ValueError, match=r"answer: got .*, expected JSON"):
        code.verify("", answer, "print(1)")


def test_an_output_longer_than_the_limit_is_an_error():
    with pytest.raises(ValueError, match="outputs of at most 1048576 characters"):
        verify(scripts(("", "x" * (1 << 21))), "print(1)")


@isolated
@pytest.mark.parametrize(
    "program",
    [
        "import sys\nprint(1)\nsys.exit()",
        "print(1)\nexit(0)",
        "import threading\nthreading.Thread(target=print, args=(1,)).start()",
        "import threading, time\nthreading.Timer(0.05, print, [1]).start()",
        "file = open(1, 'w', closefd=False)\nfile.write('1')",
        "import atexit\natexit.register(print, 1)",
        "import sys\nprint(1)\nsys.stdout.close()",
        "import os\nos.write(1, b'1')",
        "import sys, io\nsys.stdin = io.StringIO('1')\nprint(input())",
        "import os\nprint(os.read(0, os.fstat(0).st_size).decode())",
        "if __name__ == '__main__':\n    print(1)",
        "import numpy\nprint(numpy.array([2]).argmax() + 1)",
        "import subprocess, multiprocessing, ssl, sqlite3, decimal, tempfile\n"
        "tempfile.TemporaryFile()\nprint(1)",
        "import os\nprint(int(os.getpgrp() == os.getpid()))",
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n  x: 'int' = 1\nprint(A().x)",
        "import os\nprint(int({'PATH', 'HOME', 'PYTHONPATH', 'USER'}.isdisjoint(os.environ)))",
    ],
)
def test_a_script_runs_as_python_runs_it(program):
    assert verify(scripts(("1", "1")), program) == (True, "")


@isolated
@pytest.mark.parametrize(
    ("program", "failure"),
    [
        ("print(1)\nexit(3)", "exit code 3"),
        ("print(1)\nexit('over')", "over"),
        ("print(1)\nraise ValueError('no')", "ValueError: no"),
        ("print(1", "SyntaxError: '(' was never closed"),
        ("print('\0')", "null bytes"),
        ("\ud800", "UnicodeEncodeError"),
        ("import os\nos.kill(os.getpid(), 40)", "ended by signal 40"),
        ("x = []\nfor _ in range(10**5): x = [x]\nprint(x)", "RecursionError"),
        ("print(bytearray(1 << 30))", "MemoryError"),
        ("for _ in range(1 << 20): print('x' * 99)", "printed more than 4 MB"),
    ],
)
def test_a_script_that_fails_fails_its_test(program, failure):
    passed, feedback = verify(scripts(("1", "1")), program)
    assert not passed
    assert failure in feedback


@isolated
def test_time_is_limited_and_what_follows_does_not_run(monkeypatch):
    monkeypatch.setattr(code, "TEST_SECONDS", 0.5)
    started = time.monotonic()
    answer = json.dumps(scripts(("0", "0"), ("1", "1"), ("2", "2")))
    results = code.run_tests(answer, "x = int(input())\nprint(x)\nwhile x: pass")
    assert [result.failure for result in results] == [
        "",
        "It ran out of time (0.5 s).",
        code._NOT_RUN,
    ]
    assert time.monotonic() - started < 5

    monkeypatch.setattr(code, "TEST_SECONDS", 5.0)
    monkeypatch.setattr(code, "TOTAL_SECONDS", 2.0)
    results = code.run_tests(answer, "import time\nx = input()\ntime.sleep(1.2)\nprint(x)")
    assert [bool(result.failure) for result in results] == [False, True, True]


@isolated
@pytest.mark.parametrize("name", ["cgroup", "ipc", "mnt", "net", "pid_for_children", "user", "uts"])
def test_every_namespace_is_new(name):
    with sandbox.Sandbox("") as box:
        theirs = os.readlink(f"/proc/{box._process.pid}/ns/{name}")
    assert theirs != os.readlink(f"/proc/self/ns/{name}")


@isolated
def test_limits_are_set():
    names = ["AS", "NPROC", "NOFILE", "FSIZE", "CPU", "CORE", "MEMLOCK"]
    program = f"""
        import resource
        for name in {names}:
            print(*resource.getrlimit(getattr(resource, "RLIMIT_" + name)))
    """
    limits = [launcher.MEMORY_BYTES, launcher.PROCESSES + 2, launcher.OPEN_FILES]
    limits += [launcher.SCRATCH_BYTES, code.TEST_SECONDS + 1, 0, 0]
    expected = "".join(f"{limit:.0f} {limit:.0f}\n" for limit in limits)
    assert verify(scripts(("", expected)), program) == (True, "")


@isolated
def test_any_text_goes_in_and_comes_out():
    text = "\0\ufffd\u00e9\U0001f600 " * 100_000
    copy = "import sys\nsys.stdout.write(sys.stdin.read())"
    assert verify(scripts((text, text)), copy) == (True, "")
    assert verify(scripts(("\ud800", "3")), "print(len(input()))") == (True, "")  # as bytes
    assert not verify(scripts(("", "\u00e9")), "import os\nos.write(1, b'\\xe9')")[0]


@isolated
@pytest.mark.parametrize(
    "program",
    [
        "import os\nos._exit(0)",
        "exit(0)",
        "print('passed')\ndef f(): exit(0)",
        "import os\ndef f(): os._exit(0)",
        "import os\nfor d in range(3, 64):\n  try: os.write(d, b'1')\n  except OSError: pass\n",
        "import os\nos.write(3, b'1')\nos._exit(0)",
        "import builtins\nbuiltins.eval = builtins.exec = lambda *a: 1",
        "class Any:\n  def __eq__(self, other): return True\ndef f(): return Any()",
        "class Any(int):\n  def __eq__(self, other): return True\ndef f(): return Any(7)",
    ],
)
def test_no_program_passes_by_pretence(program):
    literal = ["assert f() == 1234"]
    assert not verify(literal, program)[0]
    assert not verify({"fn_name": "f", "inputs": [[]], "outputs": [1234]}, program)[0]
    if "Any" not in program:  # what a test program cannot know, as the module says
        assert not verify({"tests": "assert f() == 1234"}, program)[0]


@isolated
def test_what_is_expected_is_not_in_the_sandbox():
    search = """
        import gc, linecache, sys
        def f():
            frame, found = sys._getframe(), str(linecache.cache)
            while frame:
                found += str(frame.f_locals) + str(frame.f_code.co_consts)
                frame = frame.f_back
            return (found + str(gc.get_objects())).find("".join(["48151623", "42108192"])) >= 0
        if __name__ == "__main__":
            print(f())
    """
    for answer in (
        scripts(("", "4815162342108192")),
        ["assert f() == 4815162342108192"],
        {"fn_name": "f", "inputs": [[]], "outputs": [4815162342108192]},
    ):
        assert "Got:\nFalse" in verify(answer, search)[1]
    assert (
        "Got:\nTrue" in verify(scripts(("4815162342108192", "")), search)[1]
    )  # the search does find


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        0.1,
        float("inf"),
        "\ud800",
        [1, (2, [])],
        {1: {2}, (3,): b"\0"},
        1j,
        {},
        set(),
    ],
)
def test_plain_data_comes_out_as_it_was(value):
    copy = sandbox.read_value(json.dumps(launcher.tag(value)))
    assert copy == value
    assert type(copy) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "[" * 100_000,
        "9" * 10_000,
        '{"bytes": 1000000000000}',
        '{"bytes": 5}',
        '{"bytes": [300]}',
        '{"set": [[]]}',
        '{"complex": [1, 2, 3]}',
        '{"complex": [1' + "0" * 400 + ", 1]}",
        '{"print": []}',
        '{"dict": [1]}',
        "{}",
        "\0",
    ],
)
def test_what_is_not_plain_data_is_refused(text):
    with pytest.raises(ValueError, match="not plain data"):
        sandbox.read_value(text)


@pytest.fixture(scope="module")
def server():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        yield listening


@isolated
@pytest.mark.parametrize("variant", [0, 1])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_contained(name, variant, server, tmp_path, monkeypatch):
    adopt_orphans()
    monkeypatch.setattr(code, "TEST_SECONDS", 0.7)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    paths = [str(secret), code.__file__, __file__, "/etc/shadow"]
    started = time.time()
    program = source(name, variant, server.getsockname()[1], paths)
    _, feedback = verify(scripts(("", "contained")), program)
    assert "escaped" not in feedback
    assert "Error" not in feedback  # in the attack
    assert running_children() == []
    assert changed_since(started, [REPOSITORY, tmp_path, "/dev/shm"]) == []
    assert not Path("/tmp/hostile").exists()
    with pytest.raises(BlockingIOError):
        server.accept()


ENDLESS = "```python\nimport os, time\nif not os.fork(): os.setsid()\ntime.sleep(60)\n```"


@isolated
def test_a_sandbox_ends_with_its_worker():
    adopt_orphans()
    job = ("code", "", json.dumps(SUM), ENDLESS)
    with VerifierPool(workers=1, timeout_s=1.0) as pool:
        (verdict,) = pool.grade([job])
    assert verdict.status == "timeout"
    assert running_children() == []


@isolated
def test_the_pool_judges_programs():
    right = ("code", "", json.dumps(SUM), f"```\n{FORMS['scripts'][1]}\n```")
    broken = ("code", "", "{}", "```\n```")
    with VerifierPool(workers=1, timeout_s=20) as pool:
        verdicts = pool.grade([right, broken])
    assert [(v.correct, v.status) for v in verdicts] == [(True, "ok"), (None, "error")]


def test_a_run_starts_only_where_programs_are_isolated(monkeypatch):
    def fail():
        raise RuntimeError("sandbox: missing on this machine: network")

    monkeypatch.setattr(sandbox, "check", fail)
    config = configuration.default()
    program = Problem("id", "Print 1.", json.dumps(SUM), verifier="code")
    with pytest.raises(InputError, match="data: verifier 'code': sandbox: missing"):
        check_judges(config, [program])
    check_judges(config, [Problem("id", "1 + 1", "2")])
    config.reward.functions = ("os.path:join",)  # then no program runs
    with pytest.raises(InputError, match=r"reward\.functions"):
        check_judges(config, [program])


def test_a_machine_without_isolation_is_refused(monkeypatch):
    sandbox.check.cache_clear()
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "sparc")
    with pytest.raises(RuntimeError, match="sparc, expected linux on one of"):
        code.verify("", json.dumps(SUM), "print(1)")


@isolated
def test_isolation_that_does_not_hold_is_named(monkeypatch):
    sandbox.check.cache_clear()
    probe = "def probe(): return {'network': True, 'memory limit': False, 'pids': False}"
    monkeypatch.setattr(sandbox, "_PROBE", probe)
    with pytest.raises(RuntimeError, match=r"on this machine: memory limit, pids$"):
        code.verify("", json.dumps(SUM), "print(1)")


@isolated
@pytest.mark.parametrize("function", ["unshare", "mount", "capset", "prctl", "umount2"])
def test_a_step_that_fails_is_named(monkeypatch, function):
    fail = f"""
from jaxrl_sd.verify import launcher
call = launcher._call
def fail(step, function, *arguments):
    if function == {function!r}:
        raise OSError(1, step + ": refused")
    call(step, function, *arguments)
launcher._call = fail
launcher.main()
"""
    launch, _, _ = sandbox._LAUNCH.partition("from ")
    monkeypatch.setattr(sandbox, "_LAUNCH", launch + fail)
    with pytest.raises(RuntimeError, match=r"on this machine: .*: refused"):
        sandbox.Sandbox("")


@isolated
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs the unshare command")
def test_a_machine_without_user_namespaces_is_refused():
    check = "from jaxrl_sd.verify import sandbox; sandbox.check()"
    limit = "echo 0 > /proc/sys/user/max_user_namespaces"
    command = f'{limit} && exec "{sys.executable}" -c "{check}"'
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", command], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert "RuntimeError: sandbox: missing on this machine" in done.stderr
    assert "new namespaces" in done.stderr
