"""Which checkpoint to resume from, and what may have changed since."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from paceline.checkpoint import Checkpoint, CheckpointEngine
from paceline.checkpoint.engine import engine_of
from paceline.data.source import Source
from paceline.errors import CheckpointError, ConfigError, ResumeError
from paceline.log.run_record import RUN_FILE, read_run
from paceline.reading import patiently
from paceline.trainer.base import TrainerBase
from paceline.trainer.identity_keys import FIRST_PARTS, READ_OFF, Identity
from paceline.trainer.settings import Resume
from paceline.world.environment import began_before_restart
from paceline.world.world import World

_MOST = 6  # keys that a message names in the call that accepts them
_GLOBAL_BATCH = "data.global_batch_size"


def after_restart(asked: Resume, run_dir: Path | None, world: World) -> Resume:
    """The resume mode after a launcher restarted this process.

    What was asked for ("fresh", "must", a path) was done before the restart; now the run resumes.

    Args:
        asked: by the user.
        run_dir: the run's folder.
        world: the ranks.

    Raises:
        UnreadableError: the run's record could not be read.
    """
    begun = False
    if run_dir is None or asked.mode == "auto":
        return asked
    with contextlib.suppress(OSError, ValueError, AttributeError):
        record = patiently(partial(read_run, run_dir))
        begun = began_before_restart(record.get("environment") or {})
    # Of several machines' launchers, only that of the rank that failed has counted a restart.
    begun = any(world.all_gather_object(begun))
    return replace(asked, mode="auto") if begun else asked


def kept_global_batch_size(
    run_dir: Path | None, resume: Resume, loader: Any, accumulation: int
) -> int | None:
    """Samples of all ranks in a step, where settings that say it for each rank are unchanged.

    So a run resumed with another number of ranks sees the same samples in each step.

    Args:
        run_dir: the run's folder.
        resume: the resume mode.
        loader: the training loader.
        accumulation: the setting `gradient_accumulation_steps`.

    Returns:
        What the run's newest checkpoint says; None if the settings are to decide.

    Raises:
        ConfigError: nothing here has registered the engine that wrote the run's checkpoints.
    """
    if run_dir is None or resume.mode == "fresh" or _accepted(_GLOBAL_BATCH, resume.accept):
        return None
    engine = engine_of(run_dir)
    found = engine.scan(run_dir / "checkpoints")[0] if engine is not None else []
    window = found[-1].info.get("window") if found else None
    if not isinstance(window, dict) or window.get("as set") != _as_set(loader, accumulation):
        return None
    size = window.get("global_batch_size")
    return size if isinstance(size, int) and size > 0 else None


def window_info(source: Source, loader: Any, accumulation: int) -> dict[str, Any]:
    """What `kept_global_batch_size` reads, for a checkpoint's manifest.

    Args:
        source: the training data.
        loader: the training loader.
        accumulation: the setting `gradient_accumulation_steps`.
    """
    size = source.identity.get("global_batch_size")
    return {"as set": _as_set(loader, accumulation), "global_batch_size": size}


def _as_set(loader: Any, accumulation: int) -> list[int]:
    return [getattr(loader, "batch_size", None) or 1, accumulation]


def horizon(trainer: TrainerBase) -> dict[str, int | None]:
    """Where the run ends; may grow at resume."""
    return {"epochs": trainer.epochs, "max_steps": trainer.max_steps}


@dataclass(frozen=True)
class Comparison:
    """What differs between a run and a checkpoint.

    Attributes:
        accepted: the keys that differ and may.
        refused: those that may not, each with what it was then and is now.
        unknown: the parts that only one of both knows, which could not be compared.
        weights_say_more: whether what is refused is read off models, code and samples alone, so
            that names and shapes of weights that do not fit say more of it.
    """

    accepted: list[str]
    refused: dict[str, tuple[str, str]]
    unknown: list[str]
    weights_say_more: bool

    def check(self) -> None:
        """Raises ResumeError, listing every key that may not differ but does."""
        if not self.refused:
            return
        lines = [f"{key}: {old} then, {new} now" for key, (old, new) in self.refused.items()]
        names = list(self.refused)[:_MOST]
        flags = " ".join(f"--accept {name}" for name in names)
        hint = ""
        if any(key.startswith("code.") for key in self.refused):
            hint = "\nThe code that has trained it until now is in the run's folder, in code."
        raise ResumeError(
            "this run cannot resume with other settings than it began with:\n  "
            + "\n  ".join(lines)
            + "\nPut them back, start anew beside the old run (another run_dir), move the old run "
            f"aside (resume='fresh', --fresh), or accept the change (Resume(accept="
            f"{tuple(names)!r}), {flags}).{hint}"
        )


def compare(
    now: Identity, horizon: dict[str, int | None], stored: dict[str, Any], resume: Resume
) -> Comparison:
    """Compares a run with a checkpoint's settings.

    Args:
        now: the run's identity.
        horizon: where it ends.
        stored: the checkpoint's state tree.
        resume: with the keys that may differ.
    """
    then, parts = stored["identity"], stored.get("identity_parts")
    if parts is None:  # of a version that knew no more
        parts = {name: [] for name in FIRST_PARTS}
    unknown = parts.keys() ^ now.parts.keys()
    left_out = {key for name in unknown for key in (*parts.get(name, ()), *now.parts.get(name, ()))}
    changed = {
        key: (_shown(then, key), _shown(now.keys, key))
        for key in {**then, **now.keys}
        if key not in left_out and then.get(key) != now.keys.get(key)
    }
    for key, value in horizon.items():
        before = stored["horizon"][key]
        if value is not None and before is not None and value < before:
            changed[key] = (repr(before), repr(value))
    accepted = [key for key in changed if _accepted(key, resume.accept)]
    refused = {key: values for key, values in changed.items() if key not in accepted}
    read_off = {
        key
        for name, keys in (*parts.items(), *now.parts.items())
        if name.startswith(READ_OFF)
        for key in keys
    }
    return Comparison(accepted, refused, sorted(unknown), refused.keys() <= read_off)


def _shown(identity: dict[str, Any], key: str) -> str:
    return repr(identity[key]) if key in identity else "nothing"


def _accepted(key: str, accept: tuple[str, ...]) -> bool:
    return any(key == name or key.startswith(name + ".") for name in accept)


def _copied(saver: CheckpointEngine, wanted: Path, resume: Resume) -> Checkpoint:
    """A checkpoint that was copied to a place of the user's own, for this run or for a new folder.

    Raises:
        ConfigError: it is none, or the run's folder holds another run's.
    """
    found, problem, own = None, "", saver.list()
    if saver.world.is_main:
        try:
            if (wanted.parents[1] / RUN_FILE).exists():
                problem = f", but of the run in {wanted.parents[1]}"
            else:
                found = saver.verify(wanted)
        except (CheckpointError, OSError) as error:
            problem = f" ({error})"
    found, problem = saver.world.broadcast_object((found, problem))
    if found is None or any(c.info.get("run_id") != found.info.get("run_id") for c in own):
        raise ConfigError(
            f"resume={resume.mode!r} is no checkpoint of this run{problem}; there is: "
            f"{', '.join(c.path.name for c in own) or 'none'}. To resume a copy of one, give a "
            "run_dir that holds no other run; to start from another run's weights, use init_from."
        )
    return found


def find(saver: CheckpointEngine | None, resume: Resume, run_dir: Path | None) -> Checkpoint | None:
    """The checkpoint to resume from, or None to start.

    Args:
        saver: of the run's folder; None if nothing is written.
        resume: what the user asked for.
        run_dir: the run's folder, for messages.

    Raises:
        ConfigError: `resume` says "must" and there is none, or "never" and there is one.
    """
    if saver is None:
        return None
    saver.recover()
    if resume.path is not None:
        wanted = resume.path.resolve()
        found = next((c for c in saver.list() if c.path.resolve() == wanted), None)
        return found or _copied(saver, wanted, resume)
    found = saver.newest()
    if found is None and resume.mode == "must":
        raise ConfigError(f"resume='must': {run_dir} holds no intact checkpoint.")
    if found is not None and resume.mode == "never":
        raise ConfigError(
            f"resume='never': {run_dir} holds a run already (step {found.step}). Choose "
            "another run_dir, resume it (resume='auto'), or move it aside (resume='fresh')."
        )
    return found
