"""`paceline export`: weights from a checkpoint as safetensors, or a folder for transformers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.options import Checkpoint, Weights, WhichWeights


class Dtype(StrEnum):
    """The dtype that floating-point tensors are converted to."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Format(StrEnum):
    """What is written."""

    safetensors = "safetensors"
    huggingface = "huggingface"


def export(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run folder, or a checkpoint.", show_default=False),
    ],
    weights: WhichWeights = Weights.auto,
    checkpoint: Checkpoint = "latest",
    to: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A .safetensors file or a folder.  [default: exports]"),
    ] = None,
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="Plain weights, or a folder for from_pretrained with config and tokenizer.",
        ),
    ] = Format.safetensors,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="One of several models.  [default: all]")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Convert the weights.  [default: as they are]")
    ] = None,
) -> None:
    """Writes the weights of a run as safetensors, under the model's own names.

    model.load_state_dict(safetensors.torch.load_file(path)) loads them. With --format huggingface
    it writes a folder that transformers loads, for a language model of transformers.
    """
    if form is Format.huggingface:
        return _huggingface(run, weights, checkpoint, to, model, dtype)
    from paceline.checkpoint.export import export as write
    from paceline.runs.text import printable

    written = write(
        run, to=to, weights=weights.value, checkpoint=checkpoint, model=model,
        dtype=None if dtype is None else dtype.value,
    )  # fmt: skip
    for file in written:
        told = f"{file.path}: {file.tensors} {file.weights} tensors of {file.model!r}"
        typer.echo(printable(f"{told}, {file.bytes:,} bytes, from {file.checkpoint.path.name}"))


def _huggingface(
    run: Path,
    weights: Weights,
    checkpoint: str,
    to: Path | None,
    model: str | None,
    dtype: Dtype | None,
) -> None:
    from paceline.lm.export import export_huggingface
    from paceline.runs.text import printable

    folder = export_huggingface(
        run, to, weights=weights.value, checkpoint=checkpoint, model=model,
        dtype=None if dtype is None else dtype.value,
    )  # fmt: skip
    typer.echo(printable(f"{folder}: loaded again, its weights are the run's, and so its logits"))
