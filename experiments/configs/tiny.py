"""The main job: RLSD on countdown with the model that ships with the package.

    python -m experiments.train --config=experiments/configs/tiny.py

Hardware: 2 CPU cores. Expected time and result: see README.md, "The main job".
"""

from jaxrl_sd import config


def get_config():
    """The defaults of the package."""
    return config.default()
