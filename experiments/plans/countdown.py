"""All methods on the built-in job, five seeds each, with controls.

    python -m experiments.compare --plan=experiments/plans/countdown.py --workers=2 \\
        --output_dir=runs/compare

Hardware and time: see README.md, "Which of them works".
"""

from experiments.comparison.plan import Arm, Plan
from jaxrl_sd import config
from jaxrl_sd.methods import METHODS

EXTERNAL = ("opd", "opd_top_k", "opd_sampled")  # their teacher is another model
CONTROLS = {  # a method without one of its parts
    "rlsd, lambda 0": ("rlsd", {"method.lam_0": 0.0}),
    "sdpg, beta 0": ("sdpg", {"method.beta": 0.0}),
    "sdpg, no gate": ("sdpg", {"method.gate": False}),
    "sdpg, no anchor": ("sdpg", {"method.alpha": 0.0}),
    "cast, no flips": ("cast", {"method.flip": False}),
    "sc_grpo, median": ("sc_grpo", {"method.quantile": 0.5}),
    "sc_grpo, no diversity": ("sc_grpo", {"method.alpha": 0.0}),
}
SHOWN = ("rlsd", "sdpg", "sc_grpo", "hsd", "opsd", "sdpo")  # methods whose teachers are shown texts


def get_plan():
    """Each method as published but for the learning rate; hints of other problems as controls."""
    arms = {name: Arm({"method.name": name}) for name in METHODS}
    for name in EXTERNAL:
        arms[name] = Arm({"method.name": name, "method.teacher": "{teacher}"})
    for name in SHOWN:
        exchanged = {"method.name": name, "exchange_hints": True}
        arms[f"{name}, exchanged hints"] = Arm(exchanged, rate_of=name)
    for name, (method, settings) in CONTROLS.items():
        arms[name] = Arm({"method.name": method, **settings}, rate_of=method)
    return Plan(
        tasks={"countdown": config.default()},
        arms=arms,
        seeds=(0, 1, 2, 3, 4),
        before={"teacher": {"method.name": "grpo"}},
        rates=(5e-5, 1.5e-4, 5e-4, 1.5e-3),
        search_seeds=(100,),
    )
