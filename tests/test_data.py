"""Reading problems and the order in which training sees them."""

import json
import sys

import datasets
import numpy as np
import pytest

from jaxrl_sd import config, data, rollout, tokens
from jaxrl_sd.tokens import Template, load_tokenizer
from jaxrl_sd.types import InputError, Problem
from jaxrl_sd.verify import math

GSM8K = {"question": "48 clips, and half as many?", "answer": "48+24 = <<48+24=72>>72.\n#### 1,072"}
MATH = {
    "problem": "Half?",
    "level": "Level 1",
    "type": "Algebra",
    "solution": r"It is not \boxed{2} but $\boxed{\frac{1}{2}}$.",
}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "How many? Let's think."}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"split": "train", "index": 7},
}


def write(tmp_path, *rows):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def read(tmp_path, *rows, **settings):
    return data.load(str(write(tmp_path, *rows)), "train", 0, 0, **settings)


def test_usual_column_names_are_recognised(tmp_path):
    first, second, third, fourth = read(
        tmp_path,
        {"problem": "1+1?", "answer": 2, "solution": "one and one"},
        {"question": "Half of 5,000?", "answer": "Half of 5000 is\n#### 2,500"},
        {"prompt": "x?", "ground_truth": "\\frac{1}{2}"},
        {"input": "point?", "expected_answer": "see\n#### (1,2)"},
    )
    assert (first.prompt, first.answer, first.solution) == ("1+1?", "2", "one and one")
    assert (second.answer, second.solution) == ("2500", "Half of 5000 is")
    assert fourth.answer == "(1,2)"
    assert (third.answer, third.solution, third.verifier) == ("\\frac{1}{2}", None, "math")


@pytest.mark.parametrize(
    ("row", "answer", "solution"),
    [
        (GSM8K, "1072", "48+24 = <<48+24=72>>72."),
        (MATH, r"\frac{1}{2}", MATH["solution"]),
        ({**MATH, "answer": "0.5"}, "0.5", MATH["solution"]),  # MATH-500 has both
        (VERL, "72", None),
        ({"ID": "2024-I-1", "Problem": "?", "Answer": 33}, "33", None),
        ({"id": 60, "problem": "?", "answer": "033"}, "033", None),
        ({"problem": "?", "answer": 70, "id": "0"}, "70", None),
        ({"problem": "?", "answer": 0.5}, "0.5", None),
        ({"problem": "?", "answer": "So 2,5 #### 4\n#### (2,500)"}, "(2,500)", "So 2,5 #### 4"),
        ({"problem": "?", "answer": r"\boxed{5}"}, "5", None),
        ({"problem": "?", "answer": r"$\boxed{5}$."}, "5", None),
        ({"problem": "?", "answer": r"\boxed{\left\{1\right.}"}, r"\left\{1\right.", None),
        ({"problem": "?", "answer": r"So \boxed{\{1, 2\}} it is"}, r"\{1, 2\}", "So"),
        ({"problem": "?", "answer": r"\boxed{5"}, r"\boxed{5", None),
    ],
)
def test_answers_in_the_forms_of_well_known_data_sets(tmp_path, row, answer, solution):
    (problem,) = read(tmp_path, row)
    assert problem.answer == answer
    assert (problem.solution or "").startswith(solution or "")
    assert bool(problem.solution) == bool(solution)
    assert problem.verifier == "math"
    assert problem.columns == row


@pytest.mark.parametrize("answer", ["033", 33, "33"])
def test_an_integer_may_have_leading_zeros(tmp_path, answer):
    (problem,) = read(tmp_path, {"problem": "?", "answer": answer})
    assert math.verify(problem.prompt, problem.answer, r"\boxed{33}")
    assert math.verify(problem.prompt, problem.answer, r"\boxed{033}")
    assert not math.verify(problem.prompt, problem.answer, r"\boxed{3}")


