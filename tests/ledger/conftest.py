"""One owner, three hospitals and a chain of 20 blocks, shared by the tests of the ledger."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from capsfl.ledger import Ledger, Registration, RoundRecord, Signer, chain_binding, parameters_root, tensor_leaf


def _signer(seed: int) -> Signer:
    return Signer(seed.to_bytes(32, "big"))


@pytest.fixture(scope="session")
def owner() -> Signer:
    """The key that signs the blocks."""
    return _signer(7)


@pytest.fixture(scope="session")
def stranger() -> Signer:
    """A key that owns nothing."""
    return _signer(8)


@pytest.fixture(scope="session")
def registrations_on(owner: Signer) -> Callable[[str], tuple[Registration, ...]]:
    """Three hospitals, as they register on the owner's chain of a name."""
    signers = {name: _signer(100 + index) for index, name in enumerate(("north", "south", "Öst"))}

    def build(chain_id: str) -> tuple[Registration, ...]:
        binding = chain_binding(chain_id, owner.public_key)
        return tuple(Registration.of(signer, name, "lung CT", 10, binding) for name, signer in signers.items())

    return build


@pytest.fixture(scope="session")
def registrations(registrations_on: Callable[[str], tuple[Registration, ...]]) -> tuple[Registration, ...]:
    """Three hospitals of the chain "trial-1"."""
    return registrations_on("trial-1")


@pytest.fixture(scope="session")
def leaves_of() -> Callable[[float], dict[str, str]]:
    """The leaf hashes of a two-tensor model with one value in it."""
    import struct

    def build(value: float) -> dict[str, str]:
        return {
            path: tensor_leaf(path, "float32", (1,), struct.pack("<f", value + index)).hex()
            for index, path in enumerate(("capsules/kernel", "head/bias"))
        }

    return build


@pytest.fixture(scope="session")
def round_record(leaves_of: Callable[[float], dict[str, str]]) -> Callable[..., RoundRecord]:
    """A function that builds the record of a round, any field replaced by keyword."""

    def build(number: int, value: float | None = None, **changes: object) -> RoundRecord:
        leaves = leaves_of(float(number) if value is None else value)
        fields: dict[str, object] = {
            "round": number,
            "task": "segmentation",
            "parameters_digest": parameters_root(leaves),
            "leaves": tuple(sorted(leaves.items())),
            "cohort": ("north", "Öst"),
            "sampler": "poisson",
            "clip_norm": "1.0",
            "noise_multiplier": "1.1",
            "expected_cohort": "2.0",
            "epsilon": f"{number + 0.5}",
            "delta": "1e-05",
            "configuration_hash": "0c" * 32,
            "code_version": "0.1.0",
        }
        return RoundRecord(**(fields | changes))  # pyright: ignore[reportArgumentType]

    return build


@pytest.fixture(scope="session")
def _chain_of_twenty(
    tmp_path_factory: pytest.TempPathFactory,
    owner: Signer,
    registrations: tuple[Registration, ...],
    round_record: Callable[..., RoundRecord],
) -> Path:
    folder = tmp_path_factory.mktemp("chain") / "ledger"
    with Ledger.create(folder, signer=owner, chain_id="trial-1", registrations=registrations) as ledger:
        for number in range(19):
            ledger.append(round_record(number))
    return folder


@pytest.fixture
def chain(_chain_of_twenty: Path, tmp_path: Path) -> Path:
    """A copy of a ledger of 20 blocks: genesis with three hospitals, then rounds 0 to 18."""
    return Path(shutil.copytree(_chain_of_twenty, tmp_path / "chain"))
