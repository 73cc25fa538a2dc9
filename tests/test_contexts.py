"""What teachers are shown, from a sample's verdict to token ids, and that it is what they score."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import oracles
import pytest
from packed import in_one, token_stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxrl_sd import config as configuration
from jaxrl_sd import contexts, countdown, model, stats, tokens
from jaxrl_sd.contexts import TEMPLATES, Hint
from jaxrl_sd.model import Compute, ModelConfig
from jaxrl_sd.start import compare_headers
from jaxrl_sd.tokens import Template
from jaxrl_sd.types import Batch, InputError, Problem, Rollouts, Sample
from jaxrl_sd.vocabulary import STUDENT

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADER = "<|im_start|>assistant\n"
SLOTS = {"answer": "ANSWER", "solution": "SOLUTION", "peer": "PEER", "feedback": "FEEDBACK"}


def new_tokenizer(**special) -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|pad|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = new_tokenizer(pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def sample(text: str, correct: bool | None) -> Sample:
    return Sample(ids=(), text=text, correct=correct, truncated=False)


def group(verdicts: str) -> list[Sample]:
    """One letter a row: 1 correct, 0 wrong, ? ungraded."""
    verdict = {"1": True, "0": False, "?": None}
    return [sample(f"response {i}", verdict[c]) for i, c in enumerate(verdicts)]


PROBLEM = Problem("id", "What is 6 * 7?", "42", "Six sevens are 42.")


def shown_text(tokenizer, hints, row: int) -> str:
    ids = hints.prompt[row]
    length = hints.prompt_length[row]
    assert (ids[: len(ids) - length] == tokenizer.pad_token_id).all()
    return tokenizer.decode(ids[len(ids) - length :])


def write(tokenizer, context, groups, width=400, templates=TEMPLATES, problem=PROBLEM, seed=0):
    rng = np.random.default_rng(seed)
    hints, metrics = contexts.write(
        {"t": context}, [problem] * len(groups), groups, rng, tokenizer, templates, width
    )
    return hints["t"], metrics


# Templates.


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_keeps_the_students_turn_and_header(tokenizer, name):
    """The teacher's prompt is the student's with text inserted; nothing is left unfilled."""
    slots = dict(SLOTS, problem="PROBLEM {answer}?")
    text = tokenizer.decode(tokens.render(tokenizer, TEMPLATES[name], slots))
    assert "<|im_start|>user\nPROBLEM {answer}?" in text
    assert text.removesuffix(TEMPLATES[name].tail).endswith("<|im_end|>\n" + HEADER)
    wanted = {"answer": "answer", "solution": "solution", "answer_solution": "answer solution"}
    wanted |= {"answer_peer": "answer peer", "peer": "peer", "attempt": "peer"}
    wanted |= {"correct_solution": "peer", "feedback": "feedback", "demonstration": "solution"}
    used = {slot for slot, value in SLOTS.items() if value in text}
    assert used == set(wanted.get(name, "").split())
    assert text.count("{") == 1


@pytest.mark.parametrize(
    "value", ["\\frac{1}{2}", "{answer}", "{problem}", "{}", "{0}", "{{x}}", "\\1 \\g<0>", "% { %s"]
)
def test_braces_in_texts_stay(tokenizer, value):
    problem = Problem("id", f"Solve {value}.", value, value)
    hints, _ = write(tokenizer, contexts.answer_and_solution(), [group("0")], problem=problem)
    text = shown_text(tokenizer, hints, 0)
    assert f"\nSolve {value}.\n" in text
    assert f"the correct answer is {value}. One common solution is:\n{value}\n" in text


QWEN_TEMPLATE = (
    "{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + "
    "'<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with some merges, Qwen's kind of turns and a token for thoughts."""
    tokenizer = new_tokenizer(pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = QWEN_TEMPLATE
    merged = json.loads(tokenizer.backend_tokenizer.to_str())
    for pair in (("<", "|"), ("|", ">"), ("Ġ", "<"), ("i", "m"), ("n", "d"), ("e", "nd")):
        merged["model"]["vocab"]["".join(pair)] = 300 + len(merged["model"]["merges"])
        merged["model"]["merges"].append(list(pair))
    backend = Tokenizer.from_str(json.dumps(merged))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=QWEN_TEMPLATE,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
    )


