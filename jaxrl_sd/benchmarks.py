"""The papers' benchmarks and decoding, as settings of a configuration."""

from typing import Any, NamedTuple


class Benchmark(NamedTuple):
    """Where the problems of a benchmark are: a data set of the Hugging Face hub.

    A file or folder of the same problems can be given instead, as `data.test`. None of these names
    was tried: they were written down without access to the hub.
    """

    source: str
    split: str
    subset: str = ""
    suffix: str | None = None  # that ends its prompts, whatever the decoding has


class Decoding(NamedTuple):
    """How a paper samples its answers. None: not stated; the configuration's value stands."""

    source: str  # where in the paper
    samples: int | None = None  # k
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0 is off
    max_response: int | None = None  # tokens
    thinking: bool | None = None
    suffix: str | None = None  # what ends every prompt
    presence_penalty: float | None = None


BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train"),
    "aime25": Benchmark("math-ai/aime25", "test"),
    "amc23": Benchmark("math-ai/amc23", "test"),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test"),
    "gsm8k": Benchmark("openai/gsm8k", "test", "main"),
    "humaneval_plus": Benchmark("evalplus/humanevalplus", "test", suffix=""),
    # A loading script, which `datasets` runs no more: download its files test*.jsonl, of which the
    # fifth and the sixth are what releases 5 and 6 added, and give one as data.test.
    "livecodebench": Benchmark("livecodebench/code_generation_lite", "test", "release_v6", ""),
}

BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."

DECODING = {
    # Its pass@1 is of the first sample; avg@16 stands for it here. Its seed is 42 and its limit of
    # prompts 8,192 tokens, which are settings of the run.
    "cast": Decoding("2606.00172, Table 10", 16, 0.7, 0.8, 20, 32_768, False, BOXED, 0.0),
    # Mathematics and LiveCodeBench. Rollouts have top-p 0.95 and 4,096 or, for code, 8,192 tokens;
    # whether evaluation has the same is not stated.
    "hsd": Decoding("2606.15576, evaluation", 16, 1.0),
    "hsd_humaneval": Decoding("2606.15576, evaluation", 1, 0.0),
    "opsd": Decoding("2601.18734, Table 8", 12, 1.0, 0.95, 0, 38_912, True),
    # Rollouts have 4,096 tokens, as the paper's evaluation has; its benchmarks show images.
    "rlsd": Decoding("2604.03128, Sec. 5.1", max_response=4_096),
    "sc_grpo": Decoding("2606.18810, App. B", 8, thinking=False),
    # The temperature is that of the released code. Rollouts have 4,096 (4B) or 2,048 tokens.
    "sdpg": Decoding("2606.04036, Sec. 5", 32, 1.0),
}


def settings(benchmark: str | None, decoding: str | None) -> dict[str, Any]:
    """Values by field of a configuration; empty where both are None. Unstated values are left out.

    Args:
      benchmark: a name of `BENCHMARKS`.
      decoding: a name of `DECODING`.
    """
    found = {}
    if benchmark is not None:
        b = BENCHMARKS[benchmark]
        found |= {
            "data.test": b.source,
            "data.test_split": b.split,
            "data.test_subset": b.subset,
            "data.num_test": 0,
        }
    if decoding is not None:
        d = DECODING[decoding]
        stated = {
            "evaluation.samples": d.samples,
            "rollout.temperature": d.temperature,
            "rollout.top_p": d.top_p,
            "rollout.top_k": d.top_k,
            "rollout.max_response": d.max_response,
            "thinking.student": d.thinking,
            "data.suffix": d.suffix,
            "rollout.presence_penalty": d.presence_penalty,
        }
        found |= {field: value for field, value in stated.items() if value is not None}
    if benchmark is not None and BENCHMARKS[benchmark].suffix is not None:
        found["data.suffix"] = BENCHMARKS[benchmark].suffix
    return found


def describe() -> str:
    """Both tables, for a person to read."""
    lines = ["Benchmarks (--benchmark) and where they come from:"]
    lines += [f"  {name:14} {b.source} {b.subset} [{b.split}]" for name, b in BENCHMARKS.items()]
    lines += ["Decoding (--decoding), - where the paper does not state it:"]
    header = ("", "k", "temperature", "top-p", "top-k", "max tokens", "thinking", "source")
    rows = [
        (name, *(d.samples, d.temperature, d.top_p, d.top_k, d.max_response, d.thinking), d.source)
        for name, d in DECODING.items()
    ]
    for row in [header, *rows]:
        name, *cells, source = ("-" if cell is None else str(cell) for cell in row)
        lines.append(f"  {name:14}" + "".join(f"{cell:>12}" for cell in cells) + f"  {source}")
    return "\n".join(lines) + "\n"
