"""Bytes that are not an exported memory: over HTTP always 4xx, in process thousands of mutations, nothing changes."""

from __future__ import annotations

import asyncio
import json
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nested_runtime.config import EngineConfig
from nested_runtime.core import SamplingParams
from nested_runtime.errors import NestedError
from nested_runtime.sessions import Turn
from nested_runtime.state import codec
from nested_runtime.state.snapshot import state_digest
from nested_runtime.state.spec import TensorSpec
from nested_runtime.store.base import SessionKey
from server.app import running
from server.assembly import assemble
from server.errors import status_of
from server.settings import Settings

Entries = dict[str, Any]
ABSURD = (-1, 0.5, "1", None, [], True, 2**63, -(2**63), 10**30, "NaN", [0, 1], {"x": 1})


def taken_apart(blob: bytes) -> tuple[Entries, bytes]:
    (size,) = struct.unpack("<Q", blob[:8])
    return json.loads(blob[8 : 8 + size]), blob[8 + size :]


def put_together(entries: Entries, data: bytes) -> bytes:
    """A blob whose header has the checksum it claims, whatever else it says."""
    entries["__metadata__"] = {**entries["__metadata__"], "checksum": "0" * 64}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    checksum = codec._checksum(header, "0" * 64)
    header = header.replace(b"0" * 64, checksum.encode(), 1)
    return struct.pack("<Q", len(header)) + header + data


def with_nan(blob: bytes, specs: tuple[TensorSpec, ...], fingerprint: str) -> bytes:
    """A NaN in a tensor, with header, checksum and digest that agree with it."""
    tensors = dict(codec.decode(blob, specs, fingerprint).tensors)
    entries, data = taken_apart(blob)
    name = next(spec.name for spec in specs if entries[spec.name]["data_offsets"][1] > 4)
    begin = entries[name]["data_offsets"][0]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = float("nan")
    entries["__metadata__"]["digest"] = state_digest(tensors)
    return put_together(entries, data[:begin] + struct.pack("<f", float("nan")) + data[begin + 4 :])


def hostile(blob: bytes, canary: Path) -> Iterator[tuple[str, bytes]]:
    """Named attacks on a good blob."""
    entries, data = taken_apart(blob)
    name = next(key for key in entries if key != "__metadata__")

    def changed(**metadata: str) -> bytes:
        return put_together({**entries, "__metadata__": {**entries["__metadata__"], **metadata}}, data)

    yield "empty", b""
    yield "truncated header", blob[:40]
    yield "truncated data", blob[:-1]
    yield "something after it", blob + b"\0"
    yield "another version", changed(format="nested-runtime-state/3")
    yield "an older version, whose digest is another hash", changed(format="nested-runtime-state/1")
    yield "another model", changed(fingerprint="0" * 32)
    yield "another digest", changed(digest="0" * 64)
    yield "pending token over the vocabulary", changed(pending="99999999")
    yield "endless position", changed(position="9" * 5000)
    yield "extra tensor", put_together({**entries, "extra": {**entries[name], "data_offsets": [0, 0]}}, data)
    yield "missing tensor", put_together({key: value for key, value in entries.items() if key != name}, data)
    yield "a header that claims 100 MB", struct.pack("<Q", 100 << 20) + blob[8:]
    yield "a header that claims everything", b"\xff" * 8 + blob[8:]
    yield "deep JSON", struct.pack("<Q", 200_000) + b"[" * 200_000 + data
    yield "pickle", b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    yield "torch.save", b"PK\x03\x04" + b"\0" * 200
    yield "gguf", b"GGUF\x03\0\0\0" + b"\0" * 200


@pytest.fixture
def exported(serve: Any, turn: Any) -> Iterator[tuple[httpx.Client, bytes]]:
    """A server with a session `victim` and its exported memory."""
    with serve("memory:").client() as http:
        turn(http, "my name is Ada", "victim", max_tokens=24)
        yield http, http.get("/v1/sessions/victim/export").content


