"""What every test leaves behind: nothing. The shared builders are in `builders.py`."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading

import pytest
import torch
import tqdm
from hypothesis import settings

from budget import (  # noqa: F401  pytest's hooks
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
)
from paceline.testing.ranks import shared_ranks

torch.set_num_threads(1)
shared_ranks().preload.append("preloaded")
tqdm.tqdm.monitor_interval = 0  # no thread that watches progress bars
_TORCHS_THREADS = ("QueueFeeder", "ThreadPool", "pt_", "InductorSubproc")
_OTHERS_VARIABLES = ("PYTEST_", "TORCHINDUCTOR_", "TRITON_", "CUDA_MODULE_LOADING", "PYGAME_")


# What collecting the tests imports stays: nothing is looked for in it, now or later.
gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    gc.freeze()
    gc.enable()


# No test is timed: another process may take the machine at any moment.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def ranks():
    """Runs a function on several ranks: `ranks(function, size, *args)`, as `run_ranks` does."""
    yield shared_ranks()
    shared_ranks().close()


@pytest.fixture(autouse=True)
def _leaves_nothing_behind():
    """No thread, child process, signal handler or environment variable outlives a test."""
    threads = set(threading.enumerate())
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    environment = dict(os.environ)
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    left = [t.name for t in threading.enumerate() if t not in threads and t.is_alive()]
    left = [name for name in left if not name.startswith(_TORCHS_THREADS)]
    assert not left, f"threads left behind: {left}"
    assert not multiprocessing.active_children(), "processes left behind"
    for number, handler in handlers.items():
        assert signal.getsignal(number) is handler, f"a handler of {number} was left behind"
    changed = {
        key
        for key in {*environment, *os.environ}
        if environment.get(key) != os.environ.get(key) and not key.startswith(_OTHERS_VARIABLES)
    }
    assert not changed, f"environment variables changed: {changed}"
    assert torch.are_deterministic_algorithms_enabled() == deterministic
