"""The device side of a step: score, credit, update with teacher refresh, each one jitted."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxrl_sd import losses, stats
from jaxrl_sd.methods.base import Method, Metrics, Teacher
from jaxrl_sd.model import ModelConfig
from jaxrl_sd.scoring import token_stats
from jaxrl_sd.types import Array, Batch, Params

ALWAYS_SCORED = {"old_logp": (None, stats.log_prob), "entropy": (None, stats.entropy)}
ALWAYS_PROBED = {"logp": (None, stats.log_prob)}


@flax.struct.dataclass
class State:
    """Everything that training changes on the device."""

    params: Params
    opt_state: Any
    teachers: dict[str, Any]  # state of each source, by the source's name
    step: Array  # i32[], finished updates
    key: Array  # u32[2], data of the run's random key; steps fold their number into it


class Steps(NamedTuple):
    """The three device functions of a training step."""

    score: Callable[[State, Batch], Batch]
    credit: Callable[[Batch, Array], tuple[Batch, Metrics]]
    update: Callable[[State, Batch], tuple[State, Metrics]]


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    teachers: Mapping[str, Teacher],
    seed: int,
) -> State:
    """The state before the first update."""
    sources = {t.source.name: t.source for t in teachers.values()}
    return State(
        params=params,
        opt_state=optimizer.init(params),
        teachers={name: source.init(params) for name, source in sources.items()},
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.key(seed)),
    )


def teacher_params(teachers: Mapping[str, Teacher], state: State) -> dict[str, Params]:
    """Parameters of each teacher, by teacher name."""
    return {
        name: teacher.source.params(state.teachers[teacher.source.name], state.params)
        for name, teacher in teachers.items()
    }


def make_steps(
    method: Method,
    optimizer: optax.GradientTransformation,
    config: ModelConfig,
    *,
    micro_batches: int,
    temperature: float,
    chunk: int,
) -> Steps:
    """Compiles a method's device functions.

    Args:
      method: see `methods.base.Method`.
      optimizer: applied to the gradient of the whole batch.
      config: of the model.
      micro_batches: parts into which the batch's rows are split; must divide B. Their gradients
        add up to the whole batch's.
      temperature: of sampling; scales logits everywhere.
      chunk: see `scoring.token_stats`.
    """
    statistics = partial(token_stats, config=config, temperature=temperature, chunk=chunk)

    @jax.jit
    def score(state: State, batch: Batch) -> Batch:
        teachers = teacher_params(method.teachers, state)
        scores = statistics({**ALWAYS_SCORED, **method.score}, state.params, teachers, batch)
        return batch.replace(scores=scores)

    @jax.jit
    def credit(batch: Batch, step: Array) -> tuple[Batch, Metrics]:
        mask_t = batch.rollouts.mask_t
        credit, metrics = method.credit(batch, step)
        credit = jax.tree.map(lambda x: jnp.where(mask_t != 0, x, 0.0), credit)
        batch = batch.replace(credit=credit, weight_t=method.weight(mask_t))
        return batch, metrics

    def loss_sum(params, teachers, batch, step):
        probed = statistics({**ALWAYS_PROBED, **method.probe}, params, teachers, batch)
        loss_t, metrics_t = method.loss(probed, batch, step)
        total = partial(losses.weighted_sum, weight_t=batch.weight_t)
        return total(loss_t), {name: total(x) for name, x in metrics_t.items()}

    @partial(jax.jit, donate_argnums=0)
    def update(state: State, batch: Batch) -> tuple[State, Metrics]:
        teachers = teacher_params(method.teachers, state)

        def gradient_of(micro_batch):
            (loss, metrics), gradient = jax.value_and_grad(loss_sum, has_aux=True)(
                state.params, teachers, micro_batch, state.step
            )
            return gradient, {"loss": loss, **metrics}

        def add(total, micro_batch):
            return jax.tree.map(jnp.add, total, gradient_of(micro_batch)), None

        parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
        shapes = jax.eval_shape(gradient_of, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
        (gradient, metrics), _ = jax.lax.scan(add, zeros, parts)
        return _apply(state, gradient, metrics)

    def _apply(state, gradient, metrics):
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        step = state.step + 1
        sources = {t.source.name: t.source for t in method.teachers.values()}
        refreshed = {
            name: source.refresh(state.teachers[name], params, step)
            for name, source in sources.items()
        }
        new = (params, opt_state, refreshed)
        old = (state.params, state.opt_state, state.teachers)
        # A non-finite gradient skips the step: nothing is updated, teachers included.
        params, opt_state, refreshed = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        metrics = {**metrics, "grad_norm": norm, "skipped": 1.0 - finite}
        state = State(params, opt_state, refreshed, step, state.key)
        return state, metrics

    return Steps(score, credit, update)
