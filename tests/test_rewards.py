"""Reward functions of a user, called as TRL calls them."""

import json
import math
import textwrap
from dataclasses import replace

import numpy as np
import pytest
from small_run import small_config

from jaxrl_sd import config as configuration
from jaxrl_sd import metrics, rollout
from jaxrl_sd.methods import METHODS
from jaxrl_sd.methods.base import Verdicts, verdict_reward
from jaxrl_sd.sampler import Samples
from jaxrl_sd.start import check_judges
from jaxrl_sd.tokens import load_tokenizer
from jaxrl_sd.train import train
from jaxrl_sd.types import InputError, Problem, Sample
from jaxrl_sd.verify.pool import Verdict
from jaxrl_sd.verify.reward import RewardFunctions

FUNCTIONS = """
    from __future__ import annotations

    import asyncio, dataclasses, mmap, sys, time
    from helper import VALUE

    calls = []

    @dataclasses.dataclass
    class Setting:  # looks its module up
        value: float = VALUE

    def length(completions, **kwargs):
        return [float(len(completion)) for completion in completions]

    def tokens(completion_ids, **kwargs):
        return [len(ids) for ids in completion_ids]

    def exact(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    def content(completions, **kwargs):
        return [len(completion[0]["content"]) for completion in completions]

    def last_turn(prompts, completions, **kwargs):
        return [p[-1]["content"] == c[0]["content"] for p, c in zip(prompts, completions)]

    def even(completions, level, **kwargs):
        return [1.0 if x == "even" else None for x in level]

    def odd(completions, level, **kwargs):
        return [-1.0 if x == "odd" else None for x in level]

    def rank(prompts, completions, **kwargs):
        return [sorted(completions).index(completion) for completion in completions]

    async def judged(completions, **kwargs):
        loop = asyncio.get_running_loop()
        calls.append(loop)
        await asyncio.sleep(0.01)
        assert all(each is loop for each in calls)
        return [len(calls)] * len(completions)

    def helped(completions):
        print("a reward function may print")
        return (Setting().value for completion in completions)

    def everything(**kwargs):
        return [sorted(kwargs) == ["answer", "completion_ids", "completions", "level", "prompts"]
                and kwargs["answer"] == ["own"] for _ in kwargs["prompts"]]

    def large(completions):
        return [len(mmap.mmap(-1, 5 << 30)) > 0 for _ in completions]

    def sees_jax(completions):
        return ["jax" in sys.modules for _ in completions]

    def state(completions, trainer_state):
        return [0.0] * len(completions)

    def fails(completions, **kwargs):
        raise KeyError("gold")

    def hangs(completions, **kwargs):
        time.sleep(1000)

    def leaves(completions, **kwargs):
        sys.exit(0)

    def too_few(completions, **kwargs):
        return [1.0]

    def nothing(completions, **kwargs):
        pass

    def number(completions, **kwargs):
        return 1.0

    def nan(completions, **kwargs):
        return [float("nan")] * len(completions)

    def infinite(completions, **kwargs):
        return [float("inf")] * len(completions)

    def text(completions, **kwargs):
        return ["1.0"] * len(completions)

    def lists(completions, **kwargs):
        return [[1.0]] * len(completions)
"""

PROBLEM = Problem("id", "3?", "three", columns={"level": "even"})
TEXTS, IDS = ["three", "tree"], [(1, 2, 3), (4,)]


@pytest.fixture
def target(tmp_path):
    """name -> the target of a function of `FUNCTIONS`."""
    (tmp_path / "math.py").write_text(textwrap.dedent(FUNCTIONS))  # a name that Python uses too
    (tmp_path / "helper.py").write_text("import math\nVALUE = math.sqrt(0.0625)")
    return lambda name: f"{tmp_path}/math.py:{name}"


def judge(*targets, problems=(PROBLEM, PROBLEM), weights=(), correct_above=0.5, timeout_s=60.0):
    with RewardFunctions(targets, weights, correct_above, timeout_s) as functions:
        functions.check(problems)
        return functions.judge(problems, TEXTS, IDS)


