"""Answers are kept as they come, whatever stops the program, and results follow from them alone."""

import json
import signal

import pytest

from jaxrl_sd import answers, benchmarks, data, difficulty, results, start
from jaxrl_sd import config as configuration
from jaxrl_sd.types import InputError, Problem

FILES = (answers.FILE, answers.SETTINGS, "results.json", "results.md")


def small(folder, **settings):
    """Ten problems, three answers each, four problems at a time."""
    config = configuration.default()
    config.output_dir = str(folder)
    config.data.num_test = 10
    config.rollout.prompts, config.evaluation.samples = 4, 3
    config.verifier.workers = 1
    for field, value in settings.items():
        configuration.override(config, field.replace("__", "."), str(value))
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    answers.collect(small(folder), "test")
    results.write(folder)
    return folder


def copy(whole, folder, text):
    """What a run leaves that was killed when its file of samples held `text`."""
    folder.mkdir(exist_ok=True)
    (folder / answers.SETTINGS).write_text((whole / answers.SETTINGS).read_text())
    (folder / answers.FILE).write_text(text)
    return folder


def test_every_problem_has_a_line(whole):
    settings, records = answers.read(whole)
    assert len(records) == 10 and {len(record["samples"]) for record in records} == {3}
    assert [record["id"] for record in records] == [f"countdown/test/0/{i}" for i in range(10)]
    assert settings["samples"] == 3 and settings["rollout"]["temperature"] == 1.0
    texts = [sample["text"] for record in records for sample in record["samples"]]
    assert len(set(texts)) > 15
    for record in records:
        for sample in record["samples"]:
            assert sample["status"] == "ok" and sample["final_answer"] is None
            words = len(sample["text"].split())
            assert sample["length"] == words + (not sample["truncated"])  # the stop token counts


@pytest.mark.parametrize("lines", [0, 4, 6, 8, 9])
@pytest.mark.parametrize("half", ["", '{"id": "countdown/te'])
def test_a_stopped_run_continues_bit_for_bit(whole, tmp_path, lines, half):
    """Also where it stopped within a batch, or within a line."""
    written = (whole / answers.FILE).read_text().splitlines(keepends=True)
    folder = copy(whole, tmp_path, "".join(written[:lines]) + half)
    answers.collect(small(folder), "test")
    results.write(folder)
    for name in FILES:
        assert (folder / name).read_text() == (whole / name).read_text(), name


def test_a_batch_depends_on_its_number_and_the_seed(whole, tmp_path):
    answers.collect(small(tmp_path / "more", data__num_test=12), "test")
    answers.collect(small(tmp_path / "seed", seed=1), "test")
    first = (whole / answers.FILE).read_text().splitlines()
    assert (tmp_path / "more" / answers.FILE).read_text().splitlines()[:10] == first
    assert (tmp_path / "seed" / answers.FILE).read_text().splitlines()[0] != first[0]


def test_the_same_problem_has_other_answers_in_another_batch(tmp_path):
    file = tmp_path / "same.jsonl"
    row = {"prompt": "4 7 4 : 32", "answer": "7 * 4", "verifier": "countdown"}
    file.write_text((json.dumps(row) + "\n") * 8)
    _, records = answers.collect(small(tmp_path, data__test=file), "test")
    texts = [[sample["text"] for sample in record["samples"]] for record in records]
    assert texts[:4] != texts[4:]


def test_a_finished_run_samples_nothing(whole, tmp_path, monkeypatch):
    folder = copy(whole, tmp_path, (whole / answers.FILE).read_text())
    monkeypatch.setattr(answers.sampler, "sample", lambda *args, **kwargs: pytest.fail("sampled"))
    problems, records = answers.collect(small(folder), "test")
    assert len(problems) == len(records) == 10


KILLED = """
import sys
from test_answers import small
from jaxrl_sd import answers
import os, signal

def write_down(*args, call=answers._line, seen=[]):
    seen.append(1)
    if len(seen) == 6:  # in the second batch
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*args)

answers._line = write_down
answers.collect(small(sys.argv[1]), "test")
"""


