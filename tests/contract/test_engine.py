"""Every engine goes on exactly from saved KV, fails what it can't go on from, and serves on after it."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from preft.adapters.formats.digest import adapter_digest
from preft.adapters.store.packed import AdapterFiles
from preft.core.cluster import Role
from preft.core.errors import EngineFailed, InvalidAdapter, InvalidRequest, PreftError, WorkerLost
from preft.core.request import AdapterRef, FinishReason, Sampling, TokenDelta
from preft.core.settings import MiB, load_settings
from preft.engine.port import Engine, EngineRequest
from preft.memory.arena import Region, StagingArena
from preft.transfer.seal import SEAL, clear_seal, read_seal
from support.fake_engine import FakeEngine, tokens_of
from support.worker_services import write_adapter

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

GREEDY = Sampling(max_tokens=12, temperature=0.0)
ROLES = (Role.PREFILL, Role.DECODE)
LENGTHS = (1, 31, 32, 33, 64, 70, 130)  # blocks are 32 tokens, chunks 64, in the real engine


class Pair:
    """A prefill and a decode engine with their arenas, two adapters in place and a spare one.

    `expected` is what one engine would generate greedily.
    """

    def __init__(
        self,
        engines: dict[Role, Engine],
        arenas: dict[Role, StagingArena],
        memory: StagingArena,
        adapters: Sequence[AdapterRef],
        expected: Callable[[Sequence[int], int, AdapterRef | None], list[int]],
    ) -> None:
        self.prefill, self.decode = engines[Role.PREFILL], engines[Role.DECODE]
        self.arenas = arenas
        self.memory = memory
        self.spare = adapters[-1]
        self._placed: dict[str, Region] = {}
        self.adapters = adapters[:-1]
        self.expected = expected
        self._numbers = iter(range(1_000_000))

    async def place(self, adapter: AdapterRef) -> None:
        """Puts the adapter where it wasn't before, and gives its former place to others."""
        files = AdapterFiles(Path(adapter.source))
        region = await self.memory.reserve(files.packed_size, timeout=1)
        files.pack(self.memory.view(region), adapter.digest)
        files.close()
        await self.prefill.place_adapter(adapter, region)
        if adapter.digest in self._placed:
            self.take_away(adapter)
        self._placed[adapter.digest] = region

    def take_away(self, adapter: AdapterRef) -> None:
        """Gives the adapter's place to others."""
        region = self._placed.pop(adapter.digest)
        self.memory.view(region)[:] = bytes(region.size)
        self.memory.release(region)

    def prompt(self, length: int) -> tuple[int, ...]:
        """Never the same twice."""
        draw = random.Random(next(self._numbers))
        return tuple(draw.randrange(3, 512) for _ in range(length))

    def request(self, prompt: Sequence[int], sampling: Sampling = GREEDY) -> EngineRequest:
        return EngineRequest(f"r{next(self._numbers)}", tuple(prompt), sampling)

    @asynccontextmanager
    async def region(self, role: Role, num_tokens: int) -> AsyncIterator[Region]:
        """Staging memory for the KV of a prompt, not written yet."""
        info, arena = self.prefill.info, self.arenas[role]
        region = await arena.reserve(-(-num_tokens // info.block_size) * info.block_bytes + SEAL.size, timeout=10)
        clear_seal(arena.view(region))
        try:
            yield region
        finally:
            arena.release(region)

    def payload(self, role: Role, region: Region) -> memoryview:
        return self.arenas[role].view(Region(region.offset, region.size, region.nonce))

    @asynccontextmanager
    async def handed_over(
        self, prompt: Sequence[int], sampling: Sampling = GREEDY, adapter: AdapterRef | None = None
    ) -> AsyncIterator[tuple[TokenDelta, EngineRequest]]:
        """The first token, and the decode request that goes on from it."""
        async with self.region(Role.DECODE, len(prompt)) as there:
            async with self.region(Role.PREFILL, len(prompt)) as here:
                request = dataclasses.replace(self.request(prompt, sampling), adapter=adapter, save=here)
                (first,) = [delta async for delta in self.prefill.generate(request)]
                payload = self.payload(Role.PREFILL, here)
                assert read_seal(payload) == len(prompt)
                self.payload(Role.DECODE, there)[:] = payload
            yield (
                first,
                dataclasses.replace(
                    self.request(prompt, sampling),
                    output_token_ids=first.token_ids,
                    load=there,
                    salt=f"{adapter.digest}:{len(prompt)}" if adapter else "",
                ),
            )

    async def whole(
        self, prompt: Sequence[int], sampling: Sampling = GREEDY, adapter: AdapterRef | None = None
    ) -> list[int]:
        """All tokens, the first by one engine, the others by the other."""
        async with self.handed_over(prompt, sampling, adapter) as (first, request):
            return [*first.token_ids, *await tokens(self.decode, request)]

    async def served(self) -> None:
        """Passes if both engines serve as if nothing had happened, and nothing else runs."""
        prompt = self.prompt(40)
        assert await self.whole(prompt) == self.expected(prompt, GREEDY.max_tokens, None)
        await self.idle()

    async def idle(self) -> None:
        async with asyncio.timeout(10):
            for engine in (self.prefill, self.decode):
                while engine.stats.running or engine.stats.waiting or engine.stats.kv_usage:
                    await asyncio.sleep(0.01)


async def tokens(engine: Engine, request: EngineRequest) -> list[int]:
    return [token async for delta in engine.generate(request) for token in delta.token_ids]


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=["fake", pytest.param("vllm", marks=pytest.mark.vllm)]
)
async def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Pair]:
    root = tmp_path_factory.mktemp(request.param)
    arenas = {role: StagingArena.create(64 * MiB) for role in ROLES}
    memory = StagingArena.create(16 * MiB)
    make = _fake_pair if request.param == "fake" else _vllm_pair
    pair = await make(root, arenas, memory)
    for adapter in pair.adapters:
        await pair.place(adapter)
    yield pair
    for engine in (pair.prefill, pair.decode):
        await engine.close()
    for arena in (*arenas.values(), memory):
        arena.close()


