"""What is wrong with a recipe of a language model: said before the model is built, all at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import code_forgotten
from command import Paceline
from paceline.errors import ConfigError, RecipeError
from paceline.lm.data import token_store
from paceline.recipe import build_trainer, load_recipe
from paceline.testing import Ranks

RECIPE = """\
trainer: {{type: sft, max_steps: 1, progress: false}}
model: {{name_or_path: {tiny}/model}}
data:
  max_length: 128
  cache_dir: cache
  sources: [{{type: jsonl, path: "{tiny}/chats.jsonl"}}]
  eval_sources: {{}}
optimizer: {{lr: 3e-3}}
checkpoint: null
run: {{dir: run}}
"""
Write = Callable[..., Path]


@pytest.fixture
def recipe(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes the recipe with other values, one section a line; no model can be built."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", None)

    def write(**sections: Any) -> Path:
        tree = yaml.safe_load(RECIPE.format(tiny=tiny))
        for name, values in sections.items():
            tree[name] = {**(tree.get(name) or {}), **values}
        lines = []
        for name, values in tree.items():
            if name != "data":
                lines.append(f"{name}: {json.dumps(values)}")
                continue
            lines.append("data:")
            lines += [f"  {key}: {json.dumps(v)}" for key, v in values.items() if key != "sources"]
            lines += ["  sources:", *(f"  - {json.dumps(one)}" for one in values["sources"])]
        path = tmp_path / "r.yaml"
        path.write_text("\n".join(lines) + "\n")
        return path

    with code_forgotten():
        yield write


def refusal(path: Path) -> list[str]:
    """The lines that a run of the recipe ends with: a ConfigError, for which the exit code is 2."""
    with pytest.raises(RecipeError) as caught:
        build_trainer(load_recipe(path)).train(seed=0)
    return str(caught.value).splitlines()


def told(path: Path, expected: dict[str, str]) -> None:
    """Asserts that these are the mistakes, in order: what each line holds, by line and key."""
    _, *found = refusal(path)
    for line, (place, text) in zip(found, expected.items(), strict=True):
        assert line.startswith(f"  {path}:{place}: " if place else f"  {path}: ")
        assert text in line


def rows(path: Path, *dialogues: Any) -> dict[str, Any]:
    path.write_text("".join(json.dumps(one) + "\n" for one in dialogues))
    return {"type": "jsonl", "path": str(path)}


def dialogue(question: str, answer: str) -> dict[str, Any]:
    turns = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_mistakes_of_all_sources_are_found_at_once_before_anything_is_tokenized(
    recipe: Write, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.lm.data.factory.store_for", None)
    good = {"type": "jsonl", "path": f"{tiny}/chats.jsonl"}
    asked = {"question": "a", "answer": "b"}
    path = recipe(
        model={"name_or_path": f"{tiny}/model", "config": {"hiden_size": 8}},
        data={
            "max_length": 1000,
            "sources": [
                good,
                rows(tmp_path / "columns.jsonl", asked),
                {
                    **rows(tmp_path / "named.jsonl", asked),
                    "columns": {"user": "qestion", "assistant": "answer"},
                },
                {"type": "huggingface", "name_or_path": "some/set", "cache_dir": str(tmp_path)},
                rows(tmp_path / "empty.jsonl"),
                {**rows(tmp_path / "one.jsonl", dialogue("a", "b")), "eval_share": 0.001,
                 "split": "eval"},
            ],
            "eval_sources": {"near": rows(tmp_path / "torn.jsonl", "no row")},
        },
    )  # fmt: skip
    expected = {
        "2: model.config.hiden_size": "no such key; did you mean 'hidden_size'?",
        "9: data.sources.1": "the rows have no column messages. They have: question (str), answer",
        "10: data.sources.2": "the rows have no column 'qestion'; did you mean 'question'?",
        "11: data.sources.3": "HF_HUB_OFFLINE is set, so only downloaded ones are there",
        "12: data.sources.4": "the source has no rows.",
        "13: data.sources.5": "the source has no rows in the split 'eval'.",
        "6: data.eval_sources.near": "torn.jsonl, line 1: a row is an object with columns, not str",
    }
    told(path, expected)
    assert not (tmp_path / "run").exists()


def test_of_tokenized_sources_all_that_are_empty_or_lacking_are_named(
    recipe: Write, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [
        rows(tmp_path / "long.jsonl", dialogue("a", "b " * 300), dialogue("c", "d " * 300)),
        rows(tmp_path / "unasked.jsonl", {"messages": dialogue("a", "b")["messages"][:1]}),
        rows(tmp_path / "torn.jsonl", dialogue("a", "b"), "no row"),
        {"type": "jsonl", "path": f"{tiny}/chats.jsonl"},
    ]
    near = {"near": rows(tmp_path / "near.jsonl", {"messages": []})}
    path = recipe(data={"sources": sources, "eval_sources": near})
    told(
        path,
        {
            "8: data.sources.0": "none of the 2 rows is left (longer than max_length: 2).",
            "9: data.sources.1": "none of the 1 rows is left (no trained token: 1).",
            "10: data.sources.2": "torn.jsonl, line 2: a row is an object with columns, not str",
            "6: data.eval_sources.near": "none of the 1 rows is left (no message: 1).",
        },
    )
    # The fourth source is in the cache now. Another version cannot read what this one wrote.
    whole = {"sources": sources[3:], "cache": "only", "eval_sources": {}}
    with pytest.raises(ConfigError, match="'NoneType' object is not callable"):  # the model
        build_trainer(load_recipe(recipe(data=whole))).train(seed=0)
    monkeypatch.setattr(token_store, "FORMAT", "paceline-tokens-2")
    text = "(format of the files: paceline-tokens-1 -> paceline-tokens-2), and none may be made now"
    told(recipe(data=whole), {"9: data.sources.0": text})
    monkeypatch.undo()


def changed(tiny: Path, folder: Path, file: str = "", **values: Any) -> str:
    """A copy of the model's folder with other values in one of its files."""
    shutil.copytree(tiny / "model", folder)
    if file:
        held = json.loads((folder / file).read_text()) | values
        (folder / file).write_text(json.dumps(held))
    return str(folder)


