"""Rotary positions, and how a model is stretched to contexts longer than it was pretrained on.

The fields of a scaling are those of config.json, and its arithmetic is that of transformers 5.23.
None of them depends on the length of a sequence, so a token's rotation is the same in every batch.
"""

import dataclasses
import math

import jax.numpy as jnp

from jaxrl_sd.types import Array, InputError


@dataclasses.dataclass(frozen=True)
class Scaling:
    """How frequencies theta^(-2i / H), i < H/2, are changed: here not at all (2104.09864)."""

    def scale(self, frequency: Array, theta: float) -> Array:
        return frequency

    def amplitude(self) -> float:
        """What multiplies queries and keys."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class Linear(Scaling):
    """All positions divided by a factor (2306.15595)."""

    factor: float

    def scale(self, frequency: Array, theta: float) -> Array:
        return frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3(Scaling):
    """Llama 3.1's: long wavelengths are divided, short ones kept, a ramp between them."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"high_freq_factor is {self.high_freq_factor}, expected more than "
                f"low_freq_factor {self.low_freq_factor}"
            )

    def scale(self, frequency: Array, theta: float) -> Array:
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return kept * frequency + (1 - kept) * frequency / self.factor


@dataclasses.dataclass(frozen=True)
class Yarn(Scaling):
    """YaRN (2309.00071): a ramp over the dimensions, and sharper attention."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None  # None: from the factor, or from both mscales
    beta_fast: float | None = None  # turns within the original context: 32, where the ramp begins
    beta_slow: float | None = None  # and 1, where it ends
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # whether the ramp begins and ends at whole dimensions

    def scale(self, frequency: Array, theta: float) -> Array:
        half = frequency.shape[-1]

        def dimension(turns: float) -> float:
            wavelength = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return half * math.log(wavelength) / math.log(theta)

        start, end = dimension(self.beta_fast or 32), dimension(self.beta_slow or 1)
        if self.truncate:
            start, end = math.floor(start), math.ceil(end)
        start, end = max(start, 0), min(end, 2 * half - 1)
        width = end - start or 0.001  # a step, not a division by 0
        divided = jnp.clip((jnp.arange(half, dtype=jnp.float32) - start) / width, 0.0, 1.0)
        return (1 - divided) * frequency + divided * frequency / self.factor

    def amplitude(self) -> float:
        """What multiplies queries and keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._amplitude(self.mscale) / self._amplitude(self.mscale_all_dim)
        return self._amplitude(1.0)

    def _amplitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


UNSCALED = Scaling()
SCALINGS = {"default": Scaling, "linear": Linear, "llama3": Llama3, "yarn": Yarn}


def rope(x: Array, positions: Array, theta: float, scaling: Scaling = UNSCALED) -> Array:
    """Rotates pairs (i, i + H/2) of x [..., heads, H] by positions [...], in float32."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    frequency = scaling.scale(frequency, theta)
    angle = jnp.multiply.outer(positions.astype(jnp.float32), frequency)[..., None, :]
    cos, sin = jnp.cos(angle) * scaling.amplitude(), jnp.sin(angle) * scaling.amplitude()
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
