"""The built-in task, and what the shipped tiny model can do before any reinforcement learning."""

from pathlib import Path

import jax
import numpy as np
import pytest
from shipped import Shipped, accuracy_by_problem

from jaxrl_sd import countdown, data, tokens, weights
from jaxrl_sd.countdown import TEMPLATES
from jaxrl_sd.types import InputError
from jaxrl_sd.verify.countdown import verify

ASSET = Path(countdown.__file__).parent / "assets" / "tiny"
TRAIN = countdown.problems("train", 300, seed=3)
TEST = countdown.problems("test", 300, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.load_tokenizer(ASSET)


def slots(problem, peer=None):
    return {
        "problem": problem.prompt,
        "answer": problem.answer,
        "solution": problem.solution,
        "peer": peer or problem.solution,
    }


def test_same_arguments_give_same_problems():
    assert countdown.problems("train", 300, seed=3) == TRAIN
    assert countdown.problems("train", 100, seed=3) == TRAIN[:100]
    assert countdown.problems("train", 300, seed=4) != TRAIN


def test_every_enumerated_solution_passes_the_verifier():
    for problem in TRAIN + TEST:
        ways = countdown.solutions(*countdown.parse_prompt(problem.prompt))
        assert problem.solution in {countdown.solution_text(steps) for steps in ways}
        for steps in ways:
            assert verify(problem.prompt, problem.answer, countdown.solution_text(steps))


def test_enumeration_is_complete_on_a_problem_solved_by_hand():
    texts = {countdown.solution_text(steps) for steps in countdown.solutions((1, 2, 3), 6)}
    assert texts == {
        "2 + 1 = 3 ; 3 + 3 = 6",
        "3 + 1 = 4 ; 4 + 2 = 6",
        "3 + 2 = 5 ; 5 + 1 = 6",
        "2 * 1 = 2 ; 3 * 2 = 6",
        "3 * 1 = 3 ; 3 * 2 = 6",
        "3 * 2 = 6 ; 6 * 1 = 6",
    }


def test_retry_is_a_fresh_attempt():
    solution = TRAIN[0].solution
    assert verify(TRAIN[0].prompt, "", f"9 + 9 = 18 {countdown.RETRY} {solution}")
    assert not verify(TRAIN[0].prompt, "", f"{solution} {countdown.RETRY}")


def test_answer_holds_no_result_of_the_last_step():
    for problem in TRAIN:
        steps = problem.solution.split(" ; ")
        assert problem.answer == " ".join(step.split(" = ")[0] for step in steps)


def test_no_class_is_in_both_splits():
    train = {countdown.parse_prompt(p.prompt) for p in countdown.problems("train", 5000, seed=0)}
    test = {countdown.parse_prompt(p.prompt) for p in countdown.problems("test", 5000, seed=0)}
    assert not train & test
    assert len(test) > 300


def test_levels_come_in_their_shares():
    drawn = countdown.problems("train", 3000, seed=0)
    sizes = [len(countdown.parse_prompt(problem.prompt)[0]) for problem in drawn]
    for level in countdown.LEVELS:
        assert abs(sizes.count(level.numbers) / len(sizes) - level.share) < 0.03


def test_the_hard_task_has_its_own_levels_and_the_same_splits():
    train, test = (data.load("countdown_hard", split, 3000, 0) for split in ("train", "test"))
    numbers = [countdown.parse_prompt(problem.prompt)[0] for problem in train]
    assert abs(np.mean([len(n) == 4 for n in numbers]) - countdown.HARD_LEVELS[2].share) < 0.03
    assert any(len(n) == 3 and max(n) > 9 for n in numbers)
    easy = {countdown.parse_prompt(p.prompt) for p in countdown.problems("train", 5000, seed=0)}
    assert not easy & {countdown.parse_prompt(problem.prompt) for problem in test}
    assert all(verify(problem.prompt, "", problem.solution) for problem in test)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("dev", 1, 0), "split: got 'dev'"), (("test", 0, 0), "count: got 0")],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        countdown.problems(*arguments)


def test_tokenizer_knows_every_word_and_gives_the_text_back(tokenizer):
    for problem in TRAIN + TEST:
        peer = f"{problem.solution} {countdown.RETRY} {problem.solution}"
        texts = [problem.prompt, problem.answer, problem.solution, peer]
        for template in TEMPLATES.values():
            filled = tokens.fill(template["user"], slots(problem, peer))
            texts.append(filled + template.get("tail", ""))
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_special_tokens_are_distinct(tokenizer):
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}) == 3
    assert tokenizer("word", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


def test_chat_template_ends_with_the_generation_prompt(tokenizer):
    messages = [{"role": "system", "content": "see"}, {"role": "user", "content": "3 5 : 15"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(ids) == "<|system|> see <|user|> 3 5 : 15 <|assistant|>"


def test_student_prompt_and_marker_differ_by_the_tail_alone(tokenizer):
    nothing, marker = (
        tokens.render(tokenizer, tokens.Template(**TEMPLATES[kind]), slots(TRAIN[0]))
        for kind in ("nothing", "marker")
    )
    assert marker[:-1] == nothing
    assert tokenizer.decode(marker[-1:]) == TEMPLATES["marker"]["tail"].strip()


def test_asset_is_small_and_matches_its_tokenizer(tokenizer):
    assert sum(file.stat().st_size for file in ASSET.iterdir()) <= 3_000_000
    params, config = weights.load(ASSET)
    assert config.vocab_size == len(tokenizer)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


SHIPPED = Shipped(ASSET, TEMPLATES, slots, verify, max_prompt=44, max_response=24)


def test_shipped_model_uses_hints_and_starts_with_every_kind_of_group():
    problems = TEST[:128]
    plain = accuracy_by_problem(SHIPPED, problems, "nothing", group_size=8)
    assert 0.3 < plain.mean() < 0.55
    assert np.mean(plain == 0) >= 0.08
    assert np.mean(plain == 1) >= 0.08
    for kind in ("answer", "solution"):
        hinted = accuracy_by_problem(SHIPPED, problems, kind, group_size=8)
        assert hinted.mean() - plain.mean() >= 0.3
