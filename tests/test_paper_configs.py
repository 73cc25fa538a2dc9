"""Every file of experiments/configs says what its paper says, and one step of it runs."""

import ast
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_sd import config as configuration
from jaxrl_sd.benchmarks import BENCHMARKS, DECODING
from jaxrl_sd.contexts import TEMPLATES
from jaxrl_sd.methods import METHODS
from jaxrl_sd.start import prepare
from jaxrl_sd.train import train
from jaxrl_sd.vocabulary import STUDENT

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "experiments" / "configs"
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "papers")

ALL_SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ADAM = {"optimizer.b1": 0.9, "optimizer.b2": 0.999}
NON_THINKING = {"thinking.student": False, "thinking.teacher": False}

RLSD = {
    # 2604.03128, Sec. 4.2 and 5.1.
    "method.name": "rlsd",
    "method.lam_0": 0.5,
    "method.decay_steps": 50,
    "method.eps_w": 0.2,
    "method.sync_every": 10,
    "method.clip_low": 0.2,
    "method.clip_high": 0.28,
    "optimizer.learning_rate": 1e-6,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "rollout.prompts": 256,
    "rollout.group_size": 8,
    "rollout.temperature": 1.0,
    "rollout.max_prompt": 4096,
    "rollout.max_response": 4096,
    "steps": 200,
    # Released code.
    **ADAM,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_norm": 1.0,
    "optimizer.mini_batches": 1,
    "optimizer.epochs": 1,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "lora.rank": 0,
}

SDPG = {
    # 2606.04036, Sec. 3.4, 3.5 and the experiments'.
    "method.name": "sdpg",
    "method.beta": 1e-3,
    "method.alpha": 1e-3,
    "method.warmup": 50,
    "method.decay": 350,
    "method.total_steps": 400,
    "method.anchor": "ufkl",
    "method.gate": True,
    "steps": 400,
    "rollout.prompts": 128,
    "rollout.group_size": 8,
    "rollout.max_prompt": 2048,
    "rollout.max_hint_prompt": 2048,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "optimizer.learning_rate": 1e-6,
    "optimizer.warmup_steps": 10,
    "optimizer.schedule": "constant",
    "optimizer.weight_decay": 0.1,
    "lora.rank": 0,
    # Released code.
    **ADAM,
    "optimizer.clip_norm": 1.0,
    "optimizer.mini_batches": 8,
    "method.clip_low": 0.2,
    "method.clip_high": 0.28,
    "method.dual_clip": 10.0,
    "thinking.student": True,
    "thinking.teacher": True,
    "evaluation.every": 10,
    "evaluation.samples": 32,
}

CAST = {
    # 2606.00172, Sec. 3.
    "method.name": "cast",
    "method.lam": 1.0,
    "method.clip_positive": (0.8, 1.05),
    "method.clip_negative": (0.95, 1.2),
    "method.max_adv": 1.2,
    "method.flip": True,
    "method.cutoff": None,
    "method.sync_every": 10,
    # Table 8; 5% of the steps are warm-up, the rate ends at 1e-7.
    "method.clip_low": 0.2,
    "method.clip_high": 0.28,
    "steps": 300,
    "optimizer.learning_rate": 1e-6,
    "optimizer.warmup_steps": 15,
    "optimizer.schedule": "linear",
    "optimizer.final_scale": 0.1,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 1.0,
    "optimizer.mini_batches": 1,
    "lora.rank": 64,
    "lora.alpha": 128.0,
    "lora.targets": ALL_SEVEN,
    **NON_THINKING,
    "rollout.prompts": 16,
    "rollout.group_size": 8,
    "rollout.max_prompt": 1024,
    "rollout.max_response": 3072,
    "rollout.temperature": 0.7,
    "rollout.top_p": 0.95,
    "rollout.top_k": 20,
    "rollout.presence_penalty": 0.2,
    "evaluation.samples": 16,
    "data.train": "DAPO-Math-17k-Processed/all/train-00000-of-00001.parquet",
    **ADAM,  # unstated
}

