"""HFASTSystem: auditor, target and baseline are causal language models of transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.errors import ConfigError
from paceline.lm.loading import read_model, reading
from paceline.parallel.ddp import unwrap
from paceline.rl.engine import Request, Sampling
from paceline.rl.named_models import model_and_tokenizer, tokenizer_of
from paceline.rl.redteam.ast_system import ASTSystem
from paceline.rl.redteam.tiny import TINY
from paceline.rl.redteam.turns import Dialogue, Exchange, Said
from paceline.rl.text.generate import context_length, cut_to_context
from paceline.rl.text.local import end_tokens
from paceline.rl.text.logprobs import Scored, completion_logps


class HFASTSystem(ASTSystem):
    """An auditor that is trained to probe a target; both are causal models of transformers.

    A model is given as a folder, a hub id, "smollm2", a pair of a model and its tokenizer, or
    "tiny": a word-level model that is made on the spot. What was sampled is kept as token ids and
    never tokenised again; another model's tokenizer meets its text alone. A context that is too
    long is cut at the left.

    Args:
        auditor_model_id: the model that is trained.
        target_model_id: the model that is probed; never trained.
        baseline_model_id: what the auditor is compared with; None for a frozen copy of the auditor
            as it is now.
        scorer: judges texts; see `ASTSystem`.
        device: where the models are; None for the CPU, until a trainer places the auditor.
        auditor, target, baseline: other names of the first three.
        max_new_tokens: of a probe or response.
        top_k: only so many of the most likely tokens are sampled; 0 for all.
        top_p: only the most likely tokens that together have this probability are sampled.
        **settings: as of `ASTSystem`: weights, `rewards` and what may fail.

    Attributes:
        auditor, target, baseline: the models.
        auditor_tokenizer, target_tokenizer: theirs; the baseline shares the auditor's.

    Raises:
        ConfigError: a model cannot be read, has no end token or no room for `max_new_tokens`, or
            the baseline's vocabulary is not the auditor's.
    """

    name = "hf_ast"

    def __init__(
        self,
        auditor_model_id: Any = None,
        target_model_id: Any = None,
        baseline_model_id: Any = None,
        scorer: Any = None,
        device: str | None = None,
        *,
        auditor: Any = None,
        target: Any = None,
        baseline: Any = None,
        max_new_tokens: int = 32,
        top_k: int = 0,
        top_p: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(scorer, **settings)
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={max_new_tokens}: expected at least 1.")
        self.device, self.max_new_tokens = device, max_new_tokens
        self.top_k, self.top_p = top_k, top_p
        given = {
            "auditor": _one_of("auditor", auditor_model_id, auditor),
            "target": _one_of("target", target_model_id, target),
            "baseline": _one_of("baseline", baseline_model_id, baseline, optional=True),
        }
        self.auditor_model_id, self.target_model_id = map(_id, (given["auditor"], given["target"]))
        self.baseline_model_id = _id(given["baseline"])
        self.auditor, self.auditor_tokenizer = self._load("auditor", given["auditor"])
        self.target, self.target_tokenizer = self._load("target", given["target"])
        if self.target is self.auditor:
            self.target = copy.deepcopy(self.target)
        if given["baseline"] is None:
            self.baseline = copy.deepcopy(self.auditor)
        else:
            self.baseline, tokenizer = self._load("baseline", given["baseline"])
            if self.baseline in (self.auditor, self.target):
                self.baseline = copy.deepcopy(self.baseline)
            if tokenizer.get_vocab() != self.auditor_tokenizer.get_vocab():
                raise ConfigError(
                    "baseline_model_id: its tokenizer is not the auditor's, so the auditor's "
                    "tokens mean nothing to it. Give another, or None for a frozen copy."
                )
        for frozen in (self.target, self.baseline):
            frozen.eval().requires_grad_(False)

    def _load(self, role: str, given: Any) -> tuple[Any, Any]:
        if isinstance(given, tuple | list) and len(given) == 2:
            model, tokenizer = given
        elif isinstance(given, str | Path):
            model, tokenizer = self._read(role, str(given))
        else:
            raise ConfigError(
                f"{role}_model_id: expected a folder, a hub id, or a pair of a model and its "
                f"tokenizer, not a {type(given).__name__}."
            )
        if not end_tokens(model, tokenizer):
            raise ConfigError(
                f"{role}_model_id: neither its generation config nor its tokenizer has an end "
                "token, so that nothing it says would end. Set tokenizer.eos_token."
            )
        room = context_length(model)
        if room is not None and self.max_new_tokens >= room:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens}: the {role} has a context of {room} tokens, "
                "which leaves none for what was said before."
            )
        return (model if self.device is None else model.to(self.device)), tokenizer

    def _read(self, role: str, name: str) -> tuple[Any, Any]:
        return model_and_tokenizer(name, seed=int(role == "target"))

    @property
    def tokenizer(self) -> Any:
        """The auditor's."""
        return self.auditor_tokenizer

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """The auditor's: it alone is trained."""
        return self.auditor.parameters()

    # Dialogues of token ids, which `ASTSampler` plays.

    def begin(self, context: str) -> Dialogue:
        """A dialogue that begins with a text.

        Args:
            context: the text.
        """
        return Dialogue(
            context,
            _begun(self.auditor_tokenizer, context),
            _begun(self.target_tokenizer, context),
        )

    def probe(self, dialogues: Sequence[Dialogue], seeds: Sequence[int]) -> list[Said]:
        """What the auditor says next.

        Args:
            dialogues: so far.
            seeds: of each probe's own random numbers.
        """
        ids = [d.auditor_ids for d in dialogues]
        return self._say(self.auditor, self.auditor_tokenizer, ids, seeds)

    def respond(
        self, dialogues: Sequence[Dialogue], probes: Sequence[Said], seeds: Sequence[int]
    ) -> list[Said]:
        """What the target responds.

        Args:
            dialogues: before the probes.
            probes: what the auditor said.
            seeds: of each response's own random numbers.
        """
        ids = [
            np.concatenate([d.target_ids, _followed(self.target_tokenizer, probe.text)])
            for d, probe in zip(dialogues, probes, strict=True)
            if d.target_ids is not None
        ]
        return self._say(self._beside(self.target), self.target_tokenizer, ids, seeds)

    def follow(self, dialogue: Dialogue, probe: Said, response: Said) -> Dialogue:
        """The dialogue after a turn.

        Args:
            dialogue: before it.
            probe, response: of the turn.
        """
        text = self.advance(dialogue.text, probe.text, response.text)
        if text != dialogue.text + probe.text + response.text:  # a subclass writes it otherwise
            return self.begin(text)
        auditor, target = dialogue.auditor_ids, dialogue.target_ids
        if auditor is None or target is None:
            return self.begin(text)
        probed = self._spoken(self.auditor, self.auditor_tokenizer, probe)
        heard = _followed(self.auditor_tokenizer, response.text)
        asked = _followed(self.target_tokenizer, probe.text)
        answered = self._spoken(self.target, self.target_tokenizer, response)
        return Dialogue(
            text,
            np.concatenate([auditor, probed, heard]),
            np.concatenate([target, asked, answered]),
        )

    def probe_logps(self, turns: Sequence[Exchange]) -> list[torch.Tensor]:
        contexts = [
            t.dialogue.text if t.dialogue.target_ids is None else t.dialogue.target_ids
            for t in turns
        ]
        with torch.no_grad():
            scored = self._scored(
                self._beside(self.target),
                self.target_tokenizer,
                contexts,
                [turn.probe.text for turn in turns],
            )
        return [
            row[mask]
            for row, mask in zip(scored.logps.double().cpu(), scored.mask.cpu(), strict=True)
        ]

    def auditor_logps(self, turns: Sequence[Any]) -> Scored:
        """How likely the auditor finds what it sampled; see `System.auditor_logps`.

        Args:
            turns: what was said, with the token ids where there are such.
        """
        return self._scored(self.auditor, self.auditor_tokenizer, *sampled(turns))

    @torch.no_grad()
    def baseline_logps(self, turns: Sequence[Any]) -> Scored:
        """How likely the baseline finds what the auditor sampled.

        Args:
            turns: as for `auditor_logps`.
        """
        return self._scored(self._beside(self.baseline), self.auditor_tokenizer, *sampled(turns))

    # What every System has, of texts; token ids are taken as they are.

    def get_auditor_logprobs(
        self, context: Sequence[Any], continuation: Sequence[Any]
    ) -> torch.Tensor:
        """The auditor's log-probabilities of continuations, with gradients, [texts, tokens].

        Args:
            context: texts, or token ids of the auditor, one each.
            continuation: what follows, as texts or token ids.
        """
        return self._scored(self.auditor, self.auditor_tokenizer, context, continuation).logps

    @torch.no_grad()
    def get_target_logprobs(
        self, context: Sequence[Any], continuation: Sequence[Any]
    ) -> torch.Tensor:
        """The target's log-probabilities of continuations, [texts, tokens].

        Args:
            context, continuation: as for the auditor, but with the target's token ids.
        """
        model = self._beside(self.target)
        return self._scored(model, self.target_tokenizer, context, continuation).logps

    @torch.no_grad()
    def get_baseline_logprobs(
        self, context: Sequence[Any], continuation: Sequence[Any]
    ) -> torch.Tensor:
        """The baseline's log-probabilities of continuations, [texts, tokens].

        Args:
            context, continuation: as for the auditor.
        """
        model = self._beside(self.baseline)
        return self._scored(model, self.auditor_tokenizer, context, continuation).logps

    def rollout_prompt_with_auditor(self, prompts: Sequence[Any]) -> Sequence[Any]:
        ids = [_begun(self.auditor_tokenizer, prompt) for prompt in prompts]
        said = self._say(self.auditor, self.auditor_tokenizer, ids, _drawn(len(ids)))
        return [one.text for one in said]

    def rollout_prompt_with_target(self, prompts: Sequence[Any]) -> Sequence[Any]:
        ids = [_begun(self.target_tokenizer, prompt) for prompt in prompts]
        model = self._beside(self.target)
        return [one.text for one in self._say(model, self.target_tokenizer, ids, _drawn(len(ids)))]

    def _say(
        self, model: Any, tokenizer: Any, contexts: Sequence[Any], seeds: Sequence[int]
    ) -> list[Said]:
        sampling = Sampling(self.max_new_tokens, top_k=self.top_k, top_p=self.top_p)
        cut = [cut_to_context(ids, model, self.max_new_tokens) for ids in contexts]
        engine = self.engine_of(model, tokenizer)
        made = engine.generate(
            [Request(ids, seed, sampling) for ids, seed in zip(cut, seeds, strict=True)]
        )
        return [
            Said(
                tokenizer.decode(
                    one.ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
                ),
                ids,
                np.asarray(one.ids, np.int32),
                np.asarray(one.logprobs, np.float32),
                one.version,
            )
            for ids, one in zip(cut, made, strict=True)
        ]

    def _scored(
        self,
        model: Any,
        tokenizer: Any,
        context: Sequence[Any],
        continuation: Sequence[Any],
        *,
        values: bool = False,
    ) -> Scored:
        wanted = [_followed(tokenizer, one) for one in continuation]
        before = [
            cut_to_context(_begun(tokenizer, one), model, max(self.max_new_tokens, len(ids)))
            for one, ids in zip(context, wanted, strict=True)
        ]
        return completion_logps(model, before, wanted, values=values)

    def _spoken(self, model: Any, tokenizer: Any, said: Said) -> np.ndarray:
        """What was sampled, without its end tokens, since more text follows."""
        assert said.ids is not None
        ends, count = end_tokens(unwrap(model), tokenizer), len(said.ids)
        while count and int(said.ids[count - 1]) in ends:
            count -= 1
        return said.ids[:count]

    def _beside(self, model: Any) -> Any:
        """A frozen model, on the auditor's device."""
        place = next(self.auditor.parameters()).device
        if next(model.parameters()).device != place:
            model.to(place)
        return model


