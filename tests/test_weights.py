import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxrl_sd import model, rope, sharding, weights
from jaxrl_sd.types import InputError

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("tied", "tied_theta_1e6", "untied_bfloat16_shards", "llama3", "qwen2_yarn")
CONFIG = model.ModelConfig(
    vocab_size=11,
    num_tokens=11,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rope_theta=12345.0,
    rms_norm_eps=1e-5,
    tie_embeddings=True,
    max_position_embeddings=64,
)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)


def random_params(config):
    """Norms far from 1, so that every parameter counts."""
    rng = np.random.default_rng(0)

    def draw(shape):
        return jnp.asarray(0.5 + 0.5 * rng.standard_normal(shape), jnp.float32)

    return jax.tree.map(draw, model.param_shapes(config), is_leaf=lambda x: isinstance(x, tuple))


def our_logits(params, config, ids, length, T):
    """Logits [rows, T, V] before the last T tokens of each row: a left-padded batch."""
    S = max(length) - T
    prompt = np.full((len(ids), S), 7, np.int32)
    for row, n in enumerate(length):
        prompt[row, S - (n - T) :] = ids[row, : n - T]
    response = np.stack([row[n - T : n] for row, n in zip(ids, length, strict=True)])
    hidden = model.response_hidden(params, prompt, np.asarray(length) - T, response, config)
    return model.logits(params, hidden, config)


def edit_json(file, **changes):
    """A change to None removes the field."""
    fields = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def saved(tmp_path):
    weights.save(tmp_path, random_params(CONFIG), CONFIG, eos_token_id=[3, 5])
    return tmp_path


@pytest.fixture
def shards(tmp_path):
    return shutil.copytree(FIXTURES / "untied_bfloat16_shards", tmp_path / "shards")


# Equality with transformers: stored logits, no torch needed.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", [1, 3])
def test_stored_logits_of_left_padded_rows(name, T):
    params, config = weights.load(FIXTURES / name)
    expected = np.load(FIXTURES / name / "expected.npz")
    length = expected["length"]
    assert len(set(length)) > 1 and min(length) - T >= 1
    got = our_logits(params, config, expected["ids"], length, T)
    for row, n in enumerate(length):
        want = expected["logits"][row, n - T - 1 : n - 1]
        np.testing.assert_allclose(got[row], want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_stored_logits_of_every_position(name):
    params, config = weights.load(FIXTURES / name)
    expected = np.load(FIXTURES / name / "expected.npz")
    ids, one = expected["ids"], np.ones(len(expected["ids"]), np.int32)
    hidden = model.response_hidden(params, ids[:, :1], one, ids[:, 1:], config)
    got = model.logits(params, hidden, config)
    for row, n in enumerate(expected["length"]):
        want = expected["logits"][row, : n - 1]
        np.testing.assert_allclose(got[row, : n - 1], want, rtol=0, atol=1e-4)


def test_stored_theta_alone_changes_the_logits():
    params, config = weights.load(FIXTURES / "tied")
    other_params, other_config = weights.load(FIXTURES / "tied_theta_1e6")
    jax.tree.map(np.testing.assert_array_equal, params, other_params)
    assert other_config == dataclasses.replace(config, rope_theta=1e6)
    a, b = (np.load(FIXTURES / name / "expected.npz")["logits"] for name in NAMES[:2])
    assert np.abs(a - b).max() > 1


def test_stored_fixtures_cover_what_they_claim():
    tied, untied = (weights.load_config(FIXTURES / name) for name in (NAMES[0], NAMES[2]))
    assert tied.tie_embeddings and not untied.tie_embeddings
    assert (tied.num_heads, tied.num_kv_heads, untied.num_kv_heads) == (4, 2, 1)
    assert tied.head_dim * tied.num_heads != tied.hidden_size
    assert (tied.rms_norm_eps, untied.rms_norm_eps) == (1e-6, 1e-2)
    llama, qwen2 = (weights.load_config(FIXTURES / name) for name in NAMES[3:])
    assert llama.biases == ("q", "k", "v", "o", "gate", "up", "down") and not llama.qk_norm
    assert qwen2.biases == ("q", "k", "v") and qwen2.tie_embeddings
    assert type(llama.rope_scaling) is rope.Llama3 and type(qwen2.rope_scaling) is rope.Yarn


# Our own format.


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_round_trip_is_exact(tmp_path, config):
    params = random_params(config)
    weights.save(tmp_path, params, config, eos_token_id=None)
    got, got_config = weights.load(tmp_path)
    assert got_config == config
    assert jax.tree.map(jnp.shape, got) == model.param_shapes(config)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype(np.float32)}
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(got))


