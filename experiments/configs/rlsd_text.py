"""RLSD on text: the setting of 2604.03128, Sec. 5.1, with a text model and text problems.

    python -m experiments.filter_data --config=experiments/configs/rlsd_text.py \\
        --samples=4 --min_pass=0 --max_pass=0 --output=rlsd_hard.jsonl \\
        --config.model.path=Qwen/Qwen3-4B --config.thinking.student=True \\
        --config.rollout.max_response=32768 --config.rollout.prompts=32 \\
        --config.data.train=DAPO-Math-17k-Processed/all/train-00000-of-00001.parquet
    python -m experiments.train --config=experiments/configs/rlsd_text.py
    python -m experiments.evaluate --config=experiments/configs/rlsd_text.py --benchmark=aime24 \\
        --decoding=rlsd --config.model.path=runs/rlsd_text/model --output_dir=runs/rlsd_text/aime24

Hardware: the paper has 4 x 8 H200 (140 GB); `mesh` is for 32 TPU chips.
Time: not in the paper.
Result: the paper's are on images only, with Qwen3-VL-8B-Instruct: 56.18 in the mean of MMMU,
MathVista, MathVision, ZeroBench and WeMath, from 51.49 before and 53.86 with GRPO. On text others
report 57.2 with RLSD and 60.3 with GRPO (2605.18529: Qwen3-8B, DAPO-Math-17k, 16,384 tokens, mean
of four sets), and AIME 2024 .378 and .280 (2606.04036: Qwen3-4B, its own setting).
Not measured here.

In place of the paper's images, chosen here:
  - Qwen3-8B with thinking off for Qwen3-VL-8B-Instruct.
  - DAPO-Math-17k for MMFineReason-1.8M. The filter is the paper's (what a 4B thinking model fails 4
    times of 4), the filter's length is not stated there. How many problems are left was not
    measured; the paper has 123,000, and 200 steps draw 51,200.
Not in the paper, from the released code: AdamW's betas, weight decay, clip norm, one update a
batch, top-p 1.
Not in either, chosen here: the teacher's length, 256 more than the student's; the schedule of
evaluation. The prompt's 4,096 tokens are the paper's, whose prompts hold images.
The released script differs from the paper and is not followed: `rlsd_released` has its schedules.
"""

from experiments.configs import papers


def get_config():
    """RLSD, 256 prompts x 8 answers of 4,096 tokens, 200 steps."""
    c = papers.base("runs/rlsd_text")
    c.steps = 200
    c.method.name = "rlsd"
    c.model.path = "Qwen/Qwen3-8B"
    c.thinking.student = c.thinking.teacher = False
    c.data.train = "rlsd_hard.jsonl"
    c.rollout.prompts, c.rollout.group_size = 256, 8
    c.rollout.max_prompt, c.rollout.max_hint_prompt, c.rollout.max_response = 4096, 4352, 4096
    c.rollout.temperature, c.rollout.top_p = 1.0, 1.0
    c.optimizer.learning_rate, c.optimizer.weight_decay = 1e-6, 0.01
    c.optimizer.b1, c.optimizer.b2, c.optimizer.clip_norm = 0.9, 0.999, 1.0
    papers.hold_out(c, "aime24", every=20, samples=8)
    papers.spread(c, devices=32, slots=64)
    return c
