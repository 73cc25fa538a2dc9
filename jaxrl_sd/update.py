"""The device side of a step: score, credit, update with teacher refresh.

Batches are scored and trained on part by part (packing.py). Losses are sums over tokens whose
weights were computed from whole mini-batches, so the gradients of parts simply add up.
"""

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxrl_sd import losses, sharding, stats
from jaxrl_sd.methods.base import Method, Metrics, Request, Teacher
from jaxrl_sd.model import Compute, ModelConfig, join
from jaxrl_sd.scoring import by_row, token_stats
from jaxrl_sd.teachers import Source
from jaxrl_sd.types import Array, Batch, Params, Part
from jaxrl_sd.vocabulary import STUDENT

ALWAYS_SCORED = {"old_logp": (None, stats.log_prob), "entropy": (None, stats.entropy)}
ALWAYS_PROBED = {"logp": (None, stats.log_prob)}

Scores = dict[str, Array]  # f32[B, T], 0 where nothing trains or the teacher is silent


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


class Sums(NamedTuple):
    """What the parts of a mini-batch add up to."""

    gradient: Params
    loss: Array  # f32[]
    metrics: Metrics


class Steps(NamedTuple):
    """The device functions of a training step, each jitted; `score` and `update` run them."""

    score: Callable[[State, Scores, Part], Scores]  # fills in the rows of a part
    credit: Callable[[Batch, Array], tuple[Batch, Metrics]]  # gives tokens their weights, too
    zeros: Callable[[State, Batch, Part], Sums]
    add: Callable[[Sums, State, Batch, Part], Sums]
    apply: Callable[[State, Sums, Batch, Array], tuple[State, Metrics]]  # one optimiser update
    finish: Callable[[State], State]  # teacher refresh and step number, after the last update
    scored: tuple[str, ...]  # names of what `score` fills in
    read: frozenset[str]  # the models whose streams `zeros` and `add` read


Parts = Sequence[Sequence[Part]]  # of each mini-batch


def score(steps: Steps, state: State, batch: Batch, parts: Parts) -> Batch:
    """Adds the scores of all rows."""
    return batch.replace(scores=fill(steps.score, steps.scored, state, batch, parts))


def fill(score, names: Sequence[str], state: State, batch: Batch, parts: Parts) -> Scores:
    """What a function of `make_score` gives for all rows."""
    mask_t = batch.rollouts.mask_t
    scores = {name: jnp.zeros_like(mask_t, device=mask_t.sharding) for name in names}
    for part in itertools.chain(*parts):
        scores = score(state, scores, part)
    return scores


def update(
    steps: Steps, state: State, batch: Batch, parts: Parts, epochs: int
) -> tuple[State, Metrics]:
    """Trains on a credited batch: an optimiser update a mini-batch, in order, `epochs` times.

    Donates the state.
    """
    metrics = []
    for _ in range(epochs):
        for i, mini_batch in enumerate(parts):
            # Other sizes of a stream that they do not read would compile them again.
            mini_batch = [_only(steps.read, part) for part in mini_batch]
            sums = steps.zeros(state, batch, mini_batch[0])
            for part in mini_batch:
                sums = steps.add(sums, state, batch, part)
            state, of_update = steps.apply(state, sums, batch, i)
            metrics.append(of_update)
    return steps.finish(state), _mean(metrics)


def _only(models: Collection[str], part: Part) -> Part:
    return part.replace(streams={n: s for n, s in part.streams.items() if n in models})


@jax.jit
def _mean(metrics: list[Metrics]) -> Metrics:
    """Over the updates that had a token to train on."""
    metrics = jax.tree.map(lambda *x: jnp.stack(x), *metrics)
    has_tokens = metrics["empty"] == 0
    num = jnp.maximum(has_tokens.sum(), 1)
    means = {name: jnp.where(has_tokens, x, 0.0).sum() / num for name, x in metrics.items()}
    # The first update is on policy, so its ratio is 1 up to rounding, or something is wrong.
    means["first_ratio"] = metrics["ratio"][jnp.argmax(has_tokens)]
    return {**means, "empty": metrics["empty"].mean()}


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


def weigh(method: Method, batch: Batch, mini_batches: int) -> Batch:
    """Adds the weights that average over the tokens of each mini-batch, whole groups in order."""
    mask_t = method.mask(batch)
    parts = mask_t.reshape(mini_batches, -1, mask_t.shape[1])
    return batch.replace(weight_t=jax.vmap(method.weight)(parts).reshape(mask_t.shape))


def make_score(
    requests: Mapping[str, Request],
    method: Method,
    configs: Mapping[str, ModelConfig],
    temperature: float,
    compute: Compute,
) -> Callable[[State, Scores, Part], Scores]:
    """A jitted function that adds a part's statistics to {name: f32[B, T]}."""

    # Placed as they are given to the next call, which else would be compiled again.
    placement = None if compute.mesh is None else sharding.of_rows(compute.mesh)

    @partial(jax.jit, donate_argnums=1, out_shardings=placement)
    def score(state: State, scores: Scores, part: Part) -> Scores:
        teachers = teacher_params(method.teachers, state)
        out = token_stats(requests, state.policy(), teachers, part, configs, temperature, compute)
        # A place beyond the last row is dropped.
        row = jnp.take_along_axis(part.rows, part.row, axis=1, mode="fill", fill_value=2**30)
        return {name: x.at[row, part.t].set(out[name], mode="drop") for name, x in scores.items()}

    return score