def test_numbers_are_written_without_exponents(tmp_path):
    """Read as mathematics, 1e-07 is e - 7 or worse, and no answer would be right."""
    rows = read(tmp_path, *({"prompt": "?", "answer": x} for x in (1e-07, 1e22, 2.50, 7)))
    assert [row.answer for row in rows] == ["0.0000001", "1" + 22 * "0", "2.5", "7"]


def test_an_answer_alone_is_no_solution(tmp_path):
    """DAPO-Math-17k-Processed has the answer in the column `solution` too."""
    row = {"prompt": "?", "solution": "34", "reward_model": {"ground_truth": "34"}}
    (problem,) = read(tmp_path, row)
    assert (problem.answer, problem.solution) == ("34", None)


def test_numbers_of_numpy_are_numbers():
    rows = {"0": {"problem": "?", "answer": np.int64(70)}}
    assert data.parse(rows, {}, "math", answers=True)[0].answer == "70"


def test_a_prompt_may_be_messages(tmp_path):
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "1+1?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    first, second = read(
        tmp_path, {"prompt": messages, "answer": 2}, {"prompt": "1+1?", "answer": 2}, suffix=" Go."
    )
    assert (first.turns, first.prompt, first.chat) == (tuple(turns[:-1]), "1+1? Go.", True)
    assert (second.turns, second.prompt, second.chat) == ((), "1+1? Go.", False)


def test_earlier_turns_stand_in_front_of_students_and_teachers_prompts():
    tokenizer = load_tokenizer(config.TINY_MODEL)
    turns = (("system", "1 2"), ("user", "3 <|pad|>"), ("assistant", "4 ;"))
    problem = Problem("id", "5 6", "7", turns=turns)

    def text(template, **slots):
        ids = tokens.render(tokenizer, template, {"problem": problem.prompt, **slots}, turns)
        assert tokenizer.pad_token_id not in ids  # what a data set says is no special token
        return tokenizer.decode(ids)

    plain, shown = text(Template()), text(Template(system="8 {peer}"), peer="9")
    assert plain.index("1 2") < plain.index("4 ;") < plain.index("5 6")
    assert shown.index("1 2") < shown.index("8 9") < shown.index("4 ;") < shown.index("5 6")
    assert shown.count("<|system|>") == plain.count("<|system|>") == 1
    prompt, (length,) = rollout.encode([problem], tokenizer, Template(), 60)
    assert tokenizer.decode(prompt[0, 60 - length :]) == plain


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), "expected at least one problem"),
        (({"prompt": "x"},), r"jsonl:1: answer: expected one of the columns \('answer'"),
        (({"prompt": "x", "answer": "1"}, {"prompt": "y", "answer": ""}), "jsonl:2"),
        (({"answer": "1"},), r"prompt: expected one of the columns \('prompt'"),
        (("{not json",), "jsonl:1: expected a JSON object, got '{not json'"),
        (("[1, 2]",), "jsonl:1: expected a JSON object"),
        (({"prompt": [{"role": "user"}], "answer": 1},), "prompt: expected text"),
        (({"prompt": [], "answer": 1},), "prompt: expected messages that end with the user's"),
        (
            ({"prompt": [{"role": "assistant", "content": "?"}], "answer": 1},),
            "prompt: expected messages that end with the user's",
        ),
        (({"prompt": [{"role": "me", "content": "?"}], "answer": 1},), "a role of"),
        (({"prompt": "x", "answer": True},), "answer: expected text, got True"),
        (({"prompt": "x", "answer": ["1"]},), r"answer: expected text, got \['1'\]"),
        (({"prompt": "x \ud83d", "answer": "1"},), r"prompt: expected text, got 'x \\ud83d'"),
        (("1" * 5000,), "jsonl:1: expected a JSON object"),
        (({"prompt": "x", "answer": "so ####"},), r"expected one of the columns \('answer'"),
        (({"prompt": "x", "solution": "so 5"},), r"expected one of the columns \('answer'"),
        (({"prompt": "x", "answer": float("nan")},), r"expected one of the columns \('answer'"),
        (({"prompt": float("nan"), "answer": "1"},), r"expected one of the columns \('prompt'"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, *rows)