async def _fake_pair(root: Path, arenas: dict[Role, StagingArena], memory: StagingArena) -> Pair:
    engines: dict[Role, Engine] = {
        role: FakeEngine(role, arena.path, memory.path, kv_blocks=4096, max_model_len=2048)
        for role, arena in arenas.items()
    }
    adapters = [write_adapter(root / name, name) for name in ("alice", "bob", "spare")]

    def expected(prompt: Sequence[int], count: int, adapter: AdapterRef | None) -> list[int]:
        return tokens_of(adapter.digest if adapter else "", prompt, Sampling(max_tokens=count, temperature=0.0))

    return Pair(engines, arenas, memory, adapters, expected)


async def _vllm_pair(root: Path, arenas: dict[Role, StagingArena], memory: StagingArena) -> Pair:
    from preft.engine.vllm_engine import VllmEngine
    from support.models import make_lora, make_model
    from support.reference import Reference

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    model = make_model(root / "model", seed=3)
    adapters = []
    for name, rank in (("alice", 2), ("bob", 8), ("spare", 4)):
        folder = make_lora(root / name, model, rank=rank, seed=rank)
        adapters.append(AdapterRef(name, adapter_digest(folder), str(folder)))
    own = {"max_num_batched_tokens": 64, "kv_cache_bytes": 32 * MiB}
    prefill = {**own, "max_loras": 2, "max_lora_rank": 8}
    settings = load_settings(None, {"model": str(model), "prefill": prefill, "decode": own})
    started = await asyncio.gather(
        *(VllmEngine.start(settings, role, arenas[role].path, memory.path) for role in ROLES)
    )
    reference = Reference(model)

    def expected(prompt: Sequence[int], count: int, adapter: AdapterRef | None) -> list[int]:
        return reference.greedy(prompt, count, adapter.source if adapter else None)

    return Pair(dict(zip(ROLES, started, strict=True)), arenas, memory, adapters, expected)


