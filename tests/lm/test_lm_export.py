"""A run is exported as a folder that transformers loads: the same logits, the same tokens."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset

from paceline import Parallel, Trainer
from paceline.callbacks import AveragedWeights
from paceline.checkpoint.files import Disk
from paceline.cli.app import app
from paceline.errors import CheckpointError, ConfigError
from paceline.factories.checkpoint import CheckpointEngineConfig
from paceline.lm import export as exporting
from paceline.lm.export import export_huggingface
from paceline.lm.hf_engine import HFCheckpointEngine
from paceline.testing import Ranks, bits

PROBE = torch.arange(20).reshape(2, 10) * 13 % 300


def trained(path: Path, tokenizer: Any, *callbacks: Any, **form: Any) -> tiny.Tiny:
    """A run in `path/run` of a tiny model, kept in `path/model`."""
    model = tiny.saved(path / "model", tokenizer, **form)
    section = {"type": "huggingface", "name_or_path": str(model)}
    trainer = tiny.trainer(path / "run", {"model": section}, *callbacks)
    trainer.train(seed=1)
    return trainer


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(PROBE, use_cache=False).logits


def loaded(folder: Path, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Of an untied model, with averaged weights."""
    path = tmp_path_factory.mktemp("export")
    average = AveragedWeights(0.5, evaluate=False)
    trained(path, tokenizer, average)
    save_file(average.averaged_state_dict(), path / "average.safetensors")
    return path / "run"


@pytest.mark.parametrize(
    "form",
    [{"tied": False}, {"tied": True}, {"kind": "gpt2", "tied": True, "vocabulary": 590}],
    ids=["untied", "tied", "gpt2, grown"],
)
def test_an_export_loads_with_the_runs_logits_and_tokens(
    tmp_path: Path, tokenizer: Any, form: dict[str, Any]
) -> None:
    from transformers import AutoTokenizer

    engine = HFCheckpointEngine()
    trainer = trained(tmp_path, tokenizer, engine, **form)
    # When: no code of the run's, and not the folder that it was loaded from.
    shutil.rmtree(tmp_path / "model")
    folder = export_huggingface(tmp_path / "run")
    assert folder == tmp_path / "run/exports/model_step_00000002"
    model = loaded(folder)
    assert type(model) is type(trainer.model)
    assert model.config.use_cache is True
    assert bits(model.state_dict()) == bits(trainer.model.state_dict())
    assert torch.equal(logits(model), logits(trainer.model))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == form["tied"]
    again = AutoTokenizer.from_pretrained(folder)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.chat_template == tokenizer.chat_template
    # And the engine has written the same files while it trained.
    saved = tmp_path / "run/exports/huggingface/step_00000002"
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (saved / name).read_bytes() == (folder / name).read_bytes()
    expected = bits(trainer.model.state_dict())
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.zero_()
    engine.load(trainer.model)
    assert bits(trainer.model.state_dict()) == expected


