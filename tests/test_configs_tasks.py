"""The settings of the built-in tasks: they pass every check, and any method runs on them."""

from pathlib import Path

import jax
import pytest

from jaxrl_sd import chains, contexts, data
from jaxrl_sd import config as configuration
from jaxrl_sd.start import prepare
from jaxrl_sd.train import train

REPOSITORY = Path(__file__).parents[1]
NAMES = ("tiny", "chains", "chains_answer", "countdown_small", "countdown_large")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    """The files import each other, as `python -m experiments.train` lets them."""
    monkeypatch.syspath_prepend(REPOSITORY)


def small(name, folder):
    """The setting with one short step."""
    config = configuration.load(REPOSITORY / "experiments" / "configs" / f"{name}.py")
    config.output_dir = str(folder)
    config.steps = 1
    config.data.num_train, config.data.num_test = 16, 8
    config.rollout.prompts, config.rollout.group_size, config.mesh.data = 4, 2, 1
    config.evaluation.samples = 2
    config.verifier.workers = 1
    return config


@pytest.mark.parametrize(("devices", "data"), [(1, 1), (2, 2), (8, 8), (12, 4), (3, 1)])
def test_the_main_job_takes_the_devices_that_divide_its_prompts(monkeypatch, devices, data):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    config = configuration.load(REPOSITORY / "experiments/configs/tiny.py")
    assert config.mesh.to_dict() == {"data": data, "fsdp": 1, "tensor": 1}
    configuration.check_settings(config)
    config.mesh.data = 1
    assert config.to_dict() == configuration.default().to_dict()


def test_each_has_a_folder_and_a_task_of_its_own():
    configs = [configuration.load(REPOSITORY / f"experiments/configs/{name}.py") for name in NAMES]
    assert [config.output_dir for config in configs] == [f"runs/{name}" for name in NAMES]
    tasks = {config.data.train for config in configs}
    assert tasks == {config.data.test for config in configs} == set(data.TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_each_is_ready_to_start(name, tmp_path):
    run, _, _ = prepare(small(name, tmp_path))
    assert run.method.teachers


@pytest.mark.parametrize("name", ["chains", "chains_answer"])
def test_chains_have_a_wording_for_every_hint_without_a_hole(name, tmp_path):
    templates = configuration.templates(small(name, tmp_path))
    unworded = {key for key in contexts.TEMPLATES if templates[key] == contexts.TEMPLATES[key]}
    assert unworded <= {"nothing", "feedback"}  # the verifier says nothing about a failure
    assert set(chains.TEMPLATES) <= set(templates)


@pytest.mark.parametrize(("name", "method"), [("chains", "sc_grpo"), ("chains_answer", "sdpg")])
def test_a_step_runs(name, method, tmp_path):
    config = small(name, tmp_path)
    config.method = {"name": method}
    summary = train(config)
    assert summary["num_problems"] == 8
