import base64
import json
import os
import stat
import sys

import pytest
from ecdsa import NIST256p, SigningKey
from ecdsa.der import UnexpectedDER
from ecdsa.util import sigdecode_der
from hypothesis import given, settings
from hypothesis import strategies as st

from capsfl.ledger import curve_ecdsa
from capsfl.ledger.errors import KeyFileError, LedgerError
from capsfl.ledger.keyfiles import load_key, save_key
from capsfl.ledger.keys import Curve, Signer, Verifier, hospital_id, pre_authentication_encoding

_ORDER = NIST256p.order


def _raw(r: int, s: int) -> bytes:
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _compressed(x: int, y: int) -> bytes:
    return bytes([2 + y % 2]) + x.to_bytes(32, "big")


def _low(signature: bytes) -> bytes:
    s = int.from_bytes(signature[32:], "big")
    return signature[:32] + min(s, _ORDER - s).to_bytes(32, "big")


@pytest.fixture(params=["ecdsa", "cryptography"])
def curve(request):
    """Both curves, whose bytes must be the same."""
    if request.param == "ecdsa":
        return curve_ecdsa
    pytest.importorskip("cryptography", reason="capsfl[secure] is not installed")
    from capsfl.ledger import curve_secure

    return curve_secure


def _wycheproof(folder, name, curve):
    for group in json.loads((folder / "wycheproof" / name).read_text())["testGroups"]:
        key = group["publicKey"]
        verifier = Verifier(_compressed(int(key["wx"], 16), int(key["wy"], 16)), curve=curve)
        for case in group["tests"]:
            signature, message = bytes.fromhex(case["sig"]), bytes.fromhex(case["msg"])
            yield case, verifier, signature, message


def test_wycheproof_p1363_signatures_are_judged_right_and_high_s_is_refused(shared_vectors, curve):
    counts = {"valid": 0, "invalid": 0}
    for case, verifier, signature, message in _wycheproof(
        shared_vectors, "ecdsa_secp256r1_sha256_p1363_test.json", curve
    ):
        counts[case["result"]] += 1
        if case["result"] == "valid":
            # The vectors count both s as valid; we accept the lower one alone.
            assert verifier.verify_message(_low(signature), message), case
            assert verifier.verify_message(signature, message) is (signature == _low(signature)), case
        else:
            assert not verifier.verify_message(signature, message), case
            if len(signature) == 64 and int.from_bytes(signature[32:], "big") < _ORDER:
                assert not verifier.verify_message(_low(signature), message), case
    assert counts == {"valid": 173, "invalid": 89}


def test_wycheproof_der_signatures_are_judged_right_once_strictly_decoded(shared_vectors, curve):
    counts = {"valid": 0, "invalid": 0}
    for case, verifier, signature, message in _wycheproof(shared_vectors, "ecdsa_secp256r1_sha256_test.json", curve):
        counts[case["result"]] += 1
        try:
            raw = _low(_raw(*sigdecode_der(signature, _ORDER)))
        except (UnexpectedDER, ValueError, OverflowError):
            raw = None
        assert (raw is not None and verifier.verify_message(raw, message)) is (case["result"] == "valid"), case
    assert counts == {"valid": 174, "invalid": 310}


def test_signatures_are_those_of_rfc_6979_with_the_lower_s(shared_vectors, curve):
    vectors = json.loads((shared_vectors / "rfc6979" / "p256_sha256.json").read_text())
    signer = Signer(bytes.fromhex(vectors["x"]), curve=curve)
    assert signer.public_key == _compressed(int(vectors["Ux"], 16), int(vectors["Uy"], 16))
    folded = 0
    for case in vectors["tests"]:
        expected = bytes.fromhex(case["r"] + case["s"])
        signature = signer.sign_message(case["msg"].encode())
        assert signature == _low(expected)
        assert Verifier(signer.public_key, curve=curve).verify_message(signature, case["msg"].encode())
        folded += signature != expected
    assert folded == 1  # "sample" has the higher s in the RFC


