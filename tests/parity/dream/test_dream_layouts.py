"""Dream Trainer at home: its acceptance rows on layouts, presets and what they do to a model."""

from __future__ import annotations

import re
from contextlib import closing, suppress
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.utils.data import DataLoader, TensorDataset

import small
from paceline import Callback, DeviceParameters, Parallel, Trainer
from paceline.errors import ConfigError, PacelineError
from paceline.world.dtensors import is_dtensor
from paceline.world.world import World
from small import batches, fitted, line, settings

SIZES = [
    (DeviceParameters.SINGLE_DEVICE(), 1, (1, 1)),
    (DeviceParameters.DDP(compile_model=False), 1, (1, 1)),
    (DeviceParameters.DDP(compile_model=False), 8, (8, 1)),
    (DeviceParameters.FSDP(), 1, (1, 1)),
    (DeviceParameters.FSDP(), 2, (1, 2)),
    (DeviceParameters.FSDP(), 8, (1, 8)),
    (DeviceParameters.FSDP(8), 8, (1, 8)),
    (DeviceParameters.HSDP(8), 8, (1, 8)),
    (DeviceParameters.HSDP(8, compile_model=False), 16, (2, 8)),
]


def test_DT_27_presets_take_all_processes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """One value serves a world of any size, and is not changed by it."""
    for preset, size, layout in SIZES:
        before = repr(preset)
        monkeypatch.setenv("WORLD_SIZE", str(size))
        world = World(preset.parallel)
        assert (world.copies, world.shards) == layout, (preset, size)
        assert (world.dp_size, repr(preset)) == (size, before)


def test_DT_27_tensor_parallelism_takes_what_a_number_of_shards_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dream's own default is taken; beside another "auto" it is 1, since models have to say how
    they are split (Dream: as many as a machine has)."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    for preset, sizes in (
        (DeviceParameters.FSDP(tensor_parallel="auto"), (1, 8, 1)),
        (DeviceParameters.FSDP(dp_shard=4, tensor_parallel="auto"), (1, 4, 2)),
        (DeviceParameters.HSDP(4, tensor_parallel="auto"), ("auto", 4, 1)),
    ):
        layout = preset.parallel
        assert (layout.dp_replicate, layout.dp_shard, layout.tensor) == sizes


def test_an_unknown_device_parameter_is_named_with_ours() -> None:
    with pytest.raises(ConfigError) as caught:
        DeviceParameters.FSDP(_dp_replicate=2, compile_modl=True)
    assert str(caught.value).splitlines() == [
        "DeviceParameters(...) got what it does not have:",
        "  _dp_replicate: here it is dp_replicate.",
        "  compile_modl: no such setting; did you mean 'compile_model'?",
    ]


@pytest.mark.parametrize(
    ("preset", "size", "numbers"),
    [
        (DeviceParameters.HSDP(8), 12, "dp_shard=8 does not fit 12 processes"),
        (DeviceParameters.FSDP(4), 8, "dp_replicate=1 x dp_shard=4 does not fit 8 processes"),
        (DeviceParameters.SINGLE_DEVICE(), 2, "dp_replicate=1 does not fit 2 processes"),
    ],
    ids=["HSDP", "FSDP", "SINGLE_DEVICE"],
)
def test_DT_27_sizes_that_do_not_fit_are_named(
    preset: DeviceParameters, size: int, numbers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(size))
    with pytest.raises(ConfigError, match=numbers):
        World(preset.parallel)


def test_DT_27_two_sizes_left_open_are_refused() -> None:
    with pytest.raises(ConfigError, match="are ambiguous: give one of them a number"):
        DeviceParameters(dp_shard="auto")


def test_B49_each_device_parameter_reaches_the_trainer() -> None:
    """None of them is dead: another value is another layout, or an error that names it."""
    others: dict[str, Any] = {
        field.name: True if field.default is False else 2 for field in fields(DeviceParameters)
    }
    others |= {"param_dtype": torch.bfloat16, "activation_memory_budget": 0.5}
    plain = DeviceParameters().settings()
    for name, value in others.items():
        with suppress(ConfigError):
            assert DeviceParameters(**{name: value}).settings() != plain, name


def test_DT_28_what_does_not_exist_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match="pipeline=0: expected 1 or more"):
        DeviceParameters(pipeline_parallel=0)
    with pytest.raises(ConfigError, match="cpu_offload=True: only sharded parameters"):
        DeviceParameters.DDP(cpu_offload=True)


