"""What the broken trainers of `mutants.py` do in place of what is right."""

from __future__ import annotations

import pickle
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.checkpoint.policy import to_keep
from paceline.checkpoint.publication import discard, scan
from paceline.checkpoint.state import ModelForm
from paceline.data import loader
from paceline.data.fetch import Fetcher
from paceline.data.indexed import IndexedSource, IndexedValidation, Layout
from paceline.data.streamed import StreamedSource
from paceline.lm import attention
from paceline.lm.data import chat, factory
from paceline.lm.data.packing import PackedDataset
from paceline.lm.data.sample import IGNORED, Sample
from paceline.parallel.ddp import Replica
from paceline.recipe.components import Checker
from paceline.recipe.mistakes import Mistake, Mistakes
from paceline.rl.control.environment import Episodes
from paceline.rl.text import generate
from paceline.trackers.cursor import new_rows
from paceline.trainer import inference
from paceline.trainer.nonfinite import NonFiniteGuard
from paceline.trainer.optimization import Optimization
from paceline.trainer.settings import Resume
from paceline.trainer.source_code import OwnCode
from paceline.trainer.stop import StopAgreement
from paceline.trainer.window import Window, gradients_aside
from paceline.tune.reporting import TrialReports
from paceline.world import meeting
from paceline.world.seeding import seed_everything
from paceline.world.world import World

_present = Window.present


def nothing(*_: Any, **__: Any) -> None:
    """In place of something that matters."""


def none_of_them(*_: Any, **__: Any) -> tuple[()]:
    """In place of things that matter."""
    return ()


def same_weight(self: Any, j: int) -> Any:
    batch = _present(self, j)
    self.weight = 1 / len(self)
    return batch


def one_rank_s_weight(self: Any, j: int) -> Any:
    batch = _present(self, j)
    self.weight /= self._run.world.dp_size
    return batch


