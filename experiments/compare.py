"""Compares methods: same problems, same budget, a learning-rate search each, several seeds.

    python -m experiments.compare --plan=experiments/plans/countdown.py --workers=2 \\
        --output_dir=runs/compare

makes every training run of the plan, --workers at a time (on an accelerator, one), and writes
runs.json (one row a run), summary.md and report.html. The same command goes on where it was
stopped, tries again what failed, and writes the report of a finished comparison anew.
"""

from pathlib import Path

from absl import flags

from experiments import program
from jaxrl_sd.types import InputError

PLAN = flags.DEFINE_string("plan", "experiments/plans/countdown.py", "Python file: get_plan().")
WORKERS = flags.DEFINE_integer("workers", 1, "Runs at a time.", lower_bound=1)
OUTPUT_DIR = flags.DEFINE_string("output_dir", "runs/compare", "Where everything is written.")


def main(arguments):
    if arguments:
        raise InputError(f"{arguments[0]}: unknown (see --help)")
    from experiments.comparison import plan, report, runs  # seconds to import

    the_plan, folder = plan.load(PLAN.value), Path(OUTPUT_DIR.value)
    rows = runs.make(the_plan, folder, WORKERS.value)
    print(report.write(folder, the_plan, rows))


if __name__ == "__main__":
    program.run(main)
