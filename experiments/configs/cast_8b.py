"""CAST on Qwen3-8B with LoRA (2606.00172, Tables 8 and 10): as cast_4b.py on another model.

    python -m experiments.train --config=experiments/configs/cast_8b.py
    python -m experiments.evaluate --config=experiments/configs/cast_8b.py --benchmark=aime24 \\
        --decoding=cast --config.model.path=runs/cast_8b/model --output_dir=runs/cast_8b/aime24

Hardware: the paper has 2 A800 (80 GB); see cast_4b.py for this and for what the paper leaves open.
Time: not in the paper for this model.
Result: the paper's Avg@16 on AIME 2024, AIME 2025 and MATH-500 rises from 24.79, 19.79 and 83.94
to 42.29, 32.29 and 88.74. Not measured here.
"""

from experiments.configs import cast_4b


def get_config():
    """CAST on this model."""
    c = cast_4b.get_config()
    c.output_dir = "runs/cast_8b"
    c.model.path = "Qwen/Qwen3-8B"
    return c