def test_a_killed_process_loses_one_batch(whole, tmp_path, python):
    folder = tmp_path / "killed"
    done = python("-c", KILLED, folder)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert len((folder / answers.FILE).read_text().splitlines()) == 4
    answers.collect(small(folder), "test")
    assert (folder / answers.FILE).read_text() == (whole / answers.FILE).read_text()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rollout.temperature", 0.7, "rollout.temperature = 1.0, got 0.7"),
        ("rollout.top_p", 0.9, "rollout.top_p = 1.0, got 0.9"),
        ("rollout.prompts", 5, "rollout.prompts = 4, got 5"),
        ("rollout.max_prompt", 16, "rollout.max_prompt = 12, got 16"),
        ("evaluation.samples", 4, "samples = 3, got 4"),
        ("seed", 1, "seed = 0, got 1"),
        ("data.num_test", 11, "data.num_test = 10, got 11"),
        ("data.suffix", " ;", "data.suffix = '', got ' ;'"),
    ],
)
def test_answers_of_other_settings_are_refused(whole, field, value, message):
    config = small(whole, **{field.replace(".", "__"): value})
    with pytest.raises(InputError, match=f"output_dir: .* holds a run with {message}"):
        answers.collect(config, "test")


def test_what_answers_do_not_depend_on_may_change(whole):
    config = small(whole, verifier__workers=2, data__train="no/such/file.jsonl", steps=7)
    assert len(answers.collect(config, "test")[1]) == 10


def test_other_weights_and_other_problems_are_refused(whole, tmp_path):
    settings = json.loads((whole / answers.SETTINGS).read_text())
    for field in ("weights", "problems"):
        folder = copy(whole, tmp_path / field, "")
        (folder / answers.SETTINGS).write_text(json.dumps({**settings, field: "0"}))
        with pytest.raises(InputError, match=rf"holds a run with {field} = '0', got '?\w+'?;") as e:
            answers.collect(small(folder), "test")
        assert "None" not in str(e.value)


def test_greedy_answers_come_one_at_a_time(tmp_path):
    config = small(tmp_path, rollout__temperature=0.0)
    with pytest.raises(InputError, match=r"evaluation.samples: greedy .* expected 1, got 3"):
        answers.collect(config, "test")
    config.evaluation.samples = 1
    first = [record["samples"] for record in answers.collect(config, "test")[1]]
    config.seed, config.output_dir = 1, str(tmp_path / "again")
    assert [record["samples"] for record in answers.collect(config, "test")[1]] == first


def test_damaged_answers_are_named(whole, tmp_path):
    lines = (whole / answers.FILE).read_text().splitlines(keepends=True)
    for line in ("nonsense\n", "[]\n", "{}\n"):
        folder = copy(whole, tmp_path, lines[0] + line + lines[2])
        with pytest.raises(
            InputError, match=r"samples.jsonl, line 2: got .*, expected the answers"
        ):
            answers.collect(small(folder), "test")
    with pytest.raises(InputError, match=r"output_dir: .*nowhere holds no answers"):
        results.write(tmp_path / "nowhere")


# ---- results


def record(
    name, correct, final=None, verifier="math", truncated=False, length=10, score=None, **rewards
):
    samples = [
        {
            "text": "",
            "correct": verdict,
            "score": score if verdict is None or rewards else float(verdict),
            "rewards": rewards,
            "truncated": truncated,
            "length": length,
            "final_answer": answer,
            "status": "timeout" if verdict is None else "ok",
        }
        for verdict, answer in zip(correct, final or [None] * len(correct), strict=True)
    ]
    return {"id": name, "prompt": "", "answer": "1", "verifier": verifier, "samples": samples}


SETTINGS = {
    "model": {"path": "m"},
    "data": {"test": "d", "suffix": "\n\nThink."},
    "samples": 4,
    "reward": {"functions": []},
}
RECORDS = [
    record("a", [True, True, False, None], ["1", "1", "2", None], length=20),
    record("b", [True, False, False, False], ["1", "2", "2", "3"]),
    record("c", [False] * 4, [None] * 4, truncated=True, length=30),
]


def test_results_by_hand():
    out = results.summarize(SETTINGS, RECORDS)
    value = {name: estimate["value"] for name, estimate in out["estimates"].items()}
    assert value == pytest.approx(
        {
            "avg@4": (2 / 3 + 1 / 4 + 0) / 3,
            "pass@2": (1 + 1 / 2 + 0) / 3,
            "pass@4": (1 + 0) / 2,  # one of the first problem's samples was not judged
            "maj@4": (1 + 0 + 0) / 3,
            "avg@4 of finished answers": (2 / 3 + 1 / 4) / 2,
            "truncated": 1 / 3,
            "length": 20.0,
        }
    )
    assert out["counts"] == {
        "answers": 12,
        "ungraded": 1,
        "verifier timeouts": 1,
        "verifier errors": 0,
        "without a final answer": 5,
    }
    assert out["problems"][0] == {
        "id": "a",
        "correct": 2,
        "graded": 3,
        "majority": 1.0,
        "truncated": 0,
        "length": 20.0,
    }
    text = results.markdown(out)
    assert "| maj@4 | 33.3% [0.0, 100.0] | 3 |" in text
    assert "| length in tokens | 20.0 [10.0, 30.0] | 3 |" in text
    assert '| data.suffix | "\\n\\nThink." |' in text  # or the table would end here
    assert "| a | 2/3 | correct | 0 | 20.0 |\n| b | 1/4 | wrong | 0 | 10.0 |" in text


