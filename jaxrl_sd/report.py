"""The report of a finished run: `report.md`, `curves.png`, `credit.png` and `summary.json`."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxrl_sd import metrics

Rows = list[dict[str, float]]

WIDTH = 9.0  # inches; at 100 pixels an inch, what a README shows
DPI = 150


def write(folder: Path, summary: dict[str, Any], rollouts: list[dict[str, Any]]) -> None:
    """Writes the report of the run whose `metrics.jsonl` is in `folder`.

    `summary` is written as it is to `summary.json` (non-finite floats as in `metrics.jsonl`). In
    the report, a pair of keys `<name>_before` and `<name>_after`, each a dict with "value", "low"
    and "high", becomes a row of the table of results, and `difference`, of the same form, the
    change of `accuracy`; any other dict becomes a section with its table; everything else is a
    setting of the run. `rollouts` are described at `draw_credit`. A picture without anything to
    draw is left out. Raises FileNotFoundError without `metrics.jsonl`.
    """
    text = json.dumps(metrics.strict(summary), indent=2, allow_nan=False, default=str)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    pictures = {
        "curves.png": draw_curves(metrics.read(folder)),
        "credit.png": draw_credit(pick_group(rollouts)),
    }
    drawn = {name: figure for name, figure in pictures.items() if figure is not None}
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=DPI)
    (folder / "report.md").write_text(markdown(summary, drawn), encoding="utf-8")


# ---- report.md

RESULT_NAMES = {"accuracy": "accuracy of sampled answers", "greedy": "greedy accuracy"}
CAPTIONS = {
    "curves.png": "Curves over the training steps. Where there are many, thin lines are the "
    "steps and thick lines their running mean.",
    "credit.png": "Credit of each token of one group of answers: blue praises, red blames.",
}


def markdown(summary: dict[str, Any], pictures: Iterable[str]) -> str:
    """The text of `report.md`, showing the files named in `pictures`. `summary` as for `write`."""
    settings = {key: value for key, value in summary.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in summary.items() if isinstance(value, dict)}
    difference = tables.pop("difference", None)
    results = {key: tables.pop(key) for key in list(tables) if key.endswith(("_before", "_after"))}
    parts = [
        f"# {summary.get('method', 'Run')}: before and after training",
        table(("setting", "value"), ((_words(key), value) for key, value in settings.items())),
        "## Held-out problems",
        _results_table(results),
        *([] if difference is None else [_verdict(difference)]),
        *(f"![{name}]({name})\n\n*{CAPTIONS[name]}*" for name in pictures),
    ]
    for title, values in tables.items():
        parts += [f"## {_words(title).capitalize()}", _section_table(title, values)]
    return "\n\n".join(parts) + "\n"


def _words(key: str) -> str:
    return key.replace("_at_", "@").replace("_", " ")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", r"\|") for cell in line) + " |" for line in lines
    )


def _results_table(results: dict[str, dict[str, float]]) -> str:
    names = dict.fromkeys(key.removesuffix("_before").removesuffix("_after") for key in results)
    return table(
        ("with 95% intervals", "before", "after"),
        (
            (
                RESULT_NAMES.get(name, _words(name)),
                percent(results.get(f"{name}_before")),
                percent(results.get(f"{name}_after")),
            )
            for name in names
        ),
    )


def percent(estimate: dict[str, float] | None) -> str:
    """A share and its interval, for instance `40.4% [36.2, 44.6]`."""
    if estimate is None or math.isnan(estimate["value"]):
        return "not measured"
    value, low, high = (100 * float(estimate[key]) for key in ("value", "low", "high"))
    return f"{value:.1f}% [{low:.1f}, {high:.1f}]"


def _verdict(difference: dict[str, float]) -> str:
    value, low, high = (100 * float(difference[key]) for key in ("value", "low", "high"))
    change = (
        f"Accuracy changed by **{value:+.1f} points** [{low:+.1f}, {high:+.1f}] on the same "
        "problems. The interval covers the choice of problems and samples; another seed of the "
        "training can differ by more."
    )
    if low <= 0 <= high:
        change += " **The interval includes 0: this run does not show that accuracy changed.**"
    return change


def _section_table(title: str, values: dict[str, Any]) -> str:
    if not title.startswith("seconds"):
        return table(("name", "value"), values.items())
    total = values.get("total") or sum(values.values())
    return table(
        ("phase", "seconds", "share"),
        ((phase, _seconds(value), f"{value / total:.0%}") for phase, value in values.items()),
    )


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"


# ---- curves.png

COLUMNS = 3
COLOURS = ("#2b6cb0", "#d9742b", "#4f9a4f", "#8a63b0", "#6b6b6b")
FEW_POINTS = 40


class Panel(NamedTuple):
    """One small plot. `lines` maps metric keys to labels; `unit` "%" is for fractions of 1.

    A key that has the companions `<key>_low` and `<key>_high` is drawn with that band.
    """

    title: str
    unit: str
    lines: dict[str, str]
    smooth: bool = True


PANELS = (
    Panel(
        "Held-out accuracy",
        "%",
        {"eval/accuracy": "sampled, 95% interval", "eval/greedy_accuracy": "greedy"},
        smooth=False,
    ),
    Panel("Accuracy of training rollouts", "%", {"rollout/accuracy": ""}),
    Panel(
        "Groups by outcome",
        "%",
        {
            "rollout/all_correct": "all correct",
            "rollout/mixed": "mixed",
            "rollout/all_wrong": "all wrong",
        },
    ),
    Panel("Entropy of the student", "nats per token", {"rollout/entropy": ""}),
    Panel("Response length", "tokens", {"rollout/length": ""}),
    Panel("Loss", "", {"update/loss": ""}),
    Panel("Gradient norm", "", {"update/grad_norm": ""}),
    Panel(
        "Shares of tokens and of credit",
        "%",
        {
            "credit/flipped": "flipped",
            "credit/zero": "zero",
            "credit/uniform": "uniform groups",
        },
    ),
    Panel(
        "Phrases of solutions in answers",
        "%",
        {
            "leakage/of_correct": "correct",
            "leakage/solution": "all",
            "leakage/solution_other": "other",
            "leakage/words": "hints",
        },
    ),
    Panel(
        "Gaps of ✓ and ✗ answers",
        "nats per token",
        {
            "teacher/teacher/gap_correct_up": "✓ up",
            "teacher/teacher/gap_correct_down": "✓ down",
            "teacher/teacher/gap_wrong_up": "✗ up",
            "teacher/teacher/gap_wrong_down": "✗ down",
        },
    ),
)
PROFILE = "teacher/teacher/divergence_profile/"


def draw_curves(rows: Rows) -> Figure | None:
    """Small plots over the steps of every metric of `PANELS` and of each `teacher/*/gap_abs`.

    And the first, the middle and the last profile of the teacher's gaps around the divergence.
    Plots and lines without a finite value are left out; None if nothing is left.
    """
    series = _series(rows)
    panels = [
        panel._replace(lines={key: label for key, label in panel.lines.items() if key in series})
        for panel in (*PANELS, _gap_panel(series))
    ]
    panels = [panel for panel in panels if panel.lines]
    if not panels:
        return None
    profiles = _profiles(rows)
    num_plots = len(panels) + bool(profiles)
    num_rows = -(-num_plots // COLUMNS)
    figure = Figure(figsize=(WIDTH, 0.3 + 2.1 * num_rows), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
    axes = figure.subplots(num_rows, COLUMNS, squeeze=False).ravel()
    for ax in axes[1 : len(panels)]:
        ax.sharex(axes[0])
    for ax, panel in zip(axes, panels, strict=False):
        _draw_panel(ax, panel, series)
    if profiles:
        _draw_profiles(axes[len(panels)], profiles)
    for ax in axes[num_plots:]:
        ax.remove()
    return figure


def _gap_panel(series: dict[str, Any]) -> Panel:
    keys = [key for key in series if key.startswith("teacher/") and key.endswith("/gap_abs")]
    lines = {key: key.removeprefix("teacher/").removesuffix("/gap_abs") for key in keys}
    return Panel("|teacher - student| log-prob", "nats per token", lines)


def _profiles(rows: Rows) -> dict[str, tuple[list[int], list[float]]]:
    """(offsets, mean |gap|) of the first, the middle and the last step that has a profile."""
    profiles = {}
    for row in rows:
        profile = {int(key.removeprefix(PROFILE)): row[key] for key in row if PROFILE in key}
        offsets = sorted(offset for offset, size in profile.items() if math.isfinite(size))
        if offsets:
            profiles[f"step {row['step']}"] = offsets, [profile[offset] for offset in offsets]
    names = list(profiles)
    chosen = [names[0], names[len(names) // 2], names[-1]] if names else []
    return {name: profiles[name] for name in chosen}


def _draw_profiles(ax: Axes, profiles: dict[str, tuple[list[int], list[float]]]) -> None:
    labels = {name: name for name in profiles}
    _draw_panel(ax, Panel("|gap| where wrong answers diverge", "nats", labels), profiles)
    ax.set_xlabel("tokens from the divergence", fontsize=8)


def _series(rows: Rows) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(steps, values) of every metric that has a finite value; its other values are NaN."""
    names = sorted({name for row in rows for name in row} - {"step"})
    points = {
        name: np.array([(row["step"], row[name]) for row in rows if name in row]).T
        for name in names
    }
    return {
        name: (steps, np.where(np.isfinite(values), values, np.nan))
        for name, (steps, values) in points.items()
        if np.isfinite(values).any()
    }


