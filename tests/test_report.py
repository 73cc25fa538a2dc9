import itertools
import json
import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib.patches import Rectangle

from jaxrl_sd import metrics, report

TRAINING = {
    "rollout/accuracy": 0.5,
    "rollout/all_correct": 0.2,
    "rollout/mixed": 0.5,
    "rollout/all_wrong": 0.3,
    "rollout/length": 40.0,
    "rollout/entropy": 0.6,
    "update/loss": 0.01,
    "update/grad_norm": 1.0,
    "credit/zero": 0.1,
    "leakage/solution": 0.2,
    "teacher/teacher/gap_wrong_down": -0.2,
    "teacher/answer/gap_abs": 0.1,
}
EVALUATION = {
    "eval/accuracy": 0.4,
    "eval/accuracy_low": 0.3,
    "eval/accuracy_high": 0.5,
    "eval/greedy_accuracy": 0.6,
}
SUMMARY = {
    "method": "toy",
    "steps": 20,
    "accuracy_before": {"value": 0.25, "low": 0.2, "high": 0.3, "num_problems": 64},
    "accuracy_after": {"value": 0.5, "low": 0.45, "high": 0.55, "num_problems": 64},
    "greedy_before": {"value": 0.3, "low": 0.2, "high": 0.4, "num_problems": 64},
    "pass_at_8_after": {"value": 0.875, "low": 0.8, "high": 0.95, "num_problems": 64},
    "difference": {"value": 0.25, "low": 0.18, "high": 0.32, "num_problems": 64},
    "seconds": {"sample": 30.0, "update": 10.0, "total": 40.0},
    "seconds_of_a_step": {"sample": 0.15, "update": 0.05},
    "versions": {"jax": "0.10.2"},
}


def rows(num_steps=3):
    training = [{"step": step} | TRAINING for step in range(num_steps)]
    return training + [{"step": step} | EVALUATION for step in (0, num_steps)]


def rollout(advantage, **fields):
    tokens = [f"t{i}" for i in range(len(advantage))]
    known = {"step": 4, "prompt": "1 + 1?", "response_tokens": tokens, "correct": True}
    return known | {"advantage": advantage} | fields


def plots(figure):
    return {ax.get_title(loc="left"): ax for ax in figure.axes}


def token_boxes(ax):
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


def texts(ax):
    return [text.get_text() for text in ax.texts]


# ---- curves


def test_every_known_metric_has_its_plot():
    drawn = plots(report.draw_curves(rows()))
    assert list(drawn) == [
        *(panel.title for panel in report.PANELS),
        "|teacher - student| log-prob",
    ]
    assert {ax.get_xlabel() for ax in drawn.values()} == {"step"}
    assert drawn["Response length"].get_ylabel() == "tokens"
    assert drawn["Entropy of the student"].get_ylabel() == "nats per token"


def test_a_line_shows_the_recorded_values():
    data = [{"step": step, "update/loss": step**2, "eval/accuracy": 0.5} for step in (0, 3, 9)]
    drawn = plots(report.draw_curves(data))
    (line,) = drawn["Loss"].lines
    np.testing.assert_array_equal(line.get_xydata(), [(0, 0), (3, 9), (9, 81)])


def test_fractions_are_shown_in_percent():
    axis = plots(report.draw_curves(rows()))["Held-out accuracy"].yaxis
    assert axis.get_major_formatter()(0.4) == "40%"


def test_held_out_accuracy_has_its_interval():
    ax = plots(report.draw_curves(rows()))["Held-out accuracy"]
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (0.3, 0.5)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["sampled, 95% interval", "greedy"]


def test_a_plot_without_its_metric_is_left_out():
    data = [{"step": 0, "update/loss": 1.0, "rollout/entropy": math.nan, "unknown": 2.0}]
    assert list(plots(report.draw_curves(data))) == ["Loss"]


