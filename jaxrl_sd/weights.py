"""Model folders <-> the parameters of `model`, without a model's copy in host memory.

A folder in Hugging Face form has `config.json` and either `model.safetensors` or shards listed in
`model.safetensors.index.json`. Our own form, for pods, has the parameters in an orbax checkpoint
`params/` instead, so that each host reads and writes only its own part.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxrl_sd import architectures, files, hosts, sharding
from jaxrl_sd.architectures import TENSORS, Layout, Slot
from jaxrl_sd.model import ModelConfig, param_shapes
from jaxrl_sd.types import Array, InputError, Params, first_line

SINGLE, INDEX, NATIVE = "model.safetensors", "model.safetensors.index.json", "params"
HEAD, EMBED = TENSORS["head"][0], TENSORS["embed"][0]
DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}


def load_config(path: str | os.PathLike) -> ModelConfig:
    """Reads config.json, see `architectures.from_json`.

    Raises:
      InputError: the folder or file is missing, or a field is missing, ill-typed or unsupported.
    """
    file = Path(path) / "config.json"
    if not file.parent.is_dir():
        raise InputError(f"{file.parent}: no such model folder")
    return architectures.from_json(file, read_json(file))


def load(
    path: str | os.PathLike, mesh: Mesh | None = None, dtype: Any = jnp.float32
) -> tuple[Params, ModelConfig]:
    """Reads a model of either form, each tensor straight to where its devices need it.

    All headers are checked before anything is allocated. The host then holds one tensor of one
    layer at a time. On several hosts each reads what its devices need.

    A tied model may still hold an `lm_head.weight`, as some public ones do, if it equals the
    embedding; we would not know which of two different ones is meant.

    Args:
      mesh: places the parameters as `sharding.of_state` says; None: on the default device.
      dtype: of the result; None keeps the stored one.

    Raises:
      InputError: as `load_config`; or a tensor is missing, unexpected, there twice, of another
        shape or type; or a file is missing or not readable.
    """
    folder, config = Path(path), load_config(path)
    if (folder / NATIVE).is_dir():
        return _load_native(folder, config, mesh, dtype), config
    slots = architectures.slots(config)
    with contextlib.ExitStack() as stack:
        opened = {file: stack.enter_context(open_file(file)) for file in _weight_files(folder)}
        owners = _owners(opened)
        _check_tensors(folder, owners, slots, config, dtype)
        flat = {}
        for param, placement in _placements(config, mesh).items():
            tensors = {name: slot for name, slot in slots.items() if slot.param == param}
            flat[param] = _read_param(tensors, owners, placement, dtype)
    return unflatten_dict(flat, sep="/"), config


def save(
    path: str | os.PathLike,
    params: Params,
    config: ModelConfig,
    *,
    eos_token_id: Sequence[int] | None,
    max_shard_bytes: int = 2 * 10**9,
) -> None:
    """Writes a model in Hugging Face form and in the types that it has.

    Files come under other names first and are renamed at the end, config.json last, so that a
    folder that was interrupted while new has none. Other weights in the folder are removed.
    `config.num_tokens` has no field and is not written. Every process of a run on several hosts
    has to call this; the first one writes.

    Args:
      path: the folder, made if it is missing; other files in it stay.
      eos_token_id: ids that end a generation, for generation_config.json; None writes no such file.
      max_shard_bytes: of a file, and so of what the host holds at a time; a larger tensor has a
        file of its own.

    Raises:
      InputError: the parameters do not have the shapes of `config`, or no config.json describes it.
    """
    folder, fields = _prepare(path, params, config, other=[NATIVE])
    flat, slots = flatten_dict(params, sep="/"), architectures.slots(config)
    sizes = {name: _num_bytes(flat[slot.param], slot) for name, slot in slots.items()}
    shards, owners = _split(sizes, max_shard_bytes), {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        owners |= dict.fromkeys(names, file)
        unfinished = files.unfinished(folder / file)
        _write_shard(unfinished, flat, {name: slots[name] for name in names})
    if hosts.is_first():
        _publish(folder, owners, sum(sizes.values()))
        _write_configs(folder, fields, eos_token_id)


def save_native(
    path: str | os.PathLike,
    params: Params,
    config: ModelConfig,
    *,
    eos_token_id: Sequence[int] | None,
) -> None:
    """Writes a model in our own form: each host the part that it has. Else as `save`."""
    folder, fields = _prepare(path, params, config, other=[SINGLE, INDEX])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / NATIVE).absolute(), params, force=True)
    if hosts.is_first():
        _write_configs(folder, fields, eos_token_id)


def _placements(config: ModelConfig, mesh: Mesh | None) -> dict[str, NamedSharding | None]:
    """Where each parameter goes; None is the default device."""
    shapes = flatten_dict(param_shapes(config))
    if mesh is None:
        return dict.fromkeys(map("/".join, shapes))
    arrays = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    return flatten_dict(sharding.of_state(unflatten_dict(arrays), mesh), sep="/")


def _read_param(
    tensors: Mapping[str, Slot],
    owners: Mapping[str, Any],
    placement: NamedSharding | None,
    dtype: Any,
) -> Array:
    """One parameter from its tensors."""
    (name, slot), *_ = tensors.items()
    dtype = DTYPES[owners[name].get_slice(name).get_dtype()] if dtype is None else dtype
    if slot.layer is ...:
        # A copy, because on CPU the first array is the memory that was read into.
        return jnp.array(_put(owners[name].get_tensor(name), slot, placement), dtype)
    stack = _zeros((len(tensors), *slot.layout.shape), jnp.dtype(dtype), placement)
    for name, slot in tensors.items():
        # The tensor has no name here and is waited for, so that it is gone when the next is read.
        stack = _write(
            stack,
            _put(owners[name].get_tensor(name), slot, placement),
            slot.layer,
            slot.layout,
            placement,
        )
        jax.block_until_ready(stack)
    return stack


def _put(x: np.ndarray, slot: Slot, placement: NamedSharding | None) -> Array:
    """A tensor as it is stored, split as the parameter will be."""
    if placement is None:
        return jax.device_put(x)
    if slot.layer is not ...:
        axes = [*placement.spec, *[None] * 4][1:]
        spec = PartitionSpec(*(axes[axis] for axis in slot.layout.leading_axes))
        placement = NamedSharding(placement.mesh, spec)
    return jax.make_array_from_callback(x.shape, placement, lambda index: x[index])


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: Any, placement: NamedSharding | None) -> Array:
    return _placed(jnp.zeros(shape, dtype), placement)


@partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _write(
    stack: Array, x: Array, layer: Array, layout: Layout, placement: NamedSharding | None
) -> Array:
    x = layout.from_stored(x).astype(stack.dtype)
    return _placed(jax.lax.dynamic_update_index_in_dim(stack, x, layer, axis=0), placement)


def _placed(x: Array, placement: NamedSharding | None) -> Array:
    return x if placement is None else jax.lax.with_sharding_constraint(x, placement)


def _load_native(folder: Path, config: ModelConfig, mesh: Mesh | None, dtype: Any) -> Params:
    path = (folder / NATIVE).absolute()
    device = SingleDeviceSharding(jax.local_devices()[0])
    shapes = flatten_dict(param_shapes(config), sep="/")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = flatten_dict(checkpointer.metadata(path).item_metadata.tree, sep="/")
            _check_same({n: x.shape for n, x in stored.items()}, shapes, f"{path}: parameter")
            target = {
                param: jax.ShapeDtypeStruct(
                    shapes[param], dtype or stored[param].dtype, sharding=placement or device
                )
                for param, placement in _placements(config, mesh).items()
            }
            return checkpointer.restore(path, unflatten_dict(target, sep="/"))
    except InputError:
        raise
    except Exception as error:  # orbax and its storage layers raise whatever they meet
        raise InputError(f"{path}: not readable by orbax: {first_line(error)}") from error


def _check_same(found: dict, expected: dict, what: str) -> None:
    """Names and shapes agree."""
    if missing := sorted(expected.keys() - found.keys()):
        raise InputError(f"{what} {missing[0]} is missing ({len(missing)} in all)")
    if unexpected := sorted(found.keys() - expected.keys()):
        raise InputError(f"{what} {unexpected[0]} is not of this model ({len(unexpected)} in all)")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise InputError(
                f"{what} {name} has shape {tuple(found[name])}, expected {shape} from config.json"
            )


def _check_tensors(
    folder: Path,
    owners: Mapping[str, Any],
    slots: Mapping[str, Slot],
    config: ModelConfig,
    dtype: Any,
) -> None:
    headers = {name: file.get_slice(name) for name, file in owners.items()}
    found = {name: header.get_shape() for name, header in headers.items()}
    if config.tie_embeddings:
        found.pop(HEAD, None)
    expected = {name: slot.layout.stored_shape for name, slot in slots.items()}
    _check_same(found, expected, f"{folder}: tensor")
    first = {}
    for name, slot in slots.items():
        kind = headers[name].get_dtype()
        if kind not in DTYPES:
            raise InputError(f"{folder}: tensor {name} is {kind}, expected {' or '.join(DTYPES)}")
        if dtype is None and kind != (usual := first.setdefault(slot.param, kind)):
            raise InputError(
                f"{folder}: tensor {name} is {kind}, expected {usual} as in the layers before it"
            )
    if config.tie_embeddings and HEAD in owners:
        head, embed = (owners[name].get_tensor(name) for name in (HEAD, EMBED))
        if not np.array_equal(head, embed):
            raise InputError(
                f"{folder}: tensor {HEAD} differs from {EMBED}, expected the same as "
                "tie_word_embeddings is true"
            )


def _owners(opened: Mapping[Path, Any]) -> dict[str, Any]:
    """The open file of every tensor."""
    owners, paths = {}, {}
    for path, file in opened.items():
        for name in file.keys():
            if name in owners:
                raise InputError(f"{path}: tensor {name} is also in {paths[name].name}")
            owners[name], paths[name] = file, path
    return owners


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / SINGLE, folder / INDEX
    if single.exists():
        return [single]
    if not index.exists():
        raise InputError(f"{folder}: has neither {SINGLE} nor {INDEX}")
    shards = architectures.field(index, read_json(index), "weight_map", dict).values()
    return [folder / str(shard) for shard in sorted(set(shards), key=str)]


def open_file(file: Path) -> Any:
    """A safetensors file, opened for reading with numpy.

    Raises:
      InputError: the file is missing or not readable.
    """
    try:
        # Not mapped into memory: what was read of a mapped file counts as the process's own.
        return safe_open(file, "np", backend="pread")
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: not readable as safetensors: {first_line(error)}") from error


def _prepare(
    path: str | os.PathLike, params: Params, config: ModelConfig, other: Sequence[str]
) -> tuple[Path, dict]:
    """The folder, made if it is missing, and the fields of its config.json."""
    folder = Path(path)
    if jax.tree.map(jnp.shape, params) != param_shapes(config):
        raise InputError("params: their shapes are not those of the model config")
    if in_the_way := [name for name in other if (folder / name).exists()]:
        raise InputError(f"{folder}: holds a model of another form, {in_the_way[0]}")
    fields = architectures.to_json(config, jnp.result_type(*jax.tree.leaves(params)).name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder, fields


def _num_bytes(param: Array, slot: Slot) -> int:
    return math.prod(slot.layout.shape) * param.dtype.itemsize


def _split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, in groups of at most `limit` bytes or of one tensor."""
    groups, room = [], 0
    for name, size in sizes.items():
        if size > room or not groups:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def _write_shard(file: Path, flat: Mapping[str, Array], slots: Mapping[str, Slot]) -> None:
    tensors = {name: fetch(flat[slot.param], slot) for name, slot in slots.items()}
    if hosts.is_first():
        write_tensors(file, tensors)


