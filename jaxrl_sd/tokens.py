"""Text to token ids and back: chat templates, padding, prompts with privileged text.

Response ids are never decoded and re-tokenised: a teacher scores the very ids that were sampled.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrl_sd.types import InputError, Problem, first_line


class Template(NamedTuple):
    """Wording of a prompt. `{name}` is a slot; any other brace is text."""

    user: str = "{problem}"
    system: str = ""  # no system turn when empty
    tail: str = ""  # follows the rendered prompt, generation header included
    thinking: bool = True  # `enable_thinking` of the chat templates that read it

    def text(self) -> str:
        """All of the wording."""
        return self.system + self.user + self.tail


TEXTS = Template._fields[:3]  # what a configuration may word
# What Llama 3's chat templates call today. Some would take the clock's day, and a run that was
# continued on another would have other prompts.
DATE = "26 Jul 2024"


def load_tokenizer(path: str | os.PathLike):
    """The tokenizer of a Hugging Face folder.

    Llama's has no padding token. The one that ends a response then pads: what is padding is known
    from lengths, never from ids.

    Raises:
      InputError: there is none, or it has no chat template or nothing to pad with.
    """
    tokenizer = _read_tokenizer(path)
    if not tokenizer.chat_template:
        raise InputError(
            f"model.path: the tokenizer in {path} has no chat template; add chat_template.jinja "
            "or the field chat_template of tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"model.path: the tokenizer in {path} has no padding token and none that ends a "
            "response; set pad_token in its tokenizer_config.json"
        )
    return tokenizer


def load_vocabulary(path: str | os.PathLike) -> dict[str, int]:
    """The id of every token of the tokenizer in a Hugging Face folder.

    Raises:
      InputError: there is none.
    """
    return _read_tokenizer(path).get_vocab()


def _read_tokenizer(path: str | os.PathLike):
    from transformers import AutoTokenizer  # seconds to import, and not needed by the arithmetic

    if not Path(path).is_dir():  # transformers would take it for the name of a download
        raise InputError(f"model.path: no tokenizer could be read from {path}: not a folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers and its parsers raise whatever they meet
        raise InputError(
            f"model.path: no tokenizer could be read from {path}: {first_line(error)}"
        ) from error
    # Without its files transformers makes one up that turns every text into nothing.
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise InputError(
            f"model.path: no tokenizer could be read from {path}: it has no token of text"
        )
    return tokenizer


def is_text(value: object) -> bool:
    """Whether this is a string without lone surrogates, which stand for no character."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def fill(text: str, slots: Mapping[str, str]) -> str:
    """Replaces `{name}` by slots[name]; braces inside slot texts and `{}` stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: slots.get(match[1], match[0]), text)


_MARK = "\ufdd0"  # Unicode promises that no text has it


def render(
    tokenizer,
    template: Template,
    slots: Mapping[str, str],
    turns: Sequence[tuple[str, str]] = (),
) -> list[int]:
    """Token ids of a prompt, generation header and tail included.

    What looks like a special token in a slot or a turn stays text; only templates have special
    tokens.

    Args:
      turns: (role, text) of the conversation before the template's user turn. A system turn that
        opens it also takes the template's system text, after a blank line.

    Raises:
      InputError: the tokenizer's chat template fails on these turns.
    """
    special = {
        str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    names = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))

    def mark(text: str) -> str:
        return re.sub(names, lambda match: f"{_MARK}{special[match[0]]}{_MARK}", text)

    marked = {slot: mark(text) for slot, text in slots.items()}
    turns = [(role, mark(text)) for role, text in turns]
    text = _chat(tokenizer, template, marked, turns) + fill(template.tail, marked)
    if _MARK not in text:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    # Tokenizers work on what stands between special tokens piece by piece, and so do we.
    ids = []
    for piece in re.split(f"({names})", text):
        ids += [special[piece]] if piece in special else _text_ids(tokenizer, piece, special)
    return ids


def _chat(
    tokenizer, template: Template, slots: Mapping[str, str], turns: Sequence[tuple[str, str]]
) -> str:
    system = [text for role, text in turns[:1] if role == "system"]
    before = turns[len(system) :]
    system += [fill(template.system, slots)] if template.system else []
    turns = [("system", "\n\n".join(system))] if system else []
    turns += [*before, ("user", fill(template.user, slots))]
    messages = [{"role": role, "content": text} for role, text in turns]
    return _apply(tokenizer, messages, template.thinking, header=True)


def header(tokenizer, template: Template) -> list[int]:
    """Ids that follow the user turn of a prompt: where the response starts from.

    Raises:
      InputError: as `render`.
    """
    messages = [{"role": "user", "content": "1"}]
    start, whole = (_apply(tokenizer, messages, template.thinking, header=x) for x in (False, True))
    text = whole.removeprefix(start) + template.tail
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _apply(tokenizer, messages: list[dict[str, str]], thinking: bool, header: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=header,
            enable_thinking=thinking,
            date_string=DATE,
        )
    except Exception as error:  # templates are programs
        roles = " and a ".join(message["role"] for message in messages)
        raise InputError(
            f"model.path: the tokenizer's chat template fails on a {roles} turn: "
            f"{first_line(error)}"
        ) from error


def _text_ids(tokenizer, piece: str, special: Mapping[str, int]) -> list[int]:
    """Ids of a text in which `render` has marked what looks like a special token."""
    names = {str(i): name for name, i in special.items()}
    text = re.sub(f"{_MARK}(\\d+){_MARK}", lambda match: names.get(match[1], match[0]), piece)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # A vocabulary of whole words may have special tokens among its words.
    controls = set(special.values())
    return [tokenizer.unk_token_id if i in controls else i for i in ids]


def render_within(
    tokenizer, template: Template, problem: Problem, privileged: Mapping[str, str], limit: int
) -> tuple[list[int], bool]:
    """`render` in at most `limit` tokens; only privileged slots are cut, the longest first.

    Returns:
      The ids, and whether privileged text was cut.

    Raises:
      InputError: the prompt is too long even without privileged text.
    """

    def attempt(kept: int | None) -> list[int]:
        slots = dict(privileged, problem=problem.prompt)
        if kept is not None:
            slots[longest] = slots[longest][:kept]
        return render(tokenizer, template, slots, problem.turns)

    ids = attempt(None)
    if len(ids) <= limit:
        return ids, False
    longest = max(privileged, key=lambda name: len(privileged[name]), default=None)
    if longest and privileged[longest] and len(attempt(0)) > limit:
        rest = {**privileged, longest: ""}
        return render_within(tokenizer, template, problem, rest, limit)[0], True
    if not longest or not privileged[longest]:
        raise InputError(
            f"prompt: {len(ids)} tokens, expected at most {limit}, for the problem "
            f"{problem.prompt[:80]!r}"
        )
    low, high = 0, len(privileged[longest])  # characters: `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(attempt(middle)) <= limit else (low, middle)
    return attempt(low), True


def left_pad(
    rows: Sequence[Sequence[int]], width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """i32[B, width] with each row at the right end, and the rows' lengths i32[B]."""
    out = np.full((len(rows), width), pad_id, np.int32)
    for i, row in enumerate(rows):
        out[i, width - len(row) :] = row
    return out, np.array([len(row) for row in rows], np.int32)


def response_text(tokenizer, ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """Text of a response without its stop token."""
    ids = [int(i) for i in ids]
    if ids and ids[-1] in stop_ids:
        ids = ids[:-1]
    return tokenizer.decode(ids, skip_special_tokens=True)


def stop_ids(tokenizer, path: str | os.PathLike) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's and those of generation_config.json.

    Raises:
      InputError: neither has one, or generation_config.json cannot be read or has an id that the
        tokenizer does not know.
    """
    file, ids = Path(path) / "generation_config.json", None
    if file.is_file():
        try:
            ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{file}: expected a JSON object: {first_line(error)}") from error
    ids = ids if isinstance(ids, list) else [ids]
    ids = [i for i in [*ids, tokenizer.eos_token_id] if i is not None]
    for i in ids:
        if type(i) is not int or not 0 <= i < len(tokenizer):
            raise InputError(
                f"{file}: eos_token_id has {i!r}, expected ids of the tokenizer's "
                f"{len(tokenizer)} tokens"
            )
    if not ids:
        raise InputError(
            f"model.path: neither the tokenizer nor generation_config.json in {path} names a "
            "token that ends a response"
        )
    return tuple(sorted(set(ids)))
