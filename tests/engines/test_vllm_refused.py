"""What cannot be served: a start that stops with one sentence, or an engine that runs as if there were no store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
from inside import begin, running
from serving import transfer

pytest_plugins = ["small_models"]
pytestmark = [pytest.mark.timeout(600)]
ONLY = "only models whose layers all have full attention are served, and this one has"


def ended(model: Path, log: Path, config: dict[str, Any], **options: Any) -> str:
    """Which error of ours an engine that must not start says last."""
    engine = begin(model, log, config, **options)
    for pipe in (engine.process.stdin, engine.process.stdout):
        assert pipe is not None
        pipe.close()
    assert engine.process.wait(200) != 0
    lines = log.read_text(errors="replace").splitlines()
    said = [line.partition("kvstore.errors.")[2] for line in lines if "kvstore.errors." in line]
    assert said, lines[-20:]
    return said[-1]


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        ({"dri": "cache"}, "BadInput: 'dri' in kv_connector_extra_config is not known; did you mean 'dir'?"),
        ({"host": "4 lots"}, "BadInput: host='4 lots' is not a size"),
        ({"socket": "unix:/nowhere/kvstore.sock"}, "Unreachable: no daemon listens at /nowhere/kvstore.sock"),
    ],
)
def test_a_bad_configuration_stops_the_start(llama: Path, tmp_path: Path, extra: dict[str, Any], sentence: str) -> None:
    assert sentence in ended(llama, tmp_path / "log", transfer(**extra))


@pytest.mark.parametrize("kind", ["sliding", "hybrid"])
def test_an_unsupported_model_obeys_required(tmp_path: Path, kind: str) -> None:
    model = getattr(models, kind)(tmp_path / "model")
    config = transfer(dir=str(tmp_path / "cache"), host="64MiB")
    assert ended(model, tmp_path / "refused.log", config).startswith(f"Unsupported: {ONLY}")
    config = transfer(dir=str(tmp_path / "cache"), host="64MiB", required=False)
    ids, log = models.prompt(4, 700), tmp_path / "without.log"
    with running(model, log, config) as engine:
        first = engine.one(ids)
        engine.forget()
        again = engine.one(ids)
        assert first.tokens == again.tokens and again.cached == 0
    assert f"nothing is stored or reused: {ONLY}" in log.read_text()
