"""Writes a model, or what a training run has, in another form, type or shard size.

    python -m experiments.convert --input=/models/Qwen3-8B --output=/models/qwen3-8b --format=orbax
    python -m experiments.convert --input=/models/qwen3-8b --output=/models/again --dtype=bfloat16
    python -m experiments.convert --input=/models/Qwen3-8B --adapter=lora --output=/models/merged
    python -m experiments.convert --input=runs/cast_8b --step=280 --output=lora --format=peft

Forms: `huggingface` (sharded safetensors, opened by transformers), `orbax` (our own, of which each
host of a pod reads its own part) and `peft` (the adapter alone). The input is a model in one of the
first two, with an adapter of the third or without, or a run's folder, with the checkpoints that it
kept. An adapter is merged into the first two. The tokenizer is copied along.
"""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from experiments import program
from jaxrl_sd import adapters, hosts, policies, sharding, weights
from jaxrl_sd.policies import Policy
from jaxrl_sd.types import InputError

flags.adopt_module_key_flags(program)
INPUT = flags.DEFINE_string("input", None, "Folder of a model or of a run.", required=True)
ADAPTER = flags.DEFINE_string("adapter", None, "Folder of an adapter to the model.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint of the run, the newest by default.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to write, new or empty.", required=True)
FORMAT = flags.DEFINE_enum(
    "format", "huggingface", ["huggingface", "orbax", "peft"], "Form to write."
)
DTYPE = flags.DEFINE_enum(
    "dtype", "stored", ["stored", "float32", "bfloat16"], "Type of the parameters written."
)
MAX_SHARD_GB = flags.DEFINE_float(
    "max_shard_gb", 2.0, "Size of a file of --format=huggingface, in 10^9 bytes.", lower_bound=0.0
)

# What else belongs to a model, beside config.json and the weights.
COMPANIONS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "generation_config.json"),
)


def read(source: Path, adapter: Path | None, step: int | None, dtype: str) -> Policy:
    """The policy in a folder, split over all devices.

    Raises:
      InputError: it cannot be read, or the flags are not for such an input.
    """
    mesh = sharding.make_mesh(data=1, fsdp=jax.device_count(), tensor=1)
    if (source / "checkpoints").is_dir():
        if adapter is not None:
            raise InputError(f"--adapter: {source} is a run, expected a model")
        return policies.of_run(source, step, mesh)
    if step is not None:
        raise InputError(f"--step: {source} is a model, expected a run")
    return policies.of_model(source, adapter, mesh, None if dtype == "stored" else dtype)


def write(target: Path, policy: Policy, form: str, dtype: str, max_shard_bytes: int) -> None:
    """Writes a policy and its tokenizer.

    Raises:
      InputError: there is no adapter to write.
    """
    if form == "peft" and policy.adapter is None:
        raise InputError("--format=peft: the input has no adapter")
    params = policy.adapter if form == "peft" else policy.merged()
    if dtype != "stored":
        params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params)
    if form == "peft":
        adapters.save(target, params, policy.config, base=str(policy.folder))
        return
    if form == "orbax":
        weights.save_native(target, params, policy.config, eos_token_id=None)
    else:
        limit = {"max_shard_bytes": max_shard_bytes}
        weights.save(target, params, policy.config, eos_token_id=None, **limit)
    for file in sorted({f for pattern in COMPANIONS for f in policy.folder.glob(pattern)}):
        if file.is_file() and hosts.is_first():
            shutil.copyfile(file, target / file.name)


def make_empty(target: Path) -> None:
    """Makes the folder to write, before anything is read.

    Raises:
      InputError: it cannot be made, or is not empty.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output: {target} cannot be made: {error.strerror}") from error
    if any(target.iterdir()):
        raise InputError(f"--output: {target} is not empty")


def main(arguments):
    if arguments:
        raise InputError(f"{arguments[0]}: unknown (see --help)")
    source, target, adapter = Path(INPUT.value), Path(OUTPUT.value), ADAPTER.value
    hosts.from_first(lambda: make_empty(target))
    policy = read(source, adapter and Path(adapter), STEP.value, DTYPE.value)
    limit = int(MAX_SHARD_GB.value * 10**9)
    write(target, policy, FORMAT.value, DTYPE.value, limit)
    print(f"{source} -> {target}")


if __name__ == "__main__":
    program.run(main)
