"""Says which of the papers' claims the runs of comparisons bear out.

    python -m experiments.claims --runs=runs/compare/runs.json --output_dir=runs/compare

reads what experiments.compare wrote (several files: separated by commas), prints the table of
experiments/comparison/claims.py (each claim, the number that was measured for it, its interval over
the seeds, and the verdict), and writes claims.md and methods.md, a page with all methods.
"""

import json
from pathlib import Path

from absl import flags

from experiments import program
from jaxrl_sd.types import InputError

RUNS = flags.DEFINE_list("runs", None, "runs.json of comparisons.", required=True)
OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where pages are written.", required=True)


def main(arguments):
    if arguments:
        raise InputError(f"{arguments[0]}: unknown (see --help)")
    from experiments.comparison import claims, pages  # seconds to import

    rows = []
    for name in RUNS.value:
        if not Path(name).is_file():
            raise InputError(f"--runs: expected a runs.json of experiments.compare, got {name}")
        rows += json.loads(Path(name).read_text())
    folder = Path(OUTPUT_DIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "methods.md").write_text(pages.markdown(rows, claims.CLAIMS))
    (folder / "claims.md").write_text(claims.page(rows, claims.CLAIMS))
    print(claims.markdown(rows, claims.CLAIMS), end="")


if __name__ == "__main__":
    program.run(main)