async def test_they_can_exchange_kv(pair: Pair) -> None:
    assert pair.prefill.info.kv_layout == pair.decode.info.kv_layout
    assert pair.prefill.info.block_bytes == pair.decode.info.block_bytes > 0
    for engine in (pair.prefill, pair.decode):
        assert engine.info.kv_blocks > 0
        assert engine.info.max_model_len == 2048
        assert engine.info.pids


async def test_one_engine_begins_and_the_other_goes_on(pair: Pair) -> None:
    """At the same time, for every prompt length, with different adapters and without."""
    users = (None, *pair.adapters)
    asks = [(pair.prompt(length), users[number % 3]) for number, length in enumerate((*LENGTHS, *LENGTHS, *LENGTHS))]
    got = await asyncio.gather(*(pair.whole(prompt, adapter=user) for prompt, user in asks))
    assert got == [pair.expected(prompt, GREEDY.max_tokens, user) for prompt, user in asks]
    await pair.idle()


async def test_engines_without_work_leave_the_cores_alone(pair: Pair) -> None:
    """From their last step on: the other engine's step, or a token's way to its client, may need the core."""
    await pair.served()
    pids = (*pair.prefill.info.pids, *pair.decode.info.pids)
    before = cpu_seconds(pids)
    await asyncio.sleep(1)
    assert cpu_seconds(pids) - before < 0.2


def cpu_seconds(pids: Sequence[int]) -> float:
    """What these processes have used so far."""
    used = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        used += int(fields[11]) + int(fields[12])
    return used / os.sysconf("SC_CLK_TCK")


async def test_an_adapter_changes_the_continuation(pair: Pair) -> None:
    """The test above can fail."""
    prompt = pair.prompt(64)
    outputs = {tuple(await pair.whole(prompt, adapter=user)) for user in (None, *pair.adapters)}
    assert len(outputs) == 3


@pytest.mark.parametrize(("length", "done"), [(31, 2), (32, 40), (50, 40)])
async def test_goes_on_after_many_tokens(pair: Pair, length: int, done: int) -> None:
    """Also when the tokens so far are in the engine's prefix cache, because it has made them itself before."""
    prompt, adapter = pair.prompt(length), pair.adapters[0]
    sampling = dataclasses.replace(GREEDY, max_tokens=44)
    expected = pair.expected(prompt, 44, adapter)
    for _ in range(2):
        async with pair.handed_over(prompt, sampling, adapter) as (_, request):
            resumed = dataclasses.replace(request, output_token_ids=tuple(expected[:done]))
            assert await tokens(pair.decode, resumed) == expected[done:]


async def test_deltas_and_their_end(pair: Pair) -> None:
    prompt = pair.prompt(20)
    expected = pair.expected(prompt, 12, None)
    async with pair.handed_over(prompt) as (first, request):
        deltas = [delta async for delta in pair.decode.generate(dataclasses.replace(request, index=5))]
    assert (first.token_ids, first.finish_reason) == ((expected[0],), FinishReason.LENGTH)
    assert [token for delta in deltas for token in delta.token_ids] == expected[1:]
    assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [FinishReason.LENGTH]
    assert {delta.index for delta in deltas} == {5}
    assert all(delta.logprobs == () for delta in (first, *deltas))


@pytest.mark.parametrize("position", [0, 3])
@pytest.mark.parametrize("kind", ["stop", "eos", "both", "ignored"])
async def test_stop_and_eos_tokens(pair: Pair, position: int, kind: str) -> None:
    prompt = pair.prompt(45)
    expected = pair.expected(prompt, 12, None)
    token = expected[position]
    end = expected.index(token) + 1
    sampling = dataclasses.replace(
        GREEDY,
        stop_token_ids=(token,) if kind in ("stop", "both") else (),
        eos_token_ids=() if kind == "stop" else (token,),
        ignore_eos=kind == "ignored",
    )
    async with pair.handed_over(prompt, sampling) as (last, request):
        got = list(last.token_ids)
        if last.finish_reason is not FinishReason.STOP:
            async for last in pair.decode.generate(request):
                got += last.token_ids
    assert got == (expected if kind == "ignored" else expected[:end])
    assert last.finish_reason is (FinishReason.LENGTH if kind == "ignored" else FinishReason.STOP)
    assert last.stop_token_id == (token if kind in ("stop", "both") else None)


