"""A local page and a JSON endpoint for one model."""

from focal_d2.serve.app import Limits, build_app

__all__ = ["Limits", "build_app"]
