"""VllmBackend: vLLM's async engine, in a process of its own, behind the same protocol as our engine.

The server keeps sessions, leases and commits; vLLM gets a start state and tokens through the mailbox and hands the end
state back. Where our engine decides inside a step (stop strings, the state at the prompt's end), vLLM may have gone on
by the time we see it: then the tokens that count are read once more from the start state, which gives the same state,
because it depends on the tokens alone.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Collection
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from vllm import AsyncEngineArgs, TokensPrompt
from vllm.config import KVTransferConfig
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from nested_runtime.backends.native import EventQueue, TokenStream
from nested_runtime.backends.vllm import plugin
from nested_runtime.backends.vllm.mailbox import Mailbox
from nested_runtime.backends.vllm.params import MAX_LOGPROBS, to_logprobs, to_vllm
from nested_runtime.backends.vllm.supported import supported
from nested_runtime.core import FinishReason, SamplingParams, Sequence, TokenEvent, TurnResult
from nested_runtime.errors import ContextOverflow, NestedError, Overloaded, RequestError
from nested_runtime.models.base import LanguageModel
from nested_runtime.sampling import validate
from nested_runtime.state.pool import check_state
from nested_runtime.state.spec import total_bytes

__all__ = ["VllmBackend", "VllmOptions"]

PLACEHOLDER = 0  # reported to vLLM as cached, never read
BLOCKS_OF_VLLM = 2  # cache blocks that no request gets: vLLM's null block, and one to spare
POSITION_BYTES = 4
HAND_BACK_SECONDS = 60.0


@dataclass(frozen=True)
class VllmOptions:
    """What of vLLM's many settings is ours to choose.

    slots             requests running at a time, each with one cache block
    queue             requests that may wait for one
    max_batch_tokens  tokens of an engine step
    max_context       tokens one turn may read and write
    """

    slots: int = 16
    queue: int = 256
    max_batch_tokens: int = 512
    max_context: int = 32_768


@dataclass
class _Part:
    """One token and what came with it; `reason` with the last."""

    event: TokenEvent
    token: int | None
    reason: str | None


class VllmBackend:
    """Backend over vLLM. All methods belong to the event loop it was started on."""

    def __init__(
        self,
        folder: Path,
        *,
        model_id: str,
        fingerprint: str,
        model: LanguageModel,
        end_tokens: Collection[int],
        options: VllmOptions,
    ) -> None:
        self.model_id = model_id
        self.fingerprint = fingerprint
        self.specs = supported(model, model_id)
        self.max_context = options.max_context
        self._folder, self._options = folder, options
        self._vocab_size, self._end_tokens = model.vocab_size, tuple(end_tokens)
        self._engine: AsyncLLM | None = None
        self._mailbox: Mailbox | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._queues: dict[str, EventQueue] = {}
        self._counters = Counter[str]()
        self._closed_because: str | None = "it is not started"

    async def start(self) -> None:
        """Start vLLM's engine process and run a few tokens through it."""
        if self._engine is not None:
            raise NestedError("the backend was started before; make a new one to start again")
        plugin.register()
        self._mailbox = Mailbox()
        self._mailbox.open()
        self._engine = AsyncLLM.from_engine_args(self._arguments(self._mailbox.folder))
        self._closed_because = None
        warm_up = Sequence("warm-up", [0, 0], SamplingParams(max_tokens=2, temperature=0.0), keep_state=True)
        async for event in self.submit(warm_up):
            if event.error is not None:
                raise event.error
        self._counters.clear()

    def _arguments(self, mailbox: Path) -> AsyncEngineArgs:
        options = self._options
        block = total_bytes(self.specs) + POSITION_BYTES * len(self.specs)
        return AsyncEngineArgs(
            model=str(self._folder),
            config_format=plugin.FORMAT,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            async_scheduling=False,
            enable_prefix_caching=False,
            max_model_len=options.max_context + 1,  # and the placeholder
            max_num_seqs=options.slots,
            max_num_batched_tokens=options.max_batch_tokens,
            kv_cache_memory_bytes=block * (options.slots + BLOCKS_OF_VLLM),
            max_logprobs=MAX_LOGPROBS,
            enable_log_requests=False,
            disable_log_stats=True,
            kv_transfer_config=KVTransferConfig(
                kv_connector="SessionConnector",
                kv_connector_module_path="nested_runtime.backends.vllm.connector",
                kv_role="kv_both",
                kv_connector_extra_config={"mailbox": str(mailbox)},
            ),
        )

    def submit(self, sequence: Sequence) -> TokenStream:
        """Queue a sequence; a sequence that cannot run is refused here, not in its events."""
        if self._closed_because is not None:
            raise Overloaded(f"the backend takes no work: {self._closed_because}; retry later", retry_after=5.0)
        self._check(sequence)
        queue: EventQueue = asyncio.Queue()
        self._queues[sequence.id] = queue
        task = asyncio.get_running_loop().create_task(self._run(sequence, queue))
        self._tasks[sequence.id] = task
        return TokenStream(queue, lambda: self.abort(sequence.id))

    def abort(self, sequence_id: str) -> None:
        """Stop a sequence; unknown ids are ignored."""
        task = self._tasks.get(sequence_id)
        if task is not None:
            task.cancel()

    async def drain(self, deadline: float) -> None:
        """Refuse new work, let running sequences end until `deadline` seconds from now, abort the rest, stop vLLM."""
        if self._engine is None or self._mailbox is None:
            return
        self._closed_because = "it is shutting down"
        if self._tasks:
            _, late = await asyncio.wait(self._tasks.values(), timeout=deadline)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        self._engine.shutdown()
        self._mailbox.close()
        self._engine = None

    def stats(self) -> dict[str, Any]:
        """Counters and gauges, named as the native backend's."""
        busy = len(self._tasks)
        running = min(busy, self._options.slots)
        return {
            "running": running,
            "waiting": busy - running,
            "slots": self._options.slots,
            "slots_free": self._options.slots - running,
            **{name: self._counters[name] for name in ("prompt_tokens", "sampled_tokens")},
            "streams": busy,
            "accepting": self._closed_because is None,
        }

    def evict(self, prefix: tuple[str, ...]) -> int:
        """Nothing is cached here: states live in vLLM for the length of a request."""
        return 0

    async def cached(self) -> list[tuple[str, ...]]:
        """See `evict`."""
        return []

    async def check(self) -> list[str]:
        """Whether the engine process lives."""
        if self._engine is None or self._closed_because is not None:
            return [f"model {self.model_id!r} takes no work: {self._closed_because}"]
        try:
            await self._engine.check_health()
        except EngineDeadError as error:
            return [f"model {self.model_id!r}: vLLM's engine process is gone ({error}); restart the server"]
        return []

    def _check(self, sequence: Sequence) -> None:
        if sequence.id in self._queues:
            raise RequestError(f"a sequence with id {sequence.id!r} is already running; ids must be unique", param="id")
        limit = self._options.slots + self._options.queue
        if len(self._queues) >= limit:
            raise Overloaded(f"{limit} sequences are running or waiting already; retry later")
        validate(sequence.params, self._vocab_size)
        if not sequence.prompt:
            raise RequestError("the prompt has no tokens; give at least one", param="prompt")
        for token in (min(sequence.prompt), max(sequence.prompt)):
            if not 0 <= token < self._vocab_size:
                raise RequestError(f"token id {token} is not in 0..{self._vocab_size - 1}", param="prompt")
        num_prompt, num_output = len(sequence.prompt), sequence.params.max_tokens
        if num_prompt + num_output > self.max_context:
            raise ContextOverflow(
                f"n_prompt_tokens {num_prompt} + max_tokens {num_output} is over this server's limit of "
                f"{self.max_context} tokens a turn; shorten the prompt or max_tokens",
                param="max_tokens" if num_prompt < self.max_context else "messages",
            )
        if sequence.state is not None:
            check_state(self.specs, sequence.state)

    # ---- one sequence -----------------------------------------------------------------------------------------------

    async def _run(self, sequence: Sequence, queue: EventQueue) -> None:
        """The life of a sequence: its events go to `queue`, the last one however it ends."""
        last = TokenEvent(sequence.id, finish=FinishReason.ABORT)
        try:
            last = await self._generate(sequence, queue)
        except asyncio.CancelledError:
            pass  # aborted: nothing of it is kept
        except EngineDeadError as error:
            self._closed_because = f"vLLM's engine process is gone ({error}); restart the server"
            last = replace(last, finish=FinishReason.ERROR, error=NestedError(self._closed_because))
        except Exception as error:  # noqa: BLE001 - this sequence's trouble alone
            last = replace(last, finish=FinishReason.ERROR, error=error)
        del self._queues[sequence.id], self._tasks[sequence.id]
        queue.put_nowait(last)

    async def _generate(self, sequence: Sequence, queue: EventQueue) -> TokenEvent:
        """Send all events but the last, which is returned."""
        keeps = sequence.keep_state and sequence.stop_check is None
        async with aclosing(self._request(sequence, sequence.prompt, sequence.params, keeps=keeps)) as parts:
            async for part in parts:
                if part.token is not None:
                    sequence.output.append(part.token)
                    self._counters["sampled_tokens"] += 1
                reason = self._stop_reason(sequence, part)
                if reason is None:
                    queue.put_nowait(part.event)
                    continue
                state = part.event.result
                if reason is not FinishReason.ABORT and state is None:
                    state = await self._reread(sequence)
                return replace(part.event, finish=reason, result=state)
        raise NestedError(f"vLLM ended request {sequence.id!r} without saying why")

    def _stop_reason(self, sequence: Sequence, part: _Part) -> FinishReason | None:
        """Why the sequence ends with this part, if it does."""
        enough = len(sequence.output) >= sequence.params.min_tokens
        if part.token is not None and sequence.stop_check is not None and sequence.stop_check(part.token) and enough:
            return FinishReason.STOP
        if part.reason == "error":
            raise NestedError(f"vLLM failed request {sequence.id!r}; its log says why")
        return FinishReason(part.reason) if part.reason is not None else None

    async def _reread(self, sequence: Sequence) -> TurnResult | None:
        """The state after exactly the tokens that count, where the request itself did not leave it."""
        read, pending = list(sequence.prompt), None
        if sequence.keep_state and sequence.output:
            read, pending = read + sequence.output[:-1], sequence.output[-1]
        elif not sequence.keep_state and not sequence.keep_state_at_prompt:
            return None
        once = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        async with aclosing(self._request(sequence, read, once, keeps=True)) as parts:
            async for part in parts:
                if part.event.result is not None:
                    return replace(part.event.result, pending=pending)
        raise NestedError(f"vLLM left no state of request {sequence.id!r}")

    async def _request(
        self, sequence: Sequence, prompt: list[int], params: SamplingParams, *, keeps: bool
    ) -> AsyncGenerator[_Part, None]:
        """One request to vLLM from the sequence's start state; the last part has the state if it `keeps` it."""
        engine, mailbox, name = self._engine, self._mailbox, uuid.uuid4().hex
        if engine is None or mailbox is None:
            raise Overloaded(f"the backend takes no work: {self._closed_because}; retry later")
        transfer = {"save": name} if keeps else {}
        loads = sequence.state is not None or sequence.position > 0
        try:
            if loads:
                zeros = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in self.specs}
                state = sequence.state if sequence.state is not None else zeros
                await asyncio.to_thread(mailbox.leave, name, state, sequence.position)
                transfer["load"] = name
            if keeps:
                mailbox.expect(name)
            tokens = TokensPrompt(prompt_token_ids=[PLACEHOLDER, *prompt] if loads else prompt)
            wanted = to_vllm(params, self._end_tokens, transfer)
            self._counters["prompt_tokens"] += len(prompt)
            first, sampled = True, 0
            async with aclosing(engine.generate(tokens, wanted, name)) as outputs:
                async for output in outputs:
                    parts = _parts(sequence.id, params, output, shift=int(loads), first=first)
                    first = False
                    for part in parts:
                        sampled += part.token is not None
                        if part.reason is not None and keeps:
                            read = sequence.position + len(prompt) + max(0, sampled - 1)
                            part = await self._with_state(part, name, read, mailbox)
                        yield part
        finally:
            mailbox.forget(name)

    async def _with_state(self, part: _Part, name: str, read: int, mailbox: Mailbox) -> _Part:
        state, position = await mailbox.take(name, HAND_BACK_SECONDS)
        if position != read:
            raise NestedError(f"vLLM read {position} session tokens where {read} were due; nothing was learned")
        state = {spec.name: state[spec.name] for spec in self.specs}  # the codec writes in this order
        return replace(part, event=replace(part.event, result=TurnResult(state, position, part.token)))


def _parts(sequence_id: str, params: SamplingParams, output: Any, *, shift: int, first: bool) -> list[_Part]:
    """vLLM's output as events, one per token. `shift`: placeholder tokens before the prompt."""
    said = output.outputs[0]
    tokens = list(said.token_ids) if params.max_tokens else []  # max_tokens 0: vLLM samples one all the same
    parts = []
    for index, token in enumerate(tokens):
        logprobs = None
        if params.logprobs is not None:
            logprobs = to_logprobs(token, said.logprobs[index], params.logprobs)
        parts.append(_Part(TokenEvent(sequence_id, token=token, logprobs=logprobs), token, None))
    if not parts and (said.finish_reason is not None or first):
        parts.append(_Part(TokenEvent(sequence_id), None, None))
    if parts and said.finish_reason is not None:
        parts[-1].reason = said.finish_reason
    if first and parts and params.prompt_logprobs is not None:
        prompt = list(output.prompt_token_ids)[shift:]
        found = [
            to_logprobs(token, entry, params.prompt_logprobs)
            for token, entry in zip(prompt[1:], output.prompt_logprobs[shift + 1 :], strict=True)
        ]
        parts[0].event = replace(parts[0].event, prompt_logprobs=(None, *found))
    return parts
