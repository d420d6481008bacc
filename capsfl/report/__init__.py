"""The result of a study as one self-contained HTML page, and as one picture."""

from capsfl.report.page import build_page
from capsfl.report.study import StudyError
from capsfl.report.summary import summary_picture

__all__ = ["StudyError", "build_page", "summary_picture"]
