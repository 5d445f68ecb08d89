"""What a processed set of samples holds, before anything is trained on it.

Counts and lengths of each source, what was dropped and cut, duplicates, and how much of the
evaluation data the training data contains. Time is linear in the tokens; memory is that of 8 bytes
per sample and some 40 per token of the evaluation data, however large the training data is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table

from paceline.errors import ConfigError, some
from paceline.lm.data.sample import IGNORED, Sample
from paceline.lm.data.token_store import TokenStore
from paceline.runs.text import printable

GRAM = 13  # tokens that have to follow each other in both to count as an overlap
COMMON = 10  # more occurrences in the training data than this: a template, not an overlap
QUANTILES = {"min": 0.0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95, "p99": 0.99, "max": 1.0}
_SHOWN = ("min", "p50", "p95", "max")  # of these, in tables
_BLOCK = 1 << 19  # tokens that are looked at together
_SLOTS = (1 << 16, 1 << 27)  # of the filter, at least and at most; a byte each

Block = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids, whether trained, lengths


@dataclass(frozen=True)
class SourceReport:
    """What one source gave, or all of them together.

    Attributes:
        samples: the number of samples.
        tokens: in all of them.
        trained: of these tokens.
        lengths: of the samples, in tokens, by the names of `QUANTILES`; empty without samples.
        duplicates: samples whose ids an earlier one has too: all of them but the first.
        dropped: samples that were left out, by reason.
        truncated: samples that were cut, by reason.
    """

    samples: int
    tokens: int
    trained: int
    lengths: dict[str, int]
    duplicates: int
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Overlap:
    """How much of an evaluation source is in the training data.

    Attributes:
        samples: of the evaluation source.
        exact: how many of them are a training sample, id by id.
        by_grams: how many share `GRAM` consecutive ids with the training data, or are exact.
        too_short: how many have fewer ids than that, so that only `exact` finds them.
        common: different runs of `GRAM` ids that the training data has more than `COMMON` times, as
            it has a system prompt. They are left out, and so are runs that share an id with one.
    """

    samples: int
    exact: int
    by_grams: int
    too_short: int
    common: int


class PacksLike(Protocol):
    """Rows of equal capacity: `Packs`, or `Fill`."""

    @property
    def capacity(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Fill:
    """How full the rows of batches are.

    Attributes:
        rows: their number.
        capacity: of a row, in tokens.
        tokens: in all rows, without padding.
    """

    rows: int
    capacity: int
    tokens: int

    def __len__(self) -> int:
        return self.rows

    @property
    def fill(self) -> float:
        """The part of the rows that is no padding, from 0 to 1."""
        return self.tokens / (self.rows * self.capacity) if self.rows else 0.0


@dataclass(frozen=True)
class Report:
    """What a processed set holds; printable by rich.

    Attributes:
        train: by source.
        total: of all training sources; its duplicates are also those between sources.
        evaluation: by source.
        overlap: of each evaluation source with all training sources.
        packs: how full the rows are, if they are known.
    """

    train: dict[str, SourceReport]
    total: SourceReport
    evaluation: dict[str, SourceReport] = field(default_factory=dict)
    overlap: dict[str, Overlap] = field(default_factory=dict)
    packs: Fill | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data with the attributes' names as keys."""
        found = asdict(self)
        if self.packs is not None:
            found["packs"]["fill"] = self.packs.fill
        return found

    def tables(self) -> list[tuple[str, list[str], list[list[Any]]]]:
        """The report as tables, for a terminal or a page: title, columns, rows. None is empty."""
        parts = {**self.train, **({"all": self.total} if len(self.train) > 1 else {})}
        parts |= {f"{name} (eval)": part for name, part in self.evaluation.items()}
        columns = ["source", "samples", "tokens", "trained", *_SHOWN, "duplicates"]
        rows = [
            [name, p.samples, p.tokens, p.trained]
            + [p.lengths.get(quantile) for quantile in _SHOWN]
            + [p.duplicates]
            for name, p in parts.items()
        ]
        found = [("samples, and their lengths in tokens", columns, rows)]
        left = [
            [name, what, reason, count]
            for name, p in {**self.train, **self.evaluation}.items()
            for what, counts in (("dropped", p.dropped), ("truncated", p.truncated))
            for reason, count in counts.items()
        ]
        if left:
            found.append(("dropped and truncated", ["source", "", "reason", "samples"], left))
        if self.overlap:
            names = ["source", "samples", "exact", f"by {GRAM} tokens", "too short", "common runs"]
            rows = [
                [name, o.samples, o.exact, o.by_grams, o.too_short, o.common]
                for name, o in self.overlap.items()
            ]
            found.append(("evaluation samples that are in the training data", names, rows))
        if self.packs is not None:
            p = self.packs
            row = [p.rows, p.capacity, p.tokens, f"{100 * p.fill:.2f} %"]
            found.append(("rows of batches", ["rows", "capacity", "tokens", "full"], [row]))
        return found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for title, columns, rows in self.tables():
            table = Table(title=title, title_justify="left", box=SIMPLE)
            for i, column in enumerate(columns):
                numbers = any(isinstance(row[i], int) for row in rows)
                table.add_column(column, justify="right" if numbers else "left")
            for row in rows:
                table.add_row(*(_cell(value) for value in row))
            yield table


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "" if value is None else escape(printable(value))


