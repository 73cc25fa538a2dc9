"""Saves and restores everything that a run needs to continue: state and position, with orbax.

Saves are asynchronous and atomic: a checkpoint that was interrupted is not seen by `restore`.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxrl_sd.types import InputError, first_line
from jaxrl_sd.update import State


def manager(folder: Path, keep: int) -> ocp.CheckpointManager:
    """The checkpoints in `folder`, of which the newest `keep` are kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(
    checkpoints: ocp.CheckpointManager,
    state: State,
    position: int,
    config: dict[str, Any],
    seconds: dict[str, float],
) -> None:
    """Starts writing what follows the last update.

    Args:
      position: in the sequence of problems.
      config: of the run, as plain data.
      seconds: spent so far, by phase.
    """
    meta = {"config": config, "position": position, "seconds": dict(seconds)}
    checkpoints.save(
        int(state.step),
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave(meta),
        ),
    )


def restore(
    checkpoints: ocp.CheckpointManager, like: State, config: dict[str, Any], folder: Path
) -> tuple[State, int, dict[str, float]] | None:
    """State, position and seconds of the newest checkpoint, or None if there is none.

    Args:
      like: a state of the same shapes, types and shardings.
      config: of the run that wants to continue.
      folder: of the run, for the message.

    Raises:
      InputError: the checkpoint was written by a run with other settings or another model, or
        cannot be read.
    """
    step = checkpoints.latest_step()
    if step is None:
        return None
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        meta = checkpoints.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        _check_same_run(meta["config"], config, folder)
        restored = checkpoints.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
        )
    except InputError:
        raise
    except Exception as error:  # orbax and its storage layers raise whatever they meet
        raise InputError(
            f"output_dir: checkpoint {step} in {folder} cannot be read or is of another model "
            f"({first_line(error)}); remove it to continue from an earlier one"
        ) from error
    return restored.state, meta["position"], meta["seconds"]


# A run may go on for longer, from another folder, with other workers, other limits and saves.
FREE = (
    *("steps", "output_dir", "model.path", "rollout.max_rounds"),
    *("verifier.workers", "checkpoint.every", "checkpoint.keep"),
)


def _check_same_run(old: dict, new: dict, folder: Path) -> None:
    old, new = _flat(old), _flat(new)
    for field in sorted(old.keys() | new.keys()):
        if field not in FREE and old.get(field) != new.get(field):
            raise InputError(
                f"output_dir: {folder} holds a run with {field} = {old.get(field)!r}, "
                f"got {new.get(field)!r}; choose another folder"
            )


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
