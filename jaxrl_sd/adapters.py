"""Low-rank adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxrl_sd import files, hosts, weights
from jaxrl_sd.architectures import TENSORS, Layout, Slot, field
from jaxrl_sd.model import LINEAR, Lora, ModelConfig, adapter_shapes
from jaxrl_sd.types import InputError, Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Fields of adapter_config.json that change the arithmetic, with the only value there is code for.
FIXED = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layers_to_transform": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "kasa_config": None,
    "arrow_config": None,
    "monteclora_config": None,
}
# How factors may have been drawn. Others (PiSSA, OLoRA) subtract the first product from the weights
# under it, so that an adapter is not what is added to the model as it is stored.
STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
MODULES = {f"{name}_proj": name for name in LINEAR}


def save(path: str | os.PathLike, adapter: Params, config: ModelConfig, *, base: str) -> None:
    """Writes an adapter so that `peft.PeftModel.from_pretrained(model, path)` opens it.

    Every process of a run on several hosts has to call this; the first one writes.

    Args:
      adapter: of `adapter_shapes(config)`.
      base: the model that it belongs to, a folder or a name; PEFT records it.
    """
    folder, lora = Path(path), config.lora
    tensors = {
        name: weights.fetch(adapter["layers"][slot.param], slot)
        for name, slot in _slots(config).items()
    }
    if not hosts.is_first():
        return
    folder.mkdir(parents=True, exist_ok=True)
    files.replace(folder / WEIGHTS, lambda file: weights.write_tensors(file, tensors))
    fields = {
        **FIXED,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": [module for module, name in MODULES.items() if name in lora.targets],
        "inference_mode": True,
    }
    weights.write_json(folder / CONFIG, fields)


def load_config(path: str | os.PathLike) -> Lora:
    """Rank, scale and targets of a stored adapter.

    Raises:
      InputError: there is none, or it is of a kind that there is no code for.
    """
    file = Path(path) / CONFIG
    fields = weights.read_json(file)
    for name, value in FIXED.items():
        if fields.get(name) != value and fields.get(name):
            raise InputError(f"{file}: {name} is {fields[name]!r}, supported is {value!r}")
    if (start := fields.get("init_lora_weights")) not in STARTS:
        raise InputError(f"{file}: init_lora_weights is {start!r}, supported are {STARTS}")
    rank, alpha = field(file, fields, "r", int), field(file, fields, "lora_alpha", float)
    targets = fields.get("target_modules")
    if not isinstance(targets, list) or not targets or any(x not in [*MODULES] for x in targets):
        raise InputError(f"{file}: target_modules is {targets!r}, expected some of {[*MODULES]}")
    names = tuple(name for module, name in MODULES.items() if module in targets)
    return Lora(rank, alpha, names)


def load(path: str | os.PathLike, config: ModelConfig) -> Params:
    """A stored adapter in float32.

    Args:
      config: of the model under it, with `lora` as `load_config` gives it.

    Raises:
      InputError: a tensor is missing, unexpected or of another shape.
    """
    file, slots = Path(path) / WEIGHTS, _slots(config)
    with weights.open_file(file) as stored:
        if wrong := sorted(slots.keys() ^ set(stored.keys())):
            state = "is missing" if wrong[0] in slots else "is unexpected"
            raise InputError(f"{file}: tensor {wrong[0]} {state} ({len(wrong)} such in all)")
        tensors = {name: stored.get_tensor(name) for name in slots}
    shapes = adapter_shapes(config)["layers"]
    layers = {param: np.empty(shape, np.float32) for param, shape in shapes.items()}
    for name, slot in slots.items():
        if tensors[name].shape != slot.layout.stored_shape:
            raise InputError(
                f"{file}: tensor {name} has shape {tensors[name].shape}, expected "
                f"{slot.layout.stored_shape}"
            )
        layers[slot.param][slot.layer] = slot.layout.from_stored(tensors[name])
    return {"layers": {param: jnp.asarray(x) for param, x in layers.items()}}


def _slots(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor of such an adapter, by its stored name."""
    slots = {}
    for param, shape in adapter_shapes(config)["layers"].items():
        name, part = param.split("_")
        module = TENSORS[f"layers/{name}"][0].removesuffix(".weight")
        layout = Layout(shape[1:], LINEAR[name] if part == "a" else 1)
        for layer in range(config.num_layers):
            stored = f"base_model.model.{module.format(layer)}.lora_{part.upper()}.weight"
            slots[stored] = Slot(param, layer, layout)
    return slots