def test_a_line_without_its_metric_is_left_out():
    (ax,) = plots(report.draw_curves([{"step": 0, "rollout/mixed": 0.5}])).values()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["mixed"]


def test_each_teacher_has_its_line():
    data = [{"step": 0, "teacher/peer/gap_abs": 0.1, "teacher/frozen/gap_abs": 0.2}]
    (ax,) = plots(report.draw_curves(data)).values()
    assert [line.get_label() for line in ax.lines] == ["frozen", "peer"]


def test_the_first_the_middle_and_the_last_profile_are_drawn():
    key = "teacher/teacher/divergence_profile/"
    profile = {f"{key}1": 0.5, f"{key}-2": 0.1, f"{key}-1": math.nan, f"{key}0": 2.0}
    data = [{"step": step, "update/loss": 1.0} for step in range(9)]
    for step in (0, 3, 5, 6, 8):
        data[step] |= profile
    loss, ax = plots(report.draw_curves(data)).values()
    assert [line.get_label() for line in ax.lines] == ["step 0", "step 5", "step 8"]
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [(-2, 0.1), (0, 2.0), (1, 0.5)])
    assert ax.get_xlabel() == "tokens from the divergence" and loss.get_xlim()[1] > 7


def test_no_metric_no_figure():
    assert report.draw_curves([]) is None
    assert report.draw_curves([{"step": 0, "unknown": 1.0}]) is None


def test_non_finite_values_are_gaps():
    values = [1.0, math.inf, 2.0, math.nan]
    data = [{"step": step, "update/loss": value} for step, value in enumerate(values)]
    (line,) = plots(report.draw_curves(data))["Loss"].lines
    np.testing.assert_array_equal(line.get_ydata(), [1.0, math.nan, 2.0, math.nan])


def test_many_steps_get_a_running_mean_and_few_none():
    noisy = [{"step": step, "update/loss": float(step % 2)} for step in range(200)]
    raw, mean = plots(report.draw_curves(noisy))["Loss"].lines
    assert np.ptp(raw.get_ydata()) == 1
    np.testing.assert_allclose(mean.get_ydata()[20:-20], 0.5)
    assert len(plots(report.draw_curves(noisy[:20]))["Loss"].lines) == 1


def test_held_out_accuracy_is_never_smoothed():
    noisy = [{"step": step, "eval/accuracy": float(step % 2)} for step in range(200)]
    (line,) = plots(report.draw_curves(noisy))["Held-out accuracy"].lines
    assert set(line.get_ydata()) == {0.0, 1.0}


def test_the_running_mean_ignores_what_is_missing():
    values = np.array([1.0, math.nan, 3.0, math.nan, math.nan, math.nan, 5.0])
    expected = [1.0, 2.0, 3.0, 3.0, math.nan, 5.0, 5.0]
    np.testing.assert_allclose(report._running_mean(values, 3), expected)


# ---- credit


def test_one_box_a_token_and_the_verdicts_at_the_left():
    group = [rollout([0.1] * 5), rollout([0.1] * 7, correct=False), rollout([0.1], correct=None)]
    ax = report.draw_credit(group).axes[0]
    assert len(token_boxes(ax)) == 13
    assert [text for text in texts(ax) if not text.startswith("t")] == ["✓", "✗", "?"]
    assert texts(ax)[1:6] == ["t0", "t1", "t2", "t3", "t4"]


def test_blue_praises_and_red_blames():
    ax = report.draw_credit([rollout([1.0, -1.0, 0.5, -0.5, 0.0])]).axes[0]
    red, green, blue = np.array([box.get_facecolor()[:3] for box in token_boxes(ax)]).T
    np.testing.assert_array_equal(np.sign(np.round(blue - red, 2)), [1, -1, 1, -1, 0])
    assert green[0] < green[2] < green[4]  # stronger credit, darker box
    assert green[1] < green[3] < green[4]


