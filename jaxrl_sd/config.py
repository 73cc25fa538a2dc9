"""The configuration of a run: its defaults, and the checks made before any compute is spent.

A configuration is an `ml_collections.ConfigDict`. `default()` is the built-in job; the files in
experiments/configs/ change it. `method` holds the method's name and any of the keyword arguments of
its factory; every other key must be one of `default()`, with a value of the same type.
"""

import ast
import inspect
import math
import os
import re
import runpy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from jaxrl_sd import contexts, countdown
from jaxrl_sd.data import COLUMNS
from jaxrl_sd.methods import METHODS, PRESETS, Method
from jaxrl_sd.methods.base import IMPORTANCE, Verdicts, add_importance_weight
from jaxrl_sd.model import LINEAR, REMAT, Lora
from jaxrl_sd.tokens import TEXTS, Template, is_text
from jaxrl_sd.types import InputError, first_line
from jaxrl_sd.verify import VERIFIERS

TINY_MODEL = str(Path(__file__).parent / "assets" / "tiny")
CHAINS_MODEL = str(Path(__file__).parent / "assets" / "chains")
SCHEDULES = ("constant", "linear", "cosine")
DTYPES = ("float32", "bfloat16")


def default() -> ConfigDict:
    """The main job: RLSD on countdown with the tiny model that ships with the package."""
    config = ConfigDict()
    config.seed = 0
    config.steps = 60  # batches of rollouts; `step` counts them everywhere
    config.output_dir = "runs/tiny"
    config.method = ConfigDict({"name": "rlsd"})
    config.model = ConfigDict({"path": TINY_MODEL})  # a folder in Hugging Face format

    config.lora = ConfigDict()  # low-rank adapters in place of training all weights
    config.lora.rank = 0  # 0: none
    config.lora.alpha = 128.0  # they are scaled by alpha / rank
    config.lora.targets = tuple(f"{name}_proj" for name in LINEAR)

    config.thinking = ConfigDict()  # `enable_thinking` of the chat template
    config.thinking.student = True
    config.thinking.teacher = True  # where it is shown something

    config.data = ConfigDict()
    config.data.train = "countdown"  # or a file, a folder or a data set of the hub: data.load
    config.data.test = "countdown"
    config.data.train_subset, config.data.train_split = "", "train"  # of a data set of the hub
    config.data.test_subset, config.data.test_split = "", "test"
    config.data.columns = ConfigDict(dict.fromkeys(COLUMNS, ""))  # "": found by its usual names
    config.data.verifier = "math"  # of rows that name none
    config.data.num_train = 4096  # problems; 0 is all of a data set
    config.data.num_test = 256
    config.data.seed = 0  # of generated problems; `seed` only orders them
    config.data.suffix = ""  # ends every prompt, for instance with the form of the answer
    config.templates = ConfigDict(countdown.TEMPLATES)  # what hints look like in words
    config.exchange_hints = False  # a control: teachers are shown what belongs to another problem

    config.rollout = ConfigDict()
    config.rollout.prompts = 32  # P, prompts a step
    config.rollout.group_size = 8  # G, samples a prompt
    config.rollout.max_prompt = 12  # S, tokens of the student's prompt
    config.rollout.max_hint_prompt = 48  # S', tokens of a teacher's prompt
    config.rollout.max_response = 24  # T, tokens
    config.rollout.temperature = 1.0
    config.rollout.top_k = 0  # 0: the whole vocabulary
    config.rollout.top_p = 1.0
    config.rollout.presence_penalty = 0.0  # off the logits of tokens that the response has
    config.rollout.slots = 0  # prompts that are decoded at a time, the others wait; 0: all
    config.rollout.lanes = 0  # samples of each of them that are decoded at a time; 0: all
    config.rollout.max_rounds = 10  # of P prompts a step, for methods that drop groups

    config.optimizer = ConfigDict()  # AdamW
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 5
    config.optimizer.schedule = "constant"  # after the warm-up: constant, linear or cosine
    config.optimizer.final_scale = 0.1  # of the learning rate, where linear and cosine end
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.99
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 1.0  # of the whole gradient
    config.optimizer.mini_batches = 1  # parts of a batch, each one optimiser update
    config.optimizer.epochs = 1  # passes over a batch

    config.importance = ConfigDict()  # truncated ratio of trainer to sampler, in the loss
    config.importance.level = "none"  # none, token or sequence
    config.importance.cap = 2.0

    config.compute = ConfigDict()
    config.compute.tokens = 512  # of the student that a device computes at a time, see packing
    config.compute.chunk = 512  # of these, tokens whose logits exist at a time
    config.compute.dtype = "float32"  # or bfloat16: of weights and activations in forward passes
    config.compute.remat = "dots"  # what backward passes compute again, see model.REMAT

    config.mesh = ConfigDict({"data": 1, "fsdp": 1, "tensor": 1})  # devices along each axis

    config.evaluation = ConfigDict()
    config.evaluation.every = 20  # steps; the start and the end are always evaluated
    config.evaluation.samples = 4  # k of avg@k, pass@k, maj@k, drawn as rollouts are

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 20  # steps
    config.checkpoint.keep = 2

    config.reward = ConfigDict()  # without functions, each problem's verifier decides
    config.reward.functions = ()  # "file.py:name" or "module:name", called as TRL calls them
    config.reward.weights = ()  # of the functions; all 1 where empty
    config.reward.correct_above = 0.5  # weighted sums of rewards above it count as correct
    config.reward.timeout_s = 600.0  # for one function on one batch

    config.verifier = ConfigDict()
    config.verifier.workers = 2  # processes
    config.verifier.timeout_s = 10.0  # for one answer
    return config


