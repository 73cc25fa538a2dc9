"""Batches of random tokens, and the package's own functions on them. The only module here that
knows how the package is called."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks.models import END, PAD, random_params
from experiments.benchmarks.work import Shape
from jaxrl_sd import decoding, packing, sampler, sharding, update
from jaxrl_sd.methods import METHODS
from jaxrl_sd.methods.base import Method, Teacher
from jaxrl_sd.model import Compute, ModelConfig, head
from jaxrl_sd.sampler import SamplingConfig
from jaxrl_sd.start import possible_hints
from jaxrl_sd.types import Batch, Hints, Problem, Rollouts
from jaxrl_sd.vocabulary import STUDENT

GRPO = METHODS["grpo"](kl_coef=0.0)  # a penalty would need a second model


class Job:
    """A method's score and update on one batch, on one device.

    A teacher reads the prompt and, if it is shown anything, `hint` tokens; where samples of a group
    are shown different things, also a response of the group, one of the first half.

    Args:
      shared: whether a group has one prompt; otherwise every row has its own.
      tokens: of the student that are computed at a time; the whole batch by default.
    """

    def __init__(
        self,
        method: Method,
        config: ModelConfig,
        shape: Shape,
        compute: Compute,
        *,
        shared: bool = True,
        hint: int = 32,
        tokens: int | None = None,
    ):
        mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1)
        compute = replace(compute, mesh=mesh)
        optimizer = optax.with_extra_args_support(optax.adamw(1e-6))
        names = STUDENT, *method.teachers
        self.steps = update.make_steps(
            method,
            optimizer,
            dict.fromkeys(names, config),
            mini_batches=1,
            temperature=1.0,
            compute=compute,
        )
        frozen = {STUDENT: {}}
        state = update.init_state(random_params(config), frozen, optimizer, method.teachers, seed=0)
        self.state = jax.device_put(state, sharding.of_state(state, mesh))
        batch = random_batch(method.teachers, config, shape, shared, hint)
        prompts = {STUDENT: packing.Prompts(shape.prompt, shared)}
        for name, teacher in method.teachers.items():
            longest = batch.hints[name].prompt.shape[1]
            prompts[name] = packing.Prompts(longest, teacher.context.shared and shared)
        unshared = shape.rows * (shape.prompt + shape.response)
        capacity = tokens or (shape.tokens if shared else unshared)
        sizes = packing.sizes(prompts, shape.group_size, shape.response, capacity)
        parts = packing.pack(batch, sizes, 1, range(shape.rows))
        self.tokens = {n: int(sum(p.streams[n].count.sum() for p in parts)) for n in names}
        self.num_parts = len(parts)
        batch, self.parts = jax.device_put((batch, [parts]), sharding.of_rows(mesh))
        self.batch = update.score(self.steps, self.state, batch, self.parts)
        self.batch, _ = self.steps.credit(self.batch, 0)

    def score(self):
        """Scores all rows."""
        return update.score(self.steps, self.state, self.batch, self.parts)

    def update(self):
        """One optimiser update on the whole batch."""
        self.state, metrics = update.update(self.steps, self.state, self.batch, self.parts, 1)
        return metrics, self.state.params


def random_batch(
    teachers: dict[str, Teacher], config: ModelConfig, shape: Shape, shared: bool, hint: int
) -> Batch:
    """Rollouts of full length, and hints, on the host."""
    rng = np.random.default_rng(0)
    G, S, T, B = shape.group_size, shape.prompt, shape.response, shape.rows

    def draw(rows: int, length: int) -> np.ndarray:
        return rng.integers(2, config.vocab_size, (rows, length), np.int32)

    prompt = draw(shape.prompts, S).repeat(G, axis=0) if shared else draw(B, S)
    response, ones, none = draw(B, T), np.ones(B, np.float32), np.zeros((B, T), np.float32)
    reward = np.arange(B, dtype=np.float32) % 2
    rollouts = Rollouts(
        prompt=prompt,
        prompt_length=np.full(B, S, np.int32),
        response=response,
        mask_t=none + 1,
        sampler_logp_t=none,
        behaviour_logp_t=none,
        reward=reward,
        correct=reward,
        graded=ones,
        group_size=G,
    )
    shown = np.concatenate([prompt, draw(shape.prompts, hint).repeat(G, axis=0)], axis=1)
    half = max(G // 2, 1)
    peer = np.arange(B) // G * G + rng.integers(half, size=B)
    with_peer = np.concatenate([shown, response[peer]], axis=1)

    def hints(teacher: Teacher) -> Hints:
        ids = with_peer
        if teacher.context.shared:
            ids = shown if is_shown_something(teacher) else prompt
        source = np.full(B, -1, np.int32) if teacher.context.shared else peer.astype(np.int32)
        return Hints(ids, np.full(B, ids.shape[1], np.int32), source)

    return Batch(rollouts, {name: hints(teacher) for name, teacher in teachers.items()})


def is_shown_something(teacher: Teacher) -> bool:
    """Whether a teacher's prompt is another than the student's."""
    hints = possible_hints(Problem("", "", "", solution=""), teacher.context)
    return any(hint.template != "nothing" for hint in hints)


def sampling(config: ModelConfig, shape: Shape, compute: Compute, shared: bool = True):
    """A function that draws the responses of a batch.

    Args:
      shared: whether a prompt is run once for its group, or once for each of its samples.
    """
    params = random_params(config)
    prompt = random_batch({}, config, shape, True, 0).rollouts.prompt
    prompt = jnp.asarray(prompt[:: shape.group_size] if shared else prompt)
    length = jnp.full(len(prompt), shape.prompt)
    settings = SamplingConfig(max_response=shape.response, stop_ids=(END,), pad_id=PAD)

    def draw():
        return sampler.sample(
            params,
            jax.random.key(0),
            prompt,
            length,
            group_size=shape.group_size if shared else 1,
            sampling=settings,
            config=config,
            compute=compute,
        )

    return draw


def products(config: ModelConfig, rows: int, tokens: int, compute: Compute):
    """A function that multiplies `rows` rows with all weights, as decoding so many tokens has to.

    Weights are as the sampler has them. Beside products there is only what keeps XLA from leaving
    any out.
    """
    params = sampler.unstack(random_params(config), config=config, compute=compute)
    start = jax.random.normal(jax.random.key(0), (rows, config.hidden_size), compute.dtype)

    @jax.jit
    def multiply(params, x):
        def token(_, x):
            for layer in params["layers"]:
                project = partial(decoding.linear, layer=layer, config=config)
                q, k, v = (project(x, name=name) for name in "qkv")
                x = project(q + jnp.repeat(k + v, q.shape[1] // k.shape[1], axis=1), name="o")
                x = project(project(x, name="gate") + project(x, name="up"), name="down")
            logits = decoding.product(x, head(params, config))
            logits = jax.lax.optimization_barrier(logits)
            return jnp.tanh(x + logits[:, : config.hidden_size])

        return jax.lax.fori_loop(0, tokens, token, x)

    return lambda: multiply(params, start)