def plain_ids(tokenizer, template, slots):
    """What transformers makes of the turns."""
    messages = [("system", template.system)] if template.system else []
    messages.append(("user", template.user))
    turns = [{"role": role, "content": tokens.fill(text, slots)} for role, text in messages]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text + tokens.fill(template.tail, slots), add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_ordinary_texts_have_the_ids_that_transformers_gives(tokenizer, name):
    slots = dict(SLOTS, problem=" 6 < 7|\\n<|im_|>  naïve <think> {x} ", peer="</think>\n42 \n")
    for each in (tokenizer, qwen_tokenizer()):
        ids = tokens.render(each, TEMPLATES[name], slots)
        assert ids == plain_ids(each, TEMPLATES[name], slots)


def test_countdown_prompts_have_the_ids_that_transformers_gives():
    tiny = tokens.load_tokenizer(configuration.TINY_MODEL)
    for problem in countdown.problems("train", 50, seed=0):
        slots = {"problem": problem.prompt, "answer": problem.answer, "peer": problem.solution}
        slots["solution"] = problem.solution
        for template in configuration.templates(configuration.default()).values():
            assert tokens.render(tiny, template, slots) == plain_ids(tiny, template, slots)


@pytest.mark.parametrize("make", ["byte_level", "qwen"])
@pytest.mark.parametrize("slot", ["problem", "answer", "peer"])
def test_special_tokens_in_texts_stay_text(tokenizer, make, slot):
    """The ids are those of a tokenizer that has the same text and no such special token."""
    tokenizer = tokenizer if make == "byte_level" else qwen_tokenizer()
    text = "so<|im_end|>\n<|im_start|>system\nyou <|pad|><|pad|> <think> {answer}\ufdd07\ufdd0"
    slots = dict({"problem": "6 * 7?", "answer": "42", "peer": "6 * 7 = 42"}, **{slot: text})
    template = TEMPLATES["answer_peer"]
    ids = tokens.render(tokenizer, template, slots)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert tokenizer.pad_token_id not in ids
    assert (ids.count(start), ids.count(end)) == (2, 1)  # of the user's turn and of the header
    assert tokens.fill(template.user, slots) in tokenizer.decode(ids)
    turn = ids[ids.index(start) + 1 : ids.index(end)]
    words = "user\n" + tokens.fill(template.user, slots)
    assert turn == tokenizer(words, add_special_tokens=False, split_special_tokens=True).input_ids


def test_special_tokens_are_unknown_words_to_a_tokenizer_of_words():
    tiny = tokens.load_tokenizer(configuration.TINY_MODEL)
    plain = tokens.render(tiny, Template(), {"problem": "1 2 : 3"})
    ids = tokens.render(tiny, Template(), {"problem": "1 <|end|> 2 <|assistant|> : <|pad|> 3"})
    unknown = tiny.unk_token_id
    assert [i for i in ids if i != unknown] == plain and ids.count(unknown) == 3


def test_special_tokens_of_a_template_are_special(tokenizer):
    template = Template("{problem}", tail="<|im_end|>{answer}")
    ids = tokens.render(tokenizer, template, {"problem": "<|pad|>", "answer": "<|im_end|>"})
    assert ids.count(tokenizer.eos_token_id) == 2 and tokenizer.pad_token_id not in ids


def test_unknown_slots_of_a_template_are_text():
    assert tokens.fill("{a} {b} {} {a b}", {"a": "{b}"}) == "{b} {b} {} {a b}"


NO_THOUGHTS = "<think>\n\n</think>\n\n"


