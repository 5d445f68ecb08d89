"""PromptSampler: completes prompts several times each, and has functions judge the completions."""

from __future__ import annotations

import inspect
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paceline.errors import ConfigError, DataError, counted, in_a_line, some
from paceline.lm.data.chat import render
from paceline.lm.data.rows import fingerprint, read_callable, read_files
from paceline.recipe.code import is_own_code
from paceline.rl.engine import Completion, Request, Sampling
from paceline.rl.graph import Graph, Node
from paceline.rl.prompts import beside_recipe, eval_seed
from paceline.rl.sampler import Sampler
from paceline.rl.text.generate import context_length
from paceline.rl.timed import within
from paceline.world.seeding import stream

_PROMPTS = ("prompt", "messages", "text")
_FAILED = "failed: "


class PromptSampler(Sampler):
    """Completes prompts `group_size` times each; the completions of one prompt are siblings.

    An episode is one prompt. A run goes through all prompts in a random order before any comes
    again.

    A reward is a function `f(prompts, completions, completion_ids, **columns) -> list`, called with
    the completions of one prompt: a number for each, or None where it does not apply. A completion
    that no reward applies to is left out and counted. So is one for which a reward raises, gives
    no finite number, or not one for each: more than `max_failures` of these in an experience are an
    error.

    Args:
        system: with `auditor`, `tokenizer` and `temperature`, such as a `PolicySystem`.
        source: rows, or {"file": path} of JSON lines, JSON, CSV, Parquet or text, relative to the
            recipe, or {"function": "MODULE.NAME"} of the recipe's `code:`. A row is a text, or has
            one as `prompt` or `text`, or a dialogue as `prompt` or `messages`, which the
            tokenizer's chat template renders; its other columns go to the rewards.
        rewards: weights by "MODULE.NAME" of the recipe's `code:`; or by name a pair of a weight and
            a function; or functions.
        group_size: completions of a prompt.
        episodes: prompts in one experience, over all ranks.
        max_new_tokens: of a completion, the end token among them.
        top_k, top_p, stop: how tokens are chosen, see `Sampling`.
        max_failures: completions in an experience for which a reward may fail.
        reward_timeout: seconds that a call of a reward may take; one that takes longer has failed.

    Raises:
        ConfigError: a setting is out of its range, or a reward is none.
    """

    name = "prompts"

    def __init__(
        self,
        system: Any,
        source: Any,
        rewards: Any,
        *,
        group_size: int = 8,
        episodes: int = 8,
        max_new_tokens: int = 32,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        max_failures: int = 0,
        reward_timeout: float = 60.0,
    ) -> None:
        super().__init__(system, episodes=episodes)
        for setting, value, least in (
            ("group_size", group_size, 1),
            ("max_new_tokens", max_new_tokens, 1),
            ("max_failures", max_failures, 0),
        ):
            if value < least:
                raise ConfigError(f"sampler.{setting}={value}: expected at least {least}.")
        if not reward_timeout > 0:
            raise ConfigError(f"sampler.reward_timeout={reward_timeout}: expected above 0.")
        self.group_size, self.max_failures = group_size, max_failures
        self.reward_timeout = reward_timeout
        self.max_new_tokens, self.top_k, self.top_p = max_new_tokens, top_k, top_p
        self.stop = tuple(stop)
        self.rewards = rewards_from(rewards)
        self.source = source
        self._rows: Any = None
        if not isinstance(source, Mapping):
            self._rows = _rows(source)

    @property
    def turns(self) -> int:
        """The most samples in an experience."""
        return self.episodes * self.group_size

    def run_identity(self) -> dict[str, Any]:
        """What a resumed run has to find unchanged."""
        return {"prompts": fingerprint(self._located())}

    @property
    def files(self) -> list[str]:
        named = isinstance(self.source, Mapping) and "file" in self.source
        return [str(self.source["file"])] if named else []

    def locate(self, folder: Path) -> None:
        if self._rows is not None:
            return
        if "file" in self.source:
            self._rows = _rows(read_files(beside_recipe(folder, self.source["file"])))
        elif "function" in self.source:
            self._rows = _rows(read_callable(_own("sampler.source", self.source["function"])))
        else:
            raise ConfigError("sampler.source: expected rows, {file: path} or {function: name}.")

    def _located(self) -> Any:
        self.locate(Path())
        return self._rows

    def rollout(self, seed: int | None = None) -> Graph:
        seed = random.getrandbits(63) if seed is None else seed
        return self._complete([stream(seed, "probe") % len(self._located())], [seed])[0]

    def rollouts(self, seeds: Sequence[int]) -> list[Graph]:
        rows = self._located()
        if len(self.numbers) != len(seeds):
            return [self.rollout(seed) for seed in seeds]
        chosen = [_in_order(number, len(rows)) for number in self.numbers]
        return self._complete(chosen, seeds)

    def eval_rollout(self, seed: Any = None) -> Graph:
        """The completions of one prompt, for an evaluation.

        Args:
            seed: a text or a dialogue is a prompt, without columns; an int or None is as for
                `rollout`.
        """
        if seed is None or isinstance(seed, int):
            return self.rollout(seed)
        return self._of_rows([_row(seed, 0)], [eval_seed(seed)], self.group_size)[0]

    def eval_rollouts(
        self, prompts: Sequence[Any], attempts: Sequence[int] | None = None
    ) -> list[Graph]:
        """One completion of each prompt, for an evaluation.

        Args:
            prompts: texts, dialogues, or rows as of `source`.
            attempts: the number of each among those of the same prompt, which differ; None for 0.
        """
        numbers = [0] * len(prompts) if attempts is None else attempts
        seeds = [eval_seed(p, number) for p, number in zip(prompts, numbers, strict=True)]
        rows = [_row(prompt, index) for index, prompt in enumerate(prompts)]
        return self._of_rows(rows, seeds, 1)

    def _complete(self, chosen: Sequence[int], seeds: Sequence[int]) -> list[Graph]:
        rows = self._located()
        chosen_rows = [_row(rows[index], index) for index in chosen]
        return self._of_rows(chosen_rows, seeds, self.group_size)

    def _of_rows(
        self, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], size: int
    ) -> list[Graph]:
        """So many completions of each row, which are judged prompt by prompt.

        So neither a reward nor a failure of one depends on which other prompts a rank has.
        """
        self.check_stop()
        tokenizer, model = self.system.tokenizer, self.system.auditor
        sampling = Sampling(
            self.max_new_tokens, self.system.temperature, self.top_k, self.top_p, self.stop
        )
        room = context_length(getattr(model, "module", model))
        graphs, prompts, requests = [], [], []
        for row, seed in zip(rows, seeds, strict=True):
            text, ids = _tokens(tokenizer, row["prompt"])
            graph = Graph(text, [])
            fits = room is None or len(ids) + self.max_new_tokens <= room
            if not len(ids) or not fits:
                reason = "prompt longer than the context" if len(ids) else "empty prompt"
                graph.skipped[reason] = size
            else:
                requests += [
                    Request(ids, stream(seed, "probe", branch, 0), sampling)
                    for branch in range(size)
                ]
            graphs.append(graph)
            prompts.append(ids)
        engine = self.system.engine_of(model, tokenizer)
        made = iter(engine.generate(requests))
        for graph, row, ids in zip(graphs, rows, prompts, strict=True):
            self.check_stop()
            if not graph.skipped:
                self._judge(graph, row, ids, [next(made) for _ in range(size)])
        return graphs

    def _judge(
        self, graph: Graph, row: Mapping[str, Any], ids: np.ndarray, made: Sequence[Completion]
    ) -> None:
        """Adds the completions of a prompt to its graph, with their rewards."""
        texts = [
            self.system.tokenizer.decode(
                one.ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            for one in made
        ]
        said: list[Any] = texts
        if not isinstance(row["prompt"], str):
            said = [[{"role": "assistant", "content": text}] for text in texts]
        count = len(made)
        given = {
            "prompts": [row["prompt"]] * count,
            "completions": said,
            "completion_ids": [one.ids.tolist() for one in made],
            **{name: [value] * count for name, value in row.items() if name != "prompt"},
        }
        scores = {
            name: _scores(name, f, given, count, self.reward_timeout)
            for name, (_, f) in self.rewards.items()
        }
        for i, one in enumerate(made):
            values = {name: found[i] for name, found in scores.items()}
            failed = [value for value in values.values() if isinstance(value, str)]
            parts = {n: v for n, v in values.items() if isinstance(v, float)}
            if failed or not parts:
                reason = failed[0] if failed else "no reward applies"
                graph.skipped[reason] = graph.skipped.get(reason, 0) + 1
                continue
            total = sum(self.rewards[name][0] * value for name, value in parts.items())
            graph.children.append(
                Node(
                    graph.context, texts[i], "", total, [], ids, one.ids, one.logprobs,
                    one.version, parts,
                )
            )  # fmt: skip

    def check_skipped(self, skipped: Mapping[str, int]) -> None:
        failed = {reason: n for reason, n in skipped.items() if reason.startswith(_FAILED)}
        if (number := sum(failed.values())) > self.max_failures:
            reasons = [reason.removeprefix(_FAILED) for reason in failed]
            raise DataError(
                f"sampler.rewards: {counted(number, 'completion')} of an experience got no reward, "
                f"and max_failures={self.max_failures}: {some(reasons)}."
            )


def rewards_from(given: Any) -> dict[str, tuple[float, Callable[..., Any]]]:
    """Weights and functions by name.

    Args:
        given: as `PromptSampler` takes them.

    Raises:
        ConfigError: one is no function, or its weight no number, or there is none.
    """
    if callable(given):
        given = [given]
    if isinstance(given, Sequence) and not isinstance(given, str):
        given = {getattr(f, "__name__", type(f).__name__): (1.0, f) for f in given}
    if not isinstance(given, Mapping) or not given:
        raise ConfigError("sampler.rewards: give at least one, such as {MODULE.FUNCTION: 1.0}.")
    found = {}
    for name, value in given.items():
        weight, function = value if isinstance(value, tuple) else (value, None)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(f"sampler.rewards.{name}: {weight!r} is no weight.")
        if not math.isfinite(weight):
            raise ConfigError(f"sampler.rewards.{name}: {weight!r} is no weight.")
        function = _own(f"sampler.rewards.{name}", name) if function is None else function
        if not callable(function):
            raise ConfigError(f"sampler.rewards.{name}: a {type(function).__name__} cannot judge.")
        found[str(name).rpartition(".")[2]] = (float(weight), function)
    return found


def _own(where: str, name: Any) -> Callable[..., Any]:
    """A function of the recipe's code."""
    module, _, function = str(name).rpartition(".")
    found = getattr(sys.modules.get(module) if is_own_code(module) else None, function, None)
    if not inspect.isfunction(found):
        raise ConfigError(
            f"{where}: {name!r} is no function of the recipe's `code:`; write MODULE.FUNCTION, "
            "where MODULE is the file's name without .py."
        )
    return found


def _scores(
    name: str, function: Callable[..., Any], given: Mapping[str, Any], count: int, timeout: float
) -> list[Any]:
    """What a reward says of each completion: a number, None, or in words why there is none."""
    try:
        values = within(timeout, lambda: function(**given), "reward")
        values = values.tolist() if hasattr(values, "tolist") else list(values)
    except ConfigError:
        raise
    except TimeoutError as error:
        return [f"{_FAILED}{name}: {error}"] * count
    except Exception as error:  # noqa: BLE001 - whatever a user's function raises
        return [f"{_FAILED}{name} raised {in_a_line(error)}"] * count
    if len(values) != count:
        return [f"{_FAILED}{name} gave {len(values)} values for {count} completions"] * count
    found: list[Any] = []
    for value in values:
        if value is None:
            found.append(None)
        elif isinstance(value, bool | int | float | np.number) and math.isfinite(value):
            found.append(float(value))
        else:
            found.append(f"{_FAILED}{name} gave {value!r:.40}")
    return found


def _rows(source: Any) -> Any:
    if isinstance(source, str) or not hasattr(source, "__len__"):
        raise ConfigError("sampler.source: expected rows, {file: path} or {function: MODULE.NAME}.")
    if not len(source):
        raise ConfigError("sampler.source: there is no prompt in it.")
    _row(source[0], 0)
    if isinstance(source[0], Mapping):
        return source
    return [{"prompt": row} for row in source]


def _row(row: Any, index: int) -> dict[str, Any]:
    """A row with its prompt as `prompt`."""
    if not isinstance(row, Mapping):
        row = {"prompt": row}
    name = next((name for name in _PROMPTS if name in row), None)
    prompt = None if name is None else row[name]
    if not isinstance(prompt, str | list | tuple) or not prompt:
        raise ConfigError(
            f"sampler.source: row {index} has no {', '.join(_PROMPTS[:-1])} or {_PROMPTS[-1]} "
            "with a text or a dialogue in it."
        )
    return {"prompt": prompt, **{n: v for n, v in row.items() if n != name}}


def _tokens(tokenizer: Any, prompt: Any) -> tuple[str, np.ndarray]:
    """A prompt as text and as token ids."""
    if isinstance(prompt, str):
        return prompt, np.asarray(_encoded(tokenizer, prompt, True), np.int32)
    text = render(tokenizer, prompt, add_generation_prompt=True)
    return text, np.asarray(_encoded(tokenizer, text, False), np.int32)


def _encoded(tokenizer: Any, text: str, special: bool) -> list[int]:
    ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    if special and ids and ids[-1] == tokenizer.eos_token_id and text:
        ids.pop()  # the completion continues the text
    return ids


def _in_order(number: int, rows: int) -> int:
    """Which row an episode of a run has: all in a random order before any comes again."""
    a_pass, place = divmod(number, rows)
    generator = torch.Generator().manual_seed(stream(0, "order", a_pass) >> 1)
    return int(torch.randperm(rows, generator=generator)[place])
