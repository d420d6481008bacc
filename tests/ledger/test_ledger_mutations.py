"""Takes each check of the ledger out of a copy of the package: the test that stands for it must fail."""

import importlib.util
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_PACKAGE = _HERE.parent.parent / "capsfl"
_SPEC = importlib.util.spec_from_file_location("ledger_mutations", _HERE / "mutations.py")
assert _SPEC is not None
assert _SPEC.loader is not None
mutations = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(mutations)

_ALL = list(mutations.MUTATIONS)
_RUN = _ALL if os.environ.get("CAPSFL_TORTURE") else random.Random(6).sample(_ALL, 2)


def test_the_table_is_the_one_in_the_readme():
    assert (_HERE / "README.md").read_text(encoding="utf-8") == mutations.README + mutations.table()


def test_every_mutation_has_its_place():
    for mutation in _ALL:
        text = (_PACKAGE / "ledger" / mutation.module).read_text(encoding="utf-8")
        assert text.count(mutation.old) == 1, mutation


@pytest.mark.torture
@pytest.mark.parametrize("mutation", _RUN, ids=lambda mutation: mutation.promise.replace(" ", "-"))
def test_without_the_check_its_test_fails(tmp_path, mutation):
    package = tmp_path / "capsfl"
    package.mkdir()
    for entry in _PACKAGE.iterdir():
        if entry.name not in ("ledger", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    shutil.copytree(_PACKAGE / "ledger", package / "ledger", ignore=shutil.ignore_patterns("__pycache__"))
    broken = package / "ledger" / mutation.module
    broken.write_text(broken.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
    file, _, name = mutation.test.partition("::")
    chosen = name.replace("|", " or ")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [str(_HERE / file), "-k", chosen]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(
        command, capture_output=True, check=False, text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert result.returncode == 1, result.stdout[-3000:]