def test_the_colour_bar_is_symmetric_and_shows_the_scale():
    bar = report.draw_credit([rollout([0.5, -2.0])]).axes[1]
    ends = [label.get_text() for label in bar.get_xticklabels()]
    assert bar.get_xlim()[0] == -bar.get_xlim()[1]
    assert ends[1] == "0" and ends[0][:3] == "≤ -" and ends[2][:2] == "≥ "


def test_one_extreme_token_does_not_whiten_the_others():
    ax = report.draw_credit([rollout([1.0] * 99 + [-1000.0])]).axes[0]
    red, _, blue = token_boxes(ax)[0].get_facecolor()[:3]
    assert blue - red > 0.3


def test_each_teacher_has_its_panel():
    group = [rollout([0.0, 0.0], gap={"answer": [0.2, -0.3], "reference": [0.1, 0.1]})]
    titles = [title for title in plots(report.draw_credit(group)) if title]
    assert titles == [
        "Advantage that the method gives each token",
        "Log-prob gap, teacher 'answer' minus student",
        "Log-prob gap, teacher 'reference' minus student",
    ]


def test_a_gap_panel_shows_the_gap_and_not_the_advantage():
    figure = report.draw_credit([rollout([1.0], gap={"answer": [-1.0]})])
    advantage, gap = (token_boxes(figure.axes[i])[0].get_facecolor() for i in (0, 2))
    assert advantage[2] > advantage[0] and gap[2] < gap[0]


@pytest.mark.parametrize("value", [math.nan, "nan"])
def test_tokens_without_a_value_are_grey(value):
    group = [rollout([value, 1.0]), {"response_tokens": ["a"]}]
    ax = report.draw_credit(group).axes[0]
    colours = [box.get_facecolor()[:3] for box in token_boxes(ax)]
    assert colours[0] == colours[2] == (0.85, 0.85, 0.85) != colours[1]


def test_all_zero_credit_is_drawn_white():
    ax = report.draw_credit([rollout([0.0, 0.0])]).axes[0]
    assert all(min(box.get_facecolor()) > 0.95 for box in token_boxes(ax))


def test_values_that_do_not_match_the_tokens_are_an_error():
    with pytest.raises(ValueError, match="could not broadcast"):
        report.draw_credit([rollout([0.1, 0.2], response_tokens=["a", "b", "c"])])


@pytest.mark.parametrize("group", [[], [{"response_tokens": ["a"]}]])
def test_nothing_to_draw_no_figure(group):
    assert report.draw_credit(group) is None


def test_long_answers_wrap_and_the_rest_is_counted():
    ax = report.draw_credit([rollout([0.1] * 500, response_tokens=["x"] * 500)]).axes[0]
    shown = report.MAX_ROWS * report.ROW_TOKENS
    assert len(token_boxes(ax)) == shown
    assert texts(ax)[-1] == f"… +{500 - shown}"


def test_boxes_neither_overlap_nor_leave_the_row():
    tokens = ["word " * (i % 5) + "x" for i in range(60)]
    boxes = report.place_tokens(tokens)
    for box, following in itertools.pairwise(boxes):
        same_row = following.left == box.left + box.width and following.row == box.row
        assert same_row or (following.row == box.row + 1 and following.left == 0)
    assert max(box.left + box.width for box in boxes) <= report.ROW_CHARACTERS


def test_odd_tokens_are_drawn_without_a_warning(tmp_path):
    tokens = ["\n", "   ", "$_$", "$", "你", "\x00", "a" * 50, "\t1", ""]
    shown = [box.text for box in report.place_tokens(tokens)]
    assert shown == ["↵", "␣␣␣", "$_$", "$", "□", "□", "a" * 15 + "…", "⇥1", ""]
    figure = report.draw_credit([rollout([0.1] * 9, response_tokens=tokens, prompt="$_$ 你?")])
    figure.savefig(tmp_path / "credit.png")


def test_an_empty_answer_is_drawn(tmp_path):
    report.draw_credit([rollout([]), rollout([0.1])]).savefig(tmp_path / "credit.png")


