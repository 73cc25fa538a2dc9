"""Memory of the gradient of a divergence over the whole vocabulary; compiled, not run."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from experiments.benchmarks.records import Row
from experiments.benchmarks.scales import Head, Scale
from jaxrl_sd import stats, vocabulary
from jaxrl_sd.vocabulary import STUDENT

TITLE = "Memory of a full-vocabulary divergence's gradient"
REQUESTS = {"divergence": ("teacher", stats.forward_kl), "logp": (None, stats.log_prob)}


def measure(scale: Scale) -> list[Row]:
    """Temporaries against those that nothing can avoid, and how they grow with the tokens."""
    h = scale.head
    few, many = (temporaries(h, tokens) for tokens in h.tokens)
    unavoidable = 4 * h.vocab * h.hidden + 2 * 4 * min(h.chunk, h.tokens[1]) * h.vocab
    arrays = (many - few) / (4 * h.hidden * (h.tokens[1] - h.tokens[0]))
    size = f"V = {h.vocab}, D = {h.hidden}, bfloat16, chunks of {h.chunk} tokens"
    return [
        Row(
            f"temporaries at {h.tokens[1]} tokens over (float32 gradient of the head + two chunks)",
            many / unavoidable,
            "x",
            ("<=", 1.5),
            note=f"{size}; {many / 2**20:.0f} MiB",
        ),
        Row(
            f"growth from {h.tokens[0]} to {h.tokens[1]} tokens, in float32 arrays [N, D]",
            arrays,
            "arrays",
            ("<=", 3.0),
            note="hidden states of student and teacher and the gradient are such arrays",
        ),
    ]


def temporaries(h: Head, tokens: int) -> int:
    """Bytes that XLA allocates beside arguments and results."""

    def loss(hidden: Mapping, heads: Mapping, token):
        out = vocabulary.chunked(
            REQUESTS, hidden, heads, token, num_tokens=h.vocab, temperature=1.0, chunk=h.chunk
        )
        return sum(x.sum() for x in out.values())

    def of_student(student, teacher, token):
        hidden, heads = ({STUDENT: a, "teacher": b} for a, b in zip(student, teacher, strict=True))
        return loss(hidden, heads, token)

    shapes = (tokens, h.hidden), (h.vocab, h.hidden)
    model = tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    token = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    compiled = jax.jit(jax.grad(of_student)).lower(model, model, token).compile()
    return compiled.memory_analysis().temp_size_in_bytes