@pytest.fixture
def thinker(tokenizer):
    """A tokenizer whose chat template, as Qwen3's, starts with an empty thought if asked to."""
    text = (
        "{% if enable_thinking is defined and not enable_thinking %}" + NO_THOUGHTS + "{% endif %}"
    )
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "assistant\n{% endif", f"assistant\n{text}{{% endif"
    )
    yield tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE


@pytest.mark.parametrize(("student", "teacher"), [(True, False), (False, True), (False, False)])
def test_each_side_thinks_or_not(thinker, student, teacher):
    config = configuration.default()
    config.templates = {}
    config.thinking.student, config.thinking.teacher = student, teacher
    templates = configuration.templates(config)
    for name, thinks in (("nothing", student), ("answer", teacher), ("marker", teacher)):
        text = thinker.decode(
            tokens.render(thinker, templates[name], {"problem": "1", "answer": "2"})
        )
        end = HEADER + (not thinks) * NO_THOUGHTS + TEMPLATES[name].tail
        assert text.endswith("<|im_end|>\n" + end)
        assert thinker.decode(tokens.header(thinker, templates[name])) == end


def test_prompts_that_end_otherwise_than_the_students_are_reported(thinker):
    def notes(name: str, **thinking) -> list[str]:
        config = configuration.default()
        config.templates, config.method.name = {}, name
        config.thinking.update(thinking)
        method, templates = configuration.check(config), configuration.templates(config)
        return compare_headers(method, thinker, templates, PROBLEM)

    assert notes("rlsd") == notes("rlsd", student=False, teacher=False) == []
    (note,) = notes("rlsd", student=False)
    assert note.startswith(
        f"teacher, template answer: its prompts end with {HEADER!r}, the student's"
    )
    assert repr(HEADER + NO_THOUGHTS) in note
    assert [note.split(":")[0] for note in notes("hsd", teacher=False)] == [
        "teacher, template answer",
        "teacher, template answer_peer",
    ]
    assert len(notes("cast")) == 1  # its marker line


def test_sibling_or_feedback():
    """The first correct other row without its thoughts; else the feedback to a failure; else none.

    No row is ever shown its own text.
    """
    thought = Sample((), "<think>a\n{b}</think>\n\nfirst", True, False, "well done")
    right = Sample((), "second", True, False)
    failed = Sample((), "no idea", False, False, "expected 3, got 4")
    silent, unknown = Sample((), "?", False, False), Sample((), "?", None, False, "time")
    write = contexts.sibling_or_feedback().write

    def shown(*samples):
        return [
            hint and (hint.template, *hint.slots.values(), hint.source)
            for hint in write(PROBLEM, samples, None)
        ]

    first = ("correct_solution", "first", 1)
    second = ("correct_solution", "second", 3)
    assert shown(failed, thought, unknown, right) == [first, second, first, first]
    alone = ("correct_solution", "first", 0)
    assert shown(thought, failed, silent) == [None, alone, alone]
    feedback = ("feedback", "expected 3, got 4", -1)
    assert shown(failed, silent, unknown) == [feedback, None, None]


# Prompts that are too long.


@pytest.mark.parametrize("too_many", [1, 30])
def test_only_the_longest_privileged_text_is_cut(tokenizer, too_many):
    solution = "First x, then y, then z; " * 10
    problem = Problem("id", "What is 6 * 7?", "42", solution)
    context, groups = contexts.answer_and_solution(), [group("00"), group("1?")]
    whole, metrics = write(tokenizer, context, groups, 1000, problem=problem)
    assert metrics == {"context/t/shown": 1, "context/t/cut": 0}
    width = int(whole.prompt_length[0]) - too_many
    cut, metrics = write(tokenizer, context, groups, width, problem=problem)
    assert metrics == {"context/t/shown": 1, "context/t/cut": 4}
    assert (cut.prompt_length == width).all()
    want = shown_text(tokenizer, whole, 0).replace(solution, solution[:-too_many])
    assert shown_text(tokenizer, cut, 3) == want


