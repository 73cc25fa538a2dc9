"""Low-rank adapters: trained alone over shared weights, and at home in peft and transformers."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import small_config

from jaxrl_sd import adapters, checkpoint, model, start, tokens, train, weights
from jaxrl_sd import config as configuration
from jaxrl_sd.model import LINEAR, Lora, adapter_shapes
from jaxrl_sd.types import InputError

BASE, TINY = weights.load(configuration.TINY_MODEL)
CONFIG = replace(TINY, lora=Lora(rank=3, alpha=12.0, targets=("q", "o", "down")))


def draw_adapter(config):
    """Far from zero, so that every factor counts."""
    rng = np.random.default_rng(0)
    shapes = adapter_shapes(config)["layers"]
    return {"layers": {n: jnp.float32(0.2 * rng.standard_normal(s)) for n, s in shapes.items()}}


def our_logits(params, config, ids: np.ndarray) -> np.ndarray:
    """f32[B, N - 1, V] of the tokens after the first."""
    length = jnp.ones(len(ids), jnp.int32)
    hidden = model.response_hidden(params, ids[:, :1], length, ids[:, 1:], config)
    return np.asarray(model.logits(params, hidden, config))


def their_logits(network, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return network(torch.tensor(ids)).logits[:, :-1].numpy()


def draw_ids() -> np.ndarray:
    return np.random.default_rng(1).integers(TINY.vocab_size, size=(2, 12))


def test_a_stored_adapter_comes_back(tmp_path):
    adapter = draw_adapter(CONFIG)
    adapters.save(tmp_path, adapter, CONFIG, base="somewhere")
    assert adapters.load_config(tmp_path) == CONFIG.lora
    jax.tree.map(np.testing.assert_array_equal, adapters.load(tmp_path, CONFIG), adapter)


# transformers warns about an attribute that peft 0.21 asks for.
of_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@of_peft
@pytest.mark.parametrize("targets", [("q", "o", "down"), tuple(LINEAR)])
def test_peft_and_transformers_compute_what_we_compute(tmp_path, targets):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = replace(TINY, lora=Lora(3, 12.0, targets))
    adapter, ids = draw_adapter(config), draw_ids()
    adapters.save(tmp_path / "adapter", adapter, config, base="somewhere")
    merged = model.merge(BASE, adapter, config)
    weights.save(tmp_path / "merged", merged, config, eos_token_id=None)
    ours = our_logits(model.join(BASE, adapter), config, ids)
    assert np.abs(ours - our_logits(BASE, TINY, ids)).max() > 1
    load = transformers.AutoModelForCausalLM.from_pretrained
    over = peft.PeftModel.from_pretrained(load(configuration.TINY_MODEL), tmp_path / "adapter")
    for network in (over, load(tmp_path / "merged")):
        np.testing.assert_allclose(their_logits(network.eval(), ids), ours, atol=1e-4)


@of_peft
def test_an_adapter_of_peft_is_ours(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    network = transformers.AutoModelForCausalLM.from_pretrained(configuration.TINY_MODEL)
    settings = peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=["v_proj", "gate_proj"], init_lora_weights=False
    )
    network = peft.get_peft_model(network, settings).eval()
    network.save_pretrained(tmp_path)
    config = replace(TINY, lora=adapters.load_config(tmp_path))
    assert config.lora == Lora(2, 8.0, ("v", "gate"))
    params = model.join(BASE, adapters.load(tmp_path, config))
    ids = draw_ids()
    np.testing.assert_allclose(
        their_logits(network, ids), our_logits(params, config, ids), atol=1e-4
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_rslora", True),
        ("use_dora", True),
        ("bias", "all"),
        ("peft_type", "LOHA"),
        ("modules_to_save", ["lm_head"]),
        ("target_modules", "all-linear"),
        ("target_modules", ["q_proj", "lm_head"]),
        ("rank_pattern", {"q_proj": 8}),
        ("init_lora_weights", "pissa_niter_4"),
        ("r", 0),
        ("r", 8.5),
        ("r", float("inf")),
        ("lora_alpha", True),
        ("target_modules", [["q_proj"]]),
    ],
)
def test_a_kind_of_adapter_without_code_is_named(tmp_path, field, value):
    adapters.save(tmp_path, draw_adapter(CONFIG), CONFIG, base="somewhere")
    file = tmp_path / adapters.CONFIG
    weights.write_json(file, {**weights.read_json(file), field: value})
    with pytest.raises(InputError, match=f"{adapters.CONFIG}: {field} is "):
        adapters.load_config(tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    adapters.save(tmp_path, draw_adapter(CONFIG), CONFIG, base="somewhere")
    with pytest.raises(InputError, match=r"layers.0.self_attn.v_proj.lora_A.weight is missing"):
        adapters.load(tmp_path, replace(CONFIG, lora=Lora(3, 12.0, ("q", "o", "down", "v"))))
    with pytest.raises(InputError, match=r"lora_A.weight has shape \(3, 64\), expected \(2, 64\)"):
        adapters.load(tmp_path, replace(CONFIG, lora=replace(CONFIG.lora, rank=2)))


def lora_config(folder, **settings):
    return small_config(folder, lora__rank=2, lora__alpha=4.0, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps, which nobody changes."""
    config = lora_config(tmp_path_factory.mktemp("trained"))
    train.train(config)
    return config