def report_on(
    train: Mapping[str, Sequence[Sample]],
    evaluation: Mapping[str, Sequence[Sample]] | None = None,
    *,
    packs: PacksLike | None = None,
    dropped: Mapping[str, Mapping[str, int]] | None = None,
    truncated: Mapping[str, Mapping[str, int]] | None = None,
) -> Report:
    """Looks at every sample once, and at the training data again if there is evaluation data.

    Args:
        train: the training samples by source.
        evaluation: the evaluation samples by source.
        packs: the rows of batches.
        dropped, truncated: how many samples were left out or cut, by source and reason.

    Raises:
        ConfigError: a name is both a training and an evaluation source's.
    """
    evaluation = evaluation or {}
    if both := train.keys() & evaluation.keys():
        raise ConfigError(
            f"{some(sorted(both))} is the name of a training and of an evaluation source: give the "
            "latter another."
        )
    gone, cut = dropped or {}, truncated or {}
    seen = {name: _Seen(samples) for name, samples in {**train, **evaluation}.items()}
    sources = {
        name: one.report(dict(gone.get(name, {})), dict(cut.get(name, {})))
        for name, one in seen.items()
    }
    hashes = _joined([seen[name].hashes for name in train], np.uint64)
    lengths = _joined([seen[name].lengths for name in train], np.int64)
    total = SourceReport(
        samples=len(lengths),
        tokens=int(lengths.sum()),
        trained=sum(seen[name].trained for name in train),
        lengths=_quantiles(lengths),
        duplicates=_repeated(hashes),
        dropped=_added(gone.get(name, {}) for name in train),
        truncated=_added(cut.get(name, {}) for name in train),
    )
    exact = {name: np.isin(seen[name].hashes, hashes) for name in evaluation}
    return Report(
        train={name: sources[name] for name in train},
        total=total,
        evaluation={name: sources[name] for name in evaluation},
        overlap=_overlaps(train, evaluation, exact) if evaluation else {},
        packs=None if packs is None else Fill(len(packs), packs.capacity, packs.tokens),
    )


class _Seen:
    """What is kept of a source: for each sample its length, and a hash of its ids."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        lengths, hashes = [], []
        self.trained = 0
        for ids, trained, sizes in _blocks(samples):
            lengths.append(sizes)
            hashes.append(_hashes(ids, sizes))
            self.trained += int(trained.sum())
        self.lengths = _joined(lengths, np.int64)
        self.hashes = _joined(hashes, np.uint64)

    def report(self, dropped: dict[str, int], truncated: dict[str, int]) -> SourceReport:
        """What the source gave.

        Args:
            dropped, truncated: samples by reason.
        """
        return SourceReport(
            samples=len(self.lengths),
            tokens=int(self.lengths.sum()),
            trained=self.trained,
            lengths=_quantiles(self.lengths),
            duplicates=_repeated(self.hashes),
            dropped=dropped,
            truncated=truncated,
        )


def _blocks(samples: Sequence[Sample]) -> Iterator[Block]:
    """Samples in order, many at a time."""
    if isinstance(samples, TokenStore):
        yield from samples.blocks(_BLOCK)
        return
    block: list[Sample] = []
    tokens = 0
    for i in range(len(samples)):
        block.append(samples[i])
        tokens += 1 + len(block[-1].ids)
        if tokens >= _BLOCK or i == len(samples) - 1:
            ids = np.concatenate([sample.ids for sample in block])
            labels = np.concatenate([sample.labels for sample in block])
            yield ids, labels != IGNORED, np.array([len(s.ids) for s in block], np.int64)
            block, tokens = [], 0


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    if not len(lengths):
        return {}
    # A length that there is, not one between two.
    found = np.quantile(lengths, list(QUANTILES.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(QUANTILES, found, strict=True)}


def _repeated(hashes: np.ndarray) -> int:
    return len(hashes) - len(np.unique(hashes))


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in counts:
        for reason, count in each.items():
            found[reason] = found.get(reason, 0) + count
    return found


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts])


# Hashes of 64 bits, in wrapping arithmetic on whole arrays. Two different samples of a hundred
# million have the same with a probability of 3 in 10,000.

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Each 64-bit value scrambled, so that every bit depends on all: the finalizer of SplitMix64.

    (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.)
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hashes(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """A hash of each sample's ids: the sum over its tokens, each mixed with its place.

    Args:
        ids: of consecutive samples, [tokens].
        lengths: of these samples, in tokens, [samples].
    """
    ends = np.cumsum(lengths)
    places = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    terms = _mixed(ids.astype(np.uint64) + _mixed((places + 1).astype(np.uint64) * _GOLDEN))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
    return _mixed(sums[ends] - sums[ends - lengths] + lengths.astype(np.uint64) * _GOLDEN)


def _grams(ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A hash of each run of `GRAM` ids within a sample, and where it begins among all ids.

    Args:
        ids: of consecutive samples, [tokens].
        lengths: of these samples, in tokens, [samples].
    """
    if len(ids) < GRAM:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    base = int(_GOLDEN) | 1

    def power(n: int) -> np.uint64:
        return np.uint64(pow(base, n, 1 << 64))

    # Polynomials in `base` of runs of 1, 2, 4 and 8 ids, each from two shorter ones.
    one = _mixed(ids.astype(np.uint64) + _GOLDEN)
    two = one[:-1] * power(1) + one[1:]
    four = two[:-2] * power(2) + two[2:]
    eight = four[:-4] * power(4) + four[4:]
    count = len(ids) - GRAM + 1
    whole = eight[:count] * power(5) + four[8 : 8 + count] * power(1) + one[12 : 12 + count]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    inside = owner[:count] == owner[GRAM - 1 :]
    return _mixed(whole[inside]), np.flatnonzero(inside)


