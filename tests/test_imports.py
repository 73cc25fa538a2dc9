"""Data flows one way, and no code knows a method by name."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxrl_sd
from jaxrl_sd.methods import METHODS

PACKAGE = Path(jaxrl_sd.__file__).parent
# A module may import from its own line and from the lines above. A folder's modules stand together.
LAYERS = [
    ["types", "files"],
    ["stats", "groups", "losses", "vocabulary", "rope", "attention", "hlo"],  # arithmetic
    ["tokens", "packing", "sharding"],
    ["model"],
    ["contexts", "teachers", "decoding"],
    ["methods"],
    ["hosts", "scoring", "update", "sampler", "diagnostics", "tpu"],  # devices
    ["conformance"],
    ["architectures", "weights", "adapters"],
    ["countdown", "chains", "code_problems", "data", "verify"],  # host
    ["config", "metrics", "checkpoint"],
    ["policies", "benchmarks", "rollout", "leakage", "evaluate", "report", "viewer"],
    ["start"],
    ["records", "answers", "results", "difficulty", "abstract"],
    ["train"],
    ["credit"],
]
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def name_of(path: Path) -> str:
    """The module of a file, or the folder of modules that it is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> set[str]:
    """Modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in found]
    return {name[1] for name in parts if name[0] == "jaxrl_sd" and len(name) > 1}


def test_every_module_has_a_layer():
    assert {name_of(path) for path in FILES} == set(LAYER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    name = name_of(path)
    later = {other for other in imported(ast.parse(path.read_text())) if LAYER[other] > LAYER[name]}
    assert not later


def test_the_package_itself_imports_nothing():
    assert not (PACKAGE / "__init__.py").read_text()


def comparisons_with_a_method(tree: ast.AST) -> list[int]:
    """Lines in which a method's name is compared, matched, or looked for."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.match_case):
            constants = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant))
            if any(isinstance(value, str) and value in METHODS for value in constants):
                lines.append(getattr(node, "lineno", 0))
    return lines


@pytest.mark.parametrize(
    "code", ["x.name == 'hsd'", "'cast' != x", "x in ('rlsd', y)", "match x:\n case 'opsd': 1"]
)
def test_a_comparison_would_be_found(code):
    assert comparisons_with_a_method(ast.parse(code))


@pytest.mark.parametrize(
    "folder", [PACKAGE, PACKAGE.parent / "experiments"], ids=lambda folder: folder.name
)
def test_no_branch_on_a_methods_name(folder):
    files = [path for path in folder.rglob("*.py") if path.parts[-2:] != ("methods", "__init__.py")]
    found = {path: comparisons_with_a_method(ast.parse(path.read_text())) for path in files}
    assert files
    assert not {path: lines for path, lines in found.items() if lines}


def test_borrowers_need_nothing_but_jax_and_flax():
    """The arithmetic and the methods load with every other dependency missing (flax needs absl)."""
    missing = (
        *("grain", "jinja2", "math_verify", "matplotlib", "ml_collections", "optax", "orbax"),
        *("safetensors", "sympy", "tensorboardX", "tokenizers", "torch", "tqdm", "transformers"),
    )
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing})); "
        "from jaxrl_sd import groups, losses, methods, stats, vocabulary; "
        "methods.METHODS['rlsd']()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
