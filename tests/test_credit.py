"""Records of token credit: the same answers for every method, and the numbers that made it."""

import json
import math

import numpy as np
import pytest
from small_run import small_config

from jaxrl_sd import credit, metrics, records, report
from jaxrl_sd.train import train
from jaxrl_sd.types import InputError, Sample

RLSD = {"name": "rlsd", "eps_w": 0.5}
NAMES = ["grpo", "rlsd eps_w=0.5", "cast", "hsd", "sc_grpo"]


def config_of(folder):
    """Answers so short that some are cut off; evaluations of the shapes of rollouts."""
    return small_config(folder, method__name="hsd", rollout__max_response=14, evaluation__samples=4)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """What five methods make of four groups of four answers, a whole batch."""
    folder = tmp_path_factory.mktemp("credit") / "run"
    methods = ["grpo", RLSD, "cast", "hsd", "sc_grpo"]
    found = credit.of_methods(config_of(folder), methods, num_problems=4)
    assert not folder.exists()
    return found


def values(record, name):
    return np.array(record[name])


def test_all_methods_judge_the_same_answers(given):
    assert list(given) == NAMES
    keys = ("step", "prompt", "answer", "response_tokens", "correct", "truncated")
    answers = [[[record[key] for key in keys] for record in given[name]] for name in NAMES]
    assert all(others == answers[0] for others in answers[1:])
    assert len(answers[0]) == 16 and answers[0][0][0] == 1
    assert {record["method"] for record in given[NAMES[1]]} == {"rlsd"}
    groups = [given["grpo"][i : i + 4] for i in range(0, 16, 4)]
    assert [len({record["prompt"] for record in group}) for group in groups] == [1] * 4
    verdicts = [len({record["correct"] for record in group}) for group in groups]
    assert verdicts == sorted(verdicts, reverse=True) and verdicts[0] == 2


def test_grpo_praises_or_blames_whole_answers(given):
    for record in given["grpo"]:
        assert set(record["advantage"]) == {record["advantage_of_row"]}
        assert record["distill"] == [0] * len(record["response_tokens"])
        assert "divergence" not in record
    for record in given["grpo"][:4]:
        assert record["advantage_of_row"] * (1 if record["correct"] else -1) > 0


def test_weight_and_gap_of_a_record_explain_rlsds_advantage(given):
    lam = 0.5 * (1 - 1 / 50)
    for record in given["rlsd eps_w=0.5"]:
        A, gap = record["advantage_of_row"], values(record["gap"], "teacher")
        weight = 1 - lam + lam * np.clip(np.exp(np.sign(A) * gap), 0.5, 1.5)
        np.testing.assert_allclose(values(record, "advantage"), A * weight, rtol=1e-5)
        assert record["shown"]["teacher"].find(record["answer"]) > 0
        assert (values(record, "logp") + gap <= 1e-6).all()  # the teacher's log-probability


def test_the_student_is_the_same_for_every_method(given):
    for of_grpo, of_hsd in zip(given["grpo"], given["hsd"], strict=True):
        for name in ("logp", "entropy"):
            np.testing.assert_allclose(of_grpo[name], of_hsd[name], atol=1e-5)
        assert max(of_grpo["logp"]) <= 0 <= min(of_grpo["entropy"])


def test_distillation_shows_its_divergence(given):
    for record in given["hsd"]:
        tokens = len(record["response_tokens"])
        assert record["advantage"] == [0] * tokens and record["distill"] == [1] * tokens
        assert len(record["divergence"]) == tokens and min(record["divergence"]) > -1e-5
    assert max(max(record["divergence"]) for record in given["hsd"]) > 0.1


def test_what_was_not_computed_is_missing(given):
    """CAST does not train on answers that were cut off, and so nobody scores them."""
    assert {record["truncated"] for record in given["cast"]} == {True, False}
    for record in given["cast"]:
        known = [record["logp"], record["entropy"], record["gap"]["teacher"]]
        assert [x is None for x in known] == [record["truncated"]] * 3
        assert any(record["advantage"]) != record["truncated"]  # uniform groups train, too
    assert report.draw_credit(given["cast"]) is not None


