"""Compiles every device function of a configuration for TPU slices, on a machine without one.

    pip install 'jaxrl_sd[tpu_aot]'
    python -m experiments.compile_for_tpu --config=experiments/configs/rlsd_text.py \\
        --topology=v5e:4x8,v5p

prints what each needs of a chip: memory (does it fit?), FLOPs, bytes, communication and the time
that the chip's peaks allow. `v5p` without sizes is the slice with as many chips as `mesh` has.
Nothing is run; no weights and no data are read. `--functions=score,update` compiles some of them.
Any setting is --config.<key>=<value>. `--output` is a folder to which a JSON file is written for
each configuration and topology, and table.md with all that it has.
"""

import dataclasses
import json
import math
import time
from pathlib import Path

from absl import flags

from experiments import command_line, program
from jaxrl_sd.types import InputError

flags.adopt_module_key_flags(command_line)
flags.adopt_module_key_flags(program)
TOPOLOGY = flags.DEFINE_list("topology", None, "Such as v5e:4x8 or v5p.", required=True)
FUNCTIONS = flags.DEFINE_list("functions", [], "Some of them; all by default.")
OUTPUT = flags.DEFINE_string("output", None, "Folder.")


def main(arguments):
    config = command_line.read_config(arguments)
    import jax

    from jaxrl_sd import tpu

    # A machine without a TPU cannot read back what it has compiled for one.
    jax.config.update("jax_enable_compilation_cache", False)

    for name in TOPOLOGY.value:
        topology = tpu.slice_of(name, math.prod(config.mesh.values()))
        reports = []
        for report in compile_all(config, topology):
            reports.append(report)
            if OUTPUT.value:
                write(Path(OUTPUT.value), config, topology, reports)


def compile_all(config, topology):
    """A report of each function, printed as soon as it is there."""
    from jaxrl_sd import abstract, tpu

    mesh = tpu.make_mesh(topology, **config.mesh)
    calls, kernel = abstract.calls(config, mesh), abstract.attention_flops(config)
    for name in FUNCTIONS.value:
        if name not in calls:
            raise InputError(f"--functions: expected some of {list(calls)}, got {name!r}")
    for name in FUNCTIONS.value or calls:
        start, call = time.perf_counter(), calls[name]()
        resident = tpu.bytes_of(call.beside)
        report = tpu.report(name, call.lower(), topology, resident, call.trips, kernel)
        print(tpu.table([report]) + f"{time.perf_counter() - start:.0f} s\n", flush=True)
        yield report


def write(folder, config, topology, reports):
    """Puts the reports of a configuration into the folder, and writes its table anew."""
    from jaxrl_sd import tpu

    folder.mkdir(parents=True, exist_ok=True)
    name = Path(command_line.CONFIG.value).stem
    record = {
        "config": name,
        "topology": topology,
        "mesh": dict(config.mesh),
        "compute": dict(config.compute),
        "functions": [dataclasses.asdict(report) for report in reports],
    }
    file = folder / f"{name}.{topology.replace(':', '_')}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    (folder / "table.md").write_text(tpu.summary(records))


if __name__ == "__main__":
    program.run(main)
