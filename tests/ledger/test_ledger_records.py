import ast
import dataclasses
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsfl.ledger import canonical, fields, merkle
from capsfl.ledger.errors import RecordError
from capsfl.ledger.records import (
    Genesis,
    from_canonical,
    parameters_root,
    record_id,
    tensor_leaf,
)
from capsfl.ledger.statements import Registration


def test_every_record_reads_back_from_its_canonical_form(owner, registrations, round_record):
    unnoised = round_record(1, cohort=(), epsilon=None, delta=None, clip_norm=None, noise_multiplier=None)
    records = [Genesis("c", owner.public_key), *registrations, unnoised, round_record(0)]
    for record in records:
        assert from_canonical(canonical.decode(canonical.encode(record.to_canonical()))) == record
    assert len({record_id(record) for record in records}) == len(records)


def test_the_id_of_a_round_changes_with_every_field(round_record):
    base = round_record(0)
    changes = {
        "round": 1,
        "task": "classification",
        "cohort": ("south",),
        "sampler": "fixed",
        "clip_norm": "2.0",
        "noise_multiplier": None,
        "expected_cohort": "3.0",
        "epsilon": "0.1",
        "delta": "1e-06",
        "configuration_hash": "0d" * 32,
        "code_version": "0.1.1",
        "patients": (("north", 4, None),),
    }
    others = [dataclasses.replace(base, **{name: value}) for name, value in changes.items()]
    others.append(round_record(0, value=3.0))
    assert set(changes) | {"parameters_digest", "leaves"} == {item.name for item in dataclasses.fields(base)}
    assert len({record_id(record) for record in [base, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("round", -1),
        ("round", True),
        ("round", 2**53),
        ("round", "0"),
        ("task", ""),
        ("task", "a/b"),
        ("task", ".."),
        ("task", "a\x00"),
        ("task", "a\nb"),
        ("task", " a"),
        ("task", "\u202ea"),
        ("task", "x" * 129),
        ("parameters_digest", "00" * 32),
        ("parameters_digest", "0C" * 32),
        ("leaves", [("a", "00" * 32)]),
        ("leaves", (("b", "00" * 32), ("a", "00" * 32))),
        ("leaves", (("a", "00" * 32), ("a", "00" * 32))),
        ("leaves", (("../a", "00" * 32),)),
        ("leaves", (("/a", "00" * 32),)),
        ("leaves", (("a//b", "00" * 32),)),
        ("leaves", (("a", "00"),)),
        ("leaves", ("a",)),
        ("cohort", ["north"]),
        ("cohort", ("north", "north")),
        ("cohort", ("../north",)),
        ("clip_norm", 1.0),
        ("noise_multiplier", "-1.0"),
        ("epsilon", "nan"),
        ("epsilon", "inf"),
        ("delta", "1e-400x"),
        ("configuration_hash", None),
        ("code_version", "a\tb"),
        ("leaves", (("a\\b", "00" * 32),)),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_round_that_says_what_it_may_not_is_refused_by_field_in_one_line(round_record, field, value):
    with pytest.raises(RecordError) as caught:
        dataclasses.replace(round_record(0), **{field: value})
    message = str(caught.value)
    assert message.startswith(f"round.{field}")
    assert "\n" not in message
    assert "\x00" not in message
    assert len(message) < 400


def test_a_registration_binds_its_id_to_its_key(registrations, stranger):
    first = registrations[0]
    for changes in (
        {"hospital_id": stranger.hospital_id()},
        {"public_key": stranger.public_key},
        {"public_key": b"\x02" * 33 + b"\x00"},
        {"public_key": first.public_key.hex()},
        {"name": "a/b"},
        {"kind": ""},
        {"records": -1},
    ):
        with pytest.raises(RecordError, match=r"^registration\."):
            dataclasses.replace(first, **changes)
    with pytest.raises(RecordError, match=r"genesis\.chain_id"):
        Genesis("../c", first.public_key)


def test_objects_that_are_no_records_are_refused(owner):
    good = Genesis("c", owner.public_key).to_canonical()
    assert from_canonical(good) == Genesis("c", owner.public_key)
    for bad in (
        None,
        [],
        "genesis",
        {},
        good | {"type": "vote"},
        good | {"type": ["genesis"]},
        good | {"extra": 1},
        {key: value for key, value in good.items() if key != "chain_id"},
        good | {"public_key": 1},
        good | {"public_key": owner.public_key.hex().upper()},
        good | {"public_key": [[1]]},
        good | {"chain_id": {"a": 1}},
        {"type": "round", "leaves": [[[[1]]]]},
    ):
        with pytest.raises(RecordError):
            from_canonical(bad)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
def test_a_round_with_any_field_replaced_is_a_record_or_a_named_refusal(round_record, data):
    value = round_record(0).to_canonical()
    name = data.draw(st.sampled_from(sorted(value)))
    value[name] = data.draw(_json)
    try:
        record = from_canonical(value)
    except RecordError:
        return
    assert record.to_canonical() == value


def test_a_tensor_leaf_is_the_rfc_6962_hash_of_its_header_and_bytes():
    data = struct.pack("<6f", *range(6))
    header = b'{"dtype":"float32","path":"a/w","shape":[2,3],"type":"tensor.v1"}'
    expected = merkle.leaf_hash(len(header).to_bytes(8, "big") + header + data)
    assert tensor_leaf("a/w", "float32", (2, 3), data) == expected
    assert tensor_leaf("a/w", "float32", (2, 3), memoryview(data).cast("B", (4, 6))) == expected


def test_a_tensor_leaf_changes_with_path_type_shape_and_one_ulp():
    data = struct.pack("<6f", *range(6))
    ulp = bytearray(data)
    ulp[4] ^= 1
    leaves = {
        tensor_leaf("w", "float32", (2, 3), data),
        tensor_leaf("v", "float32", (2, 3), data),
        tensor_leaf("w", "int32", (2, 3), data),
        tensor_leaf("w", "float32", (3, 2), data),
        tensor_leaf("w", "float32", (6,), data),
        tensor_leaf("w", "float32", (1, 6), data),
        tensor_leaf("w", "float32", (2, 3), bytes(ulp)),
    }
    assert len(leaves) == 7
    assert tensor_leaf("s", "bfloat16", (), b"\x00\x00") != tensor_leaf("s", "bfloat16", (1,), b"\x00\x00")
    assert len(tensor_leaf("empty", "float32", (0, 3), b"")) == 32


@pytest.mark.parametrize(
    ("path", "dtype", "shape", "data"),
    [
        ("../w", "float32", (1,), b"\x00" * 4),
        ("w", "<f4", (1,), b"\x00" * 4),
        ("w", "object", (1,), b"\x00" * 8),
        ("w", "float32", (2,), b"\x00" * 4),
        ("w", "float32", (), b""),
        ("w", "float32", (-1,), b""),
        ("w", "float32", (True,), b"\x00" * 4),
        ("w", "uint8", (2,), memoryview(b"\x00" * 4)[::2]),
    ],
)
def test_a_tensor_that_is_not_what_it_claims_has_no_leaf(path, dtype, shape, data):
    with pytest.raises(RecordError, match=r"^leaf\."):
        tensor_leaf(path, dtype, shape, data)


@given(st.dictionaries(st.text("abc/", min_size=1, max_size=4), st.binary(min_size=32, max_size=32)))
def test_the_parameters_root_depends_on_paths_only_through_their_order(leaves):
    hexed = {path: digest.hex() for path, digest in leaves.items()}
    expected = merkle.root([leaves[path] for path in sorted(leaves)]).hex()
    assert parameters_root(hexed) == parameters_root(dict(reversed(hexed.items()))) == expected


_SECURE = {"curve_secure.py", "keyfiles.py", "sealing.py"}


def test_the_ledger_imports_the_standard_library_and_ecdsa_only():
    import sys

    modules = sorted(Path(fields.__file__).parent.glob("*.py"))
    assert len(modules) > 8
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or "."]
            else:
                continue
            for name in names:
                own = name.startswith("capsfl.ledger")
                # OpenSSL is an extra: its modules are imported where they are needed, and may be missing.
                allowed = {"ecdsa"} | ({"cryptography"} if module.name in _SECURE else set())
                assert own or name.split(".")[0] in sys.stdlib_module_names | allowed, (module.name, name)
                assert name.split(".")[0] not in {"pickle", "marshal", "shelve"}, (module.name, name)


def test_a_hospital_cannot_register_with_a_key_that_is_no_point():
    with pytest.raises(RecordError, match=r"registration\.public_key"):
        Registration("00" * 32, "north", b"\x02" + b"\xff" * 32, "lung CT", 1)
