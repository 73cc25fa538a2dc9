"""Saves and restores everything that a run needs to continue: state and position, with orbax.

Saves are asynchronous and atomic: a checkpoint that was interrupted is not seen by `restore`.
What `State.frozen` holds, the weights under an adapter and models of others, is not saved but
recognised, and read from where it was. A teacher's copy of the start is saved with all else.
"""

import zlib
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxrl_sd import hosts
from jaxrl_sd.types import InputError, Params, first_line
from jaxrl_sd.update import State


def manager(folder: Path, keep: int) -> ocp.CheckpointManager:
    """The checkpoints in `folder`, of which the newest `keep` are kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def reader(folder: Path) -> ocp.CheckpointManager:
    """The checkpoints in `folder`, which a run may be writing at the same time."""
    options = ocp.CheckpointManagerOptions(read_only=True)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(
    checkpoints: ocp.CheckpointManager,
    state: State,
    position: int,
    config: dict[str, Any],
    seconds: dict[str, float],
) -> None:
    """Starts writing what follows the last step.

    Args:
      position: in the sequence of problems.
      config: of the run, as plain data.
      seconds: spent so far, by phase.
    """
    meta = {
        "config": config,
        "position": position,
        "seconds": dict(seconds),
        "frozen": sorted(map(fingerprint, state.frozen.values())),
    }
    checkpoints.save(
        int(state.step),
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(_saved(state)),
            meta=ocp.args.JsonSave(meta),
        ),
    )


def restore(
    checkpoints: ocp.CheckpointManager, like: State, config: dict[str, Any], folder: Path
) -> tuple[State, int, dict[str, float]] | None:
    """State, position and seconds of the newest checkpoint, or None if there is none.

    Args:
      like: shapes, types and shardings of the state, and the same frozen weights.
      config: of the run that wants to continue.
      folder: of the run, for the message.

    Raises:
      InputError: the checkpoint was written by a run with other settings or another model, or
        cannot be read.
    """
    step = hosts.from_first(checkpoints.latest_step)
    if step is None:
        return None
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _saved(like))
    with named_errors(f"output_dir: checkpoint {step} in {folder}"):
        meta = read_meta(checkpoints, step)
        check_same_run(meta["config"], config, folder, FREE)
        _check_same_weights(meta["frozen"], like, folder)
        restored = checkpoints.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
        )
    teachers = {**like.teachers, **restored.state.teachers}
    state = restored.state.replace(frozen=like.frozen, teachers=teachers)
    return state, meta["position"], meta["seconds"]


@contextmanager
def named_errors(what: str):
    """Turns what reading a checkpoint raises into an InputError about `what`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # orbax and its storage layers raise whatever they meet
        raise InputError(
            f"{what} cannot be read or is of another model ({first_line(error)}); without it, an "
            "earlier one is used"
        ) from error


def _saved(state: State) -> State:
    """Without what has no arrays or is frozen: a run may go on when that was moved."""
    teachers = {name: kept for name, kept in state.teachers.items() if jax.tree.leaves(kept)}
    return state.replace(frozen={}, teachers=teachers)


def read_meta(checkpoints: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """What `save` writes beside the state: "config", "position", "seconds" and "frozen"."""
    return checkpoints.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta


def read_params(checkpoints: ocp.CheckpointManager, step: int, like: Params) -> Params:
    """What was trained, without the rest of the state; `like` has its shapes and shardings."""
    item = {"params": like}
    only = ocp.args.PyTreeRestore(
        item=item,
        partial_restore=True,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
    )
    return checkpoints.restore(step, args=ocp.args.Composite(state=only)).state["params"]


def fingerprint(params: Params) -> int:
    """A number that tells weights apart, the same on every mesh: checksums in integers."""
    return zlib.crc32(np.array(hosts.get(_bit_sums(params)), np.uint32).tobytes())


@jax.jit
def _bit_sums(params: Params) -> list[jax.Array]:
    return [_bit_sum(x) for x in jax.tree.leaves(params)]


def _bit_sum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return bits.sum(dtype=jnp.uint32)


def _check_same_weights(old: list[int], like: State, folder: Path) -> None:
    if old != sorted(map(fingerprint, like.frozen.values())):
        paths = ", ".join(path or "model.path" for path in like.frozen)
        raise InputError(
            f"output_dir: {folder} holds a run with other weights than these in {paths}, which it "
            f"does not train and so did not save"
        )


# A run may go on for longer, from another folder, on other devices (not to the same bits), with
# other workers, limits and saves. A moved model is recognised by its frozen weights; one that is
# trained whole is in the checkpoint.
FREE = (
    *("steps", "output_dir", "model.path", "method.teacher", "rollout.max_rounds"),
    *("mesh.data", "mesh.fsdp", "mesh.tensor"),
    *("compute.tokens", "compute.chunk", "compute.remat"),
    *("verifier.workers", "checkpoint.every", "checkpoint.keep"),
)


def check_same_run(old: dict, new: dict, folder: Path, free: Sequence[str] = ()) -> None:
    """What is in `folder` can be continued with these settings.

    Raises:
      InputError: naming the first setting, but for those that are free to change, that differs.
    """
    old, new = flat(old), flat(new)
    for field in {**new, **old}:
        if field not in free and old.get(field) != new.get(field):
            raise InputError(
                f"output_dir: {folder} holds a run with {field} = {old.get(field)!r}, "
                f"got {new.get(field)!r}; choose another folder"
            )


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
