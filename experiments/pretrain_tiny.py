"""Supervised training of the tiny base model of the built-in task, from scratch.

    python -m experiments.pretrain_tiny --output_dir=jaxrl_sd/assets/tiny

About five minutes on two free cores. The rows teach to use a hint in the prompt, to go on sensibly
after a step that the hint did not suggest, so that a teacher is of use off its own path, and to
take back a dead end with `no`. Rows without a hint imitate flawed work: half of those with three
or more numbers begin with random steps, and most that end on a wrong result stop there. That is
what reinforcement learning then improves on.
"""

import random
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from absl import app, flags
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxrl_sd import countdown, model, tokens, weights
from jaxrl_sd.countdown import TEMPLATES, Step
from jaxrl_sd.sampler import SamplingConfig, sample
from jaxrl_sd.types import Problem
from jaxrl_sd.verify.countdown import verify

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
MAX_RESPONSE = 24
MAX_STEPS = 4  # steps of arithmetic that fit in MAX_RESPONSE, with their separators and the end
PLAIN_PROMPT, MAX_PROMPT = 9, 44  # tokens, with the marker and with the longest hint
TRAIN_PROBLEMS = 40000  # drawn with repetition: far fewer are distinct
GROUP_SIZE = 8
# Shares of the kinds among hinted rows. `marker` shows nothing and is a row without a hint.
KINDS = {
    "answer": 0.25,
    "solution": 0.15,
    "answer_solution": 0.15,
    "answer_peer": 0.15,
    "peer": 0.15,
    "attempt": 0.05,
    "marker": 0.1,
}
# Shares of rows that begin with random steps. With a hint these are shown and not imitated, so that
# a teacher can go on from anywhere; without one they are the mistakes of imperfect demonstrations.
HINTED_DETOURS = 0.4
PEER_DETOURS = 0.2
PLAIN_MISTAKES = 0.5
GIVE_UP = 0.75  # share of wrong complete attempts without a hint that are not taken back


class Row(NamedTuple):
    """One training example in words. Weight 0 = seen, but not imitated."""

    prompt: list[str]
    response: list[str]
    weight: list[float]


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word; a special token of its own for each role and for the end of a turn."""
    words = [*SPECIAL, *countdown.vocabulary()]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
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


def right_steps(steps: tuple[Step, ...]) -> tuple[list[str], list[float]]:
    """Words and weights of steps to imitate."""
    words = countdown.solution_text(steps).split()
    return words, [1.0] * len(words)


def random_steps(steps: list[Step], choice: float) -> tuple[list[str], list[float]]:
    """Words and weights of random steps: `choice` is the weight of all but their arithmetic."""
    words = countdown.solution_text(steps).split()
    return words, ([choice, choice, choice, 1.0, 1.0, choice] * len(steps))[:-1]


def wander(
    rng: random.Random, numbers: tuple[int, ...], count: int
) -> tuple[list[Step], tuple[int, ...]]:
    """`count` random legal steps, and the numbers they leave."""
    steps = []
    for _ in range(count):
        step, numbers = rng.choice(countdown.legal_steps(numbers))
        steps.append(step)
    return steps, numbers


def stumble(
    rng: random.Random, numbers: tuple[int, ...], target: int, goal: tuple[Step, ...], hinted: bool
) -> tuple[list[str], list[float]]:
    """A response that begins with random steps and makes the best of them.

    It goes on to a solution if there still is one, else it starts over and reaches `goal`; but
    without a hint it often gives up on a wrong result.
    """
    longest = min(len(goal), MAX_STEPS - len(goal))
    steps, left = wander(rng, numbers, rng.randint(1, longest))
    words, weight = random_steps(steps, choice=0.0 if hinted else 1.0)
    ways = countdown.solutions(left, target)
    if ways:
        ending = rng.choice(ways)
        joint = [";"] if ending else []
    elif len(left) == 1 and not hinted and rng.random() < GIVE_UP:
        joint, ending = [], ()
    else:
        joint, ending = [countdown.RETRY], goal
    more, more_weight = right_steps(ending)
    return words + joint + more, weight + [1.0] * len(joint) + more_weight


def failed_attempt(rng: random.Random, numbers: tuple[int, ...], target: int) -> str:
    """A complete attempt that misses the target; the last one drawn if all are right."""
    for _ in range(8):
        steps, left = wander(rng, numbers, len(numbers) - 1)
        if left != (target,):
            break
    return countdown.solution_text(steps)


def peer_text(
    rng: random.Random, numbers: tuple[int, ...], target: int, goal: tuple[Step, ...], kind: str
) -> str:
    """A peer's response: a failure for the kind `attempt`, else right, some after a detour."""
    if kind == "attempt":
        return failed_attempt(rng, numbers, target)
    if rng.random() < PEER_DETOURS:
        return " ".join(stumble(rng, numbers, target, goal, hinted=True)[0])
    return countdown.solution_text(goal)


def draw_row(rng: random.Random, problem: Problem, kind: str, ramp: float) -> Row:
    """A row for one problem with a hint of one kind, or with none."""
    numbers, target = countdown.parse_prompt(problem.prompt)
    ways = countdown.solutions(numbers, target)
    goal = rng.choice(ways)
    hinted = kind not in ("nothing", "marker")
    response, weight = right_steps(goal)
    share = HINTED_DETOURS if hinted else PLAIN_MISTAKES * (len(numbers) > 2)
    if rng.random() < share * ramp:
        response, weight = stumble(rng, numbers, target, goal, hinted)
    peer = peer_text(rng, numbers, target, goal, kind)
    # A peer's way is seldom the one that the answer names; the peer is followed.
    named = rng.choice(ways) if kind == "answer_peer" else goal
    template = TEMPLATES[kind]
    user = template["user"].format(
        problem=problem.prompt,
        answer=countdown.answer_text(named),
        solution=countdown.solution_text(goal),
        peer=peer,
    )
    prompt = f"{USER} {user} {ASSISTANT}{template.get('tail', '')}".split()
    return Row(prompt, [*response, END], [*weight, 1.0])


