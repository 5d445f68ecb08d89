"""Any layout, any settings: drawn at random, and the mathematics has to be the same.

    python tests/layouts.py                 # 30 runs, some minutes
    python tests/layouts.py --runs 5 --seed 40

The settings of a run are drawn (`drawn_runs.py`), and two layouts over 2 or 4 processes. It is
trained on one process; in the first layout; and in the first layout up to some step, from there on
in the second. Each row, each validation and all weights have to be those of the one process, to
1e-8 in double precision.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from drawn_runs import Keep, Settings, fit
from paceline import Parallel
from paceline.testing import Ranks

TOLERANCE = 1e-8
_SIZES = ("dp_replicate", "dp_shard", "tensor", "context", "pipeline")
# Over two processes, over four, and each two ways together.
LAYOUTS: list[dict[str, Any]] = [
    *({name: 2} for name in _SIZES),
    *({name: 4} for name in ("dp_replicate", "dp_shard", "pipeline")),
    *({name: 2, other: 2} for name, other in combinations(_SIZES, 2)),
    {"dp_shard": 2, "cpu_offload": True},
]


def shares(layout: dict[str, Any]) -> int:
    """Processes that have samples of their own."""
    return layout.get("dp_replicate", 1) * layout.get("dp_shard", 1)


def processes(layout: dict[str, Any]) -> int:
    return math.prod(layout.get(name, 1) for name in _SIZES)


def check(ranks: Ranks, seed: int) -> str:
    """Draws a run and compares it with itself in other layouts.

    Args:
        ranks: to start processes with.
        seed: of what is drawn.

    Returns:
        What was drawn.

    Raises:
        AssertionError: something differs; the message has what was drawn.
    """
    draw = random.Random(seed)
    settings, first, second = Settings.drawn(draw), draw.choice(LAYOUTS), draw.choice(LAYOUTS)
    batch = settings.batch * math.lcm(shares(first), shares(second))
    of_first, of_second = batch // shares(first), batch // shares(second)
    one, other = (
        Parallel(**each, activation_checkpointing=settings.recompute) for each in (first, second)
    )
    expected = alone(settings, batch)
    steps = max(expected.rows)
    cut = draw.randint(1, max(1, steps - 1))
    drawn = f"{first}, from step {cut} of {steps} on {second}: {settings}"
    for rank, keep in enumerate(ranks(fit, processes(first), settings, of_first, one)):
        assert keep.rows.keys() == expected.rows.keys(), drawn
        assert keep.validations.keys() == expected.validations.keys(), drawn
        assert_same(keep, expected, f"rank {rank} in {drawn}")
    if cut == steps:
        return drawn
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        ranks(fit, processes(first), settings, of_first, one, run, cut)
        kept = ranks(fit, processes(second), settings, of_second, other, run)
    for rank, keep in enumerate(kept):
        assert list(keep.rows) == list(range(cut + 1, steps + 1)), drawn
        assert_same(keep, expected, f"rank {rank} in the end of {drawn}")
    return drawn


def alone(settings: Settings, batch: int) -> Keep:
    before = torch.get_default_dtype()
    try:
        return fit(settings, batch)
    finally:
        torch.set_default_dtype(before)


def assert_same(found: Keep, expected: Keep, what: str) -> None:
    """What was found is equal to what is expected of the same steps."""
    for name in ("rows", "validations"):
        theirs = getattr(expected, name)
        for step, measured in getattr(found, name).items():
            message = f"{name} at step {step}, {what}"
            assert measured.keys() == theirs[step].keys(), message
            for key, value in measured.items():
                limit = TOLERANCE * (1 + abs(theirs[step][key]))
                assert abs(value - theirs[step][key]) <= limit, f"{key} in {message}"
    last = max(expected.validations)
    assert last in found.validations, f"no validation at step {last}, {what}"
    assert found.weights, what
    for name, weights in found.weights.items():
        options = {"rtol": TOLERANCE, "atol": TOLERANCE}
        torch.testing.assert_close(
            weights, expected.weights[name], **options, msg=lambda m, n=name: f"{n}, {what}: {m}"
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    ranks = Ranks()
    torch.set_num_threads(1)
    for seed in range(arguments.seed, arguments.seed + arguments.runs):
        try:
            print(f"seed {seed}: {check(ranks, seed)}", flush=True)
        except AssertionError as error:
            print(f"BROKEN (--runs 1 --seed {seed}): {error}")
            return 1
    print("each run was the same in all of its layouts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
