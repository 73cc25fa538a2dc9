"""What Hugging Face files say of the models that `model` computes: fields and tensors.

All that is particular to a family is in FAMILIES; the decoder reads only what it is made of.
"""

import dataclasses
import math
from pathlib import Path
from types import EllipsisType
from typing import Any, NamedTuple, get_args, get_type_hints

from flax.traverse_util import flatten_dict

from jaxrl_sd import rope
from jaxrl_sd.model import LINEAR, ModelConfig, param_shapes
from jaxrl_sd.types import Array, InputError


class Family(NamedTuple):
    """One value of model_type.

    Attributes:
      architecture: the only entry of its `architectures`.
      bias_fields: field of config.json: projections that have a bias where it is true.
      biases: projections that always have one.
      qk_norm: whether queries and keys are normalised.
      head_dim: where config.json has none; None is hidden_size / num_attention_heads.
    """

    architecture: str
    bias_fields: dict[str, tuple[str, ...]]
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    head_dim: int | None = None


ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")

# model_type: what is particular to it, as in transformers 5.23. Qwen2.5 is a qwen2.
FAMILIES = {
    "qwen3": Family("Qwen3ForCausalLM", {"attention_bias": ATTENTION}, qk_norm=True, head_dim=128),
    "qwen2": Family("Qwen2ForCausalLM", {}, biases=("q", "k", "v")),
    "llama": Family("LlamaForCausalLM", {"attention_bias": ATTENTION, "mlp_bias": MLP}),
}

# Fields that must have this value where they are: the decoder has no code for another.
FIXED = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
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

_LAYER = "model.layers.{}."
_MODULES = {
    **{name: f"{_LAYER}self_attn.{name}_proj" for name in ATTENTION},
    **{name: f"{_LAYER}mlp.{name}_proj" for name in MLP},
}

# Parameter: (its tensor, with {} for the layer; how many of its leading axes are the input of a
# linear layer, which is stored as a matrix [output, input]; 0 for the output only, stored as a
# vector; None for what is stored as it is).
TENSORS = {
    "embed": ("model.embed_tokens.weight", None),
    "layers/attn_norm": (f"{_LAYER}input_layernorm.weight", None),
    "layers/q_norm": (f"{_LAYER}self_attn.q_norm.weight", None),
    "layers/k_norm": (f"{_LAYER}self_attn.k_norm.weight", None),
    "layers/mlp_norm": (f"{_LAYER}post_attention_layernorm.weight", None),
    **{f"layers/{name}": (f"{_MODULES[name]}.weight", LINEAR[name]) for name in LINEAR},
    **{f"layers/{name}_bias": (f"{_MODULES[name]}.bias", 0) for name in LINEAR},
    "final_norm": ("model.norm.weight", None),
    "head": ("lm_head.weight", None),
}


class Layout(NamedTuple):
    """How one of our arrays (of one layer, if it is in a layer) lies in its tensor."""

    shape: tuple[int, ...]
    input_axes: int | None  # see TENSORS

    @property
    def stored_shape(self) -> tuple[int, ...]:
        if self.input_axes is None:
            return self.shape
        inputs, outputs = self.shape[: self.input_axes], self.shape[self.input_axes :]
        return (math.prod(outputs), math.prod(inputs)) if inputs else (math.prod(outputs),)

    @property
    def leading_axes(self) -> tuple[int, ...]:
        """Of each stored axis, the first of our axes that it consists of."""
        if self.input_axes is None:
            return tuple(range(len(self.shape)))
        return (self.input_axes, 0) if self.input_axes else (0,)

    def to_stored(self, x: Array) -> Array:
        if self.input_axes:
            return x.reshape(self.stored_shape[::-1]).T
        return x.reshape(self.stored_shape)

    def from_stored(self, x: Array) -> Array:
        return (x.T if self.input_axes else x).reshape(self.shape)


class Slot(NamedTuple):
    """Where one stored tensor lives in our parameters."""

    param: str  # its path
    layer: int | EllipsisType  # index along the leading axis; `...` outside the layers
    layout: Layout


