"""Bad input is answered with one clear line before any compute."""

import inspect
import json
import shutil
from pathlib import Path
from typing import get_type_hints

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_sd import config as configuration
from jaxrl_sd import contexts
from jaxrl_sd.methods import METHODS, PRESETS
from jaxrl_sd.start import prepare
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
    """Warm-up of two steps with two updates each, of which one was skipped."""
    config.optimizer.warmup_steps = 2
    optimizer = configuration.optimizer(config)
    params = jnp.zeros(())
    state, moves = optimizer.init(params), []
    for step in (0, 0, 1, 2, 2):
        move, state = optimizer.update(jnp.ones(()), state, params, step=step)
        moves.append(float(move) / -config.optimizer.learning_rate)
    np.testing.assert_allclose(moves, [0.5, 0.5, 1, 1, 1], rtol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method.name", "ppo", "method.name: expected one of .*'rlsd'.*, got 'ppo'"),
        ("method.eps", 0.1, "method.eps: rlsd has .*'eps_w'"),
        ("method.eps_w", "wide", "method.eps_w: expected float of at least 0, got 'wide'"),
        ("method.decay_steps", 2.5, "method.decay_steps: expected int of at least 1, got 2.5"),
        ("method", "hsd", "method: expected a group of settings, got 'hsd'"),
        ("method.name", ["hsd"], r"method.name: expected one of .*, got \['hsd'\]"),
        ("templates", None, "templates: expected a group of settings, got None"),
        ("templates.answer", {"user": "try {answer}"}, "templates.answer: .* the slot {problem}"),
        ("data.suffix", "\ud800", r"data.suffix: expected str, got '\\ud800'"),
        ("output_dir", "", "output_dir: expected a folder, got ''"),
        ("setps", 3, "setps: unknown, expected one of .*'steps'"),
        ("optimizer.lr", 1e-3, "optimizer.lr: unknown, expected one of .*'learning_rate'"),
        ("steps", "many", "steps: expected int, got 'many'"),
        ("steps", True, "steps: expected int, got True"),
        ("steps", 0, "steps: expected at least 1, got 0"),
        ("mesh.data", 3, "prompts: expected a multiple of 3, mesh.data times mesh.fsdp, got 32"),
        ("rollout.group_size", 1, "rollout.group_size: rlsd compares .* at least 2, got 1"),
        ("rollout.temperature", 0.0, "rollout.temperature: expected more than 0"),
        ("rollout.top_p", 1.5, r"rollout.top_p: expected in \(0, 1\], got 1.5"),
        ("rollout.presence_penalty", -3.0, r"rollout.presence_penalty: expected in \[-2, 2\]"),
        ("optimizer.schedule", "steep", "optimizer.schedule: expected one of .*'cosine'"),
        ("optimizer.mini_batches", 5, "optimizer.mini_batches: expected a divisor of 32 prompts"),
        ("optimizer.epochs", 0, "optimizer.epochs: expected at least 1, got 0"),
        ("rollout.max_rounds", 0, "rollout.max_rounds: expected at least 1, got 0"),
        ("importance.level", "row", "importance.level: expected one of .*'sequence'.*, got 'row'"),
        ("importance.cap", 0.0, "importance.cap: expected more than 0"),
        ("compute.tokens", 35, "compute.tokens: expected at least the 36 of a row, got 35"),
        ("compute.dtype", "float16", "compute.dtype: expected one of"),
        ("compute.remat", "all", "compute.remat: expected one of"),
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


@pytest.mark.parametrize(
    ("name", "field", "values", "expected"),
    [
        ("grpo", "clip_low", (-0.1,), "float of at least 0"),
        ("grpo", "kl_coef", (-0.04,), "float of at least 0"),
        ("rlsd", "sync_every", (0,), "int of at least 1"),
        ("rlsd_released", "decay_steps", (0,), "int of at least 1"),
        ("sdpg", "warmup", (0,), "int of at least 1"),
        ("sdpg", "decay", (0,), "int of at least 1"),
        ("cast", "clip_positive", ((1.2, 0.8), (-1, 1), (1,), 1), "two numbers .* low <= high"),
        ("cast", "cutoff", (-1,), "int of at least 0 or None"),
        ("sc_grpo", "quantile", (3, -0.1), r"float in \[0, 1\]"),
        ("sc_grpo", "c_min", (0,), "float above 0"),
        ("dr_grpo", "max_tokens", (0,), "int of at least 1 or None"),
        ("sdpo", "rate", (0, 1.5), r"float in \(0, 1\]"),
        ("sdpo", "top_k", (0,), "int of at least 1"),
        ("sdft", "alpha", (-0.5, 2), r"float in \[0, 1\]"),
        ("sdft", "skip", (-1,), "int of at least 0"),
        ("grpo_opsd", "tau", (0,), "float above 0"),
    ],
)
def test_hyper_parameters_out_of_range_are_named(config, name, field, values, expected):
    for value in values:
        config.method = {"name": name, field: value}
        with pytest.raises(InputError, match=f"^method.{field}: expected {expected}, got"):
            configuration.check(config)


def test_every_number_of_a_method_has_a_range():
    for name, factory in METHODS.items():
        types = get_type_hints(factory, include_extras=True)
        plain = {key for key, annotation in types.items() if annotation in (int, float)}
        assert not plain, name


def test_settings_from_text(config):
    """Literals are numbers and tuples; text settings stay text; types are those of the default."""
    for field, text in {
        "steps": "7",
        "optimizer.learning_rate": "1",
        "method.clip_positive": "(0.5, 1.5)",
        "method.cutoff": "None",
        "method.teacher": "a/folder",
        "data.train": "3",
        "data.suffix": " = ?",
    }.items():
        configuration.override(config, field, text)
    assert config.steps == 7 and repr(config.optimizer.learning_rate) == "1.0"
    method = {"name": "rlsd", "clip_positive": (0.5, 1.5), "cutoff": None, "teacher": "a/folder"}
    assert config.method.to_dict() == method
    assert (config.data.train, config.data.suffix) == ("3", " = ?")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("foo.bar", "foo: unknown, expected one of"),
        ("items.get", "items: unknown, expected one of"),
        ("steps.x", "steps: expected int, got {'x': 1}"),
        ("rollout.top_p.x", "rollout.top_p: expected float, got {'x': 1}"),
        ("rollout", "rollout: expected a group of settings, got 1"),
        ("method.eps_w.x", "method.eps_w: expected float .*, got {'x': 1}"),
        ("templates.anwser.user", "templates.anwser: unknown"),
        ("", ": unknown, expected one of"),
    ],
)
def test_settings_from_text_that_do_not_exist_are_named(config, field, message):
    configuration.override(config, field, "1")
    with pytest.raises(InputError, match=f"^{message}"):
        configuration.check(config)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def get_config(): return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def get_config(: pass", "SyntaxError"),
        ("config = 3", "KeyError: 'get_config'"),
        ("def get_config(): return {}", "expected a ConfigDict"),
    ],
)
def test_a_configuration_file_that_fails_is_named(tmp_path, code, message):
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(InputError, match=message) as caught:
        configuration.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


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
    with pytest.raises(InputError, match=f"method.teacher: .* {folder} has another tokenizer"):
        prepare(config)