def test_training_changes_the_adapter_alone(trained, tmp_path):
    """And a run with one that was stopped continues and exports like any other."""
    whole, stopped = trained, lora_config(tmp_path / "stopped")
    shutil.copytree(whole.output_dir, stopped.output_dir)
    for written_later in ("checkpoints/4", "model", "adapter"):
        shutil.rmtree(Path(stopped.output_dir, written_later))
    train.train(stopped)
    ids, logits = draw_ids(), []
    for config in (whole, stopped):
        folder = f"{config.output_dir}/adapter"
        lora = replace(TINY, lora=adapters.load_config(folder))
        adapter = adapters.load(folder, lora)
        assert all(np.abs(x).max() > 0 for x in adapter["layers"].values())
        merged, _ = weights.load(f"{config.output_dir}/model")
        for got, want in (
            (merged, model.merge(BASE, adapter, lora)),
            (merged["embed"], BASE["embed"]),
        ):
            jax.tree.map(np.testing.assert_array_equal, got, want)
        logits.append(our_logits(model.join(BASE, adapter), lora, ids))
        np.testing.assert_allclose(logits[-1], our_logits(merged, TINY, ids), atol=1e-4)
    np.testing.assert_array_equal(*logits)


def test_copies_and_checkpoints_hold_no_more_than_the_adapter(tmp_path):
    config = lora_config(tmp_path, method__name="sdpo")
    run, params, frozen = start.prepare(config)
    with checkpoint.manager(tmp_path / "checkpoints", 1) as checkpoints:
        state, *_ = train.start_or_resume(run, params, frozen, checkpoints)
        shapes = adapter_shapes(run.model)
        (kept,) = state.teachers.values()
        for tree in (state.params, kept):
            assert jax.tree.map(jnp.shape, tree) == shapes
        checkpoint.save(checkpoints, state, 0, {}, {})
        checkpoints.wait_until_finished()
        size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        base = sum(x.nbytes for x in jax.tree.leaves(frozen))
        assert size < base / 5  # the adapter, its two moments and its average
        other = state.replace(frozen={"": jax.tree.map(lambda x: x + 1, state.frozen[""])})
        with pytest.raises(InputError, match=r"other weights than these in model\.path"):
            checkpoint.restore(checkpoints, other, {}, tmp_path)


def test_only_the_first_process_writes_an_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    adapters.save(tmp_path / "adapter", draw_adapter(CONFIG), CONFIG, base="somewhere")
    assert not (tmp_path / "adapter").exists()


def test_the_chat_template_comes_along(trained):
    assert tokens.load_tokenizer(f"{trained.output_dir}/model").chat_template


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", -1),
        ("alpha", 0.0),
        ("targets", ()),
        ("targets", ("q",)),
        ("targets", ("q_proj",) * 2),
        ("targets", ([],)),
    ],
)
def test_settings_without_sense_are_refused(tmp_path, field, value):
    config = lora_config(tmp_path)
    config.lora[field] = value
    with pytest.raises(InputError, match=f"lora.{field}: expected"):
        configuration.check(config)
