"""A signal before training ends the command at once with 75: there is nothing to save."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from command import Paceline

# Where a command may be: importing the user's code, in a constructor that swallows whatever is
# raised, and in one that does not come back to the interpreter.
PLACES = {
    "import": 'open("here-import", "w").close(); time.sleep(60)',
    "swallows": """
class Swallows(Net):
    def __init__(self):
        super().__init__()
        open("here-swallows", "w").close()
        for _ in range(600):
            try:
                time.sleep(0.1)
            except BaseException:
                pass
""",
    "in C": """
class InC(Net):
    def __init__(self):
        super().__init__()
        open("here-in C", "w").close()
        hashlib.pbkdf2_hmac("sha512", b"", b"", 10**9)
""",
}
CLASSES = {"import": "Net", "swallows": "Swallows", "in C": "InC"}
SIGNALS = [("import", "SIGTERM"), ("import", "SIGHUP"), ("swallows", "SIGINT")]
SIGNALS += [("swallows", "SIGUSR2"), ("in C", "SIGUSR1"), ("in C", "SIGXCPU")]


def test_wherever_it_comes_the_command_leaves_within_two_seconds_with_one_line(
    paceline: Paceline, tmp_path: Path, wait_for: Callable[[str], Path]
) -> None:
    recipe = (tmp_path / "toy.yaml").read_text()
    for place, code in PLACES.items():
        text = (tmp_path / "toy.py").read_text() + "\nimport hashlib\nclass Net(nn.Linear):\n"
        text += "    def __init__(self):\n        super().__init__(1, 1)\n" + code
        (tmp_path / f"{CLASSES[place].lower()}.py").write_text(text)
        (tmp_path / f"{place}.yaml").write_text(
            recipe.replace("toy", CLASSES[place].lower()).replace(
                "torch.nn.Linear, in_features: 1, out_features: 1",
                f"{CLASSES[place].lower()}.{CLASSES[place]}",
            )
        )
    for place, name in SIGNALS:
        number = getattr(signal, name)
        command = paceline.start("train", f"{place}.yaml", f"run.name={name}")
        wait_for(f"here-{place}").unlink()
        sent = time.monotonic()
        command.signal(number)
        code, out, err = command.end()
        assert time.monotonic() - sent < 2
        assert (code, out) == (75, "")
        assert err == (
            f"paceline: {name} before training began: nothing to save; run the command again.\n"
        )
    assert not (tmp_path / "runs").exists()


SLOW_START = """
class SlowStart(Fit):
    def on_setup(self):
        open(f"setup{self.world.rank}", "w").close()
        time.sleep(60)
"""


@pytest.mark.parametrize("victims", [[1], [0, 1]], ids=["one", "both"])
def test_two_ranks_of_which_none_has_begun_leave_together(
    paceline: Paceline, tmp_path: Path, wait_for: Callable[[str], Path], victims: list[int]
) -> None:
    (tmp_path / "toy.py").write_text((tmp_path / "toy.py").read_text() + SLOW_START)
    command = paceline.start("train", "toy.yaml", "trainer._target_=toy.SlowStart", "--nproc", "2")
    for rank in (0, 1):
        wait_for(f"setup{rank}")
    sent = time.monotonic()
    for rank in victims:
        os.kill(command.pids[rank], signal.SIGTERM)
    ended = command.each()
    assert time.monotonic() - sent < 2
    assert [code for code, _, _ in ended] == [75, 75]
    assert "".join(err for _, _, err in ended).count("SIGTERM before training began") == 1
    assert not list(tmp_path.rglob("step_*"))


MEETING = """
def here(place):
    if os.environ.get("RANK") == os.environ.get("VICTIM") and os.environ["AT"] == place:
        if os.environ["HOW"] == "raises":
            raise ValueError("on purpose")
        os.kill(os.getpid(), 15)
        time.sleep(30)
here("import")
class Early(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)
        here("constructor")
"""


@pytest.mark.parametrize(
    ("victim", "at", "how"), [("0", "import", "signal"), ("1", "constructor", "raises")]
)
def test_a_rank_that_leaves_before_the_ranks_have_met_ends_the_other_with_its_code_and_one_line(
    paceline: Paceline, tmp_path: Path, victim: str, at: str, how: str
) -> None:
    (tmp_path / "toy.py").write_text((tmp_path / "toy.py").read_text() + MEETING)
    recipe = (tmp_path / "toy.yaml").read_text()
    (tmp_path / "early.yaml").write_text(
        recipe.replace("torch.nn.Linear, in_features: 1, out_features: 1", "toy.Early")
    )
    began = time.monotonic()
    command = paceline.start(
        *("train", "early.yaml", "--nproc", "2"),
        VICTIM=victim,
        AT=at,
        HOW=how,
    )
    ended = command.each()
    assert time.monotonic() - began < 8
    code, said = {
        "signal": (75, f"SIGTERM to rank {victim} before training began"),
        "raises": (2, f"rank {victim} failed before the ranks had met: RecipeError"),
    }[how]
    assert [each[0] for each in ended] == [code, code]
    other = ended[1 - int(victim)][2]
    assert said in other
    assert len(other.splitlines()) == 1
    assert not list(tmp_path.rglob("step_*"))


AFTER = """
class After(Fit):
    def on_teardown(self):
        if self.how == "exit":  # as the interpreter ends
            class Last:
                def __del__(self, kill=os.kill, pid=os.getpid()):
                    kill(pid, 15)
            sys.last = Last()
        if self.how == "thread":
            def late():
                time.sleep(1)
                os.kill(os.getpid(), 15)
                time.sleep(60)
            threading.Thread(target=late).start()
"""


def test_after_training_a_signal_leaves_at_once_or_lets_the_command_end(
    paceline: Paceline, tmp_path: Path
) -> None:
    """Given a complete run, when it is signalled, nobody kills it: 0 as it ends, else 75."""
    (tmp_path / "toy.py").write_text(
        "import threading\n" + (tmp_path / "toy.py").read_text() + AFTER
    )
    ended = {
        how: paceline.start(
            "train",
            "toy.yaml",
            "trainer._target_=toy.After",
            f"trainer.how={how}",
            f"run.name={how}",
        ).end()
        for how in ("exit", "thread")
    }
    assert (ended["exit"][0], ended["exit"][2]) == (0, "")
    assert (ended["thread"][0], ended["thread"][2]) == (
        75,
        "paceline: SIGTERM after training: nothing to save; run the command again.\n",
    )
