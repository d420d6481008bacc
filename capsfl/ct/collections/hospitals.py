"""Patients into hospitals and splits: seeded, and never one person in two."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from capsfl.ct.collections.config import CollectionConfig
from capsfl.ct.collections.entries import ScanEntry, Split, distinct_names
from capsfl.ct.errors import ManifestError

MAX_DRAWS = 1000
"""Dirichlet draws before one without an empty hospital is given up."""


STRICTEST: tuple[Split | None, ...] = ("test", "validation", "train", None)


def keep_together(entries: tuple[ScanEntry, ...]) -> tuple[tuple[ScanEntry, ...], tuple[str, ...]]:
    """Leave all scans of a person in the hospital of the first; returns the entries, and a note where some moved.

    A person in two hospitals would be two to a privacy account, and tested on in one as trained on in the other.
    """
    homes: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        homes.setdefault(entry.whose, []).append(entry.hospital)
    moved = sum(len(set(names)) > 1 for names in homes.values())
    note = f"{_people(moved)} with scans in several hospitals: all scans count with the hospital of the first"
    together = tuple(replace(entry, hospital=homes[entry.whose][0]) for entry in entries)
    return together, (note,) if moved else ()


def unite_splits(entries: tuple[ScanEntry, ...]) -> tuple[tuple[ScanEntry, ...], tuple[str, ...]]:
    """Give all scans of a person the strictest of their splits; returns the entries, and a note where some differed."""
    splits: dict[tuple[str, str], set[Split | None]] = {}
    for entry in entries:
        splits.setdefault(entry.whose, set()).add(entry.split)
    parted = sum(len(uses - {None}) > 1 for uses in splits.values())
    note = (
        f"{_people(parted)} with scans in several splits: all scans went to the test set before the validation set "
        "before the training set"
    )
    united = tuple(replace(entry, split=min(splits[entry.whose], key=STRICTEST.index)) for entry in entries)
    return united, (note,) if parted else ()


def keep_apart(
    entries: tuple[ScanEntry, ...], origins: tuple[str, ...], config: CollectionConfig
) -> tuple[ScanEntry, ...]:
    """Give patients new names where two of one name are, or by `config.hospitals` may come to be, in one hospital.

    The names depend on the entries and the rule, not on who is left out or what is drawn.

    Args:
        entries: scans; a table or a shared person may have changed their hospitals.
        origins: for each entry the hospital that its name was unique in.
        config: the rules.
    """
    stays = config.hospitals == "collection"
    # Compared without case, because some file systems do.
    names = {(entry.hospital.lower() if stays else "", entry.patient.lower()) for entry in entries}
    full = [f"{origin}\n{entry.patient}" for entry, origin in zip(entries, origins, strict=True)]
    if len(names) == len(entries) or len(set(full)) < len(entries):  # nothing to do, or nothing that could be done
        return entries
    distinct = distinct_names(full)
    return tuple(replace(entry, patient=distinct[name]) for entry, name in zip(entries, full, strict=True))


def refuse_doubles(entries: tuple[ScanEntry, ...]) -> None:
    """See that no two scans would be stored in one place, where the second would replace the first.

    Raises:
        ManifestError: names the patient and the hospital.
    """
    seen: set[tuple[str, str]] = set()
    for entry in entries:
        key = (entry.hospital.lower(), entry.patient.lower())
        if key in seen:
            raise ManifestError(
                f"patient {entry.patient!r} of hospital {entry.hospital!r}: two scans have this name; rename or remove "
                "one"
            )
        seen.add(key)


def assign_hospitals(entries: tuple[ScanEntry, ...], config: CollectionConfig) -> tuple[ScanEntry, ...]:
    """Say who holds which patient, by `config.hospitals`.

    `dirichlet` draws, for every class, the shares of the hospitals from Dirichlet(alpha, ..., alpha) (Hsu, Qi and
    Brown 2019), again and again until no hospital is without a training patient. The shares of a class hold in every
    split, so that a hospital is tested on what it is trained for. `even` gives every hospital an equal share of every
    class and split. Both keep a person's scans together and depend on the order of the entries and the seed alone.

    Raises:
        ManifestError: a scanner is unknown, or there are too few patients for the hospitals.
    """
    if config.hospitals == "collection":
        return entries
    if config.hospitals == "scanner":
        if unknown := sum(entry.scanner is None for entry in entries):
            raise ManifestError(
                f'collection.hospitals = "scanner": {unknown} of {len(entries)} scans name no scanner; use another '
                "rule, or name scanners in collection.table"
            )
        names = distinct_names([str(entry.scanner) for entry in entries])
        return tuple(replace(entry, hospital=names[str(entry.scanner)]) for entry in entries)
    patients = _patients(entries)
    placed = _draw(list(patients.values()), config)
    names = [f"hospital-{number + 1}" for number in range(config.count)]
    home = {whose: names[place] for whose, place in zip(patients, placed, strict=True)}
    homes = [home[entry.whose] for entry in entries]
    return tuple(replace(entry, hospital=name) for entry, name in zip(entries, homes, strict=True))


def draw_splits(entries: tuple[ScanEntry, ...], config: CollectionConfig) -> tuple[ScanEntry, ...]:
    """Draw train, validation and test within every hospital and class; a person's scans stay together."""
    patients = _patients(entries)
    groups: dict[tuple[str, int | None], list[tuple[str, str]]] = {}
    for whose, entry in patients.items():
        groups.setdefault((entry.hospital, entry.label), []).append(whose)
    generator = np.random.default_rng([config.seed, 1])
    split: dict[tuple[str, str], Split] = {}
    for _, group in sorted(groups.items(), key=lambda item: (item[0][0], str(item[0][1]))):
        tests = round(config.test_fraction * len(group))
        validations = min(round(config.validation_fraction * len(group)), max(len(group) - tests - 1, 0))
        for place, index in enumerate(generator.permutation(len(group))):
            part: Split = "test" if place < tests else "validation" if place < tests + validations else "train"
            split[group[index]] = part
    return tuple(replace(entry, split=split[entry.whose]) for entry in entries)