def test_columns_can_be_named(tmp_path):
    row = {"prompt": "old", "text": "1+1?", "meta": {"gold": "2", "Kind": "countdown"}}
    columns = {"prompt": "text", "answer": "meta.gold", "verifier": "meta.kind", "solution": ""}
    (problem,) = read(tmp_path, row, columns=columns)
    assert (problem.prompt, problem.answer, problem.verifier) == ("1+1?", "2", "countdown")
    with pytest.raises(
        InputError,
        match=r"jsonl:2: data\.columns\.answer: expected 'meta\.gold' with a value, got \['text'\]",
    ):
        read(tmp_path, row, {"text": "?"}, columns={**columns, "verifier": ""})


def test_a_column_of_another_verifier_is_left_as_it_is(tmp_path):
    tests = {"inputs": ["1"], "outputs": ["#### 2"]}
    text, structure = read(
        tmp_path,
        {"prompt": "?", "answer": r"a #### \boxed{1}"},
        {"prompt": "?", "answer": tests},
        verifier="code",
    )
    assert text.answer == r"a #### \boxed{1}"
    assert json.loads(structure.answer) == tests
    assert text.verifier == structure.verifier == "code"


def test_a_row_needs_no_answer_where_reward_functions_judge(tmp_path):
    (problem,) = read(tmp_path, {"prompt": "Write a poem."}, answers=False)
    assert problem.answer == ""


def test_ids_are_the_data_sets_own_where_they_name_a_row(tmp_path):
    row = {"prompt": "?", "answer": 1}
    path = str(write(tmp_path, row))

    def ids(*own):
        return [p.id for p in read(tmp_path, *({**row, **each} for each in own))]

    assert ids({"id": 0}, {"id": "b"}) == ["0", "b"]
    assert ids({"extra_info": {"index": 3}}, {"extra_info": {"index": 4}}) == ["3", "4"]
    assert ids({"id": 0}, {"id": 0}) == ids({"id": 0}, {}) == [f"{path}:1", f"{path}:2"]


def test_every_problem_has_all_columns_of_the_data_set(tmp_path):
    rows = {"prompt": "?", "answer": 1, "a": [1]}, {"prompt": "?", "answer": 1, "b": 2}
    first, second = read(tmp_path, *rows)
    assert first.columns == {**rows[0], "b": None}
    assert second.columns == {"prompt": "?", "answer": 1, "a": None, "b": 2}
    assert len({first, second}) == 2  # problems can be told apart and counted


ROWS = [{**VERL, "extra_info": {"split": "train", "index": i}} for i in (7, 8, 9)]


def save_parquet(folder):
    datasets.Dataset.from_list(ROWS).to_parquet(folder / "train.parquet")
    return folder / "train.parquet"


def save_json(folder):
    (folder / "train.json").write_text(json.dumps(ROWS, indent=1))
    return folder / "train.json"


