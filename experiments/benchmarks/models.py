"""The models that are measured: their sizes, random weights, and the work that they need."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxrl_sd import weights
from jaxrl_sd.model import ModelConfig, init_params
from jaxrl_sd.types import Params

END, PAD = 0, 1  # ids of the tokens that end and pad a response; no other has a meaning


def qwen3(
    layers: int, hidden: int, feed_forward: int, heads: tuple[int, int], head_dim: int, vocab: int
) -> ModelConfig:
    """A decoder of Qwen3's form with a tied head; `heads` are query heads and key-value heads."""
    return ModelConfig(
        vocab_size=vocab,
        num_tokens=vocab,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_layers=layers,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_embeddings=True,
    )


TOY = qwen3(2, 32, 64, (4, 2), 8, vocab=512)
TINY = qwen3(3, 64, 192, (4, 2), 16, vocab=512)
MEDIUM = qwen3(4, 256, 1024, (4, 2), 64, vocab=8000)  # 6 million parameters
SMALL = qwen3(8, 512, 2048, (8, 4), 64, vocab=32_000)  # 48 million parameters
QWEN3_1_7B = qwen3(28, 2048, 6144, (16, 8), 128, vocab=151_936)


@partial(jax.jit, static_argnums=0)
def random_params(config: ModelConfig) -> Params:
    """float32 weights with which END and PAD are practically never drawn.

    The residual stream has a constant in its first entry: every token's embedding has it and no
    layer writes there. The two tokens' embeddings are large and negative there, and so are their
    logits, whatever the context.
    """
    params = init_params(jax.random.key(0), config)
    layers = params["layers"]
    layers["o"] = layers["o"].at[..., 0].set(0.0)
    layers["down"] = layers["down"].at[..., 0].set(0.0)
    embed = params["embed"].at[:, 0].set(1.0)
    return params | {"embed": embed.at[jnp.array([END, PAD]), 0].set(-1e3)}


def write_folder(folder: Path, config: ModelConfig) -> None:
    """A model of this size in Hugging Face form, whose tokenizer has one token a word."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"w{i}" for i in range(config.vocab_size - 2)]
    vocabulary = {word: i for i, word in enumerate(["<|end|>", "<|pad|>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<|end|>", "<|pad|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "padding_side": "left",
        "chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    weights.save(folder, random_params(config), config, eos_token_id=[END])