def scores(*targets, **settings):
    return [verdict.score for verdict in judge(*targets, **settings)]


def test_a_verdict_has_the_score_and_what_each_function_gave(target):
    assert judge(target("exact"), target("tokens"), weights=(2.0, 0.5)) == [
        Verdict(True, "ok", "", 3.5, {"exact": 1.0, "tokens": 3.0}),
        Verdict(False, "ok", "", 0.5, {"exact": 0.0, "tokens": 1.0}),
    ]
    assert [v.correct for v in judge(target("tokens"), correct_above=-1)] == [True, True]
    assert [v.correct for v in judge(target("tokens"), correct_above=3)] == [False, False]


def test_none_leaves_a_function_out_of_the_sum(target):
    problems = [replace(PROBLEM, columns={"level": level}) for level in ("even", "neither")]
    even, odd, length = target("even"), target("odd"), target("length")
    assert judge(even, odd, problems=problems) == [
        Verdict(True, "ok", "", 1.0, {"even": 1.0, "odd": None}),
        Verdict(None, "none", "", None, {"even": None, "odd": None}),  # and is not wrong
    ]
    assert scores(even, length, problems=problems, weights=(10.0, 1.0)) == [15.0, 4.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("length", [5, 4]),
        ("rank", [0, 1]),  # sees the whole batch
        ("judged", [1, 1]),  # a coroutine
        ("helped", [0.25, 0.25]),  # a generator, a module next to the file, a line printed
        ("large", [1, 1]),  # no bound on memory, which a reward model may need
        ("sees_jax", [0, 0]),
    ],
)
def test_functions_that_users_have(target, name, expected):
    assert scores(target(name)) == expected


def test_columns_are_the_data_sets_own(target):
    assert scores(target("exact")) == [1.0, 0.0]  # the problem's answer
    columns = {"prompt": "3?", "answer": "tree", "level": "even"}
    own = replace(PROBLEM, columns=columns)
    assert scores(target("exact"), problems=(own, own)) == [0.0, 1.0]
    other = replace(PROBLEM, columns={**columns, "answer": "own"})
    with RewardFunctions([target("everything")], (), 0.5, 60) as functions:
        assert functions.judge([other], ["x"], [()])[0].score == 1.0


def test_messages_stay_messages(target):
    chat = replace(PROBLEM, prompt="tree", chat=True, turns=(("system", "Be brief."),))
    assert scores(target("content"), problems=(chat, chat)) == [5.0, 4.0]
    assert scores(target("last_turn"), problems=(chat, chat)) == [0.0, 1.0]


def test_functions_keep_their_state_and_their_event_loop(target):
    with RewardFunctions([target("judged")], (), 0.5, 60) as functions:
        calls = [functions.judge([PROBLEM], ["x"], [(1,)])[0].score for _ in range(3)]
    assert calls == [1, 2, 3]


def test_a_function_may_be_in_a_module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def one(completions):\n    return [1] * 2")
    monkeypatch.syspath_prepend(tmp_path)
    assert scores("my_rewards:one") == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "failed: KeyError: 'gold'"),
        ("leaves", "failed: its process died"),
        ("too_few", "expected 2 rewards, one a completion, got 1"),
        ("nothing", "expected a list of rewards, got None"),
        ("number", "expected a list of rewards, got 1.0"),
        ("nan", r"expected None or numbers of at most 1e\+09 as rewards, got nan"),
        ("infinite", r"expected None or numbers of at most 1e\+09 as rewards, got inf"),
        ("text", r"expected None or numbers of at most 1e\+09 as rewards, got '1.0'"),
        ("lists", r"expected None or numbers of at most 1e\+09 as rewards, got \[1\.0\]"),
    ],
)
def test_a_function_that_gives_no_reward_ends_the_run(target, name, message):
    with pytest.raises(InputError, match=rf"reward\.functions: .*math\.py:{name} .*{message}"):
        judge(target("length"), target(name))


