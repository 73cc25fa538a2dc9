"""A small job for test_train.py, and a program that runs it and kills itself at a given moment.

python small_run.py FOLDER MOMENT, where a moment is a key of `MOMENTS`.
"""

import os
import signal
import sys

from jaxrl_sd import checkpoint, diagnostics, rollout
from jaxrl_sd import config as configuration
from jaxrl_sd.train import train


def small_config(folder, steps=4, **settings):
    """The shipped model, a few short steps."""
    config = configuration.default()
    config.output_dir, config.steps = str(folder), steps
    config.data.num_train, config.data.num_test = 64, 8
    config.rollout.prompts, config.rollout.group_size = 4, 4
    config.rollout.temperature = 0.9  # sampler and trainer must agree about it
    config.evaluation.every, config.evaluation.samples = 2, 4  # as in training: one sampler
    config.checkpoint.every = 2
    config.verifier.workers = 1
    for field, value in settings.items():
        group, key = field.split("__")
        config[group][key] = value
    return config


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying(function, call, after):
    """`function`, whose call number `call` is the last thing this process does."""
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and not after:
            die()
        out = function(*args, **kwargs)
        if calls == call:
            die()
        return out

    return wrapped


MOMENTS = {
    # Before the answers of step 2 are graded (two evaluations came first); nothing is saved yet.
    "sampling": (rollout, "verify", 6, False),
    # Orbax has started to write the checkpoint of step 2, in the background.
    "saving": (checkpoint, "save", 1, True),
    # After the fifth update, which no checkpoint holds.
    "updating": (diagnostics, "describe", 3, True),
}

if __name__ == "__main__":
    folder, moment = sys.argv[1:]
    module, name, call, after = MOMENTS[moment]
    setattr(module, name, dying(getattr(module, name), call, after))
    train(small_config(folder, steps=6))
