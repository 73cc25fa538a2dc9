"""The whole program: every method runs, and a run that is killed continues exactly."""

import dataclasses
import json
import math
import shutil
import signal
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_run import MOMENTS, small_config

from jaxrl_sd import config as configuration
from jaxrl_sd import metrics, model, rollout, tokens, weights
from jaxrl_sd import train as train_module
from jaxrl_sd.start import prepare
from jaxrl_sd.train import Clock, forget_after, measure, summarize, train
from jaxrl_sd.types import InputError, Sample


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """name -> the configuration and the summary of two steps of a method; their folder stays."""

    @cache
    def run(name):
        folder = tmp_path_factory.mktemp(name)
        config = small_config(folder / "run", method__name=name)
        if name == "opd":
            config.method.teacher = other_model(folder / "teacher")
        config.steps = 2
        return config, train(config)

    return run


# Those whose host side differs; tests/test_update.py runs every method's device side.
@pytest.mark.parametrize("name", ["rlsd", "cast", "hsd", "dapo", "opd", "sdpo", "sdft"])
def test_methods_train_through_the_entry_point(trained, name):
    config, summary = trained(name)
    folder = Path(config.output_dir)
    rows = metrics.read(folder)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert rows[1]["rollout/sampler_logp_error_max"] < 1e-4
    every_step = {"credit/flipped", "credit/zero", "credit/uniform", "leakage/solution"}
    assert every_step <= rows[1].keys() & rows[2].keys()
    when_due = ("gap_wrong_down", "gap_stop_correct", "divergence_profile/0", "information")
    teachers = {key.split("/")[1] for key in rows[1] if key.startswith("teacher/")}
    assert bool(teachers) == (name != "dapo")
    for teacher in teachers:
        assert {f"teacher/{teacher}/{key}" for key in when_due} <= rows[1].keys()
        assert (f"teacher/{teacher}/distance" in rows[1]) == (name != "opd")  # of another shape
    phases = {"sample", "verify", "context", "score", "update"}
    assert {f"time/{phase}" for phase in phases} <= rows[1].keys() & rows[2].keys()
    assert phases <= summary["seconds_of_a_step"].keys()
    assert rows[1]["update/skipped"] == 0 and rows[1]["update/grad_norm"] > 0
    np.testing.assert_allclose([row["update/first_ratio"] for row in rows[1:3]], 1, atol=1e-4)
    assert summary["method"] == name and summary["num_problems"] == 8
    trained, _ = weights.load(folder / "model")
    initial, _ = weights.load(configuration.TINY_MODEL)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), trained, initial)))
    written = {path.name for path in folder.iterdir()}
    assert {"report.md", "curves.png", "credit.png", "summary.json", "metrics.jsonl"} <= written
    record = json.loads((folder / "rollouts" / "000002.jsonl").read_text().splitlines()[0])
    assert len(record["response_tokens"]) == len(record["advantage"])


def copied(config, folder):
    """The same run in another folder, to go on there."""
    shutil.copytree(config.output_dir, folder, dirs_exist_ok=True)
    config = config.copy_and_resolve_references()
    config.output_dir = str(folder)
    return config


def test_a_run_goes_on_when_its_teacher_was_moved(trained, tmp_path):
    config = copied(trained("opd")[0], tmp_path / "run")
    config.method.teacher = str(Path(config.method.teacher).rename(tmp_path / "moved"))
    config.steps = 3
    assert train(config)["steps"] == 3


def other_model(folder) -> str:
    """A model of one layer and another width, with the shipped model's tokenizer."""
    _, config = weights.load(configuration.TINY_MODEL)
    config = dataclasses.replace(config, num_layers=1, hidden_size=32)
    weights.save(folder, model.init_params(jax.random.key(0), config), config, eos_token_id=(5,))
    tokens.load_tokenizer(configuration.TINY_MODEL).save_pretrained(folder)
    return str(folder)