class HFEvaluationSystem(HFASTSystem):
    """A trained auditor in place of the one that training began with.

    Args:
        auditor_checkpoint: the folder with the trained auditor, as `HFRolloutTrainer` writes it.
        auditor_base_model_id: whose tokenizer is taken if the folder has none.
        target_model_id, device, scorer, baseline_model_id: as of `HFASTSystem`.
        **settings: as of `HFASTSystem`.

    Raises:
        ConfigError: there is no such folder, or it holds no model: nothing is evaluated in its
            place.
    """

    name = "hf_evaluation"

    def __init__(
        self,
        auditor_checkpoint: str | Path,
        auditor_base_model_id: Any = None,
        target_model_id: Any = None,
        device: str | None = "cpu",
        scorer: Any = None,
        baseline_model_id: Any = None,
        **settings: Any,
    ) -> None:
        folder = Path(auditor_checkpoint)
        if not (folder / "config.json").is_file():
            raise ConfigError(f"auditor_checkpoint={str(folder)!r}: no model was saved there.")
        self._base = auditor_base_model_id
        self.auditor_checkpoint = str(folder)
        super().__init__(
            str(folder), target_model_id, baseline_model_id, scorer, device, **settings
        )

    def _read(self, role: str, name: str) -> tuple[Any, Any]:
        own = ("tokenizer.json", "tokenizer_config.json")
        if role != "auditor" or any((Path(name) / file).is_file() for file in own):
            return super()._read(role, name)
        if not isinstance(self._base, str):
            raise ConfigError(f"{name}: it has no tokenizer: give auditor_base_model_id.")
        with reading(name):
            model, _ = read_model(name, dtype="auto")
        return model, tokenizer_of(self._base)


