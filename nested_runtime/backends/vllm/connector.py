"""The KV connector: a session's state into a cache block before its request runs, out of it when the request has ended.

What to do comes with a request as `kv_transfer_params`, as mailbox names:
`{"load": name, "save": name}`, each optional.

vLLM loads before a forward pass only what counts as cached tokens, so every loading request begins with one placeholder
token which is reported as cached and never reaches the model. A request is saved one engine step after its end, when
nothing writes to its block any more, and only if it ended well: an aborted turn leaves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.request import Request, RequestStatus

from nested_runtime.backends.vllm.mailbox import Post
from nested_runtime.backends.vllm.model import POSITION, SessionMemory
from nested_runtime.errors import ConfigError

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

__all__ = ["SessionConnector"]

PLACEHOLDER_TOKENS = 1
ENDED_WELL = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


@dataclass(frozen=True)
class Transfer:
    """One state to move: request, mailbox name, cache block."""

    request_id: str
    name: str
    block: int


@dataclass
class Transfers(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not installed where mypy runs
    """What the worker does in one step."""

    loads: list[Transfer] = field(default_factory=list)
    saves: list[Transfer] = field(default_factory=list)


class SessionConnector(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """Scheduler side: decides. Worker side: moves."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        _require(vllm_config)
        self._plan = Transfers()
        self._saved: set[str] = set()
        self._post = Post(self._kv_transfer_config.get_from_extra_config("mailbox", "."))
        known = vllm_config.compilation_config.static_forward_context
        self._memories = {n: layer for n, layer in known.items() if isinstance(layer, SessionMemory)}

    # ---- scheduler --------------------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """One token is cached, the placeholder, when a state is to be loaded."""
        return (PLACEHOLDER_TOKENS if "load" in _asked(request) else 0), False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """The request has its block now."""
        if num_external_tokens:
            block = _only(blocks.get_block_ids())
            self._plan.loads.append(Transfer(request.request_id, _asked(request)["load"], block))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Transfers:
        """What was decided since the last step."""
        plan, self._plan = self._plan, Transfers()
        return plan

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Keep the block until its state is saved, if the request ended well and asked for that."""
        name = _asked(request).get("save")
        if name is None or request.status not in ENDED_WELL:
            return False, None
        self._plan.saves.append(Transfer(request.request_id, name, _only(block_ids)))
        return True, None

    # ---- worker -----------------------------------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        """States into their blocks."""
        for load in self._get_connector_metadata().loads:
            state, position = self._post.read(load.name)
            for name, memory in self._memories.items():
                for key, tensor in memory.tensors.items():
                    if key != POSITION.name:
                        tensor[load.block].copy_(state[f"{name}.{key}"])
                memory.tensors[POSITION.name][load.block] = position

    def wait_for_save(self) -> None:
        """States out of the blocks of requests that have ended."""
        for save in self._get_connector_metadata().saves:
            state: dict[str, torch.Tensor] = {}
            for name, memory in self._memories.items():
                state |= {f"{name}.{k}": t[save.block].cpu() for k, t in memory.tensors.items() if k != POSITION.name}
            position = int(next(iter(self._memories.values())).tensors[POSITION.name][save.block])
            self._post.write(save.name, state, position)
            self._saved.add(save.request_id)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """The requests whose blocks can be given to others."""
        saved, self._saved = self._saved, set()
        return saved or None, None

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: loads are done before the forward pass."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **_: Any) -> None:
        """Nothing to do per layer."""


def _asked(request: Request) -> Mapping[str, str]:
    return request.kv_transfer_params or {}


def _only(block_ids: tuple[list[int], ...]) -> int:
    """The block of a request; all layers share its number."""
    return block_ids[0][0]


def _require(config: VllmConfig) -> None:
    """Refuse settings under which a state would not be what its tokens say."""
    wrong = {
        "--no-async-scheduling": config.scheduler_config.async_scheduling,  # it reads one token past the end
        "--no-enable-prefix-caching": config.cache_config.enable_prefix_caching,
        "no speculative decoding": config.speculative_config is not None,
        "--tensor-parallel-size 1": config.parallel_config.world_size > 1,
    }
    needed = [option for option, is_wrong in wrong.items() if is_wrong]
    if needed:
        raise ConfigError(f"sessions in vLLM need {', '.join(needed)}")
