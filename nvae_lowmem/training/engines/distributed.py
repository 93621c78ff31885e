"""The processes of one run: which engine they use, how they find each other, what they exchange besides gradients.

One process is the rule; `deepspeed` (or torchrun) starts several, which then average their gradients in the deepspeed
engine. Nothing here imports DeepSpeed before it is asked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout as DEFAULT_TIMEOUT
from torch.distributed.rendezvous import rendezvous

from nvae_lowmem.config.sections import EngineName, MemoryPlan
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.model.nvae import NVAE

T = TypeVar("T")

INSTALL = 'pip install "deepspeed>=0.19,<0.20"'
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_UNSET = f"start with `deepspeed` or torchrun, or, to run one process, unset {' '.join(LAUNCHER_VARIABLES)}"
_MOST_PROCESSES = 1 << 16
SAY_SECONDS, GIVE_UP_SECONDS = 9, 300
"""Of waiting for the other processes to start: when a line says so, and when the wait ends."""


# --- which engine -----------------------------------------------------------------------------------------------------


def launched() -> bool:
    """Whether `deepspeed` or torchrun started this process. An empty RANK counts as none."""
    return bool(os.environ.get("RANK"))


def launched_processes() -> int:
    """How many processes the launcher started; 1 without one. Raises ConfigError for variables that make no sense."""
    if not launched():
        return 1
    processes = _launcher_number("WORLD_SIZE", 1, _MOST_PROCESSES, default=1)
    _launcher_number("RANK", 0, processes - 1)
    return processes


def launched_rank() -> int:
    """This process's number among those the launcher started; 0 without one. Raises ConfigError as above."""
    return _launcher_number("RANK", 0, launched_processes() - 1) if launched() else 0


def launched_card() -> int:
    """The number of this process's GPU on its machine; 0 without a launcher."""
    return _launcher_number("LOCAL_RANK", 0, _MOST_PROCESSES - 1, default=0) if launched() else 0


def _launcher_number(name: str, least: int, most: int, default: int | None = None) -> int:
    """The number in a launcher's variable. Raises ConfigError unless it is from `least` to `most`."""
    text = os.environ.get(name) or ("" if default is None else str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most):
        raise ConfigError(f"{name}={text!r} in the environment must be a whole number from {least} to {most}: {_UNSET}")
    return int(text)


def deepspeed_available() -> tuple[bool, str]:
    """Whether DeepSpeed is installed, and its version or what to do; does not import it, which takes seconds."""
    if importlib.util.find_spec("deepspeed") is None:
        return False, f"DeepSpeed is not installed ({INSTALL})"
    try:
        return True, f"DeepSpeed {importlib.metadata.version('deepspeed')}"
    except importlib.metadata.PackageNotFoundError:
        return True, "DeepSpeed of an unknown version"


def choose_engine(plan: MemoryPlan, launched_by_deepspeed: bool, device: torch.device) -> tuple[EngineName, str]:
    """The engine, "torch" or "deepspeed", and the reason to print.

    auto takes deepspeed if its launcher started this process, or for what only ZeRO stage 3 can do. Without DeepSpeed
    the torch engine runs instead. Raises ConfigError where the torch engine cannot do what was asked: several
    processes, parameters off the device.
    """
    processes = launched_processes() if launched_by_deepspeed else 1
    if plan.engine == "torch":
        if processes > 1:
            raise ConfigError(
                f"plan.engine = 'torch' runs in one process, but {processes} were started: set plan.engine = 'auto' or "
                "'deepspeed', or start one process"
            )
        return "torch", f"torch engine on {device.type}: plan.engine asks for it"
    if plan.engine == "deepspeed":
        cause = "plan.engine asks for it"
    elif launched_by_deepspeed:
        cause = f"a launcher started {processes} process{'es' if processes > 1 else ''}"
    elif plan.zero_stage == 3 or plan.offload_parameters:
        cause = "ZeRO stage 3 needs it"
    else:
        return "torch", f"torch engine on {device.type}: one process and no launcher, so DeepSpeed would add nothing"
    available, found = deepspeed_available()
    if available:
        return "deepspeed", f"deepspeed engine (ZeRO stage {plan.zero_stage}) on {device.type}: {cause}; {found}"
    if processes > 1:
        raise ConfigError(f"{processes} processes were started, which needs the deepspeed engine, but {found}")
    if plan.offload_parameters:
        raise ConfigError(f"plan.offload_parameters = true needs the deepspeed engine, but {found}")
    return "torch", f"torch engine on {device.type} in place of deepspeed ({cause}): {found}"