def _draw_panel(ax: Axes, panel: Panel, series: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    for (key, label), colour in zip(panel.lines.items(), COLOURS, strict=False):
        steps, values = series[key]
        few = len(steps) <= FEW_POINTS
        if panel.smooth and not few:
            ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
            values = _running_mean(values, len(values) // 10)
        ax.plot(
            steps,
            values,
            color=colour,
            label=label,
            linewidth=1.5,
            marker="o" if few else "",
            markersize=2.5,
        )
        if f"{key}_low" in series and f"{key}_high" in series:
            low, high = series[f"{key}_low"], series[f"{key}_high"]
            ax.fill_between(low[0], low[1], high[1], color=colour, alpha=0.18, linewidth=0)
    _style(ax, panel)


def _style(ax: Axes, panel: Panel) -> None:
    ax.set_title(panel.title, fontsize=9, loc="left", pad=15)  # above the legend
    ax.set_xlabel("step", fontsize=8)
    ax.tick_params(labelsize=8, length=2, color="0.6", labelbottom=True)
    ax.grid(color="0.9", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("0.6")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if panel.unit == "%":
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        ax.set_ylabel(panel.unit, fontsize=8)
    if any(panel.lines.values()):
        ax.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=len(panel.lines),
            fontsize=7,
            frameon=False,
            handlelength=1.2,
            columnspacing=1.0,
            borderaxespad=0.1,
            borderpad=0.2,
        )


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean of the values that are not NaN; shorter windows at both ends."""
    present = ~np.isnan(values)
    totals = np.convolve(np.where(present, values, 0), np.ones(window), "same")
    counts = np.convolve(present, np.ones(window), "same")
    return np.where(counts > 0.5, totals / np.maximum(counts, 1), np.nan)


# ---- credit.png

FONT = "DejaVu Sans Mono"  # comes with matplotlib
COLOUR_MAP = LinearSegmentedColormap.from_list("credit", ["#b2182b", "#f7f7f7", "#2166ac"])
MAX_ROLLOUTS = 8
MAX_ROWS = 3  # of tokens a rollout
ROW_TOKENS = 40
ROW_CHARACTERS = 112
TOKEN_CHARACTERS = 16
MARGIN = 4  # characters left of the tokens, for the verdict
NOTE = 10  # characters right of them, for how many tokens are not shown
ROW_INCHES = 0.19
HEADER_INCHES = 0.42
VERDICTS = {True: "✓", False: "✗", None: "?"}


class Box(NamedTuple):
    """One token as drawn. `left` and `width` in characters."""

    row: int
    left: int
    width: int
    text: str


def pick_group(rollouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first recorded group that has correct and wrong answers, else the first group, else [].

    A group has one step and prompt. Of more than `MAX_ROLLOUTS`, half come from its correct end and
    half from its wrong end.
    """
    groups: dict[Any, list[dict[str, Any]]] = {}
    for rollout in rollouts:
        groups.setdefault((rollout.get("step"), rollout.get("prompt")), []).append(rollout)
    mixed = [
        group
        for group in groups.values()
        if {True, False} <= {rollout.get("correct") for rollout in group}
    ]
    if not groups:
        return []
    group = (mixed or list(groups.values()))[0]
    order = [True, None, False]
    group = sorted(group, key=lambda rollout: order.index(rollout.get("correct")))
    half = MAX_ROLLOUTS // 2
    return group[:half] + group[half:][-half:]


def draw_credit(rollouts: list[dict[str, Any]]) -> Figure | None:
    """The answers of one group, each token in a box coloured by its credit.

    A rollout has "response_tokens" (list of str) and, as far as known, "step", "prompt", "correct"
    (True, False or None), "advantage" (one float a token) and "gap" ({teacher: one float a token,
    log-prob by the teacher minus log-prob by the student}). The advantage and each teacher get a
    panel of their own; grey boxes have no value. None if there is nothing to draw.
    """
    panels = _credit_panels(rollouts)
    if not panels:
        return None
    layouts = [place_tokens(rollout["response_tokens"]) for rollout in rollouts]
    body = ROW_INCHES * sum(_num_rows(boxes) + 0.5 for boxes in layouts)
    height = HEADER_INCHES + len(panels) * (HEADER_INCHES + body)
    figure = Figure(figsize=(WIDTH, height))
    _draw_prompt(figure, rollouts)
    top = height - HEADER_INCHES
    for title, unit, values in panels:
        top -= HEADER_INCHES
        ax = figure.add_axes([0.01, (top - body) / height, 0.98, body / height])
        scale = _colour_scale(values)
        _draw_answers(ax, rollouts, layouts, values, scale)
        ax.set_title(title, fontsize=9, loc="left")
        bar = figure.add_axes([0.74, (top + 0.2) / height, 0.2, 0.1 / height])
        _draw_colour_bar(bar, scale, unit)
        top -= body
    return figure


def _credit_panels(rollouts: list[dict[str, Any]]) -> list[tuple[str, str, list[np.ndarray]]]:
    """(title, unit, one f64[tokens] a rollout) of each kind of credit that a rollout has."""
    panels = []
    if any("advantage" in rollout for rollout in rollouts):
        values = [_token_values(rollout, rollout.get("advantage")) for rollout in rollouts]
        panels.append(("Advantage that the method gives each token", "", values))
    for teacher in dict.fromkeys(name for rollout in rollouts for name in rollout.get("gap") or {}):
        gaps = [(rollout.get("gap") or {}).get(teacher) for rollout in rollouts]
        values = [_token_values(*pair) for pair in zip(rollouts, gaps, strict=True)]
        panels.append((f"Log-prob gap, teacher '{teacher}' minus student", "nats", values))
    return panels


def _token_values(rollout: dict[str, Any], values: Sequence[float] | None) -> np.ndarray:
    credit = np.full(len(rollout["response_tokens"]), np.nan)
    if values is not None:
        credit[:] = np.asarray(values, dtype=np.float64)
    return credit


def place_tokens(tokens: Sequence[str]) -> list[Box]:
    """Boxes of the leading tokens that fit in `MAX_ROWS` rows, in reading order."""
    boxes: list[Box] = []
    row, left, in_row = 0, 0, 0
    for token in tokens:
        text = _printable(token, TOKEN_CHARACTERS)
        if in_row == ROW_TOKENS or left + len(text) + 1 > ROW_CHARACTERS:
            row, left, in_row = row + 1, 0, 0
        if row == MAX_ROWS:
            break
        boxes.append(Box(row, left, len(text) + 1, text))
        left, in_row = left + len(text) + 1, in_row + 1
    return boxes


def _printable(text: str, limit: int) -> str:
    """`text` with visible line ends and without letters that the font lacks, `limit` at most."""
    text = text.replace("\n", "↵").replace("\t", "⇥")
    text = text if text.strip() else text.replace(" ", "␣")
    font = get_font(findfont(FONT))
    text = "".join(letter if font.get_char_index(ord(letter)) else "□" for letter in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _num_rows(boxes: list[Box]) -> int:
    return boxes[-1].row + 1 if boxes else 1


def _colour_scale(values: list[np.ndarray]) -> Normalize:
    """Symmetric about 0. One extreme token in fifty must not leave the others white."""
    sizes = np.abs(np.concatenate(values))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    limit = float(np.quantile(sizes, 0.98)) if sizes.size else 1.0
    return Normalize(-limit, limit)


def _draw_answers(
    ax: Axes,
    rollouts: list[dict[str, Any]],
    layouts: list[list[Box]],
    values: list[np.ndarray],
    scale: Normalize,
) -> None:
    top = 0.0
    for rollout, boxes, credit in zip(rollouts, layouts, values, strict=True):
        _write(ax, MARGIN / 2, top + 0.5, VERDICTS[rollout.get("correct")], fontsize=10)
        for box, value in zip(boxes, credit, strict=False):
            _draw_token(ax, box, top, COLOUR_MAP(scale(value)) if np.isfinite(value) else None)
        hidden = len(rollout["response_tokens"]) - len(boxes)
        if hidden:
            last = boxes[-1]
            x, y = MARGIN + last.left + last.width, top + last.row + 0.5
            _write(ax, x + 0.5, y, f"… +{hidden}", ha="left", style="italic", color="0.4")
        top += _num_rows(boxes) + 0.5
    ax.set_xlim(0, MARGIN + ROW_CHARACTERS + NOTE)
    ax.set_ylim(top, 0)
    ax.set_axis_off()


def _draw_token(ax: Axes, box: Box, top: float, colour: tuple[float, ...] | None) -> None:
    face = colour or (0.85, 0.85, 0.85, 1.0)
    brightness = np.dot(face[:3], (0.299, 0.587, 0.114))
    left, upper = MARGIN + box.left, top + box.row + 0.05
    ax.add_patch(Rectangle((left, upper), box.width, 0.9, facecolor=face, edgecolor="0.8", lw=0.4))
    ink = "black" if brightness > 0.5 else "white"
    _write(ax, left + box.width / 2, upper + 0.45, box.text, color=ink)


def _write(ax: Axes, x: float, y: float, text: str, fontsize: float = 7, **style: Any) -> None:
    # A pair of $ in an answer is not mathematics to typeset.
    style = {"ha": "center", "va": "center_baseline", "family": FONT} | style
    ax.text(x, y, text, fontsize=fontsize, parse_math=False, clip_on=True, **style)


def _draw_colour_bar(ax: Axes, scale: Normalize, unit: str) -> None:
    bar = ax.figure.colorbar(ScalarMappable(scale, COLOUR_MAP), cax=ax, orientation="horizontal")
    ends = [f"≤ {scale.vmin:.2g} {unit}".strip(), f"≥ {scale.vmax:.2g} {unit}".strip()]
    bar.set_ticks([scale.vmin, 0, scale.vmax], labels=[ends[0], "0", ends[1]])
    bar.outline.set_visible(False)
    ax.tick_params(labelsize=7, length=0, pad=2)


def _draw_prompt(figure: Figure, rollouts: list[dict[str, Any]]) -> None:
    line = 0.15 / figure.get_figheight()
    legend = "✓ correct, ✗ wrong, ? not graded; blue praises, red blames"
    step = rollouts[0].get("step", "?")
    prompt = _printable(" ".join(rollouts[0].get("prompt", "").split()), ROW_CHARACTERS)
    figure.text(0.01, 1 - line, f"Step {step}, one group of answers ({legend})", fontsize=8)
    figure.text(0.01, 1 - 2.2 * line, prompt, fontsize=7, family=FONT, parse_math=False)