def test_hostile_imports_over_http(
    exported: tuple[httpx.Client, bytes], turn: Any, serve: Any, other_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    http, blob = exported
    before = http.get("/v1/sessions/victim").json()
    canary = tmp_path / "pickle-was-loaded"
    service = assemble(Settings(models=(str(model_folder),), store="memory:", engine=EngineConfig(threads=1)))
    model = service.runtime.models["tiny"]
    attacks = dict(hostile(blob, canary))
    attacks["NaN"] = with_nan(blob, model.specs, model.backend.fingerprint)
    with serve("memory:", model=other_folder).client() as elsewhere:
        turn(elsewhere, "my name is Eve", "eve", model="other")
        attacks["a good one of another model"] = elsewhere.get("/v1/sessions/eve/export").content
    for name, attack in attacks.items():
        for session in ("victim", "nobody"):
            reply = http.put(f"/v1/sessions/{session}/import", content=attack)
            assert reply.status_code in (400, 409, 422), (name, reply.text)
            assert reply.json()["error"]["message"], name
    huge = http.put("/v1/sessions/victim/import", content=struct.pack("<Q", 100 << 20) + b" " * (100 << 20))
    assert huge.status_code == 413
    assert "NaN" in http.put("/v1/sessions/victim/import", content=attacks["NaN"]).json()["error"]["message"]
    after = http.get("/v1/sessions/victim").json()
    assert {**after, "used": 0} == {**before, "used": 0}
    assert http.get("/v1/sessions/nobody").status_code == 404
    assert not canary.exists()
    assert http.put("/v1/sessions/victim/import", content=blob).json()["digest"] == before["digest"]


def mutated(blob: bytes, entries: Entries, data: bytes, luck: random.Random) -> bytes:
    """One of many ways to damage a blob, half of them behind a checksum that is right."""
    if luck.random() < 0.5:
        return _scrambled(blob, luck)
    entries = json.loads(json.dumps(entries))
    names = [name for name in entries if name != "__metadata__"]
    name = luck.choice(names)
    match luck.randrange(6):
        case 0:
            entries[name][luck.choice(("dtype", "shape", "data_offsets"))] = luck.choice(ABSURD)
        case 1:
            begin, end = entries[name]["data_offsets"]
            entries[name]["data_offsets"] = [begin + luck.randint(-9, 9), end + luck.randint(1, 99)]
        case 2:
            shape = entries[name]["shape"]
            shape[luck.randrange(len(shape))] = luck.choice((-1, 10**9, 2**63, luck.randrange(1000, 2000)))
        case 3:
            del entries[name]
        case 4:
            entries[f"extra{luck.random()}"] = luck.choice(ABSURD)
        case 5:
            fields = ("fingerprint", "format", "digest", "at_rest", "position", "version", "pending")
            entries["__metadata__"][luck.choice(fields)] = luck.choice(("-1", "x", "1e3", "٣", "9" * 20, " 1", "NaN"))
    return put_together(entries, data)


def _scrambled(blob: bytes, luck: random.Random) -> bytes:
    place, count = luck.randrange(len(blob)), luck.randint(1, 64)
    match luck.randrange(5):
        case 0:
            return blob[:place] + bytes([blob[place] ^ (1 << luck.randrange(8))]) + blob[place + 1 :]
        case 1:
            return blob[:place]
        case 2:
            return blob[:place] + luck.randbytes(count) + blob[place:]
        case 3:
            return blob[:place] + blob[place + count :]
        case _:
            return luck.randbytes(luck.choice((8, 100, len(blob))))


@pytest.mark.timeout(1800)
def test_mutations(model_folder: Path, scaled: Callable[[int], int]) -> None:
    """Each is refused with a 4xx by the very import the server runs, and the session stays as it is."""
    settings = Settings(models=(str(model_folder),), store="memory:", engine=EngineConfig(slots=2, threads=1))
    key, tally, count = SessionKey("default", "victim"), Counter[str](), scaled(10_000)

    async def main() -> None:
        service = assemble(settings)
        async with running(service):
            words = ({"role": "user", "content": "my name is Ada"},)
            await service.runtime.absorb(Turn("t", "tiny", SamplingParams(max_tokens=0), messages=words, session=key))
            version, blob = await service.manager.export(key)
            entries, data = taken_apart(blob)
            model = service.runtime.models["tiny"]
            for number in range(count):
                damaged = mutated(blob, entries, data, random.Random(number))
                if damaged == blob:
                    tally["unchanged"] += 1
                    continue
                with pytest.raises(NestedError) as refused:
                    await service.manager.import_(key, model, damaged)
                assert 400 <= status_of(refused.value) < 500, (number, refused.value)
                tally[refused.value.code] += 1
                if number % 500 == 0:
                    assert (await service.store.versions(key)) == [version]
            assert (await service.store.versions(key)) == [version]
            assert await service.store.fsck() == []
            assert await model.backend.check() == []

    asyncio.run(main())
    print(f"{count} mutations: {dict(tally)}")
    assert tally["unchanged"] < count // 20 + 1
    assert tally["invalid_state"] > count // 2
