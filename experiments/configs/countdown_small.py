"""Countdown in seconds: to see that an installation, a method or a change runs at all.

    python -m experiments.train --config=experiments/configs/countdown_small.py

Hardware: 1 or 2 CPU cores. Time: 11 s of one core's time where what is compiled is kept from an
earlier run (34 s on a core that other jobs shared). Result of one seed: held-out accuracy 41.0% to
67.6% on 64 problems, too few to compare anything.
"""

from jaxrl_sd import config


def get_config():
    """The job of the package with few and small steps, and a test set too small for comparisons."""
    c = config.default()
    c.output_dir = "runs/countdown_small"
    c.steps = 15
    c.data.num_train, c.data.num_test = 512, 64
    c.rollout.prompts = 8
    c.evaluation.every, c.checkpoint.every = 15, 15
    return c
