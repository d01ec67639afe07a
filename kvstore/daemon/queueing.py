"""The queues of all clients of a tenant, side by side: each tells of its own, and the store hears of all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from kvstore.daemon.packed import checked, layout_of, namespace_of
from kvstore.daemon.session import Session
from kvstore.job import Answer, Job

NONE = type(None)
NUMBERS = (int, float, NONE)


def schedule(session: Session, jobs: Sequence[Sequence[Any]]) -> object:
    """See ``Store.schedule``: the queues of all clients of a tenant go side by side, the nearest job of each first."""
    mine = [_job(session, *checked(job, _JOB)) for job in jobs]
    session.jobs = mine
    queues = [mine if each is session else each.waiting() for each in session.tenant.sessions]
    merged = [job for row in zip_longest(*queues) for job in row if job is not None]
    answers = {answer.name: answer for answer in session.store.schedule(merged)}
    return [_answer(answers[job.name]) for job in mine]


SOME = (bytes, NONE)
_JOB: Sequence[Any] = (int, (int, NONE), SOME, SOME, SOME, SOME, int, NUMBERS, (int,), NUMBERS)


def _job(
    session: Session,
    name: int,
    number: int | None,
    space: bytes | None,
    layout: bytes | None,
    tokens: bytes | None,
    root: bytes | None,
    first: int,
    start: float | None,
    priority: int,
    deadline: float | None,
) -> Job:
    return Job(
        (session.number, name),
        None if number is None else session.match(number),
        None if space is None else namespace_of(space),
        None if layout is None else layout_of(layout),
        tokens,
        root,
        first,
        start,
        priority,
        deadline,
    )


def _answer(answer: Answer) -> object:
    return [answer.state, answer.tokens, answer.tokens_by_tier]
