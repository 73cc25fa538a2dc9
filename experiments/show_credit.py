"""Writes one HTML page on which the credit that methods give each token can be read.

    python -m experiments.show_credit --output=credit.html \\
        --rollouts=runs/tiny/rollouts/000060.jsonl,runs/hsd/rollouts/000060.jsonl

shows what runs have written down, a column a file.

    python -m experiments.show_credit --output=credit.html --methods=grpo,rlsd,cast,hsd

samples answers with the model of --config and lets each method give credit to the same ones, as in
the first step of training. Settings are --config.<key>=<value>, as for experiments.train.
"""

from pathlib import Path

from absl import flags

from experiments import command_line, program
from jaxrl_sd.types import InputError

flags.adopt_module_key_flags(command_line)
flags.adopt_module_key_flags(program)
ROLLOUTS = flags.DEFINE_list("rollouts", [], "Files in the rollouts/ of runs, a column each.")
METHODS = flags.DEFINE_list("methods", [], "Methods by name, a column each.")
NUM_PROBLEMS = flags.DEFINE_integer("num_problems", 2, "Problems to show, with --methods.")
OUTPUT = flags.DEFINE_string("output", None, "The HTML file to write.", required=True)


def main(arguments):
    config = command_line.read_config(arguments)
    if bool(ROLLOUTS.value) == bool(METHODS.value):
        raise InputError("--rollouts, --methods: expected one of the two")
    if not Path(OUTPUT.value).parent.is_dir():
        raise InputError(f"--output: there is no folder {Path(OUTPUT.value).parent}")
    from jaxrl_sd import credit, files, hosts, records, viewer  # slow, see experiments/train.py

    if ROLLOUTS.value:
        columns = records.of_files(ROLLOUTS.value)
    else:
        columns = credit.of_methods(config, METHODS.value, NUM_PROBLEMS.value)
    hosts.from_first(lambda: files.replace_text(Path(OUTPUT.value), viewer.page(columns)))
    print(f"{', '.join(columns)} -> {OUTPUT.value}")


if __name__ == "__main__":
    program.run(main)