def test_a_method_without_groups_takes_single_samples(config):
    config.rollout.group_size = 1
    config.method.name = "opsd"
    assert configuration.check(config).min_group_size == 1


@pytest.fixture
def model(config, tmp_path):
    """The folder of a copy of the model, which the configuration names."""
    config.model.path = str(tmp_path / "model")
    return Path(shutil.copytree(configuration.TINY_MODEL, config.model.path))


@pytest.fixture
def problems(tmp_path):
    """Writes a data file and returns its path."""

    def write(*rows):
        path = tmp_path / "problems.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return str(path)

    return write


def test_the_longest_prompt_over_the_limit_is_named(config, problems):
    prompts = ("1 2", "1 2 3 " * 30, "4 5 6 " * 40, "7 " * 20)
    config.data.train = problems(*({"prompt": text, "answer": "6"} for text in prompts))
    config.data.num_test = 4
    message = r"max_prompt: 3 of 8 prompts are longer than 12 tokens, .* 12\d: .*:3, '4 5 6"
    with pytest.raises(InputError, match=message):
        prepare(config)


def test_a_slow_program_would_not_be_judged(config, problems):
    config.data.train = problems({"prompt": "1 2", "answer": '["assert f()"]', "verifier": "code"})
    config.data.num_test, config.verifier.timeout_s = 1, 8.0
    with pytest.raises(InputError, match=r"verifier.timeout_s: expected more than the 8.0 seconds"):
        prepare(config)


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        ("countdown", "prompt: got '1 2', expected a problem such as '4 7 4 : 32' in it"),
        ("code", "answer: got '3', expected"),
        ("sums", "verifier: expected one of .*'math'.*, got 'sums'"),
    ],
)
def test_a_problem_that_no_answer_could_solve_is_named(config, problems, verifier, message):
    config.data.train = problems({"prompt": "1 2", "answer": "3", "verifier": verifier})
    config.data.num_test = 1
    with pytest.raises(InputError, match=rf"data: .*:1: {message}"):
        prepare(config)


