"""The five papers' methods on modular chains, where teachers see full solutions or bare answers.

    python -m experiments.compare --plan=experiments/plans/chains.py --workers=2 \\
        --output_dir=runs/chains

One learning rate for all: the one that most methods did best with on countdown, three times what
`cast` and `hsd` did best with.
Hardware and time: see README.md, "Which of them works".
"""

from pathlib import Path

from experiments.comparison.plan import Arm, Plan
from jaxrl_sd import config

METHODS = ("grpo", "rlsd", "sdpg", "cast", "sc_grpo", "hsd", "opsd")
CONFIGS = Path(__file__).parent.parent / "configs"


def get_plan():
    """Seven methods, two ways of showing, three seeds."""
    tasks = {name: config.load(CONFIGS / f"{name}.py") for name in ("chains", "chains_answer")}
    for task in tasks.values():
        task.optimizer.learning_rate = 1.5e-4
    return Plan(tasks, {name: Arm({"method.name": name}) for name in METHODS}, (0, 1, 2))
