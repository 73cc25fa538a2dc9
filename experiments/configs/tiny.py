"""The main job: RLSD on countdown with the model that ships with the package.

    python -m experiments.train --config=experiments/configs/tiny.py

Hardware: 2 CPU cores. Expected time and result: see README.md, "The main job".
"""

import math

import jax

from jaxrl_sd import config


def get_config():
    """The defaults of the package, on all devices that divide a batch.

    XLA leaves products and loops as small as this model's to one core. As devices with prompts of
    their own, several cores are busy.
    """
    c = config.default()
    c.mesh.data = math.gcd(c.rollout.prompts, jax.device_count())
    return c
