"""Trains a language model with self-distillation or one of its baselines.

    python -m experiments.train --output_dir=runs/mine --config.method.name=hsd --config.steps=50

--config names a file of experiments/configs/ (default: tiny.py, the built-in job). Any setting is
--config.<key>=<value>; a method's hyper-parameters are --config.method.<name>=<value>. The same
command continues a run that was stopped.
"""

from absl import flags

from experiments import command_line, program
from jaxrl_sd.methods import METHODS, PRESETS

__doc__ += "\nMethods (--config.method.name):\n" + "".join(
    f"  {name:13} {factory.__doc__.splitlines()[0]}\n" for name, factory in METHODS.items()
)
__doc__ += f"\nPublished variants: {', '.join(PRESETS)}\n"

flags.adopt_module_key_flags(command_line)
flags.adopt_module_key_flags(program)


def main(arguments):
    config = command_line.read_config(arguments)
    from jaxrl_sd.train import train  # seconds to import, which --help and typos need not wait for

    summary = train(config)
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    print(
        f"held-out accuracy {before['value']:.1%} -> {after['value']:.1%} "
        f"({summary['num_problems']} problems); report: {config.output_dir}/report.md"
    )


if __name__ == "__main__":
    program.run(main)
