"""What a call of a network takes, found out on the meta device: bytes that are alive at once, and arithmetic.

Every tensor that an operation makes counts from then on until nothing holds it, which for what a gradient needs is the
backward pass. Attention counts as a fused kernel does (2205.14135): it keeps its inputs, its output and a number for
each query, and no scores. What is left out: workspaces of kernels, and what an allocator loses between blocks.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary


@dataclass(frozen=True)
class Cost:
    """Of a call: the most bytes alive at once besides what was there before, and floating-point operations."""

    bytes: int
    flops: int

    def times(self, factor: float) -> "Cost":
        """Of so many times as many rows."""
        return Cost(round(factor * self.bytes), round(factor * self.flops))


class Metered(TorchDispatchMode):
    """While entered, counts the bytes of tensors that are made, `now` and the `most` at once, and `flops`.

    Tensors that share memory with those `known` before do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = self.flops = 0
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
        self._seen[storage] = weakref.finalize(storage, self._let_go, size)
        self.now += size
        self.most = max(self.most, self.now)

    def _let_go(self, size: int) -> None:
        self.now -= size


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
    with torch.no_grad():
        (call or network)(**asked)  # some networks keep tables of positions from their first call on
    metered = Metered(_held(network, asked))
    with torch.no_grad(), metered, _fused(metered):
        (call or network)(**asked)
    return Cost(metered.most, metered.flops)


def learned(network: nn.Module, asked: Mapping[str, Any]) -> Cost:
    """Of a call of `network`, on the meta device, and its backward pass; the gradients of weights are there before."""
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    metered = Metered(_held(network, asked))
    with metered, _fused(metered):
        made = [one for one in tree_leaves(network(**asked)) if isinstance(one, Tensor) and one.requires_grad]
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
