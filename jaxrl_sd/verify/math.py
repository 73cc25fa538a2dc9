"""Mathematical answers: Math-Verify's verdict, and an exact check where it is known to err.

Math-Verify reads LaTeX well and plain text badly: it takes the first number out of `-2*pi` and
`4√2`. So a final answer is rewritten as LaTeX and handed over whole. Four of its equalities are
checked again: numbers that differ below its rounding (`1/2004!` and `1/2006!`), sequences with
dots, numerals with a base (`101_2` and 101), and names of a family's parameter (`2k\\pi`).
Whatever would take long to parse or to evaluate is compared as text only.
"""

import logging
import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import math_verify
import sympy
from latex2sympy2_extended.math_normalization import extract_boxed_content

# It warns that it runs without a timeout; the pool that kills workers is the timeout.
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_EXTRA_CHARS = 500  # a final answer that is longer than the reference by more is wrong
MAX_TAIL_CHARS = 4000  # how much of a response without \boxed is searched, from its end
FLOAT_TOLERANCE = 1e-2  # relative; on top of Math-Verify's six decimals, for decimals near 0
MAX_DIGITS = 20_000  # of a power or a factorial; beyond, an answer is compared as text
MAX_NESTING = 15  # of brackets; beyond, too: parsing takes exponential time

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

    Wrong by rule, whatever it may be worth: a final answer that is longer than the reference by
    `MAX_EXTRA_CHARS`, or is spelt differently where it or the reference nests brackets deeper than
    `MAX_NESTING` or holds a power or a factorial of more than `MAX_DIGITS` digits.

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
    if found.endswith("!") and _marked(response) is None:  # no factorial but an exclamation
        return _same(gold, found.rstrip("!"))
    families = _name_parameter(prompt, gold), _name_parameter(prompt, found)
    return families != (gold, found) and _same(*families)


def final_answer(response: str) -> str | None:
    """The final answer of `response`, spelt so that equal texts are equal answers.

    Numbers are fractions in lowest terms, LaTeX is stripped of spacing and synonyms; `x^2+x` and
    `x(x+1)` stay two answers. Without a mark or a formula it is the last number of the response,
    None where there is none or it is longer than `MAX_TAIL_CHARS`.
    """
    found = _final_answer(response)
    if found is None:
        in_prose = _strip_delimiters("".join(_IN_PROSE.findall(response[-MAX_TAIL_CHARS:])[-1:]))
        found = in_prose if _is_formula(in_prose) else ""
    text = _canonical(_strip_delimiters(found)) if len(found) <= MAX_TAIL_CHARS else ""
    return text or None


_BOLD = re.compile(r"(?<![\w)])\*\*(.+?)\*\*(?![\w(])")
_HOPE = re.compile(r"(?i)final answer is:? *([^\n]+?)\.? *I hope it is correct")
_PHRASE = re.compile(r"(?i)answer(?: +is| *:) *:?([^\n]+)")
_DELIMITED = re.compile(r"\$\$(.+)\$\$|\$(.+)\$|\\\((.+)\\\)|\\\[(.+)\\\]", re.DOTALL)
_ENDING = re.compile(r"(?<=[^\s,.\\])\s*(?:\.|\\\\)+$")  # a full stop, but not "1, 2, ..."
_NAMES = r"(?:pi|exp|sqrt|log|ln|sin|cos|tan)"
_TEXT = r"\\(?:text(?:bf|rm|it)?|math(?:rm|bf)|mbox)"
_NOT_WORDS = re.compile(
    rf"(?:{_TEXT}|\\begin|\\end) *\{{[^}}]*\}}|\\[a-zA-Z]+|{_NAMES}(?![a-zA-Z])"
)
_FORMULA = re.compile(r"[ -#%-~√π\u00d7·\u2212∞°≤≥∈\u2124…]+")  # one line, and no $


def _final_answer(response: str) -> str | None:
    tail = response[-MAX_TAIL_CHARS:]
    hoped = "".join(_HOPE.findall(tail)[-1:])  # how the few-shot examples of Minerva end
    marked = _marked(response) if _marked(hoped) is None else _marked(hoped)
    if marked is not None and not _is_formula(_strip_delimiters(hoped)):
        return marked
    tail = _BOLD.sub(r"\1", tail).strip()
    phrases = _PHRASE.findall(tail)
    for text in [hoped, *phrases[-1:], tail.rsplit("\n")[-1]]:
        text = _strip_delimiters(text)
        if _is_formula(text):
            return text
    return None


def _marked(text: str) -> str | None:
    if "\\boxed" in text or "\\fbox" in text:
        return _strip_delimiters(extract_boxed_content(text, mode="last"))
    _, mark, rest = text.rpartition("####")
    rest = _strip_delimiters(rest.strip().partition("\n")[0])
    return rest if mark and _is_formula(rest) else None


def _strip_delimiters(text: str) -> str:
    text = _ENDING.sub("", text.strip()).lstrip("= ")
    match = _DELIMITED.fullmatch(text)
    return _ENDING.sub("", next(filter(None, match.groups())).strip()) if match else text


