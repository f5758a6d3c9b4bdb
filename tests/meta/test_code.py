"""House rules that are about the whole tree, checked on the syntax tree rather than by grep."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("nested_runtime", "server", "clients")
MAX_LINES = 500

SHIPPED = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ALL = SHIPPED + sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "benchmarks").rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


shipped = pytest.mark.parametrize("path", SHIPPED, ids=name_of)
everything = pytest.mark.parametrize("path", ALL, ids=name_of)


@everything
def test_a_file_is_small_and_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES, f"{name_of(path)} is over {MAX_LINES} lines; split it"
    assert ast.get_docstring(ast.parse(text)), f"{name_of(path)} has no module docstring"


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "eval": "runs text as code",
    "exec": "runs text as code",
    "torch.load": "unpickles; use safetensors",
    "numpy.load": "may unpickle; use safetensors",
    "np.load": "may unpickle; use safetensors",
    "os.system": "use subprocess with a list",
}


def dangers(tree: ast.Module) -> list[str]:
    """What this code does that the house does not: load code from data, or hide every error."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: imports {a.name}" for a in node.names if a.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in UNPICKLERS:
                found.append(f"{node.lineno}: imports from {node.module}")
            if node.module == "torch" and any(a.name == "load" for a in node.names):
                found.append(f"{node.lineno}: imports torch.load")
        elif isinstance(node, ast.Call) and (why := FORBIDDEN_CALLS.get(dotted(node.func))):
            found.append(f"{node.lineno}: calls {dotted(node.func)}: {why}")
        elif isinstance(node, ast.ExceptHandler) and swallows_everything(node):
            found.append(f"{node.lineno}: swallows every exception")
    return found


def swallows_everything(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    blind = any(kind is None or dotted(kind) in {"Exception", "BaseException"} for kind in kinds)
    silent = all(
        isinstance(statement, ast.Pass | ast.Continue)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in handler.body
    )
    return blind and silent


@shipped
def test_nothing_executes_data_or_hides_errors(path: Path) -> None:
    found = dangers(ast.parse(path.read_text(encoding="utf-8")))
    assert not found, f"{name_of(path)}: {'; '.join(found)}"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "eval('1')",
        "try: f()\nexcept Exception: pass",
        "try: f()\nexcept: ...",
        "for x in y:\n  try: f()\n  except (ValueError, BaseException): continue",
    ],
)
def test_the_check_sees(code: str) -> None:
    assert dangers(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    ["model.eval()", "try: f()\nexcept ValueError: pass", "try: f()\nexcept Exception: log()", "torch.save(x, y)"],
)
def test_the_check_lets_pass(code: str) -> None:
    assert not dangers(ast.parse(code))


OPTIONAL = {"ray", "transformers", "triton", "vllm"}  # imports of these may be absent; all others must be there


@shipped
def test_all_names_exist(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    declared = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(dotted(target) == "__all__" for target in node.targets)
    ]
    if not declared:
        return
    names = ast.literal_eval(declared[0])
    assert len(names) == len(set(names)), f"{name_of(path)}: __all__ names something twice"
    try:
        module = importlib.import_module(module_of(path))
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")
    missing = [name for name in names if not hasattr(module, name)]
    assert not missing, f"{name_of(path)}: __all__ names {missing}, which the module does not have"