SC_GRPO = {
    # 2606.18810, Sec. 5.1 and App. B, mathematics.
    "method.name": "sc_grpo",
    "method.alpha": 0.1,
    "method.quantile": 0.75,
    "method.c_min": 1e-4,
    "model.path": "Qwen/Qwen3-8B",
    **NON_THINKING,
    "steps": 500,
    "optimizer.learning_rate": 1e-6,
    "rollout.prompts": 8,
    "rollout.group_size": 8,
    "rollout.max_response": 8192,
    "data.num_train": 4000,
    "evaluation.samples": 8,
    # Unstated.
    "method.clip_low": 0.2,
    "method.clip_high": 0.2,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "optimizer.mini_batches": 1,
    "lora.rank": 0,
}

HSD = {
    # 2606.15576, Sec. 4 and the experiments'.
    "method.name": "hsd",
    "method.beta": 0.001,
    "steps": 1500,
    "rollout.prompts": 128,
    "rollout.group_size": 8,
    "rollout.temperature": 1.0,
    "rollout.top_p": 0.95,
    "rollout.max_response": 4096,
    "optimizer.learning_rate": 1e-6,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.95,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.0,
    "lora.rank": 0,
    "evaluation.samples": 16,
    # Unstated.
    **NON_THINKING,
    "optimizer.mini_batches": 1,
    "optimizer.clip_norm": 1.0,
}

OPSD = {
    # 2601.18734v3, Sec. 4, Tables 5 to 8.
    "method.name": "opsd",
    "model.path": "Qwen/Qwen3-1.7B",
    "thinking.student": False,
    "thinking.teacher": True,
    "steps": 100,
    "optimizer.learning_rate": 5e-6,
    "rollout.prompts": 32,
    "rollout.group_size": 1,
    "rollout.temperature": 1.1,
    "rollout.max_response": 1024,
    "lora.rank": 64,
    "lora.alpha": 128.0,
    "lora.targets": ALL_SEVEN,
    "evaluation.samples": 12,
    # Released code.
    "method.tau": 0.05,
    "rollout.top_p": 0.95,
    "rollout.top_k": 20,
    "optimizer.clip_norm": 0.1,
    "data.train": "siyanzhao/Openthoughts_math_30k_opsd",
    # Unstated.
    "optimizer.weight_decay": 0.0,
    "optimizer.schedule": "constant",
}

PAPERS = {
    "rlsd_text": {**RLSD, "model.path": "Qwen/Qwen3-8B"},
    # Fig. 6 and the released script: answers of 2,048 tokens on the smaller model.
    "sdpg_4b": {**SDPG, "model.path": "Qwen/Qwen3-4B", "rollout.max_response": 4096},
    "sdpg_1_7b": {**SDPG, "model.path": "Qwen/Qwen3-1.7B", "rollout.max_response": 2048},
    "cast_1_7b": {**CAST, "model.path": "Qwen/Qwen3-1.7B"},
    "cast_4b": {**CAST, "model.path": "Qwen/Qwen3-4B"},
    "cast_8b": {**CAST, "model.path": "Qwen/Qwen3-8B"},
    "sc_grpo_8b": SC_GRPO,
    "hsd_8b": {**HSD, "model.path": "Qwen/Qwen3-8B-Base"},
    "hsd_32b": {**HSD, "model.path": "Qwen/Qwen3-32B"},
    "opsd_1_7b": OPSD,
}
# Settings of the built-in tasks, which were run.
BUILT_IN = ("tiny", "chains", "chains_answer", "countdown_small", "countdown_large")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    """The files import each other, as `python -m experiments.train` lets them."""
    monkeypatch.syspath_prepend(REPOSITORY)


def load(name):
    return configuration.load(FOLDER / f"{name}.py")


def settings(config):
    """All values by field, the method's defaults included."""
    found = dict(_flatten(config.to_dict()))
    for key, parameter in inspect.signature(METHODS[config.method.name]).parameters.items():
        found.setdefault(f"method.{key}", parameter.default)
    return found


def _flatten(group, prefix=""):
    for key, value in group.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def test_every_paper_has_a_file():
    assert set(FILES) == {*PAPERS, *BUILT_IN, "qwen3_jsonl"}


@pytest.mark.parametrize("name", PAPERS)
def test_values_are_the_papers(name):
    found = settings(load(name))
    expected = PAPERS[name]
    assert {field: found[field] for field in expected} == expected


