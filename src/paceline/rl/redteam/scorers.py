"""Scorers: what is harmful in a text, by a classifier, a rule or a guard model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from paceline.errors import ConfigError, MissingExtraError, nearest
from paceline.lm.loading import reading
from paceline.rl.scorer import Scorer

_BATCH = 32  # texts that a classifier reads at once


class ProfanityScorer(Scorer):
    """The probability that a text is offensive, by a linear model (alt-profanity-check).

    Raises:
        MissingExtraError: alt-profanity-check is not installed.
    """

    name = "profanity"

    def __init__(self) -> None:
        self._predict = _imported(
            "profanity_check", "predict_prob", "the scorer profanity", "paceline[redteam]"
        )

    def score(self, x: Sequence[str]) -> list[float]:
        return [float(value) for value in self._predict(list(x))] if len(x) else []


class ClassifierScorer(Scorer):
    """The probability of one label under a text classifier of transformers.

    Args:
        model: a folder, a hub id, or a model.
        label: whose probability is the score, by its name or number.
        tokenizer: of a model that is given as an object.
        max_length: tokens of a text that are read; the last ones.

    Raises:
        ConfigError: the model has no such label, or it cannot be read.
    """

    name = "classifier"

    def __init__(
        self, model: Any, label: str | int, *, tokenizer: Any = None, max_length: int = 512
    ) -> None:
        if isinstance(model, str):
            from transformers import (  # pyright: ignore[reportMissingImports] - an extra
                AutoModelForSequenceClassification,
                AutoTokenizer,
            )

            with reading(model):
                tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
                model = AutoModelForSequenceClassification.from_pretrained(
                    model, trust_remote_code=False, use_safetensors=True, weights_only=True
                )
        labels = {str(v): int(k) for k, v in getattr(model.config, "id2label", {}).items()}
        index = labels.get(str(label), label)
        if not isinstance(index, int) or not 0 <= index < model.config.num_labels:
            hint = nearest(str(label), labels) or "."
            raise ConfigError(f"label={label!r}: the classifier's are {', '.join(labels)}{hint}")
        if tokenizer is None:
            raise ConfigError("tokenizer: a classifier that is given as an object needs its own.")
        self.label, self.max_length, self._index = label, max_length, index
        self._model, self._tokenizer = model.eval().requires_grad_(False), tokenizer

    @torch.no_grad()
    def score(self, x: Sequence[str]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(x), _BATCH):
            encoded = [
                self._tokenizer(text)["input_ids"][-self.max_length :]
                for text in x[start : start + _BATCH]
            ]
            longest = max(1, *map(len, encoded))
            ids = torch.zeros(len(encoded), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, tokens in enumerate(encoded):
                ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
                mask[row, : len(tokens)] = 1
            if self._model.config.pad_token_id is not None:
                ids = ids.masked_fill(mask == 0, self._model.config.pad_token_id)
            device = next(self._model.parameters()).device
            logits = self._model(ids.to(device), attention_mask=mask.to(device)).logits.float()
            scores += logits.softmax(-1)[:, self._index].tolist()
        return scores


class RuleScorer(Scorer):
    """A function of one text.

    Args:
        function: gives a number.
    """

    def __init__(self, function: Callable[[str], float]) -> None:
        self.function = function

    def score(self, x: Sequence[str]) -> list[float]:
        return [float(self.function(text)) for text in x]


_CATEGORIES = (
    *("toxicity", "severe_toxicity", "obscene", "identity_attack", "insult", "threat"),
    "sexual_explicit",
)


class DetoxifyScorer(Scorer):
    """A category of the package detoxify, whose weights it fetches at the first use.

    Args:
        harm_category: such as "toxicity".
        variant: "original", "multilingual" or "unbiased".
        device: where the classifier is.

    Raises:
        ConfigError: no such category or variant.
        MissingExtraError: detoxify is not installed.
    """

    name = "detoxify"

    def __init__(
        self,
        harm_category: str = "toxicity",
        variant: str = "original",
        *,
        device: str = "cpu",
    ) -> None:
        variants = ("original", "multilingual", "unbiased")
        for setting, value, known in (
            ("harm_category", harm_category, _CATEGORIES),
            ("variant", variant, variants),
        ):
            if value not in known:
                raise ConfigError(f"{setting}={value!r}: choose one of {', '.join(known)}.")
        self.harm_category, self.variant = harm_category, variant
        make = _imported("detoxify", "Detoxify", "DetoxifyScorer", "paceline[detoxify]")
        self._model = make(variant, device=device)

    def score(self, x: Sequence[str]) -> list[float]:
        if not len(x):
            return []
        found = self._model.predict(list(x))
        if self.harm_category not in found:
            known = ", ".join(found)
            raise ConfigError(f"harm_category={self.harm_category!r}: {self.variant} has {known}.")
        return [float(value) for value in found[self.harm_category]]


class LlamaGuardScorer(Scorer):
    """The probability that Llama Guard calls a text unsafe.

    Args:
        model: a folder, a hub id, or a model.
        tokenizer: of a model that is given as an object.
        device: where the model is; None for where it was loaded.
        dtype: of its weights.
    """

    name = "llama_guard"

    def __init__(
        self,
        model: Any = "meta-llama/Llama-Guard-3-8B",
        *,
        tokenizer: Any = None,
        device: str | None = None,
        dtype: str = "bfloat16",
    ) -> None:
        if isinstance(model, str):
            from paceline.lm.loading import read_model, read_tokenizer

            with reading(model):
                tokenizer = read_tokenizer(model)
                model, _ = read_model(model, dtype=dtype)
        self._model = model.eval().requires_grad_(False)
        if device is not None:
            self._model.to(device)
        self._tokenizer = tokenizer
        self._unsafe = self._ids("unsafe")[0]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def score(self, x: Sequence[str]) -> list[float]:
        scores = []
        opening = self._ids("\n\n")
        device = next(self._model.parameters()).device
        for text in x:
            chat = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": text}]
            # As text first: what `return_tensors` gives has changed between versions.
            prompt = self._tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
            ids = torch.tensor([self._ids(prompt) + opening], device=device)
            logits = self._model(ids).logits[0, -1].float()
            scores.append(float(logits.softmax(-1)[self._unsafe]))
        return scores


def _imported(module: str, attribute: str, what: str, extra: str) -> Any:
    import importlib

    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise MissingExtraError(
            f'{what} needs the package {module}: pip install "{extra}".'
        ) from error
