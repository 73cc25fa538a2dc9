"""The record of a run: `metrics.jsonl`, TensorBoard and a progress line.

`metrics.jsonl` holds one JSON object a line, "step" first and the other keys in alphabetical order.
JSON knows neither NaN nor infinity: such a value is written as the string "nan", "inf" or "-inf",
and `read` turns it back into a float.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from jaxrl_sd import files
from jaxrl_sd.types import InputError

FILE = "metrics.jsonl"
SECONDS_BETWEEN_LINES = 10  # of progress, where standard error is no terminal
PROGRESS = "{desc} {n_fmt}/{total_fmt} |{bar:10}| {elapsed} elapsed, {remaining} left{postfix}"


class Writer:
    """Writes each row of metrics to `folder/metrics.jsonl` and `folder/tensorboard`.

    The step of a row is the number of steps before it. A run that continues loses the rows of
    `first_step` and later, since it will record them again. One progress line on standard error
    shows the newest values of the metrics named in `shown`.
    """

    def __init__(
        self, folder: Path, total_steps: int, first_step: int, shown: tuple[str, ...] = ()
    ):
        folder.mkdir(parents=True, exist_ok=True)
        _keep_before(folder / FILE, first_step)
        self._total_steps = total_steps
        self._shown = shown
        self._newest: dict[str, float] = {}
        self._file = open(folder / FILE, "a", encoding="utf-8")
        self._tensorboard = SummaryWriter(
            str(folder / "tensorboard"), purge_step=first_step, flush_secs=5
        )
        self._progress = progress("step", total_steps, max(first_step - 1, 0))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Records one row; its line is in the file when this returns. `step` counts from 0."""
        values = {name: float(metrics[name]) for name in sorted(metrics)}
        self._file.write(json.dumps({"step": int(step)} | strict(values), allow_nan=False) + "\n")
        self._file.flush()
        for name, value in values.items():
            if math.isfinite(value):  # tensorboardX prints a warning for each value that is not
                self._tensorboard.add_scalar(name, value, step)
        self._newest |= values
        shown = {name: self._newest[name] for name in self._shown if name in self._newest}
        self._progress.set_postfix(shown, refresh=False)
        self._progress.update(step - self._progress.n)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception) -> None:
        self._progress.close()
        self._tensorboard.close()
        self._file.close()


def read(folder: Path) -> list[dict[str, float]]:
    """The rows of `folder/metrics.jsonl` in the order of writing: "step" an int, the rest floats.

    Raises FileNotFoundError without the file, InputError on a line that is not a row.
    """
    return [
        {name: value if name == "step" else float(value) for name, value in row.items()}
        for _, row in _lines(folder / FILE)
    ]


def strict(value: Any) -> Any:
    """`value`, of dicts, lists and scalars, with non-finite floats replaced by their names."""
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def whole_lines(path: Path) -> list[str]:
    """The lines of a file, but for a last one without its end: who wrote it was killed."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [line + "\n" for line in lines[:-1]]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    # A step whose line lacks its end was not checkpointed: a run that continues records it again.
    lines = whole_lines(path)
    return [(line, _parse(line, number, path)) for number, line in enumerate(lines, start=1)]


def _parse(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
        return row | {"step": int(row["step"])}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f'{path}, line {number}: got {line[:60].rstrip()!r}, expected an object with "step"'
        ) from error


def _keep_before(path: Path, first_step: int) -> None:
    path.touch()
    kept = [line for line, row in _lines(path) if row["step"] < first_step]
    files.replace_text(path, "".join(kept))


class _WholeLines(tqdm):
    """A progress bar for a log file, where a carriage return does not overwrite."""

    @staticmethod
    def status_printer(file):
        return lambda line: print(line, file=file, flush=True)


def progress(name: str, total: int, done: int) -> tqdm:
    """A progress line on standard error that counts `name` from `done` to `total`."""
    terminal = sys.stderr.isatty()
    return (tqdm if terminal else _WholeLines)(
        desc=name,
        total=total,
        initial=done,
        bar_format=PROGRESS,
        dynamic_ncols=terminal,
        miniters=1,
        mininterval=0.1 if terminal else SECONDS_BETWEEN_LINES,
        file=sys.stderr,
    )
