"""vLLM's real scheduler, configured as in PreFT's engines and stepped by hand. The test plays the model."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from preft.core.cluster import Role
from preft.core.settings import load_settings
from preft.engine.port import EngineRequest
from preft.engine.vllm_engine import engine_args, sampling_params
from preft.memory.arena import StagingArena
from preft.transfer.connector import KvMetadata, StagedKvConnector

BLOCK = 32
BLOCKS = 16
LAYERS = ("layers.0", "layers.1")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": len(LAYERS),
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
}


def config_folder(folder: Path) -> Path:
    """A model folder without weights."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def tokens_of(count: int, seed: int = 0) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(3, 512) for _ in range(count))


class Side:
    """One role's scheduler with its connector, stepped by hand. The caller of `finish_step` plays the model."""

    def __init__(self, model: Path, role: Role, arena: StagingArena, **settings: Any) -> None:
        own = {"max_num_batched_tokens": 64, "max_num_seqs": 8, **settings}
        section = "decode" if role is Role.DECODE else "prefill"
        loaded = load_settings(None, {"model": str(model), section: own})
        self.role = role
        self.config: VllmConfig = engine_args(loaded, role, arena.path).create_engine_config()
        self.config.cache_config.num_gpu_blocks = BLOCKS
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
        self.cache_config = KVCacheConfig(
            num_blocks=BLOCKS,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(list(LAYERS), spec)],
        )
        hash_fn = get_hash_fn_by_name("sha256")
        init_none_hash(hash_fn)
        self._hasher = get_request_block_hasher(BLOCK, hash_fn)
        with set_current_vllm_config(self.config):
            self.scheduler: Scheduler = self.config.scheduler_config.get_scheduler_cls()(
                vllm_config=self.config,
                kv_cache_config=self.cache_config,
                structured_output_manager=StructuredOutputManager(self.config),
                block_size=BLOCK,
                hash_block_size=BLOCK,
                log_stats=True,
            )

    def add(self, request: EngineRequest) -> Request:
        """Adds the request as `VllmEngine.generate` and AsyncLLM make it. The adapter's path doesn't exist."""
        adapter = request.adapter
        own = Request(
            request_id=request.request_id,
            prompt_token_ids=[*request.prompt_token_ids, *request.output_token_ids],
            sampling_params=sampling_params(request, self.role),
            pooling_params=None,
            lora_request=adapter and LoRARequest(adapter.digest, int(adapter.name), adapter.digest),
            cache_salt=request.salt or None,
            block_hasher=self._hasher,
        )
        self.scheduler.add_request(own)
        return own

    def schedule(self) -> tuple[SchedulerOutput, KvMetadata]:
        """The next step, and its message to the connector's worker side (empty on a colocated engine)."""
        output = self.scheduler.schedule()
        metadata = output.kv_connector_metadata
        assert isinstance(metadata, KvMetadata) or self.role is Role.COLOCATED
        return output, metadata if isinstance(metadata, KvMetadata) else KvMetadata()

    def finish_step(
        self,
        output: SchedulerOutput,
        tokens: dict[str, int],
        failed: Sequence[int] = (),
        not_finite: Sequence[str] = (),
    ) -> list[EngineCoreOutput]:
        """`tokens` are the sampled ones; `failed` are blocks whose load failed, `not_finite` requests with NaN."""
        ids = list(output.num_scheduled_tokens)
        by_client = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={name: row for row, name in enumerate(ids)},
                sampled_token_ids=[[tokens[name]] if name in tokens else [] for name in ids],
                kv_connector_output=KVConnectorOutput(invalid_block_ids=set(failed)),
                num_nans_in_logits={name: int(name in not_finite) for name in ids},
            ),
        )
        return [output for outputs in by_client.values() for output in outputs.outputs]

    def worker(self, *shape: int) -> tuple[StagedKvConnector, dict[str, torch.Tensor]]:
        """The connector's worker side over random caches of `shape`."""
        connector = StagedKvConnector(self.config, KVConnectorRole.WORKER, self.cache_config)
        generator = torch.Generator().manual_seed(sum(shape))
        caches = {name: torch.randn(shape, generator=generator) for name in LAYERS}
        connector.register_kv_caches(caches)
        return connector, caches


def generate(side: Side, name: str, tokens: Sequence[int]) -> None:
    """Runs steps in which `name` alone runs and gets `tokens`."""
    for token in tokens:
        step, _ = side.schedule()
        assert list(step.num_scheduled_tokens) == [name]
        side.finish_step(step, {name: token})