def test_saved_files(saved):
    names = {file.name for file in saved.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == [3, 5]
    with safe_open(saved / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in file.keys()
        assert file.get_slice("model.layers.1.self_attn.o_proj.weight").get_shape() == [8, 24]


def test_no_generation_config_without_eos(tmp_path):
    weights.save(tmp_path, random_params(CONFIG), CONFIG, eos_token_id=None)
    assert not (tmp_path / "generation_config.json").exists()


def test_save_replaces_an_earlier_model(saved):
    params = random_params(UNTIED)
    weights.save(saved, params, UNTIED, eos_token_id=None)
    got, config = weights.load(saved)
    assert config == UNTIED
    jax.tree.map(np.testing.assert_array_equal, got, params)


def test_interrupted_save_keeps_the_old_file(saved, monkeypatch):
    before = (saved / "model.safetensors").read_bytes()

    def half(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(weights, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        weights.save(saved, random_params(CONFIG), CONFIG, eos_token_id=None)
    assert (saved / "model.safetensors").read_bytes() == before


def test_save_refuses_params_of_another_config(tmp_path):
    deeper = dataclasses.replace(CONFIG, num_layers=3)
    with pytest.raises(InputError, match="params"):
        weights.save(tmp_path, random_params(deeper), CONFIG, eos_token_id=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_are_cast(saved, dtype):
    params, _ = weights.load(saved)
    edit_tensors(
        saved, lambda tensors: tensors.update({k: x.astype(dtype) for k, x in tensors.items()})
    )
    got, _ = weights.load(saved)
    want = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype(np.float32)}


def test_spare_tied_head_must_equal_the_embedding(saved):
    def add(head):
        edit_tensors(saved, lambda tensors: tensors.update({"lm_head.weight": head(tensors)}))

    params, _ = weights.load(saved)
    add(lambda tensors: tensors["model.embed_tokens.weight"].copy())
    got, _ = weights.load(saved)
    jax.tree.map(np.testing.assert_array_equal, got, params)
    add(lambda tensors: tensors["model.embed_tokens.weight"] + 1)
    with pytest.raises(InputError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        weights.load(saved)


# Both forms, in the types that are asked for, on one device or on a mesh.


def files(folder):
    return {file.name for file in folder.iterdir()}


def tensors_of(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 10**4])
def test_round_trip_of_a_folder_is_exact(tmp_path, name, max_shard_bytes):
    params, config = weights.load(FIXTURES / name, dtype=None)
    weights.save(tmp_path, params, config, eos_token_id=None, max_shard_bytes=max_shard_bytes)
    want, got = tensors_of(FIXTURES / name), tensors_of(tmp_path)
    assert got.keys() == want.keys()
    for tensor, x in want.items():
        assert got[tensor].dtype == x.dtype
        np.testing.assert_array_equal(got[tensor], x)
    dtype = json.loads((tmp_path / "config.json").read_text())["dtype"]
    assert dtype == ("bfloat16" if "bfloat16" in name else "float32")


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, None])
def test_a_mesh_changes_where_and_not_what(mesh, name, dtype):
    want, _ = weights.load(FIXTURES / name, dtype=dtype)
    got, _ = weights.load(FIXTURES / name, mesh, dtype)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, want)
    assert jax.tree.map(lambda x: x.sharding, got) == sharding.of_state(got, mesh)
    assert len(got["layers"]["gate"].sharding.device_set) == 8


def test_a_sharded_model_is_saved_like_a_whole_one(mesh, tmp_path):
    params, config = weights.load(FIXTURES / "llama3", mesh)
    weights.save(tmp_path, params, config, eos_token_id=None)
    want, got = load_file(FIXTURES / "llama3" / weights.SINGLE), tensors_of(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, None])
def test_native_form_holds_the_same(mesh, tmp_path, dtype):
    params, config = weights.load(FIXTURES / "untied_bfloat16_shards", dtype=None)
    weights.save_native(tmp_path, params, config, eos_token_id=[1])
    assert files(tmp_path) == {"config.json", "generation_config.json", "params"}
    want, _ = weights.load(FIXTURES / "untied_bfloat16_shards", mesh, dtype)
    got, got_config = weights.load(tmp_path, mesh, dtype)
    assert got_config == config
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert jax.tree.map(lambda x: x.sharding, got) == sharding.of_state(got, mesh)
    assert {x.dtype for x in jax.tree.leaves(got)} == {x.dtype for x in jax.tree.leaves(want)}


