"""Starts and ends workers, each role by itself: as the load asks for it, or as nodes of Ray come and go.

The formula for the load is that of the Kubernetes HorizontalPodAutoscaler: workers x pressure / target, rounded up,
with no change near the target. Source:
https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#algorithm-details
Workers are added once the pressure has asked for them for `up_seconds`. They end one at a time, after `down_seconds`,
and drain before they end. Workers on a node that Ray drains are replaced first, and then those that an earlier `preft
serve` has started with other settings. Owns the decision and its timing;
`ray_cluster` owns the workers.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from typing import Protocol

from preft.core.background import Background
from preft.core.cluster import Role
from preft.core.settings import ScalingSettings, Settings
from preft.router.pressure import decode_pressure, least_used, prefill_pressure
from preft.router.router import Router

LOOK_SECONDS = 1.0
TOLERANCE = 0.1  # of the target: no change within it
LEAVE_SECONDS = 7.0  # for a worker to close after its requests, before its node ends


class Workers(Protocol):
    """The workers that this process has started."""

    def members(self, *roles: Role) -> list[str]:
        """Ids of the workers of these roles, without those that end."""

    def outdated(self, role: Role) -> list[str]:
        """Ids of the adopted workers of the role that new ones would differ from, without those that end."""

    async def room(self, role: Role) -> int:
        """How many workers of the role all nodes of Ray together have room for."""

    async def leaving(self) -> dict[str, float]:
        """The workers on nodes that Ray drains: the seconds that each node has left."""

    async def add(self, role: Role) -> str:
        """Starts one more worker, and returns its id while its engine loads."""

    async def remove(self, worker_id: str) -> None:
        """Ends a worker after its running requests."""


class Scale:
    """Decides for one role. Times are in loop time."""

    def __init__(self, settings: ScalingSettings, least: int, most: int) -> None:
        self._settings = settings
        self._least, self._most = least, most
        self._since: dict[int, float] = {}  # by sign of the wanted change: since when it has been asked for

    def change(self, pressure: float, members: int, ready: int, now: float) -> int:
        """How many workers to add, or -1 to end one, or 0.

        `pressure` is the mean over the `ready` ones of all `members`. None is added while another one starts.
        """
        wanted = self._wanted(pressure, members)
        sign = (wanted > members) - (wanted < members)
        self._since = {sign: self._since.get(sign, now)} if sign else {}
        waited = now - self._since.get(sign, now)
        if not sign or (sign > 0 and ready < members):
            return 0
        if waited < (self._settings.up_seconds if sign > 0 else self._settings.down_seconds):
            return 0
        self._since = {}
        return wanted - members if sign > 0 else -1

    def _wanted(self, pressure: float, members: int) -> int:
        ratio = pressure / self._settings.target
        wanted = members if abs(ratio - 1) <= TOLERANCE else math.ceil(members * ratio)
        return max(self._least, min(self._most, wanted))


class Autoscaler:
    """Looks at the load until `stop`. The owner calls `close`, which abandons the waits for ending workers."""

    def __init__(self, settings: Settings, router: Router, workers: Workers, tell: Callable[[str], None]) -> None:
        """Calls `tell` for each change."""
        self._settings, self._scaling = settings, settings.scaling
        self._router, self._workers, self._tell = router, workers, tell
        self._background = Background()
        self._is_stopped = False
        self._scales = {
            role: Scale(settings.scaling, settings.engine(role).replicas, most)
            for role in settings.roles
            if (most := settings.engine(role).max_replicas) is not None
        }
        self._filled = {
            role: settings.engine(role).replicas for role in settings.roles if settings.engine(role).fill_nodes
        }
        self._leaving: set[str] = set()  # workers on nodes that are drained
        self._successors: dict[Role, str] = {}  # of outdated workers, until they are ready

    def start(self) -> None:
        if self._scales or self._filled or self._settings.ray_address is not None:
            self._background.every(LOOK_SECONDS, self._look, "the number of workers stays as it is")

    def stop(self) -> None:
        """From now on the workers stay as they are."""
        self._is_stopped = True

    async def close(self) -> None:
        await self._background.close()

    async def _look(self) -> None:
        if self._settings.ray_address is not None:
            leaving = await self._workers.leaving()
            for role in self._settings.roles:
                await self._leave(role, leaving)
                await self._renew(role)
        for role, least in self._filled.items():
            await self._fill(role, max(least, await self._workers.room(role)))
        for role, scale in self._scales.items():
            await self._scale(role, scale)

    async def _leave(self, role: Role, leaving: Mapping[str, float]) -> None:
        """Replaces the workers on nodes that are drained.

        Each ends once another worker of its role is ready, or in time before its node ends.
        """
        others = [one for one in self._router.view.ready(role) if one.id not in leaving]
        for worker_id in set(self._workers.members(role)) & leaving.keys():
            if self._is_stopped:
                return
            if worker_id not in self._leaving:
                self._leaving.add(worker_id)
                self._tell(f"  {worker_id.partition('-')[2]}: its node is drained")
                if role not in self._filled:
                    await self._workers.add(role)
            if others or leaving[worker_id] < self._settings.shutdown_timeout + LEAVE_SECONDS:
                self._end(worker_id)

    async def _renew(self, role: Role) -> None:
        """Replaces one outdated worker, if all new ones of its role are ready. Stops if a new one can't be started.

        The old worker ends at once: there may be no room for both.
        """
        members, ready = self._staying(role), {one.id for one in self._router.view.ready(role)}
        outdated = [one for one in self._workers.outdated(role) if one in members]
        if self._successors.get(role) in ready:
            del self._successors[role]
        if not outdated or role in self._successors or self._is_stopped:
            return
        if any(one not in ready for one in members if one not in outdated):
            return
        worker_id = min(outdated, key=lambda one: one in ready)
        self._tell(f"  {worker_id.partition('-')[2]}: it was started with other settings, and is replaced")
        self._successors[role] = await self._workers.add(role)
        self._end(worker_id)

    def _staying(self, role: Role) -> list[str]:
        return [one for one in self._workers.members(role) if one not in self._leaving]

    async def _fill(self, role: Role, room: int) -> None:
        """Adds workers until they fill the `room`; ends those that have lost theirs."""
        members = self._staying(role)
        ready = {one.id for one in self._router.view.ready(role)}
        homeless = [one for one in members if one not in ready]
        if self._is_stopped:
            return
        for _ in range(room - len(members)):
            await self._workers.add(role)
        for worker_id in homeless[: max(0, len(members) - room)]:
            self._end(worker_id)

    async def _scale(self, role: Role, scale: Scale) -> None:
        """Adds or ends workers if the load has asked for it for long enough."""
        members = self._staying(role)
        ready = [one for one in self._router.view.ready(role) if one.id in members]
        pressure = pressure_of(self._router, role, self._scaling)
        change = scale.change(pressure, len(members), len(ready), asyncio.get_running_loop().time())
        if self._is_stopped or not change:
            return
        number = f"{change} more" if change > 0 else "one less"
        self._tell(f"  {role}: {number}, the workers have a pressure of {pressure:.2f}")
        for _ in range(change):
            await self._workers.add(role)
        if change < 0:
            starting = [one for one in members if one not in {worker.id for worker in ready}]
            self._end(starting[-1] if starting else least_used(ready, role).id)

    def _end(self, worker_id: str) -> None:
        self._background.start(self._workers.remove(worker_id), f"{worker_id} is not ended")


def pressure_of(router: Router, role: Role, settings: ScalingSettings) -> float:
    """The pressure on a role's workers. Requests wait for prefill workers, unless decode workers are full."""
    decode = decode_pressure(router.view)
    if role is Role.DECODE:
        return decode
    queued = 0.0 if decode >= settings.target else router.longest_wait() / settings.queue_seconds
    prefill = prefill_pressure(router.view, queued)
    return max(prefill, decode) if role is Role.COLOCATED else prefill