def test_sampling_goes_on_until_the_batch_is_full_of_mixed_groups(tmp_path):
    """And where the rounds do not suffice, nothing that was done is lost."""
    config = small_config(tmp_path, method__name="dapo", rollout__max_rounds=1)
    config.method.overlong_buffer, config.evaluation.samples = 0, 2  # other groups than rollouts
    config.steps = 2
    with pytest.raises(InputError, match=r"rollout.max_rounds: dapo kept [0-3] of the 4 groups"):
        train(config)
    config.rollout.max_rounds = 20
    train(config)
    rows = [row for row in metrics.read(tmp_path) if "rollout/rounds" in row]
    assert max(row["rollout/rounds"] for row in rows) > 1
    for row in rows:
        assert row["rollout/kept"] == row["rollout/mixed"] < 1
    records = [json.loads(x) for x in (tmp_path / "rollouts/000002.jsonl").read_text().splitlines()]
    assert {record["reward"] for record in records} == {1, -1}
    verdicts = json.loads((tmp_path / "evaluations/000002.json").read_text())
    assert [len(group) for group in verdicts["sampled"]] == [2] * 8


def test_a_run_may_end_where_a_prompt_stopped_it(tmp_path, monkeypatch):
    """The steps before it are kept, and evaluated once the run is told to end there."""
    config = small_config(tmp_path, evaluation__every=100, checkpoint__every=100)
    write_hints = train_module.write_hints

    def write(run, problems, groups, step):
        if step == 1:
            raise InputError("rollout.max_hint_prompt: too small")
        return write_hints(run, problems, groups, step)

    monkeypatch.setattr(train_module, "write_hints", write)
    with pytest.raises(InputError, match="max_hint_prompt"):
        train(config)
    assert not (tmp_path / "evaluations/000001.json").exists()
    config.steps = 1
    monkeypatch.setattr(train_module, "new_state", None)  # none is made beside the one that is read
    assert train(config)["accuracy_after"]["num_problems"] == 8
    assert [row["step"] for row in metrics.read(tmp_path)] == [0, 1, 1]


def test_a_checkpoint_of_other_settings_is_refused(trained, tmp_path):
    config, summary = trained("rlsd")
    config = copied(config, tmp_path)
    aborted = tmp_path / "rollouts/000003.jsonl"
    aborted.touch()
    assert train(config)["seconds"]["update"] == summary["seconds"]["update"] > 0  # not lost
    assert not aborted.exists()
    config.steps = 1
    with pytest.raises(InputError, match="steps: expected at least the 2"):
        train(config)
    config.steps = 2
    config.optimizer.learning_rate = 1e-5
    with pytest.raises(InputError, match=r"optimizer.learning_rate = 0.0\d+, got 1e-05"):
        train(config)


