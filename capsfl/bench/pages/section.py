"""What a section of the page is made of: a title, how to read it, tables."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Title, names of columns and rows of words."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Section(NamedTuple):
    """What the page says about one benchmark."""

    title: str
    reading: str
    """What was measured, and what the words in the tables mean."""
    tables: Callable[[dict[str, Any]], Iterator[Table]]
    """The tables of a result."""
    numbers: frozenset[str]
    """Columns of numbers, which stand at the right."""


def format_markdown(table: Table, numbers: frozenset[str]) -> str:
    """A table as Markdown, without its title; `numbers` are the columns that stand at the right."""
    rule = ["---:" if name in numbers else "---" for name in table.columns]
    return "\n".join(_line(words) for words in (table.columns, rule, *table.rows))


def skipped(result: dict[str, Any]) -> Iterator[Table]:
    """The table of what could not be measured and why; none where everything could."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in result["skipped"]:
        case = " ".join(str(row[key]) for key in ("operator", "case", "size") if key in row)
        where = places.setdefault((row["implementation"], row["reason"]), [])
        if case not in where:
            where.append(case)
    if places:
        rows = [(name, ", ".join(where), reason) for (name, reason), where in places.items()]
        yield Table("Skipped", ("implementation", "where", "reason"), rows)


def _line(words: Sequence[str]) -> str:
    return f"| {' | '.join(word.replace('|', '/') for word in words)} |"
