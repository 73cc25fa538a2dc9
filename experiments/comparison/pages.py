"""A page with a section for each method: what it computes, and what the comparisons found."""

import sys
from collections.abc import Sequence

from experiments.comparison import claims
from experiments.comparison.claims import Claim, Row, Runs
from experiments.comparison.plan import FINAL
from experiments.comparison.report import interval, number
from jaxrl_sd.methods import METHODS
from jaxrl_sd.report import table

BASELINE = "grpo"
HEAD = (
    "task",
    "arm",
    "learning rate",
    "accuracy, %",
    "less GRPO, points",
    "tokens",
    "entropy",
    "KL to start",
)


def markdown(rows: Sequence[Row], about: Sequence[Claim]) -> str:
    """A section for each method of METHODS."""
    final = [row for row in rows if row["stage"] == FINAL]
    sections = [_section(name, final, rows, about) for name in METHODS]
    intro = (
        "# The methods, one by one\n\nWhat each file computes, in its own words, and what training "
        "with it gave. Accuracies are of sampled held-out answers after training, means over seeds "
        "with 95% intervals; differences are paired. Entropy is in nats a token, the KL to the "
        "start in nats an answer. A name with a comma is a control."
    )
    return "\n\n".join([intro, *sections]) + "\n"


def _section(name: str, final: Sequence[Row], rows: Sequence[Row], about: Sequence[Claim]) -> str:
    module = METHODS[name].__module__
    file = module.replace(".", "/") + ".py"
    text = sys.modules[module].__doc__.partition("Deviations from the paper")[0].strip()
    found = [claim for claim in about if claim.paper.lower().replace("-", "_") == name]
    parts = [f"## {name}", f"[{file}](../../../{file})", f"```text\n{text}\n```"]
    parts += [_results(name, final)]
    if found:
        parts += ["What its paper claims:", claims.markdown(rows, found).rstrip()]
    return "\n\n".join(part for part in parts if part)


def _results(name: str, final: Sequence[Row]) -> str:
    keys = dict.fromkeys(
        (row["task"], row["arm"])
        for row in final
        if row["arm"].partition(",")[0] == name and "error" not in row
    )
    lines = [_line(arm, task, final) for task, arm in keys]
    return table(HEAD, lines) if lines else "Not measured."


def _line(arm: str, task: str, final: Sequence[Row]) -> tuple[str, ...]:
    runs = Runs([row for row in final if row["task"] == task])
    difference = claims.against(arm, BASELINE, claims.ACCURACY)(runs)
    rate = next(row["rate"] for row in runs.rows if row["arm"] == arm)
    return (
        task,
        arm,
        f"{rate:g}",
        interval(claims.level(arm, claims.ACCURACY)(runs)),
        "" if arm == BASELINE else interval(difference, "+"),
        number(claims.level(arm, claims.LENGTH)(runs).value),
        number(claims.level(arm, claims.ENTROPY)(runs).value, 2),
        number(claims.level(arm, "kl_to_start")(runs).value, 2),
    )
