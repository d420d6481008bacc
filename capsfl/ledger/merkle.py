"""Merkle trees as RFC 6962 (section 2.1) defines them, over leaf hashes, with SHA-256.

Every function takes leaf hashes (32 bytes each, from `leaf_hash`), never leaf data, so that a tensor is
hashed once and its hash can be kept. The two `verify_` functions are total: whatever an untrusted party
sends, they answer True or False.
"""

from collections.abc import Sequence
from hashlib import sha256

HASH_BYTES = 32


def leaf_hash(data: bytes) -> bytes:
    """Returns SHA-256(0x00 ‖ data), the hash of a leaf (RFC 6962, 2.1)."""
    return sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Returns SHA-256(0x01 ‖ left ‖ right), the hash of an inner node (RFC 6962, 2.1)."""
    return sha256(b"\x01" + left + right).digest()


class Frontier:
    """The perfect subtrees of a growing tree: appends and roots in O(log n), without keeping the leaves."""

    def __init__(self) -> None:
        self.size = 0
        self._subtrees: list[bytes] = []  # largest first: one for each bit set in `size`

    def grown(self, leaf: bytes) -> "Frontier":
        """Returns another frontier with one more leaf hash at the right."""
        other = Frontier()
        other.size, other._subtrees = self.size, list(self._subtrees)
        other.append(leaf)
        return other

    def append(self, leaf: bytes) -> None:
        """Adds a leaf hash at the right."""
        size = self.size
        while size & 1:
            leaf = node_hash(self._subtrees.pop(), leaf)
            size >>= 1
        self._subtrees.append(leaf)
        self.size += 1

    def root(self) -> bytes:
        """Returns the root of the leaves so far; of none, SHA-256 of nothing."""
        if not self._subtrees:
            return sha256(b"").digest()
        node = self._subtrees[-1]
        for left in reversed(self._subtrees[:-1]):
            node = node_hash(left, node)
        return node


def root(leaves: Sequence[bytes]) -> bytes:
    """Returns the root of a tree of leaf hashes; of none, SHA-256 of nothing."""
    frontier = Frontier()
    for leaf in leaves:
        frontier.append(leaf)
    return frontier.root()


def inclusion_proof(leaves: Sequence[bytes], index: int) -> tuple[bytes, ...]:
    """Returns the audit path of one leaf, nearest sibling first (RFC 6962, 2.1.1).

    Raises:
        ValueError: `index` is not that of a leaf.
    """
    if not 0 <= index < len(leaves):
        raise ValueError(f"index {index} is not in a tree of {len(leaves)} leaves")
    if len(leaves) == 1:
        return ()
    split = _split(len(leaves))
    if index < split:
        return (*inclusion_proof(leaves[:split], index), root(leaves[split:]))
    return (*inclusion_proof(leaves[split:], index - split), root(leaves[:split]))


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Tells whether the proof shows `leaf` at `index` of a tree of this size and root (RFC 9162, 2.1.3.2)."""
    if not (_are_hashes(leaf, root, *proof) and 0 <= index < size):
        return False
    sides = _sides(index, size - 1)
    if len(sides) != len(proof):
        return False
    node = leaf
    for sibling, is_left in zip(proof, sides, strict=True):
        node = node_hash(sibling, node) if is_left else node_hash(node, sibling)
    return node == root


def consistency_proof(leaves: Sequence[bytes], old_size: int) -> tuple[bytes, ...]:
    """Returns the nodes that show the first `old_size` leaves to be a prefix of all (RFC 6962, 2.1.2).

    Raises:
        ValueError: `old_size` is not between 1 and the number of leaves.
    """
    if not 0 < old_size <= len(leaves):
        raise ValueError(f"an old size of {old_size} is not between 1 and {len(leaves)}")
    return _subproof(leaves, old_size, whole=True)


def verify_consistency(old_size: int, new_size: int, old_root: bytes, new_root: bytes, proof: Sequence[bytes]) -> bool:
    """Tells whether the proof shows the old tree to be a prefix of the new one (RFC 9162, 2.1.4.2).

    An old size of 0 is refused: every tree extends the empty one, so there is nothing a proof could show,
    and an answer of True would let a caller mistake any root for a confirmed successor.
    """
    if 0 < old_size == new_size:  # one tree, stated twice: nothing is hashed
        return not proof and isinstance(old_root, bytes) and old_root == new_root
    if not (_are_hashes(old_root, new_root, *proof) and 0 < old_size < new_size):
        return False
    # Where the old tree is one perfect subtree, its root is not repeated in the proof.
    nodes = list(proof) if old_size & (old_size - 1) else [old_root, *proof]
    # The proof begins at the largest subtree that ends where the old tree does.
    level = (old_size & -old_size).bit_length() - 1
    sides = _sides((old_size - 1) >> level, (new_size - 1) >> level)
    if len(nodes) != len(sides) + 1:
        return False
    old_node = new_node = nodes[0]
    for sibling, is_left in zip(nodes[1:], sides, strict=True):
        if is_left:
            old_node, new_node = node_hash(sibling, old_node), node_hash(sibling, new_node)
        else:
            new_node = node_hash(new_node, sibling)
    return old_node == old_root and new_node == new_root


def _sides(position: int, last: int) -> list[bool]:
    """Tells for each node of a path from a leaf to the root whether its sibling is the left one.

    Args:
        position: of the leaf.
        last: position of the last leaf.
    """
    sides = []
    while last:
        is_left = bool(position & 1) or position == last
        sides.append(is_left)
        while is_left and not position & 1 and position:  # the last node of a level without a partner moves up as it is
            position, last = position >> 1, last >> 1
        position, last = position >> 1, last >> 1
    return sides


def _subproof(leaves: Sequence[bytes], old_size: int, *, whole: bool) -> tuple[bytes, ...]:
    if old_size == len(leaves):
        return () if whole else (root(leaves),)
    split = _split(len(leaves))
    if old_size <= split:
        return (*_subproof(leaves[:split], old_size, whole=whole), root(leaves[split:]))
    return (*_subproof(leaves[split:], old_size - split, whole=False), root(leaves[:split]))


def _split(size: int) -> int:
    """Returns the largest power of two below `size`."""
    return 1 << (size - 1).bit_length() - 1


def _are_hashes(*values: object) -> bool:
    return all(isinstance(value, bytes) and len(value) == HASH_BYTES for value in values)
