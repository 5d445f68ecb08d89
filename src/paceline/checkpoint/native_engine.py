"""The native checkpoint engine: saves, finds, verifies and prunes the checkpoints of one run."""

from __future__ import annotations

import builtins
import json
import threading
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from paceline.checkpoint import agreement, publication
from paceline.checkpoint.codec import decode, encode, names_in
from paceline.checkpoint.engine import Checkpoint, CheckpointEngine, Notice
from paceline.checkpoint.files import Disk
from paceline.checkpoint.json_file import read_json
from paceline.checkpoint.policy import CheckpointPolicy, to_keep
from paceline.checkpoint.publication import Manifest
from paceline.checkpoint.ranks import Ranks, describe
from paceline.checkpoint.safetensors_file import FileRecord
from paceline.checkpoint.staging import Staging
from paceline.errors import CheckpointError, StateError, UnreadableError
from paceline.reading import status
from paceline.world.dtensors import is_dtensor
from paceline.world.world import World


@dataclass
class _Job:
    """One save in progress."""

    step: int
    best: bool
    info: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    shared: Any = None
    forms: dict[str, str] = field(default_factory=dict)
    own: list[Any] = field(default_factory=list)  # on rank 0: every rank's own skeleton
    needed: int = 0
    before: Callable[[], None] | None = None
    error: CheckpointError | None = None


