"""Benchmarks a model: avg@k, pass@k and maj@k with intervals, lengths, and a table of problems.

    python -m experiments.evaluate --benchmark=math500 --decoding=rlsd --samples=4 \\
        --config=experiments/configs/qwen3_jsonl.py --config.model.path=/models/Qwen3-4B \\
        --config.rollout.prompts=8 --output_dir=runs/math500

writes samples.jsonl (every answer), results.json and results.md. The same command continues an
evaluation that was stopped, and writes the results of a finished one anew. Without --benchmark the
problems are those of --config.data.test, without --decoding the settings those of --config.rollout;
both are changed by --config.<key>=<value>. --config.rollout.prompts problems are sampled at a time.
"""

from pathlib import Path

from absl import flags

from experiments import command_line
from jaxrl_sd import benchmarks

__doc__ += f"\n{benchmarks.describe()}"

flags.adopt_module_key_flags(command_line)
flags.mark_flag_as_required("output_dir")
BENCHMARK = flags.DEFINE_enum("benchmark", None, sorted(benchmarks.BENCHMARKS), "The problems.")
DECODING = flags.DEFINE_enum("decoding", None, sorted(benchmarks.DECODING), "A paper's decoding.")
SAMPLES = flags.DEFINE_integer("samples", None, "Answers a problem, evaluation.samples.")


def main(arguments):
    presets = benchmarks.settings(BENCHMARK.value, DECODING.value)
    if SAMPLES.value is not None:
        presets["evaluation.samples"] = SAMPLES.value
    config = command_line.read_config(arguments, presets)
    from jaxrl_sd import answers, results  # seconds to import, see experiments/train.py

    answers.collect(config, "test")
    written = results.write(Path(config.output_dir))
    print(f"{results.table_of_estimates(written)}\n\nresults: {config.output_dir}/results.md")


if __name__ == "__main__":
    command_line.run(main)
