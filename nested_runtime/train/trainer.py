"""The training loop: truncated backpropagation over lanes with carried memory, data parallel over processes.

Every process owns its lanes and their memories; gradients are summed in one all-reduce of a flat buffer. Matrices take
Muon (orthogonalised momentum, NL Eq. 42-44), everything else AdamW. A run folder holds `checkpoint.safetensors` (the
latest, fp32), `state.json`, `log.jsonl` and the exported model folder `model/`.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from nested_runtime.models.base import LanguageModel
from nested_runtime.models.loading import build, save_model
from nested_runtime.tokenizer import Tokenizer
from nested_runtime.train.data import Corpus, Lanes, Mixture

__all__ = ["TrainConfig", "Trainer"]

VALUE_WEIGHT = 2.5  # targets weighted above this are values of answers


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
    bf16: bool = True
    seed: int = 0
    mixture: Mixture = field(default_factory=Mixture)
    eval_every: int = 250
    save_every: int = 250


class Trainer:
    """One process of a run."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, corpus: Corpus, folder: Path, rank: int, world: int):
        torch.manual_seed(config.seed)
        self.config, self.tokenizer, self.folder, self.rank, self.world = config, tokenizer, folder, rank, world
        self.device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
        self.model: LanguageModel = build(config.family, config.model).to(self.device)
        self.lanes = Lanes(corpus, tokenizer, config.lanes, config.length, config.seed * 1000 + rank, config.mixture)
        dialogues = {"echo": 0.0, "pairs": 0.0, "drill": 0.0, "dialogue": 1.0, "chat": 0.0, "prose": 0.0}
        only = Mixture(dialogues, dialogues, dialogues)
        self.dev = Lanes(corpus, tokenizer, config.lanes, config.length, 777 + rank, only, split="dev")
        self.optimizers = self._optimizers()
        self.step, self.state = 0, None
        self.per_step = config.lanes * config.length * world
        self.steps = math.ceil(config.tokens / self.per_step)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        matrices: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for name, p in self.model.named_parameters():
            is_matrix = p.ndim == 2 and min(p.shape) > 8 and name not in ("embed", "head")
            (matrices if is_matrix else others).append(p)
        self.matrices = matrices
        c = self.config
        decayed = [p for p in others if p.ndim >= 2]
        plain = [p for p in others if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": c.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        mine = matrices[self.rank :: self.world]
        muon = torch.optim.Muon(mine, lr=c.lr_matrix, momentum=0.95, weight_decay=c.weight_decay)
        return [muon, torch.optim.AdamW(groups, lr=c.lr_other, betas=(0.9, 0.98), fused=True)]

    def _schedule(self) -> float:
        c, done = self.config, self.step / self.steps
        ramp = min(1.0, (self.step + 1) / c.warmup)
        return ramp * min(1.0, max(0.02, (1.0 - done) / c.cooldown))

    def _forward(self, lanes: Lanes, state: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
        """loss, number of value tokens right, number of value tokens, next state."""
        tokens_np, weights_np, fresh_np = lanes.next()
        tokens = torch.from_numpy(tokens_np).to(self.device)
        weights = torch.from_numpy(weights_np).to(self.device)
        if state is not None:
            keep = torch.from_numpy(~fresh_np).to(self.device).float()
            state = {n: t.detach() * keep.view(-1, *[1] * (t.ndim - 1)).to(t.dtype) for n, t in state.items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            hidden, state = self.model.scan(tokens[:, :-1], state, 0)
            chosen = weights > 0
            logits = self.model.logits(hidden[chosen])
        targets, weight = tokens[:, 1:][chosen], weights[chosen]
        losses = cross_entropy(logits.float(), targets, reduction="none")
        value = weight > VALUE_WEIGHT
        right = (logits[value].argmax(-1) == targets[value]).sum()
        return (losses * weight).sum() / weight.sum(), right, value.sum(), state

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns its figures."""
        self.lanes.progress = min(1.0, self.step / self.steps / self.config.curriculum)
        loss, right, total, self.state = self._forward(self.lanes, self.state)
        torch.autograd.backward(loss)
        norm = self._reduce()
        scale = self._schedule()
        for optimizer, lr in zip(self.optimizers, (self.config.lr_matrix, self.config.lr_other), strict=True):
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
        self.dev.progress = 0.3
        figures = torch.zeros(3)
        state = None
        for _ in range(steps):
            loss, right, total, state = self._forward(self.dev, state)
            figures += torch.tensor([loss.item(), right.item(), total.item()])
        if self.world > 1:
            dist.all_reduce(figures)
        return {"dev_loss": float(figures[0]) / steps / self.world, "dev_value": float(figures[1] / figures[2])}

    def run(self) -> Iterator[dict[str, float]]:
        """Train to the end, yielding one record per step; saves and evaluates on the way."""
        started, first = time.time(), self.step
        while self.step < self.steps:
            record = self.train_step()
            record |= {"step": self.step, "tokens": self.step * self.per_step}
            record["tokens_per_s"] = (self.step - first) * self.per_step / (time.time() - started)
            if self.step % self.config.eval_every == 0 or self.step == self.steps:
                record |= self.evaluate()
            if self.rank == 0 and (self.step % self.config.save_every == 0 or self.step == self.steps):
                self.save()
            yield record

    def save(self) -> None:
        """Write checkpoint, state and the exported model; each file is replaced as a whole."""
        tensors = dict(self.model.state_dict())
        for i, optimizer in enumerate(self.optimizers):
            for j, entry in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{i}.{j}.{k}": v for k, v in entry.items() if torch.is_tensor(v)}
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / "checkpoint.part"
        save_file({k: v.contiguous() for k, v in tensors.items()}, part)
        part.replace(self.folder / "checkpoint.safetensors")
        config = {**asdict(self.config), "model": dict(self.config.model)}
        (self.folder / "state.json").write_text(json.dumps({"step": self.step, "config": config}))
        save_model(self.folder / "model", self.config.family, self.model, self.tokenizer)

    def resume(self) -> bool:
        """Continue from the run folder if it holds a checkpoint."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return False
        tensors = load_file(path)
        self.step = json.loads((self.folder / "state.json").read_text())["step"]
        names = set(self.model.state_dict())
        self.model.load_state_dict({k: v for k, v in tensors.items() if k in names})
        for i, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, torch.Tensor]] = {}
            for key, tensor in tensors.items():
                if key.startswith(f"optimizer.{i}."):
                    _, _, j, entry = key.split(".", 3)
                    state.setdefault(int(j), {})[entry] = tensor
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
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
