"""Modular chains with terse solutions: the answer and no more, which is silent about the steps.

    python -m experiments.train --config=experiments/configs/chains_answer.py

Hardware: 2 CPU cores. Time: about a minute on cores that other jobs shared. Result of one seed
at the package's learning rate: held-out accuracy 53.5% to 95.3% with rlsd, to 94.3% with grpo, to
3.9% with hsd (`--config.method.name=hsd`). README.md has three seeds of seven methods at a lower
rate.
"""

from experiments.configs import chains


def get_config():
    """The same problems as in chains.py."""
    c = chains.get_config()
    c.output_dir = "runs/chains_answer"
    c.data.train = c.data.test = "chains_answer"
    return c
