"""Bad input is answered with one clear line before any compute."""

import inspect
import json
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_sd import config as configuration
from jaxrl_sd import contexts
from jaxrl_sd.methods import METHODS, PRESETS
from jaxrl_sd.train import prepare
from jaxrl_sd.types import InputError


@pytest.fixture
def config(tmp_path):
    config = configuration.default()
    config.output_dir = str(tmp_path / "run")
    config.data.num_train = config.data.num_test = 4
    return config


@pytest.mark.parametrize("name", METHODS | PRESETS)
def test_the_default_is_valid_for_every_method(config, name):
    config.method.name = name
    factory = (METHODS | PRESETS)[name]
    if "teacher" in inspect.signature(factory).parameters:
        with pytest.raises(InputError, match=f"method.teacher: {name} cannot do without it"):
            configuration.check(config)
        config.method.teacher = "a/folder"
    assert configuration.check(config).loss is not None


def test_a_preset_can_be_changed(config):
    config.method = {"name": "sdpo_feedback", "rate": 0.5}
    assert configuration.check(config).teachers["teacher"].source.name == "ema_0.5"


def test_schedules_count_steps_and_not_updates(config):
    """Warm-up of two steps with two updates each."""
    config.optimizer.warmup_steps, config.optimizer.mini_batches = 2, 2
    optimizer = configuration.optimizer(config)
    params = jnp.zeros(())
    state, moves = optimizer.init(params), []
    for _ in range(6):
        move, state = optimizer.update(jnp.ones(()), state, params)
        moves.append(float(move) / -config.optimizer.learning_rate)
    np.testing.assert_allclose(moves, [0.5, 0.5, 1, 1, 1, 1], rtol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method.name", "ppo", "method.name: expected one of .*'rlsd'.*, got 'ppo'"),
        ("method.eps", 0.1, "method.eps: rlsd has .*'eps_w'"),
        ("method.eps_w", "wide", "method.eps_w: expected float, got 'wide'"),
        ("method.decay_steps", 2.5, "method.decay_steps: expected int, got 2.5"),
        ("method.sync_every", 0, "method.every: expected at least 1"),
        ("setps", 3, "setps: unknown, expected one of .*'steps'"),
        ("optimizer.lr", 1e-3, "optimizer.lr: unknown, expected one of .*'learning_rate'"),
        ("steps", "many", "steps: expected int, got 'many'"),
        ("steps", True, "steps: expected int, got True"),
        ("steps", 0, "steps: expected at least 1, got 0"),
        ("rollout.group_size", 1, "rollout.group_size: rlsd compares .* at least 2, got 1"),
        ("rollout.temperature", 0.0, "rollout.temperature: expected more than 0"),
        ("rollout.top_p", 1.5, r"rollout.top_p: expected in \(0, 1\], got 1.5"),
        ("optimizer.schedule", "steep", "optimizer.schedule: expected one of .*'cosine'"),
        ("optimizer.mini_batches", 5, "optimizer.mini_batches: expected a divisor of 32 prompts"),
        ("optimizer.epochs", 0, "optimizer.epochs: expected at least 1, got 0"),
        ("rollout.max_rounds", 0, "rollout.max_rounds: expected at least 1, got 0"),
        ("importance.level", "row", "importance.level: expected one of .*'sequence'.*, got 'row'"),
        ("importance.cap", 0.0, "importance.cap: expected more than 0"),
        ("compute.micro_batches", 3, "compute.micro_batches: expected a divisor of 256 rows"),
        ("templates.anwser", {"user": ""}, "templates.anwser: unknown, expected .*'answer'"),
        ("templates.answer", {"usr": ""}, "templates.answer.usr: unknown, expected"),
        ("output_dir", "/dev/null/run", "output_dir: expected a folder .* /dev/null/run"),
        ("templates.answer.user", "{problem} try {anwser}", "unknown slot {anwser}"),
        ("optimizer.b1", 1.0, r"optimizer.b1: expected in \[0, 1\), got 1.0"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate: expected float"),
        ("rollout", 3, "rollout: expected a group of settings, got 3"),
    ],
)
def test_wrong_settings_are_named(config, field, value, message):
    *groups, key = field.split(".")
    target = config
    for group in groups:
        target = target[group]
    with target.unlocked(), target.ignore_type():
        target[key] = value
    with pytest.raises(InputError, match=message):
        configuration.check(config)


def test_micro_batches_divide_the_rows_of_a_mini_batch(config):
    config.optimizer.mini_batches, config.compute.micro_batches = 8, 32
    configuration.check(config)
    config.compute.micro_batches = 64
    with pytest.raises(InputError, match=r"compute.micro_batches: .* divisor of 32 rows"):
        configuration.check(config)


