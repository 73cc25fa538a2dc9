"""HSD on Qwen3-8B-Base, mathematics and programs (2606.15576, Table 1).

    python -m experiments.train --config=experiments/configs/hsd_8b.py
    python -m experiments.evaluate --config=experiments/configs/hsd_8b.py --benchmark=math500 \\
        --decoding=hsd --config.model.path=runs/hsd_8b/model --output_dir=runs/hsd_8b/math500

Hardware: the paper has 32 H100 (80 GB); `mesh` is for 32 TPU chips.
Time: the paper's 24.1 s a step on 8 H100 (GRPO 11.2 s), which makes 10 h of 1,500 steps.
Result: the paper's pass@1 on MATH-500, AIME 2024 and AIME 2025 is 83.6, 31.4 and 28.1, with GRPO
78.4, 24.5 and 21.6; on LiveCodeBench v5 and HumanEval+ 37.2 and 81.9, with GRPO 32.0 and 80.5.
Not measured here.

The data are not published: 94,231 problems of MATH, GSM8K and NuminaMath and 19,084 of APPS and
LiveCodeBench before 2025, drawn 4 to 1. `hsd_mixture.jsonl` has to have `prompt`, `answer` and
`verifier` (math, or code with the tests as answer), with one row in five a program's.

The paper calls the model Qwen3-8B in the text and -Base in its table, and tuned models out of its
scope. Its tokenizer may not end an answer where a chat turn ends: see `eos_token_id` in its
generation_config.json.
Left out: programs of up to 8,192 tokens, and a wording of their own. `max_response` and
`data.suffix` are one for all problems, and mathematics': 4,096, and a boxed answer.
Not in the paper, and no code is released, chosen here: thinking off; one update a batch; clip norm
1; the length of prompts, 1,024, and of the teacher's, which has room for a whole sibling; a teacher
is shown a program's tests as its answer; the schedule of evaluation.
"""

from experiments.configs import papers


def get_config():
    """HSD, 128 prompts x 8 answers of 4,096 tokens, 1,500 steps."""
    c = papers.base("runs/hsd_8b")
    c.steps = 1500
    c.method.name = "hsd"
    c.model.path = "Qwen/Qwen3-8B-Base"
    c.thinking.student = c.thinking.teacher = False
    c.data.train = "hsd_mixture.jsonl"
    c.rollout.prompts, c.rollout.group_size = 128, 8
    c.rollout.max_prompt, c.rollout.max_hint_prompt, c.rollout.max_response = 1024, 5376, 4096
    c.rollout.temperature, c.rollout.top_p = 1.0, 0.95
    c.optimizer.learning_rate, c.optimizer.weight_decay = 1e-6, 0.0
    c.optimizer.b1, c.optimizer.b2, c.optimizer.eps = 0.9, 0.95, 1e-8
    papers.hold_out(c, "aime24", every=100, samples=16)
    papers.spread(c, devices=32, slots=64, rows=4)
    return c
