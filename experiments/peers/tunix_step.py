"""google-tunix's GRPOLearner on a workload of `workload.py`, in a Python that has tunix.

    pip install google-tunix==0.1.7
    python experiments/peers/tunix_step.py --model=FOLDER --folder=/tmp/tunix

Timed: a step of `GRPOLearner.train` (see workload.py), or, with --sampling, `RLCluster.generate`
on the prompts repeated `--group_size` times, as the learner calls it. float32, no reference model,
one update a batch, all rows in one forward pass, no rematerialisation, trainer and sampler sharing
weights; else tunix's defaults.
"""

import json
from pathlib import Path

import jax
import numpy as np
import optax
import transformers
import workload
from jax.sharding import Mesh
from tunix.models.qwen3 import model, params
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig


def load_model(folder, mesh):
    c = json.loads((Path(folder) / "config.json").read_text())
    config = model.ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=c["num_attention_heads"],
        num_kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        rope_theta=int(c["rope_theta"]),
        norm_eps=c["rms_norm_eps"],
        use_tied_embedding=c["tie_word_embeddings"],
    )
    return params.create_model_from_safe_tensors(folder, config, mesh, np.float32)


def make_cluster(args):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = rl_cluster.Role.ACTOR, rl_cluster.Role.ROLLOUT
    length = args.prompt_tokens + args.response_tokens
    return rl_cluster.RLCluster(
        actor=load_model(args.model, mesh),
        tokenizer=transformers.AutoTokenizer.from_pretrained(args.model),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys(roles, mesh),
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adamw(1e-6),
                mini_batch_size=args.prompts,
                train_micro_batch_size=args.prompts,
                rollout_micro_batch_size=args.prompts,
                compute_logps_micro_batch_size=args.prompts,
                eval_every_n_steps=10**9,
                max_steps=workload.num_steps(args),
            ),
            rollout_config=RolloutConfig(
                max_prompt_length=args.prompt_tokens,
                max_tokens_to_generate=args.response_tokens,
                kv_cache_size=length,
                temperature=1.0,
            ),
        ),
    )


def main():
    args = workload.flags(__doc__)
    cluster = make_cluster(args)
    if args.sampling:
        repeated = [
            text for text in workload.texts(args.prompts, args) for _ in range(args.group_size)
        ]
        seconds = workload.repeat(lambda: cluster.generate(repeated), args)
    else:
        config = GRPOConfig(num_generations=args.group_size, beta=0.0)
        learner = GRPOLearner(cluster, config, [workload.reward])
        prompts = workload.texts(args.prompts * workload.num_steps(args), args)
        learner.train(
            {"prompts": np.array(step)}
            for step in np.split(np.array(prompts), workload.num_steps(args))
        )
        seconds = workload.step_seconds(args)
    workload.report(("google-tunix", "jax", "flax"), seconds)


if __name__ == "__main__":
    main()
