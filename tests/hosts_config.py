"""The job of test_hosts.py: a few short steps of the shipped model."""

from jaxrl_sd import config as configuration


def get_config():
    """Fits eight devices, however they are arranged."""
    config = configuration.default()
    config.data.num_train, config.data.num_test = 64, 8
    config.rollout.prompts, config.rollout.group_size = 8, 4
    config.evaluation.every, config.evaluation.samples = 100, 4  # as in training: one sampler
    config.checkpoint.every = 2
    config.optimizer.eps = 1e-6  # or Adam makes full steps of rounding where a gradient is 0
    config.verifier.workers = 1
    return config
