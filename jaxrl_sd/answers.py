"""Samples k answers to each of many problems and keeps them on disk; a stop costs one batch.

A folder holds `settings.json`, everything that the answers depend on, and `samples.jsonl`, one JSON
object a problem in the order of the problems:

    {"id", "prompt", "answer", "verifier", "samples": [
        {"text", "correct", "score", "rewards", "truncated", "length", "final_answer", "status"},
        ...k of them]}

`correct` and `score` are null where the verifier could not judge (`status` says why), `rewards` are
those of each reward function, `length` is in tokens, and `final_answer` is the text to vote with,
null where there is none. A batch of answers depends on the seed and on the numbers of its problems
alone, so a run that was stopped continues bit for bit (a verifier's timeout excepted, which depends
on the machine's load).
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxrl_sd import checkpoint, evaluate, files, hosts, metrics, rollout, sampler, sharding
from jaxrl_sd import config as configuration
from jaxrl_sd.model import Compute
from jaxrl_sd.start import (
    batch_size,
    check_judges,
    check_prompts,
    load_model,
    load_problems,
    open_judge,
    sampling_config,
)
from jaxrl_sd.tokens import load_tokenizer
from jaxrl_sd.types import InputError, Problem, Sample
from jaxrl_sd.verify import FINAL_ANSWERS
from jaxrl_sd.verify.pool import VerifierPool

FILE = "samples.jsonl"
SETTINGS = "settings.json"

Record = dict[str, Any]  # one line of samples.jsonl


def collect(config: ConfigDict, split: str) -> tuple[list[Problem], list[Record]]:
    """Problems of a split and `evaluation.samples` answers to each, drawn as rollouts are.

    What `output_dir` has already is not sampled again. `rollout.prompts` problems are sampled at a
    time: that times `evaluation.samples` answers have to fit in memory.

    Raises:
      InputError: anything wrong in the configuration, the model or the problems; `output_dir` holds
        answers of other settings, or is damaged.
    """
    configuration.check_settings(config)
    _check_greedy(config)
    folder = Path(config.output_dir)
    configuration.check_writable(folder)
    tokenizer = load_tokenizer(config.model.path)
    problems = load_problems(config, split)
    template = configuration.templates(config)["nothing"]
    check_prompts(problems, tokenizer, template, config)
    check_judges(config, problems)
    mesh = sharding.make_mesh(**config.mesh)
    params, model = load_model(config.model.path, tokenizer, mesh)
    prompts = rollout.encode(problems, tokenizer, template, config.rollout.max_prompt)
    settings = _settings(config, split) | {
        "weights": checkpoint.fingerprint(params),
        "problems": _fingerprint(problems, *prompts),
    }
    batch = batch_size(config, len(problems))
    records = hosts.from_first(lambda: _start_or_resume(folder, settings, len(problems), batch))
    sampling = sampling_config(config, tokenizer)
    draw = partial(
        sampler.sample,
        params,
        group_size=config.evaluation.samples,
        sampling=sampling,
        config=model,
        compute=Compute(dtype=config.compute.dtype, mesh=mesh),
    )
    with open_judge(config) as judge:
        answered = rollout.answer(
            lambda key, *prompt: draw(key, *hosts.put(prompt, sharding.of_rows(mesh))),
            jax.random.key(config.seed),
            problems,
            tokenizer,
            template,
            judge,
            max_prompt=config.rollout.max_prompt,
            batch=batch,
            stop_ids=sampling.stop_ids,
            first=len(records),
        )
        _write_down(folder / FILE, problems, records, answered, judge)
    return problems, records


def read(folder: Path) -> tuple[dict[str, Any], list[Record]]:
    """Settings and finished lines of a folder.

    Raises:
      InputError: there are none, or a file is damaged.
    """
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        lines = metrics.whole_lines(folder / FILE)
    except (OSError, ValueError) as error:
        raise InputError(f"output_dir: {folder} holds no answers: {error}") from error
    return settings, [_parse(line, i, folder / FILE) for i, line in enumerate(lines, start=1)]


def verdicts(records: Sequence[Record]) -> np.ndarray:
    """f64[N, k], 1 correct, 0 wrong, NaN where the verifier could not judge."""
    return np.array([[s["correct"] for s in r["samples"]] for r in records], np.float64)


def _check_greedy(config: ConfigDict) -> None:
    k = config.evaluation.samples
    if config.rollout.temperature == 0 and k > 1:
        raise InputError(
            f"evaluation.samples: greedy decoding (rollout.temperature = 0) gives one answer a "
            f"problem, expected 1, got {k}"
        )


def _settings(config: ConfigDict, split: str) -> dict[str, Any]:
    """Everything in the configuration and the machine that the answers depend on."""
    c = json.loads(config.to_json())
    other = "train" if split == "test" else "test"
    unused = (other, f"num_{other}", f"{other}_subset", f"{other}_split")
    sampling = (
        *("prompts", "max_prompt", "max_response"),
        *("temperature", "top_k", "top_p", "presence_penalty", "slots", "lanes"),
    )
    return {
        "model": c["model"],
        "data": {name: value for name, value in c["data"].items() if name not in unused},
        "template": c["templates"].get("nothing", {}),
        "thinking": c["thinking"]["student"],
        "samples": c["evaluation"]["samples"],
        "rollout": {name: c["rollout"][name] for name in sampling},
        "verifier": {"timeout_s": c["verifier"]["timeout_s"]},
        "reward": c["reward"],
        "seed": c["seed"],
        "mesh": c["mesh"],
        "dtype": c["compute"]["dtype"],
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def _fingerprint(problems: Sequence[Problem], prompt: np.ndarray, length: np.ndarray) -> str:
    """Tells problems apart by what is asked, token by token, and by how answers are judged."""
    ids = [row[len(row) - n :].tolist() for row, n in zip(prompt, length, strict=True)]
    judged = [(p.id, p.answer, p.verifier) for p in problems]
    return hashlib.sha256(json.dumps([ids, judged]).encode()).hexdigest()[:16]


def _start_or_resume(
    folder: Path, settings: dict[str, Any], num_problems: int, batch: int
) -> list[Record]:
    """The answers of all whole batches in `folder`; its file then holds exactly them."""
    path = folder / FILE
    if not path.exists():
        files.replace_text(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
        path.touch()
        return []
    old, records = read(folder)
    checkpoint.check_same_run(old, settings, folder, free=("model.path",))  # `weights` says it
    if len(records) < num_problems:
        records = records[: len(records) - len(records) % batch]
    files.replace_text(path, "".join(map(_line, records)))
    return records


def _write_down(
    path: Path,
    problems: Sequence[Problem],
    records: list[Record],
    answered: Iterator[list[list[Sample]]],
    judge: rollout.Judge,
) -> None:
    """Appends to `records` and to the file, a batch at a time."""
    with metrics.progress("problem", len(problems), len(records)) as progress:
        for groups in answered:
            part = problems[len(records) : len(records) + len(groups)]
            new = list(map(_record, part, groups, _final_answers(part, groups, judge)))
            if hosts.is_first():
                _append(path, "".join(map(_line, new)))
            records += new
            accuracy = evaluate.avg_at_k(verdicts(records)).value
            progress.set_postfix({"accuracy": accuracy}, refresh=False)
            progress.update(len(new))


def _append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _final_answers(
    problems: Sequence[Problem], groups: Sequence[Sequence[Sample]], judge: rollout.Judge
) -> list[list[str | None]]:
    """The texts to vote with; None where there is none, or where finding it failed."""
    found = [[None] * len(group) for group in groups]
    if not isinstance(judge, VerifierPool):  # reward functions only give scores
        return found
    for verifier, target in FINAL_ANSWERS.items():
        places = [
            (p, i)
            for p, problem in enumerate(problems)
            for i in range(len(groups[p]))
            if problem.verifier == verifier
        ]
        texts = hosts.divide(partial(judge.map, target), [(groups[p][i].text,) for p, i in places])
        for (p, i), text in zip(places, texts, strict=True):
            found[p][i] = text
    return found


def _record(
    problem: Problem, group: Sequence[Sample], final_answers: Sequence[str | None]
) -> Record:
    samples = [
        {
            "text": sample.text,
            "correct": sample.correct,
            "score": sample.score,
            "rewards": dict(sample.rewards),
            "truncated": sample.truncated,
            "length": len(sample.ids),
            "final_answer": final_answer,
            "status": sample.status,
        }
        for sample, final_answer in zip(group, final_answers, strict=True)
    ]
    return {
        "id": problem.id,
        "prompt": problem.prompt,
        "answer": problem.answer,
        "verifier": problem.verifier,
        "samples": samples,
    }


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _parse(line: str, number: int, path: Path) -> Record:
    try:
        record = json.loads(line)
        record["samples"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"output_dir: {path}, line {number}: got {line[:60].rstrip()!r}, expected the answers "
            "to a problem"
        ) from error
    return record
