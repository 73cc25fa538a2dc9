"""Makes the runs of a plan in worker processes, each once: what is finished is not made again."""

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import jax
from absl import logging
from tqdm import tqdm

from experiments import program
from experiments.comparison import drift, plan, rows
from experiments.comparison.plan import Job, Plan
from jaxrl_sd import files, metrics
from jaxrl_sd.types import InputError, first_line

RESULT = "result.json"  # of a run that has ended


def make(the_plan: Plan, root: Path, workers: int) -> list[dict]:
    """Makes every run and returns a row for each, see rows.py.

    A run that fails has a row with its `error`; the same command tries it again. A run that was
    interrupted goes on from its checkpoint.
    """
    plan.check(the_plan, root)
    with _pool(workers, root) as pool:
        made = _make(pool, plan.before(the_plan, root))
        made += _make(pool, plan.search(the_plan, root))
        made += _make(pool, plan.final(the_plan, root, best_rates(made)))
    return rows.match_lengths(made, the_plan.baseline)


def best_rates(made: Sequence[dict]) -> dict[tuple[str, str], float]:
    """By task and arm, the rate of the search whose last quarter of rollouts was most accurate.

    A plan has problems enough for each to come once, so rollouts are on problems that no update has
    seen; but an arm that samples again and again for a step, as DAPO, may come to some a second
    time, with every rate. An arm that failed with all rates gets the lowest.
    """
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for row in made:
        if row["stage"] == plan.SEARCH:
            accuracy = row["metrics"]["rollout/accuracy"] if "metrics" in row else 0.0
            of_arm = found.setdefault((row["task"], row["arm"]), {})
            of_arm.setdefault(row["rate"], []).append(accuracy)
    return {
        name: max(sorted(of_arm), key=lambda rate: sum(of_arm[rate]) / len(of_arm[rate]))
        for name, of_arm in found.items()
    }


def _make(pool: ProcessPoolExecutor, jobs: Sequence[Job]) -> list[dict]:
    found = {job.folder(): _result(job) for job in jobs}
    waiting = [job for job in jobs if found[job.folder()] is None]
    if waiting:
        with metrics.progress(jobs[0].stage, len(jobs), len(jobs) - len(waiting)) as bar:
            found |= _run(pool, waiting, bar)
    return list(found.values())


def _run(pool: ProcessPoolExecutor, jobs: Sequence[Job], bar: tqdm) -> dict[Path, dict]:
    rows, submitted = {}, {pool.submit(work, job): job for job in jobs}
    for future in as_completed(submitted):
        job, row = submitted[future], future.result()
        rows[job.folder()] = row
        if "error" in row:
            bar.write(f"{job.task}, {job.arm}, seed {job.seed}: {row['error']}", file=sys.stderr)
        bar.update()
    return rows


def _result(job: Job) -> dict | None:
    """The row of a finished run.

    Raises:
      InputError: it was made with other settings.
    """
    file = job.folder() / RESULT
    if not file.exists():
        return None
    record = json.loads(file.read_text())
    if record["config"] != json.loads(job.config.to_json()):
        raise InputError(
            f"--output_dir: {file} is of another plan or version; choose another folder"
        )
    return record["row"]


def work(job: Job) -> dict:
    """One run, in a worker: trains, measures, and leaves a row. Checkpoints go when it is done."""
    from jaxrl_sd.train import train

    name = {field: getattr(job, field) for field in ("task", "stage", "arm", "rate", "seed")}
    try:
        summary = train(job.config)
    except Exception as error:  # of this arm with these settings; the others go on
        logging.exception("%s", name)
        return name | {"error": first_line(error)}
    row = name | rows.of_run(job.folder(), summary)
    if job.stage == plan.FINAL:
        row |= {"kl_to_start": drift.kl_to_start(job.config)}
    record = {"config": json.loads(job.config.to_json()), "row": metrics.strict(row)}
    files.replace_text(job.folder() / RESULT, json.dumps(record) + "\n")
    shutil.rmtree(job.folder() / "checkpoints")
    jax.clear_caches()
    return record["row"]


def _pool(workers: int, root: Path) -> ProcessPoolExecutor:
    """Processes with a share of the cores each, where the system can say so."""
    context = multiprocessing.get_context("spawn")  # JAX's threads do not survive a fork
    numbers = context.Queue()
    for number in range(workers):
        numbers.put(number)
    return ProcessPoolExecutor(workers, context, _start, (numbers, workers, root))


def _start(numbers: multiprocessing.Queue, workers: int, root: Path) -> None:
    number = numbers.get()
    if workers > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[number::workers] or cores)
    root.mkdir(parents=True, exist_ok=True)
    log = open(root / f"worker-{number}.log", "a", buffering=1)  # stays open as long as the worker
    os.dup2(log.fileno(), sys.stderr.fileno())
    logging.set_verbosity(logging.WARNING)
    program.keep_what_is_compiled()
