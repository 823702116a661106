"""An endpoint's key: read from the environment, and shown nowhere."""

from __future__ import annotations

import base64
import json
import os
import re
from functools import lru_cache
from urllib.parse import quote, quote_plus

from common.errors import InputError

_LONG = 8  # characters from which on a key is no part of an ordinary word
_SHOWN = "<key>"


def read_key(variable: str) -> str:
    """The key in an environment variable, empty where there is none; raises `InputError` for what no header holds."""
    key = os.environ.get(variable, "")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError(
            f"the environment variable {variable} holds no key: a space, a line break or a character that is not ASCII "
            "is in it. Set it again, without what does not belong to the key"
        )
    return key


def without_key(text: str, key: str) -> str:
    """`text` with every form of `key` replaced: as it is, in a URL, in JSON, in a string's repr, in base64.

    A short key (a local server's "x") is replaced where it stands alone and left where it is a part of a word.
    """
    return _pattern(key).sub(_SHOWN, text) if key else text


@lru_cache(maxsize=8)
def _pattern(key: str) -> re.Pattern[str]:
    in_base64 = base64.b64encode(key.encode()).decode().rstrip("=")
    forms = {key, quote(key, safe=""), quote_plus(key), json.dumps(key)[1:-1], repr(key)[1:-1], in_base64}
    longest_first = sorted(forms, key=len, reverse=True)
    # A percent sign's digits may be of either case.
    spelled = "|".join(
        re.sub(r"%[0-9A-F]{2}", lambda code: f"(?i:{code[0]})", re.escape(form))
        for form in longest_first
    )
    return re.compile(spelled if len(key) >= _LONG else rf"(?<![0-9A-Za-z_])(?:{spelled})(?![0-9A-Za-z_])")
