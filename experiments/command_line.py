"""What the programs share: flags for the configuration and the output folder, and their errors."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from jaxrl_sd import config as configuration
from jaxrl_sd.types import InputError

CONFIG = flags.DEFINE_string(
    "config", str(Path(__file__).parent / "configs" / "tiny.py"), "Configuration file."
)
OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where everything is written.")


def run(program: Callable[[list[str]], None]) -> None:
    """Runs a program on what is left of the command line when absl has taken its flags.

    Bad input ends the process with one line on standard error and status 1.
    """

    def main(argv: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # orbax reports each file it writes
        try:
            program(argv[1:])
        except InputError as error:
            sys.exit(f"error: {error}")

    app.run(main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv, known_only=True)
    except flags.Error as error:
        sys.exit(f"error: {error}")


def read_config(arguments: list[str], presets: Mapping[str, Any] | None = None) -> ConfigDict:
    """The configuration file, changed by `presets`, changed by the settings of the command line.

    Args:
      arguments: `--config.<key>=<value>`, each of them.
      presets: values by field, as in {"rollout.top_p": 0.8}.

    Raises:
      InputError: the file gives no configuration, or an argument is no setting.
    """
    config = configuration.load(CONFIG.value)
    for field, value in (presets or {}).items():
        configuration.override(config, field, str(value))
    for argument in arguments:
        setting = re.fullmatch(r"--?config\.([^=]+)=(.*)", argument, re.DOTALL)
        if not setting:
            raise InputError(f"{argument}: unknown, expected --config.<key>=<value> (see --help)")
        configuration.override(config, *setting.groups())
    if OUTPUT_DIR.value is not None:
        config.output_dir = OUTPUT_DIR.value
    return config