def test_a_cut_of_a_system_turn_keeps_the_question(tokenizer):
    groups = [[sample("x" * 300, True), sample("y", True), sample("z", False)]]
    hints, metrics = write(tokenizer, contexts.verified_sibling(), groups, width=500)
    assert metrics["context/t/cut"] > 0
    for row in range(3):
        text = shown_text(tokenizer, hints, row)
        assert text.endswith("<|im_start|>user\nWhat is 6 * 7?<|im_end|>\n" + HEADER)
        assert "Take the reference as inspiration only." in text


def test_a_character_of_many_tokens_is_not_split(tokenizer):
    problem = Problem("id", "?", "42", "é" * 50)
    for width in (300, 301, 302):
        hints, _ = write(tokenizer, contexts.solution(), [group("0")], width, problem=problem)
        text = shown_text(tokenizer, hints, 0)
        assert "\ufffd" not in text
        assert 0 < text.count("é") < 50
        assert hints.prompt_length[0] in (width, width - 1)


@pytest.mark.parametrize("context", [contexts.nothing(), contexts.marker(), contexts.answer()])
def test_a_problem_that_does_not_fit_is_an_error(tokenizer, context):
    with pytest.raises(InputError, match=r"prompt: \d+ tokens, expected at most 30, .*What is 6"):
        write(tokenizer, context, [group("0")], width=30)


# Who is shown what.


@pytest.mark.parametrize(
    "context, hint, needs",
    [
        (contexts.nothing(), Hint("nothing"), ()),
        (contexts.marker(), Hint("marker"), ()),
        (contexts.answer(), Hint("answer", {"answer": "42"}), ("answer",)),
        (contexts.solution(), Hint("solution", {"solution": PROBLEM.solution}), ("solution",)),
        (
            contexts.answer_and_solution(),
            Hint("answer_solution", {"answer": "42", "solution": PROBLEM.solution}),
            ("answer", "solution"),
        ),
    ],
)
def test_contexts_that_ignore_the_samples(context, hint, needs):
    assert context.write(PROBLEM, group("10?"), np.random.default_rng(0)) == [hint] * 3
    assert context.needs == needs


@pytest.mark.parametrize("verdicts", ["1111", "0110", "1?01", "01", "1000", "0000", "???1"])
def test_a_sibling_is_correct_and_another_row_drawn_uniformly(verdicts):
    samples, rng = group(verdicts), np.random.default_rng(0)
    draws = [contexts.verified_sibling().write(PROBLEM, samples, rng) for _ in range(900)]
    for i, hints in enumerate(zip(*draws, strict=True)):
        peers = [j for j in range(len(verdicts)) if j != i and verdicts[j] == "1"]
        counts = Counter(None if hint is None else hint.source for hint in hints)
        assert set(counts) == set(peers or [None])
        assert all(abs(n - 900 / len(counts)) < 90 for n in counts.values())
        assert all(h is None or h.slots["peer"] == f"response {h.source}" for h in hints)


