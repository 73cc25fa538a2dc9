"""TRL's GRPOTrainer on a workload of `workload.py`, in a Python that has TRL.

    pip install "trl==1.16.*" "torch==2.13.*"
    python experiments/peers/trl_step.py --model=FOLDER --folder=/tmp/trl

Timed: a step of `GRPOTrainer.train` (see workload.py), or, with --sampling, the trainer's own
`_generate`, which is transformers' `generate` on the prompts repeated `--group_size` times.
float32, no reference model, one update a batch, all rows in one forward pass, no gradient
checkpointing, nothing logged or saved; else TRL's defaults.
"""

import torch
import transformers
import workload
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer


def make_trainer(args):
    rows = args.prompts * args.group_size
    settings = GRPOConfig(
        output_dir=args.folder,
        per_device_train_batch_size=rows,
        num_generations=args.group_size,
        max_completion_length=args.response_tokens,
        max_steps=workload.num_steps(args),
        learning_rate=1e-6,
        beta=0.0,
        temperature=1.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    prompts = workload.texts(args.prompts * workload.num_steps(args), args)
    return GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        reward_funcs=workload.reward,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=transformers.AutoTokenizer.from_pretrained(args.model),
    )


def main():
    args = workload.flags(__doc__)
    trainer = make_trainer(args)
    if args.sampling:
        repeated = [
            text for text in workload.texts(args.prompts, args) for _ in range(args.group_size)
        ]
        trainer.model.train()  # as in training
        seconds = workload.repeat(lambda: trainer._generate(repeated), args)
    else:
        trainer.train()
        seconds = workload.step_seconds(args)
    workload.report(("trl", "torch", "transformers"), seconds)


if __name__ == "__main__":
    main()
