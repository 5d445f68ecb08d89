"""Masks what looks like a credential, wherever a run would write it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"

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


def mask_text(text: str) -> str:
    """`text` with logins in addresses, `secret=value` pairs and well-known tokens masked."""
    text = _URL_LOGIN.sub(rf"\g<1>{MASK}@", text)
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
