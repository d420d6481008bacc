"""The regular files of a folder tree, and by name what stands there besides: link loops, pipes, locked folders."""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from capsfl.ct.errors import ScanError, Unreadable

RESOURCE_FORK = "._"
"""Prefix of the files in which macOS keeps what other systems have no place for; they carry the image's suffix."""


@dataclass
class FolderTree:
    """What a walk found."""

    files: list[Path] = field(default_factory=list)
    """Regular files, sorted by name within their folder, a folder's own before those of the folders in it."""
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    """Entries that are no regular file or were met already, with the reason."""
    unreadable: list[tuple[Path, ScanError]] = field(default_factory=list)
    """Folders and links that could not be followed."""


def walk(place: Path) -> FolderTree:
    """List a folder's files in depth, following links; a folder that is reached twice counts once.

    Nothing is opened, so a named pipe cannot hang the walk.
    """
    tree = FolderTree()
    seen: set[tuple[int, int]] = set()
    waiting = [place]
    while waiting:
        folder = waiting.pop()
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                tree.skipped.append((folder, "link to a folder that was read already"))
                continue
            seen.add((status.st_dev, status.st_ino))
            names = sorted(os.listdir(folder))
        except OSError as error:
            tree.unreadable.append((folder, _refusal(folder, error)))
            continue
        waiting.extend(reversed(_sort_entries(folder, names, tree)))
    return tree


def _sort_entries(folder: Path, names: list[str], tree: FolderTree) -> list[Path]:
    """Puts a folder's entries where they belong and returns the folders among them."""
    folders: list[Path] = []
    for name in names:
        path = folder / name
        try:
            mode = path.stat().st_mode
        except OSError as error:  # a link to nowhere, or to itself: what it named is absent
            tree.unreadable.append((path, _refusal(path, error)))
            continue
        if stat.S_ISDIR(mode):
            folders.append(path)
        elif not stat.S_ISREG(mode):
            tree.skipped.append((path, "pipe, socket or device, not a file"))
        elif name.startswith(RESOURCE_FORK):
            tree.skipped.append((path, "macOS resource fork"))
        else:
            tree.files.append(path)
    return folders


def _refusal(path: Path, error: OSError) -> Unreadable:
    return Unreadable(path, f"cannot be read ({error.strerror or error})", "check its permissions and where it points")
