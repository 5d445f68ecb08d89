"""Exported weights are the run's own, under the model's names, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from builders import Noisy, Regression, loader, make_model
from paceline import CheckpointPolicy, MetricMonitor, Resume
from paceline.callbacks import SWA, AveragedWeights, ScheduleFree
from paceline.checkpoint import NativeEngine, storage
from paceline.checkpoint.export import export
from paceline.checkpoint.safetensors_file import read_metadata
from paceline.errors import CheckpointError, ConfigError
from paceline.testing import bits
from paceline.world.world import World


class Tied(nn.Module):
    """Its output weight is its embedding; with buffers, and a part that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, bias=False)
        self.again = nn.Linear(8, 8, bias=False)
        self.again.weight = self.inner.weight
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, 1)
        self.out.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.again(self.inner(x).tanh())))


def train(
    folder: Path,
    model: nn.Module | None = None,
    trainer: type[Regression] = Regression,
    **settings: Any,
) -> Regression:
    """Five steps, checkpoints after steps 2 and 4 and at the end; step 2 was the best."""
    model = make_model() if model is None else model
    trainable = [p for p in model.parameters() if p.requires_grad]
    made = trainer(
        model=model,
        train_dataloader=loader(Noisy()),
        max_steps=5,
        progress=False,
        run_dir=folder,
        **{
            "optimizer": torch.optim.SGD(trainable, lr=0.1),
            "checkpoint": CheckpointPolicy(every_steps=2, keep_last=None),
            "val_dataloader": loader(Noisy(20), shuffle=False),
            "validate_every": 2,
            **settings,
        },
    )
    made.train(seed=1)
    return made


