"""Verifiers, and the pool that bounds what they may cost."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from jaxrl_sd.types import InputError
from jaxrl_sd.verify import VERIFIERS, countdown
from jaxrl_sd.verify.pool import Outcome, Verdict, VerifierPool

RIGHT, WRONG = Verdict(True, "ok", "", 1.0), Verdict(False, "ok", "", 0.0)
TIMEOUT, ERROR = Verdict(None, "timeout"), Verdict(None, "error")

UNRULY = """
    import ctypes, mmap, os, sys, time

    def equal(prompt, answer, response):
        return answer == response

    def sleep(prompt, answer, response):
        time.sleep(1000)

    def compute(prompt, answer, response):
        return 7 ** 10**9 == 0  # in C, holding the interpreter lock

    def fail(prompt, answer, response):
        raise ValueError("cannot decide")

    def leave(prompt, answer, response):
        os._exit(0)

    def crash(prompt, answer, response):
        ctypes.string_at(0)

    def allocate(prompt, answer, response):
        return bool(bytearray(1 << 33))

    def explain(prompt, answer, response):
        return answer == response, f"expected {answer}"

    def symbol(prompt, answer, response):
        return lambda: answer == response  # true, and of a kind that no other process knows

    def inverse(x):
        time.sleep(x if x > 1 else 0)
        return 1 / x

    def opaque():
        return lambda: None

    def reserve(size):
        return len(mmap.mmap(-1, size))

    def sees_jax(prompt, answer, response):
        return any(name in sys.modules for name in ("jax", "math_verify", "pytest"))