def test_what_a_tokenizer_lacks_can_be_given_in_the_recipe(
    recipe: Write, tmp_path: Path, tiny: Path
) -> None:
    name = changed(tiny, tmp_path / "bare", "tokenizer_config.json", eos_token=None, pad_token=None)
    template = (tmp_path / "bare/chat_template.jinja").read_text()
    (tmp_path / "bare/chat_template.jinja").unlink()
    path = recipe(model={"name_or_path": name})
    told(path, {"": "it has no chat template. Take the model's instruct version, or set"})
    own = {"chat_template": template, "eos_token": "<|imend|>"}
    path = recipe(model={"name_or_path": name}, tokenizer={**own, "chat_template": "none.jinja"})
    told(path, {"12: tokenizer.chat_template": "none.jinja: there is no such file, and a template"})
    path = recipe(model={"name_or_path": name}, tokenizer=own)
    told(path, {"12: tokenizer.eos_token": "tokens; did you mean '<|im_end|>'?"})
    del own["eos_token"]
    told(recipe(model={"name_or_path": name}, tokenizer=own), {"12: tokenizer": "no end token"})
    texts = [{"type": "jsonl", "path": f"{tiny}/texts.jsonl"}]
    path = recipe(model={"name_or_path": name}, trainer={"type": "causal"}, data={"sources": texts})
    told(path, {"": "tokenizer.eos_token: the tokenizer has no end token, and texts would have no"})
    (tmp_path / "own.jinja").write_text(template)
    own = {"chat_template": "own.jinja", "eos_token": "<|im_end|>"}
    trainer: Any = build_trainer(load_recipe(recipe(model={"name_or_path": name}, tokenizer=own)))
    trainer.make("tokenizer", "data")
    assert (trainer.tokenizer.chat_template, trainer.tokenizer.eos_token_id) == (template, 2)
    assert len(trainer.train_dataloader.dataset) == 12


