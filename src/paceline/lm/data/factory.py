"""From sources to loaders: tokenized once, kept, mixed, packed."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from torch.utils.data import DataLoader

from paceline import registry
from paceline.errors import ConfigError, DataError
from paceline.factories import (
    DataConfig,
    DataFactory,
    DataSourceConfig,
    HumanFloat,
    HumanInt,
    OfKind,
)
from paceline.lm.data.chat import (
    CUT_END,
    CUT_START,
    Refusal,
    check_template,
    encode_dialogue,
    encode_text,
)
from paceline.lm.data.columns import split_of
from paceline.lm.data.mixed import MixedSamples
from paceline.lm.data.mixing import sample, split
from paceline.lm.data.packing import (
    Collate,
    PackedDataset,
    PaddedDataset,
    chop,
    lengths_of,
    plan_packs,
)
from paceline.lm.data.report import Report, report_on
from paceline.lm.data.rows import Rows, fingerprint
from paceline.lm.data.sample import Sample
from paceline.lm.data.sources import RowSource
from paceline.lm.data.token_store import TokenStore, store_for
from paceline.recipe.mistakes import Mistakes

HELD_OUT = "held_out"
"""The name of the evaluation source that `data.eval_share` makes."""


def in_short(text: str) -> Mapping[str, Any]:
    """A source that a recipe gives as text: the registered name, or a dataset of the hub.

    Args:
        text: "python_manual", "org/set" or "org/set:train[:20]".
    """
    name, colon, _ = text.partition(":")
    if name in registry.names("data_source"):
        return {"type": name} | ({"split": text.partition(":")[2]} if colon else {})
    dataset, named = split_of(text, "")
    return {"type": "huggingface", "name_or_path": dataset} | ({"split": named} if named else {})


_SOURCES = OfKind("data_source", shorthand=in_short)


class LMDataConfig(DataConfig):
    """What language models are trained on.

    Attributes:
        max_length: tokens of a sample, and of a pack; None for the model's context.
        pack: put several samples into a row, each attended to alone.
        truncate: what happens with a longer sample: it is dropped, or its "start" or "end" is cut.
        pad_to_multiple: rows that are not packed are padded to a multiple of so many tokens.
        eval_share: the part of the training rows, by a hash of their content, to validate on as
            "held_out".
        cache_dir: where tokenized samples are kept; None for the user's cache folder.
        cache: "auto", or "only" to raise an error rather than tokenize.
        sources, eval_sources: what to train on, and to validate on by name; `"org/set:split"` in
            short.
    """

    free = DataConfig.free | {"cache_dir", "cache"}
    max_length: HumanInt | None = pydantic.Field(None, gt=1)
    pack: bool = False
    truncate: Literal["drop", "start", "end"] = "drop"
    pad_to_multiple: HumanInt = pydantic.Field(1, gt=0)
    eval_share: HumanFloat = pydantic.Field(0.0, ge=0, lt=1)
    cache_dir: Path | None = None
    cache: Literal["auto", "only"] = "auto"
    sources: Annotated[list[DataSourceConfig], _SOURCES] = []
    eval_sources: Annotated[dict[str, DataSourceConfig], _SOURCES] = {}

    @pydantic.model_validator(mode="after")
    def _have_effect(self) -> LMDataConfig:
        if not self.sources:
            raise ValueError("sources: there is nothing to train on.")
        if self.pack and "pad_to_multiple" in self.model_fields_set:
            raise ValueError(
                "pad_to_multiple has no effect with pack: true: packs have one length."
            )
        if HELD_OUT in self.eval_sources and self.eval_share:
            raise ValueError(
                f"{HELD_OUT!r} is the name of what eval_share holds out: rename yours."
            )
        return self


@dataclass
class Prepared:
    """The tokenized samples of one set.

    Attributes:
        stores: of each source.
        weights: of each source.
        counts: what was dropped and cut, by source and reason.
    """

    stores: dict[str, TokenStore] = field(default_factory=dict)
    weights: list[float] = field(default_factory=list)
    counts: dict[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """The rows that a source gives to a set.

    Attributes:
        name: of the source.
        source: it.
        rows: as they are tokenized.
        place: of the source in the recipe.
    """

    name: str
    source: Any
    rows: Rows
    place: tuple[str, ...]


class LMDataFactory(DataFactory):
    """Makes loaders of tokenized samples; a subclass says what a sample is."""

    config_type = LMDataConfig
    form: ClassVar[str] = ""

    _prepared: tuple[Prepared, dict[str, Prepared]] | None = None

    def __call__(self) -> tuple[Any, Any]:
        train, evaluation = self.prepare()
        loader = self._loader(train)
        self.evaluates = True
        loaders = {name: self._loader(one) for name, one in evaluation.items()}
        return loader, loaders or None

    def prepare(self) -> tuple[Prepared, dict[str, Prepared]]:
        """Tokenizes what is not in the cache: the training set, and evaluation sets by name.

        Raises:
            RecipeError: the tokenizer or sources cannot be used so, or have no samples; all
                mistakes are listed.
        """
        if self._prepared is None:
            mistakes = self.trainer.config.mistakes()
            self.check(mistakes)
            mistakes.raise_any(self.trainer.config.origin)
        assert self._prepared is not None
        return self._prepared

    def check(self, mistakes: Mistakes) -> None:
        """Reads the sources, and tokenizes them unless there are mistakes that show earlier.

        Args:
            mistakes: as for every factory. Where the tokenizer or the model are among them, nothing
                is said of what follows from that.
        """
        if not mistakes.concern(("tokenizer",)):
            with mistakes.collecting("tokenizer"):
                self.check_tokenizer(self.trainer.tokenizer)
        if not mistakes.concern(("model",)):
            with mistakes.collecting("data"):
                _ = self.max_length
        read = self._read(mistakes)
        if mistakes.found:
            return
        train, evaluation = Prepared(), {name: Prepared() for name in read if name is not None}
        for of, parts in read.items():
            for part in parts:
                with mistakes.collecting(*part.place):
                    self._add(train if of is None else evaluation[of], part)
        self._prepared = train, evaluation

    def _read(self, mistakes: Mistakes) -> dict[str | None, list[_Part]]:
        """The rows of the training set, under None, and of evaluation sets by name."""
        read: dict[str | None, list[_Part]] = {None: []}
        share = self.config.eval_share
        sources = _named(self._sources(self.config.sources, "train"))
        for i, (name, source) in enumerate(sources):
            place = ("data", "sources", str(i))
            with mistakes.collecting(*place):
                rows = self._rows(source)
                if share:
                    parts = split(rows, {"train": 1 - share, "eval": share}, seed=self.config.seed)
                    for part, of in (("eval", HELD_OUT), ("train", None)):
                        if not len(parts[part]):
                            raise ConfigError(
                                f"data.eval_share={share}: of the {len(rows)} rows of {name!r} "
                                f"none is in the part {part!r}."
                            )
                        read.setdefault(of, []).append(_Part(name, source, parts[part], place))
                else:
                    read[None].append(_Part(name, source, rows, place))
        for name, config in self.config.eval_sources.items():
            place = ("data", "eval_sources", name)
            with mistakes.collecting(*place):
                [source] = self._sources([config], "eval")
                read[name] = [_Part(name, source, self._rows(source), place)]
        return read

    def _rows(self, source: Any) -> Rows:
        """A source's rows, as many as its config asks for.

        Raises:
            ConfigError: there are none.
        """
        if not isinstance(source, RowSource):
            rows = source()
        else:
            rows = source.dialogues() if self.form == "dialogues" else source.texts()
        if not len(rows):
            part = source.config.split or source.split
            of = f" in the split {part!r}" if getattr(source.config, "eval_share", 0) else ""
            raise ConfigError(f"the source has no rows{of}.")
        ratio, count = source.config.sample_ratio, source.config.sample_count
        if ratio is None and count is None:
            return rows
        return sample(rows, ratio=ratio, count=count, seed=source.config.sample_seed)

    def _add(self, prepared: Prepared, part: _Part) -> None:
        """Tokenizes a source's rows into a set, or takes them from the cache.

        Raises:
            ConfigError: no sample is left of them, on every rank; or the cache lacks them and
                `data.cache` is "only".
        """
        name, rows = part.name, part.rows
        counts: Counter[str] = Counter()
        key = {
            # By type: what other sources there are, and its place among them, changes no sample.
            "sources": {part.source.config.type or name: {"content": fingerprint(rows)}},
            **tokenizer_key(self.trainer.tokenizer),
            "settings": {
                "form": self.form,
                "max_length": self.longest,
                "truncate": self.config.truncate,
                **self.settings(),
            },
        }
        store = store_for(
            self.config.cache_dir or cache_folder(),
            key,
            partial(self._encoded, rows, counts),
            world=self.trainer.world,
            rebuild="never" if self.config.cache == "only" else "auto",
            notes=lambda: dict(counts),
        )
        if not len(store):
            why = "; ".join(f"{reason}: {n}" for reason, n in store.notes.items())
            raise ConfigError(f"none of the {len(rows)} rows is left ({why}).")
        prepared.stores[name] = store
        prepared.weights.append(part.source.config.weight)
        prepared.counts[name] = store.notes

    def _encoded(self, rows: Rows, counts: Counter[str]) -> Iterator[Sample]:
        try:
            for row in rows:
                made = self.encode(row, counts)
                if not isinstance(made, Refusal):
                    yield made
        except DataError as error:
            # One rank reads. As a mistake of the recipe it is raised, and collected, on every rank.
            raise ConfigError(str(error)) from error

    @property
    def max_length(self) -> int:
        """The longest sample, in tokens.

        Raises:
            ConfigError: it is longer than the model's context, or neither is known.
        """
        asked, context = self.config.max_length, context_length(self.trainer)
        if asked is None and context is None:
            raise ConfigError("data.max_length: the model does not say how long its context is.")
        if asked is not None and context is not None and asked > context:
            raise ConfigError(
                f"data.max_length: {asked} tokens are more than the model's context of {context}."
            )
        return asked or context or 0

    @property
    def longest(self) -> int | None:
        """The most tokens of a sample; None for no limit."""
        return self.max_length

    def _loader(self, prepared: Prepared) -> DataLoader[Any]:
        return self.create_dataloader(self.process(self.mixed(prepared)))

    def mixed(self, prepared: Prepared) -> MixedSamples:
        """The samples of a set as one sequence.

        Args:
            prepared: from `prepare`.
        """
        return MixedSamples(prepared.stores, prepared.weights, self.config.seed)

    def process(self, dataset: Any) -> PackedDataset:
        """The rows of batches.

        Args:
            dataset: the samples.
        """
        return self.packed(dataset) if self.config.pack else PaddedDataset(dataset)

    def create_dataloader(self, dataset: Any) -> DataLoader[Any]:
        config = self.config
        pad = getattr(self.trainer.tokenizer, "pad_token_id", None)
        collate = Collate(
            length=self.max_length if config.pack else None,
            pad_to_multiple=1 if config.pack else config.pad_to_multiple,
            pad_id=pad or 0,
        )
        return DataLoader(
            dataset,
            batch_size=config.micro_batch_size,
            shuffle=not self.evaluates,
            num_workers=config.num_workers,
            collate_fn=collate,
        )

    def report(self) -> Report:
        """What the sources hold, from the cache or tokenized now."""
        train, evaluation = self.prepare()
        packs = self.packed(self.mixed(train)).packs if self.config.pack else None
        dropped, truncated = {}, {}
        for one in (train, *evaluation.values()):
            for name, counts in one.counts.items():
                cut = {r: n for r, n in counts.items() if r in (CUT_END, CUT_START)}
                truncated[name] = cut
                dropped[name] = {r: n for r, n in counts.items() if r not in cut}
        stores = {
            name if len(one.stores) == 1 else f"{name}.{source}": store
            for name, one in evaluation.items()
            for source, store in one.stores.items()
        }
        taken = {name: store for name, store in stores.items() if name not in train.stores}
        taken |= {f"{n} (eval)": store for n, store in stores.items() if n in train.stores}
        return report_on(train.stores, taken, packs=packs, dropped=dropped, truncated=truncated)

    # What a subclass says

    def settings(self) -> dict[str, Any]:
        """Further settings that decide what a sample is, for the cache's key."""
        return {}

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuses a tokenizer that cannot be used, before any data is read.

        Args:
            tokenizer: the trainer's.
        """
        if tokenizer is None:
            raise ConfigError("tokenizer: language-model data needs one: give `tokenizer:`.")

    @abstractmethod
    def encode(self, row: Mapping[str, Any], counts: Counter[str]) -> Sample | Refusal:
        """The sample of a row.

        Args:
            row: of a source.
            counts: counts cuts and refusals by reason.
        """
        raise NotImplementedError(f"{type(self).__qualname__} needs an encode().")

    def packed(self, samples: Sequence[Sample]) -> PackedDataset:
        """Samples in packs.

        Args:
            samples: of a set.
        """
        return PackedDataset(samples, plan_packs(lengths_of(samples), self.max_length))


class SFTDataConfig(LMDataConfig):
    """Dialogues, of which the answers are trained.

    Attributes:
        trained_roles: whose messages are trained.
        ignore_empty_think: do not train `<think></think>` without a thought.
        template_arguments: variables of the chat template, such as `enable_thinking`.
    """

    trained_roles: list[str] = ["assistant"]
    ignore_empty_think: bool = False
    template_arguments: dict[str, Any] = {}


class SFTDataFactory(LMDataFactory):
    """Dialogues by the tokenizer's chat template; the answers and their end tokens are trained."""

    name = "sft"
    config_type = SFTDataConfig
    form = "dialogues"

    def settings(self) -> dict[str, Any]:
        names = ("trained_roles", "ignore_empty_think", "template_arguments")
        return {name: getattr(self.config, name) for name in names}

    def check_tokenizer(self, tokenizer: Any) -> None:
        super().check_tokenizer(tokenizer)
        check_template(tokenizer, self.config.template_arguments)

    def encode(self, row: Mapping[str, Any], counts: Counter[str]) -> Sample | Refusal:
        return encode_dialogue(
            self.trainer.tokenizer,
            row.get("messages", ()),
            max_length=self.max_length,
            truncate=self.config.truncate,
            trained_roles=self.config.trained_roles,
            ignore_empty_think=self.config.ignore_empty_think,
            tools=row.get("tools"),
            template_arguments=self.config.template_arguments,
            counts=counts,
        )