@pytest.mark.parametrize("buffer", [-1, 24, 4096])
def test_lengths_that_a_method_cannot_grade_are_refused(config, buffer):
    config.method = {"name": "dapo", "overlong_buffer": buffer}
    with pytest.raises(InputError, match=f"method.overlong_buffer: .* 24 tokens .* got {buffer}"):
        configuration.check(config)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weights_join_the_loss(config, level):
    plain = configuration.check(config).loss
    config.importance.level = level
    assert configuration.check(config).loss is not plain


def test_a_teacher_with_another_tokenizer_is_refused(config, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(configuration.TINY_MODEL, folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"think"', '"thought"'))
    config.method = {"name": "opd", "teacher": str(folder)}
    with pytest.raises(InputError, match=f"the teacher in {folder} has another tokenizer"):
        prepare(config)


def test_a_method_without_groups_takes_single_samples(config):
    config.rollout.group_size = 1
    config.method.name = "opsd"
    assert configuration.check(config).min_group_size == 1


@pytest.fixture
def problems(tmp_path):
    """Writes a data file and returns its path."""

    def write(*rows):
        path = tmp_path / "problems.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return str(path)

    return write


def test_a_prompt_over_the_limit_is_named(config, problems):
    config.data.train = problems({"prompt": "1 2 3 " * 30, "answer": "6"})
    with pytest.raises(InputError, match=r"prompt: \d+ tokens, expected at most 12.*'1 2 3"):
        prepare(config)


def test_a_hint_without_room_is_named(config):
    config.rollout.max_hint_prompt = 7
    with pytest.raises(InputError, match=r"rollout.max_hint_prompt: teacher, template answer"):
        prepare(config)


def test_a_problem_without_what_the_method_shows_is_named(config, problems):
    config.data.train = problems({"prompt": "1 2 : 3", "answer": "1 + 2"})
    config.method.name = "opsd"
    with pytest.raises(InputError, match=r"jsonl:1: opsd shows its teacher the solution"):
        prepare(config)


def test_an_unknown_verifier_is_named(config, problems):
    row = {"prompt": "1 2 : 3", "answer": "1 + 2", "verifier": "oracle"}
    config.data.train = problems(row)
    with pytest.raises(InputError, match=r"verifier.*oracle"):
        prepare(config)


def test_a_model_folder_without_a_model_is_named(config, tmp_path):
    config.model.path = str(tmp_path)
    with pytest.raises(InputError, match=str(tmp_path)):
        prepare(config)


def test_a_tokenizer_without_chat_template_is_named(config, tmp_path):
    folder = shutil.copytree(config.model.path, tmp_path / "model")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config.model.path = str(folder)
    with pytest.raises(InputError, match="has no chat template"):
        prepare(config)


def test_a_tokenizer_of_another_model_is_named(config, tmp_path):
    folder = shutil.copytree(config.model.path, tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"extra{i}": len(vocabulary) + i for i in range(5)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config.model.path = str(folder)
    with pytest.raises(InputError, match="they do not belong together"):
        prepare(config)


def test_templates_of_the_configuration_replace_the_defaults(config):
    config.templates = {"answer": {"user": "{problem} psst {answer}"}}
    templates = configuration.templates(config)
    assert templates["answer"].user == "{problem} psst {answer}"
    assert templates["solution"] == contexts.TEMPLATES["solution"]


def test_learning_rate_warms_up_and_decays(config):
    import jax.numpy as jnp

    config.steps, config.optimizer.warmup_steps = 12, 4
    config.optimizer.schedule, config.optimizer.final_scale = "linear", 0.5
    config.optimizer.clip_norm = 1e9
    optimizer = configuration.optimizer(config)
    params, sizes = jnp.zeros(()), []
    state = optimizer.init(params)
    for _ in range(12):
        update, state = optimizer.update(jnp.ones(()), state, params)
        sizes.append(-float(update) / config.optimizer.learning_rate)
    expected = [0.25, 0.5, 0.75, 1.0, *(1 - 0.5 * i / 8 for i in range(8))]
    assert sizes == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("--config.method.name=ppo",), 1, "error: method.name: expected one of"),
        (("--config.method.eps_w=wide",), 1, "error: method.eps_w: expected float"),
        (("--help",), 1, "sc_grpo  Tokens weigh more where"),
    ],
)
def test_the_command_line_answers_in_one_line(tmp_path, arguments, status, text):
    command = [sys.executable, "-m", "experiments.train", f"--output_dir={tmp_path}/run"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert text in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