def _is_formula(text: str) -> bool:
    if len(text) > MAX_TAIL_CHARS:
        return False
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
_NUMBER = r"(?<![\w.)-])-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:/[0-9]+)?"
_IN_PROSE = re.compile(rf"{_FORMULAS_IN_PROSE.pattern}|{_NUMBER}", re.DOTALL)


@lru_cache(maxsize=64)  # a group of responses shares its reference answer
def _read(text: str) -> _Answer:
    return _Answer(text, _parse(f"\\boxed{{{_to_latex(text)}}}"))


def _read_prose(text: str) -> _Answer:
    parsed = _parse(_FORMULAS_IN_PROSE.sub(lambda match: _to_latex(match[0]), text))
    return _Answer(str(parsed[-1]) if parsed else "", parsed)


def _parse(text: str) -> list:
    if _is_costly(text):
        return []
    return math_verify.parse(text, _EXTRACTION, parsing_timeout=None)


def _to_latex(text: str) -> str:
    text = _DOTS.sub(r"\\cdots ", text)  # Math-Verify would drop \ldots and "..."
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


_SEQUENCE = re.compile(rf"[,:+*] *(?:{_DOTS.pattern})")
_BASE = re.compile(r"(?<![a-zA-Z0-9_])[0-9]+ *_ *\{? *[0-9]+")


def _same(gold: str, found: str) -> bool:
    """Whether two final answers are equal."""
    texts = _canonical(gold), _canonical(found)
    if texts[0] == texts[1]:
        return True
    if texts[0][1:-1] == texts[1][1:-1] and all(re.match(r"[(\[].*,", text) for text in texts):
        return False  # Math-Verify takes `[2,1]` and `(2,1)` for the same empty interval
    if _DECIMAL_COMMA.fullmatch(gold) and "." in found:
        gold = gold.replace(",", ".")
    if _DECIMAL_COMMA.fullmatch(found) and "." in gold:
        found = found.replace(",", ".")
    numbers = [number for number in (_rational(gold), _rational(found)) if number is not None]
    tolerance = FLOAT_TOLERANCE if "." in gold + found else 0
    if len(numbers) == 2 and abs(numbers[0] - numbers[1]) > tolerance * max(map(abs, numbers)):
        return False
    if _SEQUENCE.search(gold) or _SEQUENCE.search(found):
        return _same_sequence(gold, found)
    return _equal(_read(gold), _read(found))


_DECIMAL_COMMA = re.compile(r"-?[0-9]+,(?![0-9]{3}$)[0-9]+")
_RATIONAL = re.compile(
    r"([-+]?) *(?:([0-9]+|[1-9][0-9]{0,2}(?:[ ,][0-9]{3})+)?(\.[0-9]+)?"
    r"|\\frac *\{ *([0-9]+) *\} *\{ *([0-9]+) *\}|([0-9]+) */ *([0-9]+))"
)
_UNIT = rf"{_TEXT} *\{{[^{{}}]*\}}(?:\^[0-9]|\^\{{[0-9]\}})?"
_SYNONYMS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\!", ""),
        (r"(?<!\\)\\[,;: ]|\\(?:left|right|displaystyle|quad)(?![a-zA-Z])|~", " "),
        (r"\{,\}", ","),
        (r"\^ *(?:\\circ|\{ *\\circ *\})|[°$%]|\\(?=[%$])", ""),  # as Math-Verify does
        (rf"(?<=[0-9}}]) *{_UNIT} *$", ""),
        (rf"{_TEXT} *\{{([^{{}}]*)\}}", r" \1"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac *([0-9]) *([0-9])", r"\\frac{\1}{\2}"),
        (r"\\sqrt *([0-9])", r"\\sqrt{\1}"),
        (r"([_^]) *\{ *([0-9a-zA-Z]) *\}", r"\1\2"),
        (r"\\mathbb *([A-Z])", r"\\mathbb{\1}"),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r"\\leq?(?![a-zA-Z])|≤", r"\\le "),
        (r"\\geq?(?![a-zA-Z])|≥", r"\\ge "),
        ("\u2212", "-"),
        (r"π", r"\\pi "),
        (r"(?<=[0-9}]) *(?:\\cdot|\\times|[*·]) *(?=\\sqrt|\\pi|[a-zA-Z])", ""),
        (r"^ *\( *([A-Z]) *\) *$", r"\1"),
    )
]


def _canonical(text: str) -> str:
    r"""A text that is shared by answers that are spelt differently: `1/2`, `0.5`, `\dfrac12`."""
    number = _rational(text)
    if number is None:
        text = _to_latex(text)
        for pattern, replacement in _SYNONYMS:
            text = pattern.sub(replacement, text)
        number = _rational(text)
    # `3 1/2` is not `31/2`, and `32, 349` not a number.
    return re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text) if number is None else str(number)


