import base64
import json
import re
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capsfl.ledger import merkle

_LEAVES = [merkle.leaf_hash(bytes([index])) for index in range(17)]


def _tree_hash(data: list[bytes]) -> bytes:
    """RFC 6962, 2.1, word for word, from leaf data."""
    if not data:
        return sha256(b"").digest()
    if len(data) == 1:
        return sha256(b"\x00" + data[0]).digest()
    k = max(2**i for i in range(20) if 2**i < len(data))
    return sha256(b"\x01" + _tree_hash(data[:k]) + _tree_hash(data[k:])).digest()


def _cases(folder, kind):
    paths = sorted((folder / "merkle" / "testdata" / kind).rglob("*.json"))
    assert len(paths) == 98
    return [(path, json.loads(path.read_text())) for path in paths]


def _proof(case):
    return [base64.b64decode(node) for node in case["proof"] or ()]


def test_inclusion_agrees_with_all_rfc_6962_vectors(shared_vectors):
    for path, case in _cases(shared_vectors, "inclusion"):
        leaf, root = (base64.b64decode(case[key] or "") for key in ("leafHash", "root"))
        verdict = merkle.verify_inclusion(leaf, case["leafIdx"], case["treeSize"], _proof(case), root)
        assert verdict is not case["wantErr"], path


def test_consistency_agrees_with_all_rfc_6962_vectors_but_refuses_an_empty_old_tree(shared_vectors):
    refused = 0
    for path, case in _cases(shared_vectors, "consistency"):
        old, new = (base64.b64decode(case[key] or "") for key in ("root1", "root2"))
        verdict = merkle.verify_consistency(case["size1"], case["size2"], old, new, _proof(case))
        assert verdict is not case["wantErr"], path
        refused += case["size1"] == 0
    assert refused > 0
    assert not merkle.verify_consistency(0, 3, merkle.root([]), merkle.root(_LEAVES[:3]), [])


def test_roots_agree_with_the_published_ones_of_sizes_0_to_8(shared_vectors):
    text = (shared_vectors / "merkle_roots" / "constants.go.txt").read_text()
    functions = dict(re.findall(r"func (\w+)\(\) \S+ \{(.*?)\n\}", text, flags=re.DOTALL))
    inputs = [bytes.fromhex(item) for item in re.findall(r'hd\("([0-9a-f]*)"\)', functions["LeafInputs"])]
    roots = [bytes.fromhex(item) for item in re.findall(r'hd\("([0-9a-f]*)"\)', functions["RootHashes"])]
    assert (len(inputs), len(roots)) == (8, 8)
    leaves = [merkle.leaf_hash(data) for data in inputs]
    assert [merkle.root(leaves[:size]) for size in range(1, 9)] == roots
    assert merkle.root([]).hex() in functions["EmptyRootHash"]


@given(st.lists(st.binary(max_size=3), max_size=40))
def test_the_root_is_the_one_rfc_6962_defines(data):
    leaves = [merkle.leaf_hash(item) for item in data]
    assert merkle.root(leaves) == _tree_hash(data)
    frontier = merkle.Frontier()
    for size, leaf in enumerate(leaves):
        branch = frontier.grown(leaf)
        assert frontier.root() == merkle.root(leaves[:size])
        frontier.append(leaf)
        assert branch.root() == frontier.root() == merkle.root(leaves[: size + 1])


@pytest.mark.parametrize("size", range(1, len(_LEAVES) + 1))
def test_a_proof_holds_for_its_own_leaf_place_size_and_root_only(size):
    leaves, root = _LEAVES[:size], merkle.root(_LEAVES[:size])
    for index, leaf in enumerate(leaves):
        proof = merkle.inclusion_proof(leaves, index)
        assert len(proof) <= (size - 1).bit_length()
        assert merkle.verify_inclusion(leaf, index, size, proof, root)
        for other in range(size + 1):
            assert merkle.verify_inclusion(leaf, other, size, proof, root) is (other == index)
        assert not merkle.verify_inclusion(merkle.leaf_hash(b"else"), index, size, proof, root)
        assert not merkle.verify_inclusion(leaf, index, size, (*proof, root), root)
        for cut in range(len(proof)):
            assert not merkle.verify_inclusion(leaf, index, size, proof[:cut], root)
            assert not merkle.verify_inclusion(leaf, index, size, (*proof[:cut], leaf[::-1], *proof[cut + 1 :]), root)


@pytest.mark.parametrize("new", range(1, len(_LEAVES) + 1))
def test_a_consistency_proof_holds_for_its_own_prefix_only(new):
    new_root = merkle.root(_LEAVES[:new])
    for old in range(1, new + 1):
        proof, old_root = merkle.consistency_proof(_LEAVES[:new], old), merkle.root(_LEAVES[:old])
        assert merkle.verify_consistency(old, new, old_root, new_root, proof)
        assert not merkle.verify_consistency(old, new, old_root[::-1], new_root, proof)
        assert not merkle.verify_consistency(old, new, old_root, new_root[::-1], proof)
        assert not merkle.verify_consistency(old, new, old_root, new_root, (*proof, old_root))
        for cut in range(len(proof)):
            assert not merkle.verify_consistency(old, new, old_root, new_root, proof[:cut])
        for other in range(new + 2):
            if other != old:
                assert not merkle.verify_consistency(other, new, old_root, new_root, proof)


@pytest.mark.parametrize("bad", [None, "", b"", b"\x00" * 31, b"\x00" * 33, 0])
def test_what_is_not_a_hash_proves_nothing(bad):
    root = merkle.root(_LEAVES[:2])
    assert not merkle.verify_inclusion(_LEAVES[0], 0, 2, [bad], root)
    assert not merkle.verify_inclusion(bad, 0, 2, [_LEAVES[1]], root)
    assert not merkle.verify_consistency(1, 2, bad, root, [_LEAVES[1]])
    assert not merkle.verify_consistency(1, 2, _LEAVES[0], root, [bad])


def test_places_outside_the_tree_are_refused_with_their_number():
    with pytest.raises(ValueError, match="index 3"):
        merkle.inclusion_proof(_LEAVES[:3], 3)
    for old_size in (0, 4):
        with pytest.raises(ValueError, match=f"size of {old_size}"):
            merkle.consistency_proof(_LEAVES[:3], old_size)