def test_the_encoding_and_signature_are_those_of_dsse(shared_vectors, curve):
    protocol = (shared_vectors / "dsse" / "protocol.md").read_text()
    encoding = pre_authentication_encoding(b"http://example.com/HelloWorld", b"hello world")
    assert encoding.decode() in protocol
    x = 46950820868899156662930047687818585632848591499744589407958293238635476079160
    y = 5640078356564379163099075877009565129882514886557779369047442380624545832820
    d = 97358161215184420915383655311931858321456579547487070936769975997791359926199
    sig = "A3JqsQGtVsJ2O2xqrI5IcnXip5GToJ3F+FnZ+O88SjtR6rDAajabZKciJTfUiHqJPcIAriEGAHTVeCUjW2JIZA=="
    assert all(text in protocol for text in (str(x), str(y), str(d), sig))
    signer = Signer(d.to_bytes(32, "big"), curve=curve)
    assert signer.public_key == _compressed(x, y)
    assert signer.sign_message(encoding) == _low(base64.b64decode(sig))


def test_a_signature_holds_for_its_own_key_type_chain_and_body_only(owner, stranger):
    signature = owner.sign("head", "trial-1", b"body")
    verifier = Verifier(owner.public_key)
    assert verifier.verify(signature, "head", "trial-1", b"body")
    assert not verifier.verify(signature, "vote", "trial-1", b"body")
    assert not verifier.verify(signature, "head", "trial-2", b"body")
    assert not verifier.verify(signature, "head", "trial-1", b"bodz")
    assert not Verifier(stranger.public_key).verify(signature, "head", "trial-1", b"body")
    assert signature == owner.sign("head", "trial-1", b"body")
    for bit in range(0, 512, 5):
        flipped = bytearray(signature)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not verifier.verify(bytes(flipped), "head", "trial-1", b"body")


@pytest.mark.parametrize(
    "public_key",
    [
        b"",
        b"\x02" * 32,
        b"\x02" + b"\xff" * 32,
        b"\x02" + b"\x00" * 31 + b"\x07",
        b"\x04" + b"\x01" * 64,
        b"\x00",
    ],
)
def test_what_is_not_a_compressed_point_verifies_nothing_and_raises_nothing(public_key, owner):
    verifier = Verifier(public_key)
    assert not verifier.is_valid
    assert not Verifier(list(public_key)).is_valid  # pyright: ignore[reportArgumentType]
    assert verifier.verify(owner.sign("head", "c", b""), "head", "c", b"") is False


@pytest.mark.parametrize("signature", [b"", None, 0, b"\x00" * 64, b"\xff" * 64, b"\x01" * 65, "s" * 64])
def test_what_is_not_a_signature_is_false(signature, owner):
    assert Verifier(owner.public_key).verify(signature, "head", "c", b"") is False


@pytest.mark.parametrize(
    ("payload_type", "chain_id"),
    [
        ("Head", "c"),
        ("head;chain=x", "c"),
        ("", "c"),
        ("head", ""),
        ("head", "a;b"),
        ("head", "../x"),
        ("head", "c\n"),
    ],
)
def test_names_that_could_blur_what_is_signed_are_refused(payload_type, chain_id, owner):
    with pytest.raises(LedgerError):
        owner.sign(payload_type, chain_id, b"")
    assert Verifier(owner.public_key).verify(b"\x01" * 64, payload_type, chain_id, b"") is False


@pytest.mark.parametrize("secret", [b"", b"\x00" * 32, _ORDER.to_bytes(32, "big"), b"\x01" * 33])
def test_a_secret_outside_the_group_is_refused(secret):
    with pytest.raises(LedgerError, match="private_key"):
        Signer(secret)


