"""Trainers of causal language models: on texts, and on dialogues."""

from __future__ import annotations

import math
from typing import Any

import pydantic
import torch
import torch.nn.functional as F

from paceline.errors import ConfigError
from paceline.factories import FactoryTrainer, HumanFloat, TrainerConfig
from paceline.lm.attention import (
    NAME,
    VARLEN,
    attend_by_document,
    check_packing,
    packed_inputs,
)
from paceline.lm.data.factory import CausalDataFactory, SFTDataFactory
from paceline.lm.data.packing import PackedDataset, PaddedDataset, count_trained
from paceline.lm.data.sample import IGNORED
from paceline.lm.models import HFModelFactory, HFTokenizerFactory
from paceline.lm.samples import GenerateSamples, SamplesConfig
from paceline.lm.throughput import TokenThroughput


class LMTrainerConfig(TrainerConfig):
    """What a recipe of a language model says under `trainer:`, beside the Trainer's own settings.

    Attributes:
        peak_tflops: what a device can do at most, in 10^12 operations per second, for `mfu` in the
            timing rows; known GPUs have theirs.
        samples: what the model generates at each validation; None for nothing.
    """

    free = frozenset({"peak_tflops", "samples"})
    samples: SamplesConfig | None = None
    peak_tflops: HumanFloat | None = pydantic.Field(None, gt=0)


