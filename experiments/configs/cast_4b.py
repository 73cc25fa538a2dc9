"""CAST on Qwen3-4B with LoRA (2606.00172, Tables 8 and 10).

    python -m experiments.train --config=experiments/configs/cast_4b.py
    python -m experiments.evaluate --config=experiments/configs/cast_4b.py --benchmark=aime24 \\
        --decoding=cast --config.model.path=runs/cast_4b/model --output_dir=runs/cast_4b/aime24

Hardware: the paper has 2 A800 (80 GB), one of them for sampling; `mesh` is for 4 TPU chips that do
both.
Time: the paper's 5 h (GRPO 4 h).
Result: the paper's Avg@16 on AIME 2024, AIME 2025 and MATH-500 rises from 20.83, 21.25 and 83.91
to 41.25, 35.83 and 89.38. Not measured here.

Not in the paper, and no code is released, chosen here: AdamW's betas; the power of the polynomial
decay, 1; the prompt, which is that of its evaluation; the teacher's length, 16 more than the
student's for the marker line; the schedule of evaluation.
"""

from experiments.configs import papers


def get_config():
    """CAST, rank 64, 16 prompts x 8 answers of 3,072 tokens, 300 steps."""
    c = papers.base("runs/cast_4b")
    c.steps = 300
    c.method.name = "cast"
    c.model.path = "Qwen/Qwen3-4B"
    c.lora.rank, c.lora.alpha = 64, 128.0
    c.thinking.student = c.thinking.teacher = False
    c.data.train = papers.DAPO_MATH
    c.rollout.prompts, c.rollout.group_size = 16, 8
    c.rollout.max_prompt, c.rollout.max_hint_prompt, c.rollout.max_response = 1024, 1040, 3072
    c.rollout.temperature, c.rollout.top_p, c.rollout.top_k = 0.7, 0.95, 20
    c.rollout.presence_penalty = 0.2
    c.optimizer.learning_rate, c.optimizer.weight_decay = 1e-6, 0.0
    c.optimizer.warmup_steps = 15  # 5%
    c.optimizer.schedule, c.optimizer.final_scale = "linear", 0.1  # to 1e-7
    c.optimizer.clip_norm = 1.0
    papers.hold_out(c, "aime24", every=50, samples=16)
    papers.spread(c, devices=4, slots=8)
    return c
