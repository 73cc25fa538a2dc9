"""Mathematical answers: where the final answer is, and what equals the reference."""

import random

import pytest

from jaxrl_sd.verify import math
from jaxrl_sd.verify.pool import VerifierPool

FORMS = {
    "boxed": r"Some $x=5$ first, then \boxed{7}. In the end \boxed{%s}.",
    "inline": "First 12 of them.\nThe final answer is $%s$.",
    "plain": "First 12 of them.\nThe answer is %s.",
    "alone": "%s",
}


def verdicts(answer: str, final: str) -> dict[str, bool]:
    return {form: math.verify("", answer, text % final) for form, text in FORMS.items()}


# What Math-Verify 0.9.0 gets wrong on twelve published cases: reference, answer, truth.
KNOWN_ERRORS = [
    ("1/2004!", "1/2006!", False),
    ("2^{-99}", "2^{-98}", False),
    (r"1,2,\ldots,n", r"1,3,\ldots,2n-1", False),
    (r"1:2:3:\ldots", r"1:4:9:\ldots", False),
    ("3*x-1*y+13=0", "3x + 4y + 14=0", False),
    ("4", r"4\sqrt2", False),
    ("101_2", "101", False),
    (r"e^{16}-1", "-1 + exp(16)", True),
    (r"\frac{\pi}{2}", "pi/2", True),
    (r"14-i", "14.0 + -1.0i", True),
    (r"-2\pi", "-2*pi", True),
    (r"x=2k\pi", r"x=2n\pi", True),
]


@pytest.mark.parametrize("answer, final, truth", KNOWN_ERRORS)
def test_known_errors_of_math_verify(answer, final, truth):
    assert verdicts(answer, final) == dict.fromkeys(FORMS, truth)
    assert verdicts(answer, answer) == dict.fromkeys(FORMS, True)


@pytest.mark.parametrize(
    "answer, final",
    [
        # Math-Verify 0.9.0 calls these different, at least as plain text
        (r"4\sqrt2", "4√2"),
        (r"\frac{1+\sqrt5}{2}", "(1+sqrt(5))/2"),
        (r"e^{2(x+1)}", "e^(2(x+1))"),
        (r"\ln 2", "ln(2)"),
        ("2^{10}", "2**10"),
        ("-3.5", "-3 1/2"),
        ("90", "90°"),
        (r"\frac{\pi}{2}+2k\pi, k \in \mathbb{Z}", r"2n\pi+\pi/2 (n \in \mathbb Z)"),
        (r"1,2,\ldots,n", "1, 2, ..., n"),
        # and these equal
        ("1/2004!", r"\frac{1}{2004!}"),
        ("2^{-99}", r"\frac{1}{2^{99}}"),
        (r"1:2:3:\ldots", r"1:2:3:\cdots"),
        ("3x-y+13=0", "3*x-1*y+13=0"),
        (r"4\sqrt{2}", r"\sqrt{32}"),
        ("101_2", "101_{2}"),
        ("1011", "1011_2"),
        (r"\frac13", "0.333333"),
        (r"\frac{1}{3}", "0.333333"),
        (r"\frac{1}{2}", "0.5"),
        ("1,000", "1000"),
        ("1000", "1 000"),
        ("75", r"75\%"),
        (r"x^2+2x", "x(x+2)"),
        ("x^2/4 + y^2/3 = 1", "x^2/16 + y^2/12 = 1/4"),
        (r"\{1,2\}", r"\{2,1\}"),
        ("[1,2)", "[1, 2)"),
        ("D", "(D)"),
        ("12:00", "12:00"),
        ("$x \\le 2$", "x≤2"),
    ],
)
def test_equal_answers(answer, final):
    assert verdicts(answer, final) == dict.fromkeys(FORMS, True)


@pytest.mark.parametrize(
    "answer, final",
    [
        # Math-Verify 0.9.0 calls these equal, at least as plain text
        ("x=2^{-99}", "x=2^{-98}"),
        ("0.0000001", "0.0000002"),
        ("1, 2, ..., n", "1, 3, ..., 2n-1"),
        ("2", r"1 + 2 + \cdots + n"),
        ("4", r"4\sqrt(2)"),
        ("4", "4√2"),
        ("101_2", "101_3"),
        ("-1", "-1 + exp(16)"),
        ("-2", "-2*pi"),
        # and these different
        (r"\frac{\pi}{3}", "pi/2"),
        ("14", "14.0 + -1.0i"),
        (r"x=2k\pi", r"x=3n\pi"),
        ("n", "k"),
        ("2^{100}", "2^{100}+1"),
        (r"\sqrt{2}", "1.414"),
        ("[1,2]", "(1,2)"),
        ("x=1", "y=1"),
        ("31/2", "3 1/2"),
        ("72", ""),
    ],
)
def test_different_answers(answer, final):
    assert verdicts(answer, final) == dict.fromkeys(FORMS, False)


