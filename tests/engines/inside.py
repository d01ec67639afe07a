"""A real engine without a server, in a process of its own: tests ask it over pipes and see every step's end.

As a program, this file is that process: settings in its first argument, one question a line, one answer a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serving import ENVIRONMENT

LIMITS: dict[str, Any] = {"max_model_len": 8192, "num_gpu_blocks_override": 256}  # pages of 128 tokens


@dataclass(frozen=True)
class Ask:
    """One request. ``kvstore``: what its kv_transfer_params say; ``abort``: after so many steps."""

    ids: Sequence[int]
    tokens: int = 16
    salt: str | None = None
    kvstore: Mapping[str, Any] | None = None
    lora: str | None = None
    logprobs: int | None = None
    abort: int | None = None
    actions: Sequence[Mapping[str, Any]] = ()  # of the engine's envelope of hints


@dataclass(frozen=True)
class Answer:
    """Its end. ``told``: what the connector said; ``logprobs``: by token id, for each token that came."""

    tokens: tuple[int, ...]
    cached: int
    told: Mapping[str, Any]
    logprobs: tuple[dict[int, float], ...] = ()


@dataclass
class Inside:
    """One such process. ``log``: what it prints."""

    process: subprocess.Popen[str]
    log: Path
    _ended: bool = field(default=False)

    def ask(self, *asked: Ask) -> list[Answer]:
        """All at once: the engine has as many of them in a step as it takes."""
        answers = self._call("ask", requests=[vars(one) for one in asked])
        return [
            Answer(
                tuple(answer["tokens"]),
                answer["cached"],
                answer["told"],
                tuple({int(token): value for token, value in step.items()} for step in answer["logprobs"]),
            )
            for answer in answers
        ]

    def one(self, ids: Sequence[int], tokens: int = 16, **more: Any) -> Answer:
        """One request alone."""
        return self.ask(Ask(ids, tokens, **more))[0]

    def forget(self) -> None:
        """Empties the engine's own prefix cache."""
        assert self._call("forget") is True

    def metrics(self) -> dict[str, float]:
        """Its counters."""
        found: dict[str, float] = self._call("metrics")
        return found

    def fingerprint(self) -> dict[str, str]:
        """What identifies the model, by component."""
        found: dict[str, str] = self._call("fingerprint")
        return found

    def close(self) -> None:
        """Ends it as a program ends."""
        if self.process.poll() is None:
            self._call("end")
            self.process.wait(60)

    def _call(self, what: str, **more: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text(errors="replace")[-6000:]
        return json.loads(line)


def begin(model: Path, log: Path, config: Mapping[str, Any] | None = None, **options: Any) -> Inside:
    """Starts it, and does not wait. ``options``: of vLLM's ``LLM``."""
    settings = {"model": str(model), "config": config, "options": {"dtype": "float32", **LIMITS, **options}}
    environ = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, __file__, json.dumps(settings)]
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, env=environ, text=True
        )
    return Inside(process, log)


@contextmanager
def running(model: Path, log: Path, config: Mapping[str, Any] | None = None, **options: Any) -> Iterator[Inside]:
    """One that is ended afterwards."""
    engine = begin(model, log, config, **options)
    try:
        yield engine
        engine.close()
    finally:
        if engine.process.poll() is None:
            engine.process.kill()
        engine.process.wait(60)
        for pipe in (engine.process.stdin, engine.process.stdout):
            assert pipe is not None
            pipe.close()


# -- in that process --------------------------------------------------------------------------------------------------


class Loop:
    """Answers questions."""

    def __init__(self, model: str, config: Mapping[str, Any] | None, options: Mapping[str, Any]) -> None:
        from vllm import LLM

        transfer = {} if config is None else {"kv_transfer_config": config}
        self._engine = LLM(
            model=model, skip_tokenizer_init=True, enforce_eager=True, disable_log_stats=False, **transfer, **options
        )
        self._core = self._engine.llm_engine.engine_core.engine_core
        self._number, self._pause = 0, threading.Event()
        self._adapters: dict[str, Any] = {}

    def ask(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Steps until all are done, and then until the engine has nothing left of them."""
        engine, outputs, steps = self._engine.llm_engine, dict[str, Any](), 0
        names = [self._add(request) for request in requests]
        aborts = {name: request["abort"] for name, request in zip(names, requests, strict=True) if request["abort"]}
        while engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in engine.step()}
            steps += 1
            engine.abort_request([name for name, step in aborts.items() if step == steps])
        while self._core.scheduler.has_requests():
            engine.step()
            self._pause.wait(0.001)
        return [_answer(outputs.get(name)) for name in names]

    def _add(self, request: Mapping[str, Any]) -> str:
        from vllm import SamplingParams

        name, self._number = f"r{self._number}", self._number + 1
        prompt = {"prompt_token_ids": list(request["ids"])}
        if request["salt"] is not None:
            prompt["cache_salt"] = request["salt"]
        wishes = {} if request["kvstore"] is None else {"kv_transfer_params": {"kvstore": request["kvstore"]}}
        params = SamplingParams(
            temperature=0.0,
            max_tokens=request["tokens"],
            ignore_eos=True,
            detokenize=False,
            logprobs=request["logprobs"],
            extra_args=wishes,
        )
        lora = None if request["lora"] is None else self._adapter(request["lora"])
        hints = self._hints(name, request["actions"])
        self._engine.llm_engine.add_request(name, prompt, params, lora_request=lora, kv_hints=hints)
        return name

    def _hints(self, name: str, actions: Sequence[Mapping[str, Any]]) -> Any:
        from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

        return KvHintsEnvelope("1.0", name, [KvHintAction(**action) for action in actions]) if actions else None

    def _adapter(self, path: str) -> Any:
        from vllm.lora.request import LoRARequest

        if path not in self._adapters:
            self._adapters[path] = LoRARequest(Path(path).name, len(self._adapters) + 1, path)
        return self._adapters[path]

    def forget(self) -> bool:
        """The engine's own cache."""
        return bool(self._engine.reset_prefix_cache())

    def metrics(self) -> dict[str, float]:
        """Those that are one number."""
        return {one.name: one.value for one in self._engine.get_metrics() if hasattr(one, "value")}

    def fingerprint(self) -> dict[str, str]:
        """From the connector's half in the scheduler."""
        connector: Any = self._core.scheduler.connector
        return dict(connector._scheduler._model.fingerprint.components)

    def end(self) -> bool:
        """As vLLM ends an engine."""
        self._engine.llm_engine.engine_core.shutdown()
        return True


def _answer(output: Any) -> dict[str, Any]:
    if output is None:
        return {"tokens": [], "cached": 0, "told": {}, "logprobs": []}
    said = output.outputs[0]
    steps = [{token: one.logprob for token, one in step.items()} for step in said.logprobs or ()]
    told = (output.kv_transfer_params or {}).get("kvstore") or {}
    return {"tokens": list(said.token_ids), "cached": output.num_cached_tokens or 0, "told": told, "logprobs": steps}


def main() -> None:
    """Until the pipe ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    loop = Loop(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        asked = json.loads(line)
        what = asked.pop("do")
        answers.write(json.dumps(getattr(loop, what)(**asked)) + "\n")
        answers.flush()
        if what == "end":
            return


if __name__ == "__main__":
    main()