def load(path: str | os.PathLike) -> ConfigDict:
    """What `get_config()` of a Python file gives.

    Raises:
      InputError: there is no such file or function, or it fails.
    """
    try:
        config = runpy.run_path(os.fspath(path))["get_config"]()
    except Exception as error:  # a program
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"config: {path} gives no configuration: {reason}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"config: expected a ConfigDict from get_config() of {path}")
    return config


def override(config: ConfigDict, field: str, text: str) -> None:
    """Sets `field`, as in "rollout.top_p", to what `text` says: a Python literal, else the text.

    Text settings take the text as it is. Nothing is refused here; that is for `check`.
    """
    *groups, key = field.split(".")
    for group in groups:
        if not isinstance(config.get(group), ConfigDict):
            with config.ignore_type():
                config[group] = ConfigDict()
        config = config[group]
    try:
        value = text if isinstance(config.get(key), str) else ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        value = text
    if isinstance(config.get(key), tuple) and not isinstance(value, tuple | list):
        value = (value,)
    with config.ignore_type():  # an int still becomes a float where the setting is one
        config[key] = value


def check(config: ConfigDict) -> Method:
    """The method of a configuration, once every field was found right.

    Raises:
      InputError: an unknown key, a value of the wrong type or out of range, a method's name or
        hyper-parameter that does not exist, a group too small for the method, or an output folder
        that cannot be written.
    """
    check_settings(config)
    _check_sizes(config)
    method = _method(config)
    group_size = config.rollout.group_size
    if group_size < method.min_group_size:
        raise InputError(
            f"rollout.group_size: {config.method.name} compares the answers of a group and needs "
            f"at least {method.min_group_size}, got {group_size}"
        )
    _check_grading(config, method)
    check_writable(Path(config.output_dir))
    if config.importance.level == "none":
        return method
    return add_importance_weight(method, **config.importance)


def check_settings(config: ConfigDict) -> None:
    """What every program needs of a configuration, whether or not it trains.

    Raises:
      InputError: an unknown key, or a value of the wrong type or out of range.
    """
    _check_keys(config.to_dict(), default().to_dict(), prefix="")
    _check_templates(config)
    _check_ranges(config)
    _check_rewards(config)


FREE_FORM = ("method", "templates")  # keys are not those of `default()`


def _check_keys(config: Mapping, expected: Mapping, prefix: str) -> None:
    for key in expected:
        if key not in config:
            raise InputError(f"{prefix}{key}: missing from the configuration")
    for key, value in config.items():
        if key not in expected:
            raise InputError(f"{prefix}{key}: unknown, expected one of {sorted(expected)}")
        if not isinstance(expected[key], Mapping):
            _check_type(f"{prefix}{key}", value, type(expected[key]))
        elif not isinstance(value, Mapping):
            raise InputError(f"{prefix}{key}: expected a group of settings, got {value!r}")
        elif key not in FREE_FORM:
            _check_keys(value, expected[key], f"{prefix}{key}.")


def _check_type(field: str, value: Any, annotation: Any) -> None:
    if not _is_a(value, annotation):
        raise InputError(f"{field}: expected {_describe(annotation)}, got {value!r}")