def _one_of(role: str, one: Any, other: Any, *, optional: bool = False) -> Any:
    if one is not None and other is not None:
        raise ConfigError(f"{role} and {role}_model_id are one setting: give one of them.")
    if one is None and other is None and not optional:
        raise ConfigError(f"{role}_model_id: give a folder, a hub id, a model or {TINY!r}.")
    return other if one is None else one


def _id(given: Any) -> Any:
    return str(given) if isinstance(given, str | Path) else None


def _begun(tokenizer: Any, text: Any) -> np.ndarray:
    """The token ids with which a dialogue begins; at least one."""
    if not isinstance(text, str):
        return np.asarray(text, np.int32)
    ids = list(tokenizer(text)["input_ids"])
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    while ids and ids[-1] == end and text:
        ids.pop()
    if not ids:
        ids = [token for token in (begin, end) if token is not None][:1]
    return np.asarray(ids, np.int32)


def _followed(tokenizer: Any, text: Any) -> np.ndarray:
    """The token ids of a continuation, without special tokens before it."""
    if not isinstance(text, str):
        return np.asarray(text, np.int32)
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def sampled(turns: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Contexts and probes: as token ids where they were sampled so, else as texts.

    Args:
        turns: as for `System.auditor_logps`.
    """
    as_ids = [turn.probe_ids is not None for turn in turns]
    contexts = [
        turn.context_ids if ids else turn.context for turn, ids in zip(turns, as_ids, strict=True)
    ]
    probes = [
        turn.probe_ids if ids else turn.probe for turn, ids in zip(turns, as_ids, strict=True)
    ]
    return contexts, probes


def _drawn(count: int) -> list[int]:
    """Seeds of torch's global generator."""
    return torch.randint(2**62, (count,)).tolist()
