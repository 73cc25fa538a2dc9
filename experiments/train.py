"""Trains a language model with self-distillation or one of its baselines.

    python -m experiments.train --output_dir=runs/mine --config.method.name=hsd --config.steps=50

--config names a file of experiments/configs/ (default: tiny.py, the built-in job). Any setting is
--config.<key>=<value>; a method's hyper-parameters are --config.method.<name>=<value>. The same
command continues a run that was stopped.
"""

import re
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict

from jaxrl_sd import config as configuration
from jaxrl_sd.methods import METHODS, PRESETS
from jaxrl_sd.types import InputError

__doc__ += "\nMethods (--config.method.name):\n" + "".join(
    f"  {name:13} {factory.__doc__.splitlines()[0]}\n" for name, factory in METHODS.items()
)
__doc__ += f"\nPublished variants: {', '.join(PRESETS)}\n"

CONFIG = flags.DEFINE_string(
    "config", str(Path(__file__).parent / "configs" / "tiny.py"), "Configuration file."
)
OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where everything is written.")


def parse(argv: list[str]) -> list[str]:
    """The program's name and what is no flag of absl: the settings."""
    try:
        return flags.FLAGS(argv, known_only=True)
    except flags.Error as error:
        sys.exit(f"error: {error}")


def read_config(arguments: list[str]) -> ConfigDict:
    """The configuration file with the settings of the command line in their places."""
    config = configuration.load(CONFIG.value)
    for argument in arguments:
        setting = re.fullmatch(r"--?config\.([^=]+)=(.*)", argument, re.DOTALL)
        if not setting:
            raise InputError(f"{argument}: unknown, expected --config.<key>=<value> (see --help)")
        configuration.override(config, *setting.groups())
    if OUTPUT_DIR.value is not None:
        config.output_dir = OUTPUT_DIR.value
    return config


def main(argv):
    logging.set_verbosity(logging.WARNING)  # orbax reports each file it writes
    from jaxrl_sd.train import train  # seconds to import, which --help and typos need not wait for

    try:
        config = read_config(argv[1:])
        summary = train(config)
    except InputError as error:
        sys.exit(f"error: {error}")
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    print(
        f"held-out accuracy {before['value']:.1%} -> {after['value']:.1%} "
        f"({summary['num_problems']} problems); report: {config.output_dir}/report.md"
    )


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
