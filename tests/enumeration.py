"""Laws small enough to enumerate: the package's functions on them, and float64 sums to compare.

`gradient` and `expected_gradient` differentiate the package in float32; `slope` differentiates
numpy by central differences. Neither knows the other.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_sd import stats, vocabulary

# The package, by automatic differentiation.


def log(x):
    """Logits of probabilities; impossible tokens get the logit of vocabulary padding."""
    x = np.asarray(x, np.float64)
    return jnp.array(np.log(x, where=x > 0, out=np.full(x.shape, vocabulary.MASKED)), jnp.float32)


def divergence(stat, student, teacher):
    """A statistic that needs no token, of two distributions."""
    return float(_value(stat, log(student), log(teacher)))


def gradient(stat, student_logits, teacher_logits):
    """The same from logits, differentiated with respect to the student's."""
    return np.asarray(_gradient(stat, student_logits, teacher_logits))


@partial(jax.jit, static_argnums=0)
def _value(stat, student_logits, teacher_logits):
    return stat(student_logits, teacher_logits, jnp.int32(0))


_gradient = jax.jit(jax.grad(_value, argnums=1), static_argnums=0)


@jax.jit
def log_probs(logits):
    """Log-probability of every token, [..., V] of logits [..., V]."""
    V = logits.shape[-1]
    each = jnp.broadcast_to(logits[..., None, :], (*logits.shape, V))
    return stats.log_prob(each, each, jnp.broadcast_to(jnp.arange(V), logits.shape))


def gaps(student, teacher):
    """log teacher - log student of every token of two distributions, f64[V]."""
    V = len(student)
    logits = (jnp.broadcast_to(log(x), (V, V)) for x in (student, teacher))
    return np.asarray(stats.log_prob_gap(*logits, jnp.arange(V)), np.float64)


def log_prob_gradients(logits):
    """d log softmax(logits)[v] / d logits, [V, V] with v first."""
    return np.asarray(jax.jacobian(log_probs)(logits))


def expected_gradient(loss, logits, law=None):
    """E over tokens of d loss(log pi(token)) / d logits: what the sampled gradient estimates.

    Args:
      loss: log-probability of each token [V] -> [V].
      logits: [V].
      law: of the tokens, [V]; the policy's own by default.
    """
    law = jnp.asarray(softmax(logits) if law is None else law, jnp.float32)
    return np.asarray(jax.grad(lambda logits: law @ loss(log_probs(logits)))(logits))


# float64 numpy, by central differences.


def softmax(z):
    z = np.asarray(z, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(a, b):
    """kl(a||b) of distributions of full support, along the last axis."""
    return (a * np.log(a / b)).sum(-1)


def slope(f, z, h=1e-5):
    """d f / d z of a function of f64[N]."""
    steps = h * np.eye(len(z))
    return np.array([f(z + s) - f(z - s) for s in steps]) / (2 * h)


# Laws.


def random_distributions(rng, *shape):
    return rng.dirichlet(np.ones(shape[-1]), shape[:-1])


def binomial(p, G):
    """Probability of 0 ... G successes among G rows."""
    successes = np.arange(G + 1)
    log_choices = np.array([sum(np.log((G - i) / (i + 1)) for i in range(k)) for k in successes])
    return np.exp(log_choices) * p**successes * (1 - p) ** (G - successes)


def one_group_of_each_count(G):
    """Verdicts f32[G + 1, G] with 0 ... G successes. Rows are exchangeable: they stand for all."""
    return (np.arange(G) < np.arange(G + 1)[:, None]).astype(np.float32)
