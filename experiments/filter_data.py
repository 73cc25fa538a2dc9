"""Keeps the training problems that a model solves in a given share of its answers.

    python -m experiments.filter_data --samples=4 --min_pass=0 --max_pass=0 --output=hard.jsonl \\
        --config=experiments/configs/qwen3_jsonl.py --config.model.path=/models/Qwen3-4B \\
        --config.data.train=train.jsonl

writes the problems of --config.data.train that the model solved in none of 4 answers (how RLSD's
data was chosen) with all their columns and `pass_rate`, ready to be --config.data.train again. All
answers stay in --output_dir (default: <output>.answers); the same command continues from them, and
other bounds need no new answers.
"""

from functools import partial
from pathlib import Path

from absl import flags

from experiments import command_line, program

flags.adopt_module_key_flags(command_line)
flags.adopt_module_key_flags(program)
SAMPLES = flags.DEFINE_integer("samples", 8, "Answers a problem.")
MIN_PASS = flags.DEFINE_float("min_pass", 0.0, "Smallest share of correct answers to keep.")
MAX_PASS = flags.DEFINE_float("max_pass", 0.0, "Largest share of correct answers to keep.")
OUTPUT = flags.DEFINE_string("output", None, "The JSON-lines file to write.", required=True)


def main(arguments):
    presets = {
        "evaluation.samples": SAMPLES.value,
        "output_dir": f"{OUTPUT.value}.answers",
    }
    config = command_line.read_config(arguments, presets)
    from jaxrl_sd import answers, difficulty, hosts  # seconds to import, see experiments/train.py

    bounds = MIN_PASS.value, MAX_PASS.value
    difficulty.check(*bounds)
    problems, records = answers.collect(config, "train")
    write = partial(difficulty.write, Path(OUTPUT.value), problems, records, *bounds)
    counts = hosts.from_first(write)
    print(", ".join(f"{number} {name}" for name, number in counts.items()), f"-> {OUTPUT.value}")


if __name__ == "__main__":
    program.run(main)
