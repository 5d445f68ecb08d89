"""An error in a user's own code is shown by their frames, not by those that call them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from builders import code_forgotten
from paceline import Trainer
from paceline.errors import PeerError, PeerFailure
from paceline.log.traceback import FIRST, behind_another, told_in_full
from small import fitted

CODE = """
from torch import nn

class Wrong(nn.Linear):
    def forward(self, x):
        return lookup(super().forward(x))

def lookup(x):
    return {}["missing"]
"""


def test_the_frames_of_the_user_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a model of the user's that fails, when told, the frames are those of its file."""
    (tmp_path / "mine_wrong.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    with code_forgotten():
        from mine_wrong import Wrong  # pyright: ignore[reportMissingImports]

        model = Wrong(3, 1)
    with pytest.raises(Exception, match="missing") as caught:
        fitted(Trainer, model=model)
    error = caught.value
    assert isinstance(error, KeyError)
    told = told_in_full(error).splitlines()
    # The test itself, and what it calls, are a user's files too.
    assert [line.split(", ")[-1] for line in told if line.startswith("  File")][2:] == [
        "in forward", "in lookup"
    ]  # fmt: skip
    assert "KeyError: 'missing'" in told
    assert not any(set(line.strip()) <= {"^", "~"} for line in told)
    assert any("failed on its first batch" in line for line in told)
    assert told[-1].endswith("PACELINE_TRACEBACK=full shows them)")
    monkeypatch.setenv("PACELINE_TRACEBACK", "full")
    assert any("_call_impl" in line for line in told_in_full(error).splitlines())


def test_only_the_first_rank_that_failed_tells_all() -> None:
    """What came of its failure, or is the same error, is known from it; another error is not."""
    first = PeerFailure(3, "failed", "ValueError: a\nb")
    assert behind_another(PeerError(first)) == (3, "rank 3 failed: ValueError: a", True)
    for error, is_all in ((ValueError("a\nc"), True), (ValueError("d"), False)):
        assert behind_another(error) is None
        setattr(error, FIRST, first)
        assert behind_another(error) == (3, "rank 3 failed: ValueError: a", is_all)
    waited = PeerFailure(0, "has waited in a collective", "RuntimeError: Timed out")
    assert behind_another(PeerError(waited)) == (0, str(waited), True)
    assert behind_another(PeerError("step 3, batch 2: rank 0 has waited in a collective")) is None


def test_where_it_was_raised_is_shown_and_an_error_without_a_users_frame_is_whole() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.nn.Linear(2, 2)(torch.ones(3))
    files = [line for line in told_in_full(caught.value).splitlines() if line.startswith("  File")]
    assert "test_traceback.py" in files[0]
    assert "linear.py" in files[-1]
    assert len(files) == 2
    caught.value.__traceback__ = caught.value.__traceback__.tb_next  # pyright: ignore
    assert "left out" not in told_in_full(caught.value)
