"""Packs a test's batch."""

import jax
import numpy as np

from jaxrl_sd import packing, scoring
from jaxrl_sd.packing import Size, Sizes
from jaxrl_sd.types import Batch
from jaxrl_sd.vocabulary import STUDENT


def in_parts(batch: Batch, tokens: int = 128, streams: int = 1, rows: int = 8, mini_batches=1):
    """Parts of a batch by mini-batch: streams of `tokens` and `rows` rows at most."""
    sizes = Sizes({name: Size(tokens, tokens) for name in (STUDENT, *batch.hints)}, tokens, rows)
    host = jax.device_get(batch)
    numbers = np.split(np.arange(len(host.rollouts.response)), mini_batches)
    return [packing.pack(host, sizes, streams, of_mini_batch) for of_mini_batch in numbers]


def in_one(batch: Batch, tokens: int = 128):
    """A batch as one part."""
    ((part,),) = in_parts(batch, tokens, rows=len(batch.rollouts.response))
    return part


def token_stats(requests, params, teachers, batch, part, configs, temperature, compute):
    """`scoring.token_stats` of a batch in one part, {name: f32[B, T]}."""
    out = scoring.token_stats(requests, params, teachers, part, configs, temperature, compute)
    B, T = batch.rollouts.response.shape
    rows = {name: scoring.by_row(x, part, T) for name, x in out.items()}
    order = part.rows.reshape(-1)
    return {name: jax.numpy.zeros((B, T)).at[order].set(x, mode="drop") for name, x in rows.items()}