"""


@pytest.fixture
def unruly(tmp_path, monkeypatch):
    """Adds the verifiers of `UNRULY`, `slow` (slow to import) and `broken` (cannot be imported)."""
    (tmp_path / "unruly.py").write_text(textwrap.dedent(UNRULY))
    (tmp_path / "slow.py").write_text("import time\nfrom unruly import equal\ntime.sleep(1)")
    monkeypatch.syspath_prepend(tmp_path)
    for name in re.findall(r"def (\w+)", UNRULY):
        monkeypatch.setitem(VERIFIERS, name, f"unruly:{name}")
    monkeypatch.setitem(VERIFIERS, "slow", "slow:equal")
    monkeypatch.setitem(VERIFIERS, "broken", "unruly:missing")
    return tmp_path


def job(name: str, response: str = "1") -> tuple[str, str, str, str]:
    return (name, "prompt", "1", response)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_verdicts_come_in_the_order_of_the_answers(unruly):
    jobs = [job("equal", str(i % 3)) for i in range(100)]
    with VerifierPool(workers=3, timeout_s=20) as pool:
        assert pool.grade(jobs) == [RIGHT if i % 3 == 1 else WRONG for i in range(100)]
        assert pool.grade([]) == []


def test_an_answer_that_hangs_costs_itself_only(unruly):
    names = ["equal", "sleep", "equal", "compute", *["equal"] * 20]
    expected = [RIGHT, TIMEOUT, RIGHT, TIMEOUT, *[RIGHT] * 20]
    with VerifierPool(workers=2, timeout_s=0.5) as pool:
        assert pool.grade([job(name) for name in names]) == expected
        assert pool.grade([job("equal"), job("equal", "2")]) == [RIGHT, WRONG]


def test_a_verifier_may_say_what_went_wrong(unruly):
    with VerifierPool(workers=1, timeout_s=20) as pool:
        verdicts = pool.grade([job("explain"), job("explain", "2"), job("equal", "2")])
        assert pool.grade([job("symbol")]) == [RIGHT]
    assert [v.correct for v in verdicts] == [True, False, False]
    assert [v.feedback for v in verdicts] == ["expected 1", "expected 1", ""]


def test_any_function_can_be_called_on_many_arguments(unruly):
    arguments = [("", str(i), "1") for i in range(20)]
    with VerifierPool(workers=2, timeout_s=20) as pool:
        assert pool.map("unruly:equal", arguments) == [i == 1 for i in range(20)]
        assert pool.map("unruly:equal", []) == []
        assert pool.map("operator:add", [(1, 2), ("a", "b")]) == [3, "ab"]
        with pytest.raises(RuntimeError, match="cannot be imported: ModuleNotFoundError"):
            pool.map("no_such_module:f", [()])


def test_a_call_that_fails_or_hangs_costs_itself_only(unruly):
    calls = [(1,), (0,), (1000,), (1,)]
    with VerifierPool(workers=1, timeout_s=0.5) as pool:
        assert pool.map("unruly:inverse", calls) == [1.0, None, None, 1.0]
        assert pool.run("unruly:inverse", calls) == [
            Outcome(1.0, "ok"),
            Outcome(None, "error", "ZeroDivisionError: division by zero"),
            Outcome(None, "timeout"),
            Outcome(1.0, "ok"),
        ]
        # What cannot be sent is lost with its worker, and nothing else is.
        assert [o.status for o in pool.run("unruly:opaque", [()] * 2)] == ["error"] * 2
        assert pool.map("unruly:inverse", calls[:1]) == [1.0]


def test_memory_is_bounded_where_it_is_asked_for(unruly):
    with VerifierPool(workers=1, timeout_s=20, memory_bytes=1 << 30) as pool:
        assert pool.map("unruly:reserve", [(1 << 20,), (1 << 31,)]) == [1 << 20, None]
    with VerifierPool(workers=1, timeout_s=20, memory_bytes=None) as pool:
        assert pool.map("unruly:reserve", [(1 << 33,)]) == [1 << 33]


@pytest.mark.parametrize("name", ["fail", "leave", "crash", "allocate"])
def test_an_answer_that_breaks_the_verifier_costs_itself_only(unruly, name):
    names = ["equal", name, "equal", "equal", name]
    with VerifierPool(workers=1, timeout_s=20) as pool:
        assert pool.grade([job(name) for name in names]) == [RIGHT, ERROR, RIGHT, RIGHT, ERROR]
        assert pool.grade([job("equal")]) == [RIGHT]


def test_a_worker_that_dies_between_calls_costs_no_answer(unruly):
    with VerifierPool(workers=2, timeout_s=20) as pool:
        pool.grade([job("equal")] * 4)
        process = pool._workers[0].process
        process.kill()
        process.wait()
        assert pool.grade([job("equal")] * 4) == [RIGHT] * 4


def test_the_import_of_a_verifier_is_not_on_the_clock(unruly):
    with VerifierPool(workers=1, timeout_s=0.5) as pool:
        assert pool.grade([job("slow")]) == [RIGHT]


def test_a_worker_imports_what_it_is_asked_for_and_not_jax(unruly):
    with VerifierPool(workers=1, timeout_s=20) as pool:
        assert pool.grade([job("sees_jax")]) == [WRONG]
    parent = (
        "import sys, jaxrl_sd.verify.pool; sys.exit('jax' in sys.modules or 'sympy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", parent], check=False).returncode == 0


def test_the_pool_works_off_the_main_thread(unruly):
    verdicts = []
    with VerifierPool(workers=1, timeout_s=0.5) as pool:
        jobs = [("math", "", "72", "#### 72"), job("sleep"), job("equal")]
        thread = threading.Thread(target=lambda: verdicts.extend(pool.grade(jobs)))
        thread.start()
        thread.join()
        # The thread that started a worker has ended; the worker must not have ended with it.
        assert verdicts == [RIGHT, TIMEOUT, RIGHT]
        assert pool.grade([job("equal")]) == [RIGHT]


def test_two_threads_get_their_own_verdicts(unruly):
    verdicts = {}
    with VerifierPool(workers=2, timeout_s=20) as pool:

        def grade(response: str) -> None:
            verdicts[response] = pool.grade([job("equal", response)] * 30)

        threads = [threading.Thread(target=grade, args=(response,)) for response in "12"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert verdicts == {"1": [RIGHT] * 30, "2": [WRONG] * 30}


def test_bad_arguments_are_refused(unruly):
    with VerifierPool(workers=1, timeout_s=20) as pool:
        with pytest.raises(InputError, match="verifier: got 'maths', expected one of"):
            pool.grade([job("equal"), job("maths")])
        assert not pool._workers[0].pending
        with pytest.raises(RuntimeError, match="cannot be imported: AttributeError"):
            pool.grade([job("broken")])
        assert pool.grade([job("equal")]) == [RIGHT]
    with pytest.raises(RuntimeError, match="closed"):
        pool.grade([job("equal")])
    with pytest.raises(InputError, match="workers: got 0"):
        VerifierPool(workers=0, timeout_s=1)
    with pytest.raises(InputError, match="timeout_s: got 0"):
        VerifierPool(workers=1, timeout_s=0)


def test_close_leaves_no_process(unruly):
    with VerifierPool(workers=2, timeout_s=0.5) as pool:
        pool.grade([job("equal"), job("sleep"), job("equal"), job("leave")])
        pids = [worker.process.pid for worker in pool._workers]
        assert all(map(is_running, pids))
    for pid in pids:
        with pytest.raises(ProcessLookupError):  # neither running nor a zombie
            os.kill(pid, 0)


def test_workers_do_not_outlive_a_killed_parent(unruly):
    script = f"""
        import sys, threading
        sys.path.insert(0, {str(unruly)!r})
        from jaxrl_sd.verify import VERIFIERS
        from jaxrl_sd.verify.pool import VerifierPool

        VERIFIERS.update(sleep="unruly:sleep", compute="unruly:compute", equal="unruly:equal")
        pool = VerifierPool(workers=3, timeout_s=1000)
        pool.grade([("equal", "", "", "")] * 6)
        print(*[worker.process.pid for worker in pool._workers], flush=True)
        pool.grade([("sleep", "", "", ""), ("compute", "", "", "")])  # and one worker is idle
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        time.sleep(0.5)  # until two of them hang
        assert len(pids) == 3 and all(map(is_running, pids))
        parent.send_signal(signal.SIGKILL)
    patience = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(map(is_running, pids))


