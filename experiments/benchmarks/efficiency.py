"""The update and decoding against the ceilings of the machine."""

import jax.numpy as jnp

from experiments.benchmarks import ceilings, work
from experiments.benchmarks.jobs import GRPO, Job, products, sampling
from experiments.benchmarks.records import Row
from experiments.benchmarks.scales import Scale
from experiments.benchmarks.timing import in_turns, ratio

TITLE = "Distance to the ceilings"
AIMS = {"float32": (0.6, 0.5), "bfloat16": (0.45, 0.6)}  # of update and decoding


def measure(scale: Scale) -> list[Row]:
    """Shares of the ceilings; work is counted as in work.py, rematerialisation is not."""
    rows = [of_update(scale)]
    for shape in scale.decode:
        rows += of_decoding(scale, shape)
    return rows


def of_update(scale: Scale) -> Row:
    """GRPO's update, in turns with the matrix product that it is compared with."""
    dtype, shape = scale.compute.dtype, scale.update
    product, product_flops = ceilings.matmul(ceilings.find(scale).sizes[dtype], dtype)
    job = Job(GRPO, scale.model, shape, scale.compute)
    seconds = in_turns({"product": product, "update": job.update}, scale.repetitions)
    needed = work.update_flops(scale.model, shape)
    rate = needed / seconds["update"].best
    return ratio(
        f"update: FLOP/s over those of a {dtype} matrix product",
        seconds["product"],
        seconds["update"],
        scale=needed / product_flops,
        unit="%",
        target=(">=", AIMS[dtype][0]),
        note=f"{rate / 1e9:.0f} GFLOP/s; {describe(scale, shape)}; {job.num_parts} parts",
    )


def of_decoding(scale: Scale, shape: work.Shape) -> list[Row]:
    """The roofline of all tokens but the first, over the time that they take.

    That is the difference between sampling T tokens and sampling one.
    """
    dtype, found = scale.compute.dtype, ceilings.find(scale)
    functions = {
        "all": sampling(scale.model, shape, scale.compute),
        "first": sampling(scale.model, shape._replace(response=1), scale.compute),
        "products": products(scale.model, shape.rows, shape.response - 1, scale.compute),
    }
    seconds = in_turns(functions, scale.repetitions)
    pairs = zip(seconds["all"].values, seconds["first"].values, strict=True)
    taken = [a - b for a, b in pairs]
    best = seconds["all"].best - seconds["first"].best
    item = jnp.dtype(dtype).itemsize
    least = work.decode_seconds(scale.model, shape, item, found.flops[dtype], found.bandwidth)
    read = sum(work.decode_bytes(scale.model, shape, t, item) for t in range(1, shape.response))
    return [
        Row(
            f"decoding {shape.rows} rows: roofline over time",
            least / best,
            "%",
            (">=", AIMS[dtype][1]),
            *(least / max(taken), least / min(taken)),
            f"{best / (shape.response - 1) * 1e3:.1f} ms a token; {describe(scale, shape)}",
        ),
        Row(
            f"decoding {shape.rows} rows: bytes needed over time, of the bandwidth",
            read / best / found.bandwidth,
            "%",
        ),
        Row(
            f"decoding {shape.rows} rows: time of its products with weights alone, over it",
            seconds["products"].best / best,
            "%",
        ),
    ]


def describe(scale: Scale, shape: work.Shape) -> str:
    params = work.layer_params(scale.model) + work.head_params(scale.model)
    return (
        f"{params / 1e6:.0f} M weights, {shape.prompts} x {shape.group_size}, "
        f"{shape.prompt} + {shape.response} tokens"
    )
