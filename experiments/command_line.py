"""Flags for the configuration and the output folder."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from jaxrl_sd import config as configuration
from jaxrl_sd.types import InputError

CONFIG = flags.DEFINE_string(
    "config", str(Path(__file__).parent / "configs" / "tiny.py"), "Configuration file."
)
OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where everything is written.")


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
