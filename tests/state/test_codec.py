"""The codec: loads exactly what was stored, or raises StateError."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as safetensors_load

from nested_runtime.errors import ConfigError, StateError, StateMismatch
from nested_runtime.state.codec import decode, encode, read_header
from nested_runtime.state.snapshot import Binding, Snapshot, state_digest
from nested_runtime.state.spec import TensorSpec
from nested_runtime.store.blob import unpack

SPECS = (
    TensorSpec("m.anchor", (3, 2)),
    TensorSpec("m.scalar", ()),
    TensorSpec("m.wide", (2, 3), torch.float64),
    TensorSpec("m.ids", (4,), torch.int64),
)
BINDING = Binding("tenant", 'séssion "x"', 7)


def take(tensors: dict[str, torch.Tensor], at_rest: str = "exact", pending: int | None = 5) -> Snapshot:
    return Snapshot.take(
        tensors, fingerprint="model-1", binding=BINDING, position=123, pending=pending, at_rest=at_rest
    )


def some_state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: (torch.randn(spec.shape, generator=generator) * 9).to(spec.dtype) for spec in SPECS}


BLOB = encode(take(some_state()))
OLD = (
    "PEtYvv;qJC00000XvFazV|0mTW-Y=@>uRa1FzqP3j!L`~;hvXt0}L&2D77#BV6*{s4gkj9Wjatz(*~r3250#RHT;q^E%Z6FCLE;IALDm"
    "=jS#g^H_0uxS!Yfes5&V^Xyqmn*_g9cNSl?J7V5JUQUFi@QUH&aqC90(5BnMa<kK^iD(d?3*WNz0Vb_7SLUwDbvRQ^f9Y;2de`1Y}`xj"
    "k=w9)tfEV~V4&Cv&&cYL~(fg{wXRKHA@NNA>(=9eTAzjTE~vN_wXbE<<>MrPxyk5A9|Cz18#jZdFUk)7V+%VWzCrYyevRWHGpPj4&K#H"
    "UYGgz;lv)AK~9&%V4pDsL&tr{^iEEY(k@==$=u;4{rQt8uhKD~>d7v5V<AKfagp6>;lbOn(cdU|;TD1E2nu3fcN)dPPy{L={NBFrF)=@"
    "RcM}Uml(I-fhiF_U=h1-&4t+8yS4!jrUb{qXTdA+$P=K-5sF2q8mVWLnuaI5YgSx28a%h?uJY_FwotdNs+>WMt4Ie9ve2g8!EveLwC1@"
    "qdW8AKmiCO0f`KO0UD4H69I!KKm!E9!vzNh6OpVf7@G&!Mlde<mTTbKXo7SB6aYX*%8^A$w8kq>;J85G0|pX=G=PD<9s-0xzw!bEO$e#"
    "cws((E7*Xap*vv!3Lg)f+"
)


def rebuilt(change: Callable[[dict[str, Any]], None], blob: bytes = BLOB, data: bytes | None = None) -> bytes:
    """The blob with a changed header and a right checksum: what a hostile writer can make."""
    (size,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + size])
    header["__metadata__"]["checksum"] = "0" * 64
    change(header)
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw = raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1)
    return struct.pack("<Q", len(raw)) + raw + (blob[8 + size :] if data is None else data)


def same(first: Snapshot, second: Snapshot) -> bool:
    pairs = [(first.tensors[name], second.tensors[name]) for name in first.tensors]
    return first.header == second.header and all(state_digest({"": a}) == state_digest({"": b}) for a, b in pairs)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(FLOATS | st.just(0.0), min_size=13, max_size=13),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=4, max_size=4),
)
def test_what_is_stored_comes_back_bit_for_bit(values: list[float], ids: list[int]) -> None:
    tensors = {
        "m.anchor": torch.tensor(values[:6]).view(3, 2),
        "m.scalar": torch.tensor(values[6]),
        "m.wide": torch.tensor(values[7:], dtype=torch.float64).view(2, 3),
        "m.ids": torch.tensor(ids),
    }
    snapshot = take(tensors)
    loaded = decode(encode(snapshot), SPECS, "model-1", BINDING)
    assert same(loaded, snapshot)
    assert list(loaded.tensors) == [spec.name for spec in SPECS]
    assert loaded.header.digest == state_digest(tensors)


def test_zero_rows_are_not_stored_and_negative_zero_is_not_zero() -> None:
    zeros = {spec.name: torch.zeros(spec.shape, dtype=spec.dtype) for spec in SPECS}
    fresh = encode(take(zeros))
    (size,) = struct.unpack("<Q", fresh[:8])
    assert len(fresh) == 8 + size + 4  # only the scalar, which has no rows
    signed = {**zeros, "m.anchor": -torch.zeros(3, 2)}
    assert same(decode(encode(take(signed)), SPECS, "model-1"), take(signed))
    assert take(signed).header.digest != take(zeros).header.digest


def test_blob_is_a_safetensors_file() -> None:
    loaded = safetensors_load(BLOB)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {s.name: s.shape for s in SPECS}


def test_bf16_at_rest_is_smaller_and_idempotent() -> None:
    big = (TensorSpec("x", (64, 64)),)
    tensors = {"x": torch.randn(64, 64)}
    snapshot = take(tensors, at_rest="bf16")
    blob = encode(snapshot)
    assert len(blob) < 0.6 * len(encode(take(tensors)))
    loaded = decode(blob, big, "model-1", BINDING)
    assert same(loaded, snapshot)
    assert same(take(dict(loaded.tensors), at_rest="bf16"), snapshot)
    assert (loaded.tensors["x"] - tensors["x"]).abs().max() <= 2**-8 * tensors["x"].abs().max()
    with pytest.raises(ConfigError, match="'int4'"):
        take(tensors, at_rest="int4")


def test_format_1_is_read_and_says_its_own_digest() -> None:
    """Format 1 hashes the tensors with SHA-256; what is written from it is format 2."""
    snapshot = take(some_state())
    digest = state_digest(snapshot.tensors, hashlib.sha256)
    old = rebuilt(meta(format="nested-runtime-state/1", digest=digest))
    loaded = decode(old, SPECS, "model-1", BINDING)
    assert loaded.header == dataclasses.replace(snapshot.header, digest=digest)
    assert encode(take(dict(loaded.tensors))) == BLOB
    refused(rebuilt(meta(format="nested-runtime-state/1")))
    refused(rebuilt(meta(digest=digest)))


def test_bytes_of_an_earlier_release() -> None:
    """Written by commit 517e8d2, envelope and all."""
    raw = unpack(base64.b85decode(OLD), b'["tenant", "golden", 3]', max_bytes=1_000)
    loaded = decode(raw, SPECS, "model-1", Binding("tenant", "golden", 3))
    assert loaded.header.digest == "9c37d078a62c52f1d2184f94f657f0c3f7f79607f908ae382832e08d11f33157"
    assert (loaded.header.position, loaded.header.pending) == (17, 4)
    assert loaded.tensors["m.ids"].tolist() == [0, 1, 2, 3]
    assert float(loaded.tensors["m.scalar"]) == 2.5


def test_what_is_decoded_may_be_written_to_and_shares_nothing_with_the_blob() -> None:
    loaded = decode(BLOB, SPECS, "model-1")
    for tensor in loaded.tensors.values():
        tensor.zero_()
    assert same(decode(BLOB, SPECS, "model-1"), take(some_state()))


def test_tensors_at_odd_offsets_are_whole() -> None:
    specs = (TensorSpec("a", (3,), torch.int8), TensorSpec("b", (2,)), TensorSpec("c", (), torch.int64))
    tensors = {"a": torch.tensor([1, -2, 3], dtype=torch.int8), "b": torch.randn(2), "c": torch.tensor(5)}
    loaded = decode(encode(take(tensors)), specs, "model-1")
    assert same(loaded, take(tensors))
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in loaded.tensors.values())


def test_pending_none_and_read_header() -> None:
    snapshot = take(some_state(), pending=None)
    assert read_header(encode(snapshot)) == snapshot.header
    assert snapshot.header.pending is None


def refused(blob: bytes) -> None:
    with pytest.raises(StateError):
        decode(blob, SPECS, "model-1", BINDING)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(BLOB) - 1), st.integers(1, 255))
def test_any_changed_byte_is_refused(index: int, flip: int) -> None:
    refused(BLOB[:index] + bytes([BLOB[index] ^ flip]) + BLOB[index + 1 :])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_cut_spliced_and_random_blobs_are_refused(data: st.DataObject) -> None:
    start, end = sorted(data.draw(st.integers(0, len(BLOB)), "cut") for _ in range(2))
    blob = BLOB[:start] + data.draw(st.binary(max_size=60), "insert") + BLOB[end:]
    if blob != BLOB:
        refused(blob)
    refused(data.draw(st.binary(max_size=200), "random"))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_hostile_headers_with_right_checksums_never_load_something_else(data: st.DataObject) -> None:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    values = st.recursive(
        leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3)
    )

    def change(header: dict[str, Any]) -> None:
        where = data.draw(st.sampled_from(["entry", "field", "top", "meta"]))
        entry = header[data.draw(st.sampled_from([spec.name for spec in SPECS]))]
        if where == "entry":
            entry[data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = data.draw(values)
        elif where == "field":
            offsets = entry[data.draw(st.sampled_from(["shape", "data_offsets"]))]
            if offsets:
                offsets[data.draw(st.integers(0, len(offsets) - 1))] = data.draw(st.integers(-(2**70), 2**70))
        elif where == "top":
            header[data.draw(st.text(max_size=8) | st.sampled_from([spec.name for spec in SPECS]))] = data.draw(values)
        else:
            header["__metadata__"][data.draw(st.sampled_from(sorted(header["__metadata__"])))] = data.draw(values)

    blob = rebuilt(change)
    try:
        loaded = decode(blob, SPECS, "model-1", BINDING)
    except StateError:
        return
    original = decode(BLOB, SPECS, "model-1", BINDING)
    # position and pending are the writer's to say; everything else must be what it was
    header = dataclasses.replace(loaded.header, position=123, pending=5)
    assert same(Snapshot(header, loaded.tensors), original)


def meta(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].update(values)


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "too short"),
        (struct.pack("<Q", 1 << 62) + b"{}", "limit 1048576"),
        (struct.pack("<Q", 4) + b"\xff\xff\xff\xff", "not JSON"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "no metadata"),
        (struct.pack("<Q", 2) + b"{}", "no metadata"),
        (rebuilt(meta(format="nested-runtime-state/9")), "format 'nested-runtime-state/9'"),
        (rebuilt(meta(more="x")), "metadata fields"),
        (rebuilt(meta(position="-1")), "position is '-1'"),
        (rebuilt(meta(position="9" * 16)), "position is '9999"),
        (rebuilt(meta(pending="²")), "pending is '²'"),
        (rebuilt(meta(at_rest="zip")), "at_rest 'zip'"),
        (rebuilt(meta(digest="0" * 63)), "digest"),
        (rebuilt(lambda h: h.update(extra=h["m.ids"])), r"unknown tensors \['extra'\]"),
        (rebuilt(lambda h: h.pop("m.ids")), r"missing tensors \['m.ids'\]"),
        (rebuilt(lambda h: h["m.ids"].update(dtype="F64")), "'m.ids' is"),
        (rebuilt(lambda h: h["m.ids"].update(shape=[5])), r"shape \[5\], expected \(4,\)"),
        (rebuilt(lambda h: h["m.ids"].update(data_offsets=[0, 32])), "'m.ids' is"),
        (BLOB + b"\0", "the header accounts for"),
        (BLOB[:-1], "truncated"),
    ],
)
def test_refusals_say_what(blob: bytes, message: str) -> None:
    with pytest.raises(StateError, match=message):
        decode(blob, SPECS, "model-1", BINDING)


def test_a_key_given_twice_is_refused() -> None:
    (size,) = struct.unpack("<Q", BLOB[:8])
    raw = BLOB[8 : 8 + size].replace(b'"m.scalar":', b'"m.anchor":{},"m.scalar":', 1).rstrip()
    raw = raw.replace(read_checksum().encode(), b"0" * 64)
    raw = raw.replace(b"0" * 64, hashlib.sha256(raw).hexdigest().encode(), 1)
    with pytest.raises(StateError, match="not JSON"):
        decode(struct.pack("<Q", len(raw)) + raw + BLOB[8 + size :], SPECS, "model-1", BINDING)


def read_checksum() -> str:
    (size,) = struct.unpack("<Q", BLOB[:8])
    checksum: str = json.loads(BLOB[8 : 8 + size])["__metadata__"]["checksum"]
    return checksum


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_tensors_are_neither_written_nor_read(value: float) -> None:
    specs = (TensorSpec("x", (2,)),)
    bad = take({"x": torch.tensor([1.0, value])})
    with pytest.raises(StateError, match="'x' holds NaN or infinity"):
        encode(bad)
    data = struct.pack("<2f", 1.0, value)
    blob = rebuilt(meta(digest=bad.header.digest), encode(take({"x": torch.ones(2)})), data)
    with pytest.raises(StateError, match="'x' holds NaN or infinity"):
        decode(blob, specs, "model-1")


@pytest.mark.parametrize(
    ("fingerprint", "binding", "message"),
    [
        ("model-2", BINDING, "fingerprint is 'model-1'"),
        ("model-1", dataclasses.replace(BINDING, tenant="other"), "tenant is 'tenant'"),
        ("model-1", dataclasses.replace(BINDING, session="other"), "session"),
        ("model-1", dataclasses.replace(BINDING, version=8), "version is 7, expected 8"),
    ],
)
def test_a_state_of_another_place_is_a_mismatch(fingerprint: str, binding: Binding, message: str) -> None:
    with pytest.raises(StateMismatch, match=message):
        decode(BLOB, SPECS, fingerprint, binding)
    assert decode(BLOB, SPECS, "model-1").header.version == 7