def test_native_form_that_does_not_fit_its_config(tmp_path):
    weights.save_native(tmp_path, random_params(CONFIG), CONFIG, eos_token_id=None)
    edit_json(tmp_path / "config.json", head_dim=4)
    with pytest.raises(
        InputError, match=r"layers/q has shape \(2, 8, 4, 6\), expected \(2, 8, 4, 4"
    ):
        weights.load(tmp_path)
    edit_json(tmp_path / "config.json", head_dim=6, tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"params: parameter head is missing"):
        weights.load(tmp_path)
    shutil.rmtree(tmp_path / "params" / "d", ignore_errors=True)
    (tmp_path / "params" / "_METADATA").unlink()
    with pytest.raises(InputError, match=r"params: not readable by orbax") as error:
        weights.load(tmp_path)
    assert_one_line(error)


def test_the_two_forms_do_not_share_a_folder(saved, tmp_path):
    with pytest.raises(InputError, match=r"another form, model\.safetensors"):
        weights.save_native(saved, random_params(CONFIG), CONFIG, eos_token_id=None)
    weights.save_native(tmp_path / "native", random_params(CONFIG), CONFIG, eos_token_id=None)
    with pytest.raises(InputError, match="another form, params"):
        weights.save(tmp_path / "native", random_params(CONFIG), CONFIG, eos_token_id=None)


