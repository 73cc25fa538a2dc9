"""The share of computed tokens that are padding, at the papers' shapes; on the host alone."""

import runpy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from experiments.benchmarks.records import Row
from experiments.benchmarks.scales import Scale
from jaxrl_sd import packing, start
from jaxrl_sd.methods import METHODS, PRESETS
from jaxrl_sd.methods.base import Teacher
from jaxrl_sd.types import Batch, Hints, Rollouts
from jaxrl_sd.vocabulary import STUDENT

TITLE = "Padding"
CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = (
    "cast_4b",
    "hsd_8b",
    "hsd_32b",
    "opsd_1_7b",
    "rlsd_text",
    "sc_grpo_8b",
    "sdpg_1_7b",
    "sdpg_4b",
)
MEAN, SIGMA = 0.35, 0.6  # of log-normal lengths: mean over `max_response`, and of the logarithm
PROMPT, HINT = (60, 400), (20, 300)  # tokens, uniform


def measure(scale: Scale) -> list[Row]:
    """Of the student's streams, and of each teacher's; the same shapes at every scale."""
    del scale
    return [row for name in NAMES for row in of_config(name)]


def of_config(name: str) -> list[Row]:
    """Packs one batch with random lengths as `train.train` packs it."""
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    shares = padding(config)
    r = config.rollout
    return [
        Row(
            f"{name}, {model or 'student'}",
            share,
            "%",
            ("<=", 0.1),
            note=f"{r.prompts} x {r.group_size} of up to {r.max_response} tokens, "
            f"{config.compute.tokens} at a time",
        )
        for model, share in shares.items()
    ]


def padding(config: ConfigDict) -> dict[str, float]:
    """The share of padding by model."""
    settings = config.method.to_dict()
    method = (METHODS | PRESETS)[settings.pop("name")](**settings)
    batch = random_lengths(config, method.teachers)
    sizes = start.stream_sizes(config, method)
    parts = packing.pack(
        batch, sizes, config.mesh.data * config.mesh.fsdp, range(len(batch.rollouts.mask_t))
    )
    return {name: packing.padding(parts, name) for name in (STUDENT, *method.teachers)}


def random_lengths(config: ConfigDict, teachers: Mapping[str, Teacher]) -> Batch:
    """Prompts and responses of realistic lengths; no two prompts are equal.

    A teacher whose samples are shown different things reads a response of the group before each.
    """
    rng, r = np.random.default_rng(0), config.rollout
    P, G, T = r.prompts, r.group_size, r.max_response
    B, group = P * G, np.arange(P).repeat(G)
    typical = MEAN * T * np.exp(-(SIGMA**2) / 2)
    length = np.clip(rng.lognormal(np.log(typical), SIGMA, B), 1, T).astype(np.int32)
    prompt = rng.integers(*PROMPT, P)[group]
    hint = rng.integers(*HINT, P)[group]
    peer = group * G + rng.integers(G, size=B)

    def ids(lengths: np.ndarray, owner: np.ndarray, width: int) -> np.ndarray:
        """Prompts of which those of one owner are equal."""
        return np.where(np.arange(width) >= width - lengths[:, None], owner[:, None] + 1, 0)

    def hints(teacher: Teacher) -> Hints:
        owner = group if teacher.context.shared else peer
        lengths = prompt + hint + (0 if teacher.context.shared else length[peer])
        lengths = np.minimum(lengths, r.max_hint_prompt)
        return Hints(ids(lengths, owner, r.max_hint_prompt), lengths, owner)

    mask_t = (np.arange(T) < length[:, None]).astype(np.float32)
    zeros, verdict = np.zeros((B, T), np.int32), np.zeros(B)
    rollouts = Rollouts(
        prompt=ids(prompt, group, r.max_prompt),
        prompt_length=prompt,
        response=zeros,
        mask_t=mask_t,
        sampler_logp_t=mask_t,
        behaviour_logp_t=mask_t,
        reward=verdict,
        correct=verdict,
        graded=verdict,
        group_size=G,
    )
    return Batch(rollouts, {name: hints(teacher) for name, teacher in teachers.items()})
