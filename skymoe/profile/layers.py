"""A model's layers, whole and by halves, and its ends: the modules of the runtime, with random weights.

A few layers of each kind are built and run in a row, as a stage of a pipeline runs them (parallel/part.py), and the
time is divided by their number: weights are then as cold as they are in training. Halves share the layers' weights.
Gradients are added to `.grad` that is there already, as they are from the second micro-batch of a step on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skymoe.model.batch import BatchInfo
from skymoe.model.init import initial_tensor
from skymoe.model.inputs import AttentionInputs, attention_inputs
from skymoe.model.recompute import recompute_layer
from skymoe.parallel.mesh import single_mesh
from skymoe.parallel.options import PartOptions
from skymoe.parallel.part import Part, ShardedLayer
from skymoe.profile.live import LiveBytes
from skymoe.profile.timing import Task
from skymoe.spec.layout import Half, Layout
from skymoe.spec.model import ModelSpec
from skymoe.spec.split import Split

PIECES = ("layer", "attention", "feed_forward")


@dataclass(frozen=True)
class Batch:
    """What is run.

    Attributes:
        sequence_length, micro_batch: tokens and sequences.
        precision: of matrix products, by autocast; fp32 is without.
        device: where.
        seed: of weights and tokens.
    """

    sequence_length: int
    micro_batch: int
    precision: torch.dtype
    device: torch.device
    seed: int

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.sequence_length * self.micro_batch

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision is torch.bfloat16)


class Pieces:
    """Layers of each kind, embedding, head: built on one device, ready to run.

    Attributes:
        kinds: the ids of the layers that are built, by whether they are MoE layers.
        part: the whole model; what is not needed has no memory.
    """

    def __init__(self, spec: ModelSpec, batch: Batch, num_layers: int) -> None:
        self._spec, self._batch = spec, batch
        layout, device = Layout(stages=Split((2 * spec.num_layers,))), batch.device
        mesh = single_mesh(layout, device)
        self._options = PartOptions(num_tokens=batch.num_tokens)
        with torch.device("meta"):
            self.part = Part(spec, mesh, 0, self._options)
        self.kinds = kinds_of(spec, num_layers)
        built: dict[str, nn.Module] = {f"layers.{i}.": self.part.layers[str(i)] for i in sum(self.kinds.values(), [])}
        built |= {name: module for name, module in self._ends()}
        for prefix, module in built.items():
            module.to_empty(device=device)
            _initialize(spec, module, prefix, batch.seed)
        with torch.device("meta"):
            self._halves = {
                (layer, is_attention): ShardedLayer(spec, mesh, layer, (Half(layer, is_attention),), self._options)
                for ids in self.kinds.values()
                for layer in ids
                for is_attention in (True, False)
            }
        for (layer, _), half in self._halves.items():
            for name, _ in list(half.named_children()):
                setattr(half, name, getattr(self.part.layers[str(layer)], name))
        generator = torch.Generator().manual_seed(batch.seed)
        drawn = torch.randint(0, spec.vocab_size, (2, batch.micro_batch, batch.sequence_length), generator=generator)
        self._tokens_BT, self._targets_BT = drawn.to(device)

    def tasks(self) -> dict[str, Task]:
        """By name: `moe.layer`, `moe.layer.again`, `dense.attention`, .., `embedding`, `head`."""
        found = {}
        for is_moe in self.kinds:
            for piece in PIECES:
                for again in (False, True):
                    found[task_name(is_moe, piece, again)] = Task(self._row(is_moe, piece, again))
        return {**found, "embedding": Task(self.embedding), "head": Task(self.head)}

    def kept(self) -> dict[str, float]:
        """Bytes that each task keeps from forward to backward, weights apart; of a row, per layer."""
        found = {}
        for is_moe, ids in self.kinds.items():
            for piece in PIECES:
                for again in (False, True):
                    run = self._row(is_moe, piece, again)
                    run().sum().backward()  # gradients are there
                    found[task_name(is_moe, piece, again)] = kept_bytes(run) / len(ids)
        self.embedding().sum().backward()
        self.head().backward()
        return {**found, "embedding": kept_bytes(self.embedding), "head": kept_bytes(self.head)}

    def embedding(self) -> Tensor:
        """Rows of the table."""
        with self._batch.autocast():
            return self.part.embedded(self._tokens_BT)

    def head(self) -> Tensor:
        """Last norm, head, loss."""
        with self._batch.autocast():
            return self.part.loss(self._input(), self._targets_BT)

    def _input(self) -> Tensor:
        shape = self._batch.num_tokens, self._spec.hidden_size
        return torch.randn(shape, device=self._batch.device, requires_grad=True)

    def _row(self, is_moe: bool, piece: str, again: bool) -> Callable[[], Tensor]:
        ids = self.kinds[is_moe]
        if piece == "layer":
            modules: Sequence[nn.Module] = [self.part.layers[str(layer)] for layer in ids]
        else:
            modules = [self._halves[layer, piece == "attention"] for layer in ids]
        inputs = attention_inputs(self._spec, self._batch.sequence_length, BatchInfo(), None, self._batch.device)
        return lambda: self._through(modules, inputs, again)

    def _through(self, modules: Sequence[nn.Module], inputs: AttentionInputs, again: bool) -> Tensor:
        x_ND = self._input()
        with self._batch.autocast():
            for module in modules:
                x_ND = (
                    recompute_layer(module, x_ND, inputs, BatchInfo()) if again else module(x_ND, inputs, BatchInfo())
                )[0]
        return x_ND

    def _ends(self) -> list[tuple[str, nn.Module]]:
        names = ["embed", "norm"] if self._spec.tie_embeddings else ["embed", "norm", "head"]
        return [(f"{name}.", self.part.get_submodule(name)) for name in names]


def task_name(is_moe: bool, piece: str, again: bool) -> str:
    """Of a row of layers or halves."""
    return f"{'moe' if is_moe else 'dense'}.{piece}{'.again' if again else ''}"


def kinds_of(spec: ModelSpec, num_layers: int) -> dict[bool, list[int]]:
    """The first layers of each kind: dense ones (False), MoE ones (True)."""
    kinds: dict[bool, list[int]] = {}
    for layer in range(spec.num_layers):
        kinds.setdefault(spec.is_moe_layer(layer), []).append(layer)
    return {is_moe: ids[:num_layers] for is_moe, ids in kinds.items()}


def kept_bytes(forward: Callable[[], Tensor]) -> float:
    """What is alive after `forward` and was not before, less its result."""
    with LiveBytes() as live:
        out = forward()
        kept = live.now - out.untyped_storage().nbytes()
    del out
    return float(kept)


@torch.no_grad()
def _initialize(spec: ModelSpec, module: nn.Module, prefix: str, seed: int) -> None:
    tensors: Mapping[str, Tensor] = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        tensor.copy_(initial_tensor(spec, prefix + name, tuple(tensor.shape), seed))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