class NativeEngine(CheckpointEngine):
    """The checkpoints in one folder, each a folder of safetensors and JSON files.

    Args:
        folder: created at the first save.
        policy: what to keep, and whether to write in the background.
        world: the ranks that save together.
    """

    def __init__(self, folder: Path | str, policy: CheckpointPolicy, world: World) -> None:
        super().__init__(Path(folder).absolute(), policy, world)
        self._ranks = Ranks(world)
        self._in_stages = world.parallel.pipeline > 1  # then no rank holds all tensors
        self._disk = Disk()
        self._staging = Staging()
        self._plan: Any = None
        self._planned_for: dict[str, str] | None = None
        self._thread: threading.Thread | None = None
        self._job: _Job | None = None
        self._notices: deque[Notice] = deque()
        self._last_id: int | None = None
        self._verified: set[tuple[Path, int]] = set()

    # Saving

    def save(
        self,
        tree: dict[str, Any],
        step: int,
        *,
        best: bool = False,
        synchronous: bool = False,
        info: dict[str, Any] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        """See `CheckpointEngine.save`. A write that fails makes `retry_due` true.

        Raises:
            StateError: something in the tree cannot be stored, or the ranks' trees differ.
            CheckpointError: it could not be written; raised only if `synchronous`.
        """
        self.wait()
        blocking = synchronous or not self.policy.asynchronous
        job = self._job = self._prepare(tree, step, best, dict(info or {}), copy=not blocking)
        job.before = before
        if not blocking:
            self._thread = threading.Thread(target=self._write, args=(job,), name="checkpoint")
            self._thread.start()
            return
        self._write(job)
        self.wait()
        if synchronous and job.error is not None:
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written: {job.error}"
            ) from job.error

    def wait(self) -> CheckpointError | None:
        """See `CheckpointEngine.wait`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return None if self._job is None else self._job.error

    def poll(self) -> builtins.list[Notice]:
        """See `CheckpointEngine.poll`."""
        notices = []
        while self._notices:
            notices.append(self._notices.popleft())
        return notices

    @property
    def retry_due(self) -> bool:
        """Whether the latest save failed and should be tried again.

        Ranks may see a background save end at different times: act on rank 0's answer.
        """
        return not self.busy and self._job is not None and self._job.error is not None

    @property
    def busy(self) -> bool:
        """Whether a background save is in flight on this rank."""
        return self._thread is not None and self._thread.is_alive()

    def close(self) -> None:
        """Finishes the save in flight and frees the host buffers. Safe to call twice."""
        self.wait()
        self._staging.release()

    # Finding and loading

    def recover(self) -> None:
        """See `CheckpointEngine.recover`."""
        # Importing torch's own checkpointing takes a second, which belongs to a run's start, not
        # to its first save, nor to `import paceline`.
        from paceline.checkpoint import storage as _  # noqa: F401

        def work() -> list[str]:
            done = publication.recover(self.folder, self._disk)
            for name in ("latest", "best"):
                self._disk.remove(self.folder / f".{name}.new")
            if done:
                self._write_hints()
            return done

        self._notify("recovered", self._ranks.main(work))

    def list(self) -> builtins.list[Checkpoint]:
        """The published checkpoints with intact manifests, oldest first; reads only these."""
        return self._ranks.main(lambda: publication.scan(self.folder)[0])

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint by `save_id`, verified; damaged ones are set aside.

        Raises:
            CheckpointError: one was written by another version of Paceline, or a damaged one cannot
                be moved.
        """
        self.wait()
        found, messages = self._ranks.main(self._find_newest)
        self._notify("damaged", messages)
        if found is None and messages:
            self._notify("warning", ["no intact checkpoint is left"])
        if found is not None:
            self._verified.add((found.path, found.save_id))
        return found

    def best(self) -> Checkpoint | None:
        """The newest checkpoint that was the best when it was saved, according to its manifest."""
        return next((c for c in reversed(self.list()) if c.best), None)

    def load(self, path: Path | str, *, into: dict[str, Any] | None = None) -> dict[str, Any]:
        """Reads a checkpoint, verifying it first unless `newest` just did.

        Args:
            path: its folder.
            into: a tree like the one saved, whose tensors are filled instead of making new ones;
                DTensors get their own shards. Its other leaves are ignored.

        Returns:
            The tree, with every rank's part under `tree["rank"]`.

        Raises:
            MismatchError: a tensor of `into` has another dtype or shape.
            CheckpointError: it is damaged, or not a checkpoint.
        """
        path = Path(path)

        def check() -> None:
            manifest = publication.read_manifest(path)
            if (path, manifest.save_id) not in self._verified:
                publication.verify(path)

        self._ranks.main(check)
        return self._ranks.together(lambda: load_tree(path, into))

    def abandon_after(self, save_id: int) -> None:
        """See `CheckpointEngine.abandon_after`; they are moved to `.abandoned`."""
        self.wait()

        def work() -> list[str]:
            messages = []
            for later in [c for c in publication.scan(self.folder)[0] if c.save_id > save_id]:
                where = publication.set_aside(later.path, publication.ABANDONED, self._disk)
                messages.append(
                    f"{later.path.name}: newer than the checkpoint resumed from; moved to {where}"
                )
            if messages:
                self._write_hints()
            return messages

        self._notify("abandoned", self._ranks.main(work))

    # Reading a folder

    @staticmethod
    def scan(
        folder: Path,
    ) -> tuple[builtins.list[Checkpoint], builtins.list[tuple[Path, CheckpointError]]]:
        """See `CheckpointEngine.scan`."""
        return publication.scan(folder)

    @staticmethod
    def verify(path: Path) -> Checkpoint:
        """See `CheckpointEngine.verify`."""
        return publication.checkpoint_of(path, publication.verify(path))

    @staticmethod
    def load_tree(path: Path, parts: Collection[str] | None = None) -> dict[str, Any]:
        """See `CheckpointEngine.load_tree`."""
        return load_tree(path, parts=parts)

    # Space

    def required_bytes(self, tree: dict[str, Any]) -> int:
        """The disk space that one checkpoint of this tree takes, all ranks together, in bytes."""
        self.wait()
        needed = self._prepare(tree, 0, False, {}, copy=False).needed
        return self._ranks.main(lambda: needed)

    def check_space(self, tree: dict[str, Any]) -> None:
        """See `CheckpointEngine.check_space`.

        With an asynchronous policy this also allocates the host buffers, so that the first save
        takes no longer than the next. Buffers of tensors that do not exist yet (most optimizers'
        state) are allocated later.

        Raises:
            CheckpointError: there is not enough space.
        """
        self.wait()
        job = self._prepare(tree, 0, False, {}, copy=self.policy.asynchronous)
        self._ranks.main(lambda: self._check_free(job.needed))

    # Implementation

    def _encode(self, tree: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Any, Any]:
        """This rank's tensors, the skeleton that all ranks share, and this rank's own skeleton."""
        own = tree.get("rank", {})
        rank = str(self._ranks.rank)
        if not isinstance(own, dict) or set(own) - {rank}:
            raise StateError(f"rank: on rank {rank} the only key allowed here is {rank!r}")
        shared, skeleton = encode(
            {key: value for key, value in tree.items() if key != "rank"},
            elsewhere=self._in_stages,
        )
        mine, own_skeleton = encode(own, prefix=("rank",))
        return shared | mine, skeleton, own_skeleton if "rank" in tree else None

    def _prepare(
        self, tree: dict[str, Any], step: int, best: bool, info: dict[str, Any], copy: bool
    ) -> _Job:
        """Turns the state into a job; if something cannot be stored, every rank raises here."""
        job = _Job(step, best, info)

        def work() -> tuple[Any, tuple[int, int], str, bool]:
            if encode(info)[0]:
                raise StateError("info: the manifest takes plain values only, no tensors")
            job.tensors, job.shared, own = self._encode(tree)
            job.forms = agreement.forms(job.tensors, staged=self._in_stages)
            digest = agreement.digest(job.forms, job.shared) if self._ranks.size > 1 else ""
            return own, agreement.sizes(job.tensors), digest, job.forms == self._planned_for

        parts = self._ranks.everywhere(work)
        alike, planned = self._ranks.main(
            lambda: (len({part[2] for part in parts}) == 1, all(part[3] for part in parts))
        )
        if not alike:
            self._ranks.everywhere(
                lambda: (job.shared, agreement.shared(job.forms)), agreement.raise_difference
            )
        job.own = [part[0] for part in parts]
        job.needed = agreement.required_bytes([part[1] for part in parts])
        self._take_own_part(job, planned, copy)
        return job

    def _take_own_part(self, job: _Job, planned: bool, copy: bool) -> None:
        """Reduces a job's tensors to those that this rank writes, copied if necessary."""
        from paceline.checkpoint import storage

        if not planned:
            self._planned_for = None
            self._plan = storage.plan_writes(job.tensors, self._ranks)
            self._planned_for = job.forms
        mine = {name: job.tensors[name] for name in storage.planned_names(self._plan)}
        job.tensors = self._ranks.together(lambda: self._staging.copy(mine)) if copy else mine

    def _write(self, job: _Job) -> None:
        """Writes and publishes one job. Raises nothing: a failure is kept in `job.error`."""
        from paceline.checkpoint.storage import write_planned

        hidden = publication.hidden(self.folder, publication.folder_name(job.step), "new")
        try:
            self._ranks.main(lambda: self._begin(hidden, job))
            records = write_planned(self._plan, job.tensors, hidden, self._ranks, self._disk)
            best = self._ranks.main(lambda: self._publish(hidden, records, job))
        except Exception as error:  # noqa: BLE001 - a failed write must not end the training
            job.error = error if isinstance(error, CheckpointError) else _as_ours(error)
            self._notices.append(Notice("failed", self._clean_up(hidden, job), job.step))
        else:
            path = self.folder / publication.folder_name(job.step)
            self._notices.append(Notice("saved", f"{path.name}: saved", job.step, path, best))
        job.tensors = {}

    def _begin(self, hidden: Path, job: _Job) -> None:
        if job.before is not None:
            job.before()
        self._disk.make_folders(self.folder)
        self._disk.remove(hidden)
        self._check_free(job.needed)
        self._disk.mkdir(hidden)

    def _publish(self, hidden: Path, records: builtins.list[FileRecord], job: _Job) -> bool:
        """Rank 0: completes a checkpoint once all tensors are written; the manifest comes last.

        Returns:
            Whether the checkpoint is marked best.
        """
        for record in records:
            path = hidden / record.name
            written = status(path)
            if written is None or written.st_size != record.bytes:
                raise CheckpointError(
                    f"{path} differs from what its rank wrote: ranks must share the run folder"
                )
        own = [part for part in job.own if part is not None]
        rank = {key: value for part in own for key, value in part.items()} if own else None
        state = json.dumps({"tree": job.shared, "rank": rank}, separators=(",", ":")).encode()
        self._disk.write_file(hidden / publication.STATE, state)
        files = (*records, publication.record_of(publication.STATE, state))
        final = self.folder / publication.folder_name(job.step)
        manifest = Manifest(
            save_id=self._next_id(),
            step=job.step,
            best=job.best or _was_best(final),
            info=job.info,
            ranks=self._ranks.size,
            files=files,
            **publication.versions(),
        )
        text = publication.manifest_text(manifest)
        self._disk.write_file(hidden / publication.MANIFEST, text.encode())
        self._disk.fsync_folder(hidden)
        publication.publish(self.folder, final.name, self._disk)
        self._after_publication(manifest.save_id)
        return manifest.best

    def _after_publication(self, save_id: int) -> None:
        """Hints and pruning: the checkpoint is published, so a failure here is only a warning."""
        try:
            self._write_hints()
            found = publication.scan(self.folder)[0]
            keep = to_keep(self.policy, found, {save_id}, failed_step=self.failed_step)
            for checkpoint in found:
                if checkpoint.save_id not in keep:
                    publication.discard(checkpoint.path, self._disk)
            publication.prune_set_aside(self.folder, self.policy.keep_last, self._disk)
        except (OSError, UnreadableError) as error:
            message = f"old checkpoints could not be removed: {describe(error)}"
            self._notices.append(Notice("warning", message))

    def _clean_up(self, hidden: Path, job: _Job) -> str:
        """Removes, on rank 0, what a failed write left; returns a message that says what failed."""
        kept = "the previous checkpoints are untouched; the next boundary tries again"
        message = f"step {job.step}: the checkpoint could not be written: {job.error}; {kept}"
        if self._ranks.is_main:
            try:
                self._disk.remove(hidden)
            except OSError as error:
                message += f"; its remains could not be removed: {describe(error)}"
        return message

    def _next_id(self) -> int:
        if self._last_id is None:
            self._last_id = publication.highest_save_id(self.folder)
        self._last_id += 1
        return self._last_id

    def _write_hints(self) -> None:
        """Writes `latest` and `best`, for people and scripts; Paceline never reads them."""
        found = publication.scan(self.folder)[0]
        for name, those in (("latest", found), ("best", [c for c in found if c.best])):
            if those:
                self._disk.replace_text(self.folder / name, those[-1].path.name + "\n")
            else:
                self._disk.remove(self.folder / name)

    def _find_newest(self) -> tuple[Checkpoint | None, builtins.list[str]]:
        """Rank 0: see `newest`."""
        messages = []
        found, broken = publication.scan(self.folder)
        for path, error in broken:
            if isinstance(error, publication.UnknownFormatError):
                raise error
            messages.append(self._set_damaged_aside(path, error))
        for checkpoint in reversed(found):
            try:
                publication.verify(checkpoint.path)
            except CheckpointError as error:
                messages.append(self._set_damaged_aside(checkpoint.path, error))
            else:
                return checkpoint, messages
        return None, messages

    def _set_damaged_aside(self, path: Path, error: CheckpointError) -> str:
        try:
            where = publication.set_aside(path, publication.DAMAGED, self._disk)
        except OSError as why:
            return f"damaged: {error}; it could not be moved aside: {describe(why)}"
        return f"damaged: {error}; moved to {where}"

    def _check_free(self, needed: int) -> None:
        place = next(p for p in (self.folder, *self.folder.absolute().parents) if p.is_dir())
        free = self._disk.free_bytes(place)
        if free < needed:
            raise CheckpointError(
                f"a checkpoint needs {agreement.readable_size(needed)} in {self.folder} "
                f"and {agreement.readable_size(free)} are free"
            )

    def _notify(
        self,
        kind: Literal["damaged", "abandoned", "recovered", "warning"],
        messages: builtins.list[str],
    ) -> None:
        if self._ranks.is_main:
            self._notices.extend(Notice(kind, message) for message in messages)