class Coder(nn.Module):
    """Says nothing of how it is split, and has a method besides its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 1)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encode(x))


class Encodes(Trainer):
    """Calls the method in place of the model."""

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        model: Any = self.model
        encoded = model.encode(x)
        self.computed_in = encoded.dtype
        return nn.functional.mse_loss(model.head(encoded), y)


# Each feature, and what a run says that lacks what it takes: the setting, and what to give.
LACKING = {
    "tensor": (
        {"parallel": {"tensor": 2}},
        "parallel.tensor=2: nothing says .*give parallel.plan",
    ),
    "pipeline": ({"parallel": {"pipeline": 2}}, "parallel.pipeline: .*give it pipeline_order"),
    "context": ({"parallel": {"context": 2}}, "parallel.context=2 does not divide .*pad sequences"),
    "expert": ({"parallel": {"expert": 2}}, "parallel.expert=2: .*give parallel.plan"),
    "recompute": (
        {"parallel": {"activation_checkpointing": "full"}},
        "parallel.activation_checkpointing='full': .*put them into a ModuleList",
    ),
    "compile": ({"compile": "blocks"}, "compile='blocks': .*put them into a ModuleList"),
}


def told(kind: type[Trainer] = Trainer, **settings: Any) -> tuple[str, int]:
    """What a run on the coder ends with, and the steps that it has taken."""
    given = {**settings, "parallel": Parallel(**settings.get("parallel", {}))}
    trainer = kind(**small.settings(Coder(), **given))
    try:
        trainer.fit()
    except (PacelineError, RuntimeError) as error:
        return "\n".join([str(error), *getattr(error, "__notes__", [])]), trainer.global_step
    return "", trainer.global_step


def told_on_ranks() -> tuple[dict[str, tuple[str, int]], dict[str, str]]:
    lacking = {name: told(**settings) for name, (settings, _) in LACKING.items()}
    bypassing = {
        name: told(Encodes, parallel={name: 2})[0] for name in ("dp_replicate", "dp_shard")
    }
    return lacking, bypassing


def test_DT_28_and_42_what_a_model_lacks_is_said_before_the_first_step(ranks: Any) -> None:
    """And where methods besides forward are called, which Dream Trainer would have to be told of
    (`mark_forward_methods`), what to call instead. Where models are whole they compute as
    forward does."""
    for lacking, bypassing in ranks(told_on_ranks, 2):
        for name, (text, steps) in lacking.items():
            assert re.search(LACKING[name][1], text), (name, text)
            assert steps == 0
        assert "ranks did not exchange" in bypassing["dp_replicate"]
        for text in bypassing.values():
            assert "call the model itself, self.model(...)" in text
    trainer: Any = fitted(Encodes, model=Coder(), precision="bf16", epochs=1)
    assert trainer.computed_in == torch.bfloat16
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


class Tied(nn.Module):
    """An embedding that is the output layer too, and two buffers of which one is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embedding.weight
        self.register_buffer("saved", torch.arange(4.0))
        self.register_buffer("unsaved", torch.arange(4.0) + 1, persistent=False)

    saved: torch.Tensor
    unsaved: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.embedding(x) * self.saved + self.unsaved)


class Words(Trainer):
    """Predicts a number from the one before; looks at its model when it is in place and after."""

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)  # pyright: ignore

    def look(self) -> None:
        model: Any = self.named_models()["model"]
        assert model.out.weight is model.embedding.weight
        assert model.saved.tolist() == [0, 1, 2, 3]
        assert model.unsaved.tolist() == [1, 2, 3, 4]
        self.looked += 1

    on_setup = on_train_end = look
    looked = 0


def words(kind: type[Words] = Words, calls: list[int] | None = None, **changes: Any) -> Any:
    x = torch.arange(20) % 7
    model = Tied()
    if calls is not None:
        model.register_forward_pre_hook(lambda *_: calls.append(1))
    loader = DataLoader(TensorDataset(x, (x + 1) % 7), 4)
    trainer = kind(**settings(model, train_dataloader=loader, **changes))
    trainer.fit()
    return trainer


def test_DT_08_ties_and_buffers_survive_the_setup() -> None:
    assert words().looked == 2


def words_on_ranks() -> tuple[int, int]:
    calls: list[int] = []
    trainer = words(calls=calls, parallel=DeviceParameters.FSDP().parallel)
    assert all(is_dtensor(p) for p in trainer.model.parameters())
    return trainer.looked, len(calls)


def test_DT_08_ties_and_buffers_survive_sharding(ranks: Any) -> None:
    """And a sharded model's hooks hear each call once: 20 rows in fours on 2 ranks, two epochs."""
    assert ranks(words_on_ranks, 2) == [(2, 6)] * 2


def mesh() -> tuple[tuple[str, ...], tuple[int, ...]]:
    with closing(World(DeviceParameters.HSDP(2).parallel).open()) as world:
        assert world.mesh is not None
        return world.mesh.mesh_dim_names or (), tuple(world.mesh.shape)


def test_the_mesh_has_the_dimensions_that_are_more_than_one(ranks: Any) -> None:
    assert ranks(mesh, 2) == [(("dp_shard",), (2,))] * 2
    assert ranks(mesh, 4) == [(("dp_replicate", "dp_shard"), (2, 2))] * 4


class Pair(Trainer):
    """Two models with a loss each; one optimizer a model."""

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
        x, y = batch
        models: Any = self.model
        return {name: self.loss_fn(models[name](x), y) for name in ("left", "right")}


class Exchanges(Callback):
    """Counts each model's exchanges of gradients, by window."""

    def __init__(self) -> None:
        self.windows: list[dict[str, int]] = []

    def on_setup(self, trainer: Any) -> None:
        for name, replica in trainer.model.items():
            replica.register_comm_hook((self.windows, name), _counted)

    def on_train_batch_start(self, trainer: Any, batch: Any, batch_idx: int) -> None:
        if trainer.window.batch_idx == trainer.progress.batch:
            self.windows.append({"left": 0, "right": 0})


def _counted(state, bucket):  # DDP would accept no annotations but its own
    windows, name = state
    windows[-1][name] += bucket.is_last()
    return default_hooks.allreduce_hook(torch.distributed.group.WORLD, bucket)


def exchanges() -> list[dict[str, int]]:
    models = {"left": line(seed=1), "right": line(seed=2)}
    counted = Exchanges()
    fitted(
        Pair,
        model=models,
        optimizer={name: torch.optim.SGD(m.parameters(), lr=0.01) for name, m in models.items()},
        train_dataloader=batches(32),
        gradient_accumulation_steps=2,
        callbacks=[counted],
    )
    return counted.windows


def test_DT_11_each_of_two_models_is_exchanged_once_a_window(ranks: Any) -> None:
    assert ranks(exchanges, 2) == [[{"left": 1, "right": 1}] * 4] * 2
