"""Which label a folder's name means."""

from collections.abc import Iterable

from capsfl.ct.collections.config import CollectionConfig
from capsfl.ct.errors import ManifestError

NEGATIVE = {"0", "control", "healthy", "neg", "negative", "noncovid", "nocovid", "normal", "notcovid", "ct0"}
POSITIVE = {"1", "covid", "covid19", "infected", "ncp", "pos", "positive"}


def order_classes(names: Iterable[str], config: CollectionConfig) -> tuple[str, ...]:
    """Put class names in the order of their labels: those without disease first, COVID last, else by the alphabet.

    Raises:
        ManifestError: `config.classes` is given and does not name them all.
    """
    names = sorted(set(names))
    if not config.classes:
        return tuple(sorted(names, key=lambda name: (_is(name, POSITIVE), not _is(name, NEGATIVE), name.lower())))
    if unknown := [name for name in names if name not in config.classes]:
        raise ManifestError(
            f"collection.classes = {list(config.classes)}: the folder holds {unknown[0]!r} too; name every class, "
            "the one without disease first"
        )
    return config.classes


def label_of(name: str, classes: tuple[str, ...], config: CollectionConfig) -> int:
    """The label of a class: its place, or with `labels = "disease"` whether it is the last one, which is COVID."""
    place = classes.index(name)
    if config.labels == "all" or len(classes) <= 2:
        return place
    return int(place == len(classes) - 1)


def class_names(classes: tuple[str, ...], config: CollectionConfig) -> tuple[str, ...]:
    """What the labels that `label_of` gives mean."""
    if config.labels == "all" or len(classes) <= 2:
        return classes
    return f"not {classes[-1]}", classes[-1]


def disease_in_path(parts: Iterable[str]) -> tuple[int | None, tuple[str, ...]]:
    """Whether some folder of a path says that the patient has COVID, and by which words; None where none or both do.

    Numbers say nothing: in trees of DICOM a folder called `0` or `1` counts series or visits.
    """
    words = [word for word in map(_plain, parts) if word in POSITIVE | NEGATIVE and not word.isdigit()]
    found = {int(word in POSITIVE) for word in words}
    return (found.pop(), tuple(dict.fromkeys(words))) if len(found) == 1 else (None, ())


def _is(name: str, words: set[str]) -> bool:
    return _plain(name) in words


def _plain(name: str) -> str:
    return "".join(sign for sign in name.lower() if sign.isalnum())