class CausalDataConfig(LMDataConfig):
    """Texts, all of whose tokens are trained.

    Attributes:
        pack: packs of exactly `max_length` tokens, texts being cut where one ends.
        tail: what happens with the last, shorter pack.
    """

    pack: bool = True
    tail: Literal["keep", "drop"] = "drop"

    @pydantic.model_validator(mode="after")
    def _have_effect_too(self) -> CausalDataConfig:
        given = self.model_fields_set
        if not self.pack and "tail" in given:
            raise ValueError("tail has no effect with pack: false: no text is cut at a pack's end.")
        if self.pack and "truncate" in given:
            raise ValueError(
                "truncate has no effect with pack: true: a text continues in the next pack."
            )
        return self


class CausalDataFactory(LMDataFactory):
    """Texts, each between BOS and EOS where the tokenizer has them."""

    name = "causal"
    config_type = CausalDataConfig
    form = "texts"

    @property
    def longest(self) -> int | None:
        return None if self.config.pack else self.max_length

    def check_tokenizer(self, tokenizer: Any) -> None:
        super().check_tokenizer(tokenizer)
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise ConfigError(
                "tokenizer.eos_token: the tokenizer has no end token, and texts would have no end: "
                "name one of its tokens."
            )

    def encode(self, row: Mapping[str, Any], counts: Counter[str]) -> Sample | Refusal:
        return encode_text(
            self.trainer.tokenizer,
            row.get("text", ""),
            max_length=self.longest,
            truncate=self.config.truncate,
            counts=counts,
        )

    def packed(self, samples: Sequence[Sample]) -> PackedDataset:
        tail = "keep" if self.evaluates else self.config.tail
        tokens = int(lengths_of(samples).sum())
        if tail == "drop" and tokens < self.max_length:
            raise ConfigError(
                f"data.max_length={self.max_length}: all texts together have {tokens} tokens, less "
                "than one pack; lower it, or say tail: keep."
            )
        return PackedDataset(samples, chop(samples, self.max_length, tail=tail))


