"""The contestants on language models, and what they train.

Each trains a task for so many optimizer steps in its own way. A step is one window over all of the
task's samples, however they share rows, so that every contestant has the same gradients. They use
the same optimizer, whose hooks say what each step had and took.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from paceline.lm.data.packing import Collate, PackedDataset, PaddedDataset, chop, plan_packs
from paceline.lm.data.sample import IGNORED, Sample

LEARNING_RATE = 0.1
VOCABULARY = 2048
CAPACITY = 2048
MICRO_BATCH = 8  # samples that are padded, or share a row where nothing is
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        samples: the tokens, a third of each a prompt that is not trained.
        capacity: tokens of a pack.
        dialogues: what each contestant tokenizes by itself instead.
        chopped: the samples are texts that follow each other through packs without a gap.
    """

    samples: list[Sample]
    capacity: int = CAPACITY
    dialogues: list[dict[str, Any]] | None = None
    chopped: bool = False

    @property
    def micro_batches(self) -> int:
        """Of samples that do not share rows."""
        return -(-len(self.dialogues or self.samples) // MICRO_BATCH)

    @property
    def lengths(self) -> list[int]:
        return [len(sample.ids) for sample in self.samples]

    @property
    def array(self) -> np.ndarray:
        return np.array(self.lengths)

    @property
    def packs(self) -> Any:
        if self.chopped:
            return chop(self.samples, self.capacity, tail="drop")
        return plan_packs(self.lengths, self.capacity)

    @property
    def documents(self) -> list[Sample]:
        """The samples, or the pieces of them that lie in packs."""
        if not self.chopped:
            return self.samples
        pieces = [piece for pack in self.packs for piece in pack]
        cut = [(self.samples[number], slice(start, stop)) for number, start, stop in pieces]
        return [Sample(sample.ids[part], sample.labels[part]) for sample, part in cut]


def log_normal(sigma: float, count: int, mean: float = 150.0) -> np.ndarray:
    """So many lengths in tokens whose distribution is log-normal, cut at the capacity.

    They are the quantiles of the distribution and not drawn from it, in an order for which padded
    micro-batches hold as many real tokens as those of very many samples do.

    Args:
        sigma: standard deviation of the logarithms.
        count: of lengths.
        mean: of lengths.
    """
    normal = statistics.NormalDist(np.log(mean) - sigma**2 / 2, sigma)
    values = [normal.inv_cdf((i + 0.5) / count) for i in range(count)]
    lengths = np.clip(np.rint(np.exp(values)), 4, CAPACITY).astype(np.int64)
    orders = [np.random.default_rng(seed).permutation(lengths) for seed in range(200)]
    usual = real_share(drawn_log_normal(sigma, 160_000, mean))
    return min(orders, key=lambda order: abs(real_share(order) - usual))


def drawn_log_normal(sigma: float, count: int, mean: float = 150.0) -> np.ndarray:
    """So many lengths drawn from the distribution of `log_normal`."""
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(np.rint(drawn), 4, CAPACITY).astype(np.int64)


def real_share(lengths: np.ndarray) -> float:
    """The part of padded micro-batches that is no padding."""
    rows = [lengths[i : i + MICRO_BATCH] for i in range(0, len(lengths), MICRO_BATCH)]
    return lengths.sum() / sum(len(row) * row.max() for row in rows)


def task_of(name: str) -> Task:
    """A task by its name, the same in every process.

    Args:
        name: "dialogues", "texts", "equal lengths" or "log-normal SIGMA".
    """
    if name == "dialogues":
        return Task([], 1024, dialogues())
    if name == "texts":
        return Task(_samples(drawn_log_normal(0.8, 24, 60.0), prompts=False), 128, chopped=True)
    if name == "equal lengths":
        return Task(_samples(np.full(32, 256)))
    return Task(_samples(log_normal(float(name.split()[-1]), 68)))


def _samples(lengths: np.ndarray, *, prompts: bool = True) -> list[Sample]:
    generator, made = np.random.default_rng(1), []
    for length in lengths:
        ids = generator.integers(3, VOCABULARY, length).astype(np.int32)
        labels = ids.copy()
        if prompts:
            labels[: length // 3] = IGNORED
        made.append(Sample(ids, labels))
    return made


def dialogues(count: int = 24, words: float = 25.0) -> list[dict[str, Any]]:
    """Dialogues of different lengths from Python's manual, some of them with two answers.

    Args:
        count: of dialogues.
        words: of a mean answer.
    """
    text = " ".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    manual = text.split()
    made, at = [], 0
    for i, share in enumerate(log_normal(0.8, count, words)):
        messages = []
        for turn in range(1 + i % 2):
            some = " ".join(manual[(at + j) % len(manual)] for j in range(int(share)))
            at += int(share)
            messages += [
                {"role": "user", "content": f"Question {i}.{turn}: {some[:40]}?"},
                {"role": "assistant", "content": some},
            ]
        made.append({"messages": messages})
    return made


def tokenizer() -> Any:
    """A byte-level BPE tokenizer of 600 tokens, trained on Python's manual."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(pydoc_data.topics.topics.values())[:20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=CHATML
    )


def make() -> tuple[Any, torch.optim.Optimizer]:
    """A Llama of 4 layers and width 192, its head a fifth of it, and its optimizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=CAPACITY,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    return model, torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)


Contestant = Callable[[Task, Any, torch.optim.Optimizer, int, Path], list[float]]
"""Trains `(task, model, optimizer, steps, folder)`, and returns each step's loss if it knows it."""


def hand_written(
    task: Task, model: Any, optimizer: torch.optim.Optimizer, steps: int, folder: Path
) -> list[float]:
    """Each document alone, the mean over all trained tokens."""
    documents = task.documents
    if task.dialogues:
        documents = [_by_hand(tokenizer(), one["messages"]) for one in task.dialogues]
    count = sum(int((one.labels[1:] != IGNORED).sum()) for one in documents)
    losses = []
    for _ in range(steps):
        total = 0.0
        for one in documents:
            ids, labels = (torch.from_numpy(a.astype(np.int64)) for a in (one.ids, one.labels))
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=IGNORED)
            (loss / count).backward()
            total += loss.item() / count
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def _by_hand(made: Any, messages: list[dict[str, str]]) -> Sample:
    """A dialogue's tokens, part by part: the parts meet at special tokens and at line ends."""
    ids: list[int] = []
    labels: list[int] = []
    for message in messages:
        trained = message["role"] == "assistant"
        opening = f"<|im_start|>{message['role']}\n"
        parts = [(opening, False), (message["content"] + "<|im_end|>", trained), ("\n", False)]
        for text, train in parts:
            some = made(text, add_special_tokens=False)["input_ids"]
            ids += some
            labels += some if train else [IGNORED] * len(some)
    return Sample(np.array(ids, np.int32), np.array(labels, np.int32))


