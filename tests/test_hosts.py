"""Several processes are one program: two of them with four devices each, over loopback."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_sd import config as configuration
from jaxrl_sd import hosts, metrics
from jaxrl_sd.train import train

CONFIG = Path(__file__).with_name("hosts_config.py")
FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"  # the last counts
ENDS_WITHIN = 60.0  # seconds after another process ended


class Processes:
    """Two that run one command, each with the rest of its own."""

    def __init__(self, folder: Path, *command: str, own: tuple[str, str] = ("", "")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
        self.logs = [folder / f"process_{i}.txt" for i in range(2)]
        self.all = [
            start(
                self.logs[i],
                *(*command, coordinator, "--num_processes=2", f"--process_id={i}"),
                *own[i].split(),
            )
            for i in range(2)
        ]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *exception) -> None:
        for process in self.all:
            process.kill()
            process.wait()

    def end(self, number: int, within: float) -> tuple[int, str]:
        """Status and output of a process that ends by itself."""
        status = self.all[number].wait(within)
        return status, self.logs[number].read_text()


def start(log: Path, *arguments: str) -> subprocess.Popen:
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdout=file,
            stderr=file,
            # The runs of a test share what they compile, as those of a user do.
            env=os.environ | {"XLA_FLAGS": FLAGS, "XDG_CACHE_HOME": str(log.parent)},
        )


def training(folder: Path, **mesh: int) -> list[str]:
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    program = ("-m", "experiments.train", f"--config={CONFIG}", f"--output_dir={folder}")
    return [*program, "--config.steps=5", *sizes]


def train_here(folder: Path, steps: int) -> None:
    """In this process, on one device."""
    config = configuration.load(CONFIG)
    config.output_dir, config.steps = str(folder), steps
    train(config)


def wait_for_step(folder: Path, step: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not any(row["step"] >= step for row in rows(folder)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rows(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return metrics.read(folder) if file.exists() else []


def test_processes_train_as_one_and_go_on_after_a_kill(tmp_path):
    """By the same command, then in one process on one device, to what that alone ends with."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = training(killed, data=2, fsdp=2, tensor=2)
    with Processes(tmp_path, *command) as processes:
        wait_for_step(killed, 3, seconds=400)
        processes.all[1].kill()
        status, text = processes.end(0, within=ENDS_WITHIN)
        # Ours, or JAX's own, whichever finds out first.
        assert status != 0 and ("process 0 of 2 cannot go on" in text or "another task" in text)
    with Processes(tmp_path, *command) as processes:
        for number in (0, 1):
            status, text = processes.end(number, within=400)
            assert status == 0, text[-2000:]
    train_here(killed, steps=6)
    train_here(whole, steps=6)
    assert [row["step"] for row in rows(killed)] == [0, 1, 2, 3, 4, 5, 5, 6, 6]
    model, again = (load_file(x / "model/model.safetensors") for x in (whole, killed))
    for name, value in model.items():
        np.testing.assert_allclose(again[name], value, rtol=0, atol=1e-5, err_msg=name)
    before = load_file(Path(configuration.TINY_MODEL) / "model.safetensors")
    assert max(abs(model[name] - before[name]).max() for name in model) > 1e-3


def test_what_one_process_cannot_read_ends_all(tmp_path):
    command = training(tmp_path / "run", data=2, fsdp=2, tensor=2)
    with Processes(tmp_path, *command, own=("", "--config.data.test=missing.jsonl")) as processes:
        status, text = processes.end(1, within=200)
        assert status == 1 and "got missing.jsonl: no such file" in text.splitlines()[-1]
        status, text = processes.end(0, within=ENDS_WITHIN)
        assert status != 0 and "another" in text


PROGRAM = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxrl_sd import hosts, sharding
from jaxrl_sd.types import InputError

address, _, number = (flag.split("=")[1] for flag in sys.argv[1:])
number = int(number)
hosts.initialize(address, 2, number)
mesh = sharding.make_mesh(data=4, fsdp=2, tensor=1)
tree = {"rows": np.arange(24.0).reshape(8, 3), "scalar": np.float32(7)}
specs = {"rows": PartitionSpec(("data", "fsdp")), "scalar": PartitionSpec()}
there = hosts.put(tree, {name: NamedSharding(mesh, spec) for name, spec in specs.items()})
assert there["rows"].sharding.num_devices == 8
assert len(there["rows"].addressable_shards) == 4
for name, value in hosts.get(there).items():
    np.testing.assert_array_equal(value, tree[name])

calls = []
def double(part):
    calls.append(list(part))
    return [str(2 * x) for x in part]

assert hosts.divide(double, [1, 2, 3, 4, 5, 6], multiple=2) == ["2", "4", "6", "8", "10", "12"]
assert calls == [[[1, 2], [3, 4, 5, 6]][number]]
assert hosts.divide(double, [5]) == ["10"]
assert len(calls) == 1 + number
assert hosts.from_first(lambda: "x" * 3000 + str(number)) == "x" * 3000 + "0"
assert hosts.exchange(lambda: number) == [0, 1]

def fail(kind):
    if number == 1:
        raise kind("broken")
    return []

for kind, seen in ((InputError, InputError), (KeyError, RuntimeError)):
    try:
        hosts.exchange(lambda: fail(kind))
    except (kind if number == 1 else seen) as error:
        assert "broken" in str(error)
    else:
        raise AssertionError
try:
    sharding.make_mesh(data=4, fsdp=1, tensor=1)
except InputError as error:
    assert "has to use all" in str(error)
else:
    raise AssertionError
"""


def test_what_processes_tell_each_other(tmp_path):
    with Processes(tmp_path, "-c", PROGRAM) as processes:
        for number in (0, 1):
            status, text = processes.end(number, within=200)
            assert status == 0, text[-2000:]


def test_a_process_alone_divides_nothing():
    assert hosts.divide(lambda part: [2 * x for x in part], [1, 2, 3], multiple=3) == [2, 4, 6]
    assert hosts.divide(lambda part: pytest.fail("called with nothing"), []) == []
    assert hosts.from_first(lambda: 5) == 5 and hosts.exchange(lambda: 5) == [5]


def test_a_cpu_is_two_devices_unless_jax_was_told_a_number(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import jax\nfrom experiments import program\n"
        "program.run(lambda _: print(jax.device_count()))"
    )
    told = [
        ({"XLA_FLAGS": ""}, "2"),
        ({"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "3"}, "3"),
        ({"XLA_FLAGS": FLAGS}, "4"),
    ]
    path = {"PYTHONPATH": str(Path(__file__).parents[1])}
    started = [
        subprocess.Popen(
            [sys.executable, str(program)],
            env=os.environ | path | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for environment, _ in told
    ]
    assert [process.communicate()[0].strip() for process in started] == [out for _, out in told]
