"""RLSD on a chat model and two JSON-lines files of mathematics problems: a start for own settings.

    python -m experiments.train --config=experiments/configs/qwen3_jsonl.py \\
        --config.model.path=/models/Qwen3-0.6B --config.data.train=train.jsonl \\
        --config.data.test=test.jsonl --output_dir=runs/qwen3

Hardware, time and result: not measured here. Answers are as long as RLSD's (2604.03128, Sec.
5.1), the batch is an eighth of its. Keys and values of Qwen3-0.6B take 115 KB a token, and those of
the 4 x 8 answers that are decoded at a time up to 15 GB. Set `rollout.slots`, `compute.tokens` and
the lengths to what fits, and `mesh` to the devices there are.
A method whose teacher reads an answer (hsd, sdpo, sc_grpo) cuts what exceeds
`rollout.max_hint_prompt`: whole ones need a prompt and an answer, 5,376.
"""

from experiments.configs import papers


def get_config():
    """RLSD, 32 prompts x 8 answers of 4,096 tokens, on one device."""
    c = papers.base("runs/qwen3")
    c.steps = 200
    c.rollout.prompts, c.rollout.group_size, c.rollout.slots = 32, 8, 4
    c.rollout.max_prompt, c.rollout.max_hint_prompt, c.rollout.max_response = 1024, 2048, 4096
    c.compute.tokens = 5120
    c.compute.dtype, c.compute.remat = "bfloat16", "layer"
    return c