def save_lines(folder):
    (folder / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    return folder / "lines.json"


def save_split(folder):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def save_splits(folder):
    splits = {
        "train": datasets.Dataset.from_list(ROWS),
        "test": datasets.Dataset.from_list(ROWS[:1]),
    }
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    return folder / "saved"


def save_folder(folder):
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        path = folder / "files" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
    return folder / "files"


def save_folder_of_lines(folder):
    (folder / "files").mkdir()
    save_lines(folder / "files").rename(folder / "files" / "train.jsonl")
    return folder / "files"


SAVE = [save_parquet, save_json, save_lines, save_split, save_splits, save_folder]
SAVE.append(save_folder_of_lines)


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """`datasets` keeps its cache here and shows no progress."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize("save", SAVE)
def test_every_kind_of_source_gives_the_same_problems(tmp_path, quiet, save):
    source = str(save(tmp_path))
    problems = data.load(source, "train", 0, 0)
    assert [p.id for p in problems] == ["7", "8", "9"]
    assert {(p.prompt, p.answer, p.chat) for p in problems} == {
        ("How many? Let's think.", "72", True)
    }
    assert [p.columns for p in problems] == ROWS
    assert data.load(source, "train", 2, 0) == problems[:2]


def test_a_data_set_that_has_splits_is_asked_for_one(tmp_path, quiet):
    source = str(save_splits(tmp_path))
    assert len(data.load(source, "test", 0, 0)) == 1
    assert len(data.load(source, "test", 0, 0, hub_split="train")) == 3
    with pytest.raises(InputError, match=r"data\.test: .*has the splits \['test', 'train'\], and "):
        data.load(source, "test", 0, 0, hub_split="validation")


def test_a_data_set_of_the_hub(monkeypatch, tmp_path):
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        if arguments[0] == "missing/set":
            raise ConnectionError("no network\nand more")
        return datasets.DatasetDict(train=datasets.Dataset.from_list([GSM8K] * 2))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    problems = data.load("openai/gsm8k", "train", 1, 0, subset="main")
    assert asked == [("openai/gsm8k", "main")]
    assert [(p.id, p.answer) for p in problems] == [("openai/gsm8k[train]:0", "1072")]
    with pytest.raises(InputError) as error:
        data.load("missing/set", "test", 1, 0)
    assert str(error.value) == (
        "data.test: no file or folder here, and the hub's missing/set cannot be loaded: no network"
    )


@pytest.mark.parametrize(
    "name", ["nothing.jsonl", "data/train.parquet", "./a/b", "a/b/c", "/a", ""]
)
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=f"data.train: expected 'countdown'.* got {name}: no such"):
        data.load(name, "train", 0, 0)


@pytest.mark.parametrize(("save", "module"), [(save_parquet, "pyarrow"), (save_split, "datasets")])
def test_a_missing_package_is_named(tmp_path, quiet, monkeypatch, save, module):
    source = str(save(tmp_path))
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"data\.train: .*pip install 'jaxrl_sd\[data\]'"):
        data.load(source, "train", 0, 0)


@pytest.mark.parametrize("name", ["broken.parquet", "broken.json", "broken.jsonl"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"[\xff")
    with pytest.raises(InputError, match=rf"data\.test: .*{name}"):
        data.load(str(tmp_path / name), "test", 0, 0)


def test_generated_problems_need_a_number():
    with pytest.raises(
        InputError, match=r"data\.num_test: expected at least 1 of countdown, got 0"
    ):
        data.load("countdown", "test", 0, 0)


def test_every_pass_sees_every_problem_in_another_order():
    problems = [Problem(str(i), "p", "a") for i in range(50)]
    order = data.shuffled(problems, seed=1)
    passes = [[order[i].id for i in range(k * 50, (k + 1) * 50)] for k in range(3)]
    assert all(sorted(p, key=int) == [str(i) for i in range(50)] for p in passes)
    assert passes[0] != passes[1] != passes[2]
    assert passes[0] != [data.shuffled(problems, seed=2)[i].id for i in range(50)]


@pytest.mark.parametrize("position", [0, 1, 49, 50, 51, 99, 100, 1234])
def test_the_order_goes_on_from_any_position(position):
    problems = [Problem(str(i), "p", "a") for i in range(50)]
    whole = data.shuffled(problems, seed=1)
    seen = [whole[i].id for i in range(position + 120)]
    resumed = data.shuffled(problems, seed=1)
    assert [resumed[position + i].id for i in range(120)] == seen[position:]


def test_a_data_set_is_not_cut_without_a_word(tmp_path, caplog):
    path = write(tmp_path, *({"prompt": f"{n}+1?", "answer": n + 1} for n in range(3)))
    assert len(data.load(str(path), "train", 3, 0)) == 3 and not caplog.text
    assert len(data.load(str(path), "train", 2, 0)) == 2
    assert f"the first 2 of the 3 rows of {path} are read" in caplog.text


def test_the_suffix_ends_every_prompt(tmp_path):
    path = write(tmp_path, {"prompt": "1+1?", "answer": 2}, {"prompt": "2+2?", "answer": 4})
    problems = data.load(str(path), "train", 1, 0, suffix=" Box it.")
    assert [p.prompt for p in problems] == ["1+1? Box it."]