# --- start and end ----------------------------------------------------------------------------------------------------


def initialise(device: torch.device, local_rank: int | None = None) -> tuple[int, int, torch.device]:
    """Joins the processes of this run through DeepSpeed: (rank, number of processes, this process's device).

    local_rank: what a launcher passed as --local_rank, if it did; the LOCAL_RANK variable has precedence. Without a
    launcher this process is a run of its own. A second call changes nothing.
    Raises ConfigError if DeepSpeed cannot be used, if the launcher's variables are incomplete, if there are more
    processes than GPUs, or if the port is in use.
    """
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if not launched():
        os.environ["LOCAL_RANK"] = str(device.index or 0)  # DeepSpeed asks for it, even of a single process
    missing = [name for name in LAUNCHER_VARIABLES if not os.environ.get(name)]
    if launched() and missing:
        raise ConfigError(f"RANK is set but not {', '.join(missing)}: {_UNSET}")
    local = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise ConfigError(
                f"process {local} of this machine has no GPU of its own, there are {gpus}: start at most one process "
                "per GPU (deepspeed --num_gpus)"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    _import_deepspeed(device)
    if not dist.is_initialized():
        _join()
    return dist.get_rank(), dist.get_world_size(), device


def _import_deepspeed(device: torch.device) -> None:
    """Imports DeepSpeed so that it works on this device, quickly and quietly."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # also where there is a GPU; DeepSpeed looks once, when it is imported
    # DeepSpeed decorates functions with torch.compile as it is imported: 2 to 4 s for what nobody here calls
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        import deepspeed.ops
        from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        raise ConfigError(
            f"the deepspeed engine cannot be used: {error}: {INSTALL}, or plan.engine = 'torch'"
        ) from error
    accelerator = get_accelerator().device_name()
    if accelerator != device.type:
        raise ConfigError(
            f"DeepSpeed works on {accelerator!r} in this process, not on {device.type!r}: set DS_ACCELERATOR="
            f"{device.type} before starting"
        )
    if accelerator == "cpu":
        # Else DeepSpeed compiles an operation for inference that nobody here calls: a minute, and an endless wait if
        # an earlier build was interrupted. A lazy attribute: setting it keeps it from being computed.
        deepspeed.ops.__compatible_ops__ = {}
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    # one per exchange, hundreds in every step of stage 3
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def _is_news(record: logging.LogRecord) -> bool:
    # The untested optimiser is Adamax, which our tests hold against plain torch; overflows are in every `Update`.
    message = record.getMessage()
    return "untested optimizer" not in message and "OVERFLOW! Skipping step" not in message


def _join() -> None:
    """Makes the process group: the launcher's, or one of this process alone, which needs no port to meet at."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    store: dist.Store = _meet() if launched() else dist.HashStore()
    rank, processes = launched_rank(), launched_processes()
    backend = get_accelerator().communication_backend_name()
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=DEFAULT_TIMEOUT)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _meet() -> dist.Store:
    """The store that all processes of this run share, once every one has come.

    Says for whom it waits, and raises ConfigError after GIVE_UP_SECONDS, or where the port is in use.
    """
    rank, processes = launched_rank(), launched_processes()
    port = _launcher_number("MASTER_PORT", 1, 65535)
    where = f"{os.environ['MASTER_ADDR']}, port {port} (MASTER_ADDR, MASTER_PORT)"
    line = (
        f"process {rank} of {processes} waits for the others at {where}, up to {GIVE_UP_SECONDS} s. If nobody started "
        f"them: {_UNSET}"
    )
    teller = threading.Timer(SAY_SECONDS, print, (line,), {"file": sys.stderr, "flush": True})
    teller.daemon = True
    teller.start()
    try:
        store, _, _ = next(rendezvous("env://", rank, processes, timeout=timedelta(seconds=GIVE_UP_SECONDS)))
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                f"port {port} (MASTER_PORT), where the processes of this run are to meet, is in use: choose another "
                "with deepspeed --master_port"
            ) from None
        reason = str(error).partition("\n")[0]
        said = f"the {processes} processes of this run did not meet at {where}: {reason}; {_UNSET}"
        raise ConfigError(said) from None
    finally:
        teller.cancel()
    store.set_timeout(DEFAULT_TIMEOUT)
    return store


def shutdown() -> None:
    """Leaves the process group, if there is one; what `initialise` did can be done again."""
    if dist.is_initialized():
        if "deepspeed" in sys.modules:
            import deepspeed.comm

            deepspeed.comm.destroy_process_group()  # drops DeepSpeed's own groups too
        else:
            dist.destroy_process_group()