async def test_min_tokens_counts_from_the_first(pair: Pair) -> None:
    prompt = pair.prompt(45)
    expected = pair.expected(prompt, 12, None)
    sampling = dataclasses.replace(GREEDY, min_tokens=4, eos_token_ids=tuple(set(expected)))
    got = await pair.whole(prompt, sampling)
    assert len(got) >= 4
    assert not set(got[:4]) & set(expected)


async def test_logprobs(pair: Pair) -> None:
    for count in (0, 3):
        sampling = dataclasses.replace(GREEDY, logprobs=count)
        async with pair.handed_over(pair.prompt(33), sampling) as (first, request):
            deltas = [first, *[delta async for delta in pair.decode.generate(request)]]
        for delta in deltas:
            assert [entry.token_id for entry in delta.logprobs] == list(delta.token_ids)
            for entry in delta.logprobs:
                assert entry.rank == 1  # greedy
                assert entry.logprob <= 0
                assert len(entry.top) == count
                assert [value for _, value in entry.top] == sorted((value for _, value in entry.top), reverse=True)
                assert entry.top[:1] in ((), ((entry.token_id, entry.logprob),))


async def test_prompt_logprobs_of_a_whole_prompt(pair: Pair) -> None:
    """In one delta, with the first token; also if the prompt is in the prefix cache, and in chunks of any end."""
    for length in LENGTHS:
        prompt = pair.prompt(length)
        for top in (0, 2):
            sampling = dataclasses.replace(GREEDY, prompt_logprobs=top)
            async with pair.handed_over(prompt, sampling, pair.adapters[0]) as (first, request):
                deltas = [first, *[delta async for delta in pair.decode.generate(request)]]
            assert [delta.prompt_logprobs is None for delta in deltas] == [False] + [True] * (len(deltas) - 1)
            logprobs = first.prompt_logprobs
            assert logprobs is not None
            assert (logprobs.top, len(logprobs)) == (top, length - 1)
            for token, row in zip(prompt[1:], logprobs, strict=True):
                assert (row.token_id, len(row.top)) == (token, top)
                assert row.logprob <= 0
                assert [value for _, value in row.top] == sorted((value for _, value in row.top), reverse=True)
            tokens_so_far = [token for delta in deltas for token in delta.token_ids]
            assert tokens_so_far == pair.expected(prompt, GREEDY.max_tokens, pair.adapters[0])
    other = dataclasses.replace(pair.request(pair.prompt(9), dataclasses.replace(GREEDY, prompt_logprobs=2)), index=1)
    assert [delta.prompt_logprobs async for delta in pair.prefill.generate(other)] == [None]
    await pair.idle()


async def test_choices_from_one_prompt_pass(pair: Pair) -> None:
    """Several decode requests load the same region; each has its own seed, and a seed means the same every time."""
    prompt = pair.prompt(70)
    sampling = Sampling(max_tokens=12, temperature=1.0)

    async def choices() -> list[list[int]]:
        async with pair.handed_over(prompt) as (_, request):
            requests = [
                dataclasses.replace(
                    request,
                    request_id=f"{request.request_id}-{seed}",
                    index=index,
                    sampling=dataclasses.replace(sampling, seed=seed),
                )
                for index, seed in enumerate((7, 8, 9, 7))
            ]
            return await asyncio.gather(*(tokens(pair.decode, choice) for choice in requests))

    first, second = await choices(), await choices()
    assert first == second
    assert first[0] == first[3]
    assert len({tuple(choice) for choice in first}) == 3


