"""HSD on Qwen3-32B (2606.15576, Table 1): as hsd_8b.py on another model.

    python -m experiments.train --config=experiments/configs/hsd_32b.py
    python -m experiments.evaluate --config=experiments/configs/hsd_32b.py --benchmark=math500 \\
        --decoding=hsd --config.model.path=runs/hsd_32b/model --output_dir=runs/hsd_32b/math500

Hardware: the paper has 32 H100 (80 GB); `mesh` is for as many TPU chips. See hsd_8b.py for what the
paper leaves open.
Time: not in the paper for this model.
Result: the paper's pass@1 on MATH-500, AIME 2024 and AIME 2025 is 89.4, 46.0 and 41.7, with GRPO
85.2, 38.7 and 34.5; on LiveCodeBench v5 and HumanEval+ 46.8 and 87.3, with GRPO 41.6 and 86.3.
Not measured here.

The paper's table says Qwen3-32B-Base, of which no release is known; here it is Qwen3-32B with
thinking off.
"""

from experiments.configs import hsd_8b, papers


def get_config():
    """HSD on the larger model."""
    c = hsd_8b.get_config()
    c.output_dir = "runs/hsd_32b"
    c.model.path = "Qwen/Qwen3-32B"
    papers.spread(c, devices=32, slots=32)
    c.compute.tokens = 12_800  # two and a half of the longest rows: less padding than with three
    return c