# --- exchange ---------------------------------------------------------------------------------------------------------


def barrier() -> None:
    """Waits until every process is here."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        # NCCL would guess the GPU, and warn
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def broadcast_object(value: T) -> T:
    """Rank 0's value in every process; it is pickled."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set in any process; every process has to call it. device: where they exchange tensors."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    found = torch.tensor(int(flag), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found.item())


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another process of this run has died or no longer answers."""
    if not dist.is_available() or not isinstance(error, RuntimeError):
        return False
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "Socket closed")
    kinds = (dist.DistNetworkError, dist.DistBackendError)
    return isinstance(error, kinds) or ("gloo" in str(error) and any(word in str(error) for word in words))


def from_first(decide: Callable[[], T]) -> T:
    """What `decide` gives in the process of rank 0, in every process; an error of a user's or of the disk, too."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return decide()
    outcome: tuple[Any, Exception | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            outcome = decide(), None
        except (ConfigError, OSError, RuntimeError) as error:
            outcome = None, error
    value, raised = broadcast_object(outcome)
    if raised is not None:
        raised.told_by_first = dist.get_rank() > 0  # type: ignore[attr-defined]
        raise raised
    return value


def largest(values: Sequence[int], device: torch.device) -> list[int]:
    """The largest of each value over all processes, every one of which has to call it."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [*values]
    found = torch.tensor(values, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


# --- BatchNorm's running statistics, which differ between processes ---------------------------------------------------


def _running_statistics(model: NVAE, frozen: bool = True) -> list[Tensor]:
    statistics = [layer.running() for layer in model.layers() if frozen or not layer.frozen]
    return [t for used in statistics if used is not None for t in (used.mean, used.variance)]


def _set_statistics(running: list[Tensor], flat: Tensor) -> None:
    for held, value in zip(running, flat.split([t.numel() for t in running]), strict=True):
        held.copy_(value)


@torch.no_grad()
def average_statistics(model: NVAE) -> None:
    """BatchNorm's running means and variances become their means over the processes, whose batches all differ.

    For evaluation; every process has to call it. Training itself reads no running statistics.
    """
    running = _running_statistics(model, frozen=False)  # the others are the same everywhere, to the last bit
    if not running or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat(running)  # one exchange in place of two per layer
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    _set_statistics(running, flat)


STATISTICS = "rank_statistics"


@torch.no_grad()
def gather_statistics(model: NVAE) -> dict[str, Tensor]:
    """The running statistics of every process, for a checkpoint: {STATISTICS: (processes, values)}, on the host.

    Every process has to call it, and all get them; empty for one process, whose statistics are the model's.
    """
    running = _running_statistics(model)
    if not running or not dist.is_initialized() or dist.get_world_size() == 1:
        return {}
    flat = torch.cat(running)
    rows = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, flat)
    return {STATISTICS: torch.stack(rows).cpu()}


def check_statistics(model: NVAE, state: Mapping[str, Tensor], where: object) -> None:
    """Raises ConfigError where gathered statistics are not this model's."""
    rows, size = state.get(STATISTICS), sum(t.numel() for t in _running_statistics(model))
    if rows is not None and (rows.ndim != 2 or rows.shape[1] != size):
        raise ConfigError(
            f"{where}: {STATISTICS} has shape {[*rows.shape]}, not (processes, {size}) as the model needs"
        )


@torch.no_grad()
def restore_statistics(model: NVAE, state: Mapping[str, Tensor]) -> None:
    """This process' running statistics out of a checkpoint; their mean where the number of processes is another."""
    rows, running = state.get(STATISTICS), _running_statistics(model)
    if rows is None or not running:
        return
    several = dist.is_initialized() and dist.get_world_size() == len(rows)
    _set_statistics(running, (rows[dist.get_rank()] if several else _mean(rows)).to(running[0].device))


def _mean(rows: Tensor) -> Tensor:
    """(values,) the mean over processes of (processes, values); where all are equal, that very number."""
    return torch.where((rows == rows[0]).all(0), rows[0], rows.mean(0))


@contextmanager
def mean_statistics(model: NVAE, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the model has the mean of gathered statistics, and after it its own again."""
    running = _running_statistics(model)
    if STATISTICS not in state:
        yield
        return
    own = torch.cat(running)
    with torch.no_grad():
        _set_statistics(running, _mean(state[STATISTICS]).to(own.device))
    try:
        yield
    finally:
        with torch.no_grad():
            _set_statistics(running, own)
