"""Post-training quantization unit by unit: affine grids found by search, then learned rounding and learned steps."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from bdm_cli.quant.layers import QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import Lsq, Quantizer, Term
from bdm_cli.quant.ste import lsq_ste
from bdm_cli.quant.swap import quantized_layers

Start = Literal["search", "min-max"]

SHRINKS = 80
"""Ranges that the search tries, each a hundredth of the first narrower than the one before."""

NORM = 2.4
"""Power of the error that the search and the steps of activations minimise (Q-Diffusion's released code)."""

LOW, STRETCH = -0.1, 1.2
"""AdaRound's stretched sigmoid (arXiv:2004.10568): STRETCH * sigmoid(V) + LOW, clipped to [0, 1]."""

SHARP_FIRST, SHARP_LAST = 20, 2
"""AdaRound's exponent b at its first and last use."""

SMALLEST = 1e-8
"""No step size is below this one, so that silent channels stay finite."""

TOLD_EVERY = 100
"""Iterations between two reports of a loss, which wait for the device."""


# ---- affine grids --------------------------------------------------------------------------------------------------


def affine_range(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step size and zero point of each row whose grid covers [min, max], 0 included.

    s = (max - min) / (2^b - 1), z = round(-min / s), with min <= 0 <= max, so that z is one of the levels.
    Shapes: rows [G, n]; s and z [G].
    """
    return _covering(*_ends(rows), bits)


def affine_search(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As affine_range, of f [min, max] with the factor f = 1 - 0.01 i, i = 0..79, of the least mean |q(x) - x|^2.4, row
    by row."""
    ends, best = _ends(rows), torch.full_like(rows[:, 0], torch.inf)
    s, z = _covering(*ends, bits)
    for i in range(SHRINKS):
        step, zero = _covering(*(end * (1 - 0.01 * i) for end in ends), bits)
        levels = (rows / step[:, None]).add_(zero[:, None]).round_().clamp_(0, 2**bits - 1)
        error = levels.sub_(zero[:, None]).mul_(step[:, None]).sub_(rows).abs_().pow_(NORM).mean(1)
        better = error < best
        best, s, z = (torch.where(better, *pair) for pair in ((error, best), (step, s), (zero, z)))
    return s, z


def _ends(rows: Tensor) -> tuple[Tensor, Tensor]:
    low, high = rows.aminmax(dim=1)
    return low.clamp_max(0), high.clamp_min(0)


def _covering(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    s = ((high - low) / (2**bits - 1)).clamp_min(SMALLEST)
    return s, (-low / s).round()


class AffineWeight(Quantizer):
    """Weights on an asymmetric grid per output channel, fixed once found (Q-Diffusion, arXiv:2302.04304).

    q(w) = s (clip(round(w / s + z), 0, 2^b - 1) - z); s and z by affine_search. dq/dw = 1 inside the range, 0 outside.
    split: the input channels before and from this one have grids of their own (the paper's split shortcuts).

    Shapes: w [C_out, C_in, ...]; scale, zero_point [C_out, 1, ...], split [C_out, 2, ...].
    State: scale, zero_point (buffers); scale is NaN until calibrate_ has seen the weights.
    """

    def __init__(self, bits: int, shape: Sequence[int], split: int = 0) -> None:
        super().__init__()
        self.bits = bits
        self.widths = [split, shape[1] - split] if split else [shape[1]]
        size = (shape[0], len(self.widths), *[1] * (len(shape) - 2))
        self.register_buffer("scale", torch.full(size, torch.nan))
        self.register_buffer("zero_point", torch.zeros(size))

    @property
    def waiting(self) -> bool:
        return bool(self.scale.isnan().any())

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        """x: the weights."""
        for i, part in enumerate(x.split(self.widths, 1)):
            s, z = affine_search(part.flatten(1), self.bits)
            self.scale[:, i] = s.view_as(self.scale[:, i])
            self.zero_point[:, i] = z.view_as(self.scale[:, i])

    def steps(self) -> tuple[Tensor, Tensor]:
        """scale and zero_point, to be broadcast against the weights."""
        if len(self.widths) == 1:
            return self.scale, self.zero_point
        rest = self.scale.shape[2:]
        s, z = (
            torch.cat([t[:, i : i + 1].expand(-1, width, *rest) for i, width in enumerate(self.widths)], 1)
            for t in (self.scale, self.zero_point)
        )
        return s, z

    def forward(self, weight: Tensor) -> Tensor:
        s, z = self.steps()
        return lsq_ste(weight, s, z, 0, 2**self.bits - 1)

    def terms(self, weight: Tensor) -> list[Term]:
        if len(self.widths) > 1:
            raise NotImplementedError("its two ranges of input channels have scales of their own")
        levels = (weight / self.scale + self.zero_point).round().clamp(0, 2**self.bits - 1) - self.zero_point
        return [Term(self.bits, 0, levels, self.scale.flatten(), self.zero_point.flatten())]

    def stored(self) -> int:
        """Scales; a zero point is an integer of as few bits as a weight."""
        return self.scale.numel()

    def extra_repr(self) -> str:
        return f"bits={self.bits}" + (f", split={self.widths[0]}" if len(self.widths) > 1 else "")


class AffineActivation(Lsq):
    """Activations on an asymmetric grid per tensor, whose zero point is fixed while its step is learned.

    q(x) = s (clip(round(x / s + z), 0, 2^b - 1) - z); gradients as in Lsq, without LSQ's scaling of dq/ds.
    State: scale (parameter), zero_point (buffer), both set by calibrate_ from one batch, by search or from min and max.
    """

    def __init__(self, bits: int, start: Start = "search") -> None:
        super().__init__(bits, signed=False)
        self.start = start

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        find = affine_search if self.start == "search" else affine_range
        s, z = find(x.reshape(1, -1), self.bits)
        self.scale.copy_(s[0])
        self.zero_point.copy_(z[0])

    def forward(self, x: Tensor) -> Tensor:
        return lsq_ste(x, self.scale, self.zero_point, self.low, self.high)


# ---- learned rounding ----------------------------------------------------------------------------------------------


class SoftRounding(nn.Module):
    """AdaRound (arXiv:2004.10568): weights between their two neighbours on the grid of an AffineWeight.

    q(w) = s (clip(floor(w / s) + h(V) + z, 0, 2^b - 1) - z), h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1).
    V starts so that h is the fraction of w / s; it alone is learned. Shapes: V (`logit`) as w.
    """

    def __init__(self, quantizer: AffineWeight, weight: Tensor) -> None:
        super().__init__()
        self.s, self.z = quantizer.steps()
        self.high = 2**quantizer.bits - 1
        position = weight.detach() / self.s
        self.below = position.floor()
        share = (position - self.below - LOW) / STRETCH
        self.below += self.z
        self.logit = nn.Parameter((share / (1 - share)).log())

    def share(self) -> Tensor:
        """h(V): how far up each weight is."""
        return (STRETCH * self.logit.sigmoid() + LOW).clamp(0, 1)

    def forward(self, weight: Tensor) -> Tensor:
        return self._on_grid(self.share())

    def penalty(self, b: float) -> Tensor:
        """sum (1 - |2 h - 1|^b): 0 where every weight has made its choice."""
        return (1 - (2 * self.share() - 1).abs() ** b).sum()

    def rounded(self) -> Tensor:
        """The weights with the choices made: up where V >= 0."""
        return self._on_grid(self.logit >= 0)

    def _on_grid(self, up: Tensor) -> Tensor:
        return self.s * ((self.below + up).clamp(0, self.high) - self.z)


def sharpness(i: int, iterations: int, free: float) -> float | None:
    """AdaRound's exponent b at iteration i (from 1): None in the first share `free`, then from 20 to 2 along a line."""
    first = free * iterations
    if i < first:
        return None
    return SHARP_LAST + (SHARP_FIRST - SHARP_LAST) * max(0.0, 1 - (i - first) / max(iterations - first, 1e-9))


def distance(output: Tensor, target: Tensor, power: float) -> Tensor:
    """|output - target|^power, summed over channels and averaged over all else.

    Shapes: [N, C, H, W], [N, L, C] or [N, C].
    """
    return (output - target).abs().pow(power).sum(1 if output.dim() == 4 else -1).mean()


# ---- what a unit is learned from -----------------------------------------------------------------------------------

TARGET = "(output)"
"""No argument has this name."""


class Examples(NamedTuple):
    """A unit's inputs and what it should put out, for many images.

    stacked: by position or name, tensors whose first axis counts the images; fixed: all other arguments.
    """

    stacked: dict[int | str, Tensor]
    fixed: dict[int | str, Any]
    targets: Tensor

    def draw(self, n: int, random: torch.Generator, device: torch.device) -> tuple[list, dict[str, Any], Tensor]:
        """(positional arguments, named arguments, targets) of n of the images, none twice; of all if they are fewer."""
        chosen = torch.randperm(len(self.targets), generator=random)[:n]
        inputs = self.fixed | {key: _rows(tensor, chosen, device) for key, tensor in self.stacked.items()}
        positions = sorted(key for key in inputs if isinstance(key, int))
        named = {key: value for key, value in inputs.items() if isinstance(key, str)}
        return [inputs[key] for key in positions], named, _rows(self.targets, chosen, device)


def _rows(tensor: Tensor, chosen: Tensor, device: torch.device) -> Tensor:
    return tensor[chosen.to(tensor.device)].to(device)


@torch.no_grad()
def examples(
    unit: str, teacher: nn.Module, student: nn.Module | None, calls: Sequence[Tensor], chosen: Tensor, batch: int
) -> Examples:
    """What reaches a unit (dotted name) in calls of the networks, and what it makes of it in the teacher.

    student: whose inputs are taken; None: the teacher's. calls: the networks' positional arguments of all images, of
    which the images `chosen` are run, `batch` at once. The result lies on the networks' device if it fills less than
    half of the memory left there, else in the CPU's.
    """
    device = next(teacher.parameters()).device
    stacked, fixed = {}, {}
    for at in range(0, len(chosen), batch):
        images = chosen[at : at + batch]
        call = [part[images].to(device) for part in calls]
        inputs, output = _reaching(teacher, unit, call, after=True)
        if student is not None:
            inputs, _ = _reaching(student, unit, call, after=False)
        seen = inputs | {TARGET: output}
        per_image = {k: v for k, v in seen.items() if isinstance(v, Tensor) and v.dim() and len(v) == len(images)}
        fixed |= {k: v for k, v in seen.items() if k not in per_image}
        if not stacked:
            place = _place(device, sum(v[0].nbytes for v in per_image.values()) * len(chosen))
            for k, v in per_image.items():
                stacked[k] = torch.empty((len(chosen), *v.shape[1:]), dtype=v.dtype, device=place)
        for k, v in per_image.items():
            stacked[k][at : at + batch] = v
    targets = stacked.pop(TARGET)
    return Examples(stacked, fixed, targets)


def _place(device: torch.device, n_bytes: int) -> torch.device:
    if device.type != "cuda":
        return torch.device("cpu")
    torch.cuda.empty_cache()  # what the last unit left counts as taken otherwise
    return device if 2 * n_bytes < torch.cuda.mem_get_info(device)[0] else torch.device("cpu")


class _Reached(Exception):  # noqa: N818
    """Ends a network's forward at the unit that was waited for."""


def _reaching(
    net: nn.Module, unit: str, call: Sequence[Tensor], after: bool
) -> tuple[dict[int | str, Any], Tensor | None]:
    """The unit's arguments by position or name, and its output if `after`, in one call of the network."""
    seen = {}

    def hook(module: nn.Module, arguments: tuple, options: dict, output: Tensor | None = None) -> None:
        seen["inputs"], seen["output"] = dict(enumerate(arguments)) | options, output
        raise _Reached

    module = net.get_submodule(unit)
    register = module.register_forward_hook if after else module.register_forward_pre_hook
    handle = register(hook, with_kwargs=True)
    try:
        net(*call)
    except _Reached:
        return seen["inputs"], seen["output"]
    finally:
        handle.remove()
    raise ValueError(f"the network's forward does not reach {unit}")


@torch.no_grad()
def in_forward_order(net: nn.Module, names: Iterable[str], call: Sequence[Tensor]) -> list[str]:
    """These modules in the order in which one call of the network reaches them. Raises: ValueError if one is not."""
    names, order = list(names), []
    handles = [
        net.get_submodule(name).register_forward_pre_hook(lambda module, inputs, name=name: order.append(name))
        for name in names
    ]
    try:
        net(*call)
    finally:
        for handle in handles:
            handle.remove()
    if sorted(order) != sorted(names):
        raise ValueError(f"not reached once each in a forward: {sorted(set(names) ^ set(order)) or order}")
    return order


@contextmanager
def real_activations(net: nn.Module) -> Iterator[None]:
    """With every activation quantizer out of the way, those of attentions included."""
    weights = {layer.weight_quantizer for _, layer in quantized_layers(net)}
    taken = [
        (module, name, child)
        for module in net.modules() if not isinstance(module, Quantizer)
        for name, child in module.named_children() if isinstance(child, Quantizer) and child not in weights
    ]  # fmt: skip
    for module, name, _ in taken:
        setattr(module, name, nn.Identity())
    try:
        yield
    finally:
        for module, name, child in taken:
            setattr(module, name, child)


# ---- learning ------------------------------------------------------------------------------------------------------

Tell = Callable[[int, float], None]
"""tell(iterations done since the last time, loss of the last one)."""


def learn_rounding_(
    unit: nn.Module, data: Examples, iterations: int, batch: int, lr: float, weight: float, free: float,
    random: torch.Generator, tell: Tell,
) -> float:  # fmt: skip
    """Round the weights of a unit's layers, in place, so that it puts out what it should: AdaRound (arXiv:2004.10568),
    over a whole unit as BRECQ has it (arXiv:2102.05426). Returns the seconds that an iteration took.

    loss = squared error, summed over channels and averaged + weight * sum over the layers of SoftRounding.penalty(b),
    without the second part in the first share `free` of the iterations. Adam over all V. Afterwards the weights lie on
    their grids, where their AffineWeights leave them.
    """
    layers = [layer for _, layer in quantized_layers(unit)]
    hard = [layer.weight_quantizer for layer in layers]
    soft = [SoftRounding(layer.weight_quantizer, layer.weight) for layer in layers]

    def loss(i: int) -> Tensor:
        arguments, options, target = data.draw(batch, random, layers[0].weight.device)
        error = distance(unit(*arguments, **options), target, 2.0)
        b = sharpness(i, iterations, free)
        return error if b is None else error + weight * sum(rounding.penalty(b) for rounding in soft)

    _give_(layers, soft)
    try:
        optimizer = torch.optim.Adam([rounding.logit for rounding in soft], lr)
        iteration_s = _descend_(optimizer, iterations, loss, tell)
    finally:
        _give_(layers, hard)
    with torch.no_grad():
        for layer, rounding in zip(layers, soft, strict=True):
            layer.weight.copy_(rounding.rounded())
    return iteration_s


def _give_(layers: Sequence[QuantConv2d | QuantLinear], quantizers: Sequence[nn.Module]) -> None:
    for layer, quantizer in zip(layers, quantizers, strict=True):
        layer.weight_quantizer = quantizer


def learn_steps_(
    unit: nn.Module, data: Examples, iterations: int, batch: int, lr: float, random: torch.Generator, tell: Tell
) -> float:
    """Learn the step sizes of a unit's activations, in place: Adam, its rate to 0 along a cosine. Returns the seconds
    that an iteration took.

    loss = |error|^2.4, summed over channels and averaged.
    """
    steps = [module.scale for module in unit.modules() if isinstance(module, AffineActivation)]
    optimizer = torch.optim.Adam(steps, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(iterations, 1))

    def loss(i: int) -> Tensor:
        arguments, options, target = data.draw(batch, random, steps[0].device)
        return distance(unit(*arguments, **options), target, NORM)

    def after() -> None:
        schedule.step()
        for step in steps:
            step.clamp_(min=SMALLEST)

    iteration_s = _descend_(optimizer, iterations, loss, tell, after)
    for step in steps:
        step.grad = None
    return iteration_s


def _descend_(
    optimizer: torch.optim.Optimizer, iterations: int, loss: Callable[[int], Tensor], tell: Tell,
    after: Callable[[], None] = lambda: None,
) -> float:  # fmt: skip
    """Lower loss(i), i = 1, 2, ..., and return the seconds that one took. Raises: FloatingPointError if it is not
    finite."""
    parameters, told, start = optimizer.param_groups[0]["params"], 0, time.monotonic()
    for i in range(1, iterations + 1):
        value = loss(i)
        optimizer.zero_grad()
        value.backward(inputs=parameters)
        optimizer.step()
        with torch.no_grad():
            after()
        if i % TOLD_EVERY == 0 or i == iterations:
            if not value.isfinite():
                raise FloatingPointError(f"its loss is {value.item()} at iteration {i}")
            tell(i - told, value.item())
            told = i
    return (time.monotonic() - start) / max(iterations, 1)
