"""The DeepSpeed engine: ZeRO stages 0 to 3 over the processes of one run; optimiser and weights on the host if wanted.

DeepSpeed sees fp32 parameters and none of its precision sections: the objective opens autocast itself. Its fp16 and
bf16 sections cast parameters under a BatchNorm whose statistics stay fp32, and its own scaler for fp16 autocast never
moves again after an overflow and clips gradients that are still scaled. So the loss scale is kept here and handed to
ZeRO, which unscales, checks for overflow and clips with it.

On one card only stage 2 or 3 with the optimiser on the host saves memory: without it ZeRO holds the weights twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nvae_lowmem.config.sections import Profile
from nvae_lowmem.errors import ConfigError
from nvae_lowmem.model.cells import Cell
from nvae_lowmem.model.latents import Noise
from nvae_lowmem.model.nvae import NVAE
from nvae_lowmem.model.objective import LossTerms, Objective
from nvae_lowmem.training.engines.deepspeed_state import load_portable_state, portable_state
from nvae_lowmem.training.engines.distributed import initialise
from nvae_lowmem.training.engines.engine import Update
from nvae_lowmem.training.engines.gradient_gate import GradientGate
from nvae_lowmem.training.engines.host_adamax import HostAdamax
from nvae_lowmem.training.engines.torch_engine import GOOD_STEPS


class LossScale:
    """The loss scale of fp16, halved at an overflow, doubled after `GROWTH_STEPS` good steps; else 1."""

    INITIAL, SMALLEST, LARGEST = 2.0**16, 1.0, 2.0**24
    GROWTH_STEPS = 1000

    def __init__(self, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.value = self.INITIAL if dynamic else 1.0
        self.good_in_a_row = 0

    def update(self, overflow: bool) -> None:
        """Takes in whether a step overflowed."""
        if overflow:
            self.good_in_a_row = 0
            if self.dynamic:
                self.value = max(self.value / 2, self.SMALLEST)
        else:
            self.good_in_a_row += 1
            if self.dynamic and self.good_in_a_row % self.GROWTH_STEPS == 0:
                self.value = min(self.value * 2, self.LARGEST)


class ZeroEngine:
    """Engine on DeepSpeed, of one process or several; to be built, and every method called, in all of them.

    One optimiser step averages over `accumulation` micro-batches and all processes. `profile.plan` says the stage, what
    is offloaded, the buckets. Raises ConfigError for fp16 or offloading at stage 0, where DeepSpeed knows neither a
    loss scale nor partitions, and for what `initialise` refuses.
    """

    def __init__(self, objective: Objective, profile: Profile, device: torch.device, accumulation: int) -> None:
        plan, training = profile.plan, profile.training
        fp16 = objective.autocast_dtype is torch.float16
        if fp16 and plan.zero_stage == 0:
            raise ConfigError(
                "plan.precision = 'fp16' needs a loss scale, which DeepSpeed has from stage 1 on, but plan.zero_stage "
                "= 0: set plan.zero_stage = 1 or 2, or plan.engine = 'torch'"
            )
        if plan.offload_optimizer and plan.zero_stage == 0:
            raise ConfigError(
                "plan.offload_optimizer = true needs plan.zero_stage = 1, 2 or 3, not 0: set 2 for the least memory"
            )
        self.rank, self.world_size, self.device = initialise(device)
        import deepspeed

        self.stage = plan.zero_stage
        self.objective = objective
        self.scale = LossScale(dynamic=fp16)
        # at stage 0 gradients are ordinary ones and are clipped here: DeepSpeed would not tell their norm
        self._clip_norm = training.clip_norm if self.stage == 0 else 0.0
        self._gate = GradientGate(training)
        self._refused_norm: float | None = None
        self._optimizer = HostAdamax(
            [p for p in objective.parameters() if p.requires_grad],
            eps=training.adamax_eps,
            weight_decay=training.weight_decay,
        )
        if self.stage == 3:
            # A cell runs its units' parameters itself, past their forward and its hooks: DeepSpeed is to gather all of
            # a cell at once, not to find each parameter out as a stray one when it is touched.
            deepspeed.utils.set_z3_leaf_modules(objective, [Cell])
        self._engine: Any = deepspeed.initialize(
            model=objective,
            optimizer=self._optimizer,
            config=deepspeed_config(profile, accumulation),
            dist_init_required=False,
        )[0]
        if self.stage > 0 and self._gate.active:
            self._watch_norm("scaled_global_norm" if self.stage < 3 else "_get_norm_groups")

    @property
    def model(self) -> NVAE:
        """The network itself. At stage 3 its parameters are empty but within `gathered` and while a layer runs."""
        return self.objective.model

    @property
    def loss_scale(self) -> float:
        """The present loss scale; 1 but for fp16."""
        return self.scale.value

    def begin(self, learning_rate: float) -> None:
        """A step begins, at this learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if self.scale.dynamic:
            self._engine.optimizer.override_loss_scale(self.scale.value)

    def forward(self, x: Tensor, noise: Noise, beta: float, labels: Tensor | None = None) -> LossTerms:
        """One micro-batch through the objective."""
        return self._engine(x, noise, beta, labels)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of loss x loss scale / accumulation; the last micro-batch's are exchanged."""
        self._engine.backward(loss)  # divides by the accumulation, multiplies by the overridden scale
        if not last:
            self._engine.step()  # only counts the micro-batch

    def update(self) -> Update:
        """Unscale, clip (the true gradients), one Adamax step unless a gradient is not finite; gradients are freed.

        The norm is that of the true gradient before clipping, infinite for a skipped step, None at stage 0 without
        clipping.
        """
        norm: Tensor | float | None = None
        self._refused_norm = None
        if self.stage == 0 and (self._clip_norm or self._gate.active):
            norm = nn.utils.clip_grad_norm_(self.objective.parameters(), self._clip_norm or math.inf, foreach=False)
            if self._gate.refuses(float(norm)):
                self._refused_norm = float(norm)
                self._engine.zero_grad()  # Adamax passes over parameters without a gradient
        self._engine.step()
        refused = self._refused_norm is not None
        overflow = self.stage > 0 and bool(self._engine.optimizer.overflow) and not refused
        if self.stage > 0:
            norm = math.inf if overflow else self._refused_norm or self._engine.get_global_grad_norm()
        self.scale.update(overflow)
        return Update(overflow, norm, refused)

    def _watch_norm(self, method: str) -> None:
        """Let ZeRO take a norm that is too large for an overflow: then it skips the step itself."""
        zero = self._engine.optimizer
        compute = getattr(zero, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            found = compute(*args, **kwargs)
            several = isinstance(found, list)
            norm = math.sqrt(sum(float(n) ** 2 for n in found)) if several else float(found)
            if not self._gate.refuses(norm / self.loss_scale):
                return found
            self._refused_norm = norm / self.loss_scale
            infinite = torch.tensor(math.inf, device=self.device)
            return [infinite] if several else infinite

        setattr(zero, method, watched)

    def state(self) -> dict[str, Tensor]:
        """What TorchEngine.state gives, in the process of rank 0; nothing in the others, which have to call it too."""
        out = portable_state(self.model, self._optimizer, self._engine.optimizer, self.stage, collect=self.rank == 0)
        if self.rank == 0:
            out["loss_scale"] = torch.tensor(self.loss_scale)
            if self.scale.dynamic:
                out[GOOD_STEPS] = torch.tensor(self.scale.good_in_a_row)
            out |= self._gate.state()
        return out

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`, with the same state in every process."""
        load_portable_state(state, self.model, self._optimizer, self._engine.optimizer, self.stage)
        self._gate.load_state(state)
        saved = float(state.get("loss_scale", 1.0))
        if self.scale.dynamic and saved > 1.0:  # 1 comes from a run in another precision
            self.scale.value, self.scale.good_in_a_row = saved, int(state.get(GOOD_STEPS, 0))

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within it the model has all its weights and is an ordinary module, to be read and run but not trained.

        At stage 3 they take 4 bytes per parameter on the device, and changes are lost; else nothing happens.
        """
        if self.stage < 3:
            yield
            return
        import deepspeed

        offload = self._engine.optimizer.parameter_offload
        offload.partition_all_parameters()
        # DeepSpeed's hooks would give each layer's weights away again after it has run
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks.clear()
        offload.backward_hooks.clear()
        try:
            with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
                yield
        finally:
            offload._register_deepspeed_module(offload.module)

    def close(self) -> None:
        """Takes DeepSpeed's hooks off the model; the engine is of no use afterwards."""
        self._engine.destroy()


def deepspeed_config(profile: Profile, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a profile. Whatever has a costly or changing default is written out.

    Defaults that do harm on a small card: buckets of 5e8 elements (2 GB each), overlapped communication (twice the
    buckets), clipping to norm 1, page-locked buffers, and at stage 3 weights kept for reuse up to 1e9 elements.
    """
    plan, training = profile.plan, profile.training
    host = {"device": "cpu", "pin_memory": plan.pin_memory}
    zero: dict[str, Any] = {
        "stage": plan.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_scatter": True,
        "round_robin_gradients": False,
        "reduce_bucket_size": plan.bucket_elements,
        "allgather_bucket_size": plan.bucket_elements,
    }
    if plan.offload_optimizer:
        zero["offload_optimizer"] = host
    if plan.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": plan.bucket_elements * 2 // 5,
            "stage3_max_live_parameters": 2 * plan.bucket_elements,
            "stage3_max_reuse_distance": plan.bucket_elements,
            "stage3_param_persistence_threshold": plan.bucket_elements // 500,  # smaller ones stay: 10,000 elements
        }
        if plan.offload_parameters:
            zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": max(1, plan.micro_batch),  # for DeepSpeed's books only
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.clip_norm if plan.zero_stage > 0 else 0.0,
        "steps_per_print": 1_000_000_000,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
