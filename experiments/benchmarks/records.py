"""What a benchmark finds, and how it is written down: rows, as JSON and as Markdown."""

import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

OPERATORS = {"<=": float.__le__, ">=": float.__ge__}


class Row(NamedTuple):
    """One number."""

    name: str
    value: float | None  # None: not measured
    unit: str = ""  # "x" for ratios, "%" for shares of 1
    target: tuple[str, float] | None = None  # ("<=", 1.5)
    low: float | None = None  # the smallest and the largest of the repetitions
    high: float | None = None
    note: str = ""

    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none, or no value."""
        if self.target is None or self.value is None:
            return None
        operator, bound = self.target
        return OPERATORS[operator](float(self.value), float(bound))


class Figure(NamedTuple):
    """The rows that one module of this folder has measured."""

    name: str
    title: str
    rows: Sequence[Row]
    seconds: float


def machine() -> dict[str, Any]:
    """Where this ran, and with what."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "platform": device.platform,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "jax": version("jax"),
        "jaxlib": version("jaxlib"),
    }


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write(folder: Path, figures: Sequence[Figure]) -> str:
    """Writes results.json and results.md; returns the latter's text."""
    where = machine()
    results = {
        "machine": where,
        "figures": [
            {
                "name": figure.name,
                "title": figure.title,
                "seconds": figure.seconds,
                "rows": [row._asdict() | {"met": row.met()} for row in figure.rows],
            }
            for figure in figures
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
    text = "\n".join(_markdown(where, figures)) + "\n"
    (folder / "results.md").write_text(text, encoding="utf-8")
    return text


def _markdown(where: dict[str, Any], figures: Sequence[Figure]) -> Iterable[str]:
    yield "# Benchmark"
    yield ""
    yield ", ".join(f"{name} {value}" for name, value in where.items())
    for figure in figures:
        yield ""
        yield f"## {figure.title}"
        yield ""
        yield "| what | measured | smallest and largest | aim | reached | |"
        yield "| --- | ---: | --- | --- | --- | --- |"
        for row in figure.rows:
            yield f"| {' | '.join(_cells(row))} |"


def _cells(row: Row) -> list[str]:
    spread = "" if row.low is None else f"{show(row.low, row.unit)} to {show(row.high, row.unit)}"
    aim = "" if row.target is None else f"{row.target[0]} {show(row.target[1], row.unit)}"
    reached = {None: "", True: "yes", False: "no"}[row.met()]
    return [row.name, show(row.value, row.unit), spread, aim, reached, row.note]


def show(value: float | None, unit: str) -> str:
    """A number of three digits with its unit.

    >>> show(0.1234, "%"), show(1.4567, "x"), show(1234.5, "GB/s"), show(None, "s")
    ('12.3%', '1.46x', '1234 GB/s', 'not measured')
    >>> show(0.25, "s"), show(1e-5, "")
    ('0.250 s', '1.0e-05')
    """
    if value is None:
        return "not measured"
    if unit in ("%", "x"):
        return f"{value:.1%}" if unit == "%" else f"{value:.2f}x"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e} {unit}".rstrip()
    digits = max(0, 2 - len(str(int(abs(value)))) + 1) if value >= 1 else 3
    return f"{value:.{digits}f} {unit}".rstrip()
