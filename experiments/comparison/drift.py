"""How far a trained policy is from the one it started as."""

from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxrl_sd import config as configuration
from jaxrl_sd import model, rollout, sampler, sharding, start, stats, tokens, vocabulary
from jaxrl_sd.vocabulary import STUDENT

PROBLEMS = 64
FIRST = "start"


def kl_to_start(config: ConfigDict) -> float:
    """Nats an answer: kl(policy||start), exact over the vocabulary, summed over the tokens.

    Mean over one answer of the policy, the `model/` of a finished run, to each of the first
    held-out problems.
    """
    folder, mesh = Path(config.output_dir) / "model", sharding.make_mesh(**config.mesh)
    tokenizer = tokens.load_tokenizer(str(folder))
    policy, policy_config = start.load_model(str(folder), tokenizer, mesh)
    first, first_config = start.load_model(config.model.path, tokenizer, mesh)
    problems = start.load_problems(config, "test")[:PROBLEMS]
    template = configuration.templates(config)["nothing"]
    prompt = rollout.encode(problems, tokenizer, template, config.rollout.max_prompt)
    samples = sampler.sample(
        policy,
        jax.random.key(config.seed),
        *prompt,
        group_size=1,
        sampling=start.sampling_config(config, tokenizer),
        config=policy_config,
    )
    response, length = samples.response[:, 0], samples.length[:, 0]
    kl_t = vocabulary.chunked(
        {"kl": (FIRST, stats.reverse_kl)},
        hidden={
            STUDENT: _flat(model.response_hidden(policy, *prompt, response, policy_config)),
            FIRST: _flat(model.response_hidden(first, *prompt, response, first_config)),
        },
        heads={
            STUDENT: model.head(policy, policy_config),
            FIRST: model.head(first, first_config),
        },
        token=response.reshape(-1),
        num_tokens=policy_config.num_tokens,
        temperature=config.rollout.temperature,
        chunk=config.compute.chunk,
    )["kl"]
    within = jnp.arange(response.shape[1])[None] < length[:, None]
    return float(jnp.sum(kl_t.reshape(response.shape) * within) / len(problems))


def _flat(hidden: jax.Array) -> jax.Array:
    return hidden.reshape(-1, hidden.shape[-1])