def _patients(entries: Iterable[ScanEntry]) -> dict[tuple[str, str], ScanEntry]:
    """The first entry of every patient, in the order of the entries."""
    patients: dict[tuple[str, str], ScanEntry] = {}
    for entry in entries:
        patients.setdefault(entry.whose, entry)
    return patients


def _draw(patients: list[ScanEntry], config: CollectionConfig) -> list[int]:
    """The hospital's place for every patient."""
    trainable = sum(patient.split in (None, "train") for patient in patients)
    if trainable < config.count:
        raise ManifestError(
            f"collection.count = {config.count}: only {trainable} patients to train on; ask for fewer hospitals"
        )
    generator = np.random.default_rng([config.seed, 0])
    classes = sorted({patient.label for patient in patients}, key=str)
    for _ in range(MAX_DRAWS):
        shares = {
            label: generator.dirichlet([config.alpha] * config.count)
            if config.hospitals == "dirichlet"
            else np.full(config.count, 1 / config.count)
            for label in classes
        }
        placed = _apportion(patients, shares, generator)
        held = {place for place, patient in zip(placed, patients, strict=True) if patient.split in (None, "train")}
        if len(held) == config.count:
            return placed
    raise ManifestError(
        f"collection.alpha = {config.alpha:g}: no draw in {MAX_DRAWS} gave each of {config.count} hospitals a patient "
        "to train on; raise alpha or ask for fewer hospitals"
    )


def _apportion(
    patients: list[ScanEntry], shares: dict[int | None, np.ndarray], generator: np.random.Generator
) -> list[int]:
    """Deal the patients of every class and split out in the class's shares, by largest remainders."""
    groups: dict[tuple[str, str], list[int]] = {}
    for index, patient in enumerate(patients):
        groups.setdefault((str(patient.label), str(patient.split)), []).append(index)
    placed = [0] * len(patients)
    for _, group in sorted(groups.items()):
        share = shares[patients[group[0]].label]
        exact = share * len(group)
        counts = np.floor(exact).astype(int)
        # Ties are broken by the draw, or the first hospital would get the odd patient of every group.
        order = np.lexsort((generator.random(len(share)), counts - exact))
        counts[order[: len(group) - counts.sum()]] += 1
        places = np.repeat(np.arange(len(share)), counts)
        for index, place in zip(generator.permutation(group), places, strict=True):
            placed[int(index)] = int(place)
    return placed


def _people(count: int) -> str:
    return "1 person" if count == 1 else f"{count} persons"