def test_the_problem_of_most_tokens_has_to_fit_a_hint(config, problems):
    """Not that of most characters, which one word of another script may have."""
    rows = [{"prompt": text, "answer": "6"} for text in ("1" * 80, "1 2 3 4 5")]
    config.data.train = config.data.test = problems(*rows)
    config.rollout.max_hint_prompt = 7
    with pytest.raises(
        InputError, match=r"rollout.max_hint_prompt: .* for the problem '1 2 3 4 5'"
    ):
        prepare(config)


def test_a_hint_without_room_is_named(config):
    config.rollout.max_hint_prompt = 7
    with pytest.raises(InputError, match=r"rollout.max_hint_prompt: teacher, template answer"):
        prepare(config)


def test_only_what_a_teacher_reads_has_to_fit_a_hint(config):
    """The plain prompt is longer here than SC-GRPO's hints; who is shown nothing, reads nothing."""
    config.method.name = "sc_grpo"
    config.templates = {"nothing": {"user": "{problem}" + " 1 2 3 4" * 30}}
    config.rollout.max_prompt = 160
    config.rollout.max_hint_prompt = 80
    prepare(config)
    config.rollout.max_hint_prompt = 7
    with pytest.raises(InputError, match=r"teacher, template (attempt|peer)"):
        prepare(config)


def test_a_problem_without_what_the_method_shows_is_named(config, problems):
    config.data.train = problems({"prompt": "1 2 : 3", "answer": "1 + 2"})
    config.method.name = "opsd"
    with pytest.raises(InputError, match=r"jsonl:1: opsd shows its teacher the solution"):
        prepare(config)


def test_held_out_problems_need_no_hints(config, problems):
    """No teacher reads them; benchmarks often have answers alone."""
    config.data.test = problems({"prompt": "1 2 : 3", "answer": "1 + 2"})
    config.data.num_test = 1
    config.method.name = "opsd"
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


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": {"type": "Foreign"}}'),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named(config, model, file, text):
    (model / file).write_text(text)
    with pytest.raises(InputError, match=f"model.path: no tokenizer could be read from {model}"):
        prepare(config)


def test_stop_tokens_that_cannot_be_read_are_named(config, model):
    (model / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json: expected a JSON object"):
        prepare(config)


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
)


@pytest.mark.parametrize(
    ("method", "source", "message"),
    [
        ("grpo", "{% for", "fails on a user turn: "),
        ("grpo", "{{ raise_exception('Not today') }}", "fails on a user turn: Not today"),
        ("grpo", "{{ 1 / 0 }}", "fails on a user turn: division by zero"),
        (
            "sc_grpo",
            NO_SYSTEM,
            r"fails on a system and a user turn: No system role \(teacher, template (attempt|peer)",
        ),
        (
            "sdpo",
            NO_SYSTEM,
            r"fails on a system and a user turn: No system role \(teacher, template feedback",
        ),
    ],
)
def test_a_chat_template_that_fails_is_named(config, model, method, source, message):
    """Before any sample, whatever is shown later."""
    (model / "chat_template.jinja").write_text(source)
    config.method.name = method
    config.templates = {"feedback": {"system": "{feedback}"}} if method == "sdpo" else {}
    config.rollout.max_hint_prompt = 200
    with pytest.raises(InputError, match=f"^model.path: the tokenizer's chat template {message}"):
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
    config.steps, config.optimizer.warmup_steps = 12, 4
    config.optimizer.schedule, config.optimizer.final_scale = "linear", 0.5
    config.optimizer.clip_norm = 1e9
    optimizer = configuration.optimizer(config)
    params, sizes = jnp.zeros(()), []
    state = optimizer.init(params)
    for step in range(12):
        update, state = optimizer.update(jnp.ones(()), state, params, step=step)
        sizes.append(-float(update) / config.optimizer.learning_rate)
    expected = [0.25, 0.5, 0.75, 1.0, *(1 - 0.5 * i / 8 for i in range(8))]
    assert sizes == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("--config.method.name=ppo",), 1, "error: method.name: expected one of"),
        (("--config.foo.bar=1",), 1, "error: foo: unknown, expected one of"),
        (("--config=/no/such/file.py",), 1, "error: config: /no/such/file.py gives no config"),
        (("--ouput_dir=x",), 1, "error: --ouput_dir=x: unknown, expected --config.<key>=<value>"),
        (("--output_dir",), 1, "error: Missing value for flag --output_dir"),
        (("--help",), 1, "sc_grpo       Tokens weigh more where"),
    ],
)
def test_the_command_line_answers_in_one_line(tmp_path, python, arguments, status, text):
    done = python("-m", "experiments.train", f"--output_dir={tmp_path}/run", *arguments)
    assert done.returncode == status
    assert text in done.stdout + done.stderr
    assert len(done.stderr.splitlines()) <= 1
