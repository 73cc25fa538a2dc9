"""RLSD on a chat model and two JSON-lines files of mathematics problems: a start for own settings.

    python -m experiments.train --config=experiments/configs/qwen3_jsonl.py \\
        --config.model.path=/models/Qwen3-0.6B --config.data.train=train.jsonl \\
        --config.data.test=test.jsonl --output_dir=runs/qwen3

Hardware, time and result: not measured here. The sizes are RLSD's (2604.03128, Sec. 5.1), which
were chosen for 8 billion parameters; reduce `rollout.prompts` and the lengths to what fits, and set
`mesh` to the devices there are.
"""

from experiments.configs import papers


def get_config():
    """RLSD's sizes on one device."""
    c = papers.base("runs/qwen3")
    c.steps = 200
    c.rollout.prompts, c.rollout.group_size = 256, 8
    c.rollout.max_prompt, c.rollout.max_hint_prompt, c.rollout.max_response = 1024, 2048, 4096
    c.compute.tokens = 5120
    c.compute.dtype, c.compute.remat = "bfloat16", "layer"
    return c