def test_what_a_silent_teacher_would_say_is_missing(given):
    """SC-GRPO shows nothing in groups that one or all solved, nor the shown failure itself."""
    assert {record["shown"]["teacher"] is None for record in given["sc_grpo"]} == {True, False}
    for record in given["sc_grpo"]:
        gap, shown = record["gap"]["teacher"], record["shown"]["teacher"]
        assert (gap is None) == (shown is None)
        assert gap is None or any(gap)
        assert record["logp"] is not None
    assert report.draw_credit(given["sc_grpo"]) is not None


def test_training_writes_the_same_records(given, tmp_path, python):
    config = config_of(tmp_path)
    config.steps = 1
    train(config)
    assert records.read_rollouts(tmp_path) == given["hsd"][:4]
    (row,) = [row for row in metrics.read(tmp_path) if "update/divergence" in row]
    divergence = np.mean([np.mean(record["divergence"]) for record in given["hsd"]])
    assert row["update/divergence"] == pytest.approx(divergence, rel=1e-4)
    rollouts, output = f"{tmp_path}/rollouts/000001.jsonl", f"{tmp_path}/a.html"
    done = python("-m", "experiments.show_credit", f"--rollouts={rollouts}", f"--output={output}")
    assert done.returncode == 0 and done.stdout == f"hsd -> {tmp_path}/a.html\n", done.stderr
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")


def test_mixed_groups_come_first():
    verdicts = [[True, True], [None, True], [False, True], [False, None], [True, False]]
    groups = [[Sample((1,), "", verdict, False) for verdict in group] for group in verdicts]
    assert records.mixed_first(groups) == [2, 4, 0, 1, 3]


@pytest.mark.parametrize(
    ("methods", "num_problems", "message"),
    [
        (["grpo", "grbo"], 1, "method.name: expected one of .*'grbo'"),
        ([{"name": "rlsd", "eps": 1.0}], 1, "method.eps: rlsd has"),
        ([{}], 1, "method.name: expected one of .*None"),
        (["opd"], 1, "method.teacher: opd cannot do without it"),
        (["grpo", "rlsd", "grpo"], 1, "methods: grpo is there twice"),
        ([], 1, "methods: expected at least one"),
        (["grpo"], 0, "num_problems: expected 1 to 4 .rollout.prompts., got 0"),
        (["grpo"], 5, "num_problems: expected 1 to 4"),
    ],
)
def test_wrong_methods_are_refused_before_anything_is_read(
    tmp_path, monkeypatch, methods, num_problems, message
):
    monkeypatch.setattr(credit, "prepare", lambda config: pytest.fail("read"))
    with pytest.raises(InputError, match=message):
        credit.of_methods(small_config(tmp_path), methods, num_problems)


LINE = {"prompt": "1?", "response_tokens": ["1", "2"], "advantage": [1.0, "nan"], "logp": None}


def write(path, *lines):
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return str(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "is empty"),
        ("{", "line 1: got '{', expected an answer"),
        ("[1]\n", "line 1: got"),
        ({"step": 1, "reward": 0.5}, "line 1: got"),
        (LINE | {"response_tokens": "12"}, "expected texts as prompt and response_tokens"),
        (LINE | {"prompt": 1}, "expected texts as prompt and response_tokens"),
        (LINE | {"advantage": [1.0]}, "line 1: advantage: expected 2 numbers"),
        (LINE | {"logp": 0.5}, "line 1: logp: expected 2 numbers"),
        (LINE | {"gap": {"teacher": [1.0, None]}}, "line 1: teacher: expected 2 numbers"),
        (LINE | {"gap": [1.0, 2.0]}, "line 1: gap: expected an object"),
    ],
)
def test_broken_files_are_refused_by_place(tmp_path, line, message):
    with pytest.raises(InputError, match=f"rollouts: .*broken.jsonl.*{message}"):
        records.of_files([write(tmp_path / "broken.jsonl", line)])


def test_files_are_called_by_their_methods_where_that_tells_them_apart(tmp_path):
    old, a, b, c = (
        write(tmp_path / f"{i}.jsonl", LINE | fields)
        for i, fields in enumerate([{}, {"method": "grpo"}, {"method": "hsd"}, {"method": "grpo"}])
    )
    assert list(records.of_files([a, b])) == ["grpo", "hsd"]
    assert list(records.of_files([a, c])) == [a, c]
    assert list(records.of_files([old, b])) == [old, b]
    (record,) = records.of_files([old])[old]
    assert math.isnan(float(record["advantage"][1]))
