"""Where arrays live on a mesh of devices: one table from logical axes to mesh axes.

The mesh has three axes. `data` and `fsdp` both split the rows of a batch; `fsdp` also splits every
weight matrix along its hidden side, `tensor` along its heads, feed-forward or vocabulary side. XLA
inserts the communication. On one device all three have size 1 and nothing here does anything.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrl_sd.types import Array, InputError, first_line

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. An axis that is not named here is not split.
RULES = {
    "rows": ("data", "fsdp"),
    "replicas": ("data",),  # rows of an array that is split over fsdp along another axis
    "ids": ("tensor", "fsdp"),  # a vocabulary whose hidden side is whole
    "units": ("tensor", "fsdp"),  # a feed-forward side whose hidden side is whole
    "hidden": ("fsdp",),
    "heads": ("tensor",),
    "feed_forward": ("tensor",),
    "vocabulary": ("tensor",),
}

# The projections of a layer: how many leading axes of the weight (the layer's apart) are inputs.
LINEAR = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}

# Logical axes of each parameter, by its name in the trees of model.py.
PARAM_AXES = {
    "embed": ("vocabulary", "hidden"),
    "head": ("vocabulary", "hidden"),
    "q": ("layer", "hidden", "heads", "head_dim"),
    "k": ("layer", "hidden", "heads", "head_dim"),
    "v": ("layer", "hidden", "heads", "head_dim"),
    "o": ("layer", "heads", "head_dim", "hidden"),
    "gate": ("layer", "hidden", "feed_forward"),
    "up": ("layer", "hidden", "feed_forward"),
    "down": ("layer", "feed_forward", "hidden"),
}
for _name, _inputs in LINEAR.items():
    _layer, *_axes = PARAM_AXES[_name]
    PARAM_AXES[f"{_name}_bias"] = (_layer, *_axes[_inputs:])
    PARAM_AXES[f"{_name}_a"] = (_layer, *_axes[:_inputs], "rank")
    PARAM_AXES[f"{_name}_b"] = (_layer, "rank", *_axes[_inputs:])


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """A mesh over the first data * fsdp * tensor devices; says so if that leaves chips idle.

    Raises:
      InputError: there are fewer devices, or more and several processes have them.
    """
    sizes, available = (data, fsdp, tensor), jax.device_count()
    if math.prod(sizes) > available:
        raise InputError(
            f"mesh: data={data}, fsdp={fsdp}, tensor={tensor} need {math.prod(sizes)} devices, "
            f"there are {available}"
        )
    if math.prod(sizes) < available and jax.process_count() > 1:
        raise InputError(
            f"mesh: data={data}, fsdp={fsdp}, tensor={tensor} use {math.prod(sizes)} of "
            f"{available} devices; a run of several processes has to use all"
        )
    # The devices of a CPU share its cores: those that are not used leave theirs to the others.
    if math.prod(sizes) < available and jax.default_backend() != "cpu":
        logging.warning("mesh: %d of %d devices are used", math.prod(sizes), available)
    return lay_out(sizes, jax.devices()[: math.prod(sizes)])


def lay_out(sizes: tuple[int, int, int], devices: Sequence[jax.Device]) -> Mesh:
    """These devices as a mesh, of which neighbours are neighbours where the hardware has a grid.

    Raises:
      InputError: the grid cannot be cut so, as 8 x 2 out of 4 x 4.
    """
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=axis_types, devices=devices)
    except NotImplementedError as error:
        wanted = ", ".join(f"{name}={n}" for name, n in zip(MESH_AXES, sizes, strict=True))
        raise InputError(
            f"mesh: {wanted} cannot be laid on these {len(devices)} devices, each axis has to be "
            f"made of whole axes of their grid: {first_line(error)}"
        ) from error


def mesh_axes(axes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The mesh axes that split each of an array's logical axes; () for none.

    Raises:
      ValueError: two axes of the array would be split over the same mesh axis.
    """
    entries = [RULES.get(axis, ()) for axis in axes]
    used = [name for entry in entries for name in entry]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} map two array axes to one mesh axis: {entries}")
    return entries


def of_state(state: Any, mesh: Mesh) -> Any:
    """Shardings of a pytree that holds parameters, or copies of them, anywhere in it.

    Optimiser moments and teachers have the parameters' names as the end of their paths, so they are
    split alike. An axis that the mesh does not divide is left whole.
    """

    def sharding(path, leaf):
        name = getattr(path[-1], "key", None) if path else None
        axes = zip(mesh_axes(PARAM_AXES.get(name, ())), np.shape(leaf), strict=False)
        entries = [names if _splits(mesh, names, size) else () for names, size in axes]
        # Written as XLA writes it, so that what an update returns does not compile it again.
        while entries and not entries[-1]:
            entries.pop()
        return NamedSharding(mesh, PartitionSpec(*entries))

    return jax.tree.map_with_path(sharding, state)


def placed(tree: Any, shardings: Any) -> Any:
    """Shapes and types of a tree with these shardings, a tree like it."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def of_rows(mesh: Mesh) -> NamedSharding:
    """Splits the first axis, the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(*mesh_axes(("rows",))))


def row_devices(mesh: Mesh) -> int:
    """Over how many devices rows are split."""
    return math.prod(mesh.shape[axis] for axis in RULES["rows"])


def constrain(x: Array, axes: tuple[str, ...], mesh: Mesh | None) -> Array:
    """Tells XLA where an array is to live; axes that the mesh does not divide are left whole."""
    if mesh is None or mesh.size == 1:  # where being told costs XLA some fusions
        return x
    names = zip(mesh_axes(axes), x.shape, strict=True)
    spec = PartitionSpec(*(entry if _splits(mesh, entry, size) else () for entry, size in names))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def gather(layer: Any, mesh: Mesh | None, axes_of: Mapping = PARAM_AXES) -> Any:
    """The weights of one layer, each whole along its hidden side, for products with many tokens.

    `axes_of` has their logical axes under their names, the axis of the stack of layers first.

    They are gathered once. Left alone, XLA for TPUs multiplies with one device's piece after the
    other's, and reads and writes the products of all tokens each time. Where 32 devices have a
    piece each, that takes four times as long as the products themselves.
    """

    def of(path, x):
        _, *axes = axes_of.get(path[-1].key, ("", *[""] * x.ndim))
        return constrain(x, tuple("" if axis == "hidden" else axis for axis in axes), mesh)

    return jax.tree.map_with_path(of, layer)


def is_split(axis: str, size: int, mesh: Mesh | None) -> bool:
    """Whether a logical axis of that size is split, which needs devices that divide it."""
    return mesh is not None and _splits(mesh, RULES.get(axis, ()), size)


def _splits(mesh: Mesh, axes: tuple[str, ...], size: int) -> bool:
    devices = math.prod(mesh.shape[axis] for axis in axes)
    return devices > 1 and size % devices == 0
