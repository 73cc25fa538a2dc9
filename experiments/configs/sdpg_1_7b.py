"""SDPG on Qwen3-1.7B (2606.04036, Table 2): as sdpg_4b.py, with answers of 2,048 tokens.

    python -m experiments.train --config=experiments/configs/sdpg_1_7b.py
    python -m experiments.evaluate --config=experiments/configs/sdpg_1_7b.py --benchmark=aime24 \\
        --decoding=sdpg --config.model.path=runs/sdpg_1_7b/model --output_dir=runs/sdpg_1_7b/aime24

Hardware: the paper has 8 H100; `mesh` is for 8 TPU chips.
Time: not in the paper.
Result: the paper's mean@32 at step 400 on AIME 2024, AIME 2025 and AMC 2023 is .192, .182 and .637,
with GRPO .096, .118 and .467. Not measured here.

The released script has 256 prompts a step; the paper's "same protocol" has 128 and is followed. The
length of the answers is the script's and Fig. 6's. All else as in sdpg_4b.py.
"""

from experiments.configs import papers, sdpg_4b


def get_config():
    """SDPG on the smaller model."""
    c = sdpg_4b.get_config()
    c.output_dir = "runs/sdpg_1_7b"
    c.model.path = "Qwen/Qwen3-1.7B"
    c.rollout.max_response = 2048
    papers.spread(c, devices=8, slots=32)
    return c