def test_rewards_are_averaged_where_they_could_be_given():
    settings = {**SETTINGS, "reward": {"functions": ["r.py:f", "r.py:g"], "correct_above": 0.5}}
    judged = record("a", [True, True], score=2.5, f=2.0, g=None)
    failed = record("b", [None, None], f=None, g=None)
    out = results.summarize(settings, [judged, failed])
    assert out["estimates"]["score"]["value"] == 2.5
    assert out["estimates"]["reward/f"] == out["estimates"]["score"] | dict.fromkeys(
        ("value", "low", "high"), 2.0
    )
    text = results.markdown(out)
    assert "| score | 2.5 [2.5, 2.5] | 1 |\n| reward/f | 2 [2, 2] | 1 |" in text
    assert "| reward/g | not measured | 0 |" in text
    assert "Correct: a score above 0.5." in text
    assert not {"score", "reward/f"} & results.summarize(SETTINGS, RECORDS)["estimates"].keys()


@pytest.mark.parametrize("functions", [(), ("rewards.py:length",)])
def test_without_final_answers_nothing_is_voted_on(functions):
    verifier = "math" if functions else "countdown"
    settings = {**SETTINGS, "reward": {"functions": functions}}
    out = results.summarize(settings, [record("a", [True, False], verifier=verifier)])
    assert out["estimates"]["maj@2"] is None and out["problems"][0]["majority"] is None
    assert "without a final answer" not in out["counts"]
    text = results.markdown(out)
    assert "| maj@2 | not defined: no final answers are compared | - |" in text
    assert "| a | 1/2 | - |" in text


def test_answers_that_nobody_could_judge_are_strict_json(tmp_path):
    copy_of = copy_settings(tmp_path, [record("a", [None, None])])
    out = results.write(copy_of)
    assert out["counts"]["ungraded"] == 2
    text = (tmp_path / "results.json").read_text()
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["estimates"]["avg@2"]["value"] == "nan"
    assert "| avg@2 | not measured | 0 |" in (tmp_path / "results.md").read_text()


def copy_settings(folder, records):
    (folder / answers.SETTINGS).write_text(json.dumps({**SETTINGS, "samples": 2}))
    (folder / answers.FILE).write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


# ---- the programs


def test_evaluation_of_a_file_of_mathematics_problems(tmp_path, python):
    """The numbers that the shipped model ends with are final answers, so it can vote."""
    rows = [{"id": f"p{n}", "problem": f"{n} 3 : {n + 3}", "answer": str(n + 3)} for n in (4, 5, 6)]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (
        *("--benchmark=aime24", "--decoding=sdpg", f"--output_dir={tmp_path}/run"),
        *(f"--config.data.test={file}", "--config.rollout.prompts=2"),
        *("--config.evaluation.samples=5", "--config.mesh.data=1"),
    )
    done = python("-m", "experiments.evaluate", *arguments)
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "run" / "results.json").read_text())
    assert out["settings"]["samples"] == 5 and out["settings"]["data"]["num_test"] == 0
    assert [problem["id"] for problem in out["problems"]] == ["p4", "p5", "p6"]
    assert out["estimates"]["maj@5"]["value"] >= 0 and out["counts"]["ungraded"] == 0
    _, records = answers.read(tmp_path / "run")
    assert any(sample["final_answer"] for record in records for sample in record["samples"])
    assert "| avg@5 |" in done.stdout and "problem 3/3" in done.stderr
    before = (tmp_path / "run" / "results.md").read_text()
    done = python("-m", "experiments.evaluate", *arguments, "--config.rollout.top_k=3")
    assert done.returncode == 1
    assert "holds a run with rollout.top_k = 0, got 3; choose another folder" in done.stderr
    assert (tmp_path / "run" / "results.md").read_text() == before


