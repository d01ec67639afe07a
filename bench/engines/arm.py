"""One engine in a process of its own: it reads a request a line and answers a line, so that several take turns.

``python -m kvstore.bench.engines.arm SETTINGS``, where the settings are JSON: ``model``, ``seed``, ``prefix_caching``,
``transfer`` (the engine's ``kv_transfer_config``, or null), ``dtype``, ``context``. A request: ``{"ids": [...]}``.
An answer: ``{"seconds": ..., "cached": ..., "token": ...}``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


def main(settings: dict[str, Any]) -> None:
    """Serves until its input ends. What others print on the standard output goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.update(ENVIRONMENT)
    engine = start(settings)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = settled(engine) if request.pop("settle", False) else measured(engine, **request)
        print(json.dumps(answer), file=answers, flush=True)
    engine.llm_engine.engine_core.shutdown()


def start(settings: dict[str, Any]) -> Any:
    """An engine in this process."""
    from vllm import LLM

    return LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        seed=settings["seed"],
        max_model_len=settings["context"],
        max_num_batched_tokens=settings["context"],
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=settings["prefix_caching"],
        kv_transfer_config=settings["transfer"],
        disable_log_stats=True,
    )


def settled(engine: Any) -> dict[str, Any]:
    """After what was computed is stored, and written."""
    from kvstore.adapters.vllm.opening import stores

    while engine.llm_engine.engine_core.engine_core.scheduler.has_requests():
        engine.llm_engine.step()  # an engine in its own process goes on by itself
    for store in stores():
        store.flush(30.0)
    return {}


def measured(
    engine: Any, ids: list[int], extra: dict[str, Any] | None = None, salt: str | None = None
) -> dict[str, Any]:
    """Seconds to the first token of a prompt, alone."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, extra_args=extra)
    prompt: dict[str, Any] = {"prompt_token_ids": ids}
    if salt is not None:
        prompt["cache_salt"] = salt
    begin = time.perf_counter()
    (output,) = engine.generate([prompt], params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "cached": output.num_cached_tokens, "token": output.outputs[0].token_ids[0]}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