def test_shards_are_as_small_as_asked(tmp_path):
    """And a model that is saved over another one leaves none of its files."""
    params = random_params(UNTIED)
    for limit in (1000, 2000, 10**9, 1000):
        weights.save(tmp_path, params, UNTIED, eos_token_id=None, max_shard_bytes=limit)
        got, _ = weights.load(tmp_path)
        jax.tree.map(np.testing.assert_array_equal, got, params)
        shards = list(tmp_path.glob("*.safetensors"))
        for shard in shards:
            tensors = load_file(shard)
            assert sum(x.nbytes for x in tensors.values()) <= limit or len(tensors) == 1
        assert (tmp_path / weights.INDEX).exists() == (len(shards) > 1)
    index = json.loads((tmp_path / weights.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(4 * x.size for x in jax.tree.leaves(params))
    assert set(index["weight_map"].values()) | {weights.INDEX, "config.json"} == files(tmp_path)


def test_an_interrupted_new_folder_is_no_model(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(weights, "save_file", full)
    with pytest.raises(OSError, match="disk full"):
        weights.save(tmp_path / "new", random_params(CONFIG), CONFIG, eos_token_id=None)
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        weights.load(tmp_path / "new")


MEMORY = """
import sys
from pathlib import Path

import jax

from jaxrl_sd import weights


def field(name):  # in bytes; ru_maxrss would be that of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def peak(function, *args, **kwargs):
    before = field("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    result = function(*args, **kwargs)
    return result, field("VmHWM:") - before


source, target = sys.argv[1:]
one, config = weights.load(source)  # compiles
weights.save(target, one, config, eos_token_id=None, max_shard_bytes=2**23)
(two, _), loading = peak(weights.load, source)
_, saving = peak(weights.save, target, two, config, eos_token_id=None, max_shard_bytes=2**23)
print(loading - sum(x.nbytes for x in jax.tree.leaves(two)), saving)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_host_memory_is_a_few_tensors(tmp_path):
    """Of 130 MB in tensors of 4 MB. On CPU the arrays are host memory too and are counted off."""
    sizes = dict(hidden_size=1024, intermediate_size=1024, num_layers=6, vocab_size=1024)
    config = dataclasses.replace(CONFIG, **sizes, num_heads=8, num_kv_heads=1, head_dim=128)
    params = jax.jit(model.init_params, static_argnums=1)(jax.random.key(0), config)
    weights.save(tmp_path / "one", params, config, eos_token_id=None, max_shard_bytes=2**25)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "one", tmp_path / "two"],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed goes back at once
        check=True,
        capture_output=True,
    )
    loading, saving = map(int, run.stdout.split())
    largest = 4 * 1024**2
    assert loading < (3 + 1) * largest  # 3 on the host, and the device's copy of one layer
    assert saving < 2**23 + 2 * largest  # a file's worth, and what is on its way


# Errors: one line that names the file, the field or tensor, and what was expected.


def assert_one_line(error):
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2', supported are qwen3, qwen2, llama"),
        ({"model_type": None}, "model_type is missing"),
        ({"architectures": ["Qwen3ForTokenClassification"]}, "architectures.*Qwen3ForCausalLM"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta is -1.0, expected a positive"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan, expected a pos"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "8"}, "hidden_size is '8', expected int"),
        ({"hidden_size": 8.0}, "hidden_size is 8.0, expected int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive int"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, expected int"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected bool"),
        ({"num_key_value_heads": 3}, "num_attention_heads is 4, expected a multiple.* 3"),
    ],
)
def test_config_errors(saved, changes, message):
    edit_json(saved / "config.json", **changes)
    with pytest.raises(InputError, match=message) as error:
        weights.load(saved)
    assert_one_line(error)
    assert "config.json" in str(error.value)


def test_missing_folder_and_files(saved, tmp_path):
    with pytest.raises(InputError, match="absent: no such model folder"):
        weights.load(tmp_path / "absent")
    (saved / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors nor model\.safetensors\.index"):
        weights.load(saved)
    (saved / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        weights.load(saved)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_config_is_not_a_json_object(saved, text):
    (saved / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json: .*JSON") as error:
        weights.load(saved)
    assert_one_line(error)


def test_missing_tensor(saved):
    edit_tensors(saved, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        weights.load(saved)


def test_untied_model_needs_its_head(saved):
    edit_json(saved / "config.json", tie_word_embeddings=False)
    with pytest.raises(InputError, match=r"lm_head\.weight is missing"):
        weights.load(saved)


def test_unexpected_tensor(saved):
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(24, np.float32)}
    edit_tensors(saved, lambda tensors: tensors.update(bias))
    with pytest.raises(InputError, match=r"q_proj\.bias is not of this model"):
        weights.load(saved)


def test_wrong_shape(saved):
    edit_json(saved / "config.json", head_dim=4)
    with pytest.raises(InputError, match=r"layers\.0\..* has shape \(24, 8\), expected \(16, 8\)"):
        weights.load(saved)


def test_wrong_dtype(saved):
    def edit(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float64)

    edit_tensors(saved, edit)
    with pytest.raises(InputError, match=r"model\.norm\.weight is F64, expected F32"):
        weights.load(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file(saved, keep):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors: not readable") as error:
        weights.load(saved)
    assert_one_line(error)


def test_missing_shard(shards):
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00003\.safetensors: no such file"):
        weights.load(shards)


def test_a_tensor_in_two_shards(shards):
    names = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2)]
    first, second = (load_file(shards / name) for name in names)
    twice = next(iter(first))
    save_file({**second, twice: first[twice]}, shards / names[1])
    with pytest.raises(InputError, match=rf"{names[1]}: tensor {twice} is also in {names[0]}"):
        weights.load(shards)


def test_a_stored_type_is_kept_only_where_it_is_one(saved):
    def edit(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].astype(np.float16)

    edit_tensors(saved, edit)
    weights.load(saved)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight is F16, expected F32"):
        weights.load(saved, dtype=None)


def test_index_without_weight_map(shards):
    (shards / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"index\.json: weight_map is missing"):
        weights.load(shards)


# Live, with torch: transformers opens what we save, and we open what it saves.


@pytest.fixture
def torch_models():
    pytest.importorskip("torch")
    import make_fixtures

    return make_fixtures


IDS = np.random.default_rng(0).integers(11, size=13, dtype=np.int32)


def logits_of_all(params, config):
    one = np.ones(1, np.int32)
    hidden = model.response_hidden(params, IDS[None, :1], one, IDS[None, 1:], config)
    return model.logits(params, hidden, config)[0]


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_transformers_opens_what_we_save(torch_models, tmp_path, config):
    from transformers import AutoConfig, AutoModelForCausalLM

    params = random_params(config)
    weights.save(tmp_path, params, config, eos_token_id=[3, 5])
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(opened).__name__ == "Qwen3ForCausalLM"
    assert str(opened.dtype) == "torch.float32"
    assert opened.generation_config.eos_token_id == [3, 5]
    assert opened.config.rope_parameters["rope_theta"] == config.rope_theta
    assert AutoConfig.from_pretrained(tmp_path).model_type == "qwen3"
    want = torch_models.row_logits(opened, IDS)[:-1]
    np.testing.assert_allclose(logits_of_all(params, config), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_we_open_what_transformers_saves(torch_models, tmp_path, tied):
    theirs = torch_models.random_model(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rope_theta=12345.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    theirs.save_pretrained(tmp_path)
    params, config = weights.load(tmp_path)
    assert config == dataclasses.replace(CONFIG, tie_embeddings=tied)
    want = torch_models.row_logits(theirs, IDS)[:-1]
    np.testing.assert_allclose(logits_of_all(params, config), want, rtol=0, atol=1e-4)
