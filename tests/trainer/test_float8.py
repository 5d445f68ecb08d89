"""Linear layers that multiply in float8; on a CPU by torchao's emulation of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kept import run
from mixture import Mixture
from paceline import Parallel, Trainer
from paceline.checkpoint import load_tree, scan
from paceline.errors import MissingExtraError, ResumeError
from paceline.parallel import attention, float8
from paceline.testing import (
    Ranks,
    StopAt,
    assert_continues,
    assert_resumes_exactly,
    bits,
    traced_run,
)
from paceline.trainer.settings import Resume
from small import fitted, settings


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 3, 16)).permute(3, 0, 2, 1, 4)
        return x + self.out(attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Net(nn.Module):
    """Two blocks of attention over sequences, and a head whose size is no multiple of 16."""

    tp_plan = {"blocks.*.qkv": "colwise", "blocks.*.out": "rowwise"}
    pipeline_order = ("blocks", "head")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def emulated(device: torch.device) -> Any:
    from torchao.float8 import Float8LinearConfig

    return Float8LinearConfig(emulate=True, pad_inner_dim=True)


class Fit(Trainer):
    """Remembers each step's loss, what a layer was meanwhile, and what it leaves."""

    ended: dict[str, torch.Tensor]

    def on_train_start(self) -> None:
        self.losses: list[float] = []
        layer: Any = self.get_module("model.blocks.0.out")
        self.during = type(layer).__name__

    def on_before_backward(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.item())


def examples() -> TensorDataset:
    x = torch.randn(28, 4, 32, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x.mean(-1, keepdim=True))


def make(run_dir: Path | None = None, **changes: Any) -> Fit:
    model = changes.pop("model", None) or Net()
    options = {
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.01),
        "train_dataloader": DataLoader(examples(), 8, shuffle=True),
        "precision": "fp8",
        "run_dir": run_dir,
    }
    return Fit(**settings(model, **options | changes))


def fit(precision: str = "fp8", **changes: Any) -> Fit:
    made = make(precision=precision, **changes)
    made.ended = run(made, seed=2).weights
    return made


def plan(made: Trainer) -> list[str]:
    return [line.decision for line in made.plan]


@pytest.fixture
def emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(float8, "configuration", emulated)


# Where it cannot be


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.trainer.checks.missing", lambda precision: None)