def pack(rows: list[Row], vocabulary: dict[str, int], width: int) -> tuple[np.ndarray, ...]:
    """Prompts [B, width] left-padded, their lengths, responses and weights [B, MAX_RESPONSE]."""
    prompts = [[vocabulary[word] for word in row.prompt] for row in rows]
    prompt, length = tokens.left_pad(prompts, width, vocabulary[PAD])
    response = np.full((len(rows), MAX_RESPONSE), vocabulary[PAD], np.int32)
    weight = np.zeros((len(rows), MAX_RESPONSE), np.float32)
    for i, row in enumerate(rows):
        response[i, : len(row.response)] = [vocabulary[word] for word in row.response]
        weight[i, : len(row.weight)] = row.weight
    return prompt, length, response, weight


def draw_batch(
    rng: random.Random, train: list[Problem], vocabulary: dict[str, int], progress: float
) -> tuple[tuple[np.ndarray, ...], ...]:
    """Rows without a hint and rows with one, apart, because their prompts differ in width.

    `progress` is the share of the training that is over.
    """
    # Copying a hint is learnt early; random beginnings before that would only delay it.
    ramp = min(1.0, 2 * progress)
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=HINTED_ROWS.value)
    plain = [draw_row(rng, rng.choice(train), "nothing", ramp) for _ in range(PLAIN_ROWS.value)]
    hinted = [draw_row(rng, rng.choice(train), kind, ramp) for kind in kinds]
    return pack(plain, vocabulary, PLAIN_PROMPT), pack(hinted, vocabulary, MAX_PROMPT)


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


def hint_slots(rng: random.Random, problem: Problem, kind: str) -> dict[str, str]:
    """Privileged text of a held-out problem; its own solution stands in for a verified peer."""
    peer = problem.solution
    if kind == "attempt":
        peer = failed_attempt(rng, *countdown.parse_prompt(problem.prompt))
    return {"answer": problem.answer, "solution": problem.solution, "peer": peer}


def held_out_verdicts(
    params, config: model.ModelConfig, tokenizer, kind: str, temperature: float, group_size: int
) -> np.ndarray:
    """bool[problems, group_size]: which samples solve their held-out problem, hinted by `kind`."""
    rng = random.Random(SEED.value)
    test = countdown.problems("test", EVAL_PROBLEMS.value, SEED.value)
    template = tokens.Template(**TEMPLATES[kind])
    prompts = [
        tokens.render(tokenizer, template, {"problem": p.prompt} | hint_slots(rng, p, kind))
        for p in test
    ]
    prompt, length = tokens.left_pad(prompts, MAX_PROMPT, tokenizer.pad_token_id)
    stop_ids = (tokenizer.eos_token_id,)
    sampling = SamplingConfig(MAX_RESPONSE, stop_ids, tokenizer.pad_token_id, temperature)
    key = jax.random.key(SEED.value)
    samples = jax.device_get(
        sample(params, key, prompt, length, group_size=group_size, sampling=sampling, config=config)
    )
    verdicts = np.zeros(samples.length.shape, bool)
    for p, g in np.ndindex(verdicts.shape):
        ids = samples.response[p, g, : samples.length[p, g]]
        text = tokens.response_text(tokenizer, ids, stop_ids)
        stopped = not samples.truncated[p, g]
        verdicts[p, g] = stopped and verify(test[p].prompt, test[p].answer, text)
    return verdicts


def print_report(params, config: model.ModelConfig, tokenizer) -> None:
    """Held-out accuracy by kind of hint, and how groups of eight without a hint come out."""
    print(f"{'hint':16s} sampled  greedy")
    for kind in TEMPLATES:
        sampled = held_out_verdicts(params, config, tokenizer, kind, 1.0, GROUP_SIZE)
        greedy = held_out_verdicts(params, config, tokenizer, kind, 0.0, 1)
        print(f"{kind:16s} {sampled.mean():7.3f} {greedy.mean():7.3f}", flush=True)
    solved = held_out_verdicts(params, config, tokenizer, "nothing", 1.0, GROUP_SIZE).sum(axis=1)
    wrong, right = np.mean(solved == 0), np.mean(solved == GROUP_SIZE)
    print(f"groups of {GROUP_SIZE} without a hint: all wrong {wrong:.2f}, all correct {right:.2f}")


def main(_) -> None:
    tokenizer = build_tokenizer()
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
    train = countdown.problems("train", TRAIN_PROBLEMS, SEED.value)
    start = time.perf_counter()
    for step in range(STEPS.value):
        batch = draw_batch(rng, train, vocabulary, step / STEPS.value)
        params, opt_state, value = train_step(params, opt_state, batch, optimizer, config)
        if step % 100 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step:5d}  loss {float(value):.3f}  {seconds:4.0f} s", flush=True)
    weights.save(OUTPUT_DIR.value, params, config, eos_token_id=[tokenizer.eos_token_id])
    tokenizer.save_pretrained(OUTPUT_DIR.value)
    print_report(params, config, tokenizer)


if __name__ == "__main__":
    app.run(main)