def test_the_first_mixed_group_is_shown():
    uniform = [rollout([3.0], step=1, correct=False), rollout([4.0], step=1, correct=None)]
    mixed = [rollout([1.0], step=2), rollout([2.0], step=2, correct=False)]
    later = [rollout([5.0], step=3), rollout([6.0], step=3, correct=False)]
    assert report.pick_group(uniform + mixed + later) == mixed
    assert {r["advantage"][0] for r in report.pick_group(uniform)} == {3.0, 4.0}
    assert report.pick_group([]) == []


def test_a_large_group_shows_both_ends():
    for num_correct, shown_correct in ((1, 1), (12, 4), (15, 7)):
        group = [rollout([0.1], correct=i < num_correct) for i in reversed(range(16))]
        verdicts = [r["correct"] for r in report.pick_group(group)]
        assert verdicts == [True] * shown_correct + [False] * (8 - shown_correct)


# ---- the folder


def write_run(folder, summary=SUMMARY, rollouts=()):
    with metrics.Writer(folder, 3, 0) as writer:
        for row in rows():
            writer.write(row["step"], {key: row[key] for key in row if key != "step"})
    report.write(folder, summary, list(rollouts))
    return (folder / "report.md").read_text(encoding="utf-8")


def test_the_folder_has_the_report_and_what_it_shows(tmp_path):
    text = write_run(tmp_path, rollouts=[rollout([0.5, -0.5])])
    for name in ("curves.png", "credit.png"):
        assert f"({name})" in text
        picture = matplotlib.image.imread(tmp_path / name)
        assert picture.shape[1] == report.WIDTH * report.DPI and picture.std() > 0.05
    assert json.loads((tmp_path / "summary.json").read_text()) == SUMMARY


def test_without_rollouts_the_report_shows_no_credit(tmp_path):
    text = write_run(tmp_path)
    assert "credit.png" not in text and not (tmp_path / "credit.png").exists()


def test_the_summary_is_strict_json(tmp_path):
    write_run(tmp_path, summary={"loss": math.nan, "output": {"folder": tmp_path}})
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written == {"loss": "nan", "output": {"folder": str(tmp_path)}}


def test_results_are_in_percent_with_intervals():
    lines = report.markdown(SUMMARY, []).splitlines()
    assert "| accuracy of sampled answers | 25.0% [20.0, 30.0] | 50.0% [45.0, 55.0] |" in lines
    assert "| greedy accuracy | 30.0% [20.0, 40.0] | not measured |" in lines
    assert "| pass@8 | not measured | 87.5% [80.0, 95.0] |" in lines


def test_settings_seconds_and_versions_are_tables():
    lines = report.markdown(SUMMARY, []).splitlines()
    assert lines[0] == "# toy: before and after training"
    assert {"| steps | 20 |", "| sample | 30.0 | 75% |", "| jax | 0.10.2 |"} <= set(lines)
    assert {"| sample | 0.150 | 75% |", "| update | 0.050 | 25% |"} <= set(lines)
    assert {"## Seconds", "## Seconds of a step", "## Versions"} <= set(lines)


@pytest.mark.parametrize(
    "low, high, shown", [(0.18, 0.32, False), (-0.01, 0.1, True), (-0.2, -0.1, False)]
)
def test_an_interval_with_0_is_said_to_show_nothing(low, high, shown):
    difference = {"value": (low + high) / 2, "low": low, "high": high}
    text = report.markdown(SUMMARY | {"difference": difference}, [])
    assert ("does not show that accuracy changed" in text) == shown
    assert f"[{100 * low:+.1f}, {100 * high:+.1f}]" in text


def test_an_empty_summary_still_makes_a_report():
    assert report.markdown({}, []).startswith("# Run")


def test_table_cells_may_contain_bars():
    assert r"| a \| b |" in report.markdown({"device": "a | b"}, [])