def test_a_device_without_it_computes_in_bf16_and_says_so_once(
    installed: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = fitted(precision="fp8", model=nn.Linear(3, 1), run_dir=tmp_path / "run")
    lacking = "no float8 on this device (CUDA 8.9 or later, MI300 or later): computes in bf16"
    assert capsys.readouterr().err.count("float8") == 1
    assert lacking in plan(asked)
    assert f"computes on {asked.device} in bf16" in plan(asked)
    [saved], _ = scan(tmp_path / "run" / "checkpoints")
    assert load_tree(saved.path)["identity"]["precision"] == "bf16"


def test_the_fallback_is_bf16_bit_by_bit(installed: None) -> None:
    assert bits(fit("fp8").ended) == bits(fit("bf16").ended)


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.parallel.float8.importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "paceline\[fp8\]"'):
        fitted(precision="fp8")


# What it is


def test_the_layers_whose_sizes_allow_it_multiply_in_float8(emulation: None) -> None:
    made = fit()
    assert made.during == "Float8Linear"
    left = "not model.head (1 x 32, not multiples of 16)"
    assert f"4 of 5 linear layers multiply in float8; {left}" in plan(made)
    half = fit("bf16")
    assert made.ended.keys() == half.ended.keys(), "parameters keep their names"
    assert made.losses != half.losses
    assert made.losses == pytest.approx(half.losses, rel=0.1)
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert {type(part) for part in made.model.modules()} == {Net, nn.ModuleList, Block, nn.Linear}
    assert vars(made.model.head).keys() == vars(made.model.blocks[0].out).keys()


def test_what_is_no_plain_linear_layer_is_left_alone(emulation: None) -> None:
    model = Net()
    model.blocks[0].out = Doubling(32, 32)
    model.blocks[1].out.register_forward_hook(lambda module, inputs, output: seen.append(module))
    seen: list[Any] = []
    made = fit(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert made.during == "Doubling"
    assert any("model.blocks.0.out (a Doubling)" in line for line in plan(made))
    assert model.blocks[1].out in seen, "a hook of a layer holds"


class Doubling(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("which", ["full", "selective"])
def test_recomputed_activations_change_no_bit(emulation: None, which: Any) -> None:
    again = fit(parallel=Parallel(activation_checkpointing=which))
    assert bits(again.ended) == bits(fit().ended)


def test_stopped_and_resumed_it_ends_with_the_same_bits(emulation: None, tmp_path: Path) -> None:
    assert_resumes_exactly(make, tmp_path, stop_at=3)


def test_a_run_goes_on_in_another_precision_only_if_that_is_accepted(
    emulation: None, tmp_path: Path
) -> None:
    fit("bf16", run_dir=tmp_path / "run", epochs=1)
    with pytest.raises(ResumeError, match="precision: 'bf16' then, 'fp8' now"):
        fit(run_dir=tmp_path / "run")
    accepted = Resume(accept=("precision",))
    assert fit(run_dir=tmp_path / "run", resume=accepted).during == "Float8Linear"


def test_what_is_not_finite_never_reaches_the_weights(emulation: None) -> None:
    x = torch.randn(24, 4, 32, generator=torch.Generator().manual_seed(1))
    x[9] = torch.inf  # in the second of three batches
    bad = DataLoader(TensorDataset(x, torch.ones(24, 4, 1)), 8)
    made = fit(train_dataloader=bad, epochs=1, on_nonfinite="skip")
    assert made.progress.global_step == 3
    assert all(value.isfinite().all() for value in made.ended.values())


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"dp_shard": 2, "activation_checkpointing": "full"},
    {"context": 2},
    {"tensor": 2, "activation_checkpointing": "selective"},
    {"pipeline": 2},
]


def fit_layouts() -> list[Any]:
    float8.configuration = emulated
    runs = []
    for layout in LAYOUTS:
        size = 8 if "context" in layout or "tensor" in layout else 4
        changes = {"gradient_accumulation_steps": 2} if "pipeline" in layout else {}
        made = fit_by_sgd(size=size, parallel=Parallel(**layout), **changes)
        runs.append((made.ended, made.during))
    return runs


def fit_by_sgd(
    precision: str = "fp8",
    size: int = 8,
    model: nn.Module | None = None,
    lr: float = 0.15,
    **changes: Any,
) -> Fit:
    model = model or Net()
    data = DataLoader(examples(), size, shuffle=True)
    return fit(
        precision,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        train_dataloader=data,
        **changes,
    )


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of what is in the first."""
    return sum(float((one[key] - other[key]).square().sum()) for key in one) ** 0.5


def test_every_layout_trains_the_same_up_to_its_rounding(emulation: None, ranks: Ranks) -> None:
    """Each rank scales what it has by its own largest value."""
    alone = fit_by_sgd().ended
    moved = distance(alone, Net().state_dict())
    for found in ranks(fit_layouts, 2):
        for ended, during in found:
            assert during == "Float8Linear"
            assert distance(ended, alone) < 0.05 * moved


class Mixed(Net):
    """With experts, to both of which each position goes."""

    ep_plan = {"mixture.experts": "experts"}

    def __init__(self) -> None:
        super().__init__()
        self.mixture = Mixture(32, experts=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x + self.mixture(x.flatten(0, 1)).view_as(x))


def fit_mixed() -> Any:
    float8.configuration = emulated
    made = fit_by_sgd(size=4, model=Mixed(), lr=0.05, parallel=Parallel(expert=2))
    return made.ended, made.during, plan(made)


def test_experts_that_are_shared_out_compute_in_bf16_beside_it(
    emulation: None, ranks: Ranks
) -> None:
    alone = fit_by_sgd(model=Mixed(), lr=0.05).ended
    moved = distance(alone, Mixed().state_dict())
    for ended, during, lines in ranks(fit_mixed, 2):
        assert during == "Float8Linear"
        assert any(line.startswith("4 of 6 linear layers") for line in lines)
        assert distance(ended, alone) < 0.05 * moved


def resume(folder: Path) -> None:
    float8.configuration = emulated
    for name in ("tensor", "pipeline"):
        build = partial(make, parallel=Parallel(**{name: 2}), gradient_accumulation_steps=2)
        whole = traced_run(build, folder / name / "whole")
        parts = [traced_run(build, folder / name / "parts", *stop) for stop in ([StopAt(2)], [])]
        assert_continues(parts, whole)


def test_split_or_in_stages_it_resumes_to_the_same_bits(
    emulation: None, ranks: Ranks, tmp_path: Path
) -> None:
    ranks(resume, 2, tmp_path)


def test_a_layer_multiplies_so_only_if_its_parts_can(emulation: None) -> None:
    layers = float8.Float8Layers(emulated(torch.device("cpu")), parts=4)
    layers.convert(Net(), "model")
    assert layers.left["model.blocks.0.out"] == "32 x 32, not multiples of 64"


def test_compiled_blocks_multiply_in_float8_too(
    emulation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced, both passes; what the compiler makes of the trace depends on the device."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    alone, compiled = fit_by_sgd(), fit_by_sgd(compile="blocks")
    assert compiled.during == "Float8Linear"
    moved = distance(alone.ended, Net().state_dict())
    assert distance(compiled.ended, alone.ended) < 0.05 * moved
