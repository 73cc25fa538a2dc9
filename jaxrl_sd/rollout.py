"""Problems -> samples -> verdicts -> grades."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jaxrl_sd import hosts, tokens
from jaxrl_sd.methods.base import Grades, Verdicts
from jaxrl_sd.sampler import Samples
from jaxrl_sd.tokens import Template
from jaxrl_sd.types import Array, Problem, Rollouts, Sample
from jaxrl_sd.verify.pool import VerifierPool
from jaxrl_sd.verify.reward import RewardFunctions

Judge = VerifierPool | RewardFunctions


def encode(
    problems: Sequence[Problem], tokenizer, template: Template, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The student's prompts i32[P, width], left-padded, and their lengths i32[P].

    Raises:
      InputError: a prompt is longer than `width`.
    """
    prompts = [tokens.render_within(tokenizer, template, p, {}, width)[0] for p in problems]
    return tokens.left_pad(prompts, width, tokenizer.pad_token_id)


def verify(
    problems: Sequence[Problem],
    samples: Samples,
    tokenizer,
    stop_ids: Sequence[int],
    judge: Judge,
) -> list[list[Sample]]:
    """Texts and verdicts of every sample, by group; each process has its own groups judged.

    Args:
      problems: P problems.
      samples: P x G, on the host.

    Raises:
      InputError: a verifier's name is unknown, or a reward function fails.
    """
    group_size = samples.response.shape[1]
    asked = [problem for problem in problems for _ in range(group_size)]
    ids = [
        tuple(row[:length].tolist())
        for row, length in zip(
            samples.response.reshape(len(asked), -1), samples.length.ravel(), strict=True
        )
    ]
    texts = [tokens.response_text(tokenizer, row, stop_ids) for row in ids]
    answers = list(zip(asked, texts, ids, strict=True))
    verdicts = hosts.divide(
        lambda part: judge.judge(*zip(*part, strict=True)), answers, multiple=group_size
    )
    out = [
        Sample(row, text, truncated=bool(truncated), **verdict._asdict())
        for row, text, verdict, truncated in zip(
            ids, texts, verdicts, samples.truncated.ravel(), strict=True
        )
    ]
    return [out[i : i + group_size] for i in range(0, len(out), group_size)]


def grade(
    prompt: np.ndarray,
    prompt_length: np.ndarray,
    samples: Samples,
    groups: Sequence[Sequence[Sample]],
    rule: Callable[[Verdicts], Grades],
) -> tuple[Rollouts, np.ndarray]:
    """The rows of a batch, and which of its groups to keep, bool[P].

    Rewards come from the method's rule, masks from lengths (never from ids).
    """
    P, G, T = samples.response.shape
    rows = [sample for group in groups for sample in group]
    verdicts = Verdicts(
        correct=np.array([s.correct is True for s in rows]),
        graded=np.array([s.correct is not None for s in rows]),
        score=np.array([0.0 if s.correct is None else s.score for s in rows], np.float64),
        length=samples.length.reshape(-1),
        truncated=samples.truncated.reshape(-1),
        group_size=G,
        max_length=T,
    )
    grades = rule(verdicts)
    trained = verdicts.graded & grades.trained
    mask_t = (np.arange(T) < verdicts.length[:, None]) & trained[:, None]
    rollouts = Rollouts(
        prompt=np.repeat(prompt, G, axis=0),
        prompt_length=np.repeat(prompt_length, G),
        response=samples.response.reshape(P * G, T),
        mask_t=mask_t.astype(np.float32),
        sampler_logp_t=samples.logp_t.reshape(P * G, T),
        behaviour_logp_t=samples.behaviour_logp_t.reshape(P * G, T),
        reward=grades.reward.astype(np.float32),
        correct=verdicts.correct.astype(np.float32),
        graded=verdicts.graded.astype(np.float32),
        group_size=G,
    )
    return rollouts, grades.kept


def keep(rollouts: Rollouts, kept: np.ndarray) -> Rollouts:
    """The rows of the groups with kept [P] true."""
    rows = np.repeat(kept, rollouts.group_size)
    return jax.tree.map(lambda x: x[rows], rollouts)