async def test_a_seed_continues_where_prefill_left_it(pair: Pair) -> None:
    """A resumed request draws what it would have drawn: also over several chunks, on either engine."""
    prompt = pair.prompt(150)
    sampling = Sampling(max_tokens=72, temperature=1.0, seed=11)
    whole = await pair.whole(prompt, sampling)
    assert len(whole) == 72
    for done in (3, 68):
        async with pair.handed_over(prompt, sampling) as (_, request):
            resumed = dataclasses.replace(request, output_token_ids=tuple(whole[:done]), salt=f"other {done}")
            assert await tokens(pair.decode, resumed) == whole[done:]


async def test_a_region_that_is_stale_fails_and_nothing_else_does(pair: Pair) -> None:
    """Released before it was loaded; at the same time another request decodes undisturbed."""
    prompts = [pair.prompt(64) for _ in range(3)]
    async with pair.handed_over(prompts[0]) as (_, stale), pair.handed_over(prompts[1]) as (_, good):
        assert stale.load is not None
        other = dataclasses.replace(stale.load, nonce=bytes(16))
        results = await asyncio.gather(
            tokens(pair.decode, dataclasses.replace(stale, load=other)), tokens(pair.decode, good),
            return_exceptions=True,
        )  # fmt: skip
        assert isinstance(results[0], EngineFailed)
        assert results[1] == pair.expected(prompts[1], GREEDY.max_tokens, None)[1:]
        # The blocks it was to go into are in no cache: the same request with its KV is exact.
        again = dataclasses.replace(stale, request_id="again")
        assert await tokens(pair.decode, again) == pair.expected(prompts[0], GREEDY.max_tokens, None)[1:]
    await pair.idle()


@pytest.mark.parametrize("wrong", ["unsealed", "another length", "another size"])
async def test_a_region_that_holds_something_else_fails(pair: Pair, wrong: str) -> None:
    prompt = pair.prompt(64)
    async with pair.handed_over(prompt) as (_, request):
        assert request.load is not None
        if wrong == "unsealed":
            clear_seal(pair.payload(Role.DECODE, request.load))
        elif wrong == "another length":
            request = dataclasses.replace(request, prompt_token_ids=prompt[:-1])
        else:
            request = dataclasses.replace(request, prompt_token_ids=(*prompt, 9))
        with pytest.raises(EngineFailed):
            await tokens(pair.decode, request)
    await pair.served()


async def test_a_stale_region_of_an_aborted_request_leaves_nothing_behind(pair: Pair) -> None:
    """Its client is gone before the engine finds out; the same prompt comes again, with its KV."""
    for attempt in range(5):
        prompt = pair.prompt(64)
        async with pair.handed_over(prompt) as (_, request):
            assert request.load is not None
            stale = dataclasses.replace(
                request, request_id=f"stale-{attempt}", load=dataclasses.replace(request.load, nonce=bytes(16))
            )
            task = asyncio.create_task(tokens(pair.decode, stale))
            await asyncio.sleep(0.0005 * attempt)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert await tokens(pair.decode, request) == pair.expected(prompt, GREEDY.max_tokens, None)[1:]
    await pair.idle()


async def test_saving_into_a_region_that_is_gone_harms_nobody(pair: Pair) -> None:
    prompt = pair.prompt(40)
    async with pair.region(Role.PREFILL, 40) as here:
        gone = dataclasses.replace(pair.request(prompt), save=dataclasses.replace(here, nonce=bytes(16)))
        assert await tokens(pair.prefill, gone) == pair.expected(prompt, 1, None)
        assert read_seal(pair.payload(Role.PREFILL, here)) is None
    await pair.served()


async def test_another_salt_finds_nothing_in_the_prefix_cache(pair: Pair) -> None:
    for adapter in (None, pair.adapters[0]):
        prompt, once = pair.prompt(70), dataclasses.replace(GREEDY, max_tokens=1)
        found = []
        for salt in ("acme", "acme", "other", "", ""):
            request = dataclasses.replace(pair.request(prompt, once), adapter=adapter, salt=salt)
            (first,) = [delta async for delta in pair.prefill.generate(request)]
            assert list(first.token_ids) == pair.expected(prompt, 1, adapter)
            found.append(first.cached_tokens)
        assert found[1] == found[4] >= 64
        assert found[0] == found[2] == found[3] == 0


