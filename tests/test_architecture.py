"""Who may import whom: the road runs one way, and the parts that others take away stand alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "capsfl").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels" / "capsfl_kernels").rglob("*.py"))

# From the command line down to what needs nobody. A part imports itself and the parts after it, never one before.
LAYERS = (
    ("cli",),
    ("commands",),
    ("export",),
    ("train", "predict", "doctor", "bench"),
    ("sweeps", "training"),
    ("evaluation", "audit", "report"),
    ("recording", "audit_consensus"),
    ("study", "checkpoint", "curves"),
    ("config", "membership"),
    ("consensus",),
    ("federated", "digests"),
    ("learning", "privacy"),
    ("models", "ct", "ledger"),
    ("arguments", "clock", "processes", "profiling", "progress", "workers"),
    ("settings",),
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

MAY_NOT = {
    "ct": {"models", "federated", "learning", "privacy", "ledger"},
    "models": {"ct", "federated", "learning", "privacy", "ledger"},
    "ledger": {"ct", "models", "federated", "learning", "privacy", "settings"},
    "privacy": {"learning", "models", "ct", "ledger"},
    "federated": {"ct", "ledger", "models"},
    "learning": {"ledger", "federated"},
    "report": {"federated", "learning", "models", "checkpoint", "train", "privacy"},
}

LIGHT = "audit, bench, doctor, epsilon, export, ingest, ledger, predict, report, verify"
"""Commands that understand their words before anything heavy is loaded."""


def name_of(path: Path) -> str:
    """Dotted name of a module of capsfl or capsfl_kernels."""
    base = ROOT if path.is_relative_to(ROOT / "capsfl") else ROOT / "kernels"
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Dotted names of what a module imports, anywhere in it or only when it is itself imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(outer)
    }
    for node in ast.walk(tree):
        if top_level and id(node) in functions:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts(path: Path) -> set[str]:
    """The parts of capsfl that a module imports."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("capsfl.")} & RANK.keys()


def packages(path: Path, *, top_level: bool = False) -> set[str]:
    """The packages outside the standard library that a module imports."""
    found = {name.split(".")[0] for name in imports(path, top_level=top_level)}
    return found - set(sys.stdlib_module_names)


def test_every_part_of_the_tree_has_its_place():
    here = {path.relative_to(ROOT / "capsfl").parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert here == RANK.keys()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_one_way(path: Path):
    part = path.relative_to(ROOT / "capsfl").parts[0].removesuffix(".py")
    if part == "__init__":
        return
    above = {other for other in parts(path) if RANK[other] < RANK[part]}
    beside = {other for other in parts(path) if RANK[other] == RANK[part] and other != part}
    beside -= {"study", "checkpoint", "audit", "privacy", "report", "ct", "models"}
    assert not above | beside, f"{name_of(path)} imports {sorted(above | beside)}"
    assert not parts(path) & MAY_NOT.get(part, set())


@pytest.mark.parametrize("path", [p for p in MODULES if "ledger" in p.parts], ids=name_of)
def test_the_ledger_is_pure_python_and_ecdsa(path: Path):
    # Only the module that nobody imports before it is needed may name OpenSSL at its top.
    openssl = {"cryptography"}
    assert packages(path, top_level=True) <= {"capsfl", "ecdsa"} | (openssl if path.stem == "curve_secure" else set())
    lazily = openssl if path.stem in ("curve_secure", "keyfiles", "sealing") else set()
    assert packages(path) <= {"capsfl", "ecdsa"} | lazily


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name in ("ct", "phantom", "collections")], ids=name_of)
def test_ct_needs_no_jax(path: Path):
    assert not packages(path) & {"jax", "flax", "optax", "orbax"}


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_kernels_need_jax_alone(path: Path):
    assert packages(path) <= {"capsfl_kernels", "jax", "numpy"}, "numpy comes with jax"


def test_models_reach_the_kernels_by_their_public_names_only():
    for path in MODULES:
        if "bench" in path.parts:
            continue  # it measures the operators at the shapes of their own `cases`
        inner = {name for name in imports(path) if name.startswith("capsfl_kernels.") and name.count(".") > 1}
        assert not inner, f"{name_of(path)} imports {sorted(inner)}"


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "the name `kernels` belongs to another distribution"


def test_there_is_no_drawer_for_everything():
    names = {path.stem for path in (*MODULES, *KERNELS)}
    assert not names & {"utils", "util", "helpers", "common", "misc", "registry"}


@pytest.mark.parametrize(
    ("statement", "without"),
    [
        ("import capsfl.cli", {"jax", "numpy", "orbax", "pydicom", "matplotlib", "pydantic", "tyro"}),
        (f"from capsfl.commands import {LIGHT}", {"jax", "numpy", "orbax", "pydicom", "matplotlib", "tensorstore"}),
        ("import capsfl.ledger", {"jax", "numpy", "cryptography"}),
        ("import capsfl.ct.ingest, capsfl.ct.phantom", {"jax", "flax", "orbax"}),
        ("import capsfl.report", {"jax", "flax", "orbax", "tensorstore"}),
        ("import capsfl_kernels", {"flax", "capsfl", "orbax", "optax"}),
    ],
)
def test_what_is_not_needed_is_not_loaded(statement: str, without: set[str]):
    script = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & without
