"""Modular chains with full solutions: the second built-in task, as quick as the first.

    python -m experiments.train --config=experiments/configs/chains.py

Hardware: 2 CPU cores. Time: about a minute on cores that other jobs shared. Result of one seed
at the package's learning rate: held-out accuracy 53.5% to 95.3% with rlsd, to 94.3% with grpo, to
3.9% with hsd (`--config.method.name=hsd`). README.md has three seeds of seven methods at a lower
rate.
"""

from jaxrl_sd import chains, config


def get_config():
    """The job of the package on another task, with the model that was made for it."""
    c = config.default()
    c.output_dir = "runs/chains"
    c.model.path = config.CHAINS_MODEL
    c.data.train = c.data.test = "chains"
    c.templates.update(chains.TEMPLATES)
    c.rollout.max_prompt, c.rollout.max_hint_prompt, c.rollout.max_response = 16, 45, 28
    return c
