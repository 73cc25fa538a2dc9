"""experiments/benchmark.py on sizes that take seconds: every figure runs, and reports agree."""

import json
import math
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.benchmarks import (
    ceilings,
    efficiency,
    figures,
    flatness,
    groups,
    head,
    jobs,
    meshes,
    methods,
    padding,
    peers,
    records,
    work,
)
from experiments.benchmarks.models import QWEN3_1_7B, SMALL, TINY
from experiments.benchmarks.records import Figure, Row
from experiments.benchmarks.scales import TOY_SCALE
from experiments.benchmarks.timing import Seconds, in_turns, ratio
from experiments.benchmarks.work import Shape
from jaxrl_sd import config as configuration
from jaxrl_sd import hlo
from jaxrl_sd.methods import METHODS
from jaxrl_sd.model import PLAIN
from jaxrl_sd.types import InputError

# All but whole training runs, which take too long here.
MEASURED = {
    "ceilings": ceilings.measure,
    "head": head.measure,
    "updates": partial(
        methods.updates, setting="plain", grpo=jobs.GRPO, methods={"HSD": METHODS["hsd"](beta=0.0)}
    ),
    "groups": groups.measure,
    "efficiency": efficiency.measure,
    "flatness": partial(flatness.measure, phases=("sampling",)),
    "padding": lambda scale: padding.of_config("cast_4b"),
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_figure_is_measured(name):
    rows = MEASURED[name](TOY_SCALE)
    assert rows
    for row in rows:
        assert math.isfinite(row.value)
        assert row.low is None or row.low <= row.high


def test_every_figure_has_a_title_and_is_measured_here():
    assert all(module.TITLE for module in figures.FIGURES.values())
    assert figures.FIGURES.keys() == {"methods", "meshes", "peers", *MEASURED} - {"updates"}


def test_of_meshes_the_parameter_that_is_furthest_off_counts(tmp_path):
    start = load_file(Path(configuration.TINY_MODEL) / "model.safetensors")
    off = {meshes.ONE: 0.25, meshes.MESHES[0]: 0.25, meshes.TWO_PROCESSES: 0.5}

    def write(layout, by):
        folder = meshes.folder_of(tmp_path, "grpo", layout) / "model"
        folder.mkdir(parents=True, exist_ok=True)
        last = sorted(start)[-1]
        save_file(start | {last: start[last] + np.float32(by)}, folder / "model.safetensors")

    for layout, by in off.items():
        write(layout, by)
    row = meshes.row(tmp_path, "grpo", list(off))
    assert row.value == pytest.approx(0.25, abs=1e-6)
    assert row.met() is False
    assert "2 processes" in row.note and "up to 2.5e-01" in row.note
    write(meshes.TWO_PROCESSES, math.nan)
    row = meshes.row(tmp_path, "grpo", list(off))
    assert math.isnan(row.value) and row.met() is False
    assert len(meshes.MESHES) == 10  # ordered products of three that make eight


ROWS = [
    Row("ratio", 1.4, "x", ("<=", 1.5), 1.3, 1.7, "of something"),
    Row("share", 0.25, "%", (">=", 0.6)),
    Row("absent", None, "s", (">=", 1.0)),
    Row("rate", 103.6, "GFLOP/s"),
]


def test_json_and_markdown_agree(tmp_path):
    text = records.write(tmp_path, [Figure("one", "One", ROWS, 1.0)])
    assert text == (tmp_path / "results.md").read_text()
    (figure,) = json.loads((tmp_path / "results.json").read_text())["figures"]
    tables = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [cells[0] for cells in tables[2:]] == [row["name"] for row in figure["rows"]]
    assert [row["met"] for row in figure["rows"]] == [True, False, None, None]
    assert "| ratio | 1.40x | 1.30x to 1.70x | <= 1.50x | yes | of something |" in text
    assert "| share | 25.0% |  | >= 60.0% | no |  |" in text
    assert "| absent | not measured |" in text
    assert "| rate | 104 GFLOP/s |" in text


def test_figures_are_written_one_by_one(tmp_path, monkeypatch):
    seen = []

    class Fake:
        TITLE = "Fake"

        @staticmethod
        def measure(scale):
            seen.append((tmp_path / "results.json").exists())
            return ROWS

    monkeypatch.setattr(figures, "FIGURES", {"a": Fake, "b": Fake})
    text = figures.measure(["a", "b"], {}, tmp_path, TOY_SCALE)
    assert seen == [False, True]
    assert text.count("## Fake") == 2


def test_functions_are_called_in_turns_and_the_warm_up_does_not_count():
    calls = []
    functions = {name: partial(calls.append, name) for name in "ab"}
    seconds = in_turns(functions, repetitions=2, warmup=1)
    assert calls == list("ababab")
    assert [len(seconds[name].values) for name in "ab"] == [2, 2]


def test_a_ratio_is_of_the_best_and_spreads_over_pairs():
    row = ratio("r", Seconds((4.0, 3.0)), Seconds((1.0, 2.0)), scale=2.0)
    assert (row.value, row.low, row.high) == (6.0, 3.0, 8.0)
    times = Seconds((9.0, 1.0, 3.0)), Seconds((4.0, 2.0, 0.5))
    assert ratio("r", *times, typical="median").value == 1.5


def test_work_is_counted_token_by_token():
    """Against a count of every product of one group, layer by layer."""
    c, S, T, G = TINY, 5, 3, 2
    matrices = 4 * 64 * 4 * 16 - 2 * 64 * 2 * 16 + 3 * 64 * 192  # q and o, k and v with half of it
    keys = [*range(1, S + 1)] + [S + t for t in range(1, T)] * G
    tokens = len(keys)
    attention = sum(2 * 2 * n * 4 * 16 for n in keys) * c.num_layers
    logits = 2 * 512 * 64 * G * T
    want = 2 * matrices * c.num_layers * tokens + attention + logits
    shape = Shape(1, G, S, T)
    assert shape.tokens == tokens
    assert work.forward_flops(c, shape) == want
    assert work.update_flops(c, shape) == 3 * want


def test_sizes_are_the_published_ones():
    def millions(config):
        return (work.layer_params(config) + work.head_params(config)) / 1e6

    assert millions(SMALL) == pytest.approx(48, abs=1)
    assert millions(QWEN3_1_7B) == pytest.approx(1720, abs=5)


def test_products_are_with_every_weight_for_every_token():
    compiled = jax.jit(jobs.products(TINY, rows=8, tokens=3, compute=PLAIN)).lower().compile()
    weights = work.layer_params(TINY) + work.head_params(TINY)
    assert hlo.cost(compiled.as_text()).flops == 3 * 8 * 2 * weights


def test_decoding_reads_weights_once_and_a_prompt_once_a_group():
    shape, token = Shape(2, 4, 10, 8), 2 * 3 * 2 * 16  # keys and values, layers, heads, size
    weights = work.layer_params(TINY) + work.head_params(TINY)
    assert work.decode_bytes(TINY, shape, 5, 4) == 4 * (weights + token * (2 * 10 + 8 * 5))
    assert work.decode_seconds(TINY, shape, 4, 1e30, 1.0) == sum(
        work.decode_bytes(TINY, shape, t, 4) for t in range(1, 8)
    )


@pytest.mark.parametrize("argument", ["other:python", "trl:/nowhere/python", "trl"])
def test_a_wrong_python_is_refused(argument):
    with pytest.raises(InputError, match=r"--peers_python: (other|trl)"):
        figures.parse_pythons([argument])


def test_a_peer_that_fails_ends_the_figure(tmp_path):
    with pytest.raises(InputError, match="peers_python: trl"):
        peers.run("trl", "/bin/false", peers.WORKLOADS[0], tmp_path, tmp_path)


def test_an_unknown_figure_is_refused(python):
    done = python("-m", "experiments.benchmark", "--only=speed")
    assert done.returncode == 1
    assert done.stderr.startswith("error: --only: speed: expected some of ceilings, head")
