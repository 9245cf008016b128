"""Requests that no worker could ever hold, even an idle one."""

from __future__ import annotations

from preft.core.cluster import Role, Worker
from preft.core.errors import InvalidRequest
from preft.router.policy import Demand
from preft.router.view import ClusterView


def check_fits(demand: Demand, view: ClusterView) -> None:
    """Raises InvalidRequest, with the setting to change, if no ready worker has enough memory for `demand`."""
    prompting, decoding = view.shapes()
    if not demand.decodes or not decoding:
        return
    for role, members in ((Role.PREFILL, prompting), (Role.DECODE, decoding)):
        if not any(demand.staging(worker) <= worker.staging_bytes for worker in members):
            room = max(worker.staging_bytes for worker in members)
            raise InvalidRequest(
                f"the KV cache of a prompt of {demand.prompt_tokens} tokens doesn't fit into the {room} bytes of "
                f"staging memory of any {role} worker: raise {role}.staging_bytes",
                param="prompt",
            )
    if not any(worker.blocks(demand.max_tokens) <= worker.kv_blocks for worker in decoding):
        room = max(worker.kv_blocks * worker.block_size for worker in decoding)
        raise InvalidRequest(
            f"prompt and max_tokens come to {demand.max_tokens} tokens, no decode worker holds more than {room}",
            param="max_tokens",
        )
    if not any(demand.blocks(worker) * demand.choices <= worker.kv_blocks for worker in decoding):
        raise InvalidRequest(
            f"no decode worker can hold {demand.choices} choices of {demand.kv_tokens} tokens at once", param="n"
        )


def could_hold(worker: Worker, demand: Demand) -> bool:
    """Whether an idle decode worker has memory for all choices and the prompt's KV."""
    fits = demand.blocks(worker) * demand.choices <= worker.kv_blocks
    return fits and demand.staging(worker) <= worker.staging_bytes
