"""Passes one replica group's state to another: as a checkpoint, in a folder that both can read.

torchft's own transports send pickles. This one writes files that run no code, with the checksums of
any checkpoint.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from paceline.checkpoint.native_engine import NativeEngine, load_tree
from paceline.checkpoint.policy import CheckpointPolicy
from paceline.checkpoint.publication import folder_name, verify
from paceline.errors import CheckpointError
from paceline.world.world import World

_POLL = 0.05


class HandOver:
    """A `CheckpointTransport` for torchft over a folder, with the methods that torchft calls.

    Args:
        folder: the same for all groups of a run.
        name: this group's name, a number.
        world: this group's ranks.
    """

    def __init__(self, folder: Path, name: str, world: World) -> None:
        self._folder = folder
        self._name = name
        self._world = world

    @property
    def _own(self) -> Path:
        return self._folder / self._name / "state"

    def metadata(self) -> str:
        """What other groups need to find this group's state: its name."""
        return self._name

    def send_checkpoint(
        self, dst_ranks: list[int], step: int, state_dict: dict[str, Any], timeout: timedelta
    ) -> None:
        """Writes this group's state, for every group that is behind.

        Args:
            dst_ranks: the groups that need it; not used, since all read the same files.
            step: of the state.
            state_dict: the state.
            timeout: not used: the write is synchronous.
        """
        del dst_ranks, timeout
        tree = {**state_dict["user"]["default"], "torchft": state_dict["torchft"]}
        # Files of an earlier attempt, or from before this group was killed, must not be read.
        self.disallow_checkpoint()
        policy = CheckpointPolicy(keep_last=1, asynchronous=False)
        NativeEngine(self._own, policy, self._world).save(tree, step, synchronous=True)

    def recv_checkpoint(
        self, src_rank: int, metadata: str, step: int, timeout: timedelta
    ) -> dict[str, Any]:
        """Reads another group's state.

        Args:
            src_rank: the group to read from; not used, since `metadata` names it.
            metadata: what that group's `metadata` returned.
            step: of the state.
            timeout: how long to wait for it.

        Raises:
            CheckpointError: it did not arrive in time, or it is damaged.
        """
        del src_rank
        if not re.fullmatch(r"\d{1,9}", metadata):
            raise CheckpointError(f"{metadata!r:.40} is no replica group's name")
        path = self._folder / metadata / "state" / folder_name(step)
        deadline = time.monotonic() + timeout.total_seconds()
        while not path.exists():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{path} did not arrive: can all replica groups read the run's folder?"
                )
            time.sleep(_POLL)
        verify(path)
        tree = load_tree(path)
        return {"torchft": tree.pop("torchft"), "user": {"default": tree}}

    def disallow_checkpoint(self) -> None:
        """Removes what was written: no group waits for it any more."""
        shutil.rmtree(self._own, ignore_errors=True)

    def shutdown(self, wait: bool = True) -> None:
        """Leaves nothing behind."""
        del wait
        shutil.rmtree(self._own.parent, ignore_errors=True)
        with contextlib.suppress(OSError):  # another group's is there
            self._folder.rmdir()