def test_a_saved_key_reads_back_is_private_and_never_overwrites_another(tmp_path):
    signer, path = Signer.generate(), tmp_path / "hospital.pem"
    save_key(signer, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_key(path).public_key == signer.public_key
    assert load_key(path).hospital_id() == hospital_id(signer.public_key) == signer.hospital_id()
    with pytest.raises(KeyFileError, match="exists"):
        save_key(Signer.generate(), path)
    assert load_key(path).public_key == signer.public_key
    assert os.listdir(tmp_path) == ["hospital.pem"]


def test_a_failed_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "link"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(KeyFileError, match="No space left"):
                save_key(Signer.generate(), tmp_path / "key.pem")
        assert os.listdir(tmp_path) == []


def test_two_keys_differ_and_a_key_does_not_print_its_secret():
    first, second = Signer.generate(), Signer.generate()
    assert first.public_key != second.public_key
    assert repr(first) == f"Signer(hospital_id='{first.hospital_id()}')"


def test_key_files_that_are_open_linked_foreign_or_no_files_are_refused(tmp_path, owner):
    path = tmp_path / "key.pem"
    with pytest.raises(KeyFileError, match=r"key\.pem: No such file"):
        load_key(path)
    save_key(owner, path)
    (tmp_path / "link.pem").symlink_to(path)
    with pytest.raises(KeyFileError, match=r"link\.pem"):
        load_key(tmp_path / "link.pem")
    os.mkfifo(tmp_path / "fifo.pem", 0o600)
    with pytest.raises(KeyFileError, match="not a regular file"):
        load_key(tmp_path / "fifo.pem")
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_key(path)
    other_curve = SigningKey.generate().to_pem()
    for content in (
        b"",
        b"\x00" * 5000,
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----",
        other_curve,
    ):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(KeyFileError, match="not the PEM"):
            load_key(path)


@given(secret=st.integers(1, _ORDER - 1), message=st.binary(max_size=200), flip=st.integers(0, 511))
@settings(max_examples=40)
def test_both_curves_give_the_same_keys_and_signatures_and_accept_each_others(secret, message, flip):
    pytest.importorskip("cryptography", reason="capsfl[secure] is not installed")
    from capsfl.ledger import curve_secure

    curves: tuple[Curve, Curve] = (curve_ecdsa, curve_secure)
    slow, fast = (Signer(secret.to_bytes(32, "big"), curve=curve) for curve in curves)
    assert slow.public_key == fast.public_key
    signature = slow.sign_message(message)
    assert signature == fast.sign_message(message)
    changed = bytearray(signature)
    changed[flip // 8] ^= 1 << flip % 8
    for curve in curves:
        verifier = Verifier(slow.public_key, curve=curve)
        assert verifier.verify_message(signature, message)
        assert not verifier.verify_message(bytes(changed), message)


def test_a_key_under_a_passphrase_opens_with_it_alone(tmp_path):
    pytest.importorskip("cryptography", reason="capsfl[secure] is not installed")
    signer, path = Signer.generate(), tmp_path / "key.pem"
    with pytest.raises(KeyFileError, match="empty passphrase"):
        save_key(signer, path, b"")
    save_key(signer, path, b"three lungs")
    assert b"ENCRYPTED" in path.read_bytes()
    assert load_key(path, b"three lungs").public_key == signer.public_key
    for wrong, words in ((None, "CAPSFL_KEY_PASSPHRASE"), (b"two lungs", "does not open it")):
        with pytest.raises(KeyFileError, match=words):
            load_key(path, wrong)
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(KeyFileError, match="does not open it"):
        load_key(path, b"three lungs")


def test_without_the_extra_a_passphrase_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "capsfl.ledger.curve_secure", None)
    with pytest.raises(KeyFileError, match=r"pip install 'capsfl\[secure\]'"):
        save_key(Signer.generate(), tmp_path / "key.pem", b"three lungs")
    assert os.listdir(tmp_path) == []