def slots(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor of such a model, by its stored name."""
    found = {}
    for param, shape in flatten_dict(param_shapes(config), sep="/").items():
        name, input_axes = TENSORS[param]
        if param.startswith("layers/"):
            for layer in range(config.num_layers):
                found[name.format(layer)] = Slot(param, layer, Layout(shape[1:], input_axes))
        else:
            found[name] = Slot(param, ..., Layout(shape, input_axes))
    return found


def from_json(file: Path, fields: dict) -> ModelConfig:
    """The model that config.json of transformers 4 or 5 describes; `num_tokens` is `vocab_size`.

    Args:
      file: for messages.

    Raises:
      InputError: a field is missing, ill-typed or unsupported.
    """
    name = field(file, fields, "model_type", str)
    if name not in FAMILIES:
        raise InputError(f"{file}: model_type is {name!r}, supported are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    _check_fixed(file, fields, {**FIXED, "architectures": [family.architecture]})
    for kind in fields.get("layer_types") or ():
        if kind != "full_attention":
            raise InputError(f"{file}: layer_types has {kind!r}, supported is 'full_attention'")
    fields = _with_defaults(file, fields, family)
    sizes = {ours: field(file, fields, theirs, kind) for ours, (theirs, kind) in FIELDS.items()}
    if sizes["num_heads"] % sizes["num_kv_heads"]:
        raise InputError(
            f"{file}: num_attention_heads is {sizes['num_heads']}, expected a multiple of "
            f"num_key_value_heads {sizes['num_kv_heads']}"
        )
    if sizes["head_dim"] % 2:
        raise InputError(f"{file}: head_dim is {sizes['head_dim']}, expected an even int")
    theta, scaling = _rope(file, fields)
    return ModelConfig(
        **sizes,
        num_tokens=sizes["vocab_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        qk_norm=family.qk_norm,
        biases=family.biases + _chosen_biases(file, fields, family),
        family=name,
        max_position_embeddings=_optional(file, fields, "max_position_embeddings", int),
    )


def to_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Fields of config.json with which transformers computes the same logits.

    Raises:
      InputError: no file of the model's family can say what its config says.
    """
    family, scaling = FAMILIES[config.family], config.rope_scaling
    kind = {scaled: name for name, scaled in rope.SCALINGS.items()}[type(scaling)]
    stretched = {k: v for k, v in dataclasses.asdict(scaling).items() if v is not None}
    rope_fields = {"rope_theta": config.rope_theta, "rope_type": kind, **stretched}
    fields = {
        "model_type": config.family,
        "architectures": [family.architecture],
        "hidden_act": FIXED["hidden_act"],
        "use_sliding_window": FIXED["use_sliding_window"],
        **{name: set(on) <= set(config.biases) for name, on in family.bias_fields.items()},
        **{theirs: getattr(config, ours) for ours, (theirs, _) in FIELDS.items()},
        # theta, scaling and dtype twice: transformers 5 reads the first, older readers the second.
        "rope_parameters": rope_fields,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope_fields if stretched else None,
        "max_position_embeddings": config.max_position_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    fields = {name: value for name, value in fields.items() if value is not None}
    read = from_json(Path("config.json"), fields)
    if read != dataclasses.replace(config, num_tokens=config.vocab_size, lora=None):
        raise InputError(f"model config: a {config.family} cannot be saved with {config}")
    return fields


def field(file: Path, fields: dict, name: str, kind: type) -> Any:
    """A field that must be there, of type str, bool, dict, or a positive int or float.

    Raises:
      InputError: it is missing, of another type, or not positive.
    """
    if name not in fields:
        raise InputError(f"{file}: {name} is missing")
    value = fields[name]
    if kind is float and type(value) is int:  # JSON writers drop the ".0"
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{file}: {name} is {value!r}, expected {kind.__name__}")
    if kind in (int, float) and not 0 < value < math.inf:
        raise InputError(f"{file}: {name} is {value!r}, expected a positive {kind.__name__}")
    return value


def _optional(file: Path, fields: dict, name: str, kind: type, default: Any = None) -> Any:
    return default if fields.get(name) is None else field(file, fields, name, kind)


def _check_fixed(file: Path, fields: dict, fixed: dict) -> None:
    for name, value in fixed.items():
        if fields.get(name) not in (None, value):
            raise InputError(f"{file}: {name} is {fields[name]!r}, supported is {value!r}")


def _with_defaults(file: Path, fields: dict, family: Family) -> dict:
    """The fields, with those that a file may leave out."""
    heads = field(file, fields, "num_attention_heads", int)
    hidden = field(file, fields, "hidden_size", int)
    defaults = {
        "num_key_value_heads": heads,
        "head_dim": family.head_dim or hidden // heads,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
    }
    return {**defaults, **{name: x for name, x in fields.items() if x is not None}}


def _chosen_biases(file: Path, fields: dict, family: Family) -> tuple[str, ...]:
    on = (names for f, names in family.bias_fields.items() if _optional(file, fields, f, bool))
    return tuple(name for names in on for name in names)


def _rope(file: Path, fields: dict) -> tuple[float, rope.Scaling]:
    # transformers 5: rope_parameters; before: rope_theta, and rope_scaling if positions are scaled.
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    given = _optional(file, fields, name, dict, {})
    given = {name: value for name, value in given.items() if value is not None}
    kind = given.pop("type", "default")
    kind = field(file, {"rope_type": given.pop("rope_type", kind)}, "rope_type", str)
    if kind not in rope.SCALINGS:
        raise InputError(
            f"{file}: rope_type is {kind!r}, supported are {', '.join(rope.SCALINGS)}, whose "
            "rotation of a token does not depend on the length of its sequence"
        )
    theta = field(file, {**fields, **given}, "rope_theta", float)
    _check_fixed(file, given, {"partial_rotary_factor": FIXED["partial_rotary_factor"]})
    known = {"rope_theta", "partial_rotary_factor"} | get_type_hints(rope.SCALINGS[kind]).keys()
    if unknown := sorted(given.keys() - known):
        raise InputError(f"{file}: {unknown[0]} is not a field of rope_type {kind!r}")
    # As transformers has it: beside the scaling, in it, or else the context of the whole model.
    length, context = "original_max_position_embeddings", fields.get("max_position_embeddings")
    given = {**({length: context} if context else {}), **given}
    given |= {length: fields[length]} if length in fields else {}
    return theta, _scaling(file, given, rope.SCALINGS[kind])


def _scaling(file: Path, given: dict, kind: type[rope.Scaling]) -> rope.Scaling:
    values, hints = {}, get_type_hints(kind)
    for entry in dataclasses.fields(kind):
        value_type = (get_args(hints[entry.name]) or (hints[entry.name],))[0]  # X of X | None
        if entry.default is dataclasses.MISSING or entry.name in given:
            values[entry.name] = field(file, given, entry.name, value_type)
    try:
        return kind(**values)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
