"""Teacher weights over updates, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_sd import teachers
from jaxrl_sd.vocabulary import STUDENT


def policy(step):
    """Parameters after update `step`; every update adds 1 to one array and 10 to the other."""
    return {"w": jnp.full(3, float(step)), "layer": {"b": jnp.full((2, 2), 10.0 * step)}}


def teacher_after(source, updates):
    """The teacher's parameters after each of `updates` updates, the initial ones first."""
    state = source.init(policy(0))
    refresh = jax.jit(source.refresh)
    seen = [source.params(state, policy(0))]
    for step in range(1, updates + 1):
        state = refresh(state, policy(step), jnp.int32(step))
        seen.append(source.params(state, policy(step)))
    return seen


def values(seen):
    """The teacher's history as one number an update, after a check that all arrays agree."""
    for params in seen:
        np.testing.assert_allclose(params["layer"]["b"], 10 * params["w"][0], rtol=1e-5)
    return [float(params["w"][0]) for params in seen]


def test_current_is_the_policy():
    assert values(teacher_after(teachers.current(), 4)) == [0, 1, 2, 3, 4]


def test_frozen_is_the_initial_policy():
    assert values(teacher_after(teachers.frozen(), 4)) == [0, 0, 0, 0, 0]


def test_external_names_its_checkpoint_and_has_nothing_of_the_policy():
    source = teachers.external("a/folder")
    assert source.checkpoint == "a/folder"
    assert source.name not in (teachers.frozen().name, teachers.external("b/folder").name)
    assert teacher_after(source, 3) == [{}] * 4
    assert all(s.checkpoint == STUDENT for s in (teachers.frozen(), teachers.ema(0.1)))


def test_synced_copies_after_every_third_update():
    # Updates 1 ... 3 use the initial weights, 4 ... 6 those after update 3.
    assert values(teacher_after(teachers.synced(3), 8)) == [0, 0, 0, 3, 3, 3, 6, 6, 6]


def test_synced_to_every_update_is_the_policy_of_that_update():
    assert values(teacher_after(teachers.synced(1), 3)) == [0, 1, 2, 3]


def test_ema_closed_form():
    rate = 0.1
    expected = [
        sum(rate * (1 - rate) ** (n - k) * k for k in range(1, n + 1)) for n in range(0, 21)
    ]
    np.testing.assert_allclose(values(teacher_after(teachers.ema(rate), 20)), expected, rtol=1e-5)


def test_ema_of_a_constant_policy_approaches_it_geometrically():
    source = teachers.ema(0.05)
    state = source.init(policy(0))
    for step in range(1, 31):
        state = source.refresh(state, policy(1), jnp.int32(step))
    np.testing.assert_allclose(state["w"], 1 - 0.95**30, rtol=1e-5)


def test_ema_accumulates_below_the_precision_of_bfloat16():
    # 1 % of a difference of 1 % is lost when added to 1 in bfloat16, once or a hundred times.
    start, end = ({"w": jnp.full(2, x, jnp.bfloat16)} for x in (1.0, 1.0078125))
    source = teachers.ema(0.01)
    state = source.init(start)
    for step in range(1, 301):
        state = source.refresh(state, end, jnp.int32(step))
    teacher = source.params(state, end)
    assert teacher["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(teacher["w"], end["w"])
    np.testing.assert_allclose(state["w"], 1 + 0.0078125 * (1 - 0.99**300), rtol=1e-6)


KEPT = [teachers.frozen(), teachers.synced(10), teachers.ema(0.1)]


@pytest.mark.parametrize("source", [teachers.current(), *KEPT])
def test_a_refresh_keeps_shapes_and_types(source):
    params = {"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones((2, 3), jnp.float32)}
    state = jax.eval_shape(source.init, params)
    assert jax.eval_shape(source.refresh, state, params, jnp.int32(1)) == state
    teacher = jax.eval_shape(source.params, state, params)
    assert teacher == jax.eval_shape(lambda x: x, params)


@pytest.mark.parametrize("source", KEPT)
def test_a_kept_teacher_does_not_alias_the_policy(source):
    params = policy(5)
    state = source.init(params)
    # The update donates the policy's memory.
    jax.tree.map(lambda x: x.delete(), params)
    assert values([source.params(state, policy(6))]) == [5]


@pytest.mark.parametrize(
    ("make", "value"), [(teachers.synced, 0), (teachers.ema, 0.0), (teachers.ema, 1.5)]
)
def test_a_teacher_that_would_never_or_wrongly_move_is_refused(make, value):
    with pytest.raises(ValueError, match=str(value)):
        make(value)


def test_equal_names_mean_equal_behaviour():
    makers = [teachers.current, teachers.frozen, *(lambda n=n: teachers.synced(n) for n in (5, 10))]
    makers += [lambda r=r: teachers.ema(r) for r in (0.01, 0.05)]
    assert [make().name for make in makers] == [make().name for make in makers]
    assert len({make().name for make in makers}) == len(makers)