@pytest.mark.parametrize("name", FILES)
def test_each_file_passes_the_check(name, tmp_path):
    config = load(name)
    config.output_dir = str(tmp_path)
    assert configuration.check(config).loss is not None


@pytest.mark.parametrize("name", PAPERS)
def test_what_the_papers_share(name):
    """A folder of its own, the package's wording, a benchmark, sizes that fit the devices."""
    config = load(name)
    assert config.output_dir == f"runs/{name}"
    wording = {n: t._replace(thinking=True) for n, t in configuration.templates(config).items()}
    assert wording == TEMPLATES
    assert "\\boxed{}" in config.data.suffix
    assert config.data.num_test == 0
    assert config.data.test == BENCHMARKS["aime24"].source
    assert config.data.test_split == BENCHMARKS["aime24"].split
    shown = config.rollout.max_hint_prompt - config.rollout.max_prompt
    if config.method.name in ("sc_grpo", "hsd"):
        assert shown > config.rollout.max_response  # a whole sibling


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        # {step: rate}; the first step is number 0.
        ("cast_4b", {0: 1e-6 / 15, 14: 1e-6, 15: 1e-6, 299: 1e-7 + 9e-7 / 285}),
        ("sdpg_4b", {0: 1e-7, 9: 1e-6, 399: 1e-6}),
        ("hsd_8b", {0: 1e-6, 1499: 1e-6}),
    ],
)
def test_learning_rates(name, rates):
    config = load(name)
    config.optimizer.weight_decay = 0.0
    optimizer = configuration.optimizer(config)
    params = jnp.zeros(())
    for step, rate in rates.items():
        move, _ = optimizer.update(jnp.ones(()), optimizer.init(params), params, step=step)
        np.testing.assert_allclose(-move, rate, rtol=1e-4)


@pytest.mark.parametrize("name", FILES)
def test_docstring_says_how_to_run_it_and_what_to_expect(name):
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")))
    assert f"python -m experiments.train --config=experiments/configs/{name}.py" in text
    assert "Hardware" in text
    if name in BUILT_IN:
        return
    assert "not measured here" in text.lower()
    assert set(re.findall(r"--config=experiments/configs/(\w+)\.py", text)) == {name}
    if name in PAPERS:
        assert re.search(r"2\d{3}\.\d{5}", text.splitlines()[0])
        assert "Time: " in text
        assert "Result: the paper's" in text
        benchmark, decoding = re.search(
            r"--benchmark=(\w+).*?--decoding=(\w+)", text, re.S
        ).groups()
        assert benchmark in BENCHMARKS
        assert DECODING[decoding].source.startswith(re.search(r"2\d{3}\.\d{5}", text)[0])
        assert f"--config.model.path={load(name).output_dir}/model" in text


def shrunk(name, folder):
    """The setting with the shipped model and task, and few short answers."""
    config, tiny = load(name), configuration.default()
    for group in ("model", "data", "templates"):
        config[group] = tiny[group]
    for length in ("max_prompt", "max_hint_prompt", "max_response"):
        config.rollout[length] = tiny.rollout[length]
    config.output_dir = str(folder)
    config.steps = 1
    config.data.num_train, config.data.num_test = 64, 8
    config.rollout.prompts, config.rollout.group_size = 8, min(config.rollout.group_size, 2)
    config.optimizer.mini_batches = min(config.optimizer.mini_batches, 2)
    config.evaluation.samples = config.rollout.group_size  # one sampler to compile
    config.compute.tokens = 512
    config.verifier.workers = 1
    config.mesh.fsdp = 1
    return config


@pytest.mark.parametrize("name", PAPERS)
def test_a_small_run_is_ready_to_start(name, tmp_path):
    run, params, frozen = prepare(shrunk(name, tmp_path))
    assert run.method.teachers
    assert (run.model.lora is not None) == (PAPERS[name]["lora.rank"] > 0)
    assert jax.tree.leaves(params)
    assert {STUDENT} == set(frozen)


def test_one_step_runs(tmp_path):
    """LoRA, a truncated sampler and no thinking at once."""
    summary = train(shrunk("cast_4b", tmp_path))
    assert summary["num_problems"] == 8
    assert (tmp_path / "model" / "config.json").is_file()
    assert (tmp_path / "adapter").is_dir()
