import io
import json
import math
import struct
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxrl_sd import metrics
from jaxrl_sd.types import InputError


def record(folder, rows, total_steps=5, first_step=0, shown=()):
    with metrics.Writer(folder, total_steps, first_step, shown) as writer:
        for step, values in rows:
            writer.write(step, values)


def tensorboard_events(folder):
    """Every event in `folder/tensorboard`, from the length-prefixed records of its files."""
    events = []
    for path in (folder / "tensorboard").iterdir():
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_rows_come_back_as_written(tmp_path):
    rows = [(0, {"b": 1.5, "a": -2}), (0, {"eval/accuracy": 0.25}), (1, {"a": 0.1})]
    record(tmp_path / "new" / "run", rows)
    assert metrics.read(tmp_path / "new" / "run") == [
        {"step": 0, "a": -2.0, "b": 1.5},
        {"step": 0, "eval/accuracy": 0.25},
        {"step": 1, "a": 0.1},
    ]


def test_a_line_starts_with_the_step_and_sorts_the_rest(tmp_path):
    record(tmp_path, [(3, {"z": 1.0, "a": 2.0, "step_time": 3.0})])
    assert (tmp_path / metrics.FILE).read_text() == (
        '{"step": 3, "a": 2.0, "step_time": 3.0, "z": 1.0}\n'
    )


def test_each_line_is_on_disk_before_write_returns(tmp_path):
    with metrics.Writer(tmp_path, 5, 0) as writer:
        writer.write(0, {"a": 1.0})
        assert metrics.read(tmp_path) == [{"step": 0, "a": 1.0}]


def test_non_finite_values_are_strict_json_and_come_back_as_floats(tmp_path):
    record(tmp_path, [(0, {"a": math.nan, "b": math.inf, "c": -math.inf})])
    line = (tmp_path / metrics.FILE).read_text()
    assert json.loads(line) == {"step": 0, "a": "nan", "b": "inf", "c": "-inf"}
    (row,) = metrics.read(tmp_path)
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf


def test_strict_reaches_nested_values():
    value = {"a": [1, math.nan, {"b": (math.inf, True, "x")}], "c": None}
    assert metrics.strict(value) == {"a": [1, "nan", {"b": ["inf", True, "x"]}], "c": None}


def test_an_interrupted_run_ends_with_the_same_file(tmp_path):
    rows = [(step, {"a": step / 7, "b": math.nan}) for step in range(5)]
    record(tmp_path / "whole", rows)
    record(tmp_path / "cut", rows[:4])  # killed after step 3, last checkpoint before step 2
    record(tmp_path / "cut", rows[2:], first_step=2)
    whole, cut = ((tmp_path / name / metrics.FILE).read_bytes() for name in ("whole", "cut"))
    assert cut == whole


@pytest.mark.parametrize("torn", ['{"st', '{"step": 2, "a": 0.', '{"step": 2}', "\x00\x00"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    record(tmp_path, [(0, {"a": 1.0}), (1, {"a": 2.0})])
    path = tmp_path / metrics.FILE
    path.write_text(path.read_text() + torn)
    kept = [{"step": 0, "a": 1.0}, {"step": 1, "a": 2.0}]
    assert metrics.read(tmp_path) == kept
    record(tmp_path, [(2, {"a": 3.0})], first_step=2)
    assert metrics.read(tmp_path) == [*kept, {"step": 2, "a": 3.0}]


@pytest.mark.parametrize("bad", ["not json", "[1]", '{"a": 1.0}'])
def test_a_bad_line_inside_the_file_is_named(tmp_path, bad):
    path = tmp_path / metrics.FILE
    path.write_text(f'{{"step": 0}}\n{bad}\n{{"step": 1}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2"):
        metrics.read(tmp_path)


def test_a_run_from_the_start_replaces_old_rows(tmp_path):
    record(tmp_path, [(0, {"a": 1.0})])
    record(tmp_path, [(0, {"a": 2.0})])
    assert metrics.read(tmp_path) == [{"step": 0, "a": 2.0}]


def test_a_kill_while_old_rows_are_dropped_keeps_the_file(tmp_path, monkeypatch):
    record(tmp_path, [(0, {"a": 1.0}), (1, {"a": 2.0})])
    before = (tmp_path / metrics.FILE).read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        metrics.Writer(tmp_path, 5, 1)
    assert (tmp_path / metrics.FILE).read_bytes() == before


def test_tensorboard_has_the_finite_values_and_the_purge(tmp_path):
    record(tmp_path, [(2, {"a": 0.5, "b": math.nan}), (3, {"a": 0.25})], first_step=2)
    events = tensorboard_events(tmp_path)
    starts = [event.step for event in events if event.session_log.status == SessionLog.START]
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events
        for value in event.summary.value
    ]
    assert starts == [2]
    assert scalars == [(2, "a", 0.5), (3, "a", 0.25)]


def test_progress_in_a_log_is_few_whole_lines(tmp_path, capsys):
    rows = [(step, {"a": step / 10, "b": 7.0}) for step in range(6)]
    record(tmp_path, rows, shown=("a", "missing"))
    first, *_, last = lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 2  # the rest came within SECONDS_BETWEEN_LINES
    assert first.startswith("step 0/5 ")
    assert last.startswith("step 5/5 ") and last.endswith("left, a=0.5")
    assert "\r" not in first + last


def test_progress_in_a_log_goes_on_with_time(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "SECONDS_BETWEEN_LINES", 0)
    record(tmp_path, [(3, {"a": 1.0}), (4, {"a": 2.0})], first_step=3, shown=("a",))
    counts = [line.split(" |")[0] for line in capsys.readouterr().err.strip().split("\n")]
    assert counts == ["step 2/5", "step 3/5", "step 4/5", "step 4/5"]


def test_progress_on_a_terminal_overwrites_one_line(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    record(tmp_path, [(step, {"a": 1.0}) for step in range(6)])
    text = terminal.getvalue()
    assert text.startswith("\rstep 0/5") and text.count("\n") == 1
    assert "step 5/5" in text.split("\r")[-1]


def test_progress_keeps_the_newest_value_and_never_passes_the_end(tmp_path, capsys):
    rows = [(4, {"reward": 0.5, "eval": 0.1}), (5, {"eval": 0.75})]
    record(tmp_path, rows, first_step=4, shown=("eval", "reward"))
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last.startswith("step 5/5 ") and last.endswith("eval=0.75, reward=0.5")
