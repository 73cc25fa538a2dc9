"""What a shipped model does on its task before any reinforcement learning."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxrl_sd import tokens, weights
from jaxrl_sd.sampler import SamplingConfig, sample
from jaxrl_sd.types import Problem


class Shipped(NamedTuple):
    """A built-in task and its model."""

    asset: Path
    templates: dict[str, dict[str, str]]
    slots: Callable[[Problem], dict[str, str]]
    verify: Callable[[str, str, str], bool]
    max_prompt: int  # tokens, with the longest hint
    max_response: int  # tokens


def accuracy_by_problem(
    shipped: Shipped, problems: list[Problem], kind: str, group_size: int, temperature: float = 1.0
) -> np.ndarray:
    """Share of correct samples where the prompt has a hint of this kind, f64[problems]."""
    params, config = weights.load(shipped.asset)
    tokenizer = tokens.load_tokenizer(shipped.asset)
    template = tokens.Template(**shipped.templates[kind])
    prompts = [tokens.render(tokenizer, template, shipped.slots(problem)) for problem in problems]
    prompt, length = tokens.left_pad(prompts, shipped.max_prompt, tokenizer.pad_token_id)
    stop_ids = (tokenizer.eos_token_id,)
    samples = sample(
        params,
        jax.random.key(0),
        prompt,
        length,
        group_size=group_size,
        sampling=SamplingConfig(
            shipped.max_response, stop_ids, tokenizer.pad_token_id, temperature
        ),
        config=config,
    )
    samples = jax.device_get(samples)
    correct = np.zeros((len(problems), group_size))
    for p, g in np.ndindex(correct.shape):
        ids = samples.response[p, g, : samples.length[p, g]]
        text = tokens.response_text(tokenizer, ids, stop_ids)
        stopped = not samples.truncated[p, g]
        correct[p, g] = stopped and shipped.verify(problems[p].prompt, problems[p].answer, text)
    return correct.mean(axis=1)