def _rational(text: str) -> Fraction | None:
    """The value of an integer, a decimal number or a simple fraction, None of anything else."""
    match = _RATIONAL.fullmatch(text.strip()) if len(text) < 1000 else None
    if match is None:
        return None
    sign, whole, decimals, *fraction = match.groups()
    top, bottom = [part for part in fraction if part] or (None, "1")
    number = top or re.sub("[ ,]", "", whole or "") + (decimals or "")
    if not number or int(bottom) == 0:
        return None
    return Fraction(sign + number) / int(bottom)


def _same_sequence(gold: str, found: str) -> bool:
    golds, founds = re.split("[,:]", gold), re.split("[,:]", found)
    return 1 < len(golds) == len(founds) and all(map(_same, golds, founds))


def _equal(gold: _Answer, found: _Answer) -> bool:
    bases = [_BASE.findall(re.sub(r"[ {]", "", answer.text)) for answer in (gold, found)]
    if bases[0] and bases[0] != bases[1]:  # a base that only the response gives is the problem's
        return False
    if not gold.parsed or not found.parsed or _differ(gold.parsed[0], found.parsed[0]):
        return False
    return math_verify.verify(gold.parsed, found.parsed, timeout_seconds=None)


def _differ(gold: object, found: object) -> bool:
    """Whether both have values that differ, exactly if rational, else in 30 digits."""
    if isinstance(gold, sympy.Eq) != isinstance(found, sympy.Eq):  # `x=5` and `5` may be the same
        gold, found = (a.rhs if isinstance(a, sympy.Eq) else a for a in (gold, found))
    gold, found = _value(gold), _value(found)
    if gold is None or found is None:
        return False
    difference = gold - found
    if difference.is_Rational:
        return difference != 0
    tolerance = FLOAT_TOLERANCE if difference.has(sympy.Float) else 1e-25
    scale = max(abs(gold.evalf(30)), abs(found.evalf(30)))
    return bool(abs(difference.evalf(30)) > tolerance * scale)


_OPERATIONS = (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)


def _value(answer: object) -> sympy.Expr | None:
    """The number that an answer is, or that it is at one point where it is a formula."""
    if isinstance(answer, sympy.Eq) and answer.lhs.is_Symbol and not answer.rhs.free_symbols:
        answer = answer.rhs
    if not isinstance(answer, sympy.Expr) or isinstance(answer, sympy.MatrixExpr):
        return None
    if answer.has(sympy.UnevaluatedExpr):  # a percentage, which Math-Verify equates with its number
        return None
    if not answer.free_symbols:
        answer = answer.doit()
    elif answer.has(*_OPERATIONS) or all(
        factor.is_Symbol for factor in answer.as_ordered_factors()
    ):
        return None  # the product of symbols may be a word
    else:
        point = {symbol: _coordinate(symbol) for symbol in answer.free_symbols}
        answer = answer.evalf(30, subs=point, chop=True)
    return answer if answer.is_number and answer.is_finite else None


def _coordinate(symbol: sympy.Symbol) -> float:
    """Some number between 1 and 2, so that Math-Verify need not expand what is not equal."""
    return 1 + int.from_bytes(symbol.name.encode()) % 9973 / 9973


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


_TOKEN = re.compile(r"[0-9.,]*[0-9]|\\[a-zA-Z]+|\\[^a-zA-Z0-9]|[a-zA-Z(){}\[\]^!]")
_OPENING, _CLOSING = "([{", ")]}"


def _is_costly(text: str) -> bool:
    """Whether `text` is nested too deep, or too large a number, for a computer algebra system."""
    depth = 0
    for character in text:
        depth = max(0, depth + (character in _OPENING) - (character in _CLOSING))
        if depth > MAX_NESTING:
            return True
    tokens = _TOKEN.findall(text)[::-1]
    while tokens:
        if _digits(tokens) > MAX_DIGITS:
            return True
    return False


def _digits(tokens: list[str]) -> float:
    """An upper bound of the decimal digits of a group, with variables taken for 1.

    Takes the group and its closing bracket off the end of `tokens`. A sum, a product or a quotient
    has at most the digits of all its terms together.
    """
    total = 0.0
    while tokens and tokens[-1] not in _CLOSING:
        chain = [_factor_digits(tokens)]
        while tokens and tokens[-1] == "^":
            tokens.pop()
            chain.append(_factor_digits(tokens))
        digits = chain.pop()
        for base in reversed(chain):
            digits = max(base, 0.3) * 10 ** min(digits, 300)
        total += digits
    del tokens[-1:]
    return total


def _factor_digits(tokens: list[str]) -> float:
    token = tokens.pop() if tokens else ""
    digits = 0.0
    if token in ("\\binom", "\\dbinom", "\\tbinom"):
        digits = _factor_digits(tokens)
        tokens.append("!")  # at most the factorial of its first argument
    elif token and token in _OPENING:
        digits = _digits(tokens)
    elif token[-1:].isdigit():
        number = re.sub("[,.]", "", token)
        digits = math.log10(1 + int(number)) if len(number) < 300 else len(number)
    while tokens and tokens[-1] == "!":
        tokens.pop()
        digits *= 10 ** min(digits, 300)
    return digits