def _overlaps(
    train: Mapping[str, Sequence[Sample]],
    evaluation: Mapping[str, Sequence[Sample]],
    exact: Mapping[str, np.ndarray],
) -> dict[str, Overlap]:
    """The overlap of each evaluation source with all of the training data, read once.

    Args:
        train: samples by source.
        evaluation: samples by source.
        exact: for each evaluation source, which of its samples the training data has, [samples].
    """
    own: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
    for name, samples in evaluation.items():
        hashes, starts, sizes, tokens = [], [], [], 0
        for ids, _, lengths in _blocks(samples):
            found, start = _grams(ids, lengths)
            hashes.append(found)
            starts.append(start + tokens)
            sizes.append(lengths)
            tokens += len(ids)
        own[name] = (
            _joined(hashes, np.uint64),
            _joined(starts, np.int64),
            np.cumsum(_joined(sizes, np.int64)),
        )
    wanted = np.unique(np.concatenate([hashes for hashes, _, _ in own.values()]))
    counts = _occurrences(wanted, train)
    reported: dict[str, Overlap] = {}
    for name, (hashes, starts, ends) in own.items():
        count = counts[np.searchsorted(wanted, hashes)] if len(wanted) else np.empty(0, np.int64)
        common = count > COMMON
        # Else a run of twelve ids of a template and any first word would count.
        free = ~_touches(starts, starts[common], int(ends[-1]) if len(ends) else 0)
        shared = exact[name].copy()
        shared[np.searchsorted(ends, starts[(count > 0) & free], side="right")] = True
        has_grams = np.zeros(len(shared), bool)
        has_grams[np.searchsorted(ends, starts, side="right")] = True
        reported[name] = Overlap(
            samples=len(shared),
            exact=int(exact[name].sum()),
            by_grams=int(shared.sum()),
            too_short=int((~has_grams).sum()),
            common=len(np.unique(hashes[common])),
        )
    return reported


def _touches(starts: np.ndarray, others: np.ndarray, tokens: int) -> np.ndarray:
    """Whether each run of `GRAM` ids has one in common with any of some other runs.

    Args:
        starts: where the runs begin, [runs].
        others: where the others begin.
        tokens: the number of all ids.
    """
    covered = np.zeros(tokens + 1, np.int64)
    covered[others] += 1  # each begins at its own place
    covered[others + GRAM] -= 1
    within = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.cumsum(covered) > 0)])
    return within[starts + GRAM] > within[starts]


def _occurrences(wanted: np.ndarray, train: Mapping[str, Sequence[Sample]]) -> np.ndarray:
    """How often the training data has each of some runs of ids, [runs] int64.

    Args:
        wanted: their hashes, sorted, each once.
        train: samples by source.
    """
    counts = np.zeros(len(wanted), np.int64)
    if not len(wanted):
        return counts
    least, most = _SLOTS
    slots = min(max(least, 1 << (16 * len(wanted)).bit_length()), most)
    # Nearly all runs of the training data are sorted out by one look at this table.
    filled = np.zeros(slots, bool)
    filled[(wanted & np.uint64(slots - 1)).astype(np.int64)] = True
    for samples in train.values():
        for ids, _, lengths in _blocks(samples):
            found, _ = _grams(ids, lengths)
            found = found[filled[(found & np.uint64(slots - 1)).astype(np.int64)]]
            at = np.searchsorted(wanted, found)
            at = np.minimum(at, len(wanted) - 1)
            hit, times = np.unique(at[wanted[at] == found], return_counts=True)
            counts[hit] += times
    return counts
