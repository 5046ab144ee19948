"""An optional judge: any server with OpenAI's chat completions. What it would cost is known before it is asked."""

from __future__ import annotations

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from megatron_xalign.errors import ConfigError, XAlignError

log = logging.getLogger(__name__)

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_CHARACTERS_A_TOKEN = 3.0
"""For the estimate only; scripts other than Latin have fewer."""
_ANSWER_TOKENS = 40
_LEVELS = range(1, 5)
_ASKED = (
    "You grade how a text was continued. Answer with one JSON object and nothing else: "
    '{{"coherence": N, "fluency": N}}. coherence, 1 to 4: does the continuation make sense after the text '
    "(1 nonsense, 4 fully). fluency, 1 to 4: is it fluent {language} (1 not {language}, 4 as by a native writer)."
)


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """Which server, which model, and how patient to be."""

    base_url: str
    """Up to and including the version, such as ``http://localhost:8000/v1``."""
    model: str
    """Name the server knows the model by."""
    api_key_env: str | None = None
    """Environment variable that holds the key; none is sent if left out."""
    attempts: int = 4
    """How often one text is asked about before the job gives up."""
    timeout_seconds: float = 60.0
    first_pause_seconds: float = 1.0
    """Before the second attempt; doubled before each further one, unless the server says how long to wait."""
    input_price: float | None = None
    """Of a million tokens read, in any currency; for the estimate."""
    output_price: float | None = None
    """Of a million tokens written."""

    def __post_init__(self) -> None:
        address = urlsplit(self.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ConfigError(f"the judge's address {self.base_url!r} is not a URL such as http://localhost:8000/v1.")
        if self.api_key_env and address.scheme == "http" and address.hostname not in _LOOPBACK:
            raise ConfigError(f"{self.base_url} would carry the key in clear; use https.")
        if self.attempts < 1 or self.timeout_seconds <= 0:
            raise ConfigError(f"attempts={self.attempts} and timeout_seconds={self.timeout_seconds} must be positive.")


class JudgeError(XAlignError):
    """The judge could not be reached or did not answer as asked."""


@dataclass(frozen=True)
class Judgement:
    """Grades of one continuation, 1 to 4."""

    coherence: int
    fluency: int


@dataclass(frozen=True)
class Estimate:
    """What asking would take, before it is asked; retries come on top."""

    requests: int
    input_tokens: int
    output_tokens: int
    price: float | None
    """In the currency of the prices; None where they were not given."""

    def __str__(self) -> str:
        price = "price not known" if self.price is None else f"about {self.price:.2f}"
        return (
            f"{self.requests:,} requests, about {self.input_tokens:,} tokens in and {self.output_tokens:,} out, {price}"
        )


def estimate(config: JudgeConfig, texts: Sequence[tuple[str, str]], language: str) -> Estimate:
    """Count what ``judge`` would send."""
    asked = _ASKED.format(language=language)
    characters = sum(len(asked) + len(prompt) + len(more) + 60 for prompt, more in texts)
    tokens_in, tokens_out = round(characters / _CHARACTERS_A_TOKEN), _ANSWER_TOKENS * len(texts)
    price = None
    if config.input_price is not None and config.output_price is not None:
        price = (tokens_in * config.input_price + tokens_out * config.output_price) / 1e6
    return Estimate(len(texts), tokens_in, tokens_out, price)


def judge(
    config: JudgeConfig,
    texts: Sequence[tuple[str, str]],
    language: str,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Judgement]:
    """Grade continuations, one request each.

    Args:
        config: the judge.
        texts: (prompt, continuation).
        language: the continuation should be in, in words.
        sleep: how to wait between attempts.

    Raises:
        ConfigError: the key's environment variable is not set.
        JudgeError: the server refuses, or after all attempts fails or answers something else than asked.
    """
    headers = {"Content-Type": "application/json"}
    if config.api_key_env:
        key = os.environ.get(config.api_key_env)
        if not key:
            raise ConfigError(f"the environment variable {config.api_key_env}, for the judge's key, is not set.")
        headers["Authorization"] = f"Bearer {key}"
    return [_grade(config, headers, prompt, more, language, sleep) for prompt, more in texts]


def _grade(
    config: JudgeConfig, headers: dict[str, str], prompt: str, more: str, language: str,
    sleep: Callable[[float], None],
) -> Judgement:  # fmt: skip
    body = json.dumps(
        {
            "model": config.model,
            "temperature": 0,
            "response_format": {"type": "json_object"},
            "messages": [
                {"role": "system", "content": _ASKED.format(language=language)},
                # As JSON, so that no continuation can pass for the end of its own quotation.
                {"role": "user", "content": json.dumps({"text": prompt, "continuation": more}, ensure_ascii=False)},
            ],
        }
    ).encode()
    pause, why = config.first_pause_seconds, ""
    for attempt in range(config.attempts):
        if attempt:
            log.info("the judge failed (%s); asking again in %g s.", why, pause)
            sleep(pause)
            pause *= 2
        request = urllib.request.Request(f"{config.base_url.rstrip('/')}/chat/completions", body, headers)
        try:
            with _OPENER.open(request, timeout=config.timeout_seconds) as response:
                return _read(response.read())
        except urllib.error.HTTPError as error:
            said = error.read(300).decode("utf-8", "replace")
            if error.code != 429 and error.code < 500:
                raise JudgeError(f"{config.base_url} refused the request ({error.code}): {said}") from None
            wait = error.headers.get("Retry-After", "")
            pause = min(float(wait), 300.0) if wait.replace(".", "", 1).isdecimal() else pause
            why = f"HTTP {error.code}"
        except (OSError, TimeoutError) as error:
            why = str(error)
        except _NotAsAskedError as error:
            why = str(error)
    raise JudgeError(
        f"{config.base_url} gave no usable answer in {config.attempts} attempts; the last time: {why}. The texts are "
        "kept: run the command again, or without a judge."
    )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another server."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class _NotAsAskedError(Exception):
    pass


def _read(answer: bytes) -> Judgement:
    try:
        content = json.loads(answer)["choices"][0]["message"]["content"]
        grades = json.loads(content)
    except (ValueError, KeyError, IndexError, TypeError):
        raise _NotAsAskedError(f"not JSON as asked: {answer[:200].decode('utf-8', 'replace')!r}") from None
    if not isinstance(grades, dict) or set(grades) != {"coherence", "fluency"}:
        raise _NotAsAskedError(f"other keys than coherence and fluency: {str(content)[:200]!r}")
    for value in grades.values():
        if isinstance(value, bool) or not isinstance(value, int) or value not in _LEVELS:
            raise _NotAsAskedError(f"a grade that is not 1, 2, 3 or 4: {str(content)[:200]!r}")
    return Judgement(**grades)
