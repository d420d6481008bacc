"""Collections of CT: who is in them, in which hospital, for which use; one importer a file."""

from capsfl.ct.collections.config import CollectionConfig
from capsfl.ct.collections.entries import Collection, ScanEntry, Split
from capsfl.ct.collections.manifest import is_nifti, read_manifest
from capsfl.ct.collections.reading import read_collection

__all__ = [
    "Collection",
    "CollectionConfig",
    "ScanEntry",
    "Split",
    "is_nifti",
    "read_collection",
    "read_manifest",
]
