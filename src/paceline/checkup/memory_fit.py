"""Whether a recipe fits on devices that need not be there, and which settings make it fit."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from dataclasses import fields as dataclass_fields
from typing import Any, Literal

from paceline.checkup.ledger import Peak
from paceline.checkup.onpaper import STAGES, StepOnPaper
from paceline.checkup.preflight import NEARLY_FULL, alone, cause_of, told
from paceline.checkup.report import Check, Report, readable_bytes
from paceline.checkup.suspicious_settings import wrong_settings
from paceline.errors import ConfigError, PacelineError
from paceline.log.traceback import told_in_full
from paceline.recipe.recipe import Recipe
from paceline.world.layout import Parallel

NOT_COUNTED = (
    "the device's context, the workspaces of its libraries (cuBLAS, cuDNN, NCCL) and the "
    "allocator's fragmentation: they depend on the device, so no number is assumed for them",
    "validation, and batches that are larger than the first one",
    "memory saved by compile=True, and kernels that keep more or less on a GPU than on a CPU",
)
_ON_PAPER = {
    "dp_replicate", "dp_shard", "tensor", "context", "activation_checkpointing", "cpu_offload",
    "plan", "timeout",
}  # fmt: skip
_SCALE = {"MB": 10**6, "GB": 10**9, "GiB": 2**30}
_DEVICES = re.compile(r"(\d+)x(\S+)-(\d+(?:\.\d+)?)(MB|GB|GiB)", re.ASCII)
Checkpointing = Literal["full", "selective"] | float | None
_LIGHTER: dict[Checkpointing, list[Checkpointing]] = {
    None: ["selective", "full"],
    "selective": ["full"],
    "full": [],
}


@dataclass(frozen=True)
class Devices:
    """Devices of one kind.

    Attributes:
        text: as the user wrote them.
        count: their number; each runs one rank.
        memory_bytes: the memory of each.
        on_cpu: whether they are CPUs, by their name.
    """

    text: str
    count: int
    memory_bytes: int
    on_cpu: bool


def parse_devices(text: str) -> Devices:
    """Parses `64xH100-80GB`: a number, any name, the memory of each (GB = 10^9 bytes, or GiB).

    Raises:
        ConfigError: the text has another form.
    """
    found = _DEVICES.fullmatch(text.strip())
    count, name, size, unit = found.groups() if found else ("0", "", "0", "GB")
    if int(count) < 1 or float(size) <= 0:
        raise ConfigError(
            f"--on {text!r}: expected NUMBERxNAME-MEMORY, e.g. 64xH100-80GB, 2xA100-40GB or "
            "1xcpu-16GB; the name is yours to choose, a GB has 10^9 bytes, a GiB 2^30."
        )
    memory = round(float(size) * _SCALE[unit])
    return Devices(text.strip(), int(count), memory, name.lower().startswith("cpu"))


@dataclass(frozen=True)
class Part:
    """The memory of one kind of tensors on a rank, in bytes.

    Attributes:
        name: the kind.
        at_peak: at the moment at which all kinds together take the most.
        at_most: the most at any moment.
    """

    name: str
    at_peak: int
    at_most: int


@dataclass
class FitReport(Report):
    """Whether a recipe fits, according to a simulated step.

    Attributes:
        devices: the devices to run on.
        layout: the parallel layout over the devices, in words.
        parts: the memory on each rank by kind, largest first.
        peak_bytes: the peak of all kinds together; None if the step failed.
        moment: the stage of the step at which the peak occurs.
        host_bytes: the peak in the host's memory per rank, with `parallel.cpu_offload`.
        ways: settings that make it fit, and their simulated peaks in bytes.
        stack: the traceback of an error in the user's own code that ended it, or empty.
    """

    devices: Devices | None = None
    layout: str = ""
    parts: list[Part] = field(default_factory=list)
    peak_bytes: int | None = None
    moment: str = ""
    host_bytes: int = 0
    ways: dict[str, int] = field(default_factory=dict)
    stack: str = ""

    def lines(self) -> list[str]:
        """The table of parts, and what it does not count."""
        if self.peak_bytes is None:
            return []
        head = ("on each rank", "at the peak", "at most")
        rows = [(p.name, *map(readable_bytes, (p.at_peak, p.at_most))) for p in self.parts]
        rows.append((f"total, in the {self.moment}", readable_bytes(self.peak_bytes), ""))
        if self.host_bytes:
            rows.append(("in the host's memory", "", readable_bytes(self.host_bytes)))
        table = [f"{a:30}{b:>12}{c:>12}".rstrip() for a, b, c in (head, *rows)]
        return [self.layout, "", *table, "", "not counted:", *(f"- {x}" for x in NOT_COUNTED), ""]

    def as_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return super().as_json() | {
            "devices": None if self.devices is None else asdict(self.devices),
            "layout": self.layout,
            "parts": [asdict(part) for part in self.parts],
            "peak_bytes": self.peak_bytes,
            "moment": self.moment,
            "host_bytes": self.host_bytes,
            "ways": self.ways,
            "not_counted": list(NOT_COUNTED),
        }


def fits(recipe: Recipe, on: str) -> FitReport:
    """Simulates a recipe's first steps without memory, to see whether they fit.

    Nothing is trained: the recipe's model, loss and optimizer, placed as `parallel` says, work with
    tensors that have a shape and no memory. One batch of the data is read. Neither the devices nor
    the model's memory are needed.

    Args:
        recipe: the checked recipe; if it has several seeds, the first is used.
        on: the devices, e.g. `64xH100-80GB`.

    Raises:
        ConfigError: `on` is malformed, or the recipe's layout does not match the number of devices
            or cannot be simulated yet.
    """
    alone("preflight")
    devices = parse_devices(on)
    parallel = recipe.settings.get("parallel") or Parallel()
    parallel.sizes(devices.count)
    _check(parallel, recipe.setting("precision"))
    report = FitReport([Check("recipe", "PASS", str(recipe.composed.path))], devices)
    report.checks += wrong_settings(recipe)
    one = recipe.of_seed(recipe.seeds[0]) if recipe.seeds else recipe
    step = StepOnPaper(one, parallel, devices.count, on_cpu=devices.on_cpu)
    report.layout = _layout(parallel, devices.count)
    try:
        peak = step.run()
    except Exception as error:  # noqa: BLE001 - any error of the user's code becomes a line
        _fail(report, step, error)
        return report
    report.layout += f"; windows of {step.micro_batches} x {step.samples} samples a rank"
    report.peak_bytes, report.moment, report.host_bytes = peak.total, peak.moment, peak.on_host
    report.parts = _parts(peak)
    search = _Search(one, parallel, devices)
    _judge(report, search)
    return report


def _check(parallel: Parallel, precision: str | None) -> None:
    asked = {f.name for f in dataclass_fields(parallel) if getattr(parallel, f.name) != f.default}
    if unbuilt := sorted(asked - _ON_PAPER):
        raise ConfigError(
            f"--on: parallel.{', parallel.'.join(unbuilt)} cannot be simulated yet; leave it out "
            "to see what the recipe takes without it."
        )
    if precision == "fp8":
        raise ConfigError(
            "--on: precision=fp8 cannot be simulated yet; set trainer.precision=bf16 to see what "
            "the recipe takes with it."
        )


def _layout(parallel: Parallel, ranks: int) -> str:
    copies, shards = parallel.sizes(ranks)
    text = f"{ranks} ranks: {copies} copies of the state, each over {shards}"
    if parallel.tensor > 1:
        text += f", split over {parallel.tensor}"
    if parallel.context > 1:
        text += f", sequences in {parallel.context} parts"
    return text


def _parts(peak: Peak) -> list[Part]:
    parts = [Part(name, peak.parts.get(name, 0), most) for name, most in peak.most.items() if most]
    return sorted(parts, key=lambda part: (-part.at_peak, -part.at_most, part.name))


def _judge(report: FitReport, search: _Search) -> None:
    devices, peak, largest = report.devices, report.peak_bytes, report.parts[0]
    assert devices is not None
    assert peak is not None
    text = f"{readable_bytes(peak)} of {readable_bytes(devices.memory_bytes)} on each rank, in the "
    text += f"{report.moment}; most of it {largest.name} ({readable_bytes(largest.at_peak)})"
    if peak <= devices.memory_bytes:
        nearly = peak > NEARLY_FULL * devices.memory_bytes
        text += ": nearly full, and not everything is counted" if nearly else ""
        report.checks.append(Check("memory", "WARN" if nearly else "PASS", text))
        return
    report.ways = search.ways()
    found = "; ".join(f"{way} takes {readable_bytes(size)}" for way, size in report.ways.items())
    advice = f"what fits: {found}" if found else search.nothing_fits
    report.checks.append(Check("memory", "FAIL", f"{text}. It does not fit; {advice}"))


def _fail(report: FitReport, step: StepOnPaper, error: Exception) -> None:
    cause, stage = cause_of(error), step.ledger.moment
    if not isinstance(cause, PacelineError):
        report.stack = told_in_full(cause)
    report.checks.append(Check(stage, "FAIL", told(error)))
    for later in (*STAGES[STAGES.index(stage) + 1 :], "memory"):
        report.checks.append(Check(later, "SKIP", f"after the failure of: {stage}"))


class _Search:
    """Searches for settings of `parallel` that make a recipe fit, by simulating them.

    Args:
        recipe: the recipe that does not fit.
        parallel: its layout.
        devices: the devices that it has to fit on.

    Attributes:
        nothing_fits: what was tried, if nothing fits.
    """

    def __init__(self, recipe: Recipe, parallel: Parallel, devices: Devices) -> None:
        self.nothing_fits = ""
        self._recipe = recipe
        self._parallel = parallel
        self._devices = devices

    def ways(self) -> dict[str, int]:
        """The least sharding and the least activation checkpointing that fit, or both together."""
        count = self._devices.count
        copies, shards = self._parallel.sizes(count)
        more = [n for n in range(shards + 1, copies * shards + 1) if copies * shards % n == 0]
        lighter = _LIGHTER.get(self._parallel.activation_checkpointing, ["full"])
        found = self._least([{"dp_shard": n} for n in more])
        found |= self._least([{"activation_checkpointing": each} for each in lighter])
        if not found and more and lighter:
            both = [{"dp_shard": n, "activation_checkpointing": "full"} for n in more]
            found = self._least(both)
        self.nothing_fits = "no dp_shard or activation_checkpointing makes it fit on these devices"
        return found

    def _least(self, ways: Sequence[dict[str, Any]]) -> dict[str, int]:
        """The first that fits of settings ordered by decreasing memory."""
        taken: dict[int, int | None] = {}

        def fit(i: int) -> bool:
            taken[i] = size = self._try(ways[i])
            return size is not None and size <= self._devices.memory_bytes

        first = bisect_left(range(len(ways)), True, key=fit)
        size = taken.get(first)
        if first == len(ways) or size is None:
            return {}
        return {" ".join(f"parallel.{k}={v}" for k, v in ways[first].items()): size}

    def _try(self, changes: dict[str, Any]) -> int | None:
        """The peak in bytes with changed settings, None if these are not possible."""
        if "dp_shard" in changes:
            changes = {**changes, "dp_replicate": "auto"}
        parallel = replace(self._parallel, **changes)
        count, on_cpu = self._devices.count, self._devices.on_cpu
        try:
            return StepOnPaper(self._recipe, parallel, count, on_cpu=on_cpu).run().total
        except ConfigError:  # e.g. a model without repeated blocks
            return None
