"""The order of samples as a function of (seed, pass, position).

No permutation is ever held in memory: position 10^9 costs the same as position 0.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Sampler

from paceline.data.fetch import parts_of, tell_pass, told_of_passes
from paceline.data.kept import Kept, alike
from paceline.errors import DataError, counted
from paceline.world.seeding import mix, random_state_kept, seed_everything, stream

ORDER_VERSION = 1  # recorded in checkpoints: another algorithm would give another order
_ROUNDS = 12  # fewer make the orders of very small sets visibly uneven
_BLOCK = 4096


class Order(Protocol):
    """The units (samples, or a batch sampler's batches) of each pass, in order."""

    def length(self, pass_: int) -> int:
        """Units in pass `pass_`."""
        ...

    def slice(self, pass_: int, start: int, stop: int) -> Sequence[Any]:
        """The units at some positions of a pass.

        Args:
            pass_: the pass over the data, from 0.
            start: the first position.
            stop: the position after the last.
        """
        ...


class Permutation:
    """A keyed permutation of range(n) that can be computed at any positions.

    A Feistel network over the pairs (x // width, x % width): even rounds add a keyed hash of one
    half to the other modulo its size, odd rounds the reverse; results outside range(n) are permuted
    again (cycle walking; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
    """

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        self._height = max(1, math.isqrt(n))
        self._width = -(-n // self._height)
        self._keys = [np.uint64(mix(key, i)) for i in range(_ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """The images of `positions` (int64 array of any length)."""
        out = self._once(positions.astype(np.uint64))
        while (outside := out >= self.n).any():
            out[outside] = self._once(out[outside])
        return out.astype(np.int64)

    def _once(self, x: np.ndarray) -> np.ndarray:
        height, width = np.uint64(self._height), np.uint64(self._width)
        high, low = x // width, x % width
        for i, key in enumerate(self._keys):
            if i % 2 == 0:
                high = (high + _hash(low, key)) % height
            else:
                low = (low + _hash(high, key)) % width
        return high * width + low


def _hash(x: np.ndarray, key: np.uint64) -> np.ndarray:
    """Hashes 64-bit integers with a key; returns the top 32 bits, so that a sum cannot overflow."""
    x = (x ^ key) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    return x >> np.uint64(32)


class Sequential(Order):
    """0, 1, 2, ... in every pass."""

    def __init__(self, n: int) -> None:
        self.n = n

    def length(self, pass_: int) -> int:
        return self.n

    def slice(self, pass_: int, start: int, stop: int) -> Sequence[int]:
        return range(start, stop)


class Shuffled(Order):
    """A new permutation of all `n` samples in every pass."""

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        self._seed = seed
        self._held: tuple[int, int] = (-1, -1)
        self._block = np.empty(0, np.int64)

    def length(self, pass_: int) -> int:
        return self.n

    def slice(self, pass_: int, start: int, stop: int) -> Sequence[Any]:
        block, offset = divmod(start, _BLOCK)
        if self._held != (pass_, block):
            self._load(pass_, block)
        taken: Any = self._block[offset : offset + stop - start]
        if len(taken) < stop - start:
            rest = self.slice(pass_, start + len(taken), stop)
            taken = np.concatenate([taken, rest])  # pyright: ignore[reportCallIssue, reportArgumentType]
        return taken

    def _load(self, pass_: int, block: int) -> None:
        permutation = Permutation(self.n, stream(self._seed, "order", pass_))
        positions = np.arange(block * _BLOCK, min((block + 1) * _BLOCK, self.n))
        self._block = permutation(positions)
        self._held = (pass_, block)


class Sampled(Order):
    """The order of the user's own sampler or batch sampler, drawn once per pass.

    The generators are seeded by (seed, pass) before each draw, so that any pass can be drawn again;
    their state is restored afterwards. The first pass is drawn twice, to check that this holds.

    A sampler with a `state_dict` may follow training. Then a pass is drawn as it begins, and again
    with the state of that time.

    Args:
        sampler: the user's.
        seed: the run's seed.
        samples: in the dataset. Far more units than that in a pass mean that it never ends.

    Attributes:
        follows: whether the sampler has a `state_dict`.
    """

    def __init__(self, sampler: Any, seed: int, samples: int) -> None:
        self._sampler = sampler
        self._seed = seed
        self._samples = samples
        self._pass = -1
        self._units: list[Any] = []
        self._lengths: dict[int, int] = {}
        self._kept = Kept(_Holder(sampler), ("sampler",))
        self.follows = any(name.endswith("state_dict") for name in self._kept.names)
        self._drawn_with: dict[int, tuple[str, dict[str, Any]]] = {}  # of the latest passes

    def length(self, pass_: int) -> int:
        return self._lengths[pass_] if pass_ in self._lengths else len(self._draw(pass_))

    @property
    def keeps_length(self) -> bool:
        """Whether each pass is as long as the first: as the sampler says, and the second is."""
        return self.length(0) == self.length(1) == _length(self._sampler)

    @contextmanager
    def looking_ahead(self) -> Iterator[None]:
        """A context for the lengths of later passes, which leaves the pass at hand as it is."""
        held = self._pass, self._units
        try:
            yield
        finally:
            self._pass, self._units = held

    def slice(self, pass_: int, start: int, stop: int) -> Sequence[Any]:
        return self._draw(pass_)[start:stop]

    def _draw(self, pass_: int) -> list[Any]:
        if pass_ == self._pass:
            return self._units
        if pass_ in self._drawn_with:
            return self._take(pass_, self._drawn_again(pass_))
        state = self._kept.state() if self.follows else {}
        units = self._drawn(pass_)
        if self.follows:
            self._drawn_with[pass_] = _digest(units), state
            for old in sorted(self._drawn_with)[:-_REMEMBERED]:
                del self._drawn_with[old]
        if not self._lengths and _text(units) != _text(self._drawn(pass_)):
            raise DataError(
                f"{type(self._sampler).__name__} gives another order each time, under the "
                "same random seeds: a resumed run could not find its position. Let it draw from "
                "torch's, numpy's or random's global generator or from an attribute `generator`, "
                "and take the pass from set_epoch(pass) if it needs it."
            )
        return self._take(pass_, units)

    def _take(self, pass_: int, units: list[Any]) -> list[Any]:
        self._units, self._pass, self._lengths[pass_] = units, pass_, len(units)
        return units

    def _drawn_again(self, pass_: int) -> list[Any]:
        """A pass that was drawn before, in this process or in the one that was stopped."""
        wanted, state = self._drawn_with[pass_]
        units = self._drawn(pass_)
        if _digest(units) != wanted:
            now = self._kept.state()
            self._kept.load(state)
            units = self._drawn(pass_)
            self._kept.load(now)
        if _digest(units) != wanted:
            raise DataError(
                f"{type(self._sampler).__name__} gives another order for pass {pass_} than it "
                "gave: its state_dict() has to hold all that its order follows from."
            )
        return units

    def begin(self, pass_: int | None) -> None:
        """A pass begins, or none: one that follows training is drawn now."""
        if self.follows and pass_ is not None:
            self._drawn_with.pop(pass_, None)
            self._pass = -1

    def state_dict(self) -> dict[str, Any]:
        """What the sampler keeps, and kept when the latest passes were drawn."""
        if not self.follows:
            return {}
        return {"drawn": dict(self._drawn_with), "now": self._kept.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        if not self.follows or not state:
            return
        self._drawn_with, self._pass = dict(state["drawn"]), -1
        for pass_ in sorted(self._drawn_with):
            self._draw(pass_)
        if not alike(self._kept.state(), state["now"]):  # to load a position would move it
            self._kept.load(state["now"])

    def fingerprint(self) -> bytes:
        """A hash of the first pass, equal for samplers that give the same order."""
        return hashlib.sha256(_text(self._draw(0)).encode()).digest()

    def _drawn(self, pass_: int) -> list[Any]:
        seed = stream(self._seed, "order", pass_)
        tell_pass(told_of_passes(self._sampler, Sampler), pass_)
        with random_state_kept():
            seed_everything(seed)
            for sampler in parts_of(self._sampler, Sampler):
                if isinstance(getattr(sampler, "generator", None), torch.Generator):
                    sampler.generator.manual_seed(seed)  # pyright: ignore
            most = 4 * max(self._samples, _length(self._sampler)) + 10_000
            units = list(islice(self._sampler, most + 1))
        if len(units) > most:
            raise DataError(
                f"{type(self._sampler).__name__} yields more than {most} units in a pass over "
                f"{counted(self._samples, 'sample')}, and may never end. End it with the pass: "
                "passes follow each other till max_steps. One that is as long has a __len__."
            )
        if not units:
            raise DataError(f"{type(self._sampler).__name__} yields nothing: the loader is empty.")
        return units


class _Holder:
    """Something with a sampler.

    Args:
        sampler: of the user's own.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler


_REMEMBERED = 2  # passes: workers may be reading the next one already


def _digest(units: list[Any]) -> str:
    return hashlib.sha256(_text(units).encode()).hexdigest()


def _length(sampler: Any) -> int:
    try:
        return len(sampler)
    except (TypeError, NotImplementedError):
        return 0


def _text(units: list[Any]) -> str:
    return repr([unit.tolist() if hasattr(unit, "tolist") else unit for unit in units])
