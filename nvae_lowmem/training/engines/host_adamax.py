"""Adamax for parameters in host memory: torch's Adamax, worked through in chunks that stay in the processor's cache.

torch's own Adamax makes one pass over memory for each of its seven element-wise operations and allocates temporaries
of the size of the parameter, which is the whole model where an engine hands it one flat partition. Here every
operation is done on one chunk before the next chunk is touched: memory is passed over once, and the only temporary is
one chunk per thread. The operations themselves are torch's, in torch's order, so the results are the same.

Threads take whole chunks, where torch would have all threads share each operation and wait for each other at its end.
On a quiet machine both are equally fast, but beside other work (data loading, the backward pass that an update
overlaps) the waiting dominates: with one busy process on 2 cores, a step on 50M parameters took 0.15 s against 1.3 s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any, NamedTuple, cast, overload

import torch
from torch import Tensor
from torch.optim.adamax import adamax as torch_adamax
from torch.optim.optimizer import ParamsT

# 2**17 fp32 elements are 2.5 MiB per thread for the four tensors and the scratch. On 2 cores the time is flat from here
# to 2**19 (within about 15 %) and 1.5 times the best at 2**16; the smallest leaves most threads room in a shared cache.
CHUNK_ELEMENTS = 1 << 17

# torch never spreads an operation on so few elements over threads, and they lie in the cache anyway: its own path is
# the quickest for such parameters (biases, BatchNorm, small convolutions: most of the list, few of the elements).
SMALL_ELEMENTS = 1 << 15


class _Work(NamedTuple):
    """The update of one parameter."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    """Parameter, gradient, exp_avg, exp_inf."""
    flat: list[Tensor] | None
    """The same as (N,) views in host memory, to be worked through in chunks; None: to be updated by torch's path."""
    step: Tensor
    group: dict[str, Any]


_Chunk = tuple[list[Tensor], int, _Work]
"""Flat tensors, the index of the chunk's first element, and what else there is to know of the update."""


class HostAdamax(torch.optim.Adamax):
    r"""Drop-in for `torch.optim.Adamax(foreach=False)` that is fast on the CPU and needs no temporary of model size.

    With g the gradient, t the step, lambda the weight decay (L2), all element-wise (Kingma and Ba, arXiv 1412.6980,
    algorithm 2, with eps inside the maximum as torch has it):

        g <- g + lambda p
        m <- beta1 m + (1 - beta1) g
        u <- max(beta2 u, |g| + eps)
        p <- p - lr / (1 - beta1^t) * m / u

    State per parameter: `step` (fp32 scalar), `exp_avg` (m) and `exp_inf` (u), both shaped and typed like the
    parameter; `state_dict` is interchangeable with torch's Adamax both ways. `p.grad` is never written to.

    Small parameters, those that are not dense in host memory with a gradient laid out alike (CUDA tensors, strided
    views), and groups with torch's `maximize`, `capturable` or `differentiable` take torch's own single-tensor path.

    Raises ValueError, as torch does, if lr, betas, eps or weight_decay is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self._group_of: dict[Tensor, int] = {}
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._group_of = {}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; return what `closure` returns, evaluated first, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        _run([self._work(parameter, group) for parameter, group in members if parameter.grad is not None])
        return loss

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor) -> None:
        """Update one parameter from its `.grad`, as `step()` would: one call for each is the same as one `step()`.

        Lets an engine update a parameter as soon as its gradient has arrived, while the backward pass goes on.
        Not to be called from two threads at once. Raises ValueError if the parameter is not in this optimizer or has
        no gradient.
        """
        if parameter.grad is None:
            raise ValueError(f"step_parameter: a parameter of shape {tuple(parameter.shape)} has no gradient")
        if parameter not in self._group_of:
            groups = enumerate(self.param_groups)
            self._group_of = {member: index for index, group in groups for member in group["params"]}
        if parameter not in self._group_of:
            raise ValueError(f"step_parameter: a parameter of shape {tuple(parameter.shape)} is not in this optimizer")
        _run([self._work(parameter, self.param_groups[self._group_of[parameter]])])

    def _work(self, parameter: Tensor, group: dict[str, Any]) -> _Work:
        """What is to be done for one parameter; makes its state if this is its first update."""
        grad = cast(Tensor, parameter.grad)
        if grad.is_sparse:
            raise RuntimeError("HostAdamax does not support sparse gradients")
        state = self.state[parameter]
        if not state:
            # Where torch's `capturable` keeps the step: beside the parameter.
            device = parameter.device if group["capturable"] else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_inf"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        tensors = (parameter, grad, state["exp_avg"], state["exp_inf"])
        special = group["maximize"] or group["capturable"] or group["differentiable"]
        by_torch = special or parameter.numel() <= SMALL_ELEMENTS
        return _Work(tensors, None if by_torch else _flat_on_host(tensors), state["step"], group)


def _flat_on_host(tensors: tuple[Tensor, ...]) -> list[Tensor] | None:
    """The tensors as flat views whose elements correspond, or None if there are no such views in host memory."""
    first = tensors[0]
    # Dimensions from outermost to innermost in memory: makes any dense layout (channels last, transposed) contiguous.
    order = sorted(range(first.dim()), key=first.stride, reverse=True)
    views = [t.detach().permute(order) for t in tensors]
    if first.is_complex() or not all(v.device.type == "cpu" and v.is_contiguous() for v in views):
        return None
    return [v.view(-1) for v in views]


def _run(work: list[_Work]) -> None:
    """Carry out the updates: large ones chunk by chunk on torch's number of threads, the others meanwhile in this."""
    chunks: deque[_Chunk] = deque()
    for item in work:
        if item.flat is not None:
            item.step.add_(1)
            chunks.extend((item.flat, start, item) for start in range(0, item.flat[0].numel(), CHUNK_ELEMENTS))
    threads = torch.get_num_threads()
    running = []
    if threads > 1:
        running = [_thread_pool(threads).submit(_update_chunks, chunks) for _ in range(min(threads, len(chunks)))]
    for item in work:
        if item.flat is None:
            _update_by_torch(item)
    if not running:
        _update_chunks(chunks)
    for future in running:
        future.result()