def test_the_exported_model_is_the_trained_one(trained):
    """Greedy text of transformers and of our sampler are the same."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from jaxrl_sd import countdown, sampler

    folder = Path(trained("rlsd")[0].output_dir) / "model"
    params, model_config = weights.load(folder)
    tokenizer = tokens.load_tokenizer(folder)
    problems = countdown.problems("test", 20, seed=5)
    prompt, length = rollout.encode(problems, tokenizer, tokens.Template(), 16)
    stop_ids = tokens.stop_ids(tokenizer, folder)
    sampling = sampler.SamplingConfig(24, stop_ids, tokenizer.pad_token_id, temperature=0.0)
    ours = sampler.sample(
        params,
        jax.random.key(0),
        prompt,
        length,
        group_size=1,
        sampling=sampling,
        config=model_config,
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    for row, n, ids, m in zip(prompt, length, ours.response[:, 0], ours.length[:, 0], strict=True):
        inputs = torch.tensor(row[None, len(row) - n :].astype(np.int64))
        out = theirs.generate(inputs, max_new_tokens=24, do_sample=False)[0, n:].tolist()
        assert out[:m] == ids[:m].tolist()


def test_a_killed_run_continues_bit_for_bit(tmp_path, python):
    """In a fourth process, to what one process would have made of it."""
    whole, killed = (small_config(tmp_path / name, steps=6) for name in ("whole", "killed"))
    train(whole)
    program = Path(__file__).with_name("small_run.py")
    aborted = tmp_path / "killed/rollouts/000009.jsonl"
    aborted.parent.mkdir(parents=True)
    aborted.touch()
    for moment in MOMENTS:
        done = python(program, killed.output_dir, moment)
        assert done.returncode == -signal.SIGKILL, (moment, done.stderr[-2000:])
        assert not aborted.exists()
    train(killed)
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    for name, value in load_file(whole / "model/model.safetensors").items():
        again = load_file(killed / "model/model.safetensors")[name]
        np.testing.assert_array_equal(value, again)
    for file in ("evaluations/000006.json", "rollouts/000006.jsonl"):
        assert (whole / file).read_text() == (killed / file).read_text()
    np.testing.assert_equal(without_times(whole), without_times(killed))  # NaN is NaN


def without_times(folder):
    rows = metrics.read(folder)
    return [{name: x for name, x in row.items() if not name.startswith("time/")} for row in rows]


SCORES = {True: 1.0, False: 0.0, None: None}


def test_verdicts_that_are_missing_survive_in_strict_json(tmp_path, monkeypatch):
    run, *_ = prepare(small_config(tmp_path))
    verdicts = [[True, None], [None, None], *[[False, True]] * 6]
    groups = [
        [Sample((7,), "", verdict, False, score=SCORES[verdict]) for verdict in group]
        for group in verdicts
    ]
    monkeypatch.setattr(rollout, "answer", lambda *args, **kwargs: [groups])
    state = SimpleNamespace(key=jax.random.key_data(jax.random.key(0)))
    for step in (0, run.config.steps):
        assert measure(run, state, None, step)["eval/accuracy"] == pytest.approx(4 / 7)
    (tmp_path / metrics.FILE).touch()
    text = (tmp_path / "evaluations/000000.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert summarize(run, Clock())["accuracy_after"]["num_problems"] == 7


def test_what_no_checkpoint_holds_is_forgotten(tmp_path):
    for folder, ending in (("rollouts", "jsonl"), ("evaluations", "json")):
        (tmp_path / folder).mkdir()
        for step in (1, 2, 40):
            (tmp_path / folder / f"{step:06d}.{ending}").write_text("")
    (tmp_path / "evaluations/notes.json").write_text("")
    forget_after(tmp_path, 2)
    assert sorted(path.stem for path in tmp_path.glob("*/*")) == [
        *["000001"] * 2,
        *["000002"] * 2,
        "notes",
    ]


BROKEN_CHECKPOINT = """
import sys, jax, optax
from pathlib import Path
from jaxrl_sd import checkpoint
from jaxrl_sd.types import InputError
from jaxrl_sd.update import init_state

folder = Path(sys.argv[1])
state = init_state({"w": jax.numpy.ones(1000)}, {"": {}}, optax.sgd(0.1), {}, seed=0)
with checkpoint.manager(folder, keep=2) as checkpoints:
    checkpoint.save(checkpoints, state, 7, {"steps": 1}, {})
    checkpoints.wait_until_finished()
    assert checkpoint.restore(checkpoints, state, {"steps": 1}, folder)[1] == 7
    parts = [path for path in folder.rglob(sys.argv[2]) if path.is_file()]
    assert parts
    for path in parts:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    try:
        checkpoint.restore(checkpoints, state, {"steps": 1}, folder)
    except InputError as error:
        print(error)
"""


@pytest.mark.parametrize("part", ["meta/*", "state/**/d/*", "*"])
def test_a_damaged_checkpoint_is_named(tmp_path, python, part):
    # In a process of its own: orbax leaves an event loop behind, which is a warning here.
    done = python("-c", BROKEN_CHECKPOINT, tmp_path / "saved", part)
    message = f"output_dir: checkpoint 0 in {tmp_path}/saved cannot be read"
    assert done.stdout.startswith(message), done.stderr[-2000:]
    assert done.stdout.count("\n") == 1
