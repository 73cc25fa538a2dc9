"""Measures how fast and how lean the package is on this machine.

    python -m experiments.benchmark --output_dir=runs/benchmark
    python -m experiments.benchmark --only=head,padding --output_dir=runs/benchmark
    python -m experiments.benchmark --only=peers --output_dir=runs/benchmark \\
        --peers_python=trl:/path/to/python,tunix:/path/to/python

Every figure is a ratio within this run, or a share of what this machine was measured to reach. The
same command measures larger models where JAX finds an accelerator. It prints Markdown and writes
results.json and results.md. experiments/peers/ says how to install the peers.
"""

from pathlib import Path

from absl import flags

from experiments import program
from jaxrl_sd.types import InputError

FIGURES = (
    "ceilings",
    "head",
    "methods",
    "groups",
    "efficiency",
    "flatness",
    "padding",
    "meshes",
    "peers",
)
ONLY = flags.DEFINE_list("only", list(FIGURES), f"Figures to measure: {', '.join(FIGURES)}.")
PEERS_PYTHON = flags.DEFINE_list("peers_python", [], "Pythons that have trl and tunix.")
OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/benchmark", "Where results are written.")


def main(arguments):
    if arguments:
        raise InputError(f"{arguments[0]}: unknown (see --help)")
    if unknown := set(ONLY.value) - set(FIGURES):
        raise InputError(f"--only: {sorted(unknown)[0]}: expected some of {', '.join(FIGURES)}")
    from experiments.benchmarks import figures  # seconds to import

    pythons = figures.parse_pythons(PEERS_PYTHON.value)
    print(figures.measure(ONLY.value, pythons, Path(OUTPUT_DIR.value)), end="")


if __name__ == "__main__":
    program.run(main)