def test_what_a_model_cannot_take_is_said_without_building_it(
    recipe: Write, tmp_path: Path, tiny: Path
) -> None:
    path = recipe(data={"max_length": 1000})
    told(path, {"4: data.max_length": "1000 tokens are more than the model's context of 256."})
    model = {"name_or_path": f"{tiny}/model", "config": {"vocab_size": 100}}
    told(recipe(model=model), {"2: model.config.vocab_size": "100: the tokenizer has ids up to"})
    name = changed(tiny, tmp_path / "large", "config.json", vocab_size=5000)
    told(recipe(model={"name_or_path": name}), {"2: model": "it is not this model's tokenizer"})
    told(recipe(model={"name_or_path": "org/model"}), {
        "": "tokenizer.name_or_path: 'org/model': ",
        "2: model.name_or_path": "'org/model': ",
    })  # fmt: skip
    name = changed(tiny, tmp_path / "own", "config.json", model_type="ours",
                   auto_map={"AutoConfig": "own.Config"})  # fmt: skip
    said = "it needs code of its own (trust_remote_code), and running that does not exist yet"
    path = recipe(model={"name_or_path": name}, tokenizer={"name_or_path": f"{tiny}/model"})
    told(path, {"2: model.name_or_path": said})
    name = changed(tiny, tmp_path / "pickled")
    (tmp_path / "pickled/model.safetensors").rename(tmp_path / "pickled/pytorch_model.bin")
    told(recipe(model={"name_or_path": name}), {"2: model": f"`--trust {name}` has its tensors"})


def test_a_gguf_file_of_an_unknown_form_is_refused_and_leaves_nothing(
    recipe: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that transformers cannot make a model of could not be exported either."""
    package = pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    writer = package.GGUFWriter(str(tmp_path / "odd.gguf"), "oddity")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = recipe(model={"name_or_path": str(tmp_path / "odd.gguf")})
    _, *found = refusal(path)
    assert any(f"{tmp_path}/odd.gguf cannot be converted: " in line for line in found)
    assert not any((tmp_path / "cache/paceline/gguf").glob("[!.]*"))


def test_keys_without_effect_are_mistakes(recipe: Write, tiny: Path) -> None:
    chats = {"type": "jsonl", "path": f"{tiny}/chats.jsonl"}
    told(
        recipe(
            data={
                "pack": True,
                "pad_to_multiple": 8,
                "sources": [{**chats, "split": "eval"}, {**chats, "sample_seed": 3}],
            }
        ),
        {
            "10: data.sources.0": "split='eval' has no effect here: with eval_share",
            "11: data.sources.1": "sample_seed has no effect without sample_ratio or sample_count",
        },
    )
    path = recipe(data={"pack": True, "pad_to_multiple": 8})
    told(path, {"3: data": "pad_to_multiple has no effect with pack: true"})
    texts = [{"type": "jsonl", "path": f"{tiny}/texts.jsonl", "roles": {"human": "user"}}]
    causal = {"type": "causal"}
    told(
        recipe(trainer=causal, data={"sources": texts}),
        {"8: data.sources.0": "roles has no effect on texts: it is for dialogues."},
    )
    path = recipe(trainer=causal, data={"sources": [chats], "pack": False, "tail": "keep"})
    told(path, {"3: data": "tail has no effect with pack: false"})
    path = recipe(trainer=causal, data={"sources": [chats], "truncate": "end"})
    told(path, {"3: data": "truncate has no effect with pack: true"})


def test_ranks_find_all_of_them_together_and_the_command_ends_with_code_2(
    recipe: Write, tmp_path: Path, ranks: Ranks
) -> None:
    sources = [
        rows(tmp_path / "long.jsonl", dialogue("a", "b " * 300)),
        rows(tmp_path / "torn.jsonl", dialogue("a", "b"), "no row"),
        rows(tmp_path / "unasked.jsonl", {"messages": dialogue("a", "b")["messages"][:1]}),
    ]
    recipe(data={"sources": sources})
    paceline = Paceline(tmp_path, ranks)
    try:
        code, out, err = paceline("train", "r.yaml", "--nproc", "2")
    finally:
        paceline.close()
    assert (code, out) == (2, "")
    for place, text in (
        ("8: data.sources.0", "none of the 1 rows is left (longer than max_length: 1)."),
        ("9: data.sources.1", "torn.jsonl, line 2: a row is an object"),
        ("10: data.sources.2", "none of the 1 rows is left (no trained token: 1)."),
    ):
        assert any(f"r.yaml:{place}: " in line and text in line for line in err.splitlines()), err