@cache
def _thread_pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which a torch operation does not spread over further threads."""
    started = Barrier(threads + 1)

    def keep_to_one_thread() -> None:
        torch.get_num_threads()  # the first call in a thread takes over the process's number: not to happen later
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix="host-adamax")
    for _ in range(threads):
        pool.submit(keep_to_one_thread)
    started.wait()
    torch.set_num_threads(threads)  # for this thread, and for those started after now
    return pool


def _update_chunks(chunks: deque[_Chunk]) -> None:
    """Take chunks from the queue, which several threads share, until none is left."""
    scratches: dict[torch.dtype, Tensor] = {}
    while chunks:
        try:
            flat, start, work = chunks.popleft()
        except IndexError:  # another thread took the last one
            return
        p, g, m, u = (t[start : start + CHUNK_ELEMENTS] for t in flat)  # each (<= CHUNK_ELEMENTS,)
        if p.dtype not in scratches:
            scratches[p.dtype] = torch.empty(CHUNK_ELEMENTS, dtype=p.dtype)
        scratch = scratches[p.dtype][: p.numel()]
        group = work.group
        beta1, beta2 = group["betas"]
        if group["weight_decay"] != 0:
            g = torch.add(g, p, alpha=group["weight_decay"], out=scratch)
        m.lerp_(g, 1 - beta1)
        torch.abs(g, out=scratch).add_(group["eps"])  # g is read for the last time: it may be the scratch itself
        torch.maximum(u.mul_(beta2), scratch, out=u)
        p.addcdiv_(m, u, value=-float(group["lr"]) / (1 - beta1 ** work.step.item()))


def _update_by_torch(work: _Work) -> None:
    parameter, grad, exp_avg, exp_inf = work.tensors
    group = work.group
    beta1, beta2 = group["betas"]
    torch_adamax(
        [parameter],
        [grad],
        [exp_avg],
        [exp_inf],
        [work.step],
        foreach=False,
        maximize=group["maximize"],
        differentiable=group["differentiable"],
        capturable=group["capturable"],
        has_complex=parameter.is_complex(),
        eps=group["eps"],
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
    )
