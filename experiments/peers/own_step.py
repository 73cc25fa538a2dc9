"""This package's GRPO on a workload of `workload.py`.

    python experiments/peers/own_step.py --model=FOLDER --folder=/tmp/own

Timed: a step of `jaxrl_sd.train.train` (see workload.py), which scores every batch before it trains
on it, or, with --sampling, `train.sample` and the decoding of its texts. float32, no reference
model, one update a batch, no evaluation and no checkpoint within the measured steps. --devices
share the CPU and split the batch.
"""

import json
import math
from pathlib import Path

import jax
import workload
from ml_collections import ConfigDict

from jaxrl_sd import config as configuration
from jaxrl_sd import sharding, train
from jaxrl_sd.start import prepare
from jaxrl_sd.update import init_state


def make_config(args) -> ConfigDict:
    count = args.prompts * workload.num_steps(args)
    file = Path(args.folder) / "problems.jsonl"
    problems = [{"prompt": text, "answer": "0"} for text in workload.texts(count, args)]
    file.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    c = configuration.default()
    c.output_dir = str(Path(args.folder) / "run")
    c.steps = c.evaluation.every = c.checkpoint.every = workload.num_steps(args)
    c.model.path = args.model
    c.method.name, c.method.kl_coef = "grpo", 0.0
    c.templates = ConfigDict()
    c.data.train = c.data.test = str(file)
    c.data.num_train, c.data.num_test, c.evaluation.samples = 0, 1, 1
    c.reward.functions = (f"{workload.__file__}:reward",)
    c.optimizer.learning_rate = 1e-6
    r = c.rollout
    r.prompts, r.group_size = args.prompts, args.group_size
    r.max_prompt, r.max_response = args.prompt_tokens, args.response_tokens
    c.mesh.data = math.gcd(args.devices, jax.device_count())
    # Everything at a time, as the peers have it.
    tokens = r.prompts * (r.max_prompt + r.group_size * r.max_response)
    c.compute.tokens = tokens // c.mesh.data
    return c


def sampler(config: ConfigDict):
    """A function that samples one batch."""
    run, params, frozen = prepare(config)
    state = init_state(params, frozen, configuration.optimizer(config), {}, config.seed)
    state = jax.device_put(state, sharding.of_state(state, run.mesh))
    problems = [run.problems[i] for i in range(config.rollout.prompts)]

    def sample():
        _, samples = train.sample(run, state, problems, 0)
        return run.tokenizer.batch_decode(samples.response.reshape(-1, config.rollout.max_response))

    return sample


def main():
    args = workload.flags(__doc__)
    jax.config.update("jax_num_cpu_devices", args.devices)
    config = make_config(args)
    if args.sampling:
        seconds = workload.repeat(sampler(config), args)
    else:
        train.train(config)
        seconds = workload.step_seconds(args)
    workload.report(("jax", "jaxlib"), seconds)


if __name__ == "__main__":
    main()
