"""The device functions of a configuration with the shapes of their arguments, and no array.

It needs no weights, no data and no device: models that are not there are known by their names.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxrl_sd import config as configuration
from jaxrl_sd import hlo, model, packing, sampler, sharding, weights
from jaxrl_sd.attention import KERNEL_BLOCK
from jaxrl_sd.methods import Method
from jaxrl_sd.model import Compute, ModelConfig
from jaxrl_sd.sampler import SamplingConfig
from jaxrl_sd.start import prompts, stream_sizes
from jaxrl_sd.types import Batch, Hints, InputError, Part, Rollouts
from jaxrl_sd.update import State, init_state, make_steps
from jaxrl_sd.vocabulary import STUDENT


def qwen3(hidden: int, feed_forward: int, layers: int, heads: int, tied: bool) -> ModelConfig:
    """Qwen3's dense models (2505.09388, Table 1, and their config.json)."""
    return ModelConfig(
        vocab_size=151_936,
        num_tokens=151_669,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_embeddings=tied,
    )


MODELS = {
    "Qwen3-0.6B": qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen3-14B": qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen3-32B": qwen3(5120, 25600, 64, 64, tied=False),
}
STOP_IDS = (151_645, 151_643)  # <|im_end|> and <|endoftext|>, which also pads


class Call(NamedTuple):
    """A jitted function with what it is given, shapes with shardings in place of arrays."""

    function: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = MappingProxyType({})
    beside: Any = ()  # what else is on the devices meanwhile
    trips: Mapping[str, float] = MappingProxyType({})  # how long dynamic loops are at most

    def lower(self) -> jax.stages.Lowered:
        return self.function.lower(*self.arguments, **self.options)

    @property
    def result(self) -> Any:
        """What the function returns, where its compiler places it."""
        shapes = jax.eval_shape(partial(self.function, **self.options), *self.arguments)
        return sharding.placed(shapes, self.lower().compile().output_shardings)


def read_model(path: str) -> ModelConfig:
    """The architecture in a folder, or of the hub's model of that name if there is no such folder.

    Raises:
      InputError: neither is there.
    """
    if Path(path).exists():
        return weights.load_config(path)
    name = Path(path).name.removesuffix("-Base")
    if name not in MODELS:
        raise InputError(
            f"model.path: {path} is no folder, and of hub models only {sorted(MODELS)} are known"
        )
    return MODELS[name]


