"""Masks what looks like a credential, wherever a run would write it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"
MISSING = "???"
"""Stands in a recipe for a value that the user must supply."""

# Names of values that are certainly credentials. Of a recipe these alone are left out: with a
# `pad_token` or a `text_key` missing it would not run again. With a hyphen it is a header's.
_CREDENTIAL_NAME = (
    r"(?:(?:[\w.-]*[_.-])?(?:api_?key|passwords?|passwd|passphrase|secrets?|secret_?key"
    r"|private_?key|authorization"
    r"|(?:access|auth|hf|api|bearer|refresh)_?token)"
    r"|\w[\w.-]*-(?:token|key))"
)
_CREDENTIAL = re.compile(_CREDENTIAL_NAME, re.IGNORECASE)
_CREDENTIAL_INSIDE = re.compile(rf"(\b{_CREDENTIAL_NAME}\s*=\s*)[^\s'\"]+", re.IGNORECASE)
_LEAST = 8  # characters of a credential that is looked for in texts
_known: set[str] = set()

# The END of a name makes it secret: `hf_token` and `apikey` are, `tokenizer` and `max_tokens` are
# not. Masking a harmless `sort_key` costs nothing; showing a secret would.
_SECRET_NAME = (
    r"[\w./@-]*(?:token|key|passwords?|passwd|passphrase|pwd|secrets?|credentials?|auth"
    r"|authorization|bearer)"
)
_SECRET_KEY = re.compile(_SECRET_NAME, re.IGNORECASE)
_SECRET_FLAG = re.compile(rf"-+{_SECRET_NAME}", re.IGNORECASE)
_SECRET_ASSIGNMENT = re.compile(rf"([-+~]*{_SECRET_NAME}\s*=).+", re.IGNORECASE | re.DOTALL)
_VALUE = r"(?:\"[^\"]*\"|'[^']*'|[^\s,;&}\]\"']+)"
_SECRET_INSIDE = re.compile(rf"(\b{_SECRET_NAME}[\"']?\s*=\s*){_VALUE}", re.IGNORECASE)
# After a colon only if it is certainly a field (`{token: x}`, `"api_key": "x"`, `password: x`): an
# error message that ends in "no such key: x" has to stay readable.
_SECRET_FIELD = re.compile(
    rf"((?:[{{,\"']\s*[\w.-]*(?:token|key)|\b\w+[_-](?:token|key)|\b[\w.-]*(?:passwords?|passwd"
    rf"|secrets?|authorization))[\"']?\s*:\s*(?:bearer\s+)?){_VALUE}",
    re.IGNORECASE,
)
_URL_LOGIN = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s@]+@", re.IGNORECASE)
_KNOWN_TOKENS = re.compile(
    r"\b(?:hf_|sk-|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abps]-|AKIA)[A-Za-z0-9_-]{12,}"
)


def is_credential(name: str) -> bool:
    """Whether a value of this name is a credential for certain, e.g. `api_key`, not `pad_token`."""
    return _CREDENTIAL.fullmatch(name) is not None


def without_credentials(value: Any, name: str = "") -> Any:
    """Plain data with `???` for each credential, as a recipe that asks for it.

    Args:
        value: mappings and lists of any depth.
        name: the key at which `value` stands. Interpolations (`${oc.env:TOKEN}`) are kept.
    """
    if isinstance(value, str):
        if not value or "${" in value:
            return value
        shaped = _KNOWN_TOKENS.search(value) or _URL_LOGIN.search(value)
        return MISSING if shaped or is_credential(name) else value
    if isinstance(value, Mapping):
        return {key: without_credentials(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_credentials(item, name) for item in value]
    return value


def remember_credentials(value: Any, name: str = "") -> None:
    """Has `mask_text` mask the credentials in some data, wherever a text repeats them.

    Args:
        value: mappings and lists of any depth, with what interpolations gave.
        name: the key at which `value` stands.
    """
    if isinstance(value, str):
        if is_credential(name) and len(value) >= _LEAST:
            _known.add(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            remember_credentials(item, str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            remember_credentials(item, name)


def mask_credentials(text: str) -> str:
    """`text` with what is a credential for certain masked, and everything else as it was."""
    for known in _known:
        text = text.replace(known, MASK)
    text = _URL_LOGIN.sub(rf"\g<1>{MASK}@", text)
    text = _CREDENTIAL_INSIDE.sub(rf"\g<1>{MASK}", text)
    return _KNOWN_TOKENS.sub(MASK, text)


def mask_text(text: str) -> str:
    """`text` with logins in addresses, `secret=value` pairs and well-known tokens masked."""
    text = mask_credentials(text)
    text = _SECRET_INSIDE.sub(rf"\g<1>{MASK}", text)
    text = _SECRET_FIELD.sub(rf"\g<1>{MASK}", text)
    return _KNOWN_TOKENS.sub(MASK, text)


def mask_command(argv: Sequence[str]) -> list[str]:
    """`argv` with the values of secret-looking options and overrides masked.

    Args:
        argv: a command line as in `sys.argv`; masks `--token x`, `--token=x` and `a.token=x`.
    """
    masked: list[str] = []
    secret_follows = False
    for word in argv:
        if secret_follows and not word.startswith("--"):
            masked.append(MASK)
        elif _SECRET_ASSIGNMENT.fullmatch(word):
            masked.append(_SECRET_ASSIGNMENT.sub(rf"\g<1>{MASK}", word))
        else:
            masked.append(mask_text(word))
        secret_follows = _SECRET_FLAG.fullmatch(word) is not None
    return masked


def masked(value: Any, name: str = "") -> Any:
    """Plain data with what looks like a credential masked.

    Args:
        value: mappings and lists of any depth. Strings pass through `mask_text`.
        name: the key at which `value` stands: a string at one that sounds secret is masked whole,
            unless it is an interpolation (`${oc.env:TOKEN}`).
    """
    if isinstance(value, str):
        secret = _SECRET_KEY.fullmatch(name) is not None and not value.startswith("${")
        return MASK if secret else mask_text(value)
    if isinstance(value, Mapping):
        return {str(key): masked(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, name) for item in value]
    return value
