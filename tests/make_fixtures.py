"""Writes tests/fixtures: small random models with transformers' own logits. Needs torch.

    python tests/make_fixtures.py

Each folder is what transformers saves, plus `expected.npz`: ids i32[rows, N], length i32[rows]
and logits f32[rows, N, V] of every row run alone, without padding.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

FIXTURES = Path(__file__).parent / "fixtures"
LENGTHS = (4, 9, 15, 15)

TIED = dict(
    vocab_size=44,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    rope_theta=1e4,
    tie_word_embeddings=True,
)
UNTIED = dict(
    vocab_size=40,
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=8,
    rope_theta=5e5,
    rms_norm_eps=1e-2,
    tie_word_embeddings=False,
)
# Everything that Qwen3 does not have.
LLAMA3 = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    attention_bias=True,
    mlp_bias=True,
    rope_parameters=dict(
        rope_type="llama3",
        rope_theta=1e4,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
)
QWEN2_YARN = dict(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    rope_parameters=dict(
        rope_type="yarn",
        rope_theta=1e4,
        factor=4.0,
        original_max_position_embeddings=16,
        beta_fast=4.0,
    ),
)


def random_model(family: str = "qwen3", **fields) -> PreTrainedModel:
    """Weights far from their initial values, norms included, so that every one of them counts."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{"max_position_embeddings": 64, **fields})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(0.4 * noise if parameter.ndim == 2 else 1 + 0.3 * noise)
    return model


def row_logits(model: PreTrainedModel, ids: np.ndarray) -> np.ndarray:
    """float32 logits [N, V] of ids [N]."""
    with torch.no_grad():
        return model(torch.from_numpy(ids[None]).long()).logits[0].numpy()


def write_expected(folder: Path) -> None:
    # Opened anew: `model.float()` of a bfloat16 model would keep its rotary frequencies rounded.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    vocab_size, longest = model.config.vocab_size, max(LENGTHS)
    rng = np.random.default_rng(0)
    ids = rng.integers(vocab_size, size=(len(LENGTHS), longest), dtype=np.int32)
    logits = np.zeros((*ids.shape, vocab_size), np.float32)
    for row, length in enumerate(LENGTHS):
        logits[row, :length] = row_logits(model, ids[row, :length])
    np.savez(folder / "expected.npz", ids=ids, length=np.int32(LENGTHS), logits=logits)


def main() -> None:
    random_model(**TIED).save_pretrained(FIXTURES / "tied")
    random_model(**{**TIED, "rope_theta": 1e6}).save_pretrained(FIXTURES / "tied_theta_1e6")
    untied = random_model(**UNTIED).to(torch.bfloat16)
    untied.save_pretrained(FIXTURES / "untied_bfloat16_shards", max_shard_size="10KB")
    random_model("llama", **LLAMA3).save_pretrained(FIXTURES / "llama3")
    random_model("qwen2", **QWEN2_YARN).save_pretrained(FIXTURES / "qwen2_yarn")
    for folder in FIXTURES.iterdir():
        write_expected(folder)


if __name__ == "__main__":
    main()