@pytest.mark.parametrize(
    "response, correct",
    [
        ("48 + 24 = 72 clips.\n#### 72", True),
        ("#### 71\n#### 72.", True),
        ("#### 72\n#### 71", False),
        ("#### 72 clips", True),
        ("The answer is 72.", True),
        ("The answer is $72.", True),
        ("The answer is 72...", True),
        ("The answer is 72 clips, 24 more than 48.", True),
        ("Of 90 clips\n\n**Final Answer: 72**", True),
        ("The answer is 71. No: the answer is 72.", True),
        (r"It is \boxed{72}.", True),
        (r"The answer is 71, no, \boxed{72}.", True),
        (r"\boxed{72}. The answer was 71 first, so again \boxed{71}", False),
        (r"The answer is 72, so \boxed{71}.", False),
        (r"\boxed{072}", True),
        (r"\boxed{}", False),
        ("I do not know.", False),
        ("", False),
    ],
)
def test_where_the_final_answer_is(response, correct):
    assert math.verify("How many clips?", "72", response) is correct


def test_a_parameter_that_the_problem_names_keeps_its_name():
    assert math.verify("Solve sin x = 0.", r"x=k\pi", r"\boxed{x=n\pi}")
    assert not math.verify("Let $n$ and $k$ be integers.", r"x=k\pi", r"\boxed{x=n\pi}")


def test_an_answer_may_be_marked_or_delimited():
    for answer in ("$72$", r"\(72\)", r"so it is \boxed{72}.", "24 + 48 = 72\n#### 72"):
        assert math.verify("", answer, r"\boxed{72}")
        assert not math.verify("", answer, r"\boxed{24}")


def test_a_final_answer_far_longer_than_the_reference_is_wrong():
    assert math.verify("", "72", r"\boxed{72" + " + 0" * 10 + "}")
    assert not math.verify("", "72", r"\boxed{72" + " + 0" * 200 + "}")


@pytest.mark.parametrize("answer", ["", "  ", "$ $", r"\boxed{}"])
def test_an_empty_reference_answer_is_an_error(answer):
    with pytest.raises(ValueError, match="answer: got"):
        math.verify("", answer, r"\boxed{72}")


