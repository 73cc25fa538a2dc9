"""SC-GRPO on Qwen3-8B, mathematics (2606.18810, App. B).

    python -m experiments.train --config=experiments/configs/sc_grpo_8b.py
    python -m experiments.evaluate --config=experiments/configs/sc_grpo_8b.py --benchmark=aime24 \\
        --decoding=sc_grpo --config.model.path=runs/sc_grpo_8b/model \\
        --output_dir=runs/sc_grpo_8b/aime24

Hardware: the paper has 8 x 8 A100 (80 GB); `mesh` is for 16 TPU chips, four a stream.
Time: the paper's figure shows about 236 s a step (GRPO 231 s).
Result: the paper's Avg@8 on AIME 2024 and AIME 2025 rises from 25.41 and 18.75 to 51.67 and 42.08,
with GRPO 41.67 and 34.16. Not measured here.

The paper trains on 4,000 random problems of DAPO-Math-17k and does not publish which; here they are
the first 4,000 of the file.
Not in the paper, and no code is released, chosen here: all weights are trained; AdamW as in torch,
clip norm 1, no warm-up, constant rate, one update a batch; temperature 1, top-p 1; the ratio's
bound 0.2, no KL to a reference; the length of prompts, 1,024, and of the teacher's, which has room
for a whole sibling.
The paper's other tasks (LiveCodeBench, AppWorld, WebShop) have other data, lengths and steps.
"""

from experiments.configs import papers


def get_config():
    """SC-GRPO, 8 prompts x 8 answers of 8,192 tokens, 500 steps."""
    c = papers.base("runs/sc_grpo_8b")
    c.steps = 500
    c.method.name = "sc_grpo"
    c.model.path = "Qwen/Qwen3-8B"
    c.thinking.student = c.thinking.teacher = False
    c.data.train = papers.DAPO_MATH
    c.data.num_train = 4000
    c.rollout.prompts, c.rollout.group_size = 8, 8
    c.rollout.max_prompt, c.rollout.max_hint_prompt, c.rollout.max_response = 1024, 9728, 8192
    c.optimizer.learning_rate = 1e-6
    papers.hold_out(c, "aime24", every=20, samples=8)
    papers.spread(c, devices=16, tensor=4, rows=4)
    return c