def make_probes(
    method: Method, configs: Mapping[str, ModelConfig], temperature: float, compute: Compute
) -> Callable[[State, Batch, Parts], Scores]:
    """(state, batch, parts) -> {name: f32[B, T]}: the values of the method's probes, for people."""
    if not method.probe:
        return lambda state, batch, parts: {}
    score = make_score(method.probe, method, configs, temperature, compute)
    return partial(fill, score, tuple(method.probe))


def make_steps(
    method: Method,
    optimizer: optax.GradientTransformation,
    configs: Mapping[str, ModelConfig],
    *,
    mini_batches: int,
    temperature: float,
    compute: Compute,
) -> Steps:
    """Compiles a method's device functions.

    Args:
      method: see `methods.base.Method`.
      optimizer: applied to the gradient of each mini-batch; is given `step` as an extra argument.
      configs: of the student, under `STUDENT`, and of each teacher.
      mini_batches: parts of whole groups into which a batch is split, one optimiser update each;
        must divide P.
      temperature: of sampling; scales logits everywhere.
      compute: how forward passes are computed; states live on its mesh, see `sharding.of_state`.
    """
    sources = {t.source.name: t.source for t in method.teachers.values()}
    optimizer = optax.with_extra_args_support(optimizer)
    probes = {**ALWAYS_PROBED, **method.probe}
    requests = {**ALWAYS_SCORED, **method.score}

    def placed(tree):
        """As the next call is given it: other shardings would compile everything again."""
        if compute.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, sharding.of_state(tree, compute.mesh))

    @jax.jit
    def credit(batch: Batch, step: Array) -> tuple[Batch, Metrics]:
        credit, metrics = method.credit(batch, step)
        mask_t = method.mask(batch)
        credit = jax.tree.map(lambda x: jnp.where(mask_t != 0, x, 0.0), credit)
        return weigh(method, batch.replace(credit=credit), mini_batches), metrics

    def loss_sum(params, state, teachers, batch, part):
        policy = state.replace(params=params).policy()
        probed = token_stats(probes, policy, teachers, part, configs, temperature, compute)
        T = batch.weight_t.shape[1]
        probed = {name: by_row(x, part, T) for name, x in probed.items()}
        loss_t, metrics_t = method.loss(probed, batch, state.step)
        metrics_t = {**metrics_t, "ratio": jnp.exp(probed["logp"] - batch.scores["old_logp"])}
        total = partial(losses.weighted_sum, weight_t=batch.weight_t)
        return total(loss_t), {name: total(x) for name, x in metrics_t.items()}

    def sums_of(state: State, batch: Batch, part: Part) -> Sums:
        teachers = teacher_params(method.teachers, state)
        of_part = take_rows(batch, part.rows.reshape(-1))
        (loss, metrics), gradient = jax.value_and_grad(loss_sum, has_aux=True)(
            state.params, state, teachers, of_part, part
        )
        return Sums(gradient, loss, metrics)

    @jax.jit
    def zeros(state: State, batch: Batch, part: Part) -> Sums:
        shapes = jax.eval_shape(sums_of, state, batch, part)
        return placed(jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes))

    @partial(jax.jit, donate_argnums=0)
    def add(sums: Sums, state: State, batch: Batch, part: Part) -> Sums:
        return placed(jax.tree.map(jnp.add, sums, sums_of(state, batch, part)))

    @partial(jax.jit, donate_argnums=0)
    def apply(state: State, sums: Sums, batch: Batch, i: Array) -> tuple[State, Metrics]:
        weight = batch.weight_t.reshape(mini_batches, -1)[i].sum()
        norm = optax.tree.norm(sums.gradient)
        # Neither a gradient that is not finite nor a mini-batch without a token moves anything.
        applied = jnp.isfinite(norm) & (weight > 0)
        updates, opt_state = optimizer.update(
            sums.gradient, state.opt_state, state.params, step=state.step
        )
        new = (optax.apply_updates(state.params, updates), opt_state)
        old = (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda n, o: jnp.where(applied, n, o), new, old)
        metrics = {name: x / jnp.where(weight > 0, weight, 1.0) for name, x in sums.metrics.items()}
        metrics |= {"loss": sums.loss, "grad_norm": norm, "skipped": 1.0 - jnp.isfinite(norm)}
        metrics["empty"] = 1.0 - (weight > 0)
        return placed(state.replace(params=params, opt_state=opt_state)), metrics

    @partial(jax.jit, donate_argnums=0)
    def finish(state: State) -> State:
        step = state.step + 1
        teachers = {
            name: source.refresh(state.teachers[name], state.params, step)
            for name, source in sources.items()
        }
        return placed(state.replace(teachers=teachers, step=step))

    score = make_score(requests, method, configs, temperature, compute)
    read = frozenset(STUDENT if teacher is None else teacher for teacher, _ in probes.values())
    return Steps(score, credit, zeros, add, apply, finish, tuple(requests), read)


def take_rows(batch: Batch, rows: Array) -> Batch:
    """Some rows of a batch; one that it does not have is all 0, and so without weight."""
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="fill", fill_value=0), batch)
