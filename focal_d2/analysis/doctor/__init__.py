"""The doctor examines datasets, and how they fit a model, before training."""

from focal_d2.analysis.doctor.examination import Report, examine
from focal_d2.analysis.doctor.page import as_page
from focal_d2.analysis.doctor.text import as_fix_list, as_text

__all__ = ["Report", "as_fix_list", "as_page", "as_text", "examine"]