@pytest.mark.parametrize(
    "answer, equal, different",
    [
        (
            "7",
            [r"\frac{14}{2}", "7.", "$7$", r"7\\", "x=7", r"7\text{ cm}^2", "+7"],
            ["-7", "70", "7,8"],
        ),
        (
            r"\frac{3}{7}",
            [r"\dfrac37", "3/7", r"\frac{6}{14}", "(3/7)"],
            ["7/3", "3.7", r"-\frac37"],
        ),
        ("2.5", ["2.50", "5/2", r"2\frac{1}{2}", "2 1/2", "2,5"], ["2.05", "25", "2", "-2.5"]),
        ("1234567", ["1,234,567", r"1{,}234{,}567", r"1\,234\,567", "1 234 567"], ["1,234,568"]),
        ("32349", ["32,349", "32349.0"], ["32, 349", "3,2349", "32.349"]),
        (r"3\sqrt{5}", [r"\sqrt{45}", "3√5", "3*sqrt(5)", r"3 \cdot \sqrt 5"], ["3", r"3+\sqrt5"]),
        (r"\frac{\sqrt2}{2}", [r"\frac{1}{\sqrt2}", "sqrt(2)/2"], [r"\frac12", r"\sqrt2"]),
        ("[2,9)", [r"\left[2, 9\right)", r"x\in[2,9)"], ["(2,9]", "[2,9]", "(2,9)"]),
        ("(2,-9)", [r"\left(2,-9\right)", "(x,y)=(2,-9)"], ["(-9,2)", "[2,-9]", "(2,9)"]),
        (r"\{2,9\}", [r"\{9,2\}", "2, 9", r"9 \text{ and } 2"], ["2", r"\{2,8\}", r"\{2,9,10\}"]),
        (
            r"(-\infty,2)\cup(9,\infty)",
            [r"(9,\infty) \cup (-\infty,2)", r"(-∞,2)\cup(9,∞)"],
            [r"(-\infty,2]\cup(9,\infty)", r"(-\infty,2)"],
        ),
        (
            r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
            [r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"],
            [r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}", "1"],
        ),
        (r"60^\circ", ["60", "60°", r"60^{\circ}"], ["61", r"\frac{\pi}{6}"]),
        (r"\$18.90", ["18.90", "18.9", r"\$ 18.90"], ["18", "1890"]),
        (r"35\%", ["35", "35%", "0.35"], ["0.035", r"36\%"]),
        (r"6.1 \times 10^{4}", ["61000", r"6.1\cdot 10^4"], ["6100", "6.1"]),
        (r"\frac{5\pi}{6}", [r"\frac56\pi", "5pi/6", "5π/6"], [r"\frac56", r"\frac{5\pi}{7}"]),
        ("x^2-3x+2", ["(x-1)(x-2)", "2-3x+x**2"], ["x^2+3x+2", "y^2-3y+2", "x^2-3x"]),
        ("y=2x+3", ["y = 3+2x", "2x-y+3=0", "2y=4x+6"], ["y=2x-3", "x=2y+3"]),
        (r"\pm 4", ["4,-4", r"\{-4,4\}"], ["4", r"\pm 5"]),
        ("x>4", ["4<x", r"(4,\infty)"], ["x<4", r"x\ge 4"]),
        ("3-2i", ["-2i+3", "3 - 2*i"], ["3+2i", "3", "1"]),
        (r"\text{Evelyn}", ["Evelyn", r"\mathrm{Evelyn}"], [r"\text{Evan}", "E"]),
        (r"\text{(B)}", ["B", "(B)", r"\textbf{(B)}"], ["C", "(D)"]),
        ("720", ["6!", "6! + 0"], ["5!", "6"]),
        (r"\binom{8}{3}", ["56", r"\dbinom{8}{3}"], [r"\binom{8}{4}", "8"]),
        (r"\varnothing", [r"\emptyset"], ["0", r"\{0\}"]),
    ],
)
def test_ordinary_answers(answer, equal, different):
    def right(final: str) -> bool:
        return math.verify("", answer, rf"For $n=1$ it is 0, so \boxed{{{final}}} in all.")

    assert [final for final in equal if not right(final)] == []
    assert [final for final in different if right(final)] == []


def perturbed(answer: int, rng: random.Random) -> set[str]:
    digits = str(answer)
    swap = rng.randrange(len(digits) - 1)
    swapped = digits[:swap] + digits[swap + 1] + digits[swap] + digits[swap + 2 :]
    sums = {str(answer + step) for step in (-100, -10, -1, 1, 10, 100)}
    others = {f"-{answer}", f"{answer}.5", f"{answer}0", f"{digits[:-1]},{digits[-1]}", digits[:-1]}
    return (sums | others | {swapped}) - {digits}


def test_a_reference_solution_gives_its_answer_and_no_other():
    rng = random.Random(0)
    for _ in range(20):
        price, count = rng.randrange(12, 300), rng.randrange(12, 300)
        answer = price * count
        working = f"{count} of them cost {count}*${price}=$<<{count}*{price}={answer}>>{answer:,}."
        solution = f"{working}\n#### {answer:,}"
        assert math.verify("", solution, solution)
        assert math.final_answer(solution) == str(answer)
        for wrong in perturbed(answer, rng):
            assert not math.verify("", solution, f"{working}\n#### {wrong}"), wrong
            assert not math.verify("", str(answer), rf"{working} \boxed{{{wrong}}}"), wrong


HOSTILE = [
    "9^{9^{9^{9^{9}}}}",
    "9**9**9**9",
    "(((9^9)^9)^9)^9",
    r"\frac{5^{123456789}-5}{16}",
    "1234567890!",
    "5!!!!!!",
    r"\binom{12345678}{1234567}",
    r"\prod_{k=1}^{123456789} k",
    "(x+y+z+1)^{500}",
    r"\frac{1}{1+" * 40 + "1" + "}" * 40,
    "{" * 200 + "72" + "}" * 200,
    r"\left(" * 60 + "72",
    "x_{" * 100 + "1",
    r"\sqrt{" * 5000 + "2",
    "7" * 100_000,
    r"\text{" * 40_000,
    "\\" * 100_001 + " " * 50_000 + "=",
    "$" * 100_000,
    "72 \0 \ud800 \u0667\u00b2",
    "**" * 50_000,
]


def test_hostile_answers_are_wrong_in_bounded_time():
    forms = [r"It is \boxed{%s}.", "#### %s", "The answer is %s", "so $%s$ it is"]
    texts = [form.replace("%s", final) for final in HOSTILE for form in forms]
    with VerifierPool(workers=2, timeout_s=10) as pool:
        verdicts = pool.grade([("math", "", "73", text) for text in texts])
    assert [verdict.status for verdict in verdicts] == ["ok"] * len(texts)
    assert not any(verdict.correct for verdict in verdicts)


@pytest.mark.parametrize("answer", ["9^{9^{9^9}}", "123456789!", "(" * 20 + "x" + ")" * 20])
def test_what_cannot_be_computed_is_compared_as_text(answer):
    assert math.verify("", answer, rf"\boxed{{ {answer} }}")
    assert not math.verify("", answer, r"\boxed{9}")
    assert not math.verify("", "9", rf"\boxed{{{answer}}}")


@pytest.mark.parametrize(
    "answer, final",
    [("2004!/2003!", "2004"), ("2^{5000}-2^{5000}+7", "7"), ("x^{2024}-x^{2024}+n!-n!", "0")],
)
def test_what_can_be_computed_is(answer, final):
    assert math.verify("", answer, rf"\boxed{{{final}}}")


@pytest.mark.parametrize(
    "response, correct",
    [
        ("The answer is 72!", True),
        (r"The answer is \boxed{72!}", False),
        ("The answer is 72! / 71!", True),
        (r"First \boxed{71}. The final answer is $72$. I hope it is correct.", True),
        (r"First \boxed{72}. The final answer is \boxed{71}. I hope it is correct.", False),
        ("The answer is  72 .", True),
    ],
)
def test_how_a_response_ends(response, correct):
    assert math.verify("", "72", response) is correct


@pytest.mark.parametrize(
    "text, finals",
    [
        ("1/2", [r"\dfrac{1}{2}", r"\frac12", "0.50", ".5", r"\frac{2}{4}", "2/4"]),
        (
            "1080",
            ["1,080", "1080.0", r"1{,}080", r"1\,080", r"1080\text{ clips}", r"\$1080", "01080"],
        ),
        ("-3", ["-3", "\u22123", "- 3", "-3.00"]),
        ("B", ["(B)", r"\text{(B)}", r"\textbf{B}"]),
        (r"3\sqrt{2}", [r"3 \sqrt 2", "3√2", "3*sqrt(2)", r"3\cdot\sqrt{2}"]),
        (r"x\le2", [r"x \leq 2", "x≤2"]),
        ("(1,2)", [r"\left( 1, 2 \right)", "( 1 , 2 )"]),
        ("Evelyn", [r"\text{Evelyn}", r"\mathrm{ Evelyn }"]),
    ],
)
def test_equal_answers_have_one_text(text, finals):
    assert [math.final_answer(rf"Thus \boxed{{{final}}}.") for final in finals] == [text] * len(
        finals
    )


def test_different_answers_have_different_texts():
    finals = ["1", "-1", "12", "1,2", "1.2", "1/2", "1 1/2", "11/2", "(1,2)", "[1,2]", "x=1", "y=1"]
    finals += [
        "x",
        "1_2",
        "1^2",
        r"\sqrt{12}",
        r"\sqrt1 2",
        "1, 234",
        "1,234",
        "2x",
        "2 x y",
        "A",
        "a",
    ]
    texts = [math.final_answer(rf"\boxed{{{final}}}") for final in finals]
    assert len(set(texts)) == len(finals)
    assert None not in texts


@pytest.mark.parametrize(
    "response, text",
    [
        ("48 + 24 = 72 clips.\n#### 72", "72"),
        ("She sold 48 and then 24, so 1,072.50 in all.", "2145/2"),
        ("It costs $5 and then $72 more.", "72"),
        (r"so $\frac{144}{2}$ is what he has", "72"),
        ("", None),
        ("I do not know.", None),
        (r"\boxed{}", None),
        (r"\boxed{" + "7" * 5000 + "}", None),
    ],
)
def test_where_the_text_to_vote_with_comes_from(response, text):
    assert math.final_answer(response) == text