def test_other_weights_dtypes_places_and_shards(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = loaded(export_huggingface(run, tmp_path / "live")).state_dict()
    averaged = loaded(export_huggingface(run, tmp_path / "mean", weights="averaged")).state_dict()
    assert bits(averaged) == bits(load_file(run.parent / "average.safetensors")) != bits(live)
    half = loaded(export_huggingface(run, tmp_path / "half", dtype="bf16"), dtype="auto")
    assert half.dtype == torch.bfloat16
    assert bits(half.state_dict()) == bits({k: v.bfloat16() for k, v in live.items()})
    monkeypatch.setattr(exporting, "SHARD", 30_000)  # bytes
    parts = export_huggingface(run, tmp_path / "parts")
    assert len(list(parts.glob("model-*-of-*.safetensors"))) > 2
    assert (parts / "model.safetensors.index.json").exists()
    assert bits(loaded(parts).state_dict()) == bits(live)
    with pytest.raises(ConfigError, match="is not empty"):
        export_huggingface(run, parts)
    with pytest.raises(ConfigError, match="a folder, not a file"):
        export_huggingface(run, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="no config of a model 'mdel'; did you mean 'model'"):
        export_huggingface(run, model="mdel")


def test_the_command_and_the_model_card(run: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/recipe.yaml").write_text(
        "model: {name_or_path: a|b}\n"
        "loggers: [{api_key: abc123, token: hf_abcdefghijklmnopqrstuv}]\n"
    )
    words = ["export", str(tmp_path / "run"), "--format", "huggingface", "--dtype", "fp16"]
    with pytest.raises(SystemExit) as ended:
        app(words)
    assert ended.value.code in (0, None)
    folder = tmp_path / "run/exports/model_step_00000002_fp16"
    assert capsys.readouterr().out.startswith(str(folder))
    card = (folder / "README.md").read_text()
    assert "the live weights of step_00000002, after 2 optimizer steps" in card
    assert "| model.name\\_or\\_path | a\\|b |" in card
    assert "| torch | " in card
    assert "abc123" not in card
    assert "hf_" not in card


def test_a_run_without_a_config_says_so(tmp_path: Path, run: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/pretrained")
    with pytest.raises(ConfigError, match="keeps no config of transformers"):
        export_huggingface(tmp_path / "run")
    assert not (tmp_path / "run/exports").exists()


def test_weights_of_another_model_are_listed(tmp_path: Path, run: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    kept = tmp_path / "run/pretrained/model/config.json"
    text = kept.read_text()
    kept.write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\.\S+ is missing.* and 5 more"):
        export_huggingface(tmp_path / "run")
    kept.write_text(text.replace('"intermediate_size": 24', '"intermediate_size": 25'))
    with pytest.raises(CheckpointError, match=r"up_proj.weight has the shape \[24, 16\], not \[25"):
        export_huggingface(tmp_path / "run")
    kept.write_text(text.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(CheckpointError, match=r"lm_head.weight differ, and the config ties them"):
        export_huggingface(tmp_path / "run")


@pytest.mark.parametrize("broken", ["weights", "config"])
def test_a_folder_that_loads_otherwise_is_not_published(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def write(model: Any, folder: Path) -> None:
        whole(model, folder)
        file = folder / ("model.safetensors" if broken == "weights" else "config.json")
        if broken == "weights":
            state = load_file(file)
            state["model.embed_tokens.weight"][599, 3] += 1e-3  # a token that no probe may hold
            save_file(state, file, {"format": "pt"})
        else:
            file.write_text(
                file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1')
            )

    whole = exporting.write_model
    monkeypatch.setattr(exporting, "write_model", write)
    found = {"weights": r"other weights: model\.embed_tokens\.weight", "config": "logits differ by"}
    with pytest.raises(CheckpointError, match=found[broken]):
        export_huggingface(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, run: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    [file] = (tmp_path / "run/checkpoints").glob("step_*/*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        export_huggingface(tmp_path / "run")


def test_killed_while_it_publishes_it_leaves_nothing_under_the_name(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = os.fork()
    if not child:
        monkeypatch.setattr(Disk, "rename", lambda *_: os._exit(9))
        export_huggingface(run, tmp_path / "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [path.name for path in tmp_path.iterdir()] == [".out.new"]
    assert loaded(export_huggingface(run, tmp_path / "out")).config.vocab_size == 600
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Disk, "rename", full)
    with pytest.raises(CheckpointError, match=r"other could not be written: .*No space left"):
        export_huggingface(run, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_kept_is_written_once_and_whole(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "run/pretrained"
    section = {"type": "huggingface", "name_or_path": str(tiny.saved(tmp_path / "m", tokenizer))}
    with monkeypatch.context() as patched:
        patched.setattr("paceline.trainer.pretrained.publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.trainer(tmp_path / "run", {"model": section}).train(seed=1)
    assert [path.name for path in kept.iterdir()] == [".model.new"]
    tiny.trainer(tmp_path / "run", {"model": section}).train(seed=1)
    assert [path.name for path in kept.iterdir()] == ["model"]
    (kept / "model/config.json").write_text("kept")
    tiny.trainer(tmp_path / "run", {"model": section}, max_steps=3).train(seed=1)
    assert (kept / "model/config.json").read_text() == "kept"


# On ranks


def save_on_ranks(run_dir: Path, model: Path, shards: int) -> None:
    """Nothing moves, so that every layout ends with the same weights."""
    tiny.trainer(
        run_dir,
        {
            "model": {"type": "huggingface", "name_or_path": str(model)},
            "optimizer": {"type": "sgd", "lr": 1e-30},
        },
        HFCheckpointEngine(CheckpointEngineConfig(at_end=True)),
        max_steps=1,
        parallel=Parallel(dp_shard=shards),
    ).train(seed=1)


def test_a_sharded_model_is_saved_and_exported_whole(
    ranks: Ranks, tmp_path: Path, tokenizer: Any
) -> None:
    """Of a vocabulary that has grown, by the same rows on each rank as in one process."""
    model = tiny.saved(tmp_path / "model", tokenizer, tied=True, vocabulary=590)
    ranks(save_on_ranks, 2, tmp_path / "two", model, 2)
    save_on_ranks(tmp_path / "one", model, 1)
    saved = [tmp_path / name / "exports/huggingface/step_00000001" for name in ("two", "one")]
    folders = [*saved, export_huggingface(tmp_path / "two")]
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert len({(folder / file).read_bytes() for folder in folders}) == 1
    config = "pretrained/model/config.json"
    assert (tmp_path / "two" / config).read_bytes() == (tmp_path / "one" / config).read_bytes()
    rows = loaded(folders[0]).get_input_embeddings().weight
    assert torch.equal(rows[:590], tiny.model(tied=True, vocabulary=590).lm_head.weight)
    assert rows[590:].std(0).min() > 0


class Own(Trainer):
    """Has a model that is none of transformers."""


def test_the_engine_refuses_models_of_others(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    trainer = Own(
        model=model,
        loss_fn=torch.nn.MSELoss(),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        train_dataloader=DataLoader(TensorDataset(torch.ones(4, 2), torch.ones(4, 2))),
        max_steps=1,
        progress=False,
        run_dir=tmp_path,
        callbacks=[HFCheckpointEngine()],
    )
    with pytest.raises(ConfigError, match="saves models of transformers, and Linear is none"):
        trainer.train(seed=1)
