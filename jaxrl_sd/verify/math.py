"""Mathematical answers: Math-Verify's verdict, and an exact check where it is known to err.

Math-Verify reads LaTeX well and plain text badly: it takes the first number out of `-2*pi` and
`4√2`. So a final answer is rewritten as LaTeX and handed over whole. Four of its equalities are
checked again: numbers that differ below its rounding (`1/2004!` and `1/2006!`), sequences with
dots, numerals with a base (`101_2` and 101), and names of a family's parameter (`2k\\pi`).
"""

import logging
import re
from typing import NamedTuple

import math_verify
import sympy
from latex2sympy2_extended.math_normalization import extract_boxed_content

# It warns that it runs without a timeout; the pool that kills workers is the timeout.
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_EXTRA_CHARS = 500  # a final answer that is longer than the reference by more is wrong
MAX_TAIL_CHARS = 4000  # how much of a response without \boxed is searched, from its end
FLOAT_TOLERANCE = 1e-2  # relative; on top of Math-Verify's six decimals, for decimals near 0

_EXTRACTION = (
    math_verify.LatexExtractionConfig(boxed_match_priority=0),
    math_verify.ExprExtractionConfig(),
)


class _Answer(NamedTuple):
    text: str
    parsed: list  # what Math-Verify makes of it: an expression, a string, both or neither


def verify(prompt: str, answer: str, response: str) -> bool:
    r"""Whether the final answer of `response` equals the reference `answer`.

    The final answer is the content of the last `\boxed{}`, or what follows the last `####`, or the
    last "answer is" or "answer:", or the last line, where that is a formula; otherwise whatever
    Math-Verify finds. `prompt` only tells whether the letter of a parameter has a meaning.

    Raises:
      ValueError: `answer` is empty.
    """
    marked = _marked(answer)
    gold = _strip_delimiters(answer if marked is None else marked)
    if not gold:
        raise ValueError(f"answer: got {answer!r}, expected the reference answer of the problem")
    found = _final_answer(response)
    if found is None:
        return _equal(_read(gold), _read_prose(response[-MAX_TAIL_CHARS:]))
    if len(found) > len(gold) + MAX_EXTRA_CHARS:
        return False
    if _same(gold, found):
        return True
    families = _name_parameter(prompt, gold), _name_parameter(prompt, found)
    return families != (gold, found) and _same(*families)


_BOLD = re.compile(r"(?<![\w)])\*\*(.+?)\*\*(?![\w(])")
_PHRASE = re.compile(r"(?i)answer(?: +is| *:) *:?([^\n]+)")
_DELIMITED = re.compile(r"\$\$(.+)\$\$|\$(.+)\$|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
_NAMES = r"(?:pi|exp|sqrt|log|ln|sin|cos|tan)"
_NOT_WORDS = re.compile(rf"\\text *\{{[^}}]*\}}|\\[a-zA-Z]+|{_NAMES}(?![a-zA-Z])")
_FORMULA = re.compile(r"[ -#%-~√π\u00d7·\u2212∞°≤≥∈\u2124…]+")  # one line, and no $


def _final_answer(response: str) -> str | None:
    marked = _marked(response)
    if marked is not None:
        return marked
    tail = _BOLD.sub(r"\1", response[-MAX_TAIL_CHARS:]).strip()
    phrases = _PHRASE.findall(tail)
    for text in [*phrases[-1:], tail.rsplit("\n")[-1]]:
        text = _strip_delimiters(text)
        if _is_formula(text):
            return text
    return None


def _marked(text: str) -> str | None:
    if "\\boxed" in text or "\\fbox" in text:
        return extract_boxed_content(text, mode="last")
    _, mark, rest = text.rpartition("####")
    rest = _strip_delimiters(rest.strip().partition("\n")[0])
    return rest if mark and _is_formula(rest) else None


def _strip_delimiters(text: str) -> str:
    text = re.sub(r"(?<=[^\s,.])\.+$", "", text.strip()).lstrip("= ")  # but not "1, 2, ..."
    match = _DELIMITED.fullmatch(text)
    return next(filter(None, match.groups())).strip() if match else text


def _is_formula(text: str) -> bool:
    has_words = re.search(r"[a-zA-Z]{2}", _NOT_WORDS.sub(" ", text)) is not None
    has_value = re.search(r"[0-9a-zA-Zπ∞]", text) is not None
    return _FORMULA.fullmatch(text) is not None and has_value and not has_words


_ARGUMENT = r"\(((?:[^()]|\([^()]*\))*)\)"  # parentheses, one level of nesting inside
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"√", "sqrt"),
        (r"(?<![\\a-zA-Z])sqrt *([0-9]+)", r"\\sqrt{\1}"),
        (r"∞", r"\\infty "),
        (r"°", r"^\\circ "),
        (r"\*\*", "^"),
        (rf"(?<![\\a-zA-Z]){_NAMES}(?![a-zA-Z])", r"\\\g<0>"),
        (rf"(\\sqrt|\^) *{_ARGUMENT}", r"\1{\2}"),
        (r"(\\[dtc]?frac) *\\pi", r"\1{\\pi}"),
        (r"(?<=[0-9])i\b", " i"),  # Math-Verify looks for the imaginary unit as a word
        (r"(?<![0-9./^_])([0-9]+) +([0-9]+)/([0-9]+)\b", r"\1\\frac{\2}{\3}"),  # mixed number
    )
]
_DOTS = re.compile(r"\\[lc]?dots[bcmi]?(?![a-zA-Z])|\.\.\.+|…")
_FORMULAS_IN_PROSE = re.compile(r"\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]", re.DOTALL)


