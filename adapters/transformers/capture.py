"""Seeing keys before rotation: a pass-through wrapper around the model's own rotary function.

A modeling module calls its global ``apply_rotary_pos_emb`` right before ``Cache.update``. The wrapper hands the call
(arguments and results) to whoever is listening in this thread; nobody listening costs one attribute look-up. The
stored keys are then exactly what the projection (and its norm) gave, with no inverse rotation and no rounding.
"""

from __future__ import annotations

import functools
import re
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

ROTARY_NAME = re.compile(r"apply_.*rot", re.IGNORECASE)
MARK = "__kvstore_original__"
NEAREST = 4  # calls before a `Cache.update` that may have made its keys

_install_lock = threading.RLock()  # a finalizer may run inside `install`, in the same thread
_users: dict[tuple[int, str], int] = {}


class Call(NamedTuple):
    """One call of a rotary function."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


class _Thread(threading.local):
    """What listens in this thread; a list, because a nested prefill runs inside a forward pass."""

    def __init__(self) -> None:
        self.listeners: list[deque[Call] | None] = []
        self.current: deque[Call] | None = None


_thread = _Thread()


def heard() -> deque[Call]:
    """Room for the calls of one layer. Those of layers without a ``Cache.update`` make way for later ones."""
    return deque(maxlen=NEAREST)


def listen(calls: deque[Call] | None) -> None:
    """Send this thread's rotary calls to ``calls`` (None: nobody listens) until ``leave``."""
    _thread.listeners.append(_thread.current)
    _thread.current = calls


def stop() -> None:
    """Hear nothing more until ``leave``."""
    _thread.current = None


def leave() -> None:
    """End the innermost ``listen``."""
    _thread.current = _thread.listeners.pop()


def _wrap(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def rotary(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        calls = _thread.current
        if calls is not None:
            calls.append(Call(function, args, kwargs, result))
        return result

    setattr(rotary, MARK, function)
    return rotary


def rotary_globals(model: Any) -> list[tuple[dict[str, Any], str]]:
    """(module globals, name) of every rotary function that the model's code can reach, each once."""
    found: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
    for kind in {type(module) for module in model.modules()}:
        for ancestor in kind.__mro__:
            forward = ancestor.__dict__.get("forward")
            namespace = getattr(_innermost(forward), "__globals__", None)
            if namespace is None:
                continue
            for name, value in list(namespace.items()):
                if ROTARY_NAME.match(name) and callable(value) and not isinstance(value, type):
                    found[(id(namespace), name)] = (namespace, name)
    return list(found.values())


def _innermost(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def install(model: Any, owner: object) -> int:
    """Wrap the rotary functions of the model's modules for as long as ``owner`` lives; how many were found."""
    targets = rotary_globals(model)
    with _install_lock:
        for namespace, name in targets:
            if not hasattr(namespace[name], MARK):
                namespace[name] = _wrap(namespace[name])
            slot = (id(namespace), name)
            _users[slot] = _users.get(slot, 0) + 1
    weakref.finalize(owner, _uninstall, targets).atexit = False
    return len(targets)


def _uninstall(targets: list[tuple[dict[str, Any], str]]) -> None:
    with _install_lock:
        for namespace, name in targets:
            slot = (id(namespace), name)
            _users[slot] -= 1
            if _users[slot] == 0:
                del _users[slot]
                original = getattr(namespace.get(name), MARK, None)
                if original is not None:
                    namespace[name] = original
