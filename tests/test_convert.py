"""experiments/convert.py: nothing of a model is lost on the way through either form."""

import shutil
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_run import small_config

from experiments.convert import make_empty, read, write
from jaxrl_sd import adapters, checkpoint, weights
from jaxrl_sd import config as configuration
from jaxrl_sd.model import Lora, init_adapter, merge
from jaxrl_sd.train import train
from jaxrl_sd.types import InputError


def convert(source, target, form="huggingface", dtype="stored", limit=10**9, **of_input):
    settings = {"adapter": None, "step": None, **of_input}
    write(target, read(source, dtype=dtype, **settings), form, dtype, limit)


FIXTURES = Path(__file__).parent / "fixtures"
TINY = Path(configuration.TINY_MODEL)


def tensors(folder):
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def assert_same_tensors(got, want):
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert got[name].dtype == x.dtype
        np.testing.assert_array_equal(got[name], x)


@pytest.mark.parametrize("name", ["untied_bfloat16_shards", "llama3", "qwen2_yarn"])
def test_there_and_back_is_exact(tmp_path, name):
    convert(FIXTURES / name, tmp_path / "native", "orbax", "stored", 10**9)
    convert(tmp_path / "native", tmp_path / "back", "huggingface", "stored", 10**4)
    assert_same_tensors(tensors(tmp_path / "back"), tensors(FIXTURES / name))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert weights.load_config(tmp_path / "back") == weights.load_config(FIXTURES / name)


def test_type_and_companions(tmp_path):
    convert(TINY, tmp_path / "half", "huggingface", "bfloat16", 10**9)
    got, _ = weights.load(tmp_path / "half", dtype=None)
    want, _ = weights.load(TINY, dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    for file in TINY.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            assert (tmp_path / "half" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("form", ["huggingface", "orbax"])
def test_an_adapter_is_merged(tmp_path, form):
    params, config = weights.load(TINY)
    config = replace(config, lora=Lora(2, 3.0, ("v", "down")))
    adapter = init_adapter(jax.random.key(0), config)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    adapters.save(tmp_path / "adapter", adapter, config, base=str(TINY))
    convert(TINY, tmp_path / "out", form, adapter=tmp_path / "adapter")
    got, _ = weights.load(tmp_path / "out")
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-7)  # devices share the sums
    jax.tree.map(close, got, merge(params, adapter, config))
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_an_adapter_alone_has_the_type_asked_for(tmp_path):
    config = replace(weights.load_config(TINY), lora=Lora(2, 3.0, ("v", "down")))
    adapter = init_adapter(jax.random.key(0), config)
    adapters.save(tmp_path / "adapter", adapter, config, base=str(TINY))
    convert(TINY, tmp_path / "out", "peft", "bfloat16", adapter=tmp_path / "adapter")
    got, want = tensors(tmp_path / "out"), tensors(tmp_path / "adapter")
    assert_same_tensors(got, {name: x.astype(jnp.bfloat16) for name, x in want.items()})


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"--output: .* cannot be made: "):
            make_empty(target)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """rank -> a run of two steps over a copy of the model, and its policies by step."""

    @cache
    def run(rank):
        folder, had, save = tmp_path_factory.mktemp("trained"), {}, checkpoint.save
        model = shutil.copytree(TINY, folder / "model")
        config = small_config(folder / "run", steps=2, lora__rank=rank, model__path=str(model))
        config.checkpoint.every = 1
        base, of_model = weights.load(model)
        of_model = replace(of_model, lora=configuration.lora(config))

        def seen(checkpoints, state, *rest):
            params = jax.device_get(state.params)
            had[int(state.step)] = merge(base, params, of_model) if rank else params
            save(checkpoints, state, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "save", seen)
            train(config)
        return folder / "run", had

    return run


@pytest.mark.parametrize("rank", [0, 2])
def test_what_a_run_had_at_a_step(trained, tmp_path, rank):
    run, had = trained(rank)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), had[1], had[2])
    assert max(jax.tree.leaves(moved)) > 1e-5
    convert(run, tmp_path / "last")
    convert(run, tmp_path / "first", step=1)
    # Merged over 8 devices and on one: the same sums, rounded in another order.
    close = partial(np.testing.assert_allclose, rtol=0, atol=1e-7 if rank else 0.0)
    for name, step in (("last", 2), ("first", 1)):
        jax.tree.map(close, weights.load(tmp_path / name)[0], had[step])
    jax.tree.map(close, tensors(tmp_path / "last"), tensors(run / "model"))
    for step in (0, 9):
        message = rf"--step: .* has checkpoints of the steps \[1, 2\], got {step}"
        with pytest.raises(InputError, match=message):
            convert(run, tmp_path / "none", step=step)
    if rank:
        convert(run, tmp_path / "adapter", "peft")
        assert_same_tensors(tensors(tmp_path / "adapter"), tensors(run / "adapter"))


def test_a_run_over_a_model_that_changed_is_refused(trained, tmp_path):
    run, _ = trained(2)
    model, kept = run.parent / "model", tmp_path / "kept"
    shutil.copytree(model, kept)
    params, of_model = weights.load(model)
    params["final_norm"] = params["final_norm"].at[0].add(1e-6)
    weights.save(model, params, of_model, eos_token_id=None)
    with pytest.raises(InputError, match="the weights are not those that the run in"):
        convert(run, tmp_path / "out")
    shutil.copytree(kept, model, dirs_exist_ok=True)


DAMAGED = """
import sys
from pathlib import Path
from experiments.convert import read
from jaxrl_sd.types import InputError
folder = Path(sys.argv[1])
for path in folder.glob("checkpoints/*/state/**/d/*"):
    path.write_bytes(b"")
try:
    read(folder, None, None, "stored")
except InputError as error:
    print(error)
"""


def test_a_damaged_run_is_named(trained, tmp_path, python):
    run = shutil.copytree(trained(0)[0], tmp_path / "run")
    # In a process of its own: orbax leaves an event loop behind, which is a warning here.
    done = python("-c", DAMAGED, run)
    message = f"--step: checkpoint 2 in {run} cannot be read"
    assert done.stdout.startswith(message), done.stderr[-2000:]
    assert done.stdout.count("\n") == 1


def test_flags_that_do_not_fit_the_input_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"--step: .* is a model, expected a run"):
        convert(TINY, tmp_path / "out", step=1)
    with pytest.raises(InputError, match="--format=peft: the input has no adapter"):
        convert(TINY, tmp_path / "out", "peft")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match=r"--adapter: .* is a run, expected a model"):
        convert(tmp_path, tmp_path / "out", adapter=TINY)


def test_command_line(tmp_path, python):
    source = shutil.copytree(TINY, tmp_path / "source")
    command = ("-m", "experiments.convert", f"--input={source}")
    done = python(*command, f"--output={tmp_path / 'out'}", "--max_shard_gb=0.0001")
    assert done.returncode == 0, done.stderr
    assert_same_tensors(tensors(tmp_path / "out"), tensors(TINY))
    assert (tmp_path / "out" / weights.INDEX).exists()
    (source / "model.safetensors").write_bytes(b"x" * 100)
    for name, message in (("out", "is not empty"), ("bad", "not readable as safetensors")):
        failed = python(*command, f"--output={tmp_path / name}")
        assert failed.returncode == 1
        assert failed.stderr.splitlines()[-1].startswith("error: ")
        assert message in failed.stderr
        assert "Traceback" not in failed.stderr
