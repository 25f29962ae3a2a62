"""The routes of vLLM's server that a run needs, over a tiny model that is read with transformers: in a thread.

What a test may want otherwise are its attributes: settings that a user forgot, and answers that fail.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file

from rlpost.policy.load import load_policy
from rlpost.policy.params import Model
from rlpost.policy.policy import Policy
from rlpost.types import Completion, Group

Answer = tuple[int, Any]
NOT_FOUND: Answer = (404, {"detail": "Not Found"})
DONE: Answer = (200, {"success": True})


class FakeVllm:
    """A server; `with` starts and ends it."""

    def __init__(self, model: Policy, name: str = "policy") -> None:
        self.name = name
        self.models = {name: model}
        """By name; every one but the first is an adapter."""
        self.version = "default"
        self.processed, self.dev_mode, self.scale_out, self.runtime_lora = True, True, True, True
        self.sees_folders, self.reloads, self.ended = True, True, False
        self.positions = 32
        self.max_logprobs = 20
        self.requests: list[dict[str, Any]] = []
        """All that wanted tokens of a completion."""
        self.paths: list[str] = []
        self.failures: deque[Callable[[Answer], Answer]] = deque()
        """What becomes of the next such answers, before they are sent; None where the connection breaks off."""
        self.together = 1
        """So many such requests wait for each other, and are answered from the last to the first."""
        self._waiting: list[threading.Event] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, path: str, body: dict[str, Any]) -> Answer:
        if self.ended:
            return 503, None
        route = path.partition("?")[0]
        self.paths.append(path)
        found = getattr(self, f"_{method.lower()}{route.replace('/', '_')}", None)
        return NOT_FOUND if found is None else found(body)

    def _get_health(self, _: Any) -> Answer:
        return 200, {}

    def _get_v1_models(self, _: Any) -> Answer:
        first, *adapters = self.models
        listed = [{"id": first, "parent": None, "max_model_len": self.positions}]
        return 200, {"data": listed + [{"id": name, "parent": first} for name in adapters]}

    def _get_weight_info(self, _: Any) -> Answer:
        return (200, {"weight_version": self.version}) if self.dev_mode else NOT_FOUND

    def _post_detokenize(self, body: dict[str, Any]) -> Answer:
        return 200, {"prompt": self.models[self.name].tokenizer.decode(body["tokens"])}

    def _post_pause(self, _: Any) -> Answer:
        return DONE

    _post_resume = _post_reset_prefix_cache = _post_pause

    def _post_collective_rpc(self, body: dict[str, Any]) -> Answer:
        assert body["method"] == "reload_weights"
        folder = Path(body["kwargs"]["weights_path"])
        if not self.sees_folders:
            return 500, {"error": {"message": f"Repo id must be in the form 'repo_name': '{folder}'", "code": 500}}
        if self.reloads:
            self.models[self.name].model.load_state_dict(load_file(folder / "model.safetensors"))
        return 200, {"results": [None]}

    def _post_update_weight_version(self, body: dict[str, Any]) -> Answer:
        self.version = body["new_version"]
        return DONE

    def _post_v1_load_lora_adapter(self, body: dict[str, Any]) -> Answer:
        if not self.runtime_lora:
            return NOT_FOUND
        if not body:
            return 400, {"error": {"message": "2 validation errors"}}
        self.models[body["lora_name"]] = self._loaded(Path(body["lora_path"]))
        return 200, "Success"

    def _post_v1_unload_lora_adapter(self, body: dict[str, Any]) -> Answer:
        del self.models[body["lora_name"]]
        return 200, "Success"

    def _post_inference_v1_generate(self, body: dict[str, Any]) -> Answer:
        if not self.scale_out:
            return 403, {"error": {"message": "Scale-out endpoints are disabled."}}
        sampling, name = body["sampling_params"], body["model"]
        if sampling["logprobs"] != 0:  # the questions of a check
            return self._completion(body["token_ids"], sampling, name)
        with self._lock:
            self.requests.append(body)
            failure = self.failures.popleft() if self.failures else None
        self._wait_for_others()
        found = self._completion(body["token_ids"], sampling, name)
        return found if failure is None else failure(found)

    def _wait_for_others(self) -> None:
        with self._lock:
            own = threading.Event()
            self._waiting.append(own)
            if len(self._waiting) >= self.together:
                self._waiting.pop().set()
        assert own.wait(30)
        time.sleep(0.01)  # the answer before is on its way
        with self._lock:
            if self._waiting:
                self._waiting.pop().set()

    def _post_v1_completions(self, body: dict[str, Any]) -> Answer:
        """As a teacher is asked: scores of the prompt, at temperature 1."""
        row, k = body["prompt"], body["prompt_logprobs"]
        assert (body["max_tokens"], body["return_token_ids"]) == (1, True)
        policy = self.models[body["model"]]
        if k > self.max_logprobs:
            said = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            return 400, {"error": {"message": said}}
        if len(row) + 1 > self.positions:
            return 400, {"error": {"message": f"maximum context length is {self.positions} tokens"}}
        if max(row) >= policy.vocabulary:
            return 400, {"error": {"message": f"Token id {max(row)} is out of vocabulary"}}
        with self._lock:
            self.requests.append(body)
            failure = self.failures.popleft() if self.failures else None
        self._wait_for_others()
        choice = {"prompt_token_ids": row, "prompt_logprobs": self._scores(policy, row, k), "text": ""}
        found: Answer = (200, {"model": body["model"], "choices": [choice]})
        return found if failure is None else failure(found)

    @torch.no_grad()
    def _scores(self, policy: Policy, row: list[int], k: int) -> list[dict[str, Any] | None]:
        found: list[dict[str, Any] | None] = [None]
        group = Group(row[:1], [Completion(row[1:], [True] * (len(row) - 1))])
        logp_NV = policy.distributions(policy.batch([group]))(slice(None))
        for token, logp_V in zip(row[1:], logp_NV, strict=True):
            listed = dict.fromkeys([token, *logp_V.topk(k).indices.tolist()])
            found.append({str(i): {"logprob": logp_V[i].item(), "rank": 1, "decoded_token": None} for i in listed})
        return found

    @torch.no_grad()
    def _completion(self, prompt: list[int], sampling: dict[str, Any], name: str) -> Answer:
        ids: list[int] = []
        content = []
        version, policy = self.version, self.models[name]
        draw = torch.Generator().manual_seed(sampling["seed"])
        reason = "length"
        while len(ids) < sampling["max_tokens"]:
            first, *rest = [*prompt, *ids]
            logits = policy.next_logits(policy.batch([Group([first], [Completion(rest, [True] * len(rest))])]))[0]
            scaled = logits / (sampling["temperature"] or 1.0)
            said = (scaled if self.processed else logits).log_softmax(-1)
            best = logits.argmax().item()
            chosen = best if sampling["temperature"] == 0 else scaled.softmax(-1).multinomial(1, generator=draw).item()
            ids.append(int(chosen))
            tokens = [chosen, *said.topk(sampling["logprobs"]).indices.tolist()]
            listed = [{"token_id": t, "logprob": said[t].item()} for t in tokens]
            content.append({**listed[0], "top_logprobs": listed})
            if chosen in sampling.get("stop_token_ids", ()):
                reason = "stop"
                break
        spans = [{"version": version, "start": 0, "end": len(ids)}]
        choice = {"token_ids": ids, "finish_reason": reason, "weight_versions": spans, "logprobs": {"content": content}}
        return 200, {"model": name, "choices": [choice]}

    def _loaded(self, folder: Path) -> Policy:
        return load_policy(folder, Model(), trainable=False)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # one packet an answer

            def do_GET(self) -> None:
                self._reply("GET")

            def do_POST(self) -> None:
                self._reply("POST")

            def _reply(self, method: str) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, found = fake.answer(method, self.path, json.loads(sent or b"{}"))
                if found is None:
                    self.close_connection = True
                    return
                data = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        return Handler
