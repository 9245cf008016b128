"""The KV connector in both engines: writes a prompt's KV blocks to the staging arena, or reads them from the arena.

The connector runs inside the engine's processes, as scheduler side and worker side. The connector moves whole blocks as
bytes, because the layout inside a block is the attention backend's. Handles, networks and adapters belong to other
modules.

A region's payload is the request's blocks as `KvBlocks` packs them, and a seal (`SEAL`), which is written last.
Loading is all or nothing: for a region that is stale, unsealed or of another size, the scheduler fails the request
(`kv_load_failure_policy="fail"`). A decode engine never computes a prompt token.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from preft.memory.arena import Region, StagingView
from preft.memory.errors import StaleRegion
from preft.transfer.seal import SEAL, read_seal, write_seal
from preft_kernels.kv_blocks import KvBlocks

OUTPUT_SO_FAR = "preft_output_token_ids"  # in `extra_args` of a request's sampling parameters


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """One prompt's KV blocks, as many as `region` holds. The prefix cache has the first `skip` blocks already."""

    request_id: str
    block_ids: tuple[int, ...]
    num_tokens: int
    region: Region
    skip: int = 0


@dataclass
class KvMetadata(KVConnectorMetadata):
    """The scheduler side's orders to the worker side for one step."""

    saves: list[BlockCopy] = field(default_factory=list)
    loads: list[BlockCopy] = field(default_factory=list)


class StagedKvConnector(KVConnectorBase_V1):
    """Set `kv_role` to "kv_producer" on prefill and "kv_consumer" on decode, and `arena` in the extra config."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._decode = bool(self._kv_transfer_config.is_kv_consumer)
        self._block_size = vllm_config.cache_config.block_size
        self._num_blocks = kv_cache_config.num_blocks
        self._requests: dict[str, Request] = {}
        self._step_loads: list[BlockCopy] = []
        self._promised: dict[str, int] = {}
        self._blocks: KvBlocks
        self._failed_blocks: set[int] = set()
        arena = self._kv_transfer_config.kv_connector_extra_config["arena"]
        self._arena = StagingView(arena) if role is KVConnectorRole.WORKER else None

    # Scheduler side

    def on_new_request(self, request: Request) -> None:
        if request.kv_transfer_params is None:
            if self._decode:
                raise RuntimeError(f"{request.request_id}: a decode engine takes no request without KV")
            return
        self._requests[request.request_id] = request
        split_output(request)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        if not self._decode:
            return 0, False
        promised = max(0, request.num_prompt_tokens - num_computed_tokens)
        self._promised[request.request_id] = promised
        return promised, False

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        if not self._decode:
            return
        if num_external_tokens != self._promised.pop(request.request_id):
            raise RuntimeError(f"{request.request_id}: the scheduler would compute prompt tokens on a decode engine")
        assert request.kv_transfer_params is not None
        prompt = request.num_prompt_tokens
        prompt_blocks = _blocks_of(prompt, self._block_size)
        block_ids = blocks.get_block_ids()[0]
        self._step_loads.append(
            BlockCopy(
                request.request_id,
                tuple(block_ids[:prompt_blocks]),
                prompt,
                Region(**request.kv_transfer_params),
                (prompt - num_external_tokens) // self._block_size if num_external_tokens else prompt_blocks,
            )
        )

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KvMetadata:
        if self._decode:
            loads, self._step_loads = self._step_loads, []
            return KvMetadata(loads=loads)
        saves = []
        for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
            request = self._requests.get(request_id)
            if request is None or request.num_computed_tokens + scheduled < request.num_prompt_tokens:
                continue
            assert self._kv_cache_manager is not None
            assert request.kv_transfer_params is not None
            prompt = request.num_prompt_tokens
            block_ids = self._kv_cache_manager.get_block_ids(request_id)[0]
            saves.append(
                BlockCopy(
                    request_id,
                    tuple(block_ids[: _blocks_of(prompt, self._block_size)]),
                    prompt,
                    Region(**request.kv_transfer_params),
                )
            )
        return KvMetadata(saves=saves)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Removes blocks that failed to load from the prefix cache, for every request.

        The scheduler removes only blocks of requests that still run. Blocks of an aborted request would stay in the
        prefix cache with their old content.
        """
        if connector_output.invalid_block_ids:
            assert self._kv_cache_manager is not None
            self._kv_cache_manager.evict_blocks(connector_output.invalid_block_ids)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._requests.pop(request.request_id, None)
        self._promised.pop(request.request_id, None)
        return False, None

    # Worker side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self._blocks = KvBlocks(kv_caches, self._num_blocks)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, KvMetadata)
        for load in metadata.loads:
            try:
                self._load(load)
            except StaleRegion:
                # All requests use block 0 in place of blocks that have left a sliding window.
                self._failed_blocks.update(block for block in load.block_ids[load.skip :] if block)

    def _load(self, load: BlockCopy) -> None:
        count = len(load.block_ids)
        if load.skip == count:
            return
        assert self._arena is not None
        with self._arena.hold(load.region) as payload:
            if (
                load.region.size != count * self._blocks.block_bytes + SEAL.size
                or read_seal(payload) != load.num_tokens
            ):
                raise StaleRegion(f"{load.request_id}: the region doesn't hold the KV of {load.num_tokens} tokens")
            self._blocks.unpack(_bytes_of(payload), load.block_ids, load.skip)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, KvMetadata)
        for save in metadata.saves:
            try:
                self._save(save)
            except StaleRegion:
                continue  # the region was given up; without a seal no reader takes it for complete

    def _save(self, save: BlockCopy) -> None:
        assert self._arena is not None
        count = len(save.block_ids)
        with self._arena.hold(save.region) as payload:
            if save.region.size != count * self._blocks.block_bytes + SEAL.size:
                raise StaleRegion(f"{save.request_id}: {save.region.size} bytes aren't the size of {count} blocks")
            self._blocks.pack(save.block_ids, _bytes_of(payload))
            write_seal(payload, save.num_tokens)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def describe(self) -> dict[str, Any]:
        """`layout`: a text that is equal for engines that can exchange blocks; `block_bytes`: a block of all layers."""
        attention = self._vllm_config.compilation_config.static_forward_context.values()
        backends = sorted(
            {layer.get_attn_backend().get_name() for layer in attention if hasattr(layer, "get_attn_backend")}
        )
        text = json.dumps({"layers": self._blocks.layout, "backends": backends, "block_size": self._block_size})
        return {"layout": hashlib.sha256(text.encode()).hexdigest(), "block_bytes": self._blocks.block_bytes}


def _bytes_of(payload: memoryview) -> torch.Tensor:
    """A region's payload without its seal."""
    return torch.frombuffer(payload, dtype=torch.uint8, count=len(payload) - SEAL.size)


def split_output(request: Request) -> None:
    """Moves the prompt's last tokens (`output_so_far`) to the output, as if this engine had made them."""
    output = output_so_far(request.sampling_params)
    if output:
        assert request.prompt_token_ids is not None
        request.num_prompt_tokens -= len(output)
        request._output_token_ids.extend(output)
        request.prompt_token_ids = request.prompt_token_ids[: request.num_prompt_tokens]
        request.prefill_stats = None  # else vLLM asserts that the prefix cache holds no output, but it may


def output_so_far(params: SamplingParams | None) -> list[int]:
    """The tokens at the end of a request's prompt that are the output of another engine."""
    return ((params and params.extra_args) or {}).get(OUTPUT_SO_FAR) or []


def _blocks_of(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)
