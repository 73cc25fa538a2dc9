"""What a run reads, and the checks that it makes before its first sample."""

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from jaxrl_sd import config as configuration
from jaxrl_sd import contexts, data, diagnostics, packing, sharding, tokens, verify, weights
from jaxrl_sd.methods import Method
from jaxrl_sd.methods.base import Teacher
from jaxrl_sd.model import Compute, ModelConfig, init_adapter
from jaxrl_sd.rollout import Judge
from jaxrl_sd.sampler import SamplingConfig
from jaxrl_sd.tokens import Template, load_tokenizer, stop_ids
from jaxrl_sd.types import Batch, InputError, Params, Problem, Sample
from jaxrl_sd.update import Parts, State, Steps, make_probes, make_steps
from jaxrl_sd.verify.pool import VerifierPool
from jaxrl_sd.verify.reward import RewardFunctions
from jaxrl_sd.vocabulary import STUDENT


class Run(NamedTuple):
    """What is read and compiled before the first step and never changes."""

    config: ConfigDict
    method: Method
    model: ModelConfig
    tokenizer: Any
    problems: grain.MapDataset  # [i] is the i-th that training sees
    held_out: list[Problem]
    templates: dict[str, Template]
    sampling: SamplingConfig
    mesh: jax.sharding.Mesh
    sizes: packing.Sizes
    steps: Steps
    gaps: Callable[[State, Batch, Parts], dict[str, jax.Array]]
    probes: Callable[[State, Batch, Parts], dict[str, jax.Array]]
    folder: Path


def prepare(config: ConfigDict) -> tuple[Run, Params, dict[str, Params]]:
    """Checks everything and reads models, tokenizer and problems.

    Returns:
      The run; what it trains, as it is before the first step; and the weights that it does not
      train, see `update.State`.
    """
    method = configuration.check(config)
    mesh = sharding.make_mesh(**config.mesh)
    weights.load_config(config.model.path)  # says more about a wrong file than transformers does
    tokenizer = load_tokenizer(config.model.path)
    sampling = sampling_config(config, tokenizer)
    train, held_out = load_problems(config, "train"), load_problems(config, "test")
    templates = configuration.templates(config)
    check_prompts([*train, *held_out], tokenizer, templates["nothing"], config)
    check_hints(train, method, tokenizer, templates, config)
    check_judges(config, train, held_out)
    for note in compare_headers(method, tokenizer, templates, train[0]):
        logging.warning("%s", note)
    frozen, models = load_models(config.model.path, tokenizer, method, mesh)
    models[STUDENT] = model = replace(models[STUDENT], lora=configuration.lora(config))
    params, frozen[STUDENT] = split_trained(frozen[STUDENT], model, config.seed, mesh)
    configs = {name: models[t.source.checkpoint] for name, t in method.teachers.items()}
    configs[STUDENT] = model
    c = config.compute
    compute = Compute(dtype=c.dtype, remat=c.remat, chunk=c.chunk, mesh=mesh)
    temperature = config.rollout.temperature
    steps = make_steps(
        method,
        configuration.optimizer(config),
        configs,
        mini_batches=config.optimizer.mini_batches,
        temperature=temperature,
        compute=compute,
    )
    problems = data.shuffled(train, config.seed)
    folder = Path(config.output_dir)
    run = Run(
        config=config,
        method=method,
        model=model,
        tokenizer=tokenizer,
        problems=problems,
        held_out=held_out,
        templates=templates,
        sampling=sampling,
        mesh=mesh,
        sizes=stream_sizes(config, method),
        steps=steps,
        gaps=diagnostics.make_gaps(method, configs, temperature, compute),
        probes=make_probes(method, configs, temperature, compute),
        folder=folder,
    )
    return run, params, frozen


def stream_sizes(config: ConfigDict, method: Method) -> packing.Sizes:
    """What a device computes at a time, see `packing.sizes`."""
    r = config.rollout
    return packing.sizes(
        prompts(config, method), r.group_size, r.max_response, config.compute.tokens
    )


def prompts(config: ConfigDict, method: Method) -> dict[str, packing.Prompts]:
    """What is known of the student's prompts, under `STUDENT`, and of each teacher's."""
    r, problem = config.rollout, Problem("", "", answer="1", solution="1")  # any
    out = {STUDENT: packing.Prompts(r.max_prompt, shared=True)}
    for name, (context, _) in method.teachers.items():
        shown = {hint.template for hint in possible_hints(problem, context)}
        longest = r.max_prompt if shown == {"nothing"} else r.max_hint_prompt
        out[name] = packing.Prompts(longest, context.shared)
    return out


