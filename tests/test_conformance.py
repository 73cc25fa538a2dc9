"""Each rule catches the mistake that it is for. That all methods pass is in test_methods.py."""

import jax.numpy as jnp
import pytest

from jaxrl_sd import conformance
from jaxrl_sd.methods import METHODS
from jaxrl_sd.methods.base import Method, advantage, policy_gradient
from jaxrl_sd.types import Credit

RLSD = METHODS["rlsd"]()


def crediting(weight_of_token) -> Method:
    """RLSD with other weights: f(batch) -> f32[B, T]."""

    def credit(batch, step):
        adv_t = advantage(batch)[:, None] * weight_of_token(batch)
        return Credit(adv_t, 0 * adv_t), {}

    return RLSD._replace(credit=credit)


def scoring(gap) -> Method:
    """RLSD whose weights are another statistic."""
    by_gap = crediting(lambda batch: batch.scores["gap"])
    return by_gap._replace(score={"gap": ("teacher", gap)})


def divided_by_the_spread_of_rewards(batch):
    reward = batch.rollouts.reward.reshape(-1, conformance.G)
    return jnp.repeat(1 / reward.std(axis=1), conformance.G)[:, None]


def centred_over_padding(batch):
    return batch.scores["gap"] - batch.scores["gap"].mean(axis=1, keepdims=True)


def logit_of_token(student, teacher, token):
    return jnp.take_along_axis(teacher, token[..., None], axis=-1)[..., 0]


def centred_loss(token_stats, batch, step):
    loss_t, metrics = policy_gradient()(token_stats, batch, step)
    mask_t = batch.rollouts.mask_t
    total = jnp.where(mask_t != 0, loss_t, 0).sum()
    return loss_t - total / jnp.maximum(mask_t.sum(), 1), metrics


def undetached_loss(token_stats, batch, step):
    return -token_stats["logp"] * batch.credit.adv_t, {}


BROKEN = {
    "is_finite": crediting(divided_by_the_spread_of_rewards),
    "ignores_what_is_masked": crediting(centred_over_padding),
    "ignores_padding": RLSD._replace(weight=lambda mask_t: mask_t / mask_t.size),
    "ignores_the_order_of_groups": crediting(lambda batch: jnp.arange(16.0)[:, None]),
    "ignores_the_order_of_the_vocabulary": scoring(lambda student, teacher, token: 1.0 * token),
    "ignores_shifts_of_logits": scoring(logit_of_token),
    "adds_up_over_parts": RLSD._replace(loss=centred_loss),
    "trains_only_through_probes": RLSD._replace(loss=undetached_loss),
    "averages": RLSD._replace(weight=lambda mask_t: mask_t),
}


def test_there_is_a_mistake_for_every_rule():
    assert list(BROKEN) == [rule.__name__ for rule in conformance.RULES]


@pytest.mark.parametrize("rule", BROKEN)
def test_a_mistake_is_caught_by_name(rule):
    with pytest.raises(AssertionError, match=f"^{rule}: "):
        conformance.check(BROKEN[rule])


def test_a_method_that_trains_nothing_is_caught():
    silent = RLSD._replace(loss=lambda token_stats, batch, step: (0 * token_stats["logp"], {}))
    with pytest.raises(AssertionError, match="no gradient reaches a probe"):
        conformance.check(silent)


def test_a_teacher_that_is_silent_says_nothing():
    """In training its statistics are 0, so a method must not divide by them."""

    def credit(batch, step):
        adv_t = advantage(batch)[:, None] * batch.rollouts.mask_t
        return Credit(adv_t / batch.scores["divergence"], 0 * adv_t), {}

    with pytest.raises(AssertionError, match=r"^is_finite: "):
        conformance.check(METHODS["sc_grpo"]()._replace(credit=credit))


def test_teachers_are_shown_what_their_contexts_show():
    """SC-GRPO: a sibling among several successes, one shared failure without, else nothing."""
    shown, source = conformance.draw(METHODS["sc_grpo"](), "1100 0000 1000 1111").shown["teacher"]
    assert shown.reshape(4, 4).sum(axis=1).tolist() == [4, 3, 0, 0]
    assert set(source[:4]) <= {0, 1} and len({*source[4:8], -1}) == 2
    assert (source[~shown] == -1).all() and set(source[4:8]) <= {-1, 4, 5, 6, 7}
