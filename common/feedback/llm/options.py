"""Which language model is asked, how, and for how much; checked before anything is sent."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from common.config import check_numbers, option
from common.errors import InputError
from common.feedback.llm.keys import read_key

# How an endpoint can be held to the form of an answer, the surest first; `AUTO` tries them in this order.
WAYS = ("json_schema", "json_object", "none")
AUTO = "auto"


@dataclass
class EndpointOptions:
    """A language model behind an OpenAI-compatible endpoint (vLLM, SGLang, TGI, llama.cpp, Azure, OpenAI)."""

    base_url: str = option("", "For the annotator llm: the endpoint, such as http://localhost:8000/v1.")
    model: str = option("", "For the annotator llm: the model's name at the endpoint.")
    api_key_env: str = option(
        "OPENAI_API_KEY", "Environment variable with the endpoint's key; an endpoint on this machine needs none."
    )
    allow_remote: bool = option(
        False, "Send search histories, which are personal, to an endpoint on another machine."
    )
    structured_output: str = option(
        AUTO,
        "How the endpoint is held to the answer's form: response_format json_schema, json_object with the schema, none "
        "(the prompt alone), or auto: the first of them that works.",
        choices=[AUTO, *WAYS],
    )
    extra_body: str = option(
        "", 'JSON merged into every request, such as {"chat_template_kwargs": {"enable_thinking": false}}.'
    )
    max_answer_tokens: int = option(1024, "Longest answer of the language model.", minimum=1)
    history_events: int = option(50, "Newest events of a history that the language model is shown.", minimum=1)
    answers: str = option(
        "", "Append-only file of all answers, so that none is paid for twice (default: beside the output)."
    )
    concurrency: int = option(32, "Requests under way at a time.", group="requests, costs, failures", minimum=1)
    timeout: float = option(120.0, "Seconds after which a request counts as failed and is repeated.", above=0)
    max_retries: int = option(
        6, "Repeats of a request after 408, 409, 429, 5xx, a timeout, a lost connection or an unreadable answer."
    )
    max_requests: int = option(0, "Stop before more HTTP requests than this, repeats included; 0 sets no limit.")
    max_cost: float = option(0.0, "Stop once the answers cost this much, by the two prices; 0 sets no limit.")
    price_in: float = option(0.0, "Price of a million prompt tokens.")
    price_out: float = option(0.0, "Price of a million answer tokens.")
    max_failure_share: float = option(
        0.05, "Stop when more than this share of the records gets no valid answer (looked at from 100 records on).",
        maximum=1
    )


def check_endpoint(options: EndpointOptions) -> None:
    """Raise `InputError` for an endpoint that is missing, malformed or remote without leave, and senseless limits."""
    if not options.base_url or not options.model:
        raise InputError(
            "annotator 'llm' asks a language model: give --base_url (such as http://localhost:8000/v1) and --model"
        )
    parts = urlsplit(options.base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"--base_url {_shown(options)!r}: expected http://host:port/v1 or https://...")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise InputError("--base_url holds credentials or parameters; keys belong in the environment (--api_key_env)")
    if not is_local(options) and not options.allow_remote:
        raise InputError(
            f"--base_url {_shown(options)}: {parts.hostname} is not this machine, and search histories are personal. "
            "Add --allow_remote if they may be sent there"
        )
    key = api_key(options)  # raises for one that cannot be a key
    if not is_local(options) and not key:
        raise InputError(
            f"--base_url {_shown(options)}: put its key into the environment variable {options.api_key_env}"
        )
    check_numbers(options)
    if options.max_cost and not (options.price_in or options.price_out):
        raise InputError("--max_cost needs prices: give --price_in and --price_out, by the million tokens")
    extra_body(options)


def is_local(options: EndpointOptions) -> bool:
    """Whether the endpoint is a loopback address. A name other than localhost is not looked up: it may change."""
    host = urlsplit(options.base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def api_key(options: EndpointOptions) -> str:
    """The key from the environment, empty where there is none; raises `InputError` for what can be none."""
    return read_key(options.api_key_env)


def extra_body(options: EndpointOptions) -> dict[str, Any]:
    """`--extra_body` as a mapping; raises `InputError` unless it is a JSON object."""
    try:
        body = json.loads(options.extra_body or "{}")
    except json.JSONDecodeError as error:
        raise InputError(f"--extra_body is not valid JSON ({error})") from None
    if not isinstance(body, dict):
        raise InputError('--extra_body must be a JSON object, such as {"top_p": 1}')
    return body


def _shown(options: EndpointOptions) -> str:
    """The address without what may stand before its host."""
    return options.base_url.rpartition("@")[2]
