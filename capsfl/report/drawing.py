"""A picture of a page with what a reader needs beside it."""

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Drawing:
    """One picture.

    Attributes:
        title: what it shows.
        picture: inline SVG or an image, ready for the page.
        caption: how to read it, in plain text.
        legend: names of its series, each with its colour in the page.
    """

    title: str
    picture: Markup
    caption: str
    legend: tuple[tuple[str, str], ...] = ()