def _named(sources: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Sources with different names: their types, numbered where there are several."""
    types = [source.config.type or type(source).__name__ for source in sources]
    for i, (kind, source) in enumerate(zip(types, sources, strict=True)):
        yield (kind if types.count(kind) == 1 else f"{kind}_{types[:i].count(kind) + 1}"), source


def context_length(trainer: Any) -> int | None:
    """The tokens that a trainer's model takes at most, as its config says; None if it does not."""
    found = getattr(trainer, "model_config", None)
    value = getattr(found, "max_position_embeddings", None)
    return value if isinstance(value, int) else None


def tokenizer_key(tokenizer: Any) -> dict[str, Any]:
    """What of a tokenizer decides the tokens of a text, for the cache's key.

    Args:
        tokenizer: of transformers, or an object with `to_str()` of its own.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    text = backend.to_str() if hasattr(backend, "to_str") else repr(backend)
    special = {
        name: str(value) for name, value in getattr(tokenizer, "special_tokens_map", {}).items()
    }
    template = getattr(tokenizer, "chat_template", None)
    return {
        "tokenizer": {
            "files": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
            "special": special,
        },
        "template": hashlib.blake2b(str(template).encode(), digest_size=16).hexdigest(),
    }


def cache_folder() -> Path:
    """Where tokenized samples are kept unless a recipe says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "paceline" / "tokens"