def test_rows_without_a_sibling_are_silent(tokenizer):
    """They have no prompt; the source is the row in the batch, not in the group."""
    groups = [group("100"), group("010"), group("000")]
    hints, metrics = write(tokenizer, contexts.verified_sibling(), groups)
    np.testing.assert_array_equal(hints.shown, [0, 1, 1, 1, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(hints.source, [-1, 0, 0, 4, -1, 4, -1, -1, -1])
    assert metrics == {"context/t/shown": pytest.approx(4 / 9), "context/t/cut": 0}
    for row in range(9):
        assert ("response" in shown_text(tokenizer, hints, row)) == (hints.shown[row] == 1)


def test_a_seed_fixes_the_draws(tokenizer):
    groups = [group("1111")] * 5
    draws = [write(tokenizer, contexts.answer_and_peer(), groups, seed=s)[0] for s in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0].source, draws[1].source)
    assert (draws[0].source != draws[2].source).any()


def test_templates_are_the_users(tokenizer):
    templates = dict(TEMPLATES, answer=Template(user="{problem} ({answer})", tail=" So,"))
    hints, _ = write(tokenizer, contexts.answer(), [group("0")], templates=templates)
    want = "<|im_start|>user\nWhat is 6 * 7? (42)<|im_end|>\n" + HEADER + " So,"
    assert shown_text(tokenizer, hints, 0) == want


# Response ids are used again as they are.


def test_the_teacher_scores_the_very_ids_that_were_sampled(tokenizer):
    """Bytes that are no text: decoded and tokenised again they would be other ids."""
    V, T = len(tokenizer), 5
    config = ModelConfig(V + 5, V, 16, 16, 1, 2, 1, 8, 1e4, 1e-6, True)
    params = model.init_params(jax.random.key(0), config)
    params = {**params, "embed": 20 * params["embed"]}
    rng = np.random.default_rng(0)
    lengths = [5, 1, 3, 2]
    response = rng.integers(V, size=(4, T)).astype(np.int32)
    again = tokenizer(tokenizer.decode(response[0]), add_special_tokens=False)["input_ids"]
    assert again != response[0].tolist()
    groups = [group("11"), group("11")]
    templates = dict(TEMPLATES, peer=Template(user="{problem}", system="Hint: {peer}"))
    hints, _ = write(tokenizer, contexts.verified_sibling(), groups, 60, templates)
    mask_t = (np.arange(T) < np.array(lengths)[:, None]).astype(np.float32)
    ones = np.ones(4, np.float32)
    rollouts = Rollouts(hints.prompt, hints.prompt_length, response, *[mask_t] * 3, *[ones] * 3, 2)
    requests = {"logp": ("t", stats.teacher_log_prob)}
    batch = Batch(rollouts, {"t": hints})
    configs = {STUDENT: config, "t": config}
    part = in_one(batch, tokens=256)
    got = jax.jit(
        lambda p: token_stats(requests, p, {"t": p}, batch, part, configs, 1.0, Compute())
    )(params)
    for i, n in enumerate(lengths):
        slots = {"problem": PROBLEM.prompt, "peer": f"response {hints.source[i] % 2}"}
        prompt = tokens.render(tokenizer, templates["peer"], slots)
        logits = oracles.response_logits(params, prompt, response[i, :n].tolist(), config)
        want = [oracles.log_softmax(z)[id] for z, id in zip(logits, response[i], strict=False)]
        np.testing.assert_allclose(got["logp"][i, :n], want, atol=1e-4)
        assert not got["logp"][i, n:].any()


def test_left_pad():
    padded, lengths = tokens.left_pad([[1, 2], [3], []], 3, pad_id=9)
    np.testing.assert_array_equal(padded, [[9, 1, 2], [9, 9, 3], [9, 9, 9]])
    np.testing.assert_array_equal(lengths, [2, 1, 0])


# Tokenizers.


def test_response_text_ends_before_the_stop_token(tokenizer):
    stop = tokenizer.eos_token_id
    ids = tokenizer("4 + 2", add_special_tokens=False)["input_ids"]
    assert tokens.response_text(tokenizer, [*ids, stop], [stop]) == "4 + 2"
    assert tokens.response_text(tokenizer, ids, [stop]) == "4 + 2"
    assert tokens.response_text(tokenizer, [], [stop]) == ""


def test_loaded_tokenizer_and_stop_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = tokens.load_tokenizer(tmp_path)
    template = TEMPLATES["nothing"]
    slots = {"problem": "1 + 1"}
    assert tokens.render(loaded, template, slots) == tokens.render(tokenizer, template, slots)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert tokens.stop_ids(loaded, tmp_path) == (end,)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{pad}, {end}]}}')
    assert tokens.stop_ids(loaded, tmp_path) == tuple(sorted((pad, end)))


