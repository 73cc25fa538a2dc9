"""Answers that are hard on a math verifier: of every size from ordinary to 100 kB."""

import random

REFERENCES = ["72", r"\frac{1}{2004!}", r"x=2k\pi", r"\{1,2\}", r"4\sqrt{2}", "(1, 2)"]
FORMS = [r"It is \boxed{%s}.", "Thus\n#### %s", "The answer is %s.", "%s", "so $%s$ and $%s$ it is"]
KINDS = {  # each by its size n, from 1 to 10,000
    "power tower": lambda n: "^{".join(["9"] * (2 + n % 60)) + "}" * (1 + n % 60),
    "nested power": lambda n: "(" * (n % 60) + "9" + "^9)" * (n % 60),
    "plain power": lambda n: f"{n}**{n}**{n}",
    "exponent": lambda n: rf"\frac{{5^{{{n}{n}{n}}}-5}}{{16}}",
    "factorial": lambda n: f"{n}{n}" + "!" * (1 + n % 9),
    "binomial": lambda n: rf"\binom{{{n}{n}}}{{{n}}}",
    "sum": lambda n: rf"\prod_{{k=1}}^{{{n}{n}}} k + \sum_{{k=1}}^{{{n}{n}}} \frac{{1}}{{k}}",
    "polynomial": lambda n: rf"(x+y+z+1)^{{{n}}}",
    "root": lambda n: r"\sqrt{" * (n % 3000) + "2" + "}" * (n % 3000),
    "fraction": lambda n: r"\frac{1}{1+" * (n % 3000) + "1" + "}" * (n % 3000),
    "braces": lambda n: "{" * n + "72" + "}" * (n - n % 3),
    "parentheses": lambda n: r"\left(" * (n % 2) + "(" * n + "72" + ")" * (n - n % 3),
    "matrix": lambda n: r"\begin{pmatrix}" + r"1 & 2 \\ " * n + r"\end{pmatrix}",
    "digits": lambda n: "7" * (10 * n),
    "long sum": lambda n: "72" + "+0" * n,
    "null bytes": lambda n: "72" + "\0" * (n % 9) + "\0 72" * (n % 30),
    "unicode": lambda n: "\ud800" * (n % 9) + chr(0x0660 + n % 10) + "²½७72" * (n % 50) + "\udfff",
    "delimiters": lambda n: "$" * n + "72" + "$ $" * (n % 2000) + r"\[" * n + r"\)" * (n % 2000),
    "boxes": lambda n: r"\boxed{" * n + "72" + "}" * (n - n % 3) + r"\boxed{72} and " * (n % 999),
    "stars": lambda n: "**" * n + "72" + "* " * n,
    "backslashes": lambda n: "\\" * n + "72" + " " * n + "=",
    "text": lambda n: r"\text{" * n + "72",
    "dots": lambda n: "72" + "." * n + ",...," * (n % 300),
    "prose": lambda n: "the final answer is = " * n,
    "noise": lambda n: "".join(random.Random(n).choices("\\{}()$^_!/0179.,=xefrac√∞\n ", k=n)),
}


def answers(count: int, seed: int = 0) -> list[tuple[str, tuple[str, ...]]]:
    """`count` answers, kinds taking turns: the name of each, and the item that a pool grades."""
    rng, items = random.Random(seed), []
    for i in range(count):
        kind = list(KINDS)[i % len(KINDS)]
        final = KINDS[kind](int(10 ** rng.uniform(0, 4)))[:100_000]
        response = rng.choice(FORMS).replace("%s", final)
        items.append((kind, ("math", "", rng.choice(REFERENCES), response)))
    return items