@pytest.mark.parametrize(
    "response",
    [
        "4 * 7 = 28 ; 28 + 4 = 32",
        "4 * 7 = 28 ; 28 + 4 = 32 ;",
        "7 * 4 = 28 ; 4 + 28 = 32",
        "4 + 7 = 11 ; no 4 * 7 = 28 ; 28 + 4 = 32",
        "4 + 7 = no 9 no 4 * 7 = 28 ; 28 + 4 = 32",
    ],
)
def test_countdown_accepts(response):
    assert countdown.verify("4 7 4 : 32", "4 * 7 28 + 4", response) is True


@pytest.mark.parametrize(
    "response",
    [
        "",
        ";",
        "no",
        "4 * 7 = 28",  # one number is not used
        "4 * 7 = 28 ; 28 + 4 = 32 ; 32 + 4 = 36",  # the 4 is used twice
        "4 * 7 = 28 ; 28 + 4 = 33",
        "4 * 7 = 32",  # does not compute
        "4 * 8 = 32 ; 7 - 7 = 0",  # not its numbers
        "7 - 4 = 3 ; 4 * 3 = 12",  # not the target
        "4 - 7 = -3 ; 4 - -3 = 7",
        "4 * 7 = 28 ; 28 + 4 = 32 no",
        "4 * 7 = 28 no ; 28 + 4 = 32",
        "4 * 7 = 28 ; ; 28 + 4 = 32",
        "4*7=28 ; 28 + 4 = 32",
        "4 * 7 = 28 , 28 + 4 = 32",
        "4 * 7 = 28 ; 28 + 4 = 32 = 32",
        "4 * 7 = 28 ; 28 + 4 = " + "3" * 5000,
    ],
)
def test_countdown_rejects(response):
    assert countdown.verify("4 7 4 : 32", "", response) is False


def test_countdown_never_takes_a_number_twice():
    assert countdown.verify("4 4 : 8", "", "4 + 4 = 8")
    assert not countdown.verify("4 5 : 8", "", "4 + 4 = 8")
    assert not countdown.verify("3 8 : 5", "", "3 - 8 = 5")
    assert countdown.verify("3 8 : 5", "", "8 - 3 = 5")


def test_countdown_reads_the_last_problem_of_the_prompt():
    prompt = "For 1 2 : 3 it is easy. Step 9\nSolve 4 7 4 : 32. Use every number."
    assert countdown.verify(prompt, "", "4 * 7 = 28 ; 28 + 4 = 32")
    with pytest.raises(ValueError, match="prompt: got 'Solve it'"):
        countdown.verify("Solve it", "", "4 * 7 = 28")
