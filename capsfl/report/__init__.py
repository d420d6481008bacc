"""The result of a study or a sweep as one self-contained HTML page, and as one picture."""

from capsfl.report.page import build_page
from capsfl.report.study import StudyError
from capsfl.report.summary import summary_picture
from capsfl.report.sweep import build_sweep_page

__all__ = ["StudyError", "build_page", "build_sweep_page", "summary_picture"]