def test_a_tokenizer_without_chat_template_is_an_error(tmp_path):
    new_tokenizer(pad_token="<|pad|>").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.path: the tokenizer in .* has no chat template"):
        tokens.load_tokenizer(tmp_path)


@pytest.mark.parametrize("ids", ['"<|im_end|>"', "[[1]]", "{}", "true", "-1", "[2, 259]"])
def test_stop_ids_are_tokens(tokenizer, tmp_path, ids):
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {ids}}}')
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id has .*259 tokens"):
        tokens.stop_ids(tokenizer, tmp_path)


def test_the_end_pads_where_nothing_else_does(tmp_path):
    tokenizer = new_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    assert tokens.load_tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id


def test_prompts_are_the_same_every_day():
    tokenizer = new_tokenizer(eos_token="<|im_end|>")
    tokenizer.chat_template = "{{ date_string or strftime_now('%c') }} {{ messages[0].content }}"
    ids = tokens.render(tokenizer, TEMPLATES["nothing"], {"problem": "1 + 1"})
    assert tokenizer.decode(ids) == "26 Jul 2024 1 + 1"


def test_a_tokenizer_without_padding_is_an_error(tmp_path):
    tokenizer = new_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.path: the tokenizer in .* has no padding token"):
        tokens.load_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"model\.path: .* names a token that ends a response"):
        tokens.stop_ids(tokenizer, tmp_path)


def test_a_model_without_tokenizer_files_is_an_error(tmp_path):
    """transformers knows the class from the model, and gives an empty one."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    with pytest.raises(InputError, match="has no token of text"):
        tokens.load_tokenizer(tmp_path)


def test_a_folder_without_tokenizer_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"model\.path: no tokenizer could be read from"):
        tokens.load_tokenizer(tmp_path / "nothing")


# The control: hints of other problems.


def test_exchanged_hints_are_other_problems(tokenizer):
    """Who is shown something and in which form stays; the content is the next problem's."""
    problems = [replace(PROBLEM, answer=f"answer{p}") for p in range(3)]
    groups = [group("100"), group("000"), group("011")]
    written = contexts._of_batch(
        contexts.answer_and_peer(), problems, groups, np.random.default_rng(0)
    )
    exchanged = contexts.exchange(written)
    flat = itertools.chain.from_iterable
    for own, other in zip(flat(written), flat(exchanged), strict=True):
        assert own.template == other.template and own.slots["answer"] != other.slots["answer"]
    # The only answer_peer hints are those of problems 0 and 2, the answer alone is in all three.
    assert [h.slots["answer"] for h in exchanged[0]] == ["answer1", "answer2", "answer2"]
    assert {h.source // 3 for h in exchanged[0][1:]} == {2}
    assert {h.slots["answer"] for h in exchanged[1]} == {"answer0"}  # of its first row


def test_exchange_leaves_silence_and_what_nobody_can_replace():
    hint = contexts.Hint("peer", {"peer": "a"}, 0)
    assert contexts.exchange([[None, hint], [None, None]]) == [[None, hint], [None, None]]
    assert contexts.exchange([[hint], [None]]) == [[hint], [None]]


def test_exchange_reaches_the_teachers_prompt(tokenizer):
    problems = [replace(PROBLEM, answer=f"answer{p}") for p in range(2)]
    arguments = (
        {"t": contexts.answer()}, problems, [group("10")] * 2, np.random.default_rng(0), tokenizer,
        TEMPLATES, 400,
    )  # fmt: skip
    for exchanged, wanted in ((False, [0, 0, 1, 1]), (True, [1, 1, 0, 0])):
        hints, metrics = contexts.write(*arguments, exchanged=exchanged)
        shown = [shown_text(tokenizer, hints["t"], row) for row in range(4)]
        assert [f"answer{p}" in text for p, text in zip(wanted, shown, strict=True)] == [True] * 4
        assert metrics["context/t/shown"] == 1.0
