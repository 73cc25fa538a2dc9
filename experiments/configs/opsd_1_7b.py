"""OPSD on Qwen3-1.7B with LoRA (2601.18734v3, Tables 2, 6 and 8).

    python -m experiments.train --config=experiments/configs/opsd_1_7b.py
    python -m experiments.evaluate --config=experiments/configs/opsd_1_7b.py --benchmark=aime24 \\
        --decoding=opsd --config.model.path=runs/opsd_1_7b/model --output_dir=runs/opsd_1_7b/aime24

Hardware: the paper has 8 A100 or H100; 32 short answers a step do not fill more than 4 chips.
Time: not in the paper.
Result: the paper's Avg@12 on AIME 2024, AIME 2025 and HMMT 2025 rises from 51.5, 36.7 and 23.1 to
57.2, 43.9 and 29.2, each at the best checkpoint of 100 steps. Not measured here.

The paper measures with thinking on and 38,912 tokens, which --decoding=opsd sets; what training
reports on the way is without thinking, at 1,024.
Not in the paper, from the released code: top-p 0.95, top-k 20, clip norm 0.1; the cap of 0.05; the
data set, at most 30,000 problems of OpenThoughts with `problem`, `solution` and `Answer`.
Not in either, chosen here: AdamW as in torch without weight decay, a constant rate without warm-up,
the length of prompts, 1,024, and of the teacher's, 4,096 (longer solutions lose their end; the code
allows 20,000 in all).
The released code averages all tokens of a micro-batch; the paper's mean of each answer is followed.
"""

from experiments.configs import papers


def get_config():
    """OPSD, rank 64, 32 prompts x 1 answer of 1,024 tokens, 100 steps."""
    c = papers.base("runs/opsd_1_7b")
    c.steps = 100
    c.method.name = "opsd"
    c.model.path = "Qwen/Qwen3-1.7B"
    c.lora.rank, c.lora.alpha = 64, 128.0
    c.thinking.student, c.thinking.teacher = False, True
    c.data.train = "siyanzhao/Openthoughts_math_30k_opsd"
    c.rollout.prompts, c.rollout.group_size = 32, 1
    c.rollout.max_prompt, c.rollout.max_hint_prompt, c.rollout.max_response = 1024, 4096, 1024
    c.rollout.temperature, c.rollout.top_p, c.rollout.top_k = 1.1, 0.95, 20
    c.optimizer.learning_rate, c.optimizer.weight_decay = 5e-6, 0.0
    c.optimizer.clip_norm = 0.1
    papers.hold_out(c, "aime24", every=25, samples=12)
    papers.spread(c, devices=4)
    return c
