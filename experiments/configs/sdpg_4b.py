"""SDPG on Qwen3-4B (2606.04036, Table 1): UFKL anchor, gate, triangular beta.

    python -m experiments.train --config=experiments/configs/sdpg_4b.py
    python -m experiments.evaluate --config=experiments/configs/sdpg_4b.py --benchmark=aime24 \\
        --decoding=sdpg --config.model.path=runs/sdpg_4b/model --output_dir=runs/sdpg_4b/aime24

Hardware: the paper has 8 H100; `mesh` is for 8 TPU chips.
Time: not in the paper.
Result: the paper's mean@32 at step 400 on AIME 2024, AIME 2025 and AMC 2023 is .380, .327 and .858,
with GRPO .280, .242 and .714. Not measured here.

The data are not published: 13,900 English problems of DAPO-Math-17k, each with a solution that
Gemini 2.5 Pro wrote. `dapo_math_solutions.jsonl` has to have `prompt`, `answer` and `solution`.

Not in the paper, from the released code: 8 updates a batch (Algorithm 1 draws one; the objective
for several is App. A.3's), the ratio's bounds, AdamW's betas, clip norm, thinking on, the interval
of evaluation.
The released script differs from the paper and is not followed: `sdpg_released` has its gate,
schedule and anchor. It has flags for dropping groups and for an overlong penalty that nothing
reads.
"""

from experiments.configs import papers


def get_config():
    """SDPG, 128 prompts x 8 answers of 4,096 tokens in 8 updates, 400 steps."""
    c = papers.base("runs/sdpg_4b")
    c.steps = 400
    c.method.name = "sdpg"
    c.model.path = "Qwen/Qwen3-4B"
    c.data.train = "dapo_math_solutions.jsonl"
    c.rollout.prompts, c.rollout.group_size = 128, 8
    c.rollout.max_prompt, c.rollout.max_hint_prompt, c.rollout.max_response = 2048, 2048, 4096
    c.rollout.temperature, c.rollout.top_p, c.rollout.top_k = 1.0, 1.0, 0
    c.optimizer.learning_rate, c.optimizer.weight_decay = 1e-6, 0.1
    c.optimizer.b1, c.optimizer.b2, c.optimizer.clip_norm = 0.9, 0.999, 1.0
    c.optimizer.warmup_steps, c.optimizer.mini_batches = 10, 8
    papers.hold_out(c, "aime24", every=10, samples=32)
    papers.spread(c, devices=8, slots=16)
    return c
