"""Processed samples are made once, by one process, and are the same ever after."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import ConfigError, DataError, PeerError
from paceline.lm.data import token_store
from paceline.lm.data.sample import Sample
from paceline.lm.data.store_key import changes
from paceline.lm.data.token_store import TokenStore, store_for
from paceline.testing.ranks import Ranks, packed, unpacked
from paceline.trainer.arguments import arguments_of
from paceline.world.layout import Parallel
from paceline.world.world import World

KEY: dict[str, Any] = {
    "sources": {"manual": {"content": "a" * 64, "ratio": 1.0}, "talk": {"content": "b" * 64}},
    "tokenizer": {"tokenizer.json": "c" * 64},
    "template": "{% for message in messages %}{{ message.content }}{% endfor %}",
    "settings": {"max_length": 512, "packing": True},
}


def sample(*ids: int, trained: int = 1) -> Sample:
    """A sample of these ids, of which the last `trained` are."""
    labels = [-100] * (len(ids) - trained) + [*ids[len(ids) - trained :]]
    return Sample(np.array(ids, np.int32), np.array(labels, np.int32))


def some_samples(n: int = 7) -> list[Sample]:
    """Samples of different lengths and ids, parts of them trained."""
    return [sample(*range(10 * i, 10 * i + i % 5), trained=i % 5 // 2) for i in range(n)]


def assert_same(found: Any, wanted: list[Sample]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.ids.dtype == one.labels.dtype == np.int32
        assert one.ids.tobytes() == other.ids.tobytes()
        assert one.labels.tobytes() == other.labels.tobytes()


def never() -> list[Sample]:
    raise AssertionError("samples were made that are in the cache")


lists_of_samples = st.lists(
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=20).map(
        lambda tokens: Sample(
            np.array([i for i, _ in tokens], np.int32),
            np.array([i if trained else -100 for i, trained in tokens], np.int32),
        )
    ),
    max_size=12,
)


@settings(max_examples=30)  # each waits for the disk several times
@given(samples=lists_of_samples, block=st.integers(1, 40))
def test_a_store_gives_back_the_samples_it_was_given(
    tmp_path_factory: pytest.TempPathFactory, samples: list[Sample], block: int
) -> None:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_store, "_BLOCK", block)
        made = store_for(folder, KEY, lambda: iter(samples), notes=lambda: {"dropped": {"dull": 3}})
    for store in (made, store_for(folder, KEY, never), unpacked(packed(made))):
        assert_same(store, samples)
        assert_same(store[::-1], samples[::-1])
        assert store.lengths.tolist() == [len(one.ids) for one in samples]
        assert store.lengths.dtype == np.int64
        assert store.key == KEY
        assert store.notes == {"dropped": {"dull": 3}}
        assert store.trained == sum((one.labels != -100).sum() for one in samples)
    blocks = list(made.blocks(block))
    ids, trained, lengths = (
        np.concatenate([np.empty(0, int), *(each[part] for each in blocks)]) for part in range(3)
    )
    assert ids.tolist() == [i for one in samples for i in one.ids]
    assert trained.tolist() == [label != -100 for one in samples for label in one.labels]
    assert lengths.tolist() == made.lengths.tolist()
    made.verify()


def test_a_sample_is_the_readers_to_change(tmp_path: Path) -> None:
    store = store_for(tmp_path, KEY, some_samples)
    store[3].ids[:] = 0
    store[3].labels[:] = 0
    assert_same(store, some_samples())
    with pytest.raises(IndexError, match="sample 7 of 7"):
        store[7]


def test_a_pickled_store_holds_its_path_alone(tmp_path: Path) -> None:
    store = store_for(tmp_path, KEY, lambda: [sample(*range(5000))])
    assert store.lengths.tolist() == [5000]  # kept from here on, but not pickled
    assert len(pickle.dumps(store)) < 200 + len(str(tmp_path))


def test_a_run_is_identified_by_the_key_and_may_move(tmp_path: Path) -> None:
    store = store_for(tmp_path / "here", KEY, some_samples)
    moved = store_for(tmp_path / "there", KEY, some_samples)
    other = store_for(tmp_path / "here", {**KEY, "template": "another"}, some_samples)
    assert store.run_identity() == moved.run_identity() != other.run_identity()
    assert store.run_identity()["settings.max_length"] == 512
    # What is compared at a resume by itself: nothing that a folder decides.
    assert arguments_of("data.dataset", store) == {}


def test_what_changes_samples_makes_them_anew_and_the_line_says_what(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(**key: Any) -> str:
        made: list[bool] = []
        store_for(tmp_path, {**KEY, **key}, lambda: made.append(True) or [sample(1, 2)])
        line = capsys.readouterr().err.strip()
        assert bool(made) == bool(line)
        assert line.count("\n") == 0
        return line.rpartition(f"{tmp_path}/")[2].partition(": ")[2]

    assert asked() == "there are none yet."
    assert asked() == ""
    assert asked(template=KEY["template"] + " ") == "template changed."
    assert asked(settings={"max_length": 1024, "packing": True}) == "max_length: 512 -> 1024."
    assert asked(settings={"max_length": 512.0, "packing": True}) == "max_length: 1024 -> 512.0."
    assert asked(settings=KEY["settings"] | {"seed": 3}) == "seed: not set -> 3."
    manual, talk = KEY["sources"].values()
    changed = {"manual": {**manual, "content": "d" * 64}, "talk": talk}
    assert asked(sources=changed) == "source manual: content changed."
    half = {"manual": {**manual, "ratio": 0.5}, "talk": talk}
    assert asked(sources=half) == "source manual: ratio: 1.0 -> 0.5."
    assert asked(sources={**KEY["sources"], "web": {}}) == "source web: new."
    assert asked(sources={"talk": talk}) == "source manual: removed."
    assert asked(tokenizer={"tokenizer.json": "e" * 64}) == "tokenizer.tokenizer.json changed."
    # The order of names does not count; the nearest of the earlier keys is compared.
    assert asked(**dict(reversed(KEY.items()))) == ""
    both = asked(template=KEY["template"] + " ", settings={"max_length": 9, "packing": True})
    assert both in ("max_length: 512 -> 9.", "max_length: 1024 -> 9.", "template changed.")


def test_many_changes_stay_one_line_that_a_terminal_does_not_obey() -> None:
    old: dict[str, Any] = {"sources": {}, **{f"name{i}": i for i in range(9)}, "x": "\x1b[2J"}
    line = changes(old, {"sources": {}, **{f"name{i}": -i for i in range(9)}, "x": "\n"})
    assert line == ("name1: 1 -> -1, name2: 2 -> -2, name3: 3 -> -3, name4: 4 -> -4 and 5 more")
    assert changes({"x": "\x1b[2J"}, {"x": "plain"}) == r"x: \x1b[2J -> plain"


def test_a_key_is_plain_data() -> None:
    for wrong, path in (({"a": {"b": {1}}}, "key.a.b"), ({"a": float("nan")}, "key.a")):
        with pytest.raises(ConfigError, match=path):
            store_for("nowhere", wrong, never)
    with pytest.raises(ConfigError, match="keys are strings"):
        store_for("nowhere", {1: "a"}, never)  # pyright: ignore[reportArgumentType]


def test_rebuild_never_says_what_is_missing_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are none yet"):
        store_for(tmp_path / "new", KEY, never, rebuild="never")
    assert not (tmp_path / "new").exists()
    store_for(tmp_path, KEY, some_samples)
    store_for(tmp_path, KEY, never, rebuild="never")
    with pytest.raises(ConfigError, match=r"template changed.*rebuild='auto'"):
        store_for(tmp_path, {**KEY, "template": "another"}, never, rebuild="never")
    with pytest.raises(ConfigError, match="choose 'auto' or 'never'"):
        store_for(tmp_path, KEY, never, rebuild="no")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["ids.bin", "trained.bin", "offsets.bin", "manifest.json"])
def test_damaged_files_are_refused_or_made_anew_with_a_word(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = store_for(tmp_path, KEY, some_samples).folder
    os.truncate(path / name, (path / name).stat().st_size - 2)
    with pytest.raises(DataError, match=re.escape(str(path / name))):
        TokenStore(path)
    with pytest.raises(ConfigError, match="is damaged"):
        store_for(tmp_path, KEY, never, rebuild="never")
    capsys.readouterr()
    assert_same(store_for(tmp_path, KEY, some_samples), some_samples())
    assert f"what is there is damaged: {path / name}" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [path.name]


def test_a_flipped_bit_is_found_on_request(tmp_path: Path) -> None:
    store = store_for(tmp_path, KEY, some_samples)
    data = bytearray((store.folder / "ids.bin").read_bytes())
    data[5] ^= 4
    (store.folder / "ids.bin").write_bytes(data)
    with pytest.raises(DataError, match=r"ids\.bin has changed since it was written"):
        TokenStore(store.folder).verify()
    body = json.loads((store.folder / "manifest.json").read_text())
    body["samples"] += 1
    (store.folder / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match="its checksum does not match"):
        TokenStore(store.folder)


def test_a_malformed_sample_is_named_and_nothing_is_published(tmp_path: Path) -> None:
    good, ids = sample(1, 2, 3), np.array([1, 2, 3])
    for wrong, message in (
        (Sample(ids, np.array([1, 5, 3])), "sample 2 has the token id 2 with the label 5"),
        (Sample(np.array([1, -1]), np.array([-100, -100])), "sample 2 has the token id -1"),
        (Sample(ids, ids[1:]), r"sample 2: ids are int64 \(3,\), labels \(2,\)"),
        (Sample(ids / 2, ids / 2), "sample 2: ids are float64"),
    ):
        with pytest.raises(DataError, match=message):
            store_for(tmp_path, KEY, lambda wrong=wrong: [good, good, wrong])
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []
    assert_same(store_for(tmp_path, KEY, some_samples), some_samples())


def test_samples_are_written_in_memory_that_does_not_grow_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_store, "_BLOCK", 1 << 12)
    ids = np.arange(10_000, dtype=np.int32)

    def make() -> Iterator[Sample]:
        for i in range(500):
            yield Sample(ids[i : i + 2000].copy(), ids[i : i + 2000].copy())

    tracemalloc.start()
    try:
        store = store_for(tmp_path, KEY, make)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert store.tokens == 1_000_000
    assert peak < 700_000  # bytes, where the ids alone are 4,000,000


def test_a_hundred_thousand_samples_are_ready_at_once(tmp_path: Path) -> None:
    one = sample(*range(8), trained=3)
    store_for(tmp_path, KEY, lambda: repeat(one, 100_000))
    began = time.perf_counter()
    store = store_for(tmp_path, KEY, never)
    assert_same([store[0], store[99_999]], [one, one])
    assert int(store.lengths.sum()) == 800_000
    assert time.perf_counter() - began < 2  # seconds


# Several processes


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_writing(folder: Path, key: dict[str, Any], when: str) -> None:
    """Kills this process as it has written some samples, or is about to publish them."""
    if when == "publishing":
        token_store.publish = die

    def make() -> Iterator[Sample]:
        for one in some_samples():
            token_store._BLOCK = 1
            yield one
        if when == "writing":
            die()

    store_for(folder, key, make)


def test_what_a_killed_writer_left_is_in_nobodys_way(
    tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {**KEY, "template": "another"}

    def kill(key: dict[str, Any], when: str) -> None:
        (outcome,) = ranks.outcomes(killed_while_writing, 1, tmp_path, key, when)
        assert outcome.code == -signal.SIGKILL

    kill(KEY, "writing")
    (left,) = tmp_path.iterdir()
    assert (left / "ids.bin").stat().st_size > 0
    assert_same(store_for(tmp_path, KEY, some_samples), some_samples())
    assert [path.name for path in tmp_path.iterdir()] == [left.name[1:17]]
    # The next of any key removes it.
    kill(other, "writing")
    third = store_for(tmp_path, {**KEY, "template": "a third"}, some_samples)
    assert sorted(os.listdir(tmp_path)) == sorted([left.name[1:17], third.folder.name])
    # All was written: nothing is made again.
    kill(other, "publishing")
    capsys.readouterr()
    assert_same(store_for(tmp_path, other, never), some_samples())
    assert capsys.readouterr().err == ""
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    assert sorted(os.listdir(third.folder)) == [
        *("ids.bin", "manifest.json", "offsets.bin", "trained.bin"),
    ]


def wait_for(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def one_of_two(folder: Path, turn: str) -> Any:
    """Two processes that know nothing of each other; the second comes while the first writes."""
    begun, second = folder / f"{turn}.begun", os.environ["RANK"] == "1"
    waits = folder / f"{turn}.waits"

    def make() -> Iterator[Sample]:
        yield from some_samples(3)
        begun.touch()
        if not second:
            wait_for(waits.exists)
            if turn == "fails":
                raise ValueError("the source has no column 'answer'")
            if turn == "is killed":
                die()
        yield from some_samples()[3:]

    if second:
        wait_for(begun.exists)
        token_store.time.sleep = lambda _: waits.touch()  # pyright: ignore
    try:
        store = store_for(folder / "cache", {**KEY, "turn": turn}, make)
    except Exception as error:  # noqa: BLE001
        return type(error).__name__, str(error)
    return [(one.ids.tolist(), one.labels.tolist()) for one in store], os.getpid()


def test_of_two_processes_one_writes_and_the_other_waits_for_it(
    tmp_path: Path, ranks: Ranks
) -> None:
    wanted = [(one.ids.tolist(), one.labels.tolist()) for one in some_samples()]
    (first, _), (second, _) = ranks(one_of_two, 2, tmp_path, "succeeds")
    assert first == second == wanted
    first, second = ranks(one_of_two, 2, tmp_path, "fails")
    assert first == ("ValueError", "the source has no column 'answer'")
    assert second[0] == "PeerError"
    assert re.search(r"pid \d+ on .*ValueError: the source has no column 'answer'", second[1])
    first, second = ranks.outcomes(one_of_two, 2, tmp_path, "is killed")
    assert first.code == -signal.SIGKILL
    assert second.value[0] == wanted
    # The failure is told to those who waited, and to nobody else.
    failed = {**KEY, "turn": "fails"}
    assert_same(store_for(tmp_path / "cache", failed, some_samples), some_samples())


def on_ranks(folder: Path) -> list[Any]:
    """Rank 0 makes, slower than a collective may wait; then it fails; then it is killed."""
    world = World(Parallel()).open()
    world.timeout = 0.2  # seconds
    made: list[str] = []

    def make(turn: str) -> Iterator[Sample]:
        made.append(turn)
        time.sleep(0.5)
        if turn == "fails":
            raise ValueError("the source has no column 'answer'")
        if turn == "is killed":
            die()
        yield from some_samples()

    outcomes: list[Any] = []
    for turn in ("succeeds", "differs", "is refused", "fails", "is killed"):
        key = {**KEY, "turn": world.rank if turn == "differs" else turn}
        rebuild: Any = "never" if turn == "is refused" else "auto"
        try:
            store = store_for(
                folder, key, lambda turn=turn: make(turn), world=world, rebuild=rebuild
            )
            outcomes.append([one.ids.tolist() for one in store])
        except Exception as error:  # noqa: BLE001
            outcomes.append((type(error).__name__, str(error)))
        (folder / f"rank{world.rank}").write_text(json.dumps([made, outcomes]))
    os._exit(0)  # the group of the killed rank cannot be closed


def test_all_ranks_get_what_one_makes_or_why_it_failed(tmp_path: Path, ranks: Ranks) -> None:
    first, second = ranks.outcomes(on_ranks, 2, tmp_path, limit=50)
    assert (first.code, second.code) == (-signal.SIGKILL, 0)
    (made, here), (_, there) = (
        json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)
    )
    assert made == ["succeeds", "fails"]
    assert here[0] == there[0] == [one.ids.tolist() for one in some_samples()]
    assert here[1] == there[1]
    assert "from rank 0 to rank 1: turn: 0 -> 1" in here[1][1]
    assert here[2][0] == there[2][0] == "ConfigError"
    assert here[3] == ["ValueError", "the source has no column 'answer'"]
    assert there[3][0] == PeerError.__name__
    assert "rank 0 failed to make the samples: ValueError: the source has no" in there[3][1]
    assert there[4][0] == PeerError.__name__
    assert "another rank was lost" in there[4][1]
