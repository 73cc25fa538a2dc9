"""RLSD on a Qwen3 checkpoint and a JSON-lines file of mathematics problems.

    python -m experiments.train --config=experiments/configs/qwen3_jsonl.py \\
        --config.model.path=/models/Qwen3-0.6B --config.data.train=train.jsonl \\
        --config.data.test=test.jsonl --output_dir=runs/qwen3

Hardware, time and result: not measured. The sizes are RLSD's (2604.03128, Sec. 5.1), which were
chosen for 8 billion parameters; reduce `rollout.prompts` and the lengths to what fits, and set
`mesh` to the devices there are.
"""

from ml_collections import ConfigDict

from jaxrl_sd import config, contexts


def get_config():
    """The built-in job's settings with another model, other data and RLSD's sizes."""
    c = config.default()
    c.steps = 200
    c.output_dir = "runs/qwen3"
    c.data.num_train = c.data.num_test = 0
    c.data.suffix = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    c.templates = ConfigDict({name: t._asdict() for name, t in contexts.TEMPLATES.items()})
    c.rollout.prompts, c.rollout.group_size = 256, 8
    c.rollout.max_prompt, c.rollout.max_hint_prompt, c.rollout.max_response = 1024, 2048, 4096
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-6, 0
    c.optimizer.b2, c.optimizer.weight_decay = 0.999, 0.01
    c.compute.micro_batches, c.compute.chunk = 256, 2048
    c.evaluation.every, c.checkpoint.every = 20, 20
    return c
