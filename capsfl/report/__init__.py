"""The result of a study or a sweep as one self-contained HTML page, as one picture, and among the paper's figures."""

from capsfl.report.page import build_page
from capsfl.report.paper import build_figures_page
from capsfl.report.study import StudyError
from capsfl.report.summary import summary_picture
from capsfl.report.sweep import build_sweep_page

__all__ = ["StudyError", "build_figures_page", "build_page", "build_sweep_page", "summary_picture"]
