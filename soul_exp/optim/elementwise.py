"""The base of all elementwise optimizers: state, precision, statistics and the pass over memory (kernels/)."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import kernels
from .kernels import REFRESHES, ROUNDINGS, STATISTICS, Numbers, Operands

COUNTERS = ("step", "number")  # plain integers of a tensor's state: its steps, and its number for the noise
SPARES = {"master": ("master", torch.float32), "kahan": ("compensation", torch.bfloat16)}
STATE_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Elementwise(Optimizer):
    """One pass over memory for each step, at every precision; a subclass declares its rule and its constants.

    `rounding` is how a weight is stored. "nearest": as it is; in pure bf16 a small update is lost. The others need bf16
    weights: "master" adds an fp32 copy and fp32 states, "kahan" a bf16 compensation (weight + compensation is what is
    trained, to about 2^-17 of the weight), "stochastic" rounds up or down by chance so that the mean is kept, with
    noise that (seed, step, tensor, position in the tensor) fix. Arithmetic is fp32 (fp64 for fp64), with one rounding
    at each store. States have the weight's dtype (those of `precise`: fp32), fp32 under "master", or `state_dtype`.

    With `counting` on, `step` adds to the sums of `take_statistics`. A coordinate whose gradient is NaN or infinite
    keeps its weight and is always counted; then `step` raises FloatingPointError, unless `raise_nonfinite` is off. On
    CUDA, where reading the count would stall the device, the next `step` or `take_statistics` raises.
    """

    rule: ClassVar[str]  # one of kernels.RULES
    states: ClassVar[tuple[str, ...]]  # names of momentum and, where there is one, curvature or second moment
    precise: ClassVar[tuple[str, ...]] = ()  # those that bf16 is too coarse for: fp32 unless `state_dtype` is given
    clips: ClassVar[bool] = False  # whether "won" means anything
    elementwise: ClassVar[bool] = True  # a flat shard of a tensor is updated as within the tensor

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        rounding: str = "nearest",
        state_dtype: str | None = None,
        seed: int = 0,
    ) -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding={rounding!r} is unknown: choose one of {', '.join(ROUNDINGS)}")
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype={state_dtype!r} is unknown: choose float32 or bfloat16, or leave it out")
        numbers = {name: defaults[name] for name in ("lr", "eps", "weight_decay") if name in defaults}
        if not all(value > 0 or (name, value) == ("weight_decay", 0) for name, value in numbers.items()):
            listed = ", ".join(f"{name}={value}" for name, value in numbers.items())
            raise ValueError(f"{listed}: expected positive numbers (weight_decay: or 0)")
        if not all(0 <= beta < 1 for beta in defaults.get("betas", ())):
            raise ValueError(f"betas={defaults['betas']}: expected two numbers from 0 to below 1")
        self.rounding, self.state_dtype, self.seed = rounding, STATE_DTYPES[state_dtype], seed
        self.counting = False
        self.raise_nonfinite = True
        self._sums: dict[torch.device, Tensor] = {}
        self._reported = 0.0  # non-finite coordinates that an error has reported
        self._pending: list[tuple[Tensor, torch.cuda.Event, int]] = []  # counts on their way from a CUDA device
        super().__init__(params, defaults)

    def numbers(self, group: dict[str, Any], step: int) -> Numbers:
        """The constants of step number `step`, from 1."""
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        decay, scale, eps = 1 - lr * group["weight_decay"], group.get("scale", 1.0), group.get("eps", 0.0)
        return Numbers(lr, decay, beta1, 1 - beta1, beta2, 1 - beta2, scale, eps)

    def rule_at(self, step: int) -> str:
        """The rule of the next pass over a tensor that has taken `step` steps."""
        return self.rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if self.rounding != "nearest" and p.dtype != torch.bfloat16:
                found = f"rounding={self.rounding!r} is for bfloat16 weights and these are {p.dtype}"
                raise ValueError(f"{found}: cast the model to bfloat16, or set rounding to nearest")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        self._raise_pending()
        touched = [
            (group, [(p, grad) for p in group["params"] if (grad := p.grad) is not None]) for group in self.param_groups
        ]
        for p, grad in (pair for _, pairs in touched for pair in pairs):
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"a gradient of shape {tuple(p.shape)} is sparse and {type(self).__name__} takes dense ones only: "
                    f"build the embedding with sparse=False"
                )
        steps = 0
        for group, pairs in touched:
            batches: dict[Any, list[Operands]] = defaultdict(list)  # what one call of a kernel can do
            for p, grad in pairs:
                state = self.state[p] or self._new_state(p)
                steps = int(state["step"])
                rule = self.rule_at(steps)
                key = (rule, steps, grad.get_device(), p.dtype, grad.dtype)
                batches[key].append(self._operands(p, grad, state, rule))
                if rule not in REFRESHES:
                    state["step"] = steps + 1
            for (rule, done, *_), batch in batches.items():
                numbers, sums = self.numbers(group, done + 1), self._sums_on(batch[0].grad.device)
                for kernel, part in kernels.choose(batch):
                    kernel.update(rule, numbers, part, self.rounding, sums, self.counting)
        if self.raise_nonfinite:
            self._raise_nonfinite(steps + 1)
        return loss

    def _new_state(self, p: Tensor) -> dict[str, Any]:
        """The state of `p`, made at its first pass; it holds the counters because ZeRO calls `step` once per group."""
        state: dict[str, Any] = self.state[p]
        state["step"] = 0
        for name, dtype in self._dtypes(p).items():
            state[name] = torch.zeros_like(p, dtype=dtype)
        if self.rounding == "master":
            state["master"].copy_(p)
        if self.rounding == "stochastic":
            state["number"] = len(self.state) - 1
        return state

    def _dtypes(self, p: Tensor) -> dict[str, torch.dtype]:
        """Names and dtypes of the states of `p` that have its shape."""
        own = p.dtype if p.dtype in (torch.float64, torch.float32, torch.bfloat16) else torch.float32
        own = self.state_dtype or (torch.float32 if self.rounding == "master" else own)
        least = torch.float32 if self.state_dtype is None and own == torch.bfloat16 else own
        spare = [SPARES[self.rounding]] if self.rounding in SPARES else []
        return {name: least if name in self.precise else own for name in self.states} | dict(spare)

    def _operands(self, p: Tensor, grad: Tensor, state: dict[str, Any], rule: str) -> Operands:
        h = state[self.states[1]] if len(self.states) == 2 else None
        if rule in REFRESHES:
            return Operands(grad, h=h)
        m, spare, key = state[self.states[0]], None, 0
        if self.rounding in SPARES:
            spare = state[SPARES[self.rounding][0]]
        if self.rounding == "stochastic":
            key = kernels.key_of(self.seed, state["step"], state["number"])
        return Operands(grad, p, m, h, spare, key)

    def take_statistics(self) -> Tensor:
        """[8] float64 sums over all counted steps and coordinates since the last call, in the order of STATISTICS.

        They are on the device of the weights; sum over ranks before dividing, each rank may hold its own share.
        "nonfinite" counts every step and curvature pass, the others those of steps with `counting` on.
        """
        self._raise_pending()
        device = next(iter(self._sums), torch.device("cpu"))  # not of a parameter: ZeRO-3 empties the groups
        taken = torch.zeros(len(STATISTICS), dtype=torch.float64, device=device)
        for sums in self._sums.values():
            taken += sums.to(device)
            sums.zero_()
        self._reported = 0.0
        return taken

    def _sums_on(self, device: torch.device) -> Tensor:
        if device not in self._sums:
            self._sums[device] = torch.zeros(len(STATISTICS), dtype=torch.float64, device=device)
        return self._sums[device]

    def _raise_nonfinite(self, step: int) -> None:
        """Raises FloatingPointError for counts of CPU tensors; counts of CUDA tensors are read at the next step."""
        count = 0.0
        for device, sums in self._sums.items():
            if device.type == "cuda":
                arriving = torch.empty((), dtype=torch.float64, pin_memory=True)
                arriving.copy_(sums[-1], non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(device))
                self._pending.append((arriving, event, step))
            else:
                count += float(sums[-1])
        self._raise_above(count, step)

    def _raise_pending(self) -> None:
        pending, self._pending = self._pending, []
        for arriving, event, step in pending:
            event.synchronize()  # it was recorded one step ago, and the device has passed it
            self._raise_above(float(arriving), step)

    def _raise_above(self, count: float, step: int) -> None:
        if count > self._reported:
            new, self._reported = count - self._reported, count
            total = sum(p.numel() for group in self.param_groups for p in group["params"])
            raise FloatingPointError(
                f"the gradient is NaN or infinite in {new:.0f} of {total} coordinates at step {step}: these were left "
                f"as they are; lower lr, or set raise_nonfinite to False to continue without them"
            )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but states keep their saved dtype; ValueError if they are not those that this optimizer keeps."""
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, own, strict=False):  # where their numbers differ torch raises, below
            found = {k: v.dtype for k, v in state_dict["state"].get(i, {}).items() if k not in COUNTERS}
            if found and found != self._dtypes(p):
                raise ValueError(
                    f"the saved optimizer holds {_listed(found)} and this one keeps {_listed(self._dtypes(p))}: "
                    f"give it the rounding, the state_dtype and the kind of weights that it was saved with"
                )
        super().load_state_dict(state_dict)
        for i, p in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                self.state[p][name] = int(value) if name in COUNTERS else value.to(p.device, copy=True)


def _listed(dtypes: dict[str, torch.dtype]) -> str:
    return ", ".join(f"{name} in {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())