def load_tree(
    path: Path | str,
    into: dict[str, Any] | None = None,
    parts: Collection[str] | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint that is known to be intact, in this process alone.

    Args:
        path: its folder.
        into: see `NativeEngine.load`.
        parts: the keys of the tree to read, e.g. ("models",); None for all. Other keys are not read
            from the disk.

    Raises:
        MismatchError, CheckpointError: see `NativeEngine.load`.
    """
    from paceline.checkpoint.storage import read_tensors

    path = Path(path)
    state = read_json(path / publication.STATE)
    if not isinstance(state, dict) or set(state) != {"tree", "rank"}:
        raise CheckpointError(f"{path / publication.STATE}: not the state of a run")
    targets = encode(into)[0] if into else {}
    shards = {name: tensor for name, tensor in targets.items() if is_dtensor(tensor)}
    if parts is not None and isinstance(state["tree"], dict):
        state["tree"] = {key: part for key, part in state["tree"].items() if key in parts}
        state["rank"] = state["rank"] if "rank" in parts else None
    tensors = read_tensors(path, shards, None if parts is None else names_in(list(state.values())))
    try:
        tree, rank = decode(tensors, [state["tree"], state["rank"]])
    except CheckpointError as error:
        raise CheckpointError(f"{path / publication.STATE}: {error}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path / publication.STATE}: not the state of a run")
    return tree if rank is None else {**tree, "rank": rank}


def _was_best(path: Path) -> bool:
    """Whether the checkpoint of this step that is about to be replaced was the best one."""
    try:
        return publication.read_manifest(path).best
    except CheckpointError:
        return False


def _as_ours(error: Exception) -> CheckpointError:
    made = CheckpointError(describe(error))
    made.__cause__ = error
    return made