class LMTrainer(FactoryTrainer):
    """Trains a causal language model on tokens: the mean loss over those that are trained.

    A batch has `input_ids` and `labels` of [rows, length], which the model sees as they are: token
    t + 1 is predicted from the tokens up to t. Validation logs `val/loss` and `val/perplexity`, of
    several sources each under its name; the perplexity is that of the mean loss over all tokens.

    Timing rows have tokens and operations per second (`TokenThroughput`), unless no rows are
    written (`loggers=[]`).

    Whether rows hold several documents follows from the data. Then the model attends within each
    alone, and before training its logits are compared with those of documents alone.
    """

    config_type = LMTrainerConfig
    model_factory_type = HFModelFactory
    tokenizer_factory_type = HFTokenizerFactory

    attention: str | None = None
    """The model's own attention, where it attends by document instead."""

    _packs = False

    def __init__(self, config: Any = None, **settings: Any) -> None:
        super().__init__(config, **settings)
        if self.loggers != [] and not any(isinstance(c, TokenThroughput) for c in self.callbacks):
            self.callbacks.append(TokenThroughput(getattr(config, "peak_tflops", None)))
        if (samples := getattr(config, "samples", None)) is not None:
            self.callbacks.append(GenerateSamples(samples))

    @property
    def model_config(self) -> Any:
        """The config of the model, made already or not; None if it has none."""
        if isinstance(self.model, torch.nn.Module):
            return getattr(self.model, "config", None)
        if self.config is None or self.config.model is None:
            return None
        return getattr(self.factory("model"), "model_config", None)

    def configure(self) -> None:
        self.check("tokenizer", "data", "model", "optimizer", "lr_scheduler")
        self.make("tokenizer", "data")
        self._check_samples()
        super().configure()
        dataset = getattr(self.train_dataloader, "dataset", None)
        self._packs = isinstance(dataset, PackedDataset) and not isinstance(dataset, PaddedDataset)
        if not self._packs or not isinstance(self.model, torch.nn.Module):
            return
        self.attention = self.attention or getattr(self.model.config, "_attn_implementation", None)
        attend_by_document(self.model)
        if not self.world.on_paper:
            gap = check_packing(self.model, capacity=dataset.packs.capacity)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
            self.plan.add(
                f"packs: a document's logits differ by {gap:.1g} of the largest from those alone",
                "data.pack",
            )

    def _check_samples(self) -> None:
        """Refuses samples that nothing would generate, before the model is built."""
        if getattr(self.config, "samples", None) is None:
            return
        if self.val_dataloader is None and not self.is_overridden("evaluate"):
            raise ConfigError(
                "trainer.samples: the model generates at validations, and there is nothing to "
                "validate on: give data.eval_sources or data.eval_share."
            )
        if self.tokenizer is None:
            raise ConfigError("trainer.samples needs a tokenizer: give `tokenizer:`.")

    def prompt_ids(self, text: str) -> list[int]:
        """The tokens of a prompt for samples, as training has them.

        Args:
            text: how a text begins.
        """
        opening = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        ids = list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return ids if ids[: len(opening)] == opening else opening + ids

    def count_items(self, batch: Any) -> Any:
        """The trained tokens of a batch.

        Args:
            batch: with `labels`, [rows, length].
        """
        return count_trained(batch)

    def loss(self, batch: Any) -> torch.Tensor:
        """The mean cross-entropy over a batch's trained tokens, in nats.

        Args:
            batch: `input_ids` and `labels`, [rows, length]; in packs also `position_ids` and the
                lengths of `documents`.
        """
        logits = self.model(**self.inputs(batch)).logits
        return next_token_loss(logits, batch["labels"])

    def inputs(self, batch: Any) -> dict[str, Any]:
        """What the model is called with.

        Args:
            batch: as for `loss`.
        """
        if self._packs:
            if self.model.config._attn_implementation not in (NAME, VARLEN):  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
                raise ConfigError(
                    "the model's attention was changed during training on packs: documents would "
                    "attend to each other. Give it back: paceline.lm.attend_by_document(model)."
                )
            return packed_inputs(batch)
        # Padding is at the end, where no token before it sees it.
        return {"input_ids": batch["input_ids"], "use_cache": False}

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss of each row, [rows], the mean over its trained tokens.

        Args:
            batch: as for `loss`.
            batch_idx: its index on this rank.
        """
        logits = self.model(**self.inputs(batch)).logits
        labels = batch["labels"]
        each = F.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=IGNORED,
            reduction="none",
        )  # fmt: skip
        return each.sum(1) / (labels[:, 1:] != IGNORED).sum(1).clamp(min=1)

    def on_metrics(self, metrics: dict[str, float]) -> None:
        """Adds the perplexity of each mean loss."""
        add_perplexity(metrics)


class SFTTrainer(LMTrainer):
    """Fine-tunes a language model on dialogues: the answers and their end tokens are trained."""

    name = "sft"
    data_factory_type = SFTDataFactory

    def prompt_ids(self, text: str) -> list[int]:
        """The tokens of a dialogue up to where its answer begins.

        Args:
            text: what a user says.
        """
        arguments = getattr(getattr(self.config, "data", None), "template_arguments", {})
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            tokenize=False,
            add_generation_prompt=True,
            **arguments,
        )
        return list(self.tokenizer(rendered, add_special_tokens=False)["input_ids"])


class CausalTrainer(LMTrainer):
    """Trains a language model on texts, every token of them."""

    name = "causal"
    data_factory_type = CausalDataFactory


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of the next token over those that are trained; 0 if none is.

    Args:
        logits: [rows, length, words].
        labels: [rows, length], `IGNORED` where a token is not trained; not shifted.
    """
    shifted = labels[:, 1:].reshape(-1)
    total = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), shifted, ignore_index=IGNORED, reduction="sum"
    )
    return total / (shifted != IGNORED).sum().clamp(min=1)


def add_perplexity(metrics: dict[str, float]) -> None:
    """Adds "val/perplexity" beside "val/loss", and the same for each named source.

    Args:
        metrics: of a validation; a loss is a mean over all trained tokens, in nats.
    """
    losses = {k: v for k, v in metrics.items() if k.startswith("val/") and k.endswith("/loss")}
    for name, value in losses.items():
        perplexity = math.exp(value) if value < 700 else math.inf
        metrics[f"{name.removesuffix('loss')}perplexity"] = perplexity
