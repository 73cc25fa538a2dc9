"""The weights of a policy, wherever they are: a model, a model and an adapter, or a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_sd import adapters, checkpoint, hosts, sharding, weights
from jaxrl_sd import config as configuration
from jaxrl_sd.model import ModelConfig, adapter_shapes, merge, param_shapes
from jaxrl_sd.types import InputError, Params


class Policy(NamedTuple):
    """Weights of a model and perhaps of an adapter over it."""

    params: Params
    adapter: Params | None
    config: ModelConfig  # `lora` describes the adapter
    folder: Path  # of the model and its tokenizer

    def merged(self) -> Params:
        """The weights of one model that computes the same."""
        if self.adapter is None:
            return self.params
        return merge(self.params, self.adapter, self.config)


def of_model(folder: Path, adapter: Path | None, mesh: Mesh, dtype: Any) -> Policy:
    """A model, see `weights.load`, and the adapter in another folder, see `adapters.load`."""
    params, config = weights.load(folder, mesh, dtype)
    if adapter is None:
        return Policy(params, None, config, folder)
    config = replace(config, lora=adapters.load_config(adapter))
    weights_of_adapter = adapters.load(adapter, config)
    placed = sharding.of_state(weights_of_adapter, mesh)
    return Policy(params, hosts.put(weights_of_adapter, placed), config, folder)


def of_run(folder: Path, step: int | None, mesh: Mesh) -> Policy:
    """What a training run had at a checkpoint, in float32.

    Args:
      folder: the run's.
      step: of the checkpoint; None is the newest.

    Raises:
      InputError: there is no such checkpoint, it cannot be read, or the model under its adapter is
        another by now.
    """
    with checkpoint.reader(folder / "checkpoints") as checkpoints:
        steps = hosts.from_first(checkpoints.all_steps)
        step = max(steps, default=None) if step is None else step
        if step not in steps:
            raise InputError(f"--step: {folder} has checkpoints of the steps {steps}, got {step}")
        with checkpoint.named_errors(f"--step: checkpoint {step} in {folder}"):
            meta = checkpoint.read_meta(checkpoints, step)
            model, lora = Path(meta["config"]["model"]["path"]), configuration.lora(meta["config"])
            config = replace(weights.load_config(model), lora=lora)
            shapes = param_shapes(config) if lora is None else adapter_shapes(config)
            trained = checkpoint.read_params(checkpoints, step, _placed(shapes, mesh))
    if lora is None:
        return Policy(trained, None, config, model)
    params, _ = weights.load(model, mesh)
    if checkpoint.fingerprint(params) not in meta["frozen"]:
        raise InputError(
            f"{model}: the weights are not those that the run in {folder} started from"
        )
    return Policy(params, trained, config, model)


def _placed(shapes: dict, mesh: Mesh) -> Params:
    """float32 arrays to be, split as the run's."""
    arrays = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        arrays,
        sharding.of_state(arrays, mesh),
    )
