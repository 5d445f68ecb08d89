"""Checks of a recipe and of the machine before training, and of a run that failed.

`preflight(recipe)` takes a few real steps of everything, `fits(recipe, "64xH100-80GB")` simulates
them without memory, to see whether they fit on devices that need not be there, `preview(recipe)`
shows what would be trained, `doctor()` checks the machine and tests the promises on it.
`replay_failure(trainer, run_dir)` takes the step of a run that was not finite once more, and names
the module that it comes from.
"""

from paceline.checkup.doctor import doctor
from paceline.checkup.memory_fit import FitReport, fits
from paceline.checkup.preflight import preflight
from paceline.checkup.preview import Preview, preview
from paceline.checkup.replay import Replay, replay_failure
from paceline.checkup.report import Check, PreflightReport, Report

__all__ = [
    "Check",
    "FitReport",
    "PreflightReport",
    "Preview",
    "Replay",
    "Report",
    "doctor",
    "fits",
    "preflight",
    "preview",
    "replay_failure",
]