def test_a_function_that_hangs_ends_the_run(target):
    with pytest.raises(InputError, match=r"py:hangs took longer than the 0\.5 seconds of reward"):
        judge(target("length"), target("hangs"), timeout_s=0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "failed: AttributeError"),
        ("state", "py:state needs the argument 'trainer_state', and there are "),
        ("even", r"needs the argument 'level', and there are \['answer', 'completion_ids'"),
    ],
)
def test_what_a_function_asks_for_is_looked_at_before_the_run(target, name, message):
    config = small_config("unused", reward__functions=(target(name),))
    problems = [Problem("id", "3?", "three")]
    with pytest.raises(InputError, match=message):
        check_judges(config, problems)
    if name == "even":  # every split must have it
        check_judges(config, [PROBLEM])
        with pytest.raises(InputError, match=message):
            check_judges(config, [PROBLEM], problems)


def test_a_file_that_does_not_load_is_named(tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module\ndef f(completions): ...")
    with pytest.raises(InputError, match=r"broken\.py:f failed: ModuleNotFoundError: .*no_such"):
        judge(f"{tmp_path}/broken.py:f")
    with pytest.raises(InputError, match=r"absent\.py:f failed: FileNotFoundError"):
        judge(f"{tmp_path}/absent.py:f")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"functions": ("rewards.py",)}, "functions: expected 'file.py:name' or 'module:name', "),
        ({"functions": (1,)}, "functions: expected 'file.py:name' or 'module:name', got 1"),
        ({"functions": ("a.py:f", "b.py:f")}, r"expected different names, got \['f', 'f'\]"),
        ({"functions": ("a.py:f",), "weights": (1.0, 2.0)}, "weights: expected 1 numbers"),
        ({"functions": ("a.py:f",), "weights": ("1",)}, "weights: expected float, got '1'"),
        ({"functions": ("a.py:f",), "weights": (math.nan,)}, "weights: expected float, got nan"),
        ({"timeout_s": 0.0}, r"timeout_s: expected more than 0, got 0\.0"),
    ],
)
def test_settings_are_checked(tmp_path, settings, message):
    config = small_config(tmp_path)
    config.reward.update(settings)
    with pytest.raises(InputError, match=rf"reward\.{message}|{message}"):
        configuration.check(config)


def test_a_single_function_may_be_given_as_text(tmp_path):
    config = small_config(tmp_path)
    configuration.override(config, "reward.functions", "a.py:f")
    configuration.override(config, "reward.weights", "2")
    assert (config.reward.functions, config.reward.weights) == (("a.py:f",), (2,))
    configuration.override(config, "reward.functions", "('a.py:f', 'b.py:g')")
    configuration.override(config, "reward.weights", "(1, 0.5)")
    configuration.check(config)


def verdicts(score, graded) -> Verdicts:
    score, graded = np.array(score, float), np.array(graded)
    length = np.ones(len(score), int)
    return Verdicts((score > 0.5) & graded, graded, score, length, length > 1, 2, 20)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "dapo" and "opd" not in name])
def test_every_method_takes_the_score_as_its_reward(name):
    method = METHODS[name]()
    grades = method.grade(verdicts([0.3, -2.5, 1.0, 0.0], [True, True, True, False]))
    np.testing.assert_array_equal(grades.reward, np.array([0.3, -2.5, 1.0, 0.0], np.float32))


def test_the_rewards_of_verdicts_are_what_they_were():
    given = verdicts([1.0, 0.0, 0.0, 1.0], [True, True, False, True])
    np.testing.assert_array_equal(verdict_reward(given).reward, np.float32([1, 0, 0, 1]))
    np.testing.assert_array_equal(METHODS["dapo"]().grade(given).reward, [1.0, -1.0, -1.0, 1.0])
    graded = verdicts([0.75, 0.25, 0.5, 0.9], [True] * 4)
    np.testing.assert_array_equal(METHODS["dapo"]().grade(graded).reward, 2 * graded.score - 1)