def paceline(
    task: Task,
    model: Any,
    optimizer: torch.optim.Optimizer,
    steps: int,
    folder: Path,
    *,
    pack: bool,
    kind: str = "sft",
) -> list[float]:
    """Paceline with everything optional off; dialogues by a recipe, other samples by a loader."""
    from paceline.callbacks import Callback
    from paceline.factories import get_config
    from paceline.lm.trainers import CausalTrainer, SFTTrainer

    losses = []

    class Losses(Callback):
        def on_step_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
            losses.append(float(metrics["train/loss"]))

    config: Any = None
    given: dict[str, Any] = {}
    if task.dialogues:
        (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, task.dialogues)))
        tokenizer().save_pretrained(folder / "model")
        model.save_pretrained(folder / "model")
        data = {
            "micro_batch_size": MICRO_BATCH,
            "max_length": task.capacity,
            "pack": pack,
            "cache_dir": str(folder / "cache"),
            "sources": [{"type": "jsonl", "path": str(folder / "chats.jsonl")}],
        }
        sections = {
            "trainer": {"type": kind},
            "model": {"name_or_path": str(folder / "model")},
            "lr_scheduler": {"type": "constant", "warmup": 0},
        }
        config = get_config({**sections, "data": data})
        windows = task.micro_batches  # at least as many as there are micro-batches of packs
    else:
        if pack:
            rows: Any = PackedDataset(task.samples, task.packs)
            loader = DataLoader(rows, 1, collate_fn=Collate(length=task.capacity))
        else:
            loader = DataLoader(PaddedDataset(task.samples), MICRO_BATCH, collate_fn=Collate())
        given = {"train_dataloader": loader}
        windows = len(loader)
    trainer = {"sft": SFTTrainer, "causal": CausalTrainer}[kind](
        config,
        model=model,
        optimizer=optimizer,
        epochs=steps,
        gradient_accumulation_steps=windows,
        log_every=1,
        callbacks=[Losses()],
        loggers=[],
        progress=False,
        checkpoint=None,
        run_dir=None,
        **given,
    )
    trainer.train(seed=0)
    return losses


