"""Pipelines: what stands between a request and the engine, on the way in and on the way out.

An operator gets the request and what comes after it, changes what it likes of the request, and
yields what it likes of the answer: a tokenizer before and a detokenizer after are one operator.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from runtime.requests.base import RequestContext

Stage = Callable[[Any, RequestContext], AsyncGenerator[Any, None]]
Operator = Callable[[Any, RequestContext, Stage], AsyncGenerator[Any, None]]


def pipeline(*operators: Operator, engine: Stage) -> Stage:
    """The operators in the order a request meets them, `engine` behind the last.

    Whoever closes the pipeline's answer, or leaves it, closes all of its stages.
    """
    stage = engine
    for operator in reversed(operators):
        stage = _joined(operator, stage)
    return stage


def _joined(operator: Operator, following: Stage) -> Stage:
    async def stage(request: Any, context: RequestContext) -> AsyncGenerator[Any, None]:
        opened: list[AsyncGenerator[Any, None]] = []

        def keep(next_request: Any, next_context: RequestContext) -> AsyncGenerator[Any, None]:
            answer = following(next_request, next_context)
            opened.append(answer)
            return answer

        try:
            async with aclosing(operator(request, context, keep)) as answer:
                async for item in answer:
                    yield item
        finally:
            for one in opened:
                await one.aclose()

    return stage
