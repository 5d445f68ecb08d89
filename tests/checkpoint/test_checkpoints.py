"""What a run may rely on: the newest is found, the right ones are kept, saving disturbs nothing."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from faults import FaultyDisk, QuickDisk, fails_at, leftovers, opened, state, value_of
from paceline.checkpoint import (
    CheckpointPolicy,
    check_fits,
    read_manifest,
    reasons_due,
    to_keep,
)
from paceline.checkpoint.codec import DTYPES
from paceline.checkpoint.safetensors_file import raw_bytes
from paceline.errors import CheckpointError, ConfigError, MismatchError, StateError


def steps(checkpoints: Any) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints.list()]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_what_is_saved_is_loaded(tmp_path: Path, asynchronous: bool) -> None:
    with opened(tmp_path / "a" / "b", asynchronous=asynchronous) as checkpoints:
        checkpoints.recover()
        assert checkpoints.newest() is None
        checkpoints.save(state(7), 3, best=True, info={"why": ["epoch"], "loss": float("nan")})
        newest = checkpoints.newest()
        assert value_of(checkpoints.load(newest.path)) == 7
        assert (newest.step, newest.best, newest.info["why"]) == (3, True, ["epoch"])
        assert read_manifest(newest.path).torch == torch.__version__
        assert [(n.kind, n.path, n.best) for n in checkpoints.poll()] == [
            ("saved", newest.path, True)
        ]


def test_a_state_without_ranks_comes_back_without_ranks(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoints:
        checkpoints.save({"x": (1,)}, 1, synchronous=True)
        assert checkpoints.load(tmp_path / "step_00000001") == {"x": (1,)}


def test_every_dtype_shape_and_stride_passes_through_the_file_bitwise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tree: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        top = 2 if dtype == torch.bool else 256
        bits = torch.randint(0, top, (6 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
        tree[name] = [bits.reshape(2, 3), bits[0], bits[:0].reshape(0, 4), bits.reshape(2, 3).t()]
        tree[name].append(torch.empty_strided((1,), (7,), dtype=dtype).copy_(bits[:1]))
    large = {"large": torch.randn(3_000_000)}
    large |= {f"middling.{i}": torch.randn(220_000) for i in range(12)}

    with opened(tmp_path) as checkpoints:
        checkpoints.save(tree | large, 1, synchronous=True)
        got = checkpoints.load(tmp_path / "step_00000001")

    assert all(raw_bytes(got[name]) == raw_bytes(tensor) for name, tensor in large.items())
    for name, tensors in tree.items():
        for before, after in zip(tensors, got[name], strict=True):
            assert (before.dtype, before.shape) == (after.dtype, after.shape)
            assert raw_bytes(before.contiguous()) == raw_bytes(after.contiguous())


def test_torchs_own_reader_reads_the_files(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoints:
        checkpoints.save(state(4), 1, synchronous=True)
    target = {"model/weight": torch.zeros(3, 2)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = HuggingFaceStorageReader(str(tmp_path / "step_00000001"))
        dcp.load(target, storage_reader=reader)
    assert target["model/weight"].unique().tolist() == [4]


def test_writes_that_fall_short_are_completed(tmp_path: Path) -> None:
    class Short(QuickDisk):
        def write(self, fd: int, data: memoryview) -> int:
            return super().write(fd, data[:7])

    with opened(tmp_path, Short()) as checkpoints:
        checkpoints.save(state(5), 1, synchronous=True)
        assert value_of(checkpoints.load(checkpoints.newest().path)) == 5


class Slow(QuickDisk):
    """A disk that holds every write until it is let go."""

    def __init__(self) -> None:
        self.go, self.reached = threading.Event(), threading.Event()

    def write(self, fd: int, data: memoryview) -> int:
        self.reached.set()
        assert self.go.wait(30)
        return super().write(fd, data)


def test_training_may_change_the_weights_while_a_background_save_writes_them(
    tmp_path: Path,
) -> None:
    disk, tree = Slow(), state(1)
    with opened(tmp_path, disk) as checkpoints:
        checkpoints.save(tree, 1)
        assert disk.reached.wait(30)
        assert checkpoints.busy
        assert checkpoints.poll() == []
        for tensor in (*tree["model"].values(), tree["rank"]["0"]["stream"]):
            tensor.add_(1)
        tree["progress"]["step"] = 2
        disk.go.set()
        assert value_of(checkpoints.load(checkpoints.newest().path)) == 1


def test_saves_are_one_at_a_time_and_reuse_the_same_memory(tmp_path: Path) -> None:
    with opened(tmp_path, keep_last=None) as checkpoints:
        checkpoints.save(state(1), 1)
        first = {n: b.data_ptr() for n, b in checkpoints._staging._buffers.items()}
        assert len(first) == 3
        for step in (2, 3, 4):
            checkpoints.save(state(step), step)
        assert {n: b.data_ptr() for n, b in checkpoints._staging._buffers.items()} == first
        checkpoints.wait()
        for c in checkpoints.list():
            assert value_of(checkpoints.load(c.path)) == c.step


def test_a_state_that_changes_its_shapes_is_still_saved_whole(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoints:
        for step, tree in enumerate([{"a": torch.ones(2)}, {"a": torch.ones(3), "b": [1]}, {}]):
            checkpoints.save(tree, step)
            got = checkpoints.load(checkpoints.newest().path)
            assert got.keys() == tree.keys()
            assert all(torch.equal(torch.as_tensor(got[k]), torch.as_tensor(tree[k])) for k in got)


def test_no_thread_outlives_close(tmp_path: Path) -> None:
    before = threading.active_count()
    with opened(tmp_path) as checkpoints:
        checkpoints.save(state(1), 1)
    assert threading.active_count() == before
    checkpoints.close()


def test_a_background_failure_is_told_once_and_the_training_goes_on(tmp_path: Path) -> None:
    with opened(tmp_path, fails_at(3)) as checkpoints:
        checkpoints.save(state(1), 1)
        assert "No space left" in str(checkpoints.wait())
        (notice,) = checkpoints.poll()
        assert notice.kind == "failed"
        assert "step 1" in notice.message
        assert "No space left" in notice.message
        assert checkpoints.retry_due
        assert checkpoints.poll() == []
        assert leftovers(tmp_path) == []


def test_what_cannot_be_stored_is_refused_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoints:
        with pytest.raises(StateError, match=r"callbacks\.mine\.lock: a _thread\.lock"):
            checkpoints.save({"callbacks": {"mine": {"lock": threading.Lock()}}}, 1)
        with pytest.raises(StateError, match="info"):
            checkpoints.save({}, 1, info={"loss": torch.ones(1)})
        with pytest.raises(StateError, match="rank"):
            checkpoints.save({"rank": {"1": {}}}, 1)
        assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_in_numbers_before_anything_is_written(tmp_path: Path) -> None:
    class Small(FaultyDisk):
        def free_bytes(self, path: Path) -> int:
            return 3_000_000

    tree = {"model": torch.zeros(1_000_000), "rank": {"0": torch.zeros(250_000)}}
    with opened(tmp_path / "run", Small(lambda *_: None)) as checkpoints:
        assert checkpoints.required_bytes(tree) >= 5_000_000
        with pytest.raises(CheckpointError, match=r"needs 6\.0 MB .*and 3\.0 MB are free"):
            checkpoints.check_space(tree)
        checkpoints.save(tree, 1)
        assert "3.0 MB are free" in str(checkpoints.wait())
        assert not list(tmp_path.glob("run/*"))


def test_pruning_keeps_the_newest_the_best_and_the_milestones(tmp_path: Path) -> None:
    with opened(tmp_path, keep_last=2, keep_every_steps=10) as checkpoints:
        for step in range(5, 50, 5):
            checkpoints.save(state(step), step, best=step == 15, synchronous=True)
        assert steps(checkpoints) == [10, 15, 20, 30, 40, 45]
        assert checkpoints.best().step == 15
        assert (tmp_path / "best").read_text() == "step_00000015\n"
        checkpoints.save(state(50), 50, best=True, synchronous=True)
        assert steps(checkpoints) == [10, 20, 30, 40, 45, 50]


def test_the_best_stays_the_best_when_its_step_is_saved_again(tmp_path: Path) -> None:
    with opened(tmp_path) as checkpoints:
        checkpoints.save(state(1), 10, best=True, synchronous=True)
        checkpoints.save(state(1), 10, synchronous=True)
        assert checkpoints.best().step == 10
        assert checkpoints.best().save_id == 2


def test_the_newest_is_the_last_one_saved_not_the_highest_step_nor_the_youngest_file(
    tmp_path: Path,
) -> None:
    with opened(tmp_path, keep_last=None) as checkpoints:
        checkpoints.save(state(1), 50, synchronous=True)
        checkpoints.save(state(2), 40, synchronous=True)
        (tmp_path / "step_00000050" / "manifest.json").touch()
        (tmp_path / "latest").write_text("step_00000050")
        assert checkpoints.newest().step == 40


def test_going_on_from_an_older_one_sets_the_later_ones_aside_for_good(tmp_path: Path) -> None:
    with opened(tmp_path, keep_last=None) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(state(step), step, best=step == 30, synchronous=True)
        checkpoints.abandon_after(checkpoints.list()[0].save_id)
        assert steps(checkpoints) == [10]
        assert [e.kind for e in checkpoints.poll()][-2:] == ["abandoned"] * 2
        assert (tmp_path / "latest").read_text() == "step_00000010\n"
        assert not (tmp_path / "best").exists()
    with opened(tmp_path, keep_last=None) as again:
        again.save(state(21), 20, synchronous=True)
        assert again.newest().save_id == 4
        assert again.newest().step == 20
    assert sorted(p.name for p in (tmp_path / ".abandoned").iterdir()) == [
        "step_00000020",
        "step_00000030",
    ]


@pytest.mark.parametrize(("keep", "left"), [(1, [40]), (2, [30, 40]), (None, [20, 30, 40])])
def test_what_is_set_aside_stays_until_the_next_save_and_then_the_last_of_it(
    tmp_path: Path, keep: int | None, left: list[int]
) -> None:
    with opened(tmp_path, keep_last=None) as checkpoints:
        for step in (10, 20, 30, 40):
            checkpoints.save(state(step), step, synchronous=True)
        checkpoints.abandon_after(checkpoints.list()[0].save_id)
    (tmp_path / ".abandoned" / "mine").mkdir()
    (tmp_path / "elsewhere" / "step_00000001").mkdir(parents=True)
    (tmp_path / "elsewhere" / "step_00000002").mkdir()
    (tmp_path / ".damaged").symlink_to(tmp_path / "elsewhere")
    with opened(tmp_path, keep_last=keep) as again:
        again.recover()
        assert again.newest().step == 10
        assert len(list((tmp_path / ".abandoned").iterdir())) == 4
        again.save(state(11), 11, synchronous=True)
    names = [f"step_{step:08}" for step in left]
    assert sorted(p.name for p in (tmp_path / ".abandoned").iterdir()) == ["mine", *names]
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2, "a link is not followed"


def test_a_replaced_checkpoint_that_rotted_before_its_predecessor_was_removed_is_undone(
    tmp_path: Path,
) -> None:
    with opened(tmp_path) as checkpoints:
        checkpoints.save(state(2), 10, synchronous=True)
        (tmp_path / "step_00000010").rename(tmp_path / ".step_00000010.old")
        (tmp_path / "step_00000010").mkdir()
        checkpoints.recover()
        assert value_of(checkpoints.load(checkpoints.newest().path)) == 2
        assert (tmp_path / ".damaged" / "step_00000010").is_dir()


def test_the_policy_says_when_and_all_its_mistakes_at_once() -> None:
    policy = CheckpointPolicy(every_epochs=2, every_steps=10)
    assert reasons_due(policy, step=9) == []
    assert reasons_due(policy, step=10) == ["step"]
    assert reasons_due(policy, step=0) == []
    assert reasons_due(policy, step=20, epochs_done=4, improved=True) == ["step", "epoch", "best"]
    assert reasons_due(policy, step=7, epochs_done=3) == []
    never = CheckpointPolicy(every_epochs=None, save_best=False)
    assert reasons_due(never, step=10, epochs_done=1, improved=True) == []
    with pytest.raises(ConfigError) as caught:
        CheckpointPolicy(every_steps=0, keep_last=True, keep_best=0, save_best="yes")  # type: ignore[arg-type]
    for name in ("every_steps", "keep_last", "keep_best", "save_best"):
        assert name in str(caught.value)
    with pytest.raises(ConfigError) as unknown:
        CheckpointPolicy(save_last_k=3, keep_lst=2)  # type: ignore[call-arg]
    assert "save_last_k: here it is keep_last." in str(unknown.value)
    assert "keep_lst: no such setting; did you mean 'keep_last'?" in str(unknown.value)
    assert to_keep(CheckpointPolicy(keep_last=None), []) == set()


def test_what_does_not_fit_is_listed_whole_and_never_cast() -> None:
    here = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(1), "d": torch.ones(1), "n": 1}
    there = {"a": torch.ones(3), "b": torch.ones(2).bfloat16(), "d": torch.ones(1), "n": 2, "e": 1}
    with pytest.raises(MismatchError) as caught:
        check_fits(here, there, "model 'main'")
    assert str(caught.value).splitlines() == [
        "the checkpoint does not fit model 'main' (4 differences):",
        "  missing from the checkpoint: c",
        "  only in the checkpoint: e",
        "  a: float32[3] in the checkpoint, float32[2] here",
        "  b: bfloat16[2] in the checkpoint, float32[2] here",
    ]
    check_fits(here, here)
