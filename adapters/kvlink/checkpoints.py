"""What a training keeps on disk: the model as transformers reads it, the optimizer's state, and where it was."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kvstore.adapters.kvlink.links import LinkTokens
from kvstore.adapters.transformers.checkpoint import checkpoint_files
from kvstore.errors import BadInput

STATE, OPTIMIZER = "training.json", "optimizer.safetensors"
STEP = re.compile(r"step-(\d+)")
FREE = {"at_once", "keep_every", "recompute"}  # of a recipe: what may change on the way


class Training:
    """The kept states of one training, the newest of which is a whole one at any moment."""

    def __init__(self, out: Path, recipe: Any, links: LinkTokens, data: str) -> None:
        """``data``: the digest of what it reads."""
        self.out, self.links = out, links
        fixed = {name: value for name, value in asdict(recipe).items() if name not in FREE}
        self.what = {"recipe": fixed, "links": asdict(links), "data": data}

    def newest(self) -> Path | None:
        """The folder of the last kept state; it holds a model for ``from_pretrained``."""
        found = [(int(match[1]), path) for path in self.out.glob("step-*") if (match := STEP.fullmatch(path.name))]
        return max(found)[1] if found else None

    def keep(self, step: int, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Keeps this state, and then drops those before it."""
        partial, folder = self.out / "partial", self.out / f"step-{step}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        self.links.save(partial)
        state = optimizer.state_dict()["state"]
        tensors = {f"{number}.{name}": value.contiguous() for number, of in state.items() for name, value in of.items()}
        save_file(tensors, partial / OPTIMIZER)
        (partial / STATE).write_text(json.dumps({"step": step, **self.what}, indent=1) + "\n", "utf-8")
        partial.rename(folder)
        for old in self.out.glob("step-*"):
            if old != folder:
                shutil.rmtree(old)

    def resume(self, model: Any, optimizer: torch.optim.Optimizer) -> int:
        """Puts model and optimizer into the last kept state; steps done, 0 where there is none.

        Raises ``BadInput`` when that state is of another training, or does not fit the model.
        """
        folder = self.newest()
        if folder is None:
            return 0
        state = json.loads((folder / STATE).read_text("utf-8"))
        step = int(state.pop("step"))
        different = sorted(name for name in self.what if state.get(name) != self.what[name])
        if different:
            raise BadInput(f"{folder} is of a training with other {', '.join(different)}; use another folder")
        own = model.state_dict()
        for file in checkpoint_files(folder):
            for name, tensor in file.tensors().items():
                if name not in own or own[name].shape != tensor.shape:
                    raise BadInput(f"{folder} holds another model: {name} does not fit; use another folder")
                own[name].copy_(tensor)
        states: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in load_file(folder / OPTIMIZER).items():
            number, key = name.split(".", 1)
            states.setdefault(int(number), {})[key] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        return step