def mean_of_means(parts: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    names = {name for part in parts for name in part}
    means = {name: [p[name][0] / p[name][1] for p in parts if name in p] for name in names}
    return {name: sum(values) / len(values) for name, values in sorted(means.items())}


def unmuted(self: Any) -> None:
    self._held = []


def always_exchanged(self: Replica, *, exchange: bool) -> None:
    vars(self).update(called=False, require_backward_grad_sync=True)


def unreduced(self: World, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    return tensor


def keeps_gradients(self: Optimization, window: Window) -> None:
    self.guard.begin(window)


def zeros_for_frozen(self: Optimization, window: Window) -> None:
    _begin(self, window)
    for optimizer in self.optimizers.values():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)


_begin = Optimization.begin


def announces_openly(run: Any, window: Window) -> None:
    for hook in run.events.on_train_batch_start:
        hook(window.batch, window.batch_idx)


def floored(self: Layout, start: int, stop: int) -> tuple[int, int]:
    each = (stop - start) // self._ranks
    return start + self._rank * each, start + (self._rank + 1) * each


def padded(self: Layout, start: int, stop: int) -> tuple[int, int]:
    each = -(-(stop - start) // self._ranks)
    first = min(start + self._rank * each, stop - each)
    return first, first + each


def same_pass(self: Layout, epoch: int, start: int, stop: int) -> Any:
    length = self.order.length(0)
    return [
        (epoch, self.order.slice(epoch, i % length, i % length + 1)) for i in range(start, stop)
    ]


def one_stream_a_batch(self: Fetcher, key: int, indices: list[Any]) -> Any:
    seed_everything(key)
    return self.dataset.__getitems__(indices)


_local = count()


def by_local_count(seed: int) -> None:
    seed_everything(next(_local))


def with_stand_ins(self: IndexedValidation) -> Any:
    for batch in self._reader.read(0, 0):
        yield batch, -1


def own_position(self: IndexedSource) -> dict[str, int]:
    return {"epoch": self._epoch, "offset": self._offset // self._layout._ranks}


def unshared(order: Any, name: str, world: World) -> Any:
    return order


def keeps_share(sampler: Any) -> bool | None:
    return False if type(sampler) is loader.SequentialSampler else None


def unleveled(self: StreamedSource, batches: list[Any]) -> int:
    return len(batches)


def from_the_start(self: StreamedSource, batches: int) -> None:
    self._in_pass = batches


def own_end(self: StopAgreement, point: int, reason: str) -> None:
    self._stop_at, self.reason = self._committed, reason
    self._agreed.set()


def held_before(self: StopAgreement, point: int) -> None:
    if not self._frozen:
        self._committed = point - 1


def scaled_only(self: NonFiniteGuard, weighted: torch.Tensor, poison: Any) -> torch.Tensor:
    return weighted * (poison + 1)


def own_value(self: World, value: Any) -> Any:
    return value


def forgets_what_is_left(self: Any, pending: list[str]) -> None:
    self.progress.pending = []
    self._save(["stop"])
    self.source.close()
    self._run.stopped = True


def leaves_by_exception(self: Any, number: int, frame: Any) -> None:
    raise SystemExit(75)


def prunes_first(self: Any, hidden: Path, job: Any) -> None:
    for checkpoint in scan(self.folder)[0]:
        discard(checkpoint.path, self._disk)
    self._disk.make_folders(self.folder)
    self._disk.remove(hidden)
    self._disk.mkdir(hidden)


def unpickled(path: Path) -> Any:
    return pickle.loads(path.read_bytes())  # noqa: S301  which is the defect


def in_order(here: dict[str, Any], stored: dict[str, Any]) -> dict[str, str]:
    return dict(zip(here, stored, strict=False))


def leaves_modes(self: ModelForm, model: Any, changes: dict[str, Any]) -> None:
    modes = {name: module.training for name, module in model.named_modules()}
    _switch(self, model, {**changes, "modes": modes})


_switch = ModelForm.switch


def drops_newest(policy: Any, checkpoints: Any, also: Any = (), **others: Any) -> set[int]:
    newest = max(checkpoints, key=lambda checkpoint: checkpoint.save_id)
    keep = to_keep(policy, checkpoints, also, **others)
    return keep if newest.best else keep - {newest.save_id}


def goes_backward_openly(self: Optimization, only: Any, loss: torch.Tensor) -> None:
    with gradients_aside(o for name, o in self.optimizers.items() if name not in only):
        loss.backward()


def always(*_: Any, **__: Any) -> bool:
    return True


def never(*_: Any, **__: Any) -> bool:
    return False


def unchanged(value: Any) -> Any:
    return value


def first_only(self: Mistakes, path: Any, text: str, *_: Any, **__: Any) -> None:
    self.count += 1
    if not self.found:
        self.found.append(Mistake(path, text))


def no_marks(composed: Any) -> dict[Any, str]:
    return {}


def as_it_is(value: Any, hint: Any) -> Any:
    return value


def built_at_once(self: Checker, *args: Any, **kwargs: Any) -> Any:
    component = _call(self, *args, **kwargs)
    if component is not None and component.kind.name == "dataset":
        component.target(**component.kwargs)
    return component


_call = Checker.call


def unsaid(order: Any, loader: Any, plan: list[tuple[str, str]]) -> Any:
    return _trimmed(order, loader, [])


_trimmed = loader._trimmed


def rows_of(self: Any, batch: Any) -> int:
    return len(batch["labels"])


def one_document_a_row(*args: Any) -> list[list[int]]:
    return [[sum(row)] for row in _checked(*args)]


_checked = attention._checked


def found_in_the_text(template: Any, messages: Any, text: str, roles: Any) -> Any:
    spans = []
    for message in messages:
        if message["role"] in roles:
            start = text.find(message["content"])
            stop = start + len(message["content"]) + len(template.tokenizer.eos_token)
            spans.append((start, stop))
    return spans


def without_pad_ids(template: Any, *args: Any) -> Sample:
    sample = _encode(template, *args)
    masked = np.where(sample.ids == template.tokenizer.pad_token_id, IGNORED, sample.labels)
    return Sample(sample.ids, masked)


_encode = chat._encode


def with_first_labels(self: PackedDataset, index: int) -> dict[str, Any]:
    row = _row(self, index)
    parts = [self.samples[n].labels[start:stop] for n, start, stop in self.packs[index]]
    return {**row, "labels": torch.from_numpy(np.concatenate(parts)).long()}


_row = PackedDataset.__getitem__


def key_without_template(tokenizer: Any) -> dict[str, Any]:
    return {name: each for name, each in _key(tokenizer).items() if name != "template"}


_key = factory.tokenizer_key


def no_code(roots: Any) -> OwnCode:
    return OwnCode({}, {}, [])


def not_looked_at(loader: Any) -> tuple[None, str]:
    return None, "nobody has looked"


def latest(run_dir: Any, checkpoint: Any) -> Any:
    return _look_up(run_dir, None)


_look_up = inference._look_up


def waits_for_all(store: Any, rank: int, size: int, timeout: Any) -> str:
    store.set(f"here/{rank}", "")
    meeting._await(store, [f"here/{other}" for other in range(size)], timeout.total_seconds())
    return meeting._MET


def takes_any_answer(store: Any, rank: int, size: int, timeout: Any) -> str:
    if rank:
        store.wait([f"answer/{rank}"], timeout)
        return store.get(f"answer/{rank}").decode().partition(" ")[2]
    return _name_of_this_start(store, rank, size, timeout)


_name_of_this_start = meeting._name_of_this_start


def one_item(algorithm: Any, batch: Any) -> int:
    """Counts each batch as one, however many tokens it has."""
    return 1


def on_policy(cls: Any) -> Any:
    """A loss in which the old log-probabilities are the present ones."""
    healthy = cls._loss

    def loss(algorithm: Any, logps: Any, old: Any, *others: Any) -> Any:
        return healthy(algorithm, logps, logps.detach(), *others)

    return loss


def without_the_last_row(path: Any, place: Any) -> Any:
    """What a tracker is to be sent, but for a row."""
    rows, after = new_rows(path, place)
    return rows[:-1], after


def unclipped(shifts: Any, advantages: Any, *_: Any) -> Any:
    """The loss of a ratio that nothing clips."""
    return -shifts.exp() * advantages


_left_padded = generate._left_padded
_noise = generate._noise
_step_of_episodes = Episodes.step
_seed_of_episode = Episodes._seed_of


def right_padded(texts: Any, pad_id: int) -> Any:
    ids, mask = (part.flip(1) for part in _left_padded(texts, pad_id))
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text)
    return ids, mask


def masked_by_pad_id(texts: Any, pad_id: int) -> Any:
    ids, _ = _left_padded(texts, pad_id)
    return ids, (ids != pad_id).long()


def with_bos(texts: Any, pad_id: int) -> Any:
    return _left_padded([(1, *text) for text in texts], pad_id)


def one_noise(requests: Any, sampling: Any) -> Any:
    """The first completion's random numbers for all."""
    drawn = _noise(requests, sampling)
    return drawn[:1].expand_as(drawn).contiguous()


def tokenised_again(system: Any, turn: Any) -> Any:
    """Token ids of the texts, whatever was sampled."""
    context = system.tokenizer(turn.context)["input_ids"]
    probe = system.tokenizer(str(turn.probe).replace("#", ""), add_special_tokens=False)
    return np.asarray(context), np.asarray(probe["input_ids"])


def resets_are_steps(episodes: Any, actions: Any) -> Any:
    outcome = _step_of_episodes(episodes, actions)
    return outcome._replace(valid=np.ones_like(outcome.valid))


def cut_off_is_over(episodes: Any, actions: Any) -> Any:
    """A time limit taken for an end of the episode's own."""
    outcome = _step_of_episodes(episodes, actions)
    return outcome._replace(terminated=outcome.terminated | outcome.truncated)


def same_on_each_rank(episodes: Any, i: int) -> Any:
    """The seed of an episode from the environment's number on its rank."""
    first, episodes.first = episodes.first, 0
    try:
        return _seed_of_episode(episodes, i)
    finally:
        episodes.first = first


def own_prompts(sampler: Any, prompts: Any, attempts: Any = None) -> Any:
    """An evaluation on the prompts of the training."""
    return sampler.rollouts(range(len(prompts)))


def begun_again(mode: str) -> Any:
    """A trial that goes on moves its run aside."""
    return Resume("fresh")


_on_metrics_of_reports = TrialReports.on_metrics


def heard_by_rank_0_alone(reports: Any, trainer: Any, metrics: Any) -> None:
    """The pruner's verdict stays on the rank that asked."""
    _on_metrics_of_reports(reports, trainer, metrics)
    reports._verdict = reports._verdict and trainer.world.is_main
