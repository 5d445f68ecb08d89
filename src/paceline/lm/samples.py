"""Samples that a language model generates at each validation, as a table of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pydantic
import torch

from paceline.data.loader import loaders_by_name
from paceline.errors import ConfigError
from paceline.lm.data.sample import IGNORED
from paceline.log.media import Table
from paceline.log.predictions import open_predictions
from paceline.recipe.typed import Config, HumanInt
from paceline.trainer.callback import Callback
from paceline.world.seeding import random_state_kept, seed_everything, stream
from paceline.world.world import World

FOLDER = "samples"
COLUMNS = ("source", "prompt", "generated", "expected")
_MOST_OF_TEXT = 32  # tokens of a text of which nothing says where a prompt would end


class SamplesConfig(Config):
    """What a model generates at each validation.

    Attributes:
        prompts: how many prompts to take from each evaluation source, the first; or the prompts
            themselves: for dialogues what a user says, for texts how they begin.
        max_new_tokens: the most tokens to generate for each.
        temperature: 0 takes the likeliest token; above, tokens are drawn, seeded by run and step.
    """

    prompts: HumanInt | list[str] = 3
    max_new_tokens: HumanInt = pydantic.Field(64, gt=0)
    temperature: float = pydantic.Field(0.0, ge=0)

    @pydantic.field_validator("prompts")
    @classmethod
    def _some(cls, prompts: int | list[str]) -> int | list[str]:
        if not prompts or (isinstance(prompts, int) and prompts < 0):
            raise ValueError("prompts: give how many there are, 1 or more, or a list of texts.")
        return prompts


@dataclass(frozen=True)
class Prompt:
    """What the model continues.

    Attributes:
        source: the evaluation source; empty for a text of the recipe.
        ids: its tokens, at least one.
        expected: what follows in the data, as text.
    """

    source: str
    ids: list[int]
    expected: str = ""


class Speaker(Protocol):
    """What is read of a trainer of language models whose model generates."""

    model: Any
    tokenizer: Any
    val_dataloader: Any
    recorder: Any
    run_dir: Path | None
    seed: int
    attention: str | None
    autocast: Any

    @property
    def model_config(self) -> Any: ...
    @property
    def global_step(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def world(self) -> World: ...
    def prompt_ids(self, text: str) -> list[int]: ...
    def log(self, name: str, value: Any) -> None:
        """Logs a value.

        Args:
            name: of the value.
            value: such as a table.
        """
        ...


class GenerateSamples(Callback):
    """Generates at the end of each validation, which disturbs no number of training.

    Loggers that show tables get "val/samples", and the run folder `samples/step_<n>.jsonl`, a line
    a prompt. Every rank generates the same, since sharded weights take all of them.

    Args:
        config: what to generate.
    """

    # Before the clocks that leave validations out start again.
    priority = 10

    def __init__(self, config: SamplesConfig) -> None:
        self.config = config
        self._prompts: list[Prompt] | None = None  # while the run trains

    def on_train_start(self, trainer: Speaker) -> None:
        """Collects the prompts."""
        wanted = self.config.prompts
        if isinstance(wanted, list):
            prompts = [Prompt("", trainer.prompt_ids(text)) for text in wanted]
        else:
            prompts = list(_of_data(trainer, wanted))
        context = getattr(trainer.model_config, "max_position_embeddings", None)
        for prompt in prompts:
            if context is not None and len(prompt.ids) >= context:
                raise ConfigError(
                    f"trainer.samples.prompts: {trainer.tokenizer.decode(prompt.ids)!r:.40} ... "
                    f"has {len(prompt.ids)} tokens, which leave no room in the model's context of "
                    f"{context}."
                )
        self._prompts = prompts

    def on_validation_end(self, trainer: Speaker) -> None:
        """Generates, logs and writes."""
        if self._prompts is None:
            return
        with random_state_kept(), generating(trainer.model, trainer.attention) as model:
            seed_everything(stream(trainer.seed, "generate", trainer.global_step))
            texts = [self._continued(trainer, model, prompt.ids) for prompt in self._prompts]
        if not trainer.world.is_main:
            return
        decode = trainer.tokenizer.decode
        rows = [
            (prompt.source, decode(prompt.ids), text, prompt.expected)
            for prompt, text in zip(self._prompts, texts, strict=True)
        ]
        if trainer.recorder.shows_media or trainer.run_dir is None:
            trainer.log("val/samples", Table(COLUMNS, rows))
        if trainer.run_dir is not None:
            _write(trainer.run_dir / FOLDER, trainer.global_step, rows)

    def on_teardown(self, trainer: Speaker) -> None:
        """Forgets the prompts: evaluations outside a run generate nothing."""
        self._prompts = None

    def _continued(self, trainer: Speaker, model: Any, prompt: list[int]) -> str:
        """What the model generates after a prompt, without its end token."""
        from transformers import (  # pyright: ignore[reportMissingImports] - an extra
            GenerationConfig,
        )

        tokenizer, config = trainer.tokenizer, self.config
        context = getattr(trainer.model_config, "max_position_embeddings", None)
        room = config.max_new_tokens if context is None else context - len(prompt)
        drawn: dict[str, Any] = {"do_sample": False}
        if config.temperature:
            drawn = {"do_sample": True, "temperature": config.temperature, "top_k": 0, "top_p": 1.0}
        how = GenerationConfig(
            max_new_tokens=min(config.max_new_tokens, room),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            use_cache=True,
            **drawn,
        )
        ids = torch.tensor([prompt], device=trainer.device)
        with trainer.autocast:
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=how,
                synced_gpus=trainer.world.size > 1,
            )
        return tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True)


@contextmanager
def generating(model: Any, attention: str | None) -> Iterator[Any]:
    """A model as it can generate, within a validation: one that attends by document does not.

    Args:
        model: of transformers.
        attention: the name of its own attention.
    """
    held = model.config._attn_implementation
    model.config._attn_implementation = attention or held
    try:
        yield model
    finally:
        model.config._attn_implementation = held


def _of_data(trainer: Speaker, count: int) -> Iterator[Prompt]:
    """The first prompts of each evaluation source: what comes before the first trained token."""
    for name, loader in loaders_by_name(trainer.val_dataloader).items():
        samples = getattr(getattr(loader, "dataset", None), "samples", None)
        if samples is None:
            raise ConfigError(
                "trainer.samples.prompts: only evaluation sources of the recipe have prompts; give "
                "a list of texts."
            )
        for i in range(min(count, len(samples))):
            ids, labels = samples[i].ids.tolist(), samples[i].labels.tolist()
            at = next(k for k, label in enumerate(labels) if label != IGNORED)
            if at == 0:  # a text, all of which is trained
                at = max(1, min(len(ids) // 2, _MOST_OF_TEXT))
            end = next((k for k in range(at, len(ids)) if labels[k] == IGNORED), len(ids))
            expected = trainer.tokenizer.decode(ids[at:end], skip_special_tokens=True)
            yield Prompt(name or "", ids[:at], expected)


def _write(folder: Path, step: int, rows: Sequence[tuple[str, ...]]) -> None:
    folder.mkdir(exist_ok=True)
    with open_predictions(folder / f"step_{step:08d}.jsonl") as file:
        columns = zip(*rows, strict=True)
        file.write({name: list(column) for name, column in zip(COLUMNS, columns, strict=True)})
