"""What Dream Trainer got wrong and its acceptance rows leave out: absent here.

Numbers are those of its list of defects; others stand in `test_dream_acceptance.py`.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from paceline import Trainer
from paceline.errors import ConfigError

ROOT = Path(__file__).parents[3]


def test_B4_no_source_file_is_ignored() -> None:
    """A clone has every file that this folder has."""
    listed = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "src"]
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone, such as an unpacked archive: git cannot list its files")
    ignored = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [name for name in ignored.stdout.split() if name.endswith(".py")] == []


def test_keywords_of_its_configurations_get_ours_named() -> None:
    theirs = {
        "n_epochs": "epochs",
        "train_steps_per_epoch": "epoch_length",
        "val_every_n_steps": "validate_every",
        "num_sanity_val_steps": "preflight",
        "gradient_clip_val": "max_grad_norm",
        "device_parameters": "**device_parameters.settings()",
    }
    with pytest.raises(ConfigError) as caught:
        Trainer(**dict.fromkeys(theirs, 1))
    for name, ours in theirs.items():
        [line] = [x for x in str(caught.value).splitlines() if x.startswith(f"  {name}: ")]
        assert f"here it is {ours}" in line or f"nothing: `paceline {ours}`" in line
