"""The training loop: truncated backpropagation over lanes with carried memory, data parallel over processes.

Every process owns its lanes and their memories; gradients are summed in one all-reduce of a flat buffer. Matrices take
Muon (orthogonalised momentum, NL Eq. 42-44), everything else AdamW. A run folder holds what `checkpoint.py` writes,
`log.jsonl` and the exported model folder `model/`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from nested_runtime.errors import ConfigError
from nested_runtime.models.base import LanguageModel
from nested_runtime.models.loading import build, save_model
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.checkpoint import load_run, save_run
from nested_runtime.train.data import KINDS, Corpus, Lanes, Mixture
from nested_runtime.train.dropout import drop_mlps
from nested_runtime.train.heap import EVERY, trim
from nested_runtime.train.muon import Muon
from nested_runtime.train.quiet import Quiet
from nested_runtime.train.start import train_only_levels

__all__ = ["TrainConfig", "Trainer"]

VALUE_WEIGHT = 2.5  # targets weighted above this are values of answers, or say that there is none


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `tokens` is over all processes; `lanes` and `length` are per process."""

    family: str
    model: Mapping[str, Any]
    tokens: int = 30_000_000
    lanes: int = 16
    length: int = 256
    lr_matrix: float = 0.02
    lr_other: float = 3e-3
    weight_decay: float = 0.01
    warmup: int = 100
    cooldown: float = 0.3
    clip: float = 1.0
    curriculum: float = 0.6  # share of the run after which the dialogues are at their hardest
    bf16: bool | None = None  # products in bf16; None: where the device has units for them
    only_levels: bool = False  # train the start and the rates of levels, keep the rest as it is
    carry_kv: bool = True  # False: every segment begins with an empty window, so that levels alone can remember
    copy_blocks: Sequence[int] = ()  # of --from, see `copy_blocks.py`
    copy_heads: Mapping[str, str] = field(default_factory=dict)  # of --from with its copied blocks, see `copy_heads.py`
    dropout: float = 0.0  # of what MLPs add to the stream
    quiet: float = 0.0  # price of writing text that tells nothing into memories that keep it; 0: free
    seed: int = 0
    mixture: Mixture = field(default_factory=Mixture)
    eval_every: int = 250
    save_every: int = 250

    def __post_init__(self) -> None:
        for name in ("tokens", "lanes", "length", "warmup", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"config field {name!r} must be at least 1, got {getattr(self, name)}")
        for name in ("lr_matrix", "lr_other", "cooldown", "clip", "curriculum"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"config field {name!r} must be a number above 0, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"config field 'dropout' must be at least 0 and below 1, got {self.dropout}")
        if not 0 <= self.quiet < math.inf:
            raise ConfigError(f"config field 'quiet' must be a number, at least 0, got {self.quiet}")

    def build(self) -> LanguageModel:
        """The model with fresh parameters; ConfigError names what does not fit it."""
        model = build(self.family, self.model)
        if self.length % model.chunk:
            raise ConfigError(f"config field 'length' is {self.length}: give a multiple of the chunk, {model.chunk}")
        if model.update_chunk and self.length % model.update_chunk:
            raise ConfigError(
                f"config field 'length' is {self.length}: give a multiple of the first level's chunk, "
                f"{model.update_chunk}, so that all lanes stand at one place of it"
            )
        if self.only_levels:
            train_only_levels(model, self.family)
        return model


def _has_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones; without AVX-512 or AMX they are eight times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Trainer:
    """One process of a run."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, corpus: Corpus, folder: Path, rank: int, world: int):
        torch.manual_seed(config.seed)
        self.config, self.tokenizer, self.folder, self.rank, self.world = config, tokenizer, folder, rank, world
        self.device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
        self.bf16 = config.bf16 if config.bf16 is not None else _has_bf16(self.device)
        self.model: LanguageModel = config.build().to(self.device)
        if config.dropout:
            drop_mlps(self.model, config.dropout)
        self.corpus = corpus
        self.lanes = self._train_lanes()
        self.quiet = Quiet(self.model) if config.quiet else None
        self.optimizers = self._optimizers()
        self.step, self.state = 0, None
        self.per_step = config.lanes * config.length * world
        self.steps = math.ceil(config.tokens / self.per_step)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, p in self.model.named_parameters():
            if not p.requires_grad:
                continue
            is_matrix = p.ndim == 2 and min(p.shape) > 8 and name not in ("embed", "head")
            (matrices if is_matrix else others).append(p)
        self.matrices = matrices
        c = self.config
        decayed = [p for p in others if p.ndim >= 2]
        plain = [p for p in others if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": c.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        mine = matrices[self.rank :: self.world]
        adam = torch.optim.AdamW(groups, lr=c.lr_other, betas=(0.9, 0.98), fused=True)
        if not mine:
            return [adam]
        return [Muon(mine, lr=c.lr_matrix, momentum=0.95, weight_decay=c.weight_decay), adam]

    def _train_lanes(self) -> Lanes:
        c = self.config
        return Lanes(self.corpus, self.tokenizer, c.lanes, c.length, c.seed * 1000 + self.rank, c.mixture)

    def _dev_lanes(self) -> Lanes:
        """The same dialogues at every evaluation, each from its start, so that no session lacks its facts."""
        dialogues = dict.fromkeys(KINDS, 0.0) | {"dialogue": 1.0}
        only, c = Mixture(dialogues, dialogues, dialogues), self.config
        return Lanes(self.corpus, self.tokenizer, c.lanes, c.length, 777 + self.rank, only, split="dev", progress=0.3)

    def _schedule(self) -> float:
        c, done = self.config, self.step / self.steps
        ramp = min(1.0, (self.step + 1) / c.warmup)
        return ramp * min(1.0, max(0.02, (1.0 - done) / c.cooldown))

    def _forward(self, lanes: Lanes, state: Any, position: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        """loss, number of value tokens right, number of value tokens, next state."""
        tokens, weights, fresh, idle = (torch.from_numpy(array).to(self.device) for array in lanes.next())
        if state is not None:
            # Filled, not multiplied: 0 times a diverged lane's NaN would be NaN for ever.
            state = {n: t.detach().masked_fill(fresh.view(-1, *[1] * (t.ndim - 1)), 0) for n, t in state.items()}
            if not self.config.carry_kv:
                state |= {s.name: state[s.name][:, :0] for s in self.model.state_spec() if s.grows}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            hidden, state = self.model.scan(tokens[:, :-1], state, position)
            chosen = weights > 0
            logits = self.model.logits(hidden[chosen])
        targets, weight = tokens[:, 1:][chosen], weights[chosen]
        losses = cross_entropy(logits.float(), targets, reduction="none")
        value = weight > VALUE_WEIGHT
        right = (logits[value].argmax(-1) == targets[value]).sum()
        loss = (losses * weight).sum() / weight.sum().clamp(min=1)
        if self.quiet is not None:
            loss = loss + self.config.quiet * self.quiet.price(idle)
        return loss, right, value.sum(), state

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns its figures."""
        self.lanes.progress = min(1.0, self.step / self.steps / self.config.curriculum)
        loss, right, total, self.state = self._forward(self.lanes, self.state, self.step * self.config.length)
        torch.autograd.backward(loss)
        norm = self._reduce()
        scale = self._schedule()
        for optimizer in self.optimizers:
            lr = self.config.lr_matrix if isinstance(optimizer, Muon) else self.config.lr_other
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self._share()
        self.step += 1
        return {"loss": loss.item(), "value": right.item() / max(1, total.item()), "norm": norm}

    def _reduce(self) -> float:
        params = [p for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
        if self.world > 1:
            dist.all_reduce(flat)
            flat /= self.world
        norm = float(flat.norm())
        if not math.isfinite(norm):
            flat.zero_()
        elif norm > self.config.clip:
            flat *= self.config.clip / norm
        for p, g in zip(params, torch.split(flat, [p.numel() for p in params]), strict=True):
            p.grad = g.view_as(p)
        return norm

    def _share(self) -> None:
        """Every process steps its own share of the matrices; the others receive them."""
        for i, p in enumerate(self.matrices if self.world > 1 else []):
            dist.broadcast(p.data, i % self.world)

    @torch.no_grad()
    def evaluate(self, steps: int = 6) -> dict[str, float]:
        """Teacher-forced loss and value-token accuracy on phrasings and values training never sees."""
        dev, state = self._dev_lanes(), None
        figures = torch.zeros(3, device=self.device)
        for i in range(steps):
            loss, right, total, state = self._forward(dev, state, i * self.config.length)
            figures += torch.stack([loss, right, total])
        if self.world > 1:
            dist.all_reduce(figures)
        return {
            "dev_loss": float(figures[0]) / steps / self.world,
            "dev_value": float(figures[1] / figures[2].clamp(min=1)),
        }

    def run(self) -> Iterator[dict[str, float]]:
        """Train to the end, yielding one record per step; saves and evaluates on the way."""
        started, first = time.time(), self.step
        while self.step < self.steps:
            record = self.train_step()
            if self.step % EVERY == 0:
                trim()
            record |= {"step": self.step, "tokens": self.step * self.per_step}
            record["tokens_per_s"] = (self.step - first) * self.per_step / (time.time() - started)
            if self.step % self.config.eval_every == 0 or self.step == self.steps:
                record |= self.evaluate()
            if self.step % self.config.save_every == 0 or self.step == self.steps:
                self.save()
            yield record

    def save(self) -> None:
        """Write what this process owns of the run; process 0 also exports the model folder."""
        config = {**asdict(self.config), "model": dict(self.config.model)}
        save_run(self.folder, self.model, self.optimizers, self.rank, self.step, config)
        if self.rank == 0:
            dtype = torch.float32 if self.config.only_levels else torch.bfloat16  # what is frozen stays as it was
            save_model(self.folder / "model", self.config.family, self.model, self.tokenizer, dtype=dtype)

    def resume(self) -> bool:
        """Continue from the run folder if it holds a run."""
        config = {**asdict(self.config), "model": dict(self.config.model)}
        step = load_run(self.folder, self.model, self.optimizers, config)
        if step is None:
            return False
        self.step = step
        self.lanes.rng.seed(self.config.seed * 1000 + self.rank + self.step)
        return True


@contextlib.contextmanager
def process_group(rank: int, world: int, port: int) -> Iterator[None]:
    """A gloo group over loopback for the length of the block."""
    if world == 1:
        yield
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
