"""Problems -> samples -> verdicts -> grades."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxrl_sd import tokens
from jaxrl_sd.methods.base import Grades
from jaxrl_sd.model import ModelConfig
from jaxrl_sd.sampler import Samples, SamplingConfig, sample
from jaxrl_sd.tokens import Template
from jaxrl_sd.types import Array, Params, Problem, Rollouts, Sample
from jaxrl_sd.verify.pool import VerifierPool


def encode(
    problems: Sequence[Problem], tokenizer, template: Template, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The student's prompts i32[P, width], left-padded, and their lengths i32[P].

    Raises:
      InputError: a prompt is longer than `width`.
    """
    prompts = [tokens.render_within(tokenizer, template, p.prompt, {}, width)[0] for p in problems]
    return tokens.left_pad(prompts, width, tokenizer.pad_token_id)


def draw(
    params: Params,
    key: Array,
    prompt: np.ndarray,
    prompt_length: np.ndarray,
    group_size: int,
    sampling: SamplingConfig,
    config: ModelConfig,
) -> Samples:
    """`sampler.sample`, brought to the host."""
    samples = sample(
        params,
        key,
        prompt,
        prompt_length,
        group_size=group_size,
        sampling=sampling,
        config=config,
    )
    return jax.device_get(samples)


def verify(
    problems: Sequence[Problem], samples: Samples, tokenizer, sampling: SamplingConfig, pool
) -> tuple[list[list[Sample]], dict[str, float]]:
    """Texts and verdicts of every sample, by group, and counts of verifier failures."""
    pool: VerifierPool
    rows = [
        (problem, tuple(ids[:length].tolist()), bool(truncated))
        for problem, *group in zip(
            problems, samples.response, samples.length, samples.truncated, strict=True
        )
        for ids, length, truncated in zip(*group, strict=True)
    ]
    texts = [tokens.response_text(tokenizer, ids, sampling.stop_ids) for _, ids, _ in rows]
    verdicts = pool.grade(
        [(p.verifier, p.prompt, p.answer, text) for (p, *_), text in zip(rows, texts, strict=True)]
    )
    out = [
        Sample(ids, text, verdict.correct, truncated)
        for (_, ids, truncated), text, verdict in zip(rows, texts, verdicts, strict=True)
    ]
    group_size = samples.response.shape[1]
    groups = [out[i : i + group_size] for i in range(0, len(out), group_size)]
    metrics = {
        f"verifier/{status}": sum(v.status == status for v in verdicts)
        for status in ("timeout", "error")
    }
    return groups, metrics


def grade(
    prompt: np.ndarray,
    prompt_length: np.ndarray,
    samples: Samples,
    groups: Sequence[Sequence[Sample]],
    rule: Callable[[np.ndarray, np.ndarray], Grades],
) -> Rollouts:
    """The rows of a batch: rewards by the method's rule, masks from lengths (never from ids)."""
    P, G, T = samples.response.shape
    rows = [sample for group in groups for sample in group]
    graded = np.array([s.correct is not None for s in rows])
    correct = np.array([s.correct is True for s in rows])
    grades = rule(correct, samples.truncated.reshape(-1))
    trained = graded & grades.trained
    mask_t = (np.arange(T) < samples.length.reshape(-1, 1)) & trained[:, None]
    return Rollouts(
        prompt=np.repeat(prompt, G, axis=0),
        prompt_length=np.repeat(prompt_length, G),
        response=samples.response.reshape(P * G, T),
        mask_t=mask_t.astype(np.float32),
        sampler_logp_t=samples.logp_t.reshape(P * G, T),
        behaviour_logp_t=samples.behaviour_logp_t.reshape(P * G, T),
        reward=grades.reward,
        correct=correct.astype(np.float32),
        graded=graded.astype(np.float32),
        group_size=G,
    )


def measure(
    params: Params,
    key: Array,
    problems: Sequence[Problem],
    tokenizer,
    template: Template,
    pool: VerifierPool,
    *,
    max_prompt: int,
    batch: int,
    samples: int,
    sampling: SamplingConfig,
    config: ModelConfig,
) -> tuple[np.ndarray, dict[str, float]]:
    """Verdicts of `samples` answers to each problem, for evaluation.

    Args:
      batch: prompts sampled at a time; the last batch is filled up with its last problem.

    Returns:
      f64[N, samples], 1 correct, 0 wrong, NaN where the verifier could not decide; and metrics.
    """
    verdicts, length, truncated = [], [], []
    for i in range(0, len(problems), batch):
        part = list(problems[i : i + batch])
        padded = part + part[-1:] * (batch - len(part))
        prompt, prompt_length = encode(padded, tokenizer, template, max_prompt)
        drawn = draw(
            params, jax.random.fold_in(key, i), prompt, prompt_length, samples, sampling, config
        )
        drawn = jax.tree.map(lambda x: x[: len(part)], drawn)  # noqa: B023, used at once
        groups, _ = verify(part, drawn, tokenizer, sampling, pool)
        verdicts += [[np.nan if s.correct is None else s.correct for s in g] for g in groups]
        length.append(drawn.length)
        truncated.append(drawn.truncated)
    metrics = {
        "length": float(np.concatenate(length).mean()),
        "truncated": float(np.concatenate(truncated).mean()),
    }
    return np.array(verdicts, np.float64), metrics