def calls(config: ConfigDict, mesh: Mesh) -> dict[str, Callable[[], Call]]:
    """Every device function of a training step, by name, as the configuration would call it.

    Where a function's arguments are placed is decided by the compiler of the one before it. So a
    call of the sampler compiles those.
    """
    method = configuration.check(config)
    paths = {t.source.checkpoint for t in method.teachers.values()} - {STUDENT}
    models = {path: read_model(path) for path in paths}
    student = replace(read_model(config.model.path), lora=configuration.lora(config))
    configs = {n: models.get(t.source.checkpoint, student) for n, t in method.teachers.items()}
    configs[STUDENT] = student
    c = config.compute
    compute = Compute(dtype=c.dtype, remat=c.remat, chunk=c.chunk, mesh=mesh)
    steps = make_steps(
        method,
        configuration.optimizer(config),
        configs,
        mini_batches=config.optimizer.mini_batches,
        temperature=config.rollout.temperature,
        compute=compute,
    )
    state = abstract_state(config, method, models | {STUDENT: student}, mesh)
    batch = abstract_batch(config, method, mesh)
    part = abstract_part(config, method, mesh)
    scores = _rows({n: batch.rollouts.mask_t for n in steps.scored}, mesh)
    scored = batch.replace(scores=scores)
    credited = _rows(jax.eval_shape(steps.credit, scored, state.step)[0], mesh)
    sums = _state(jax.eval_shape(steps.zeros, state, credited, part), mesh)
    i = jax.ShapeDtypeStruct((), jnp.int32)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    trips = {"chunks": -(-part.token.shape[1] // c.chunk)}
    training = {
        "score": Call(steps.score, (state, scores, part), beside=batch, trips=trips),
        "credit": Call(steps.credit, (scored, step), beside=state),
        "update": Call(steps.add, (sums, state, credited, part), trips=trips),
        "apply": Call(steps.apply, (state, sums, credited, i)),
        "finish": Call(steps.finish, (state,), beside=credited),
    }
    sampling = sampler_calls(config, student, compute, state)
    return sampling | {name: partial(_same, call) for name, call in training.items()}


def attention_flops(config: ConfigDict) -> hlo.Kernel:
    """FLOPs of the attention kernels, for prompts and responses of full length.

    A query of a response sees the prompt and half of the response. The kernels are told apart by
    the number of queries: of a model's stream, or else of prompts alone.
    """
    method = configuration.check(config)
    r, sizes = config.rollout, stream_sizes(config, method)
    known, T, G = prompts(config, method), r.max_response, r.group_size
    groups = config.compute.tokens / (r.max_prompt + G * T)
    rows = groups * G if groups > 1 else (config.compute.tokens - r.max_prompt) / T

    def pairs(name: str) -> float:
        S, shared = known[name]
        return (max(groups, 1) if shared else rows) * S**2 / 2 + rows * (T * S + T**2 / 2)

    of_stream = {size.tokens: pairs(name) for name, size in sizes.streams.items()}

    def flops(kernel: str, operands: tuple[hlo.Array, ...]) -> float:
        heads, queries, head_dim = next(a.shape[-3:] for a in operands if a.dtype == "bf16")
        near = [n for n in of_stream if n <= queries < n + KERNEL_BLOCK]
        seen = of_stream[near[0]] if near else queries**2 / 2
        products = next(n for part, n in PRODUCTS.items() if part in kernel)
        return 2 * heads * head_dim * seen * products

    return flops


PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}  # of queries by keys, in each kernel of SplashAttention


def _same(call: Call) -> Call:
    return call


def abstract_state(
    config: ConfigDict, method: Method, models: Mapping[str, ModelConfig], mesh: Mesh
) -> State:
    """The state before the first step."""
    initial = {path: _shapes(model.param_shapes(c)) for path, c in models.items()}
    params = initial[STUDENT]
    initial[STUDENT] = {}
    if models[STUDENT].lora is not None:
        params, initial[STUDENT] = _shapes(model.adapter_shapes(models[STUDENT])), params
    optimizer = configuration.optimizer(config)
    state = jax.eval_shape(
        lambda params, frozen: init_state(params, frozen, optimizer, method.teachers, 0),
        params,
        initial,
    )
    return _state(state, mesh)


def abstract_batch(config: ConfigDict, method: Method, mesh: Mesh) -> Batch:
    """A batch before it is scored."""
    return _rows(_batch(config, method), mesh)


def _batch(config: ConfigDict, method: Method) -> Batch:
    r = config.rollout
    B = r.prompts * r.group_size

    def zeros(dtype, *shape):
        return np.zeros((B, *shape), dtype)

    i32, f32 = np.int32, np.float32
    tokens, number, value = (i32, r.max_response), (f32, r.max_response), (f32,)
    rollouts = Rollouts(
        prompt=zeros(i32, r.max_prompt),
        prompt_length=zeros(i32),
        response=zeros(*tokens),
        mask_t=zeros(*number),
        sampler_logp_t=zeros(*number),
        behaviour_logp_t=zeros(*number),
        reward=zeros(*value),
        correct=zeros(*value),
        graded=zeros(*value),
        group_size=r.group_size,
    )
    hint = Hints(zeros(i32, r.max_hint_prompt), zeros(i32), zeros(i32))
    return Batch(rollouts, dict.fromkeys(method.teachers, hint))


def abstract_part(config: ConfigDict, method: Method, mesh: Mesh) -> Part:
    """What is computed at a time."""
    streams = sharding.row_devices(mesh)
    sizes = stream_sizes(config, method)
    return _rows(packing.pack(_batch(config, method), sizes, streams, rows=[])[0], mesh)


def sampler_calls(
    config: ConfigDict, student: ModelConfig, compute: Compute, state: State
) -> dict[str, Callable[[], Call]]:
    """Prompts and responses of full length."""
    r = config.rollout
    sampling = SamplingConfig(
        max_response=r.max_response,
        stop_ids=STOP_IDS,
        pad_id=STOP_IDS[-1],
        temperature=r.temperature,
        top_k=r.top_k,
        top_p=r.top_p,
        presence_penalty=r.presence_penalty,
        slots=r.slots,
        lanes=r.lanes,
    )
    P, S, T, mesh = r.prompts, r.max_prompt, r.max_response, compute.mesh
    sizes = {"num_prompts": P, "group_size": r.group_size, "width": S}
    static = {"sampling": sampling, "config": student, "compute": compute}
    asked = _rows((np.zeros((P, S), np.int32), np.zeros(P, np.int32)), mesh)
    refill = np.arange(sharding.row_devices(mesh))
    of_model = {"config": student, "compute": compute}
    beside = state  # all of it: the decoder has its own copy of the weights

    @cache
    def params() -> Any:
        return unstack().result

    @cache
    def slots(columns: int) -> Any:
        first = Call(sampler.start, (), sizes | static).result
        if columns <= sampler.first_columns(T):
            return first
        k, v, column = widen(first, columns).result
        cache = [layer._replace(response_k=k, response_v=v) for layer in first.cache]
        return first.replace(cache=cache, column=column)

    def unstack() -> Call:
        return Call(sampler.unstack, (state.policy(),), of_model, beside)

    def widen(slots: Any, columns: int) -> Call:
        k, v = slots.cache[0][-2:]
        return Call(sampler.widen, (k, v, slots.column), {"columns": columns, "compute": compute})

    def grow() -> Call:
        first, *others = slots(T).cache  # all but the first layer are as wide already
        last = widen(slots(-(-T // 2)), T)
        return last._replace(beside=(beside, params(), slots(T).replace(cache=[first[:2], others])))

    def prefill() -> Call:
        arguments = (params(), slots(T), *asked, refill, refill)
        return Call(sampler.fill, arguments, {"width": S} | static, beside)

    def decode() -> Call:
        key = jax.eval_shape(jax.random.key, 0)
        return Call(sampler.advance, (params(), key, slots(T), refill[0]), static, beside)

    return {"unstack": unstack, "grow": grow, "prefill": prefill, "decode": decode}


def _shapes(tree: Any) -> Any:
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def _rows(tree: Any, mesh: Mesh) -> Any:
    return sharding.placed(tree, jax.tree.map(lambda _: sharding.of_rows(mesh), tree))


def _state(tree: Any, mesh: Mesh) -> Any:
    return sharding.placed(tree, sharding.of_state(tree, mesh))
