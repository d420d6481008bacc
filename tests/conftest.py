"""Settings every test runs under: one CPU device, promotion of ranks an error."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parent.parent


def _shared_data() -> Path:
    return Path(os.environ.get("CAPSFL_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real scans outside the repository (CAPSFL_DATA overrides the place); skips where they are absent."""
    place = _shared_data()
    if not place.is_dir():
        pytest.skip(f"no real data at {place}; set CAPSFL_DATA to run this test")
    return place


@pytest.fixture(scope="session")
def shared_vectors() -> Path:
    """Known answers from other projects (CAPSFL_VECTORS overrides the place); skips where they are absent."""
    place = Path(os.environ.get("CAPSFL_VECTORS", ROOT.parent / "shared" / "vectors"))
    if not place.is_dir():
        pytest.skip(f"no vectors at {place}; set CAPSFL_VECTORS to run this test")
    return place
