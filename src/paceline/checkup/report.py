"""The report of a checkup: one line per check, and a few numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["PASS", "WARN", "FAIL", "SKIP"]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what was checked.
        status: "PASS"; "WARN", it works but is probably a mistake; "FAIL", it does not work;
            "SKIP", it was not checked, and `detail` says why.
        detail: what was found, and for a "WARN" or "FAIL" what to do.
    """

    name: str
    status: Status
    detail: str


@dataclass
class Report:
    """The outcome of a checkup.

    Attributes:
        checks: the checks in order.
    """

    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no check failed; warnings do not count."""
        return all(check.status != "FAIL" for check in self.checks)

    def lines(self) -> list[str]:
        """Lines to show before the checks."""
        return []

    def as_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {"checks": [asdict(check) for check in self.checks], "passed": self.passed}


@dataclass
class PreflightReport(Report):
    """The outcome of a preflight.

    Attributes:
        peak_memory_mb: the peak memory of this process, in MB (10^6 bytes), including Python and
            data; None if unknown.
        gpu_memory_mb: the peak memory on the accelerator in MB, None on a CPU.
        seconds_per_step: of one optimizer step after the first ones; an estimate.
        seconds_for_the_run: of all steps and validations; an estimate.
        disk_bytes: the most disk space that the run's checkpoints take at any time.
        stack: the traceback of an error in the user's own code that ended the rehearsal, or empty.
    """

    peak_memory_mb: float | None = None
    gpu_memory_mb: float | None = None
    seconds_per_step: float | None = None
    seconds_for_the_run: float | None = None
    disk_bytes: int | None = None
    stack: str = ""

    def as_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return super().as_json() | {
            "peak_memory_mb": self.peak_memory_mb,
            "gpu_memory_mb": self.gpu_memory_mb,
            "seconds_per_step": self.seconds_per_step,
            "seconds_for_the_run": self.seconds_for_the_run,
            "disk_bytes": self.disk_bytes,
        }


def readable_bytes(count: float) -> str:
    """A number of bytes as text, in powers of 1000, as disks are sold and `as_json` counts."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def readable_seconds(seconds: float) -> str:
    """A duration as text: `2.13 ms`, `1.5 s`, `12 min 30 s`, `3 h 05 min`, `2 d 07 h`."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"