def trl(
    task: Task,
    model: Any,
    optimizer: torch.optim.Optimizer,
    steps: int,
    folder: Path,
    **settings: Any,
) -> list[float]:
    """TRL's SFTTrainer in float32, without recomputing, logging and checkpoints."""
    import datasets
    from transformers import LlamaConfig
    from trl import SFTConfig, SFTTrainer

    assert isinstance(model.config, LlamaConfig)
    losses: list[float] = []
    with_losses = _with_losses(SFTTrainer, losses)
    packing, padding_free = (settings.get(name) for name in ("packing", "padding_free"))
    if task.dialogues:
        rows: list[dict[str, Any]] = task.dialogues
    else:
        rows = [{"input_ids": s.ids.tolist(), "labels": s.labels.tolist()} for s in task.samples]
    if packing and not task.dialogues:
        size, windows = 1, len(task.packs)
    else:
        size, windows = MICRO_BATCH, task.micro_batches
    arguments = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=steps,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=windows,
        max_length=None if padding_free else task.capacity,
        assistant_only_loss=bool(task.dialogues),
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        **_quiet(),
        **settings,
    )
    trainer = with_losses(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        optimizers=(optimizer, _constant(optimizer)),
    )
    trainer.train()
    return list(_sums(losses, len(losses) // steps))


def transformers_trainer(
    task: Task, model: Any, optimizer: torch.optim.Optimizer, steps: int, folder: Path
) -> list[float]:
    """The Trainer of transformers, on rows of packed texts with their positions."""
    import transformers

    losses: list[float] = []
    packs = PackedDataset(task.samples, task.packs)
    names = ("input_ids", "labels", "position_ids")
    rows = [{name: packs[i][name] for name in names} for i in range(len(packs))]
    model.config.use_cache = False  # with a cache it would not look for documents
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=len(rows),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **_quiet(),
    )
    trainer = _with_losses(transformers.Trainer, losses)(
        model,
        arguments,
        train_dataset=rows,
        optimizers=(optimizer, _constant(optimizer)),
        data_collator=transformers.default_data_collator,
    )
    trainer.train()
    return list(_sums(losses, len(rows)))


def _quiet() -> dict[str, Any]:
    return {
        "train_sampling_strategy": "sequential",  # as the others
        "max_grad_norm": 0.0,  # the others do not clip
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def _constant(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def _with_losses(base: type, losses: list[float]) -> Any:
    """A trainer of transformers that also keeps what each micro-batch adds to a step's loss."""

    class Kept(base):
        def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **named)
            losses.append(loss.item())
            return loss

    return Kept


def _sums(values: list[float], size: int) -> Iterator[float]:
    for start in range(0, len(values), size):
        yield sum(values[start : start + size])


def _paceline(**options: Any) -> Contestant:
    return lambda *given: paceline(*given, **options)


def _trl(**settings: Any) -> Contestant:
    return lambda *given: trl(*given, **settings)


CONTESTANTS: dict[str, tuple[Contestant, str | None]] = {
    "hand-written, each alone": (hand_written, None),
    "Paceline, padded": (_paceline(pack=False), "paceline"),
    "Paceline, packed": (_paceline(pack=True), "paceline"),
    "TRL, padded": (_trl(), "trl"),
    "TRL, packed": (_trl(packing=True), "trl"),
    "TRL, padding-free": (_trl(padding_free=True), "trl"),
    "Paceline, causal": (_paceline(pack=True, kind="causal"), "paceline"),
    "Hugging Face Trainer, causal": (transformers_trainer, "transformers"),
}
