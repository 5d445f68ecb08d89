"""What `make check` runs: all that is not listed as slow, and something of every promise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import budget

FAST, SLOW = "tests/a/test_p01_x.py::test_fast", "tests/a/test_p01_x.py::test_slow"


@pytest.fixture(autouse=True)
def _listed(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "list.txt").write_text(f"# a line about it\n{SLOW}\ntests/gone.py::test_gone\n")
    monkeypatch.setattr(budget, "LIST", tmp_path / "list.txt")
    monkeypatch.setattr(budget, "BY_NAME", ())


def kept(*tests: str) -> list[str]:
    """The tests that are left of these."""
    items = [SimpleNamespace(nodeid=test) for test in tests]
    hook = SimpleNamespace(pytest_deselected=lambda items: None)
    config = SimpleNamespace(getoption=lambda name: name == "--fast", hook=hook)
    budget.pytest_collection_modifyitems(config, items)  # pyright: ignore[reportArgumentType]
    return [item.nodeid for item in items]


def test_what_is_listed_is_left_out_unless_it_is_in_by_name(monkeypatch) -> None:
    assert kept(FAST, SLOW) == [FAST]
    for name in (SLOW, "tests/a/"):
        monkeypatch.setattr(budget, "BY_NAME", (name,))
        assert kept(FAST, SLOW) == [FAST, SLOW]


def test_a_promise_without_a_fast_test_is_a_mistake() -> None:
    with pytest.raises(pytest.UsageError, match="no test of p01 is fast"):
        kept(SLOW, "tests/a/test_p02_y.py::test_fast")


def test_a_name_that_is_no_test_is_a_mistake(monkeypatch) -> None:
    """Among the files that are run: `pytest --fast tests/recipe` is right, too."""
    monkeypatch.setattr(budget, "BY_NAME", (f"{FAST}er", "tests/b/test_other.py::test_it"))
    with pytest.raises(pytest.UsageError, match=r"test_faster$"):
        kept(FAST)


def test_measuring_lists_what_was_slow_and_keeps_what_was_not_run(tmp_path) -> None:
    measured, lines = budget.Durations(), []
    for test, seconds in ((FAST, 9.0), (SLOW, 0.1)):
        report = SimpleNamespace(when="call", nodeid=test, duration=seconds)
        measured.pytest_runtest_logreport(report)  # pyright: ignore[reportArgumentType]
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/there.py").touch()
    with budget.LIST.open("a") as file:
        file.write("tests/there.py::test_of_a_file_that_was_not_run\n")
    config = SimpleNamespace(rootpath=tmp_path)
    measured.pytest_terminal_summary(SimpleNamespace(write_line=lines.append), config)  # pyright: ignore[reportArgumentType]
    listed = [FAST, "tests/there.py::test_of_a_file_that_was_not_run"]
    assert budget.LIST.read_text().splitlines()[1:] == listed
    assert "2 tests took 9 s, of which the 1 of `make check` took 0 s" in lines[0]
