"""Benchmarks a model: avg@k, pass@k and maj@k with intervals, lengths, and a table of problems.

    python -m experiments.evaluate --benchmark=math500 --decoding=rlsd --output_dir=runs/math500 \\
        --config=experiments/configs/qwen3_jsonl.py --config.model.path=/models/Qwen3-4B \\
        --config.evaluation.samples=4 --config.rollout.prompts=8

writes samples.jsonl (every answer), results.json and results.md. The same command continues an
evaluation that was stopped, and writes the results of a finished one anew. Without --benchmark the
problems are those of --config.data.test, without --decoding the settings those of --config.rollout;
both are changed by --config.<key>=<value>. --config.rollout.prompts problems are sampled at a time.
"""

from pathlib import Path

from absl import flags

from experiments import command_line, program
from jaxrl_sd import benchmarks

__doc__ += f"\n{benchmarks.describe()}"

flags.adopt_module_key_flags(command_line)
flags.adopt_module_key_flags(program)
flags.mark_flag_as_required("output_dir")
BENCHMARK = flags.DEFINE_enum("benchmark", None, sorted(benchmarks.BENCHMARKS), "The problems.")
DECODING = flags.DEFINE_enum("decoding", None, sorted(benchmarks.DECODING), "A paper's decoding.")


def main(arguments):
    settings = benchmarks.settings(BENCHMARK.value, DECODING.value)
    config = command_line.read_config(arguments, settings)
    from jaxrl_sd import answers, hosts, results  # seconds to import, see experiments/train.py

    answers.collect(config, "test")
    written = hosts.from_first(lambda: results.write(Path(config.output_dir)))
    print(f"{results.table_of_estimates(written)}\n\nresults: {config.output_dir}/results.md")


if __name__ == "__main__":
    program.run(main)