def join(parts: Sequence[Rollouts], num_groups: int) -> Rollouts:
    """The first `num_groups` groups of several batches."""
    rows = num_groups * parts[0].group_size
    return jax.tree.map(lambda *x: np.concatenate(x)[:rows], *parts)


def describe(groups: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Accuracy, scores, kinds of groups, length and truncation of everything that was sampled.

    NaN where nothing could be graded.
    """
    samples = [sample for group in groups for sample in group]
    verdicts = [[s.correct for s in group if s.correct is not None] for group in groups]
    shares = [np.mean(group) for group in verdicts if group]
    graded = [verdict for group in verdicts for verdict in group]
    return {
        "rollout/accuracy": mean(graded),
        "rollout/score": mean([s.score for s in samples if s.correct is not None]),
        "rollout/all_correct": mean([share == 1 for share in shares]),
        "rollout/all_wrong": mean([share == 0 for share in shares]),
        "rollout/mixed": mean([0 < share < 1 for share in shares]),
        "rollout/length": mean([len(s.ids) for s in samples]),
        "rollout/truncated": mean([s.truncated for s in samples]),
        "rollout/ungraded": mean([s.correct is None for s in samples]),
        **failures(samples),
        **rewards(samples),
    }


def mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return float(np.mean(values)) if len(values) else float("nan")


def rewards(samples: Sequence[Sample]) -> dict[str, float]:
    """The mean of each reward function, and how many answers it could not score."""
    metrics = {}
    for name in samples[0].rewards if samples else ():
        scored = [s.rewards[name] for s in samples if s.rewards[name] is not None]
        metrics[f"reward/{name}"] = mean(scored)
        metrics[f"reward/{name}_none"] = len(samples) - len(scored)
    return metrics


def failures(samples: Sequence[Sample]) -> dict[str, int]:
    """How many answers the verifier could not judge, and why."""
    counts = Counter(sample.status for sample in samples)
    return {f"verifier/{status}": counts[status] for status in ("timeout", "error")}


def answer(
    draw: Callable[[Array, np.ndarray, np.ndarray], Samples],
    key: Array,
    problems: Sequence[Problem],
    tokenizer,
    template: Template,
    judge: Judge,
    *,
    max_prompt: int,
    batch: int,
    stop_ids: Sequence[int],
    first: int = 0,
) -> Iterator[list[list[Sample]]]:
    """The graded answers to `batch` problems after `batch` problems, from number `first` on.

    They depend on the key and the numbers of their problems alone, so a part that was interrupted
    is repeated exactly.

    Args:
      draw: (key, prompts, prompt lengths) -> samples of `batch` prompts.
      batch: problems at a time; the last batch is filled up with its last problem.
      first: a multiple of `batch`.
    """
    for i in range(first, len(problems), batch):
        part = list(problems[i : i + batch])
        padded = part + part[-1:] * (batch - len(part))
        prompt = encode(padded, tokenizer, template, max_prompt)
        samples = hosts.get(draw(jax.random.fold_in(key, i), *prompt))
        samples = Samples(**{name: x[: len(part)] for name, x in vars(samples).items()})
        yield verify(part, samples, tokenizer, stop_ids, judge)


def measure(groups: Sequence[Sequence[Sample]]) -> tuple[np.ndarray, dict[str, float]]:
    """Verdicts of k answers to each of N problems, and metrics.

    Returns:
      f64[N, k], 1 correct, 0 wrong, NaN where the verifier could not decide; and metrics.
    """
    verdicts = [[np.nan if s.correct is None else s.correct for s in group] for group in groups]
    samples = [sample for group in groups for sample in group]
    scores = [sample.score for sample in samples if sample.correct is not None]
    metrics = {
        "score": float(np.mean(scores)) if scores else float("nan"),
        "length": float(np.mean([len(sample.ids) for sample in samples])),
        "truncated": float(np.mean([sample.truncated for sample in samples])),
        **failures(samples),
        **rewards(samples),
    }
    return np.array(verdicts, np.float64), metrics
