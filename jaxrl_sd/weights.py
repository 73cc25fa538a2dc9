"""Hugging Face folders <-> the parameters of `model`.

A folder has `config.json` and either `model.safetensors` or shards listed in
`model.safetensors.index.json`. All that is particular to Qwen3 is in the three tables below.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import EllipsisType
from typing import NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrl_sd.model import ModelConfig, param_shapes
from jaxrl_sd.types import InputError, Params

# Fields of config.json that must have this value: the decoder has no code for another.
FIXED = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_act": "silu",
    "attention_bias": False,
    "use_sliding_window": False,
}

# Field of ModelConfig: (field of config.json, its type).
FIELDS = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("hidden_size", int),
    "intermediate_size": ("intermediate_size", int),
    "num_layers": ("num_hidden_layers", int),
    "num_heads": ("num_attention_heads", int),
    "num_kv_heads": ("num_key_value_heads", int),
    "head_dim": ("head_dim", int),
    "rms_norm_eps": ("rms_norm_eps", float),
    "tie_embeddings": ("tie_word_embeddings", bool),
}

# Parameter: (its tensor, with {} for the layer; how many of its leading axes are the input of a
# linear layer, which is stored as a matrix [output, input]; 0 for what is stored as it is).
TENSORS = {
    "embed": ("model.embed_tokens.weight", 0),
    "layers/attn_norm": ("model.layers.{}.input_layernorm.weight", 0),
    "layers/q": ("model.layers.{}.self_attn.q_proj.weight", 1),
    "layers/k": ("model.layers.{}.self_attn.k_proj.weight", 1),
    "layers/v": ("model.layers.{}.self_attn.v_proj.weight", 1),
    "layers/q_norm": ("model.layers.{}.self_attn.q_norm.weight", 0),
    "layers/k_norm": ("model.layers.{}.self_attn.k_norm.weight", 0),
    "layers/o": ("model.layers.{}.self_attn.o_proj.weight", 2),
    "layers/mlp_norm": ("model.layers.{}.post_attention_layernorm.weight", 0),
    "layers/gate": ("model.layers.{}.mlp.gate_proj.weight", 1),
    "layers/up": ("model.layers.{}.mlp.up_proj.weight", 1),
    "layers/down": ("model.layers.{}.mlp.down_proj.weight", 1),
    "final_norm": ("model.norm.weight", 0),
    "head": ("lm_head.weight", 0),
}
HEAD, EMBED = TENSORS["head"][0], TENSORS["embed"][0]


class Slot(NamedTuple):
    """Where one stored tensor lives in our parameters."""

    param: str
    layer: int | EllipsisType  # index along the leading axis; `...` outside the layers
    shape: tuple[int, ...]
    input_axes: int

    def stored_shape(self) -> tuple[int, ...]:
        if not self.input_axes:
            return self.shape
        inputs, outputs = self.shape[: self.input_axes], self.shape[self.input_axes :]
        return math.prod(outputs), math.prod(inputs)

    def to_stored(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(self.stored_shape()[::-1]).T if self.input_axes else x

    def from_stored(self, x: np.ndarray) -> np.ndarray:
        return x.T.reshape(self.shape) if self.input_axes else x


def load_config(path: str | os.PathLike) -> ModelConfig:
    """Reads config.json of transformers 4 or 5; `num_tokens` becomes `vocab_size`.

    Raises:
      InputError: the folder or file is missing, or a field is missing, ill-typed or unsupported.
    """
    file = Path(path) / "config.json"
    if not file.parent.is_dir():
        raise InputError(f"{file.parent}: no such model folder")
    fields = _read_json(file)
    _field(file, fields, "model_type", str)
    for name, value in FIXED.items():
        if fields.get(name) not in (None, value):
            raise InputError(f"{file}: {name} is {fields[name]!r}, supported is {value!r}")
    for kind in fields.get("layer_types") or ():
        if kind != "full_attention":
            raise InputError(f"{file}: layer_types has {kind!r}, supported is 'full_attention'")
    sizes = {ours: _field(file, fields, name, kind) for ours, (name, kind) in FIELDS.items()}
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        raise InputError(
            f"{file}: num_attention_heads is {sizes['num_heads']}, expected a multiple of "
            f"num_key_value_heads {sizes['num_kv_heads']}"
        )
    theta = _rope_theta(file, fields)
    return ModelConfig(num_tokens=sizes["vocab_size"], rope_theta=theta, **sizes)


def load(path: str | os.PathLike) -> tuple[Params, ModelConfig]:
    """Reads a model; float16 and bfloat16 become float32.

    A tied model may still hold an `lm_head.weight`, as some public ones do, if it equals the
    embedding; we would not know which of two different ones is meant.

    Raises:
      InputError: as `load_config`; or a tensor is missing, unexpected, of another shape or type;
        or a file is missing or not readable as safetensors.
    """
    folder, config = Path(path), load_config(path)
    shapes = flax.traverse_util.flatten_dict(param_shapes(config), sep="/")
    params = {param: np.empty(shape, np.float32) for param, shape in shapes.items()}
    slots = _slots(config)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_open(file)) for file in _weight_files(folder)]
        stored = {name: file for file in files for name in file.keys()}
        _check_tensors(folder, stored, slots, config)
        for name, slot in slots.items():
            params[slot.param][slot.layer] = slot.from_stored(stored[name].get_tensor(name))
    return jax.tree.map(jnp.asarray, flax.traverse_util.unflatten_dict(params, sep="/")), config


def save(
    path: str | os.PathLike,
    params: Params,
    config: ModelConfig,
    *,
    eos_token_id: Sequence[int] | None,
) -> None:
    """Writes a model in float32, so that `load` and transformers open it.

    Each file is replaced as a whole and config.json comes last, so that a folder that was
    interrupted while new has none. `config.num_tokens` has no field and is not written.

    Args:
      path: the folder, made if it is missing; other files in it stay.
      eos_token_id: ids that end a generation, for generation_config.json; None writes no such file.

    Raises:
      InputError: the parameters do not have the shapes of `config`.
    """
    if jax.tree.map(jnp.shape, params) != param_shapes(config):
        raise InputError("params: their shapes are not those of the model config")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    flat = {param: np.asarray(x, np.float32) for param, x in flat.items()}
    # save_file writes the memory as it lies: a transposed view would come out scrambled.
    tensors = {
        name: np.ascontiguousarray(slot.to_stored(flat[slot.param][slot.layer]))
        for name, slot in _slots(config).items()
    }
    _replace(
        folder / "model.safetensors",
        lambda file: save_file(tensors, file, metadata={"format": "pt"}),
    )
    if eos_token_id is not None:
        _write_json(folder / "generation_config.json", {"eos_token_id": list(eos_token_id)})
    _write_json(folder / "config.json", _config_fields(config))


def _config_fields(config: ModelConfig) -> dict:
    # theta and dtype twice: transformers 5 reads the first name, older readers the second.
    return {
        **FIXED,
        **{name: getattr(config, ours) for ours, (name, _) in FIELDS.items()},
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _rope_theta(file: Path, fields: dict) -> float:
    # transformers 5: rope_parameters; before: rope_theta, and rope_scaling if positions are scaled.
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"{file}: rope_type is {kind!r}, supported is 'default'")
    return _field(file, {**fields, **rope}, "rope_theta", float)


def _field(file: Path, fields: dict, name: str, kind: type):
    if name not in fields:
        raise InputError(f"{file}: {name} is missing")
    value = fields[name]
    if kind is float and type(value) is int:  # JSON writers drop the ".0"
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{file}: {name} is {value!r}, expected {kind.__name__}")
    if kind in (int, float) and not value > 0:
        raise InputError(f"{file}: {name} is {value!r}, expected a positive {kind.__name__}")
    return value


def _slots(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor of such a model, by its stored name."""
    slots = {}
    for param, shape in flax.traverse_util.flatten_dict(param_shapes(config), sep="/").items():
        name, input_axes = TENSORS[param]
        if param.startswith("layers/"):
            for layer in range(config.num_layers):
                slots[name.format(layer)] = Slot(param, layer, shape[1:], input_axes)
        else:
            slots[name] = Slot(param, ..., shape, input_axes)
    return slots