def write_tensors(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file that everybody may read."""
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes files that only their owner may read


def fetch(param: Array, slot: Slot) -> np.ndarray:
    """One tensor, on the host. A copy, because an array keeps what was once read from it."""
    x = param.copy() if slot.layer is ... else _take(param, slot.layer, slot.layout)
    if not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    # save_file writes the memory as it lies: a transposed view would come out scrambled.
    return np.ascontiguousarray(x)


@partial(jax.jit, static_argnums=2)
def _take(stack: Array, layer: Array, layout: Layout) -> Array:
    return layout.to_stored(stack[layer])


def _publish(folder: Path, owners: Mapping[str, str], num_bytes: int) -> None:
    """Makes finished files the model's and removes those of an earlier one."""
    names = set(owners.values())
    for name in names:
        files.publish(folder / name)
    if len(names) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": owners})
        names.add(INDEX)
    for old in [folder / SINGLE, folder / INDEX, *folder.glob("model-*-of-*.safetensors")]:
        if old.name not in names:
            old.unlink(missing_ok=True)


def _write_configs(folder: Path, fields: dict, eos_token_id: Sequence[int] | None) -> None:
    if eos_token_id is not None:
        write_json(folder / "generation_config.json", {"eos_token_id": list(eos_token_id)})
    write_json(folder / "config.json", fields)


def read_json(file: Path) -> dict:
    """A JSON object.

    Raises:
      InputError: the file is missing or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds {type(value).__name__}, expected a JSON object")
    return value


def write_json(file: Path, fields: dict) -> None:
    """Writes a JSON object; nobody reads half of it."""
    files.replace_text(file, json.dumps(fields, indent=2) + "\n")