def test_scores_become_rewards_and_metrics(target):
    tokenizer = load_tokenizer(configuration.TINY_MODEL)
    problems = [replace(PROBLEM, columns={"level": level}) for level in ("odd", "neither")]
    response = np.full((2, 2, 3), tokenizer.eos_token_id)
    samples = Samples(
        response, np.array([[1, 3], [2, 2]]), np.zeros((2, 2), bool), 0.0 * response, 0.0 * response
    )
    functions = (target("odd"), target("tokens"))
    with RewardFunctions(functions, (1.0, 0.25), -0.5, 60) as pool:
        groups = rollout.verify(problems, samples, tokenizer, [tokenizer.eos_token_id], pool)
    assert [[s.score for s in group] for group in groups] == [[-0.75, -0.25], [0.5, 0.5]]
    rows, _ = rollout.grade(np.zeros((2, 1)), np.ones(2, int), samples, groups, verdict_reward)
    np.testing.assert_array_equal(rows.reward, [-0.75, -0.25, 0.5, 0.5])
    np.testing.assert_array_equal(rows.correct, [0, 1, 1, 1])
    ungraded = [replace(groups[0][0], correct=None, score=None, rewards={"odd": None, "tokens": 1})]
    described = rollout.describe([*groups, ungraded])
    assert described["rollout/score"] == 0.0
    assert described["rollout/ungraded"] == 0.2
    assert (described["reward/odd"], described["reward/odd_none"]) == (-1.0, 3)
    assert (described["reward/tokens"], described["reward/tokens_none"]) == (1.8, 0)


def test_a_sample_without_a_verdict_has_no_reward():
    described = rollout.describe([[Sample((), "", None, False, rewards={"f": None})]])
    for name in ("reward/f", "rollout/accuracy", "rollout/score", "rollout/all_wrong"):
        assert math.isnan(described[name]), name
    assert described["reward/f_none"] == described["rollout/ungraded"] == 1


REWARDS = """
    import itertools

    calls = itertools.count()

    def brevity(completions, completion_ids, answer, **kwargs):
        assert next(calls) < {calls}
        assert len(completions) == len(completion_ids) == len(answer) in (4, 16)
        return [1 / len(ids) for ids in completion_ids]

    def ending(completions, prompts, **kwargs):
        return [completion.split(" ")[-1] == prompt.split(" ")[-1]
                for completion, prompt in zip(completions, prompts, strict=True)]
"""


def test_a_run_whose_reward_function_fails_goes_on_once_it_is_mended(tmp_path):
    source = textwrap.dedent(REWARDS)
    config = small_config(tmp_path / "run", method__name="grpo", data__num_test=4)
    config.steps, config.evaluation.every, config.evaluation.samples = 2, 2, 4
    config.reward.functions = tuple(f"{tmp_path}/rewards.py:{n}" for n in ("brevity", "ending"))
    config.reward.weights = (0.5, 2.0)
    # Two evaluations at the start, sampled and greedy, and the first step come before.
    (tmp_path / "rewards.py").write_text(source.replace("{calls}", "3"))
    with pytest.raises(InputError, match=r"rewards\.py:brevity failed: AssertionError"):
        train(config)
    assert [row["step"] for row in metrics.read(tmp_path / "run")] == [0, 1]
    (tmp_path / "rewards.py").write_text(source.replace("{calls}", "100"))
    train(config)
    rows = metrics.read(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 2, 2]  # training and evaluation
    for row in rows[1:3]:
        assert 0 < row["reward/brevity"] <= 1
        assert row["reward/brevity_none"] == 0  # so that the score is a sum of means
        terms = 0.5 * row["reward/brevity"] + 2 * row["reward/ending"]
        assert row["rollout/score"] == pytest.approx(terms)
        assert row["rollout/reward"] == pytest.approx(row["rollout/score"])
    assert {"eval/reward/brevity", "eval/reward/ending"} < rows[0].keys() & rows[3].keys()
    lines = (tmp_path / "run" / "rollouts" / "000002.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        assert record["reward"] == pytest.approx(record["score"])
        assert record["rewards"].keys() == {"brevity", "ending"}
        assert record["correct"] == (record["score"] > 0.5)
