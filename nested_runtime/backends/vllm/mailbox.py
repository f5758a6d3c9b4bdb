"""How states travel between nested-serve and vLLM's engine process: private files, and a word when one is there.

The server writes `<name>.in`, names it in the request, and waits; the connector writes `<name>.out` and says so by a
datagram. The folder lies in memory (/dev/shm) where there is such a place, and nobody else may look into it. What lies
longer than a turn goes through the codec and the store, as with every backend.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nested_runtime.errors import NestedError, UpdateDiverged

__all__ = ["Mailbox", "Post"]

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of mode 0700 is made inside
Tensors = Mapping[str, torch.Tensor]


def _write(path: Path, tensors: Tensors, position: int) -> None:
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, {"position": str(position)})
    part.replace(path)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], int]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, int(file.metadata()["position"])  # noqa: SIM118


class Post:
    """The connector's side, synchronous."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def read(self, name: str) -> tuple[dict[str, torch.Tensor], int]:
        """The state left for request `name`, and the session tokens in it."""
        return _read(self._folder / f"{name}.in")

    def write(self, name: str, tensors: Tensors, position: int) -> None:
        """Hand back the state a request left; one that is not finite is not handed back."""
        problem = ""
        if all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            _write(self._folder / f"{name}.out", tensors, position)
        else:
            problem = f"request {name!r} left a state that is not finite; the session keeps its old version"
        self._socket.sendto(json.dumps({"name": name, "problem": problem}).encode(), str(self._folder / "socket"))


class Mailbox:
    """The server's side, on an event loop."""

    def __init__(self) -> None:
        self._made = TemporaryDirectory(prefix="nested-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
        self.folder = Path(self._made.name)
        self._awaited: dict[str, asyncio.Future[None]] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.folder / "socket"))
        self._socket.setblocking(False)

    def open(self) -> None:
        """Listen, on the running event loop."""
        asyncio.get_running_loop().add_reader(self._socket, self._hear)

    def close(self) -> None:
        """Forget everything."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()
        self._made.cleanup()

    def leave(self, name: str, tensors: Tensors, position: int) -> None:
        """Leave a state for request `name`. Blocks for milliseconds; call it off the event loop."""
        _write(self.folder / f"{name}.in", tensors, position)

    def expect(self, name: str) -> None:
        """Say that a state will come back from request `name`, before it runs."""
        self._awaited[name] = asyncio.get_running_loop().create_future()

    async def take(self, name: str, seconds: float) -> tuple[dict[str, torch.Tensor], int]:
        """The state that request `name` left and the session tokens in it, waiting for it."""
        try:
            await asyncio.wait_for(self._awaited[name], seconds)
        except TimeoutError:
            raise NestedError(f"vLLM did not hand back the state of request {name!r} within {seconds:g} s") from None
        return await asyncio.to_thread(_read, self.folder / f"{name}.out")

    def forget(self, name: str) -> None:
        """Drop whatever belongs to request `name`."""
        self._awaited.pop(name, None)
        for end in ("in", "out"):
            (self.folder / f"{name}.{end}").unlink(missing_ok=True)

    def _hear(self) -> None:
        while True:
            try:
                said = json.loads(self._socket.recv(1 << 16))
            except BlockingIOError:
                return
            future = self._awaited.get(said["name"])
            if future is None or future.done():
                (self.folder / os.path.basename(f"{said['name']}.out")).unlink(missing_ok=True)
            elif said["problem"]:
                future.set_exception(UpdateDiverged(said["problem"]))
            else:
                future.set_result(None)