def _describe(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        kind, limits = get_args(annotation)
        return f"{_describe(kind)} {limits.text}"
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(map(_describe, get_args(annotation)))
    names = {type(None): "None", tuple[float, float]: "two numbers"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _is_a(value: Any, annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        kind, limits = get_args(annotation)
        return _is_a(value, kind) and limits.hold(value)
    if get_origin(annotation) in (Union, UnionType):
        return any(_is_a(value, option) for option in get_args(annotation))
    if get_origin(annotation) is tuple:
        items = get_args(annotation)
        fits = isinstance(value, tuple | list) and len(value) == len(items)
        return fits and all(map(_is_a, value, items))
    if annotation is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is str:
        return is_text(value)
    return isinstance(value, annotation)


def _check_templates(config: ConfigDict) -> None:
    for name, fields in config.templates.to_dict().items():
        if name not in contexts.TEMPLATES:
            known = sorted(contexts.TEMPLATES)
            raise InputError(f"templates.{name}: unknown, expected one of {known}")
        if not isinstance(fields, Mapping):
            raise InputError(f"templates.{name}: expected user, system or tail, got {fields!r}")
        for field, text in fields.items():
            if field not in TEXTS:
                raise InputError(f"templates.{name}.{field}: unknown, expected one of {TEXTS}")
            _check_type(f"templates.{name}.{field}", text, str)
            known = {"problem", *_slots(contexts.TEMPLATES[name].text())}
            for slot in _slots(text) - known:
                raise InputError(
                    f"templates.{name}.{field}: unknown slot {{{slot}}}, expected {sorted(known)}"
                )
        if "problem" not in _slots(Template(**fields).text()):
            raise InputError(f"templates.{name}: expected the slot {{problem}}, got {fields}")


def _slots(text: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", text))


AT_LEAST_1 = """
    steps rollout.prompts rollout.group_size rollout.max_prompt rollout.max_hint_prompt
    rollout.max_response rollout.max_rounds optimizer.mini_batches optimizer.epochs
    compute.tokens compute.chunk mesh.data mesh.fsdp mesh.tensor evaluation.every
    evaluation.samples checkpoint.every checkpoint.keep verifier.workers
"""
AT_LEAST_0 = """
    seed data.seed data.num_train data.num_test rollout.top_k rollout.temperature lora.rank
    rollout.slots rollout.lanes optimizer.warmup_steps
"""
MORE_THAN_0 = """
    optimizer.learning_rate optimizer.clip_norm optimizer.eps importance.cap lora.alpha
    verifier.timeout_s
"""


def _check_ranges(config: ConfigDict) -> None:
    for field in AT_LEAST_1.split():
        _expect(config, field, lambda x: x >= 1, "at least 1")
    for field in AT_LEAST_0.split():
        _expect(config, field, lambda x: x >= 0, "at least 0")
    for field in MORE_THAN_0.split():
        _expect(config, field, lambda x: x > 0, "more than 0")
    for field in ("optimizer.b1", "optimizer.b2"):
        _expect(config, field, lambda x: 0 <= x < 1, "in [0, 1)")
    _expect(config, "output_dir", lambda x: x != "", "a folder")
    _expect(config, "seed", lambda x: x < 2**32, "less than 2**32")
    _expect(config, "rollout.top_p", lambda x: 0 < x <= 1, "in (0, 1]")
    names = [f"{name}_proj" for name in LINEAR]
    _expect(
        config,
        "lora.targets",
        lambda x: x and all(x.count(name) == 1 and name in names for name in x),
        f"some of {names}, each once",
    )
    _expect(config, "rollout.presence_penalty", lambda x: abs(x) <= 2, "in [-2, 2]")
    _expect(config, "optimizer.schedule", lambda x: x in SCHEDULES, f"one of {SCHEDULES}")
    _expect(config, "data.verifier", lambda x: x in VERIFIERS, f"one of {sorted(VERIFIERS)}")
    levels = ("none", *IMPORTANCE)
    _expect(config, "importance.level", lambda x: x in levels, f"one of {levels}")
    _expect(config, "compute.dtype", lambda x: x in DTYPES, f"one of {DTYPES}")
    policies = tuple(REMAT)
    _expect(config, "compute.remat", lambda x: x in policies, f"one of {policies}")
    split = config.mesh.data * config.mesh.fsdp
    for field in ("rollout.prompts", "rollout.slots"):
        expected = f"a multiple of {split}, mesh.data times mesh.fsdp"
        _expect(config, field, lambda x: x % split == 0, expected)


def _check_sizes(config: ConfigDict) -> None:
    """What only training asks of a batch."""
    _expect(config, "rollout.temperature", lambda x: x > 0, "more than 0: RL needs sampling")
    prompts = config.rollout.prompts
    _expect(
        config,
        "optimizer.mini_batches",
        lambda x: prompts % x == 0,
        f"a divisor of {prompts} prompts",
    )
    longest = config.rollout.max_prompt + config.rollout.max_response
    _expect(config, "compute.tokens", lambda x: x >= longest, f"at least the {longest} of a row")


def _check_rewards(config: ConfigDict) -> None:
    c = config.reward
    for target in c.functions:
        if not isinstance(target, str) or not re.fullmatch(r".+:[^\W\d]\w*", target):
            raise InputError(
                f"reward.functions: expected 'file.py:name' or 'module:name', got {target!r}"
            )
    names = [target.rpartition(":")[2] for target in c.functions]
    if len(set(names)) < len(names):
        raise InputError(f"reward.functions: expected different names, got {names}")
    for weight in c.weights:
        _check_type("reward.weights", weight, float)
    if c.weights and len(c.weights) != len(names):
        raise InputError(
            f"reward.weights: expected {len(names)} numbers, one a function, got {c.weights}"
        )
    _expect(config, "reward.timeout_s", lambda x: x > 0, "more than 0")


def _expect(config: ConfigDict, field: str, holds, expected: str) -> None:
    value = config
    for key in field.split("."):
        value = value[key]
    if not holds(value):
        raise InputError(f"{field}: expected {expected}, got {value!r}")


def _method(config: ConfigDict) -> Method:
    hyper = config.method.to_dict()
    name = hyper.pop("name", None)
    factories = METHODS | PRESETS
    if not isinstance(name, str) or name not in factories:
        raise InputError(f"method.name: expected one of {sorted(factories)}, got {name!r}")
    factory = factories[name]
    allowed = inspect.signature(factory).parameters
    plain = getattr(factory, "func", factory)  # a preset is a partial
    types = get_type_hints(plain, include_extras=True)
    for key, value in hyper.items():
        if key not in allowed:
            raise InputError(f"method.{key}: {name} has {sorted(allowed)}, got {key!r}")
        _check_type(f"method.{key}", value, types[key])
    for key, parameter in allowed.items():
        if parameter.default is parameter.empty and key not in hyper:
            raise InputError(f"method.{key}: {name} cannot do without it")
    try:
        return factory(**hyper)
    except ValueError as error:
        raise InputError(f"method.{error}") from error


def _check_grading(config: ConfigDict, method: Method) -> None:
    """Lets the method grade a made-up group, so that it can refuse the run's lengths."""
    G, nothing = config.rollout.group_size, np.zeros(config.rollout.group_size, int)
    verdicts = Verdicts(
        correct=nothing > 0,
        graded=nothing == 0,
        score=nothing.astype(float),
        length=nothing,
        truncated=nothing > 0,
        group_size=G,
        max_length=config.rollout.max_response,
    )
    try:
        method.grade(verdicts)
    except ValueError as error:
        raise InputError(f"method.{error}") from error


def check_writable(folder: Path) -> None:
    """`output_dir` exists, or is made, and can be written; InputError otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise InputError(
            f"output_dir: expected a folder that can be written, got {folder}: {reason}"
        ) from error


def templates(config: ConfigDict) -> dict[str, Template]:
    """The default templates with those of the configuration in their place.

    Only "nothing" is a prompt of the student's; teachers of the context `nothing` have it too.
    """
    own = {name: Template(**fields) for name, fields in config.templates.items()}
    return {
        name: template._replace(
            thinking=config.thinking["student" if name == "nothing" else "teacher"]
        )
        for name, template in {**contexts.TEMPLATES, **own}.items()
    }


def lora(config: Mapping[str, Any]) -> Lora | None:
    """The adapters that are trained, None where all weights are."""
    c = config["lora"]
    targets = tuple(name.removesuffix("_proj") for name in c["targets"])
    return Lora(c["rank"], c["alpha"], targets) if c["rank"] else None


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW on the clipped gradient, with warm-up and schedule; `update` takes the `step`."""
    c = config.optimizer
    decay_steps = max(config.steps - c.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(c.learning_rate),
        "linear": optax.linear_schedule(
            c.learning_rate, c.final_scale * c.learning_rate, decay_steps
        ),
        "cosine": optax.cosine_decay_schedule(c.learning_rate, decay_steps, c.final_scale),
    }[c.schedule]
    # The first step is number 0: (step + 1) / warmup_steps keeps it from being wasted.
    warmup = optax.linear_schedule(
        c.learning_rate / max(c.warmup_steps, 1), c.learning_rate, max(c.warmup_steps - 1, 1)
    )
    rate = optax.join_schedules([warmup, after], [c.warmup_steps])
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm),
        optax.scale_by_adam(c.b1, c.b2, c.eps),
        optax.add_decayed_weights(c.weight_decay),
        _scale_by_rate(rate),
    )


def _scale_by_rate(rate: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Minus `rate(step)`. optax would count updates, of which a step has several or none."""

    def update(updates, state, params=None, *, step, **others):
        del params, others
        return jax.tree.map(lambda x: -rate(step) * x, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