async def test_a_prompt_in_the_prefix_cache_is_saved_whole(pair: Pair) -> None:
    prompt = pair.prompt(100)
    for _ in range(2):
        assert await pair.whole(prompt) == pair.expected(prompt, GREEDY.max_tokens, None)


@pytest.mark.parametrize("after", [0, 3])
async def test_closing_aborts(pair: Pair, after: int) -> None:
    sampling = dataclasses.replace(GREEDY, max_tokens=1000)
    async with pair.handed_over(pair.prompt(33), sampling) as (_, request):
        task = asyncio.create_task(_first(pair.decode, request, after))
        if not after:
            await asyncio.sleep(0.02)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await pair.idle()
    prefill = asyncio.create_task(tokens(pair.prefill, pair.request(pair.prompt(1500))))
    await asyncio.sleep(0.02)
    prefill.cancel()
    await asyncio.gather(prefill, return_exceptions=True)
    await pair.idle()
    await pair.served()


async def _first(engine: Engine, request: EngineRequest, count: int) -> None:
    async with aclosing(engine.generate(request)) as deltas:
        async for _ in deltas:
            count -= 1
            if count == 0:
                return


@pytest.mark.parametrize(
    "prompt", [(), (5, 511, 512 * 2), tuple([7] * 2048)], ids=["empty", "not in the vocabulary", "too long"]
)
async def test_what_no_engine_can_do(pair: Pair, prompt: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRequest):
        await tokens(pair.prefill, pair.request(prompt))
    await pair.served()


async def test_adapters_may_move(pair: Pair) -> None:
    """Where they were before is somebody else's memory."""
    for adapter in (*pair.adapters, *pair.adapters):
        await pair.place(adapter)
        prompt = pair.prompt(40)
        assert await pair.whole(prompt, adapter=adapter) == pair.expected(prompt, GREEDY.max_tokens, adapter)


async def test_a_broken_adapter_is_refused(pair: Pair) -> None:
    broken = AdapterRef("broken", "b0" * 32, "")
    region = await pair.memory.reserve(1000, timeout=1)
    pair.memory.view(region)[:] = bytes(1000)
    if isinstance(pair.prefill, FakeEngine):
        pair.prefill.refused.add(broken.digest)
    with pytest.raises(InvalidAdapter):
        await pair.prefill.place_adapter(broken, region)
    pair.memory.release(region)
    with pytest.raises(InvalidAdapter):
        await pair.prefill.place_adapter(broken, region)
    await pair.served()


async def test_between_steps_nobody_needs_the_adapter_of_given_up_requests(pair: Pair) -> None:
    """Requests are given up at once, and their adapters' memory, in no slot as a third is used, is taken by others."""
    for adapter in (*pair.adapters, *pair.adapters):
        await pair.place(pair.spare)
        await pair.whole(pair.prompt(5), adapter=adapter)
        request = dataclasses.replace(pair.request(pair.prompt(400)), adapter=pair.spare)
        async with aclosing(pair.prefill.generate(request)) as deltas:
            waiting = asyncio.ensure_future(anext(deltas))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait({waiting})
        await pair.prefill.between_steps()
        pair.take_away(pair.spare)
    await pair.served()


async def test_a_dead_engine(pair: Pair) -> None:
    """The last test: the decode engine doesn't come back."""
    async with pair.handed_over(pair.prompt(20), dataclasses.replace(GREEDY, max_tokens=2000)) as (_, request):
        deltas = pair.decode.generate(request)
        await anext(deltas)
        if isinstance(pair.decode, FakeEngine):
            pair.decode.die("killed")
        else:
            os.kill(pair.decode.info.pids[0], signal.SIGKILL)
        errors: list[PreftError] = []
        for attempt in (deltas, pair.decode.generate(dataclasses.replace(request, request_id="later"))):
            try:
                async for _ in attempt:
                    pass
            except PreftError as error:
                errors.append(error)
        assert [type(error) for error in errors] == [WorkerLost, WorkerLost]
    async with asyncio.timeout(10):
        assert await pair.decode.wait_dead()
