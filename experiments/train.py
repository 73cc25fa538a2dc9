"""Trains a language model with self-distillation or one of its baselines.

    python -m experiments.train --output_dir=runs/mine --config.method.name=hsd --config.steps=50

--config names a file of experiments/configs/ (default: tiny.py, the built-in job). Any setting is
--config.<key>=<value>; a method's hyper-parameters are --config.method.<name>=<value>. The same
command continues a run that was stopped.
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from jaxrl_sd.methods import METHODS
from jaxrl_sd.types import InputError

__doc__ += "\nMethods (--config.method.name):\n" + "".join(
    f"  {name:8} {factory.__doc__.splitlines()[0]}\n" for name, factory in METHODS.items()
)

# New attributes are let through here because a method's hyper-parameters depend on its name;
# `jaxrl_sd.config.check` refuses every key that does not exist.
CONFIG = config_flags.DEFINE_config_file(
    "config",
    str(Path(__file__).parent / "configs" / "tiny.py"),
    "Configuration file.",
    lock_config=False,
    accept_new_attributes=True,
)
OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where everything is written.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)  # orbax reports each file it writes
    from jaxrl_sd.train import train  # seconds to import, which --help and typos need not wait for

    config = CONFIG.value
    if OUTPUT_DIR.value is not None:
        config.output_dir = OUTPUT_DIR.value
    try:
        summary = train(config)
    except InputError as error:
        sys.exit(f"error: {error}")
    before, after = summary["accuracy_before"], summary["accuracy_after"]
    print(
        f"held-out accuracy {before['value']:.1%} -> {after['value']:.1%} "
        f"({summary['num_problems']} problems); report: {config.output_dir}/report.md"
    )


if __name__ == "__main__":
    app.run(main)
