"""The page carries what the records say, whatever is in them. How it looks is not tested here."""

import html.parser
import json

import pytest

from jaxrl_sd import viewer
from jaxrl_sd.types import InputError


def record(text="1 + 1", prompt="1 + 1?", **fields):
    tokens = text.split(" ")
    known = {"step": 3, "prompt": prompt, "answer": "2", "response_tokens": tokens}
    return known | {"correct": True, "advantage": [0.5] * len(tokens)} | fields


class Page(html.parser.HTMLParser):
    """Elements, addresses and the text of scripts, as a browser's parser cuts them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.scripts = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts.append(data)


def data_of(text):
    return json.loads(Page(text).scripts[0])


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "'\"`${alert(1)}&lt;\\",
    "{{data}}",
    "\u2028\n\t\x00 \ud83d é 中",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_come_through_and_stay_texts(text):
    wild = record(text, prompt=text, answer=text, shown={text: text}, gap={text: [0.5]})
    page = viewer.page({text: [wild | {"response_tokens": [text], "advantage": [0.5]}]})
    plain = viewer.page({"plain": [record()]})
    assert Page(page).tags == Page(plain).tags
    data = data_of(page)
    assert data["columns"] == [text]
    (problem,) = data["problems"]
    ((shown,),) = problem["rows"]
    assert problem["prompt"] == problem["answer"] == text
    assert shown["response_tokens"] == [text] and shown["shown"] == {text: text}


def test_the_page_asks_for_nothing_else():
    page = viewer.page({"grpo": [record()]})
    assert not Page(page).addresses
    assert not any(word in page for word in ("http", "url(", "@import", "fetch("))


def test_records_come_through():
    first = record(logp=[-0.25, None, -1e-7], gap={"teacher": [0.5, "nan", -2.0]}, truncated=True)
    second = record("2 + 2", correct=None, distill=[0.0, 1.0, 0.5], divergence=None)
    data = data_of(viewer.page({"grpo": [first, second]}))
    assert [row[0] for row in data["problems"][0]["rows"]] == [first, second]


def test_numbers_are_short_and_strict():
    values = [1 / 3, 123456.789, float("nan")]
    data = data_of(viewer.page({"grpo": [record(advantage=values)]}))
    assert data["problems"][0]["rows"][0][0]["advantage"] == [0.33333, 123460.0, "nan"]


def rows_of(columns):
    """For each problem its rows, an answer's `mark` for each record."""
    data = data_of(viewer.page(columns))
    return [
        [[r and r["mark"] for r in row] for row in problem["rows"]] for problem in data["problems"]
    ]


def test_the_same_answer_stands_in_one_row():
    grpo = [record("a", mark="g1"), record("b", mark="g2"), record("b", mark="g3")]
    hsd = [record("b", mark="h1"), record("c", mark="h2"), record("a", mark="h3")]
    expected = [["g1", "h3"], ["g2", "h1"], ["g3", None], [None, "h2"]]
    assert rows_of({"grpo": grpo, "hsd": hsd}) == [expected]


def test_columns_without_a_common_answer_stand_side_by_side():
    grpo = [record("a", mark="g1"), record("b", mark="g2")]
    hsd = [record("c", mark="h1"), record("d", mark="h2"), record("e", mark="h3")]
    assert rows_of({"grpo": grpo, "hsd": hsd}) == [[["g1", "h1"], ["g2", "h2"], [None, "h3"]]]


def test_problems_and_steps_have_blocks_of_their_own():
    grpo = [record("a", mark="g1"), record("a", mark="g2", prompt="2 + 2?")]
    hsd = [record("a", mark="h1", step=5)]
    columns = {"grpo": grpo, "hsd": hsd}
    assert rows_of(columns) == [[["g1", None]], [["g2", None]], [[None, "h1"]]]
    data = data_of(viewer.page(columns))
    assert [p["step"] for p in data["problems"]] == [3, 3, 5]


def test_what_old_files_lack_is_no_error():
    data = data_of(viewer.page({"old": [{"prompt": "1?", "response_tokens": ["1"]}]}))
    assert data["problems"][0]["answer"] is None


@pytest.mark.parametrize("columns", [{}, {"grpo": []}])
def test_nothing_to_show_is_refused(columns):
    with pytest.raises(InputError, match="columns: expected an answer"):
        viewer.page(columns)