def test_exported_weights_load_into_the_model_bit_by_bit(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    [file] = export(tmp_path)
    assert file.path == tmp_path / "exports/model_step_00000005.safetensors"
    fresh = make_model(seed=9)
    fresh.load_state_dict(load_file(file.path))
    assert bits(fresh.state_dict()) == bits(trainer.model.state_dict())
    told = read_metadata(file.path)
    assert (told["step"], told["model"], told["weights"]) == ("5", "model", "live")
    assert json.loads(told["metrics"]) == trainer.result.metrics


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    train(tmp_path)
    files = [export(tmp_path, to=tmp_path / f"{name}.safetensors") for name in "ab"]
    one, other = (file.path.read_bytes() for [file] in files)
    assert one == other


def test_averaged_weights_are_those_of_the_callback(tmp_path: Path) -> None:
    """Tied weights, buffers, a frozen part: as `averaged_state_dict` gives them."""
    average = AveragedWeights(0.5)
    trainer = train(tmp_path, Tied(), callbacks=[average])
    expected = average.averaged_state_dict()
    [file] = export(tmp_path, weights="averaged")
    assert file.path.name == "model_step_00000005_averaged.safetensors"
    fresh = Tied()
    load_model(fresh, file.path)
    assert bits(fresh.state_dict()) == bits(expected)
    assert bits(expected) != bits(trainer.model.state_dict())


@pytest.mark.parametrize("evaluate", [True, False])
def test_the_weights_are_those_that_the_metrics_are_of(tmp_path: Path, evaluate: bool) -> None:
    """Given averages, when nothing is asked for, the export measures what the run reported."""
    rows = torch.randn(20, 8), torch.randn(20, 1), torch.arange(20)
    average = AveragedWeights(0.5, evaluate=evaluate)
    train(tmp_path, val_dataloader=[rows], validate_every=5, callbacks=[average])
    [file] = export(tmp_path)
    told = read_metadata(file.path)
    assert told["weights"] == file.weights == ("averaged" if evaluate else "live")
    fresh = make_model().eval()
    fresh.load_state_dict(load_file(file.path))
    loss = (fresh(rows[0]) - rows[1]).square().mean().item()
    assert json.loads(told["metrics"])["val/loss"] == pytest.approx(loss)


class Metric(nn.Module):
    """As torchmetrics' own: a module whose state is no part of its state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()), persistent=False)


def test_a_metric_of_the_trainer_is_no_model_to_export(tmp_path: Path) -> None:
    class Measures(Regression):
        def configure(self) -> None:
            self.accuracy = Metric()

    train(tmp_path, trainer=Measures)
    [file] = export(tmp_path)
    assert file.model == "model"


def test_a_mean_over_the_last_steps_is_an_average_too(tmp_path: Path) -> None:
    average = SWA(start=2)
    train(tmp_path, Tied(), callbacks=[average])
    [file] = export(tmp_path, weights="averaged")
    fresh = Tied()
    load_model(fresh, file.path)
    assert bits(fresh.state_dict()) == bits(average.averaged_state_dict())


def test_a_schedule_free_run_is_exported_at_the_point_to_be_judged(tmp_path: Path) -> None:
    model = make_model()
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
    trainer = train(tmp_path, model, optimizer=optimizer, callbacks=[ScheduleFree()])
    [live], [judged] = export(tmp_path, weights="live"), export(tmp_path)
    assert bits(load_file(judged.path)) == bits(trainer.model.state_dict())
    assert bits(load_file(live.path)) != bits(load_file(judged.path))


def test_averages_of_bf16_weights_are_rounded_once(tmp_path: Path) -> None:
    average = AveragedWeights(0.5)

    class Half(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y, _ = batch
            return ((self.model(x.bfloat16()) - y) ** 2).mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", self.training_step(batch, batch_idx))

    model = make_model().bfloat16()
    Half(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), max_steps=3,
        train_dataloader=loader(Noisy()), callbacks=[average], progress=False, run_dir=tmp_path,
    ).train(seed=0)  # fmt: skip
    [own] = export(tmp_path, weights="averaged")
    assert bits(load_file(own.path)) == bits(average.averaged_state_dict())
    [wide] = export(tmp_path, weights="averaged", dtype="fp32")
    held = average.state_dict()["average"]
    assert bits(load_file(wide.path)) == bits({k.removeprefix("model."): held[k] for k in held})


def test_tied_weights_are_stored_as_safetensors_itself_does(tmp_path: Path) -> None:
    trainer = train(tmp_path, Tied())
    [file] = export(tmp_path)
    save_model(trainer.model, str(tmp_path / "theirs.safetensors"))
    assert bits(load_file(file.path)) == bits(load_file(tmp_path / "theirs.safetensors"))
    theirs = read_metadata(tmp_path / "theirs.safetensors")
    assert theirs["inner.weight"] == "again.weight"
    assert theirs.items() <= read_metadata(file.path).items()


def test_best_latest_and_a_step_are_three_checkpoints(tmp_path: Path) -> None:
    class Worse(Regression):
        def get_val_metrics(self) -> dict[str, float]:
            return {"score": float(self.global_step)}

    model, states = make_model(), {}

    class Keep(Worse):
        def on_step_end(self, metrics: dict[str, Any]) -> None:
            states[self.global_step] = bits({k: v.clone() for k, v in model.state_dict().items()})

    Keep(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), max_steps=5,
        train_dataloader=loader(Noisy()), val_dataloader=loader(Noisy(20), shuffle=False),
        validate_every=2, checkpoint=CheckpointPolicy(every_steps=1, keep_last=None),
        metric_monitor=MetricMonitor("score", mode="min"), progress=False, run_dir=tmp_path,
    ).train()  # fmt: skip
    for which, step in (("latest", 5), ("best", 2), ("step_00000003", 3)):
        [file] = export(tmp_path, checkpoint=which)
        assert bits(load_file(file.path)) == states[step], which
    [file] = export(tmp_path / "checkpoints/step_00000004", to=tmp_path / "four")
    assert file.path == tmp_path / "four/model_step_00000004.safetensors"
    assert bits(load_file(file.path)) == states[4]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_floating_point_tensors_are_converted_and_no_others(tmp_path: Path, dtype: str) -> None:
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    trainer = train(tmp_path, Tied())
    [file] = export(tmp_path, dtype=dtype)
    read = load_file(file.path)
    expected = {
        name: tensor.to(wanted) if tensor.is_floating_point() else tensor
        for name, tensor in trainer.model.state_dict().items()
        if name != "inner.weight"
    }
    assert bits(read) == bits({name: expected[name] for name in read})
    assert read.keys() == expected.keys()
    assert read["norm.num_batches_tracked"].dtype == torch.int64


def test_weights_beyond_the_range_of_fp16_are_refused(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model[3].bias.fill_(1e5)
    train(tmp_path, model, max_grad_norm=1e-9)
    with pytest.raises(CheckpointError, match=r"model\.3\.bias holds values up to 1e\+05"):
        export(tmp_path, dtype="fp16")
    assert not list(tmp_path.rglob("exports/*"))
    assert export(tmp_path, dtype="bf16")


def test_paths_are_those_that_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    expected = Path("a/exports/model_step_00000005.safetensors")
    assert [file.path for file in export("a")] == [expected]
    monkeypatch.chdir(tmp_path / "a/checkpoints")
    [file] = export("step_00000005")
    assert file.path.resolve() == (tmp_path / expected).resolve()


def test_several_models_are_one_file_each_or_the_one_asked_for(tmp_path: Path) -> None:
    trainer = train(tmp_path, loss_fn=nn.CrossEntropyLoss(weight=torch.ones(3)))
    names = {file.path.name: file.model for file in export(tmp_path)}
    assert names == {
        "model_step_00000005.safetensors": "model",
        "loss_fn_step_00000005.safetensors": "loss_fn",
    }
    with pytest.raises(ConfigError, match="several models"):
        export(tmp_path, to=tmp_path / "one.safetensors")
    [file] = export(tmp_path, to=tmp_path / "one.safetensors", model="model")
    assert bits(load_file(file.path)) == bits(trainer.model.state_dict())
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        export(tmp_path, model="modle")


def test_what_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        export(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        export(tmp_path)
    train(tmp_path / "seed_1")
    with pytest.raises(ConfigError, match="name one of them: seed_1"):
        export(tmp_path)
    train(tmp_path)
    with pytest.raises(CheckpointError, match="no averaged weights"):
        export(tmp_path, weights="averaged")
    with pytest.raises(ConfigError, match="nothing was monitored"):
        export(tmp_path, checkpoint="best")
    with pytest.raises(ConfigError, match="it has: step_00000002"):
        export(tmp_path, checkpoint="step_00000003")


def test_a_damaged_checkpoint_is_refused_and_the_intact_ones_are_named(tmp_path: Path) -> None:
    """Given a flipped bit in the newest, then nothing is exported, and nothing is moved."""
    train(tmp_path)
    newest = tmp_path / "checkpoints/step_00000005"
    tensors = next(newest.glob("*.safetensors"))
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(CheckpointError, match="intact: step_00000002, step_00000004"):
        export(tmp_path)
    (newest / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="intact: step_00000002, step_00000004"):
        export(tmp_path)
    assert not (tmp_path / "exports").exists()
    assert newest.is_dir()
    assert export(tmp_path, checkpoint="step_00000004")


def test_a_write_that_fails_leaves_the_earlier_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path)
    [file] = export(tmp_path)
    before = file.path.read_bytes()

    def full(self: Any, fd: int, data: memoryview) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("paceline.checkpoint.files.Disk.write", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        export(tmp_path)
    assert [p.name for p in file.path.parent.iterdir()] == [file.path.name]
    assert file.path.read_bytes() == before


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_can_start_from_an_exported_file(tmp_path: Path, capsys: Any, tied: bool) -> None:
    make = Tied if tied else make_model
    trainer = train(tmp_path / "a", make())
    [file] = export(tmp_path / "a")
    model = make()
    first: list[Any] = []

    class Look(Regression):
        def on_train_start(self) -> None:
            first.append(bits({k: v.clone() for k, v in model.state_dict().items()}))

    Look(
        model=model, train_dataloader=loader(Noisy()), max_steps=1, progress=False,
        optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        run_dir=tmp_path / "b", resume=Resume(init_from=file.path),
    ).train()  # fmt: skip
    assert first == [bits(trainer.model.state_dict())]
    assert "missing: none; unexpected: none" in capsys.readouterr().err


def test_a_file_that_is_no_safetensors_file_is_no_first_weights(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"nonsense of some length")
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        train(tmp_path / "b", resume=Resume(init_from=tmp_path / "w.safetensors"))


def train_on_a_rank(folder: str) -> dict[str, Any]:
    average = AveragedWeights(0.5)
    train(Path(folder), Tied(), callbacks=[average])
    return bits(average.averaged_state_dict())


def save_sharded(folder: str) -> None:
    """A checkpoint as a sharded run saves it: uneven parts of `model`'s weight on each rank."""
    world = World().open()
    mesh = init_device_mesh("cpu", (world.size,))
    whole = torch.arange(35.0).reshape(7, 5)
    weight = distribute_tensor(whole, mesh, [Shard(0)])
    mean = distribute_tensor(whole / 2, mesh, [Shard(0)])
    tree = {
        "models": {"model": {"weight": weight}},
        "callbacks": {"Mine": {"updates": 3, "average": {"model.weight": mean}}},
    }
    saver = NativeEngine(Path(folder, "checkpoints"), CheckpointPolicy(), world)
    saver.save(tree, 1, synchronous=True)
    saver.close()
    world.close()


def test_weights_that_two_ranks_saved_are_exported_by_one_process(tmp_path: Path, ranks) -> None:
    expected = ranks(train_on_a_rank, 2, str(tmp_path / "ddp"))[0]
    [file] = export(tmp_path / "ddp", weights="averaged")
    fresh = Tied()
    load_model(fresh, file.path)
    assert bits(fresh.state_dict()) == expected
    ranks(save_sharded, 2, str(tmp_path / "sharded"))
    for weights, scale in (("live", 1), ("averaged", 2)):
        [file] = export(tmp_path / "sharded", weights=weights)
        whole = torch.arange(35.0).reshape(7, 5) / scale
        assert bits(load_file(file.path)) == bits({"weight": whole})


def test_little_else_than_the_weights_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may hold many times its weights; their export does not need all that memory."""
    train(tmp_path, callbacks=[AveragedWeights(0.5, evaluate=False)])
    asked: list[str] = []
    whole = storage._read_item

    def read_item(file: Any, entry: Any, item: Any, planner: Any) -> None:
        asked.append(item.storage_index.fqn)
        whole(file, entry, item, planner)

    monkeypatch.setattr(storage, "_read_item", read_item)
    export(tmp_path)
    assert asked
    assert {name.split("/")[0] for name in asked} == {"models"}
