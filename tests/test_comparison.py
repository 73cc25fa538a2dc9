"""The comparison of methods: its runs, its statistics and its report."""

import json
import math
import re
import shutil
from concurrent.futures import Future

import jax
import numpy as np
import pytest
import scipy.stats
from small_run import small_config

from experiments.comparison import claims, pages, plan, report, rows, runs, statistics
from experiments.comparison.plan import Arm, Plan
from jaxrl_sd import metrics, train
from jaxrl_sd.methods import METHODS
from jaxrl_sd.types import InputError


def small_plan(**changes) -> Plan:
    task = small_config("")
    task.steps = 1
    arms = {
        "grpo": Arm({"method.name": "grpo"}),
        "opd": Arm({"method.name": "opd", "method.teacher": "{teacher}"}, rate_of="grpo"),
        "too few": Arm({"method.name": "dapo", "rollout.max_rounds": 1}, rate_of="grpo"),
    }
    defaults = dict(
        tasks={"small": task},
        arms=arms,
        seeds=(0, 1),
        before={"teacher": {"method.name": "grpo"}},
        rates=(1e-4, 1e-3),
        search_seeds=(7,),
    )
    return Plan(**defaults | changes)


class Inline:
    """An executor that runs what it is given at once, in this process."""

    def __init__(self, *_):
        self.made = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def submit(self, function, job):
        self.made += 1
        future = Future()
        future.set_result(function(job))
        return future


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder and the summary of a real run, which stand for all others."""
    folder = tmp_path_factory.mktemp("run")
    config = small_config(folder)
    config.steps = 1
    return folder, train.train(config)


@pytest.fixture
def copied(trained, monkeypatch):
    """Every run is a copy of the real one, but for one arm, which fails."""

    def copy(config):
        if config.method.name == "dapo":
            raise InputError("rollout.max_rounds: dapo kept 0")
        shutil.copytree(trained[0], config.output_dir, dirs_exist_ok=True)
        return trained[1]

    monkeypatch.setattr(train, "train", copy)
    monkeypatch.setattr(runs, "_pool", Inline)
    monkeypatch.setattr(jax, "clear_caches", lambda: None)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture
def made(root, copied):
    return runs.make(small_plan(), root, 1)


def test_every_run_of_a_plan_is_made_and_one_that_fails_stops_no_other(made, root):
    of = {(row["stage"], row["arm"], row["rate"], row["seed"]): row for row in made}
    assert len(of) == len(made) == 1 + 2 + 3 * 2
    failed = [row for row in made if "error" in row]
    assert {row["arm"] for row in failed} == {"too few"}
    assert all("rollout.max_rounds: dapo kept" in row["error"] for row in failed)
    final = [row for row in made if row["stage"] == "final" and "error" not in row]
    for row in final:
        assert 0 <= row["accuracy"] <= row["best"] <= 1 and row["kl_to_start"] > 0
        assert [step for step, _ in row["curves"]["eval/accuracy"]] == [0, 1]
        assert not list(root.rglob(f"{row['arm']}/*/checkpoints"))
    config = json.loads((root / "small/final/opd").glob("*-0/result.json").__next__().read_text())
    assert config["config"]["method"]["teacher"] == str(
        root / "small/before/teacher/0.0005-8/model"
    )


def test_what_is_finished_is_not_made_again(made, root, monkeypatch):
    pool = Inline()
    monkeypatch.setattr(runs, "_pool", lambda *_: pool)
    again = runs.make(small_plan(), root, 1)
    assert pool.made == 2 and again == made  # the two that fail
    other = small_plan(arms={"grpo": Arm({"method.name": "dr_grpo"})}, before={})
    with pytest.raises(InputError, match=r"--output_dir: .*result.json is of another plan"):
        runs.make(other, root, 1)


def test_the_report_says_where_matched_lengths_change_nothing(made):
    the_plan = small_plan()
    found = report.lines(the_plan, made, "small")

    def says(found):
        return any("length-matched" in text for text in report.conclusions(the_plan, found))

    same = [line._replace(within=line.difference) for line in found]
    assert says(same)
    other = [x._replace(within=x.within._replace(value=x.difference.value - 0.01)) for x in same]
    assert not says(other)


def test_the_report_has_every_arm_and_needs_no_other_file(made, tmp_path):
    the_plan = small_plan()
    summary = report.write(tmp_path, the_plan, made)
    assert "Did not finish on every seed: `too few`." in summary
    assert "Not significant (this comparison does not show that they differ): `opd`" in summary
    assert json.loads((tmp_path / "runs.json").read_text()) == made
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 3
    assert not re.search(r"(src|href|url)\s*[=(]\s*.?(https?:|/)", page)
    for arm in the_plan.arms:
        assert f"<td>{arm}</td>" in page
    assert "rollout.max_rounds: dapo kept" in page
    beside = {found.control: found for found in report.controls(the_plan, made, "small")}
    assert list(beside) == ["opd", "too few"] and beside["opd"].arm == "grpo"
    assert beside["opd"].difference.n == 2 and math.isnan(beside["too few"].difference.value)
    assert "| grpo | opd |" in summary and "<td>grpo</td><td>opd</td>" in page


def test_the_rate_of_an_arm_is_that_of_its_best_search():
    def row(arm, rate, accuracy, seed=0):
        found = {"metrics": {"rollout/accuracy": accuracy}} if accuracy is not None else {}
        return {"task": "t", "stage": "search", "arm": arm, "rate": rate, "seed": seed} | found

    found = [
        row("a", 1e-3, 0.5),
        row("a", 1e-4, 0.6),
        row("a", 1e-4, 0.1, 1),
        row("a", 1e-3, 0.5, 1),
    ]
    found += [row("b", 1e-3, None), row("b", 1e-4, 0.2)]
    assert runs.best_rates(found) == {("t", "a"): 1e-3, ("t", "b"): 1e-4}


def test_controls_have_the_rate_of_their_arm(tmp_path):
    arms = {"a": Arm({}), "b": Arm({}), "of a": Arm({}, rate_of="a")}
    jobs = plan.final(small_plan(arms=arms), tmp_path, {("small", "a"): 2e-4, ("small", "b"): 3e-4})
    assert {job.arm: job.rate for job in jobs} == {"a": 2e-4, "b": 3e-4, "of a": 2e-4}
    assert all(job.config.optimizer.learning_rate == job.rate for job in jobs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "x"}, "baseline: expected one of .*, got 'x'"),
        ({"search_seeds": (0,)}, "search_seeds: 0 is one of seeds, too"),
        ({"rates": ()}, "rates: a search needs both"),
        ({"arms": {"grpo": Arm({}, rate_of="x")}}, "arms: rate_of of grpo: 'x' is no arm"),
        ({"arms": {"grpo": Arm({"method.nam": "x"})}}, "small, grpo: .*nam"),
    ],
)
def test_a_wrong_plan_is_refused_before_any_run(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        plan.check(small_plan(**changes), tmp_path)


def test_a_search_needs_problems_that_come_once(tmp_path):
    wrong = small_plan()
    wrong.tasks["small"].data.num_train = 3
    with pytest.raises(InputError, match=r"data.num_train: small: .* at least 4, got 3"):
        plan.check(wrong, tmp_path)


def test_checking_a_plan_makes_no_folder_of_a_run(tmp_path):
    plan.check(small_plan(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_without_a_plan_is_refused(tmp_path):
    (tmp_path / "plan.py").write_text("x = 1")
    with pytest.raises(InputError, match=r"--plan: .*plan.py gives no plan: KeyError"):
        plan.load(str(tmp_path / "plan.py"))


# Statistics.


def test_paired_differences_are_those_of_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5))
    found = statistics.paired(a, b)
    expected = scipy.stats.ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    np.testing.assert_allclose(found.p, expected.pvalue)
    np.testing.assert_allclose([found.low, found.high], [interval.low, interval.high])
    assert found.n == 5


def test_a_missing_seed_takes_no_part_in_a_difference():
    found = statistics.paired([1, 2, math.nan, 4], [0, 0, 0, math.nan])
    assert (found.value, found.n) == (1.5, 2)
    assert math.isnan(statistics.paired([1.0], [0.0]).p)
    assert statistics.paired([1, 1], [0, 0]).p == 0 and statistics.paired([1, 1], [1, 1]).p == 1


def test_holm_is_never_below_p_and_leaves_out_nan():
    np.testing.assert_allclose(statistics.holm([0.04, 0.01, math.nan]), [0.04, 0.02, math.nan])
    assert statistics.holm([0.5, 0.6]) == [1.0, 1.0]


# Rows.


def test_lengths_are_matched_with_the_baseline_of_the_same_seed():
    verdicts = np.array([[1, 0], [1, math.nan], [math.nan, math.nan]])
    length = np.array([[3, 9], [8, 9], [1, 1]])
    parts = rows._right_lengths(verdicts, length)
    assert parts == [[3, 0.25], [8, 0.5]]  # problem 0: half; problem 1: its one verdict

    def row(arm, seed, longest):
        of = {"task": "t", "stage": "final", "arm": arm, "seed": seed}
        return of | {"right_lengths": parts, "longest": longest}

    found = rows.match_lengths([row("grpo", 0, 5), row("x", 0, 99), row("x", 1, 99)], "grpo")
    assert [r.get("accuracy_within") for r in found] == [0.25, 0.25, None]


def test_a_row_sums_up_what_a_run_wrote(trained):
    folder, summary = trained
    row = rows.of_run(folder, summary)
    log = [line for line in metrics.read(folder) if line["step"] == 1]
    assert row["metrics"]["rollout/length"] == float(f"{log[0]['rollout/length']:.6g}")
    assert row["accuracy"] == pytest.approx(log[1]["eval/accuracy"], rel=1e-5)
    assert math.isclose(sum(share for _, share in row["right_lengths"]), row["accuracy"])


# Claims.


def rows_of(arm: str, values, task="t") -> list[dict]:
    of = {"task": task, "stage": "final", "arm": arm}
    return [of | {"seed": s, "accuracy": x, "early": {"a/b": 2 * x}} for s, x in enumerate(values)]


@pytest.mark.parametrize(
    ("expected", "margin", "values", "verdict"),
    [
        ("above", 0, [0.1, 0.11, 0.12], claims.HOLDS),
        ("above", 0, [-0.1, -0.11, -0.12], claims.FAILS),
        ("above", 0, [0.1, -0.11, 0.12], claims.UNDECIDED),
        ("below", 0, [-0.1, -0.11, -0.12], claims.HOLDS),
        ("below", 0, [0.1, 0.11, 0.12], claims.FAILS),
        ("within", 0.5, [0.1, 0.11, 0.12], claims.HOLDS),
        ("within", 0.05, [0.1, 0.11, 0.12], claims.FAILS),
        ("within", 0.05, [-0.1, -0.11, -0.12], claims.FAILS),
        ("within", 0.11, [0.1, 0.11, 0.12], claims.UNDECIDED),
        ("above", 0, [0.1], claims.UNDECIDED),
        ("above", 0, [], claims.NOT_MEASURED),
    ],
)
def test_a_verdict_follows_the_interval(expected, margin, values, verdict):
    number = claims.against("a", "b", "accuracy")
    claim = claims.Claim("P", "text", "t", "x", number, expected, margin)
    rows = [*rows_of("a", values), *rows_of("b", [0.0] * len(values))]
    assert claims.markdown(rows, [claim]).rstrip().endswith(f"| **{verdict}** |")


def test_numbers_of_claims_are_paired_by_seed_and_of_their_task():
    found = claims.Runs([*rows_of("a", [1.0, 2.0, 5.0]), *rows_of("b", [0.5, 1.0])])
    assert claims.against("a", "b", "accuracy")(found)[:1] == (0.75,)
    assert claims.change("a", "early.a/b", "accuracy")(found).value == pytest.approx(8 / 3)
    assert claims.level("b", "accuracy")(found).value == 0.75
    other = claims.Claim("P", "text", "other", "x", claims.level("a", "accuracy"))
    assert claims.NOT_MEASURED in claims.markdown(rows_of("a", [1.0, 2.0]), [other])


def test_every_claim_asks_for_arms_and_numbers_that_exist(trained):
    """A misspelt name would be called not measured."""
    folder, summary = trained
    real = rows.of_run(folder, summary) | {"kl_to_start": 0.0}
    arms = {a for p in ("countdown", "chains") for a in plan.load(f"experiments/plans/{p}.py").arms}
    asked = set()

    class Spy(claims.Runs):
        def values(self, arm, name):
            asked.add((arm, name))
            return {}

    for claim in claims.CLAIMS:
        claim.number(Spy([]))
    assert {arm for arm, _ in asked} <= arms
    have = claims._with_third(real | {"early": real["metrics"]})
    missing = {name for _, name in asked if math.isnan(claims._at(have, name.split(".")))}
    assert not missing


def test_the_page_of_methods_has_a_section_for_each(made):
    renamed = [
        row | {"arm": "rlsd, lambda 0" if row["arm"] == "opd" else row["arm"]} for row in made
    ]
    text = pages.markdown(renamed, claims.CLAIMS)
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert list(sections) == list(METHODS)
    assert "| small | grpo | 0.0001 |" in sections["grpo"]
    assert "| small | rlsd, lambda 0 | 0.0001 |" in sections["rlsd"]
    assert "sg[log" in sections["cast"] and "Deviations" not in text
    assert (
        "Not measured." in sections["hsd"] and "hsd ends more accurate than opsd" in sections["hsd"]
    )
    asked = {claim.paper.lower().replace("-", "_") for claim in claims.CLAIMS}
    assert asked <= METHODS.keys()
