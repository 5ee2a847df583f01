"""Where jobs wait for the lanes of a search: an actor's class, in a file of its own so that its process stays small."""

from __future__ import annotations

import asyncio
import collections
from typing import Any


class Desk:
    """One queue per lane. A job of None sends the lane home."""

    def __init__(self) -> None:
        self.jobs: dict[str, asyncio.Queue] = collections.defaultdict(asyncio.Queue)

    async def put(self, lane: str, job: dict[str, Any] | None) -> None:
        await self.jobs[lane].put(job)

    async def take(self, lane: str) -> dict[str, Any] | None:
        return await self.jobs[lane].get()
