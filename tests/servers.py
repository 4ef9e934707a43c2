"""A chat server of the OpenAI protocol that knows all answers and misbehaves by plan."""

import base64
import hashlib
import io
import json
import math
import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

FAULTS = ("429", "500", "hang", "reset", "truncated", "schema", "nan", "range", "duplicate")

Plan = Callable[[str, int], str]
"""The fault, or none, of the given try (from 0) of the question with the given text."""


@dataclass(frozen=True)
class Seen:
    """What one request brought, and when, in seconds."""

    path: str
    time: float
    headers: Mapping[str, str]
    body: dict
    texts: tuple[str, ...] = ()
    images: tuple[np.ndarray, ...] = ()


def true_margin(image: np.ndarray, text: str) -> float:
    """What the server believes, from -4 to 4 nats: a function of every pixel and character."""
    digest = hashlib.sha256(image.tobytes() + text.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 * 8 - 4


def first_token(**log_p: float) -> dict:
    """A reply whose first token has these log-probabilities; `_` in a name is a space."""
    tokens = [{"token": name.replace("_", " "), "logprob": value} for name, value in log_p.items()]
    best = max(tokens, key=lambda token: token["logprob"])
    return reply(best["token"], [{**best, "top_logprobs": tokens}])


def reply(text: str, positions: list[dict] | None = None, finish: str = "stop") -> dict:
    logprobs = None if positions is None else {"content": positions}
    message = {"role": "assistant", "content": text}
    return {"id": "x", "choices": [{"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish}]}


def yes_or_no(seen: Seen) -> dict:
    """90 % of the probability is on yes and no, in several spellings, by `true_margin`."""
    p = 1 / (1 + math.exp(-true_margin(seen.images[0], seen.texts[-1])))
    shares = {"_Yes": 0.6 * p, "yes": 0.3 * p, "No": 0.5 * (1 - p), "_no": 0.4 * (1 - p), "Maybe": 0.1}
    return first_token(**{name: math.log(share) for name, share in shares.items()})


class ChatServer:
    """Serves `model` at `url` from entering to leaving the context.

    `answer` makes a whole reply of a request, `plan` spoils it. `seen` holds all that was asked, in order. While
    `down` every connection is reset.
    """

    def __init__(
        self, model: str = "judge", plan: Plan = lambda text, tried: "", answer: Callable[[Seen], dict] = yes_or_no
    ):
        self.model, self.plan, self.answer = model, plan, answer
        self.seen: list[Seen] = []
        self.down = False
        self.retry_after = "0"
        self.leaving = threading.Event()
        self.tries: Counter[str] = Counter()
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"chat": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> "ChatServer":
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.leaving.set()
        self._http.shutdown()
        self._http.server_close()

    def asked(self) -> list[Seen]:
        """The chat requests."""
        return [seen for seen in self.seen if seen.path.endswith("/chat/completions")]

    def look(self, path: str, headers: Mapping[str, str], body: dict) -> tuple[Seen, str]:
        """Takes a request down, and what shall go wrong with it."""
        parts = [part for m in body.get("messages", ()) if isinstance(m["content"], list) for part in m["content"]]
        texts = [part["text"] for part in parts if part["type"] == "text"]
        images = [_picture(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
        seen = Seen(path, time.monotonic(), headers, body, tuple(texts), tuple(images))
        with self.lock:
            self.seen.append(seen)
            if self.down:
                return seen, "reset"
            if not texts:
                return seen, ""
            self.tries[texts[-1]] += 1
            return seen, self.plan(texts[-1], self.tries[texts[-1]] - 1)


class _Handler(BaseHTTPRequestHandler):
    chat: ChatServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def do_GET(self):
        _, fault = self.chat.look(self.path, self.headers, {})
        self._send(fault, {"object": "list", "data": [{"id": self.chat.model, "object": "model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        seen, fault = self.chat.look(self.path, self.headers, body)
        self._send(fault, self.chat.answer(seen))

    def _send(self, fault: str, answer: dict) -> None:
        match fault:
            case "429" | "500" | "400":
                return self._write(int(fault), b'{"error": {"message": "by plan"}}')
            case "hang":
                self.chat.leaving.wait(30)
                self.close_connection = True
                return None
            case "reset":
                return self._reset()
            case "truncated":
                whole = json.dumps(answer).encode()
                return self._write(200, whole[: len(whole) // 2])
            case "schema":
                answer = {"choices": [{"message": {"content": "yes"}, "logprobs": {"tokens": ["yes"]}}]}
            case "nan" | "range":
                listed = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
                listed[0]["logprob"] = math.nan if fault == "nan" else 0.7
            case "duplicate":
                answer["choices"] *= 2
        return self._write(200, json.dumps(answer).encode())

    def _write(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", self.chat.retry_after)
        self.end_headers()
        self.wfile.write(body)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def log_message(self, *_):
        pass


def _picture(url: str) -> np.ndarray:
    kind, _, data = url.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
