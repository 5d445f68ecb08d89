"""What users' own objects say of themselves, and a resumed run must find unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    RandomSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from paceline import Callback, HasRunIdentity, Parallel, Resume, Trainer
from paceline.errors import ConfigError, ResumeError
from paceline.testing import Ranks, StopAt
from small import batches, fitted, line, message, points


class Says:
    """Says one thing of itself; the mix-in of everything below."""

    said: Any = 1

    def run_identity(self) -> dict[str, Any]:
        return {"what": self.said}


class Tokenizer(Says):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Corpus(Says, TensorDataset): ...


class Order(Says, RandomSampler): ...


class Batches(Says, BatchSampler): ...


class Collate(Says):
    def __call__(self, samples: list[Any]) -> Any:
        return default_collate(samples)


class Loss(Says, nn.MSELoss): ...


class Net(Says, nn.Linear): ...


class SGD(Says, torch.optim.SGD): ...


class Decay(Says, torch.optim.lr_scheduler.StepLR): ...


class Augment(Says, Callback): ...


class Stream(Says):
    def __iter__(self) -> Iterator[Any]:
        return iter(batches())


class Own(Says, Trainer): ...


class Reads(Trainer):
    tokenizer = Tokenizer()

    @property
    def checkpoint_objects(self) -> Any:
        return {"tokenizer": self.tokenizer}


def saying(thing: Any, said: Any) -> Any:
    thing.said = said
    return thing


def corpus(said: Any) -> Corpus:
    return saying(Corpus(*points().tensors), said)


def read(**options: Any) -> dict[str, Any]:
    return {"train_dataloader": DataLoader(options.pop("dataset", points()), 4, **options)}


def tokenizer(said: Any) -> dict[str, Any]:
    return {"kind": type("Reads", (Reads,), {"tokenizer": saying(Tokenizer(), said)})}


def batch_sampler(said: Any) -> dict[str, Any]:
    sampler = saying(Batches(RandomSampler(points()), 4, drop_last=False), said)
    return {"train_dataloader": DataLoader(points(), batch_sampler=sampler)}


def optimizer(said: Any) -> dict[str, Any]:
    model = line()
    return {"model": model, "optimizer": saying(SGD(model.parameters(), lr=0.1), said)}


def scheduler(said: Any) -> dict[str, Any]:
    model = line()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = saying(Decay(sgd, 2), said)
    return {"model": model, "optimizer": sgd, "lr_scheduler": schedule}


SPEAKERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "trainer.what": lambda said: {"kind": type("Own", (Own,), {"said": said})},
    "loss_fn.what": lambda said: {"loss_fn": type("Loss", (Loss,), {"said": said})()},
    "data.what": lambda said: {"train_dataloader": saying(Stream(), said)},
    "data.dataset.what": lambda said: read(dataset=corpus(said)),
    "data.sampler.what": lambda said: read(sampler=saying(Order(points()), said)),
    "data.batch_sampler.what": batch_sampler,
    "data.collate_fn.what": lambda said: read(collate_fn=saying(Collate(), said)),
    "validation.dataset.what": lambda said: {"val_dataloader": DataLoader(corpus(said), 4)},
    "validation.near.dataset.what": lambda said: {
        "val_dataloader": {"near": DataLoader(corpus(said), 4), "far": batches()}
    },
    "models.model.what": lambda said: {"model": saying(Net(3, 1), said)},
    "optimizer.what": optimizer,
    "lr_scheduler.what": scheduler,
    "callbacks.Augment.what": lambda said: {"callbacks": [saying(Augment(), said)]},
    "objects.tokenizer.what": tokenizer,
}


@pytest.mark.parametrize("key", SPEAKERS)
def test_what_an_object_says_of_itself_must_be_the_same(key: str, tmp_path: Path) -> None:
    def run(said: Any, *callbacks: Callback, resume: Resume | None = None) -> Trainer:
        changes = SPEAKERS[key](said)
        changes["callbacks"] = [*changes.get("callbacks", ()), *callbacks]
        resume = resume or Resume()
        return fitted(run_dir=tmp_path, resume=resume, epochs=1, **changes)

    run(("bpe", 1), StopAt(2))
    with pytest.raises(ResumeError) as caught:
        run(("bpe", 2))
    assert f"\n  {key}: ['bpe', 1] then, ['bpe', 2] now\n" in str(caught.value)
    assert f"--accept {key}" in str(caught.value)
    assert run(("bpe", 2), StopAt(3), resume=Resume(accept=(key,))).global_step == 3
    assert run(["bpe", 2]).result.complete  # a list as a tuple


def test_torchs_own_datasets_pass_on_what_theirs_say(tmp_path: Path) -> None:
    def run(first: Any, second: Any) -> None:
        parts = [Subset(corpus(first), range(10)), Subset(Subset(corpus(second), range(9)), [1])]
        fitted(run_dir=tmp_path, callbacks=[StopAt(1)], **read(dataset=ConcatDataset(parts)))

    run("a", "b")
    with pytest.raises(ResumeError, match=r"data.dataset.1.what: 'b' then, 'c' now"):
        run("a", "c")


def test_what_is_said_for_the_first_time_and_what_no_longer_is(tmp_path: Path) -> None:
    def run(dataset: Any, *accept: str, stop: int) -> Trainer:
        resume = Resume(accept=accept)
        callbacks = [StopAt(stop)]
        return fitted(run_dir=tmp_path, resume=resume, callbacks=callbacks, **read(dataset=dataset))

    run(points(), stop=1)
    with pytest.raises(ResumeError, match=r"data.dataset.what: nothing then, 3 now"):
        run(corpus(3), stop=2)
    run(corpus(3), "data.dataset", "code", stop=2)  # its class is of this file
    run(corpus(3), stop=3)  # the checkpoint has it by now
    with pytest.raises(ResumeError, match=r"data.dataset.what: 3 then, nothing now"):
        run(points(), stop=4)
    assert run(points(), "data.dataset", "code", stop=4).global_step == 4
    run(corpus(None), "data.dataset", "code", stop=5)
    run(corpus(None), stop=6)  # None is nothing


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (torch.ones(2), "Corpus.run_identity(), of data.dataset, at 'what' gives tensor"),
        ([1, {2}], "Corpus.run_identity(), of data.dataset, at 'what' gives {2}, a set"),
        (float("nan"), "gives nan, a float, which cannot be compared at a resume"),
        (b"\x00", "a digest, such as hashlib.sha256(...).hexdigest()"),
    ],
    ids=["tensor", "set in a list", "nan", "bytes"],
)
def test_what_cannot_be_compared_is_refused(said: Any, expected: str) -> None:
    assert expected in message(ConfigError, **read(dataset=corpus(said)))


def test_what_is_no_dictionary_of_names_is_refused() -> None:
    augment = Augment()
    augment.run_identity = lambda: ["a"]  # type: ignore[method-assign, assignment]
    text = message(ConfigError, callbacks=[augment])
    assert "Augment.run_identity(), of callbacks.Augment, gives ['a']: give a dictionary" in text
    augment.run_identity = lambda: {1: "a"}  # type: ignore[method-assign, dict-item]
    assert "gives the key 1: keys are strings" in message(ConfigError, callbacks=[augment])


def test_a_key_that_is_taken_is_refused() -> None:
    class Rated(torch.optim.SGD):
        def run_identity(self) -> dict[str, Any]:
            return {"lr": 1}

    model = line()
    text = message(ConfigError, model=model, optimizer=Rated(model.parameters(), lr=0.1))
    assert "the identity key 'optimizer.lr' is given twice" in text


def test_the_protocol_is_public() -> None:
    speaker: HasRunIdentity = corpus(2)  # by its type, too
    assert speaker.run_identity() == {"what": 2}
    assert Callback().run_identity() == {}


def say_rank(own: bool) -> str:
    from paceline.world.world import World

    world = World(Parallel()).open()
    dataset = corpus(world.rank if own else 3)
    try:
        fitted(**read(dataset=dataset))
    except ConfigError as error:
        return str(error)
    return "trained"


def test_ranks_must_say_the_same(ranks: Ranks) -> None:
    for text in ranks(say_rank, 2, True):
        assert "data.dataset.what is 0 on rank 0, 1 on rank 1" in text
    assert ranks(say_rank, 2, False) == ["trained"] * 2
