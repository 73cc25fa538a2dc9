"""The arithmetic and the memory traffic that a model needs, whoever computes it.

Counted are multiplications and additions of matrix products. A prompt is needed once for its group;
what is computed again in a backward pass, padding, softmax, norms and the optimiser are not needed
and not counted. S prompt tokens, T response tokens.
"""

import math
from typing import NamedTuple

from jaxrl_sd.model import LINEAR, ModelConfig, param_shapes


class Shape(NamedTuple):
    """A batch of which all prompts and all responses are equally long."""

    prompts: int
    group_size: int
    prompt: int  # S
    response: int  # T

    @property
    def rows(self) -> int:
        return self.prompts * self.group_size

    @property
    def tokens(self) -> int:
        """Those that have to be read: nothing is predicted from a response's last one."""
        return self.prompts * self.prompt + self.rows * (self.response - 1)


def layer_params(config: ModelConfig) -> int:
    """Weights of the matrices of all layers."""
    return sum(math.prod(param_shapes(config)["layers"][name]) for name in LINEAR)


def head_params(config: ModelConfig) -> int:
    """Weights of the matrix to the logits."""
    return config.vocab_size * config.hidden_size


def forward_flops(config: ModelConfig, shape: Shape) -> float:
    """Of the logits of all response tokens."""
    S, T = shape.prompt, shape.response
    pairs = shape.prompts * S * (S + 1) / 2 + shape.rows * (T - 1) * (S + T / 2)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    head = 2 * head_params(config) * shape.rows * T
    return 2 * layer_params(config) * shape.tokens + head + attention


def update_flops(config: ModelConfig, shape: Shape) -> float:
    """Forward and backward: 6 a weight and token, and thrice the attention."""
    return 3 * forward_flops(config, shape)


def decode_flops(config: ModelConfig, shape: Shape, t: int) -> float:
    """Of response token number t of all rows."""
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * (shape.prompt + t)
    return shape.rows * (2 * (layer_params(config) + head_params(config)) + attention)


def decode_bytes(config: ModelConfig, shape: Shape, t: int, itemsize: int) -> float:
    """Read for response token number t: all weights, and the keys and values before it.

    A prompt's are read once for its group.
    """
    token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    cache = token * (shape.prompts * shape.prompt + shape.rows * t)
    return itemsize * (layer_params(config) + head_params(config) + cache)


def decode_seconds(
    config: ModelConfig, shape: Shape, itemsize: int, flops_rate: float, bandwidth: float
) -> float:
    """The least time for tokens 1 ... T - 1 of all rows: the roofline."""
    return sum(
        max(
            decode_bytes(config, shape, t, itemsize) / bandwidth,
            decode_flops(config, shape, t) / flops_rate,
        )
        for t in range(1, shape.response)
    )