def load_problems(config: ConfigDict, split: str) -> list[Problem]:
    """The problems of a split, see `data.load`."""
    c = config.data
    return data.load(
        c[split],
        split,
        c[f"num_{split}"],
        c.seed,
        c.suffix,
        subset=c[f"{split}_subset"],
        hub_split=c[f"{split}_split"],
        columns=c.columns,
        verifier=c.verifier,
        answers=not config.reward.functions,
    )


def batch_size(config: ConfigDict, num_problems: int) -> int:
    """Problems to sample at a time for evaluation: no more than there are, all devices busy."""
    devices = config.mesh.data * config.mesh.fsdp
    return min(config.rollout.prompts, -(-num_problems // devices) * devices)


def sampling_config(config: ConfigDict, tokenizer) -> SamplingConfig:
    """How rollouts are drawn."""
    return SamplingConfig(
        max_response=config.rollout.max_response,
        stop_ids=stop_ids(tokenizer, config.model.path),
        pad_id=tokenizer.pad_token_id,
        temperature=config.rollout.temperature,
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
        presence_penalty=config.rollout.presence_penalty,
        slots=config.rollout.slots,
        lanes=config.rollout.lanes,
    )


def load_models(path: str, tokenizer, method: Method, mesh: jax.sharding.Mesh):
    """Parameters and architecture of the policy, under `STUDENT`, and of teachers' checkpoints.

    Raises:
      InputError: a model cannot be read, or does not belong to the policy's tokenizer.
    """
    params, config = load_model(path, tokenizer, mesh)
    initial, models = {STUDENT: params}, {STUDENT: config}
    for folder in {t.source.checkpoint for t in method.teachers.values()} - {STUDENT}:
        try:
            initial[folder], models[folder] = load_model(folder, tokenizer, mesh)
            same = tokens.load_vocabulary(folder) == tokenizer.get_vocab()
        except InputError as error:
            reason = str(error).removeprefix("model.path: ")
            raise InputError(f"method.teacher: {reason}") from error
        if not same:
            raise InputError(
                f"method.teacher: the model in {folder} has another tokenizer than the policy in "
                f"{path}; a teacher scores the policy's own tokens"
            )
    return initial, models


def load_model(folder: str, tokenizer, mesh: jax.sharding.Mesh) -> tuple[Params, ModelConfig]:
    """Parameters and architecture, of as many tokens as the tokenizer knows."""
    params, config = weights.load(folder, mesh)
    if len(tokenizer) > config.vocab_size:
        raise InputError(
            f"model.path: the tokenizer has {len(tokenizer)} tokens, the model in {folder} "
            f"{config.vocab_size}: they do not belong together"
        )
    return params, replace(config, num_tokens=len(tokenizer))


def split_trained(
    params: Params, model: ModelConfig, seed: int, mesh: jax.sharding.Mesh
) -> tuple[Params, Params]:
    """What is trained of a policy, and what stays as it is: an adapter and all else, or all."""
    if model.lora is None:
        return params, {}

    def init() -> Params:
        return init_adapter(jax.random.key(seed), model)

    placed = sharding.of_state(jax.eval_shape(init), mesh)
    return jax.jit(init, out_shardings=placed)(), params


def check_hints(
    problems: Sequence[Problem],
    method: Method,
    tokenizer,
    templates: Mapping[str, Template],
    config: ConfigDict,
) -> None:
    """Every training problem has what the method shows its teachers, and leaves room for it.

    Raises:
      InputError: naming the problem.
    """
    for name, teacher in method.teachers.items():
        for problem in problems:
            for field in teacher.context.needs:
                if not getattr(problem, field):
                    raise InputError(
                        f"data: {problem.id}: {config.method.name} shows its {name} the {field} "
                        f"of each problem, and this one has none"
                    )
        check_hints_fit(problems, name, teacher, tokenizer, templates, config)


def check_prompts(
    problems: Sequence[Problem], tokenizer, template: Template, config: ConfigDict
) -> None:
    """Every problem's prompt fits.

    Raises:
      InputError: naming the problem.
    """
    lengths = [_length(problem, tokenizer, template) for problem in problems]
    limit, longest = config.rollout.max_prompt, int(np.argmax(lengths))
    if lengths[longest] > limit:
        raise InputError(
            f"rollout.max_prompt: {sum(n > limit for n in lengths)} of {len(problems)} prompts are "
            f"longer than {limit} tokens, the longest has {lengths[longest]}: "
            f"{problems[longest].id}, {problems[longest].prompt[:80]!r}"
        )


def check_judges(config: ConfigDict, *splits: Sequence[Problem]) -> None:
    """What decides about answers is there: reward functions with what they ask for, or verifiers.

    Raises:
      InputError: naming the function, or the problem.
    """
    if config.reward.functions:
        with RewardFunctions(**config.reward) as functions:
            for problems in splits:
                functions.check(problems)
        return
    for problem in itertools.chain(*splits):
        if problem.verifier not in verify.VERIFIERS:
            raise InputError(
                f"data: {problem.id}: verifier: expected one of {sorted(verify.VERIFIERS)}, "
                f"got {problem.verifier!r}"
            )
        try:
            _run_check(verify.PROBLEM_CHECKS, problem.verifier, problem.prompt, problem.answer)
        except ValueError as error:
            raise InputError(f"data: {problem.id}: {error}") from error
    for name in {problem.verifier for problem in itertools.chain(*splits)}:
        if config.verifier.timeout_s <= verify.SECONDS.get(name, 0.0):
            raise InputError(
                f"verifier.timeout_s: expected more than the {verify.SECONDS[name]} seconds that "
                f"verifier {name!r} may take, got {config.verifier.timeout_s}"
            )
        try:
            _run_check(verify.MACHINE_CHECKS, name)
        except RuntimeError as error:
            raise InputError(f"data: verifier {name!r}: {error}") from error


def _run_check(checks: Mapping[str, str], verifier: str, *arguments: str) -> None:
    if verifier in checks:
        module, function = checks[verifier].split(":")
        getattr(importlib.import_module(module), function)(*arguments)


def check_hints_fit(
    problems: Sequence[Problem],
    name: str,
    teacher: Teacher,
    tokenizer,
    templates: Mapping[str, Template],
    config: ConfigDict,
) -> None:
    """The longest problem leaves room for each wording that this teacher can be shown."""
    longest = max(problems, key=lambda p: _length(p, tokenizer, templates["nothing"]))
    limit = config.rollout.max_hint_prompt
    for hint in possible_hints(longest, teacher.context):
        slots = {**dict.fromkeys(hint.slots, ""), "problem": longest.prompt}
        try:
            prompt = tokens.render(tokenizer, templates[hint.template], slots, longest.turns)
        except InputError as error:
            raise InputError(f"{error} ({name}, template {hint.template})") from error
        if len(prompt) > limit:
            raise InputError(
                f"rollout.max_hint_prompt: {name}, template {hint.template}: {len(prompt)} tokens "
                f"without a hint, expected at most {limit}, for the problem {longest.prompt[:80]!r}"
            )


def compare_headers(method: Method, tokenizer, templates, problem: Problem) -> list[str]:
    """What to know where a teacher's prompt ends otherwise than the student's.

    The two then predict the first token of a response after different texts, for instance one after
    the start of a thought, whatever the teacher was shown.
    """

    def end(name: str) -> str:
        return tokenizer.decode(tokens.header(tokenizer, templates[name]))

    student = end("nothing")
    ends = {
        (name, hint.template): end(hint.template)
        for name, teacher in method.teachers.items()
        for hint in possible_hints(problem, teacher.context)
    }
    return [
        f"{name}, template {template}: its prompts end with {text!r}, the student's with "
        f"{student!r}: their first tokens are not comparable"
        for (name, template), text in ends.items()
        if text != student
    ]


def _length(problem: Problem, tokenizer, template: Template) -> int:
    return len(tokens.render(tokenizer, template, {"problem": problem.prompt}, problem.turns))


def possible_hints(problem: Problem, context: contexts.Context) -> list[contexts.Hint]:
    """A hint of each template that a context can use."""
    # All verdict patterns that a context can tell apart: nobody, somebody, several were right.
    verdicts = [[False] * 4, [True] + [False] * 3, [True, True, False, False], [True] * 4]
    found = {}
    for group in verdicts:
        samples = [Sample((), "", correct, False, feedback="wrong") for correct in group]
        for hint in context.write(problem, samples, np.random.default_rng(0)):
            if hint is not None:
                found[hint.template] = hint
    return list(found.values())


def open_judge(config: ConfigDict) -> Judge:
    """What decides about answers: the reward functions, or else each problem's verifier."""
    if config.reward.functions:
        return RewardFunctions(**config.reward)
    return VerifierPool(config.verifier.workers, config.verifier.timeout_s)
