"""A judge on loopback: what it is asked, what is made of its answers, and how often it is asked again."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from megatron_xalign.errors import ConfigError
from megatron_xalign.steering.judge import JudgeConfig, JudgeError, Judgement, estimate, judge

TEXTS = [('The dog ran. "}', "Koira juoksi.")]


class Server:
    """Answers one scripted (status, body, headers) after another; the last one for ever."""

    def __init__(self) -> None:
        self.script: list[tuple[int, str, dict[str, str]]] = []
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.asked.append((self.path, dict(self.headers), body))
                status, answer, headers = owner.script.pop(0) if len(owner.script) > 1 else owner.script[0]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.encode())

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.thread.join(10)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.close()


def says(content: str, status: int = 200, **headers: str) -> tuple[int, str, dict[str, str]]:
    return status, json.dumps({"choices": [{"message": {"content": content}}]}), headers


GOOD = says('{"coherence": 3, "fluency": 4}')


def test_it_is_asked_as_openai_is_and_its_grades_are_read(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    server.script = [GOOD]
    config = JudgeConfig(base_url=server.url, model="m", api_key_env="JUDGE_KEY")
    assert judge(config, TEXTS * 2, "Finnish") == [Judgement(3, 4)] * 2
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer s3cret"
    assert body["model"] == "m" and body["temperature"] == 0 and body["response_format"] == {"type": "json_object"}
    assert "Finnish" in body["messages"][0]["content"]
    assert json.loads(body["messages"][1]["content"]) == {"text": TEXTS[0][0], "continuation": TEXTS[0][1]}


@pytest.mark.parametrize(
    "bad",
    [
        says("good text"), says('{"coherence": 3}'), says('{"coherence": 3, "fluency": 5}'), says('[3, 4]'),
        says('{"coherence": true, "fluency": 2}'), says('{"coherence": "3", "fluency": 2}'), (200, "<html>", {}),
        says('{"coherence": 3, "fluency": 4, "note": 1}'), (500, "busy", {}), (429, "slow", {"Retry-After": "7"}),
    ],
)  # fmt: skip
def test_what_is_not_an_answer_is_asked_for_again(server: Server, bad: tuple[int, str, dict[str, str]]) -> None:
    server.script = [bad, bad, GOOD]
    waits: list[float] = []
    config = JudgeConfig(base_url=server.url, model="m", first_pause_seconds=0.5)
    assert judge(config, TEXTS, "Finnish", waits.append) == [Judgement(3, 4)]
    assert waits == ([7.0, 7.0] if bad[2] else [0.5, 1.0])


def test_it_gives_up_after_its_attempts_and_at_once_where_it_is_refused(server: Server) -> None:
    config = JudgeConfig(base_url=server.url, model="m", attempts=3)
    server.script = [(503, "", {})]
    with pytest.raises(JudgeError, match="no usable answer in 3 attempts; the last time: HTTP 503"):
        judge(config, TEXTS, "Finnish", lambda seconds: None)
    assert len(server.asked) == 3
    for status in (401, 302):
        server.script = [(status, "no", {"Location": "http://127.0.0.1:1/"})]
        with pytest.raises(JudgeError, match=f"refused the request \\({status}\\)"):
            judge(config, TEXTS, "Finnish", lambda seconds: None)
    assert len(server.asked) == 5


def test_nobody_listening_is_told() -> None:
    config = JudgeConfig(base_url="http://127.0.0.1:9/v1", model="m", attempts=1, timeout_seconds=5)
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1:9/v1 gave no usable answer in 1 attempts"):
        judge(config, TEXTS, "Finnish")


def test_the_price_is_known_before(server: Server) -> None:
    config = JudgeConfig(base_url=server.url, model="m", input_price=3.0, output_price=10.0)
    found = estimate(config, TEXTS * 100, "Finnish")
    assert found.requests == 100 and not server.asked
    assert found.price == pytest.approx((found.input_tokens * 3 + 4000 * 10) / 1e6)
    assert "price not known" in str(estimate(JudgeConfig(base_url=server.url, model="m"), TEXTS, "Finnish"))


def test_keys_are_not_sent_in_clear_nor_left_out_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="in clear"):
        JudgeConfig(base_url="http://example.invalid/v1", model="m", api_key_env="K")
    with pytest.raises(ConfigError, match="not a URL"):
        JudgeConfig(base_url="localhost:8000", model="m")
    monkeypatch.delenv("K", raising=False)
    with pytest.raises(ConfigError, match="variable K"):
        judge(JudgeConfig(base_url="https://example.invalid/v1", model="m", api_key_env="K"), TEXTS, "Finnish")
