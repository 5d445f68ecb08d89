"""LocalEngine: completes prompts with a model of this process."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from paceline.errors import ConfigError
from paceline.parallel.ddp import unwrap
from paceline.rl.acting import acting
from paceline.rl.engine import Completion, Engine, Request
from paceline.rl.text.generate import decode


class LocalEngine(Engine):
    """Completes prompts with a model of this process, many at a time.

    Args:
        model: a causal language model of transformers, or one that is called alike.
        tokenizer: decodes completions to find texts of `Sampling.stop`; needed for these alone.
        end_ids: tokens that end a completion. None given: those of the model's generation
            configuration, and the tokenizer's.
        pad_id: fills up shorter prompts; no number depends on it.
        batch: the most completions at a time.

    Raises:
        ConfigError: `batch` is no positive number.
    """

    name = "local"

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        end_ids: Iterable[int] = (),
        pad_id: int = 0,
        batch: int = 64,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"engine.batch={batch}: expected at least 1.")
        self.model, self.tokenizer = model, tokenizer
        self.end_ids = frozenset(end_ids) or end_tokens(model, tokenizer)
        self.pad_id, self.batch = pad_id, batch

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """A completion for each request, in the same order.

        Args:
            requests: what is wanted.
        """
        model = unwrap(self.model)
        # Those of one length and one prompt lie together; all of a batch are sampled alike.
        order = sorted(
            range(len(requests)),
            key=lambda i: (
                repr(requests[i].sampling),
                len(requests[i].ids),
                bytes(requests[i].ids),
            ),
        )
        found: dict[int, Completion] = {}
        with acting([model]):
            while order:
                sampling = requests[order[0]].sampling
                alike = [i for i in order[: self.batch] if requests[i].sampling == sampling]
                order = order[len(alike) :]
                made = decode(
                    model,
                    [requests[i] for i in alike],
                    sampling,
                    tokenizer=self.tokenizer,
                    end_ids=self.end_ids,
                    pad_id=self.pad_id,
                    version=self.version,
                    check_stop=self.check_stop,
                )
                found.update(zip(alike, made, strict=True))
        return [found[i] for i in range(len(requests))]


def end_tokens(model: Any, tokenizer: Any = None) -> frozenset[int]:
    """The tokens that end a text: a model's generation configuration may name several.

    Args:
        model: of transformers; of others nothing is read.
        tokenizer: its end token is one too.
    """
    model = unwrap(model)
    found: set[int] = set()
    for part in ("generation_config", "config"):
        ends = getattr(getattr(model, part, None), "eos_token_id", None)
        if ends is not None:
            found |= {ends} if isinstance(ends, int) else set(ends)
            break
    end = getattr(tokenizer, "eos_token_id", None)
    return frozenset(found if end is None else found | {end})
