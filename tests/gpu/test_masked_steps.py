"""A bad step on the device: masked there, read with the next row, never in the weights."""

from __future__ import annotations

import pytest
from device_runs import fitted, trainer

from paceline import World
from paceline.errors import NonFiniteError

pytestmark = pytest.mark.gpu


def test_a_nan_masks_the_fused_step_and_the_error_names_step_and_samples() -> None:
    made = trainer(bad=(5,), kept=(5,))
    with pytest.raises(NonFiniteError, match="step 6 is not finite") as raised:
        made.train(seed=3)
    assert f"rank 0 had the samples [{made.ids[5].tolist()}]" in str(raised.value)
    assert made.global_step == 8, "it is read with the row behind the bad step"
    assert made.digests() == made.after[5]
    assert made.digests() == fitted(kept=(5,)).after[5]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_skipping_goes_on_as_if_the_window_had_been_dropped_at_once(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked = fitted(bad=(5, 6), on_nonfinite="skip", precision=precision)
    monkeypatch.setattr(World, "reads_are_free", property(lambda self: True))
    dropped = fitted(bad=(5, 6), on_nonfinite="skip", precision=precision)
    assert masked.ended == dropped.ended
    assert masked.ended != fitted(precision=precision).ended
