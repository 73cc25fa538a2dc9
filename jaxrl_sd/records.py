"""Records of token credit: what a method gave every token of an answer, as plain data.

A record is a dict, one sampled answer of n tokens; a file has one a line, in JSON. Values are those
of the batch as it was trained on, in nats where they are of log-probabilities:

    method, step                  whose credit, and in which step (1, 2, ...)
    prompt, answer                the problem
    response, response_tokens     the text, and its pieces, str [n]
    correct, truncated, score, rewards           see `types.Sample`
    reward, advantage_of_row      what the method's grades made of it, and GRPO's advantage
    advantage, distill            [n], see `types.Credit`
    logp, entropy                 [n], the student's
    gap                           {teacher: [n]}, log p_T - log p_S
    shown                         {teacher: the prompt that it read}, None where it was silent
    divergence, reference_kl      [n], where the method has such a probe

What was not computed is None: a row that does not train is not scored, and a silent teacher does
not read its row.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_sd import files, hosts
from jaxrl_sd.methods.base import advantage
from jaxrl_sd.metrics import strict
from jaxrl_sd.start import Run
from jaxrl_sd.types import Batch, Hints, InputError, Problem, Sample
from jaxrl_sd.update import Scores, take_rows

Record = dict[str, Any]
OF_TOKENS = ("advantage", "distill", "logp", "entropy", "divergence", "reference_kl")

_take_rows = jax.jit(take_rows)


def mixed_first(groups: Sequence[Sequence[Sample]]) -> list[int]:
    """Numbers of the groups, those with correct and wrong answers first, else in their order."""
    mixed = [{True, False} <= {sample.correct for sample in group} for group in groups]
    return np.argsort(np.logical_not(mixed), kind="stable").tolist()


def of_group(
    run: Run,
    batch: Batch,
    gaps: Scores,
    probes: Scores,
    p: int,
    problem: Problem,
    samples: Sequence[Sample],
    step: int,
) -> list[Record]:
    """The records of one group, on every process.

    Args:
      batch: with credit.
      gaps: {teacher: f32[B, T]}, see `diagnostics.make_gaps`.
      probes: {name: f32[B, T]}, see `update.make_probes`.
      p: the group's number in the batch.
      problem: that it answers.
      samples: its G answers.
      step: the step that trains on the batch, from 1.
    """
    rows = np.arange(p * len(samples), (p + 1) * len(samples))
    group, gaps, probes = hosts.get(_take_rows((batch, gaps, probes), rows))
    rollouts, credit, scores = group.rollouts, group.credit, group.scores
    of_credit = {"advantage": credit.adv_t, "distill": credit.distill_t}
    of_scores = {"logp": scores["old_logp"], "entropy": scores["entropy"], **probes}
    row_advantage = np.asarray(advantage(group))
    trained = rollouts.mask_t.any(axis=1)
    teacher_of = {name: teacher for name, (teacher, _) in run.method.probe.items()}

    def known(i: int, teacher: str | None) -> bool:
        """Whether the row's statistics were computed, those with the teacher's if there is one."""
        return bool(trained[i] and (teacher is None or group.hints[teacher].shown[i]))

    def record(i: int, sample: Sample) -> Record:
        n = len(sample.ids)

        def of_row(x: np.ndarray, teacher: str | None) -> list[float] | None:
            return x[i, :n].tolist() if known(i, teacher) else None

        return {
            "method": run.config.method.name,
            "step": step,
            "prompt": problem.prompt,
            "answer": problem.answer,
            "response": sample.text,
            "response_tokens": [run.tokenizer.decode([t]) for t in sample.ids],
            "correct": sample.correct,
            "score": sample.score,
            "rewards": dict(sample.rewards),
            "truncated": sample.truncated,
            "reward": None if sample.correct is None else float(rollouts.reward[i]),
            "advantage_of_row": float(row_advantage[i]),
            **{name: x[i, :n].tolist() for name, x in of_credit.items()},
            **{name: of_row(x, teacher_of.get(name)) for name, x in of_scores.items()},
            "gap": {teacher: of_row(x, teacher) for teacher, x in gaps.items()},
            "shown": {name: _shown(run.tokenizer, h, i) for name, h in group.hints.items()},
        }

    return [strict(record(i, sample)) for i, sample in enumerate(samples)]


def _shown(tokenizer, hints: Hints, i: int) -> str | None:
    prompt = hints.prompt[i, len(hints.prompt[i]) - hints.prompt_length[i] :]
    return tokenizer.decode(prompt) if hints.shown[i] else None


def log_group(
    run: Run,
    batch: Batch,
    gaps: Scores,
    probes: Scores,
    problems: Sequence[Problem],
    groups: Sequence[Sequence[Sample]],
    step: int,
) -> None:
    """Writes a group of a batch, mixed if there is one, to `rollouts/` in the run's folder."""
    p = mixed_first(groups)[0]
    group = of_group(run, batch, gaps, probes, p, problems[p], groups[p], step)
    if not hosts.is_first():
        return
    path = run.folder / "rollouts" / f"{step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    files.replace_text(path, "".join(json.dumps(x, allow_nan=False) + "\n" for x in group))


def read_rollouts(folder: Path) -> list[Record]:
    """Everything that `log_group` wrote for a run, in order."""
    paths = sorted((folder / "rollouts").glob("*.jsonl"))
    return [record for path in paths for record in read(path)]


def read(path: Path) -> list[Record]:
    """The records of a file.

    Raises:
      InputError: there is no such file, or it does not hold records.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"rollouts: {path} cannot be read: {error}") from error
    if not lines:
        raise InputError(f"rollouts: {path} is empty, expected an answer a line")
    return [_parse(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1)]


def of_files(paths: Sequence[str]) -> dict[str, list[Record]]:
    """The records of several files, under the names of their methods where these tell them apart.

    Otherwise under their paths.

    Raises:
      InputError: see `read`.
    """
    files_read = {path: read(Path(path)) for path in paths}
    methods = [records[0].get("method") for records in files_read.values()]
    apart = None not in methods and len(set(methods)) == len(methods)
    return dict(zip(methods if apart else files_read, files_read.values(), strict=True))


def _parse(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
        tokens, prompt = record["response_tokens"], record["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"rollouts: {place}: got {line[:60]!r}, expected an answer of a file in rollouts/"
        ) from error
    if not (isinstance(prompt, str) and _is_list_of(str, tokens)):
        raise InputError(f"rollouts: {place}: expected texts as prompt and response_tokens")
    gap = record.get("gap") or {}
    if not isinstance(gap, dict):
        raise InputError(f"rollouts: {place}: gap: expected an object of teachers")
    values = {name: record.get(name) for name in OF_TOKENS} | gap
    for name, x in values.items():
        # A number that is not finite is a text in JSON.
        if x is not None and not (_is_list_of(float | int | str, x) and len(x) == len(tokens)):
            raise InputError(f"rollouts: {place}: {name}: expected {len(tokens)} numbers")
    return record


def _is_list_of(kind, values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
