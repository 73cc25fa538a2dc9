"""Modular chains, and what the shipped model can do before any reinforcement learning."""

from pathlib import Path

import jax
import numpy as np
import pytest
from shipped import Shipped, accuracy_by_problem

from jaxrl_sd import chains, data, tokens, weights
from jaxrl_sd.chains import TEMPLATES
from jaxrl_sd.types import InputError
from jaxrl_sd.verify import chains as verifier

ASSET = Path(chains.__file__).parent / "assets" / "chains"
MAX_PROMPT, MAX_HINT_PROMPT, MAX_RESPONSE = 16, 45, 28
TRAIN = chains.problems("train", 300, seed=3)
TEST = chains.problems("test", 300, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return tokens.load_tokenizer(ASSET)


def slots(problem):
    return {
        "problem": problem.prompt,
        "answer": problem.answer,
        "solution": problem.solution,
        "peer": problem.solution,
    }


@pytest.mark.parametrize(
    "response",
    [
        "3 + 5 = 8 * 4 = 2 # 2",
        "3 + 5 = 9 * 4 = 6 # 2",  # wrong steps
        "# 2",  # no steps
        "whatever\n  # 2 \n",
    ],
)
def test_the_verifier_reads_the_final_answer_alone(response):
    assert verifier.verify("3 + 5 * 4", "2", response) is True


@pytest.mark.parametrize(
    "response",
    [
        "",
        "#",
        "2",
        "2 #",
        "3 + 5 = 8 * 4 = 2",  # no final answer
        "3 + 5 = 8 * 4 = 2 # 3",
        "3 + 5 = 8 * 4 = 2 #2",
        "3 + 5 = 8 * 4 = 2 # 02",
        "3 + 5 = 8 * 4 = 2 # +2",
        "3 + 5 = 8 * 4 = 2 # 2.0",
        "3 + 5 = 8 * 4 = 2 # 12",
        "3 + 5 = 8 * 4 = 2 # ²",
        "3 + 5 = 8 * 4 = 2 # 2 ;",
        "3 + 5 = 8 * 4 = 2 # # 2",
        "# 3 # 2",  # two answers
        "# 2 think",
        "# 2 " * 1000,
    ],
)
def test_the_verifier_is_strict_about_form(response):
    assert verifier.verify("3 + 5 * 4", "2", response) is False


@pytest.mark.parametrize("answer", ["", "# 2", "02", "-2", "two"])
def test_an_answer_that_nothing_could_match_is_refused(answer):
    with pytest.raises(ValueError, match=r"answer: got .*expected a natural number"):
        verifier.verify("3 + 5 * 4", answer, "# 2")


def test_answers_are_put_to_a_vote_by_their_number():
    assert verifier.final_answer("3 + 5 = 8 # 8") == verifier.final_answer("# 8") == "8"
    assert all(verifier.final_answer(text) is None for text in ("8", "# two", "# 08"))


def test_chains_are_evaluated_from_left_to_right():
    chain = chains.parse_prompt("3 + 5 * 4 - 7")
    assert chain == (3, (("+", 5), ("*", 4), ("-", 7)))
    assert chains.results(chain) == [8, 2, 5]
    assert chains.solution_text(chain, [8, 2, 5]) == "3 + 5 = 8 * 4 = 2 - 7 = 5 # 5"


def test_problems_agree_with_an_evaluation_by_python():
    for problem in TRAIN + TEST:
        first, *rest = problem.prompt.split()
        operations = list(zip(rest[::2], rest[1::2], strict=True))
        nested = "(" * len(operations) + first + "".join(f" {op} {n})" for op, n in operations)
        assert problem.answer == str(eval(nested) % 10)
        assert chains.prompt_text(chains.parse_prompt(problem.prompt)) == problem.prompt


def test_same_arguments_give_same_problems():
    assert chains.problems("train", 300, seed=3) == TRAIN
    assert chains.problems("train", 100, seed=3) == TRAIN[:100]
    assert chains.problems("train", 300, seed=4) != TRAIN


def test_no_expression_is_in_both_splits():
    train = {problem.prompt for problem in chains.problems("train", 20000, seed=0)}
    test = {problem.prompt for problem in chains.problems("test", 5000, seed=0)}
    assert not train & test
    assert len(test) > 4500


def test_levels_come_in_their_shares():
    drawn = chains.problems("train", 3000, seed=0)
    sizes = [len(chains.parse_prompt(problem.prompt).operations) for problem in drawn]
    for level in chains.LEVELS:
        assert abs(sizes.count(level.operations) / len(sizes) - level.share) < 0.03


def test_full_solutions_are_right_and_fit():
    for problem in TRAIN + TEST:
        assert verifier.verify(problem.prompt, problem.answer, problem.solution)
        assert len(problem.solution.split()) < MAX_RESPONSE
        for step in problem.solution.split(" # ")[0].split(" = ")[1:]:
            assert int(step.split()[0]) in range(10)


def test_terse_solutions_are_the_answer_and_all_else_is_the_same():
    full, terse = (data.load(name, "train", 50, 0) for name in ("chains", "chains_answer"))
    assert all(problem.solution == problem.answer for problem in terse)
    for ours, theirs in zip(full, terse, strict=True):
        assert (ours.id, ours.prompt, ours.answer) == (theirs.id, theirs.prompt, theirs.answer)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("dev", 1, 0), "split: got 'dev'"), (("test", 0, 0), "count: got 0")],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        chains.problems(*arguments)


def test_every_hint_fits_and_the_tokenizer_gives_it_back(tokenizer):
    longest = 0
    for problem in TRAIN[:50] + TEST[:50]:
        values = slots(problem)
        for kind, fields in TEMPLATES.items():
            text = tokens.fill(fields["user"], values) + fields.get("tail", "")
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
            ids = tokens.render(tokenizer, tokens.Template(**fields), values)
            assert len(ids) <= (MAX_PROMPT if kind in ("nothing", "marker") else MAX_HINT_PROMPT)
            longest = max(longest, len(ids))
    assert longest == MAX_HINT_PROMPT


def test_asset_is_small_and_matches_its_tokenizer(tokenizer):
    assert sum(file.stat().st_size for file in ASSET.iterdir()) < 1_500_000
    params, config = weights.load(ASSET)
    assert config.vocab_size == len(tokenizer)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


SHIPPED = Shipped(ASSET, TEMPLATES, slots, verifier.verify, MAX_HINT_PROMPT, MAX_RESPONSE)


def test_shipped_model_copies_what_it_is_shown_and_starts_with_mixed_groups():
    problems = TEST[:64]
    plain = accuracy_by_problem(SHIPPED, problems, "nothing", group_size=8)
    assert 0.35 < plain.mean() < 0.6
    assert np.mean((plain > 0) & (plain < 1)) > 0.7
    for kind in ("answer", "solution"):
        assert accuracy_by_problem(SHIPPED, problems, kind, group_size=8).mean() > 0.9


def test_shipped_model_is_not_perfected_by_greedy_decoding():
    greedy = accuracy_by_problem(SHIPPED, TEST[:128], "nothing", 1, temperature=0.0)
    assert 0.5 < greedy.mean() < 0.75


def test_another_problems_solution_misleads_the_shipped_model():
    """So that a gain from hints is one from what they say, not from their being there."""
    problems = TEST[:64]
    others = {p.id: q for p, q in zip(problems, problems[1:] + problems[:1], strict=True)}
    shuffled = SHIPPED._replace(
        slots=lambda problem: slots(problem) | {"solution": others[problem.id].solution}
    )
    assert accuracy_by_problem(shuffled, problems, "solution", group_size=8).mean() < 0.3
