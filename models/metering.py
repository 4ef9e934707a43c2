"""What a call of a network takes, found out on the meta device: bytes that are alive at once, and arithmetic.

Every tensor that an operation makes counts from then on until nothing holds it, which for what a gradient needs is the
backward pass. Attention counts as a fused kernel does (2205.14135): it keeps its inputs, its output and a number for
each query, and no scores. What is left out: workspaces of kernels, and what an allocator loses between blocks.

Of many blocks that are alike four are run. The others, which would come before the last of them, keep as much for the
backward pass and compute as much, in either direction, as the third one.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from models.layers import Backbone

_RUN = 4
"""Of blocks that are alike: the input of the first may need no gradient and is let go in the second, the third is as
all, the last ends them."""


@dataclass(frozen=True)
class Cost:
    """Of a call: the most bytes alive at once besides what was there before, and floating-point operations."""

    bytes: int
    flops: int

    def times(self, factor: float) -> "Cost":
        """Of so many times as many rows."""
        return Cost(round(factor * self.bytes), round(factor * self.flops))


class Metered(TorchDispatchMode):
    """While entered, counts the bytes of tensors that are made, `now` and the `most` at once, and `flops`; `returning`
    is whether the backward pass has begun.

    Tensors that share memory with those `known` before do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = self.flops = 0
        self.returning = False
        self._seen = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = weakref.finalize(storage, self.let_go, size)
        self.hold(size)

    def hold(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def let_go(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Run:
    """The second and the third of blocks that are alike, and how many of them are left out."""

    blocks: tuple[nn.Module, nn.Module]
    missing: int


@contextlib.contextmanager
def shortened(network: nn.Module) -> Iterator[list[Run]]:
    """Within the block `network` has four of any more blocks in a row that are alike; our own networks, whose blocks
    may belong to the layers of a language model, keep theirs."""
    whole, runs = [], []
    for parent in [] if isinstance(network, Backbone) else list(network.modules()):
        for name, blocks in list(parent.named_children()):
            if not isinstance(blocks, nn.ModuleList):
                continue
            kept: list[nn.Module] = []
            for alike in (list(found) for _, found in groupby(blocks, _form)):
                if len(alike) > _RUN:
                    runs.append(Run((alike[1], alike[2]), len(alike) - _RUN))
                    alike = [*alike[: _RUN - 1], alike[-1]]
                kept += alike
            if len(kept) < len(blocks):
                whole.append((parent, name, blocks))
                setattr(parent, name, nn.ModuleList(kept))
    try:
        yield runs
    finally:
        for parent, name, blocks in whole:
            setattr(parent, name, blocks)


def _form(block: nn.Module) -> tuple[Any, ...]:
    """What is equal of blocks that compute alike, with an adapter or without."""
    named = ((name.replace(".base_layer", ""), value.shape) for name, value in block.named_parameters())
    return type(block), *(each for each in named if ".lora_" not in each[0])


class _Missing:
    """Lets `metered` count the blocks that are missing of a run, between its third block and its last."""

    def __init__(self, metered: Metered, missing: int) -> None:
        self.metered, self.missing = metered, missing
        self.now = self.flops = self.held = 0

    def passed(self, place: int, block: nn.Module, given: Any, made: Any) -> Any:
        """A forward hook of both blocks."""
        metered = self.metered
        if metered.returning:  # it is computed once more for its gradient
            return made
        if place == 1:
            self.held = self.missing * (metered.now - self.now)
            metered.hold(self.held)
            metered.flops += self.missing * (metered.flops - self.flops)
        self.now, self.flops = metered.now, metered.flops
        leaves, structure = tree_flatten(made)
        learning = [place for place, one in enumerate(leaves) if isinstance(one, Tensor) and one.requires_grad]
        if learning:
            marked = _Mark.apply(partial(self.returned, place), *(leaves[one] for one in learning))
            leaves = [*leaves]
            for one, tensor in zip(learning, marked, strict=True):
                leaves[one] = tensor
        return tree_unflatten(leaves, structure)

    def returned(self, place: int) -> None:
        """The gradient has come to the end of the first or the second of both."""
        metered = self.metered
        if place == 1:
            metered.let_go(self.held)
        else:
            metered.flops += self.missing * (metered.flops - self.flops)
        self.flops = metered.flops


class _Mark(torch.autograd.Function):
    """Its inputs, and a call when their gradient passes."""

    @staticmethod
    def forward(ctx: Any, passed: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.passed = passed
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.passed()
        return None, *gradients


@contextlib.contextmanager
def _counted(metered: Metered, runs: Sequence[Run]) -> Iterator[None]:
    """Within the block what is missing counts."""
    hooks = []
    for run in runs:
        missing = _Missing(metered, run.missing)
        hooks += [each.register_forward_hook(partial(missing.passed, place)) for place, each in enumerate(run.blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _fused(metered: Metered) -> Iterator[None]:
    """Within the block attention is that of a fused kernel."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Tensor:
        pairs = query.shape.numel() // query.shape[-1] * key.shape[-2]
        products = 2 * pairs * (query.shape[-1] + value.shape[-1])
        metered.flops += products
        return _Attention.apply(query, key, value, metered, products)

    real = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


class _Attention(torch.autograd.Function):
    """Its backward pass computes the scores once more, and then four products (2205.14135, algorithm 4)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, metered: Metered, products: int) -> Tensor:
        heard = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, heard, query.new_empty(query.shape[:-1], dtype=torch.float32))
        ctx.metered, ctx.products = metered, products
        return heard

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        ctx.metered.flops += 5 * ctx.products // 2
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


def painted(network: nn.Module, asked: Mapping[str, Any], call: Callable[..., Any] | None = None) -> Cost:
    """Of a call of `network`, or another `call` of it, on the meta device, without a gradient."""
    with torch.no_grad(), shortened(network) as runs:
        (call or network)(**asked)  # some networks keep tables of positions from their first call on
        metered = Metered(_held(network, asked))
        with metered, _fused(metered), _counted(metered, runs):
            (call or network)(**asked)
    return Cost(metered.most, metered.flops)


def learned(network: nn.Module, asked: Mapping[str, Any]) -> Cost:
    """Of a call of `network`, on the meta device, and its backward pass; the gradients of weights are there before."""
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    metered = Metered(_held(network, asked))
    with shortened(network) as runs, metered, _fused(metered), _counted(metered, runs):
        made = [one for one in tree_leaves(network(**asked)) if isinstance(one, Tensor) and one.requires_grad]
        metered.returning = True
        torch.autograd.backward(made, [torch.empty_like(one) for one in made])
    return Cost(metered.most, metered.flops)


def size(module: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Bytes of the weights and buffers of `module`, with its floating-point ones in `dtype`."""
    return sum(
        tensor.numel() * (dtype if dtype and tensor.is_floating_point() else tensor.dtype).itemsize
        for tensor in (*module.parameters(), *module.buffers())
    )


def _held(network: nn.Module, asked: Mapping[str, Any]) -> list[Tensor]:
    """What is there before the call."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    given = [one for one in tree_leaves(dict(asked)) if isinstance(one, Tensor)]
    return [*network.parameters(), *network.buffers(), *gradients, *given]
