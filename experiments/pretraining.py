"""Supervised training of a built-in task's base model, from scratch: what the tasks share.

A task says how to draw a row of training for a problem; `run` trains, saves and evaluates.
"""

import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from absl import flags
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxrl_sd import model, tokens, weights
from jaxrl_sd.sampler import SamplingConfig, sample
from jaxrl_sd.types import Problem

OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Where the model goes.", required=True)
STEPS = flags.DEFINE_integer("steps", 1200, "Optimiser steps.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of parameters and data.")
PLAIN_ROWS = flags.DEFINE_integer("plain_rows", 56, "Rows without a hint in a batch.")
HINTED_ROWS = flags.DEFINE_integer("hinted_rows", 56, "Rows with a hint in a batch.")
LEARNING_RATE = flags.DEFINE_float("learning_rate", 5e-3, "Peak of the cosine schedule.")
EVAL_PROBLEMS = flags.DEFINE_integer("eval_problems", 256, "Held-out problems.")

PAD, UNK, SYSTEM, USER, ASSISTANT, END = SPECIAL = (
    "<|pad|>",
    "<|unk|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if not loop.first %} {% endif %}<|{{ message.role }}|> {{ message.content }}"
    "{% if message.role == 'assistant' %} <|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <|assistant|>{% endif %}"
)
TRAIN_PROBLEMS = 40000  # drawn with repetition: there may be far fewer distinct ones
GROUP_SIZE = 8


class Row(NamedTuple):
    """One training example in words. Weight 0 = seen, but not imitated."""

    prompt: list[str]
    response: list[str]
    weight: list[float]


class Task(NamedTuple):
    """What is trained on and evaluated. Kinds are those of `templates`."""

    vocabulary: list[str]
    problems: Callable[[str, int, int], list[Problem]]  # of the split, the count and the seed
    templates: Mapping[str, Mapping[str, str]]
    kinds: Mapping[str, float]  # shares of the kinds among hinted rows
    # (rng, problem, kind, ramp) -> row; `ramp` goes from 0 to 1 in the first half of the training.
    draw_row: Callable[[random.Random, Problem, str, float], Row]
    peer: Callable[[random.Random, Problem, str], str]  # shown when a held-out problem has a peer
    verify: Callable[[str, str, str], bool]
    plain_prompt: int  # tokens, with the marker
    max_prompt: int  # tokens, with the longest hint
    max_response: int  # tokens


