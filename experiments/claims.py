"""Says which of the papers' claims the runs of a comparison bear out.

    python -m experiments.claims --runs=runs/compare/runs.json

reads what experiments.compare wrote (several files: separated by commas) and prints the table of
experiments/comparison/claims.py: each claim, the number that was measured for it, its interval over
the seeds, and the verdict.
"""

import json
from pathlib import Path

from absl import flags

from experiments import program
from jaxrl_sd.types import InputError

RUNS = flags.DEFINE_list("runs", None, "runs.json of comparisons.", required=True)


def main(arguments):
    if arguments:
        raise InputError(f"{arguments[0]}: unknown (see --help)")
    from experiments.comparison import claims  # seconds to import

    rows = []
    for name in RUNS.value:
        if not Path(name).is_file():
            raise InputError(f"--runs: expected a runs.json of experiments.compare, got {name}")
        rows += json.loads(Path(name).read_text())
    print(claims.markdown(rows, claims.CLAIMS), end="")


if __name__ == "__main__":
    program.run(main)
