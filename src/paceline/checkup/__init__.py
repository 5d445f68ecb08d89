"""Looking before training: a recipe rehearsed, shown, and the machine it would run on.

`preflight(recipe)` takes a few real steps of everything, `fits(recipe, "64xH100-80GB")` takes them
on paper, to see whether they fit on devices that need not be there, `preview(recipe)` shows what
would be trained, `doctor()` looks at the machine and tests the promises on it.
"""

from paceline.checkup.doctor import doctor
from paceline.checkup.fits import FitReport, fits
from paceline.checkup.preflight import preflight
from paceline.checkup.preview import Preview, preview
from paceline.checkup.report import Check, PreflightReport, Report

__all__ = [
    "Check",
    "FitReport",
    "PreflightReport",
    "Preview",
    "Report",
    "doctor",
    "fits",
    "preflight",
    "preview",
]
