"""What the settings of this folder share. No setting itself.

Models and data have the names that they have on the Hugging Face hub, and are looked for in folders
of these names:

    hf download Qwen/Qwen3-4B --local-dir Qwen/Qwen3-4B
    hf download open-r1/DAPO-Math-17k-Processed --repo-type dataset \\
        --local-dir DAPO-Math-17k-Processed

They may lie elsewhere: --config.model.path=<folder>, --config.data.train=<file>. None of them was
opened here. The names and columns of the data are those of their cards; a problem that is longer
than `rollout.max_prompt` is an error here, where other trainers drop it.

A file says which values its paper leaves open. Prompts have the papers' structure in the words of
`contexts.TEMPLATES` and `benchmarks.BOXED`.
"""

from ml_collections import ConfigDict

from jaxrl_sd import benchmarks, config
from jaxrl_sd.contexts import TEMPLATES
from jaxrl_sd.tokens import TEXTS

# DAPO-Math-17k without its copies, 17,398 problems.
DAPO_MATH = "DAPO-Math-17k-Processed/all/train-00000-of-00001.parquet"


def base(output_dir: str) -> ConfigDict:
    """Mathematics with a chat model, and what most papers leave open.

    That is AdamW as in torch, a constant rate without warm-up, one update a batch, and all of the
    sampler's distribution.
    """
    c = config.default()
    c.output_dir = output_dir
    c.data.num_train = c.data.num_test = 0
    c.data.suffix = benchmarks.BOXED
    c.templates = ConfigDict(
        {name: {field: getattr(t, field) for field in TEXTS} for name, t in TEMPLATES.items()}
    )
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-6, 0
    c.optimizer.b2, c.optimizer.weight_decay = 0.999, 0.01
    c.verifier.workers = 16
    return c


def hold_out(c: ConfigDict, benchmark: str, every: int, samples: int) -> None:
    """Measures on a benchmark every so many steps, with so many samples, as rollouts are drawn."""
    c.update_from_flattened_dict(benchmarks.settings(benchmark, None))
    c.evaluation.every, c.evaluation.samples = every, samples


def spread(c: ConfigDict, devices: int, tensor: int = 1, slots: int = 0, rows: int = 3) -> None:
    """Weights over all devices; on each, a stream with room for so many of the longest rows.

    With as many as the files here have, at most 10% is padding (`experiments.benchmark
    --only=padding`). README.md says of which TPUs it was seen that it compiles and fits;
    experiments/compile_for_tpu.py says it of any.
    """
    c.mesh.fsdp, c.mesh.tensor = devices // tensor, tensor
    c.rollout.slots = slots
    c.compute.tokens = rows * (c.rollout.max_prompt + c.rollout.max_response)
    c.compute.chunk = 512
    c.compute.dtype, c.compute.remat = "bfloat16", "layer"
