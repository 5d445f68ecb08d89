"""Reads what transformers wrote: weights as safetensors, no code of a model's own, no output.

Weights in pickle files are read for a model that `--trust` names, and then as plain tensors alone,
by torch's restricted unpickler. `trust_remote_code` is refused whatever the settings are.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paceline.errors import ConfigError
from paceline.lm.data.rows import first_line, needs

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_NO_SERVICE = "DISABLE_SAFETENSORS_CONVERSION"
_NO_CODE = (
    "it needs code of its own (trust_remote_code), and running that does not exist yet, with "
    "--trust neither"
)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Within, transformers prints nothing, and what goes wrong is one line.

    Args:
        what: is read, as the line begins.

    Raises:
        ConfigError: it cannot be read.
        MissingExtraError: transformers is not installed.
    """
    needs("transformers", "models and tokenizers of transformers")
    with _quiet():
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            reason = _NO_CODE if "trust_remote_code" in str(error) else first_line(error)
            raise ConfigError(f"{what}: {reason.rstrip('.')}.") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import (  # pyright: ignore[reportMissingImports] - an extra
        logging as theirs,
    )

    # With the first model transformers imports torchao, which reports what it does not need here.
    loggers = [
        logging.getLogger(name) for name in ("transformers", "torchao", "torch.utils._pytree")
    ]
    levels, bars = [logger.level for logger in loggers], theirs.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    theirs.disable_progress_bar()
    # Without safetensors on the hub it would ask a service there for weights that nobody reviewed.
    before = os.environ.get(_NO_SERVICE)
    os.environ[_NO_SERVICE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_SERVICE]
        else:
            os.environ[_NO_SERVICE] = before
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            theirs.enable_progress_bar()


def read_config(name: str, **where: Any) -> Any:
    """The config of a model.

    Args:
        name: a folder or a hub id.
        **where: `revision` or `gguf_file`, as transformers takes them.
    """
    from transformers import AutoConfig  # pyright: ignore[reportMissingImports] - an extra

    return AutoConfig.from_pretrained(name, trust_remote_code=False, **where)


def read_tokenizer(name: str, **where: Any) -> Any:
    """A tokenizer.

    Args:
        name: a folder or a hub id.
        **where: `revision` or `gguf_file`, as transformers takes them.

    Raises:
        ConfigError: the folder has none.
    """
    from transformers import AutoTokenizer  # pyright: ignore[reportMissingImports] - an extra

    folder = Path(name)
    if folder.is_dir() and not where and not any((folder / f).exists() for f in _TOKENIZERS):
        raise ConfigError(f"{name}: there is no tokenizer in it. tokenizer.name_or_path names one.")
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where)


def check_weights(name: str, trusted: bool) -> None:
    """Refuses a folder whose weights cannot be read, before anything is.

    Args:
        name: a folder, or a hub id, of which nothing is known.
        trusted: whether pickled weights may be read.

    Raises:
        ConfigError: there are none, or they are pickled.
    """
    folder = Path(name)
    held = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not held or any(file.endswith(".safetensors") for file in held):
        return
    pickled = [file for file in held if file.endswith(PICKLED)]
    if not pickled:
        raise ConfigError(f"{name}: there is no .safetensors file in it.")
    if not trusted:
        raise ConfigError(
            f"{name}: its weights are pickled ({pickled[0]}), and a pickle can run any code. "
            f"`--trust {name}` has its tensors read, and nothing else of it; or convert it with "
            "save_pretrained."
        )


def read_model(name: str, trusted: bool = False, **settings: Any) -> tuple[Any, Mapping[str, Any]]:
    """A causal language model on the CPU, and which of its weights were not found.

    Args:
        name: a folder or a hub id.
        trusted: whether pickled weights may be read, where there are no safetensors.
        **settings: as of `from_pretrained`.

    Raises:
        ConfigError: its weights are pickled.
    """
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    check_weights(name, trusted)
    read: Any = AutoModelForCausalLM.from_pretrained(
        name,
        use_safetensors=None if trusted else True,
        weights_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        **settings,
    )
    return read


def make_model(config: Any, **settings: Any) -> Any:
    """A causal language model with random weights.

    Args:
        config: of transformers.
        **settings: as of `from_config`.
    """
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]

    return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **settings)


def make_empty_model(config: Any) -> Any:
    """A causal language model whose weights are to be given: drawing them takes seconds a billion.

    Args:
        config: of transformers.
    """
    from transformers.initialization import (  # pyright: ignore[reportMissingImports]
        no_init_weights,
    )

    with no_init_weights():
        model = make_model(config)
    model.tie_weights()
    return model