def build_tokenizer(vocabulary: list[str]) -> transformers.PreTrainedTokenizerFast:
    """One token a word; a special token of its own for each role and for the end of a turn."""
    ids = {word: i for i, word in enumerate([*SPECIAL, *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def make_row(
    template: Mapping[str, str], slots: Mapping[str, str], response: list[str], weight: list[float]
) -> Row:
    """The row whose prompt is the filled template and whose response is these words."""
    user, tail = template["user"].format(**slots), template.get("tail", "")
    prompt = f"{USER} {user} {ASSISTANT}{tail}".split()
    return Row(prompt, [*response, END], [*weight, 1.0])


def pack(
    rows: list[Row], vocabulary: dict[str, int], width: int, max_response: int
) -> tuple[np.ndarray, ...]:
    """Prompts [B, width] left-padded, their lengths, responses and weights [B, max_response]."""
    prompts = [[vocabulary[word] for word in row.prompt] for row in rows]
    prompt, length = tokens.left_pad(prompts, width, vocabulary[PAD])
    response = np.full((len(rows), max_response), vocabulary[PAD], np.int32)
    weight = np.zeros((len(rows), max_response), np.float32)
    for i, row in enumerate(rows):
        response[i, : len(row.response)] = [vocabulary[word] for word in row.response]
        weight[i, : len(row.weight)] = row.weight
    return prompt, length, response, weight


def draw_batch(
    rng: random.Random,
    task: Task,
    train: list[Problem],
    vocabulary: dict[str, int],
    progress: float,
) -> tuple[tuple[np.ndarray, ...], ...]:
    """Rows without a hint and rows with one, apart, because their prompts differ in width.

    `progress` is the share of the training that is over.
    """
    # Copying a hint is learnt early; random beginnings before that would only delay it.
    ramp = min(1.0, 2 * progress)
    draw = partial(task.draw_row, rng)
    kinds = rng.choices(list(task.kinds), list(task.kinds.values()), k=HINTED_ROWS.value)
    plain = [draw(rng.choice(train), "nothing", ramp) for _ in range(PLAIN_ROWS.value)]
    hinted = [draw(rng.choice(train), kind, ramp) for kind in kinds]
    return (
        pack(plain, vocabulary, task.plain_prompt, task.max_response),
        pack(hinted, vocabulary, task.max_prompt, task.max_response),
    )


def nll(params, rows, config: model.ModelConfig):
    """Weighted negative log-likelihood of the responses, summed."""
    prompt, length, response, weight = rows
    hidden = model.response_hidden(params, prompt, length, response, config)
    log_prob = jax.nn.log_softmax(model.logits(params, hidden, config))
    picked = jnp.take_along_axis(log_prob, response[..., None], axis=-1)[..., 0]
    return -jnp.sum(picked * weight)


def loss(params, batch, config: model.ModelConfig):
    """Mean over all weighted response tokens of the batch."""
    return sum(nll(params, rows, config) for rows in batch) / sum(rows[3].sum() for rows in batch)


def make_optimizer() -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay to a tenth."""
    peak = LEARNING_RATE.value
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, 50, STEPS.value, peak / 10)
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, 0.9, 0.98, weight_decay=0.01)
    )


@partial(jax.jit, static_argnames=("optimizer", "config"), donate_argnums=(0, 1))
def train_step(params, opt_state, batch, optimizer, config):
    """One AdamW step. Returns params, optimiser state and the loss."""
    value, gradient = jax.value_and_grad(loss)(params, batch, config)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value


def held_out_verdicts(
    params, config: model.ModelConfig, tokenizer, task: Task, kind: str, temperature: float, G: int
) -> np.ndarray:
    """bool[problems, G]: which samples solve their held-out problem, hinted by `kind`."""
    rng = random.Random(SEED.value)
    test = task.problems("test", EVAL_PROBLEMS.value, SEED.value)
    template = tokens.Template(**task.templates[kind])
    prompts = []
    for p in test:
        slots = {"answer": p.answer, "solution": p.solution, "peer": task.peer(rng, p, kind)}
        prompts.append(tokens.render(tokenizer, template, {"problem": p.prompt} | slots))
    prompt, length = tokens.left_pad(prompts, task.max_prompt, tokenizer.pad_token_id)
    stop_ids = (tokenizer.eos_token_id,)
    sampling = SamplingConfig(task.max_response, stop_ids, tokenizer.pad_token_id, temperature)
    key = jax.random.key(SEED.value)
    samples = jax.device_get(
        sample(params, key, prompt, length, group_size=G, sampling=sampling, config=config)
    )
    verdicts = np.zeros(samples.length.shape, bool)
    for p, g in np.ndindex(verdicts.shape):
        ids = samples.response[p, g, : samples.length[p, g]]
        text = tokens.response_text(tokenizer, ids, stop_ids)
        stopped = not samples.truncated[p, g]
        verdicts[p, g] = stopped and task.verify(test[p].prompt, test[p].answer, text)
    return verdicts


def print_report(params, config: model.ModelConfig, tokenizer, task: Task) -> None:
    """Held-out accuracy by kind of hint, and how groups of eight without a hint come out."""
    print(f"{'hint':16s} sampled  greedy")
    verdicts = partial(held_out_verdicts, params, config, tokenizer, task)
    for kind in task.templates:
        sampled, greedy = verdicts(kind, 1.0, GROUP_SIZE), verdicts(kind, 0.0, 1)
        print(f"{kind:16s} {sampled.mean():7.3f} {greedy.mean():7.3f}", flush=True)
    solved = verdicts("nothing", 1.0, GROUP_SIZE).sum(axis=1)
    wrong, right = np.mean(solved == 0), np.mean(solved == GROUP_SIZE)
    print(f"groups of {GROUP_SIZE} without a hint: all wrong {wrong:.2f}, all correct {right:.2f}")


def run(task: Task) -> None:
    """Trains the model, saves it with its tokenizer, and prints what it can do."""
    tokenizer = build_tokenizer(task.vocabulary)
    vocabulary = tokenizer.get_vocab()
    config = model.ModelConfig(
        vocab_size=len(vocabulary),
        num_tokens=len(vocabulary),
        hidden_size=64,
        intermediate_size=192,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        tie_embeddings=True,
    )
    params = model.init_params(jax.random.key(SEED.value), config)
    optimizer = make_optimizer()
    opt_state = optimizer.init(params)
    rng = random.Random(SEED.value)
    train = task.problems("train", TRAIN_PROBLEMS, SEED.value)
    start = time.perf_counter()
    for step in range(STEPS.value):
        batch = draw_batch(rng, task, train, vocabulary, step / STEPS.value)
        params, opt_state, value = train_step(params, opt_state, batch, optimizer, config)
        if step % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step:5d}  loss {float(value):.3f}  {seconds:4.0f} s", flush=True)
    weights.save(OUTPUT_DIR.value, params, config, eos_token_id=[tokenizer.eos_token_id])
    tokenizer.save_pretrained(OUTPUT_DIR.value)
    print_report(params, config, tokenizer, task)
