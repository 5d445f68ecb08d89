"""Keeps non-finite values from the weights, and reports where they came from."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from paceline.checkpoint import encode
from paceline.data.batches import describe
from paceline.errors import NonFiniteError, StateError
from paceline.log.files import shown
from paceline.trainer.run import KeptBuffers, Run
from paceline.trainer.window import Window
from paceline.world.dtensors import dense_part, whole

KEPT = "nonfinite_step_"  # of a folder's name, before the step and "_rank_N"
_REMEMBERED = 4096  # windows whose samples can still be named when a device's verdict is read


class NonFiniteGuard:
    """The finite check of each window and the policy when it fails.

    Args:
        run: at hand; its settings give the policy (`on_nonfinite`).
        optimizers: how many take part in a window.

    Attributes:
        window: the window at hand.
        replayed: the folder of the run that is taken once more, which has kept its failures; else
            None.

    On several replicas each decision follows from the exchanged gradients alone, which are the same
    on all of them: a rank that finds a bad loss makes its gradients NaN, whatever the model does to
    a NaN on its way (a ReLU stops it), and so the others' too. Ranks that share a copy see other
    gradients each: a parameter of which all have a part tells them. Where there is none, or several
    models or optimizers are spread, or modules are split, it takes one tiny exchange a window.
    """

    def __init__(self, run: Run, *, optimizers: int) -> None:
        policy = run.settings.on_nonfinite
        self._run = run
        self._world = run.world
        self._parallel = run.world.parallel
        self._replicas = run.placement.replicas
        self._optimizers = optimizers
        self.window: Window | None = None
        self._read = run.world.reads_are_free
        self._ranks = run.world.size
        self._found: dict[str, Any] | None = None  # what this rank saw in this window
        self._norm_bad = False
        self._flag: torch.Tensor | None = None  # on the device: bad in this window
        self._bad_step: torch.Tensor | None = None  # on the device: the first bad step, or -1
        self._unread: deque[tuple[int, Callable[[], list[Any]]]] = deque(maxlen=_REMEMBERED)
        self._kept: tuple[Path, str] | None = None
        self._not_kept = ""  # why
        self.replayed: Path | None = None
        self._keeps_buffers = policy in ("stop", "skip")
        self._buffers: KeptBuffers | None = None  # before this window: statistics move in forward

    def begin(self, window: Window) -> None:
        """A new window."""
        self.window = window
        self._found, self._norm_bad, self._flag = None, False, None
        if not self._read:
            self._unread.append((self._run.global_step, window.locator()))
        if self._keeps_buffers:
            self._buffers = KeptBuffers(self._run)

    @property
    def _at_hand(self) -> Window:
        assert self.window is not None
        return self.window

    @property
    def found(self) -> dict[str, Any] | None:
        """What is not finite in this window, on this rank or in another replica group."""
        return self._found

    def add_found(self, found: dict[str, Any]) -> None:
        """Takes what another replica group has found in its part of this window."""
        if self._found is None:
            self._found = found

    def guarded(self, weighted: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Looks at a micro-batch's loss; returns what to send backward, NaN if it is bad.

        Args:
            weighted: the loss as weighted for the window.
            loss: the loss as it came, detached.
        """
        if self._read:
            value = loss.item()
            if math.isfinite(value):
                return weighted
            self._note({"loss": value})
            return self._poisoned(weighted, math.nan) if self._ranks > 1 else weighted
        weight = self._at_hand.weight
        if isinstance(weight, torch.Tensor):
            loss = torch.where(weight == 0, 0.0, loss)
        clean = loss - loss  # zero, or NaN if the loss is not finite
        self._raise_flag(clean.isnan())
        # The other ranks, and a scaler, learn of it from the gradients alone.
        told = self._ranks > 1 or self._run.scaler is not None
        return self._poisoned(weighted, clean) if told else weighted

    def _poisoned(self, weighted: torch.Tensor, poison: torch.Tensor | float) -> torch.Tensor:
        """Makes a loss NaN, or leaves it; the replica that was called informs the other ranks."""
        called: list[Any] = [replica for replica in self._replicas if replica.called]
        weighted = weighted * (poison + 1)
        # Of several, not every one need take part in this loss.
        if len(called) == 1:
            called[0].attach(poison)
        return weighted

    def read_at_once(self) -> None:
        """From now on values are read as they come: an optimizer reads the losses itself.

        Raises:
            NonFiniteError: an earlier step was bad and the policy is "raise".
        """
        if not self._read:
            self.read()
            self._read = True

    def note_norm(self, norm: torch.Tensor) -> None:
        """Takes a gradient norm that somebody has computed (clipping, a gradient monitor)."""
        if self._run.scaler is not None:
            return  # the scaler's own search for a scale; it skips such steps itself
        if not self._read:
            self._raise_flag(~torch.isfinite(norm))
        elif not math.isfinite(value := norm.item()):
            self._norm_bad = True
            self._note({"grad_norm": value})

    def check_norm(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the norm of an optimizer's gradients for this check alone."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.note_norm(self._run.placement.norm_of(gradients))

    def allows(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer may step; with policy "raise" a bad window ends here.

        Raises:
            NonFiniteError: the window is bad and the policy is "raise".
        """
        if not self._read:
            return self._mask(optimizer)
        if self.window is not None and self.window.discarded:
            return False
        if self._ranks == 1:
            if self._found is None:
                return True
            self._discard([self._found])
            return False
        if not self._is_bad_anywhere():
            return True
        found = [f for f in self._world.all_gather_object(self._found) if f is not None]
        if not found and self._run.scaler is not None:
            return True  # an overflow: the scaler skips the step by itself
        self._discard(found)
        return False

    def read(self) -> None:
        """Reads the device's verdict, with a row or before a checkpoint.

        Raises:
            NonFiniteError: a step was bad and the policy is "raise".
        """
        step = -1 if self._bad_step is None else int(self._bad_step.item())
        if self._ranks > 1 and self._run.scaler is not None:
            # With a scaler the gradients do not tell: an infinite one may be an overflow.
            steps = self._world.all_gather_object(step)
            step = min((each for each in steps if each >= 0), default=-1)
        samples = [locate() for at, locate in self._unread if at == step]
        self._unread.clear()
        if step < 0:
            return
        self._bad_step = None
        message = f"the loss or gradient of step {step + 1} is not finite"
        for ids in samples:
            rank = self._world.rank
            message += f"; rank {rank} had the samples {ids} (a list a micro-batch)"
            self._keep(step, ids, None)
        self._act(message, step)

    def _note(self, what: dict[str, Any]) -> None:
        window = self._at_hand
        if self._found is None:
            self._found = {
                **what,
                "rank": self._world.rank,
                "batch_idx": window.batch_idx,
                "samples": window.ids(),
                "batch": describe(window.batch),
            }
            self._keep(self._run.global_step, self._found["samples"], window.batch)

    def _is_bad_anywhere(self) -> bool:
        verdicts = self._verdicts()
        if self._parallel.partitions_state and not verdicts:
            return self._world.any(self._found is not None or self._norm_bad)
        self._check_heard(bad=self._found is not None)
        return self._norm_bad or any(map(bool, verdicts))

    def _verdicts(self) -> list[torch.Tensor]:
        """Whether the exchanged gradients tell of a NaN, as on all ranks; empty if they cannot.

        Another optimizer's backward pass leaves a spread model's gradients as they were, and under
        a scaler a rank's part of a sum may overflow to NaN by itself.
        """
        replicas: list[Any] = self._replicas
        alone = len(replicas) == self._optimizers == 1
        scales = self._run.scaler is not None
        if self._parallel.pipeline > 1:
            return []  # of which each has gradients of its stage alone
        if self._parallel.partitions_state and (scales or not alone):
            return []
        found = (replica.verdict() for replica in replicas)
        return [verdict for verdict in found if verdict is not None]

    def _check_heard(self, *, bad: bool | torch.Tensor) -> None:
        """Ends a run in which a bad loss would stay this rank's secret.

        Raises:
            NonFiniteError: the other ranks do not know of this rank's.
        """
        if not all(replica.delivered for replica in self._replicas) and bool(bad):
            raise NonFiniteError(
                f"step {self._run.global_step + 1}: the loss of rank "
                f"{self._world.rank} is not finite, and a backward pass that leaves out "
                "parts of the model kept it from the other ranks."
            )

    def _discard(self, seen: list[dict[str, Any]]) -> None:
        self._at_hand.discarded = True
        models = self._run.components.named_models()
        parameter = _first_bad_gradient(models)
        step = self._run.global_step
        lines = [f"step {step + 1} is not finite; the weights are as they were before it."]
        for f in seen:
            value = f"loss {f['loss']}" if "loss" in f else f"gradient norm {f['grad_norm']}"
            lines.append(
                f"  rank {f['rank']}, batch {f['batch_idx']}: {value}; samples {f['samples']}; "
                f"batch {f['batch']}"
            )
        if parameter is not None:
            lines.append(f"  first parameter with a non-finite gradient: {parameter}")
        for model in models.values():
            model.zero_grad()
        if self._buffers is not None:
            self._buffers.put_back()
        self._act("\n".join(lines), step)

    def _act(self, message: str, step: int) -> None:
        policy = self._run.settings.on_nonfinite
        kept = self._kept_note()
        if policy == "raise":
            raise NonFiniteError(
                f"{message}{kept}\non_nonfinite='raise': set 'skip', 'rewind' or 'stop'."
            )
        self._world.say(f"{message}{kept}\non_nonfinite={policy!r}")
        if policy == "stop":
            self._run.stop.request("non-finite", everywhere=True)
        elif policy == "rewind":
            self._run.request_rewind(step)

    def _raise_flag(self, bad: torch.Tensor) -> None:
        bad = bad.detach().reshape(()).to(self._run.device)
        self._flag = bad if self._flag is None else self._flag | bad

    def _mask(self, optimizer: torch.optim.Optimizer) -> bool:
        """Leaves the verdict on the device; an optimizer that cannot be masked there is asked."""
        run = self._run
        verdicts = self._verdicts() if run.scaler is None else []
        for verdict in verdicts:
            self._raise_flag(verdict)
        if self._flag is None:  # no loss of this window had an item
            self._flag = torch.zeros((), dtype=torch.bool, device=run.device)
        if verdicts:
            self._check_heard(bad=self._flag)
        elif self._parallel.partitions_state:
            self._flag = self._world.all_reduce(self._flag.float(), "max") > 0
        if self._bad_step is None:
            self._bad_step = torch.full_like(self._flag, -1, dtype=torch.int64)
        first = self._flag & (self._bad_step < 0)
        self._bad_step = torch.where(first, run.global_step, self._bad_step)
        # After a bad step nothing moves until the verdict is read, unless the policy is to skip it.
        sticky = self._flag if run.settings.on_nonfinite == "skip" else self._bad_step >= 0
        if self._buffers is not None:
            self._buffers.put_back(sticky)
        if run.scaler is not None:
            return True
        offloaded = self._parallel.cpu_offload  # it steps on the host, and waits for the device
        if is_fused(optimizer) and not _makes_momentum(optimizer) and not offloaded:
            optimizer.found_inf = sticky.float()  # pyright: ignore[reportAttributeAccessIssue]
            return True
        return not bool(sticky)

    def _keep(self, step: int, samples: list[Any], batch: Any) -> None:
        """Keeps a bad window's samples in the run's folder, and the batch if it is at hand."""
        run_dir = self.replayed or self._run.settings.run_dir
        if run_dir is None:
            return
        folder = run_dir / f"{KEPT}{step + 1}_rank_{self._world.rank}"
        if self.replayed is not None:
            what = "batch" if (folder / "batch.json").exists() else "samples"
            self._kept = (folder, what) if folder.is_dir() else None
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "samples.json").write_text(json.dumps(samples, default=str))
            with_batch = batch is not None and _write_batch(batch, folder)
        except (OSError, SafetensorError) as error:  # not in place of the error that is under way
            self._not_kept = f"\n  nothing is kept in {folder} ({error})"
        else:
            self._kept = folder, "batch" if with_batch else "samples"

    def _kept_note(self) -> str:
        """Where this rank has kept its part, and how any rank's is taken once more."""
        note, folder = "", self.replayed or self._run.settings.run_dir
        if self._kept is not None:
            kept, what = self._kept
            note = f"\n  the {what} {'are' if what == 'samples' else 'is'} kept in {kept}"
        elif self._not_kept or self._ranks == 1:
            return self._not_kept
        if folder is not None and self._run.settings.resolved_recipe is not None:
            run_dir = shown(folder)
            ranks = f" --nproc {self._ranks}" if self._ranks > 1 else ""
            note += (
                "\n  which module it comes from: "
                f"paceline train {run_dir}/recipe.yaml --replay-failure {run_dir}{ranks}"
            )
        return note


def kept_failures(run_dir: Path) -> dict[int, list[int]]:
    """The steps of a run that were not finite, with the ranks that have found it.

    Args:
        run_dir: the run's folder, which is only read.
    """
    steps: dict[int, list[int]] = {}
    for folder in sorted(run_dir.glob(f"{KEPT}*_rank_*")):
        step, _, rank = folder.name.removeprefix(KEPT).partition("_rank_")
        if step.isdecimal() and rank.isdecimal():
            steps.setdefault(int(step), []).append(int(rank))
    return steps


def _write_batch(batch: Any, folder: Path) -> bool:
    """Keeps a batch: tensors as safetensors, the rest as JSON."""
    try:
        tensors, skeleton = encode({"batch": batch})
    except StateError:
        return False  # objects of the user's own: the sample ids name the batch
    save_file(tensors, folder / "batch.safetensors")
    (folder / "batch.json").write_text(json.dumps(skeleton))
    return True


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer heeds `found_inf` on the device."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _makes_momentum(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the next step is the one in which fused SGD allocates its momentum.

    torch 2.13 allocates it without values and leaves it so if that step is masked.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return False
    return any(
        group["momentum"]
        and not any("momentum_buffer" in optimizer.state.get(p, ()) for p in group["params"])
        for group in optimizer.param_groups
    )


def _first_bad_gradient(models: Mapping[str, torch.nn.Module]) -> str | None:
    for model_name, model in models.items():
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not _is_finite(parameter.grad):
                return f"{model_name}.{name}"
    return None


def _is_finite(gradient: torch.Tensor) -> bool:
    return bool(whole(torch.isfinite(dense_part(gradient)).all()))
