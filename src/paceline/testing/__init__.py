"""What Paceline's own promises are tested with, for tests of your own trainer.

    from paceline.testing import assert_resumes_exactly

    def build(run_dir):
        return MyTrainer(..., max_steps=12, run_dir=run_dir)

    def test_my_trainer_resumes_exactly(tmp_path):
        assert_resumes_exactly(build, tmp_path, stop_at=5, ranks=2)

Works with any test runner: failures are plain `AssertionError`s that name what differs.
"""

from paceline.testing.comparison import bits, rows
from paceline.testing.promises import (
    assert_continues,
    assert_resumes_exactly,
    assert_undisturbed,
)
from paceline.testing.ranks import Outcome, Ranks, RanksFailed, Started, free_port, run_ranks
from paceline.testing.tracing import Ending, StopAt, Trace, traced_run

__all__ = [
    "Ending",
    "Outcome",
    "Ranks",
    "RanksFailed",
    "Started",
    "StopAt",
    "Trace",
    "assert_continues",
    "assert_resumes_exactly",
    "assert_undisturbed",
    "bits",
    "free_port",
    "rows",
    "run_ranks",
    "traced_run",
]
