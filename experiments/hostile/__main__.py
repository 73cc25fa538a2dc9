"""Runs hostile programs and answers through the verifiers and reports what they cost and changed.

python -m experiments.hostile --programs=1000 --answers=10000
"""

import os
import resource
import select
import socket
import sys
import time

from absl import app, flags

from experiments.hostile.answers import answers
from experiments.hostile.programs import programs
from experiments.hostile.watch import adopt_orphans, changed_since, running_children
from jaxrl_sd.verify import code
from jaxrl_sd.verify.pool import Verdict, VerifierPool

PROGRAMS = flags.DEFINE_integer("programs", 1000, "How many hostile programs.", lower_bound=0)
ANSWERS = flags.DEFINE_integer("answers", 10_000, "How many hostile answers.", lower_bound=0)
WORKERS = flags.DEFINE_integer("workers", 2, "Worker processes.", lower_bound=1)
WATCHED = flags.DEFINE_list("watched", ["."], "Folders in which no file may change.")


def of_program(verdict: Verdict) -> str:
    """ "contained": refused; "stopped": met a limit; "escaped"; "undecided": no verdict."""
    if verdict.correct is None:
        return "undecided"
    if verdict.correct:
        return "contained"
    return "escaped" if "escaped" in verdict.feedback else "stopped"


def of_answer(verdict: Verdict) -> str:
    """ "right" or "wrong", else why there is no verdict."""
    return {True: "right", False: "wrong", None: verdict.status}[verdict.correct]


def table(outcomes: list[tuple[str, str]]) -> str:
    """How many items of each name had each outcome, from (name, outcome) of each."""
    kinds = sorted({kind for _, kind in outcomes})
    names = [*dict.fromkeys(name for name, _ in outcomes)]
    counts = [[name, *(outcomes.count((name, kind)) for kind in kinds)] for name in names]
    total = ["all", *(sum(kind == found for _, found in outcomes) for kind in kinds)]
    lines = [["", *kinds], *counts, total]
    return "\n".join(
        f"{line[0]:<30}" + "".join(f"{cell:>12}" for cell in line[1:]) for line in lines
    )


def peak_memory_mb() -> float:
    """The most memory that this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(items: list[tuple[str, tuple[str, ...]]], describe) -> None:
    """Grades items of a name each, and prints what became of them."""
    start, before = time.monotonic(), peak_memory_mb()
    with VerifierPool(WORKERS.value, timeout_s=10.0) as pool:
        verdicts = pool.grade([item for _, item in items])
    print(table([(name, describe(v)) for (name, _), v in zip(items, verdicts, strict=True)]))
    print(f"seconds: {time.monotonic() - start:.0f}")
    print(f"peak memory of this process: {before:.0f} MB before, {peak_memory_mb():.0f} MB after")


def main(_):
    adopt_orphans()
    started = time.time()
    # A folder that Python itself is in also exists in the sandbox, with Python and nothing else.
    folders = [p for p in map(os.path.abspath, WATCHED.value) if not sys.base_prefix.startswith(p)]
    paths = [code.__file__, __file__, "/etc/shadow", *folders]
    with socket.create_server(("127.0.0.1", 0)) as server:
        run(programs(PROGRAMS.value, server.getsockname()[1], paths), of_program)
        is_reached = bool(select.select([server], [], [], 0)[0])
    print(f"its server was reached: {is_reached}\n")
    run(answers(ANSWERS.value), of_answer)
    print(f"processes left: {running_children()}")
    print(f"files changed in {WATCHED.value}: {changed_since(started, WATCHED.value)}")


if __name__ == "__main__":
    app.run(main)
