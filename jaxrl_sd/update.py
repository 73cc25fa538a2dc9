"""The device side of a step: score, credit, update with teacher refresh, each one jitted."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxrl_sd import losses, sharding, stats
from jaxrl_sd.methods.base import Method, Metrics, Teacher
from jaxrl_sd.model import ModelConfig, join
from jaxrl_sd.scoring import token_stats
from jaxrl_sd.teachers import Source
from jaxrl_sd.types import Array, Batch, Params
from jaxrl_sd.vocabulary import STUDENT

ALWAYS_SCORED = {"old_logp": (None, stats.log_prob), "entropy": (None, stats.entropy)}
ALWAYS_PROBED = {"logp": (None, stats.log_prob)}


@flax.struct.dataclass
class State:
    """Everything that a step needs on the device."""

    params: Params  # what is trained: all weights of the policy, or those of its adapter
    opt_state: Any
    teachers: dict[str, Any]  # state of each source, by the source's name
    step: Array  # i32[], finished steps: batches that were sampled and trained on
    key: Array  # u32[2], data of the run's random key; steps fold their number into it
    frozen: dict[str, Params]  # never trained, by checkpoint; under `STUDENT` below an adapter

    def policy(self) -> Params:
        """All weights of the policy."""
        return join(self.frozen[STUDENT], self.params)


class Steps(NamedTuple):
    """The three device functions of a training step."""

    score: Callable[[State, Batch], Batch]
    credit: Callable[[Batch, Array], tuple[Batch, Metrics]]
    update: Callable[[State, Batch], tuple[State, Metrics]]


def init_state(
    params: Params,
    frozen: Mapping[str, Params],
    optimizer: optax.GradientTransformation,
    teachers: Mapping[str, Teacher],
    seed: int,
) -> State:
    """The state before the first update.

    Args:
      params: what is trained, all weights of the policy or those of its adapter.
      frozen: the weights under the policy's adapter, {} where there is none, under `STUDENT`; and
        those of every checkpoint that a teacher uses, under its path.
    """
    sources = {t.source.name: t.source for t in teachers.values()}
    return State(
        params=params,
        opt_state=optimizer.init(params),
        teachers={name: source.init(params) for name, source in sources.items()},
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(jax.random.key(seed)),
        frozen=dict(frozen),
    )


def teacher_params(teachers: Mapping[str, Teacher], state: State) -> dict[str, Params]:
    """All weights of each teacher, by teacher name: what its source keeps, over what is frozen."""

    def of(source: Source) -> Params:
        kept = source.params(state.teachers[source.name], state.params)
        return join(state.frozen[source.checkpoint], kept)

    return {name: of(teacher.source) for name, teacher in teachers.items()}


def weigh(method: Method, batch: Batch) -> Batch:
    """Adds the weights that average over the tokens of this batch."""
    return batch.replace(weight_t=method.weight(method.mask(batch)))


def make_steps(
    method: Method,
    optimizer: optax.GradientTransformation,
    configs: Mapping[str, ModelConfig],
    *,
    mesh: Mesh,
    mini_batches: int,
    epochs: int,
    micro_batches: int,
    temperature: float,
    chunk: int,
) -> Steps:
    """Compiles a method's device functions.

    Args:
      method: see `methods.base.Method`.
      optimizer: applied to the gradient of each mini-batch; is given `step` as an extra argument.
      configs: of the student, under `STUDENT`, and of each teacher.
      mesh: where states live, see `sharding.of_state`.
      mini_batches: parts of whole groups into which a batch is split, one optimiser update each;
        must divide P.
      epochs: passes over the batch.
      micro_batches: parts into which the rows of a mini-batch are split; must divide them. Their
        gradients add up to the whole mini-batch's.
      temperature: of sampling; scales logits everywhere.
      chunk: see `vocabulary.chunked`.
    """
    statistics = partial(token_stats, configs=configs, temperature=temperature, chunk=chunk)
    sources = {t.source.name: t.source for t in method.teachers.values()}
    optimizer = optax.with_extra_args_support(optimizer)

    @jax.jit
    def score(state: State, batch: Batch) -> Batch:
        teachers = teacher_params(method.teachers, state)
        scores = statistics({**ALWAYS_SCORED, **method.score}, state.policy(), teachers, batch)
        return batch.replace(scores=scores)

    @jax.jit
    def credit(batch: Batch, step: Array) -> tuple[Batch, Metrics]:
        credit, metrics = method.credit(batch, step)
        mask_t = method.mask(batch)
        credit = jax.tree.map(lambda x: jnp.where(mask_t != 0, x, 0.0), credit)
        return batch.replace(credit=credit), metrics

    def loss_sum(params, state, teachers, batch):
        policy = state.replace(params=params).policy()
        probed = statistics({**ALWAYS_PROBED, **method.probe}, policy, teachers, batch)
        loss_t, metrics_t = method.loss(probed, batch, state.step)
        metrics_t = {**metrics_t, "ratio": jnp.exp(probed["logp"] - batch.scores["old_logp"])}
        total = partial(losses.weighted_sum, weight_t=batch.weight_t)
        return total(loss_t), {name: total(x) for name, x in metrics_t.items()}

    def gradient_of(state, mini_batch):
        """Gradient and metrics of a mini-batch, summed over its micro-batches."""
        teachers = teacher_params(method.teachers, state)

        def of_part(part):
            (loss, metrics), gradient = jax.value_and_grad(loss_sum, has_aux=True)(
                state.params, state, teachers, part
            )
            return gradient, loss, metrics

        parts = split(mini_batch, micro_batches)
        shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)
        add = partial(jax.tree.map, jnp.add)
        total, _ = jax.lax.scan(lambda total, part: (add(total, of_part(part)), None), zeros, parts)
        return total

    def update_once(state, mini_batch):
        mini_batch = weigh(method, mini_batch)
        gradient, loss, sums = gradient_of(state, mini_batch)
        norm, weight = optax.tree.norm(gradient), mini_batch.weight_t.sum()
        # Neither a gradient that is not finite nor a batch without a token moves anything.
        applied = jnp.isfinite(norm) & (weight > 0)
        updates, opt_state = optimizer.update(
            gradient, state.opt_state, state.params, step=state.step
        )
        new = (optax.apply_updates(state.params, updates), opt_state)
        old = (state.params, state.opt_state)
        trained = jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)
        metrics = {name: x / jnp.where(weight > 0, weight, 1.0) for name, x in sums.items()}
        metrics |= {"loss": loss, "grad_norm": norm, "skipped": 1.0 - jnp.isfinite(norm)}
        return trained, (metrics, weight > 0)

    @partial(jax.jit, donate_argnums=0)
    def update(state: State, batch: Batch) -> tuple[State, Metrics]:
        parts = split(batch, mini_batches)

        def update_with(trained, i):
            params, opt_state = trained
            now = state.replace(params=params, opt_state=opt_state)
            return update_once(now, jax.tree.map(lambda x: x[i], parts))

        order = jnp.tile(jnp.arange(mini_batches), epochs)
        start = (state.params, state.opt_state)
        (params, opt_state), (metrics, has_tokens) = jax.lax.scan(update_with, start, order)
        step = state.step + 1
        teachers = {
            name: source.refresh(state.teachers[name], params, step)
            for name, source in sources.items()
        }
        state = state.replace(params=params, opt_state=opt_state, teachers=teachers, step=step)
        # The next call is given what this one returns: other shardings would compile it again.
        state = jax.lax.with_sharding_constraint(state, sharding.of_state(state, mesh))
        num = jnp.maximum(has_tokens.sum(), 1)
        means = {name: jnp.where(has_tokens, x, 0.0).sum() / num for name, x in metrics.items()}
        # The first update is on policy, so its ratio is 1 up to rounding, or something is wrong.
        means["first_ratio"] = metrics["ratio"][jnp.argmax(has_tokens)]
        return state, {**means, "empty": 1.0 - has_tokens.mean()}

    return Steps(score, credit, update)


def split(batch: Batch, parts: int) -> Batch:
    """[B, ...] -> [parts, B / parts, ...] for every array of a batch."""
    return jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