def _read(text: str) -> _Answer:
    return _Answer(text, _parse(f"\\boxed{{{_to_latex(text)}}}"))


def _read_prose(text: str) -> _Answer:
    parsed = _parse(_FORMULAS_IN_PROSE.sub(lambda match: _to_latex(match[0]), text))
    return _Answer(str(parsed[-1]) if parsed else "", parsed)


def _parse(text: str) -> list:
    return math_verify.parse(text, _EXTRACTION, parsing_timeout=None)


def _to_latex(text: str) -> str:
    text = _DOTS.sub(r"\\cdots ", text)  # Math-Verify would drop \ldots and "..."
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


_INTEGER = re.compile(r"-?[0-9]+|-?[1-9][0-9]{0,2}(?:[ ,][0-9]{3})+")
_SEQUENCE = re.compile(rf"[,:+*] *(?:{_DOTS.pattern})")
_BASE = re.compile(r"(?<![a-zA-Z0-9_])[0-9]+ *_ *\{? *[0-9]+")


def _same(gold: str, found: str) -> bool:
    """Whether two final answers are equal."""
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(found):
        gold, found = (re.sub("[ ,]", "", text) for text in (gold, found))
        return int(gold) == int(found)
    if _normal(gold) == _normal(found):
        return True
    if _SEQUENCE.search(gold) or _SEQUENCE.search(found):
        return _same_sequence(gold, found)
    return _equal(_read(gold), _read(found))


def _normal(text: str) -> str:
    text = re.sub(r"\\[,;! ]|\\(?:left|right)(?![a-zA-Z])", "", _DOTS.sub("...", text))
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text)  # `3 1/2` is not `31/2`


def _same_sequence(gold: str, found: str) -> bool:
    golds, founds = re.split("[,:]", gold), re.split("[,:]", found)
    return 1 < len(golds) == len(founds) and all(map(_same, golds, founds))


def _equal(gold: _Answer, found: _Answer) -> bool:
    bases = [_BASE.findall(re.sub(r"[ {]", "", answer.text)) for answer in (gold, found)]
    if bases[0] and bases[0] != bases[1]:  # a base that only the response gives is the problem's
        return False
    if not math_verify.verify(gold.parsed, found.parsed, timeout_seconds=None):
        return False
    return not _are_different_numbers(gold.parsed[0], found.parsed[0])


def _are_different_numbers(gold: object, found: object) -> bool:
    """Whether both are numbers that differ, exactly if rational, else in 30 digits."""
    gold, found = _number(gold), _number(found)
    if gold is None or found is None:
        return False
    difference = gold - found
    if difference.is_Rational:
        return difference != 0
    tolerance = FLOAT_TOLERANCE if difference.has(sympy.Float) else 1e-25
    scale = max(abs(gold.evalf(30)), abs(found.evalf(30)))
    return bool(abs(difference.evalf(30)) > tolerance * scale)


def _number(value: object) -> sympy.Expr | None:
    if isinstance(value, sympy.Eq) and value.lhs.is_Symbol:
        value = value.rhs
    if not isinstance(value, sympy.Expr) or value.has(sympy.UnevaluatedExpr):
        return None  # UnevaluatedExpr: a percentage, which Math-Verify equates with its number
    value = value.doit()
    return value if value.is_number and value.is_finite else None


_QUANTIFIER = re.compile(r"[,(\s]*[a-z] *(?:\\in(?![a-z])|∈) *(?:\\mathbb *\{?Z\}?|\u2124)[\s)]*$")
_PARAMETER = re.compile(r"(?<![a-zA-Z\\])[klmn](?![a-zA-Z])")


def _name_parameter(prompt: str, answer: str) -> str:
    """Calls the integer parameter of a family k, unless the problem gave it its name."""
    body = _QUANTIFIER.sub("", answer)
    letters = set(_PARAMETER.findall(body))
    is_bare = re.search(r"[0-9]|\\pi", body) is None
    if len(letters) != 1 or is_bare or letters & set(_PARAMETER.findall(prompt)):
        return answer
    return _PARAMETER.sub("k", body)
