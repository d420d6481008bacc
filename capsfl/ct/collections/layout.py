"""Folders of a collection's documented layout; a tree that is another says in one line what was expected and found."""

from collections.abc import Iterable
from pathlib import Path

from capsfl.ct.errors import WrongLayout
from capsfl.ct.walk import walk

MAX_LISTED = 6


def find(root: Path, *candidates: str, what: str) -> Path:
    """Return the first of some places below the root that is there.

    Raises:
        WrongLayout: none is; names them and what the root holds instead.
    """
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise wrong(root, what, " or ".join(candidates))


def wrong(root: Path, what: str, expected: str, found: str | None = None) -> WrongLayout:
    """The one line about a tree that is not the collection's.

    Args:
        root: the folder that was given.
        what: the collection's name.
        expected: what was looked for.
        found: what is there instead; the root's own content when None.
    """
    found = listing(root) if found is None else found
    return WrongLayout(root, f"not {what}: expected {expected}, found {found}", "give the collection's top folder")


def listing(folder: Path) -> str:
    """Names in a folder, few enough for a line."""
    if not folder.exists():
        return "no such folder"
    if not folder.is_dir():
        return "a file"
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    return some(names) if names else "an empty folder"


def some(names: Iterable[str]) -> str:
    """A few of many names."""
    names = list(names)
    shown = ", ".join(names[:MAX_LISTED])
    return f"{shown} and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else shown


def files_below(root: Path) -> list[Path]:
    """The regular files of a tree, links followed, hidden ones left out.

    Raises:
        Unreadable: a folder is locked or a link leads nowhere: what lies there would be missed.
    """
    tree = walk(root)
    if tree.unreadable:
        raise tree.unreadable[0][1]
    return [path for path in tree.files if not path.name.startswith(".")]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, without their ends.

    Raises:
        WrongLayout: it cannot be read as text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise WrongLayout(path, f"cannot be read ({error.strerror or error})", "check the path") from error
    return [line for line in text.splitlines() if line.strip()]