@pytest.mark.parametrize(
    ("program", "arguments", "text"),
    [
        ("evaluate", (), "error: flag --output_dir=None: Flag --output_dir must have a value"),
        ("evaluate", ("--output_dir=x", "--benchmark=aime"), "error: flag --benchmark=aime"),
        ("evaluate", ("--output_dir=x", "--config.rollout.top_p=2"), "error: rollout.top_p: "),
        ("filter_data", ("--output=x", "--min_pass=0.5"), "error: min_pass, max_pass: expected"),
        ("filter_data", (), "error: flag --output=None: Flag --output must have a value"),
    ],
)
def test_the_programs_answer_in_one_line(tmp_path, python, program, arguments, text):
    arguments = (argument.replace("=x", f"={tmp_path}/x") for argument in arguments)
    done = python("-m", f"experiments.{program}", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(text) and len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_filtered_problems_are_read_back_with_all_their_columns(tmp_path, python):
    rows = [
        {
            "problem": f"{n} 3 : {n + 3}" if n < 12 else f"{n} 1 : 50",
            "answer": str(n),
            "verifier": "countdown",
            "source": {"book": n},
        }
        for n in range(4, 14)
    ]
    file, kept = tmp_path / "problems.jsonl", tmp_path / "kept.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = (
        *(f"--output={kept}", "--samples=4", f"--config.data.train={file}"),
        *("--config.rollout.prompts=4", "--config.mesh.data=4", "--config.data.num_train=0"),
    )
    done = python("-m", "experiments.filter_data", *arguments)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in kept.read_text().splitlines()]
    assert {tuple(row) for row in found} == {(*rows[0], "pass_rate")}
    assert {row["pass_rate"] for row in found} == {0.0} and found[-1]["source"] == {"book": 13}
    assert done.stdout.startswith(
        f"{len(found)} kept, {10 - len(found)} too easy, 0 too hard, 0 un"
    )
    assert [p.prompt for p in data.load(str(kept), "train", 0, 0)] == [r["problem"] for r in found]
    everything = tmp_path / "all.jsonl"
    more = (*arguments[1:], f"--output={everything}", f"--output_dir={kept}.answers")
    done = python("-m", "experiments.filter_data", *more, "--max_pass=1")
    assert done.stdout.startswith("10 kept, 0 too easy, 0 too hard, 0 ungraded")
    assert "problem 10/10" in done.stderr and "problem 4/10" not in done.stderr


def test_pass_rates_at_the_bounds_are_kept(tmp_path):
    problems = [
        Problem(name, name, "1", columns={"prompt": name, "x": float("nan")}) for name in "abcd"
    ]
    records = [
        record("a", [True, False, None]),
        record("b", [True, True, True]),
        record("c", [False, False, False]),
        record("d", [None, None, None]),
    ]
    path = tmp_path / "kept.jsonl"
    counts = difficulty.write(path, problems, records, 0.5, 0.5)
    assert counts == {"kept": 1, "too easy": 1, "too hard": 1, "ungraded": 1}
    assert json.loads(path.read_text()) == {"prompt": "a", "x": None, "pass_rate": 0.5}
    assert difficulty.write(path, problems, records, 0.0, 1.0)["kept"] == 3


# ---- the papers' settings


@pytest.mark.parametrize("benchmark", [None, *benchmarks.BENCHMARKS])
@pytest.mark.parametrize("decoding", [None, *benchmarks.DECODING])
def test_presets_are_settings(benchmark, decoding):
    config = configuration.default()
    for field, value in benchmarks.settings(benchmark, decoding).items():
        configuration.override(config, field, str(value))
    configuration.check_settings(config)


def test_programs_are_not_asked_for_a_box():
    assert benchmarks.settings("math500", "cast")["data.suffix"] == benchmarks.BOXED
    assert benchmarks.settings("humaneval_plus", "cast")["data.suffix"] == ""


def test_few_problems_are_not_filled_up_to_a_batch_of_many():
    config = configuration.default()
    config.mesh.data = config.mesh.fsdp = 2
    assert [start.batch_size(config, n) for n in (1, 30, 31, 33, 500)] == [4, 32, 32, 32, 32]


def test_what_a_paper_does_not_state_is_left_alone():
    assert benchmarks.settings(None, "sc_grpo") == {
        "evaluation.samples": 8,
        "thinking.student": False,
    }
    assert benchmarks.settings(None, "hsd_humaneval")["rollout.temperature"] == 0.0
    assert "opsd                    12         1.0        0.95" in benchmarks.describe()