def _check_tensors(folder: Path, stored: dict, slots: dict[str, Slot], config: ModelConfig):
    if missing := sorted(slots.keys() - stored.keys()):
        raise InputError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} in all)")
    spare_head = {HEAD} & stored.keys() if config.tie_embeddings else set()
    if unexpected := sorted(stored.keys() - slots.keys() - spare_head):
        raise InputError(
            f"{folder}: tensor {unexpected[0]} is not part of {FIXED['model_type']} "
            f"({len(unexpected)} in all)"
        )
    for name, slot in slots.items():
        view = stored[name].get_slice(name)
        if view.get_dtype() not in ("F32", "BF16", "F16"):
            raise InputError(
                f"{folder}: tensor {name} is {view.get_dtype()}, expected F32, BF16 or F16"
            )
        if tuple(view.get_shape()) != slot.stored_shape():
            raise InputError(
                f"{folder}: tensor {name} has shape {tuple(view.get_shape())}, expected "
                f"{slot.stored_shape()} from config.json"
            )
    for name in spare_head:
        if not np.array_equal(stored[name].get_tensor(name), stored[EMBED].get_tensor(EMBED)):
            raise InputError(
                f"{folder}: tensor {name} differs from {EMBED}, expected the same as "
                "tie_word_embeddings is true"
            )


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise InputError(f"{folder}: has neither {single.name} nor {index.name}")
    shards = _field(index, _read_json(index), "weight_map", dict).values()
    return [folder / shard for shard in sorted(set(shards))]


def _open(file: Path) -> safe_open:
    try:
        return safe_open(file, "np")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not readable as safetensors: {error}") from error


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds {type(value).__name__}, expected a JSON object")
    return value


def _write_json(file: Path, fields: dict) -> None:
    text = json.dumps(fields, indent=2) + "\n"
    _replace(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    """Nobody reads half a file: it is written under another name, then renamed."""
    partial = file.with_name(file.name + ".tmp")
    write(partial)
    partial.chmod(0o644)  # safetensors makes files that only their owner may read
    partial.replace(file)
