"""The whole program: every method runs, and a run that is killed continues exactly."""

import json
import math
import signal
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_sd import config as configuration
from jaxrl_sd import metrics, model, tokens, weights
from jaxrl_sd.methods import METHODS
from jaxrl_sd.train import train
from jaxrl_sd.types import InputError


def small_config(folder, **settings):
    """The shipped model, a few short steps."""
    config = configuration.default()
    config.output_dir = str(folder)
    config.steps = 4
    config.data.num_train, config.data.num_test = 64, 8
    config.rollout.prompts, config.rollout.group_size = 4, 4
    config.evaluation.every, config.evaluation.samples = 2, 2
    config.checkpoint.every = 2
    config.verifier.workers = 1
    for field, value in settings.items():
        group, key = field.split("__")
        config[group][key] = value
    return config


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_through_the_entry_point(tmp_path, name):
    config = small_config(tmp_path, method__name=name)
    config.steps = 2
    before = configuration.TINY_MODEL
    summary = train(config)
    rows = metrics.read(tmp_path)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert rows[1]["rollout/sampler_logp_error_max"] < 1e-4
    assert rows[1]["update/skipped"] == 0 and rows[1]["update/grad_norm"] > 0
    assert summary["method"] == name and summary["num_problems"] == 8
    trained, _ = weights.load(tmp_path / "model")
    initial, _ = weights.load(before)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), trained, initial)))
    written = {path.name for path in tmp_path.iterdir()}
    assert {"report.md", "curves.png", "credit.png", "summary.json", "metrics.jsonl"} <= written
    record = json.loads((tmp_path / "rollouts" / "000001.jsonl").read_text().splitlines()[0])
    assert len(record["response_tokens"]) == len(record["advantage"])


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    config = small_config(tmp_path)
    config.steps = 2
    train(config)
    config.optimizer.learning_rate = 1e-5
    with pytest.raises(InputError, match=r"optimizer.learning_rate = 0.0\d+, got 1e-05"):
        train(config)


def test_the_exported_model_is_the_trained_one(tmp_path):
    """Greedy text of transformers and of our sampler are the same."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    from jaxrl_sd import countdown, rollout, sampler

    config = small_config(tmp_path)
    config.steps = 2
    train(config)
    folder = tmp_path / "model"
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


# Runs the job in a process of its own, which kills itself at the given moment.
CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_train import small_config
from jaxrl_sd import checkpoint, rollout, train

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def counted(function, calls, after=lambda: None):
    left = [calls]
    def wrapped(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and after is die_before:
            die()
        out = function(*args, **kwargs)
        if left[0] == 0:
            after()
        return out
    return wrapped

def die_before():
    pass

config = small_config({folder!r})
config.steps = 6
{moment}
train.train(config)
"""
MOMENTS = {
    # While the samples of the second step are graded; nothing is saved yet.
    "verify": "rollout.verify = counted(rollout.verify, 6, die_before)",
    # Orbax has begun to write, in the background, the checkpoint of step 2.
    "save": "checkpoint.save = counted(checkpoint.save, 1, die)",
    # After the update of step 5, which no checkpoint holds.
    "update": "train.diagnostics.describe = counted(train.diagnostics.describe, 3, die)",
}


def run_child(folder, moment):
    code = CHILD.format(
        tests=str(__import__("pathlib").Path(__file__).parent), folder=str(folder), moment=moment
    )
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    assert run_child(tmp_path / "whole", "").returncode == 0
    for name, moment in MOMENTS.items():
        done = run_child(tmp_path / "killed", moment)
        assert done.returncode == -signal.SIGKILL, (name, done.stderr[-2000:])
    assert run_child(tmp_path / "killed", "").returncode == 0
    whole, killed = (
        load_file(tmp_path / f / "model/model.safetensors") for f in ("whole", "killed")
    )
    for name in whole:
        np.testing.assert_array_equal(whole[name], killed[name])
    rows = [(tmp_path / folder / metrics.FILE).read_text() for folder in ("whole", "killed")]
    assert rows[0] == rows[1]
