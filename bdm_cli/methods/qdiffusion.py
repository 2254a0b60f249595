"""Q-Diffusion (ICCV 2023, arXiv:2302.04304; released code Xiuyu-Li/q-diffusion): quantization after training."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, distributed, nn

from bdm_cli import output
from bdm_cli.diffusion.sampling import times
from bdm_cli.errors import BdmError
from bdm_cli.methods.base import Keeper, Layer, Method, closed
from bdm_cli.quant.layers import QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import Grid, Quantizer
from bdm_cli.quant.reconstruction import (
    AffineActivation,
    AffineWeight,
    Start,
    Tell,
    examples,
    in_forward_order,
    learn_rounding_,
    learn_steps_,
    real_activations,
)
from bdm_cli.quant.swap import Site, quantized_layers

FewBits = Literal[2, 3, 4, 5, 6, 7, 8]

WHOLE = re.compile(r"\.(resnets|transformer_blocks|downsamplers|upsamplers)\.\d+$")
"""Modules that are one unit whatever they hold, as is every attention outside of them. (LDM-8's samplers are ResBlocks;
others hold one layer.)"""

DONE = "units_done"
"""In what is kept of a calibration: how many units are finished, beside the student's own tensors."""


class SplitActivation(Quantizer):
    """Channels before and from `split` on, each range on its own grid (Q-Diffusion's split shortcut quantization).

    q(x) = [q_1(x[:, :split]), q_2(x[:, split:])]. With a weight that is split as well, the two partial products add up
    inside the one convolution. Shapes: x [N, C, H, W]. State: that of its two AffineActivations.
    """

    def __init__(self, bits: int, split: int, start: Start) -> None:
        super().__init__()
        self.bits, self.split = bits, split
        self.below, self.skip = AffineActivation(bits, start), AffineActivation(bits, start)

    @property
    def waiting(self) -> bool:
        return self.below.waiting or self.skip.waiting

    def calibrate_(self, x: Tensor) -> None:
        self.below.calibrate_(x[:, : self.split])
        self.skip.calibrate_(x[:, self.split :])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.below(x[:, : self.split]), self.skip(x[:, self.split :])], 1)

    def grid(self, times: Sequence[float] | None = None) -> Grid:
        raise NotImplementedError("its two channel ranges have step sizes of their own")


@closed
class QDiffusion(Method):
    """Affine weights whose rounding is learned, then affine activations whose steps are learned, unit by unit.

    A unit is a ResBlock, an attention, a transformer block, or any other quantized layer by itself. They come in the
    order of the forward. Each is learned in two passes over the network:
    1. rounding of weights (reconstruction.learn_rounding_), with real activations everywhere, on inputs that come
       through the units quantized before it, towards the teacher's output;
    2. steps of activations (learn_steps_), after all start from one forward of the quantized network, on the teacher's
       own inputs, towards the teacher's output (released code: it leaves `asym` at its default there).
    Everything happens in calibrate_: the recipe's train.steps is 0. The data are the teacher's calls along trajectories
    of the recipe's own sampler (train.batch images each). Biases stay real.

    weight_bits: of all but the edges' weights, which have edge_bits: 8 by default, as in BinaryDM's tables. The
        released code makes no exception of them: edge_bits = weight_bits is its rule.
    activation_bits, softmax_bits: 32 leaves the inputs real (rows 4/32). With attention_matmul the softmax's output has
        softmax_bits; its zero point is 0, as nothing is below. The released code always quantizes these products once
        activations are, but the tables count none of it: the shared field stays off.
    calibration_steps, calibration_images: S evenly spread of the sampler's calls (every (calls / S)-th from the first),
        n images of each.
    reconstruction_images: how many of these S n a unit is learned from, drawn anew for each; 0 = all.
        Inputs and outputs of one unit at a time are in memory, on the GPU if they take less than half of what is free
        there. On LDM-4 the widest (672 channels in, 224 out, at 64x64) takes 14 MiB per image: 70 GiB for all 5120.
    reconstruction_batch, iterations, rounding_lr, rounding_weight, rounding_free: of the first pass.
    activation_images, activation_start: what activation quantizers start from: random calibration images, and the
        search over 80 shrink factors or min and max themselves.
    activation_iterations, activation_lr: of the second pass.
    split_shortcuts: quantize h and skip of the up path's concatenated inputs apart, in the ResBlocks' 1x1 convs (input
        and weight). The released scripts do so for CIFAR-10 and Stable Diffusion; the one for LDM has no such option.

    Differences from the released code: a range always holds 0 (its search takes min and max as they are, which differs
    for channels of one sign alone); an attention is one unit, with its four products' steps (there, once activations
    are quantized, projections and products are units of their own); errors are summed over channels also in a
    transformer block's [N, L, C] (there over L); networks stand in eval mode (there dropout is on); both ranges of a
    split weight have the rounding term (there only the first); activations start from random images as in its DDIM
    script (the LDM one takes the first 64, all of one step); the empty condition of guidance is no part of the data.
    Not offered: symmetric activations (its scripts for CIFAR-10 and Bedrooms) and running min-max (Bedrooms).
    Unverified: what BinaryDM's tables were run with.
    """

    weight_bits: FewBits = 4
    softmax_bits: FewBits = 8
    calibration_steps: Annotated[int, Field(ge=1)] = 20
    calibration_images: Annotated[int, Field(ge=1)] = 256
    reconstruction_images: Annotated[int, Field(ge=0)] = 0
    reconstruction_batch: Annotated[int, Field(ge=1)] = 32
    iterations: Annotated[int, Field(ge=0)] = 20_000
    rounding_lr: Annotated[float, Field(gt=0)] = 1e-3
    rounding_weight: Annotated[float, Field(ge=0)] = 0.01
    rounding_free: Annotated[float, Field(ge=0, le=1)] = 0.2
    activation_images: Annotated[int, Field(ge=1)] = 64
    activation_start: Start = "search"
    activation_iterations: Annotated[int, Field(ge=0)] = 5000
    activation_lr: Annotated[float, Field(gt=0)] = 4e-4
    split_shortcuts: bool = False

    data_free: ClassVar[bool] = True
    post_training: ClassVar[bool] = True

    def check(self, steps: int) -> list[str]:
        faults = super().check(steps)
        if steps:
            faults.append(f"name: 'qdiffusion' works after training; train.steps must be 0 (given {steps})")
        if self.host is not None and self.calibration_steps > self.calls:
            faults.append(
                f"calibration_steps: the recipe's sampler calls the network {self.calls} times "
                f"(given {self.calibration_steps}).\n    give at most {self.calls}, or more sample.steps"
            )
        return faults

    @property
    def calls(self) -> int:
        """Calls of the network along one trajectory of the recipe's sampler."""
        s = self.host.sample
        return len(times(s.sampler, self.host.scheduler, s.steps, s.spacing))

    def weight_quantizer(self, layer: Layer, site: Site) -> Quantizer:
        return AffineWeight(self.edge_bits if site.edge else self.weight_bits, layer.weight.shape)

    def activation_quantizer(self, layer: nn.Module, site: Site) -> Quantizer | None:
        if self.activation_bits == 32:
            return None
        return AffineActivation(self.edge_bits if site.edge else self.activation_bits, self.activation_start)

    def attention_quantizer(self, operand: str, site: Site) -> Quantizer:
        bits = self.softmax_bits if operand == "probabilities" else self.activation_bits
        return AffineActivation(bits, self.activation_start)

    def quantize_(self, unet: nn.Module) -> None:
        super().quantize_(unet)
        for name, channels in splits(unet) if self.split_shortcuts else ():
            layer = unet.get_submodule(name)
            if isinstance(layer, QuantConv2d):
                layer.weight_quantizer = AffineWeight(self.weight_bits, layer.weight.shape, channels)
                if layer.activation_quantizer is not None:
                    layer.activation_quantizer = SplitActivation(self.activation_bits, channels, self.activation_start)

    def calibrate_(
        self, student: nn.Module, teacher: nn.Module, batches: Iterable[tuple], keeper: Keeper | None = None
    ) -> None:
        """Both passes. What is finished is kept after every unit, so that a killed calibration loses one at most.

        A student that is its own teacher (random weights, to measure size and speed) is rounded to the nearest.
        Raises: BdmError if a loss is not finite, or if there are several processes, which would do the same each.
        """
        if teacher is student:
            start_weights_(student)
            super().calibrate_(student, teacher, batches)
        else:
            self.learn_(student, teacher, batches, keeper)

    def rehearse_(
        self, student: nn.Module, teacher: nn.Module, batches: Iterable[tuple], iterations: int
    ) -> dict[str, float]:
        """Both passes with a few iterations for each unit, from as few images as fill a batch."""
        n = max(self.reconstruction_batch, self.activation_images)
        few = {"calibration_steps": 1, "calibration_images": n, "reconstruction_images": self.reconstruction_batch}
        short = replace(self, iterations=iterations, activation_iterations=iterations, **few)
        short.host = self.host
        found, hours = {"Batch": self.reconstruction_batch, "Iterations": iterations}, 0.0
        passes = {"rounding": self.iterations, "steps": self.activation_iterations}
        for (name, planned), seconds in zip(passes.items(), short.learn_(student, teacher, batches), strict=True):
            if seconds:
                found[f"Iteration of all {len(seconds)} units, {name} (s)"] = round(sum(seconds), 3)
                hours += planned * sum(seconds) / 3600
        return found | {"All iterations (h)": round(hours, 1)}

    def learn_(
        self, student: nn.Module, teacher: nn.Module, batches: Iterable[tuple], keeper: Keeper | None = None
    ) -> list[list[float]]:
        """Both passes; as calibrate_. Returns, for each, the seconds that an iteration of each unit took: of those that
        were not kept."""
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise BdmError("'qdiffusion' learns one unit after the other.\n  start it as one process, on one GPU")
        training = student.training
        student.eval()
        kept = keeper.read() if keeper is not None else {}
        done = int(kept.pop(DONE, 0))
        if kept:
            student.load_state_dict(kept)
        start_weights_(student)
        calls = self.calibration_calls(batches)
        names = in_forward_order(teacher, units(student), _to_student(student, calls, slice(1)))
        passes = [(self.learn_rounding_, self.iterations)]
        if self.activation_bits < 32:
            passes.append((self.learn_steps_, self.activation_iterations))
        stages = [(name, *one) for one in passes for name in names]
        total, before = (sum(n for _, _, n in part) for part in (stages, stages[:done]))
        iteration_s: list[list[float]] = [[], []]
        with output.progress("calibrating", total, "iterations", before) as advance:
            for stage, (name, learn_, iterations) in enumerate(stages[done:], done):
                if stage == max(done, len(names)):
                    self.start_activations_(student, teacher, calls)
                if iterations:
                    took_s = learn_(name, student, teacher, calls, torch.Generator().manual_seed(stage), advance)
                    iteration_s[stage // len(names)].append(took_s)
                if keeper is not None:
                    keeper.write({DONE: torch.tensor(stage + 1), **student.state_dict()})
        student.train(training)
        return iteration_s

    def learn_rounding_(
        self, name: str, student: nn.Module, teacher: nn.Module, calls: list[Tensor], random: torch.Generator,
        advance: Callable[..., None],
    ) -> float:  # fmt: skip
        """A unit's part in the first pass. Returns the seconds that an iteration took."""
        with real_activations(student), _told(name, "rounding_lr", advance) as tell:
            data = examples(name, teacher, student, calls, self.some_of(calls, random), self.reconstruction_batch)
            return learn_rounding_(
                student.get_submodule(name), data, self.iterations, self.reconstruction_batch, self.rounding_lr,
                self.rounding_weight, self.rounding_free, random, tell,
            )  # fmt: skip

    def learn_steps_(
        self, name: str, student: nn.Module, teacher: nn.Module, calls: list[Tensor], random: torch.Generator,
        advance: Callable[..., None],
    ) -> float:  # fmt: skip
        """A unit's part in the second pass. Returns the seconds that an iteration took."""
        with _told(name, "activation_lr", advance) as tell:
            data = examples(name, teacher, None, calls, self.some_of(calls, random), self.reconstruction_batch)
            return learn_steps_(
                student.get_submodule(name), data, self.activation_iterations, self.reconstruction_batch,
                self.activation_lr, random, tell,
            )  # fmt: skip

    def some_of(self, calls: list[Tensor], random: torch.Generator) -> Tensor:
        """Which images a unit is learned from."""
        return torch.randperm(len(calls[0]), generator=random)[: self.reconstruction_images or None]

    def start_activations_(self, student: nn.Module, teacher: nn.Module, calls: list[Tensor]) -> None:
        """All that have no step size yet, in one forward: each from what reaches it behind quantized layers."""
        chosen = torch.randperm(len(calls[0]), generator=torch.Generator().manual_seed(0))[: self.activation_images]
        super().calibrate_(student, teacher, iter([tuple(_to_student(student, calls, chosen))]))

    def calibration_calls(self, batches: Iterable[tuple]) -> list[Tensor]:
        """The positional arguments of the U-Net's forward for all calibration images, the sampler's first calls first.

        Trajectories are followed until there are enough images of each call. Shapes: [S n, ...], on the CPU.
        """
        length, wanted = self.calls, self.calibration_images
        positions = [k * length // self.calibration_steps for k in range(self.calibration_steps)]
        found, n = {position: [] for position in positions}, 0
        batches = iter(batches)
        while n < wanted:
            for position in range(length):
                call = next(batches, None)
                if call is None:
                    raise ValueError(f"the batches end within a trajectory of {length} calls, at call {position}")
                if position in found:
                    found[position].append([part.cpu() for part in call])
            n += len(call[0])
        per_call = ([torch.cat(parts)[:wanted] for parts in zip(*found[p], strict=True)] for p in positions)
        return [torch.cat(parts) for parts in zip(*per_call, strict=True)]


def _to_student(student: nn.Module, calls: list[Tensor], chosen: Tensor | slice) -> list[Tensor]:
    """The arguments of some calls, on the student's device."""
    device = next(student.parameters()).device
    return [part[chosen].to(device) for part in calls]


@contextmanager
def _told(unit: str, rate: str, advance: Callable[..., None]) -> Iterator[Tell]:
    """What reports a unit's progress. rate: the field to lower if its loss is lost. Raises: BdmError if it is."""
    try:
        yield lambda iterations, loss: advance(iterations, f"{unit} loss {loss:.4g}")
    except FloatingPointError as error:
        raise BdmError(f"unit {unit}: {error}.\n  lower method.{rate}, in a run of its own") from None


def start_weights_(student: nn.Module) -> None:
    """Find the grids of the weights that have none."""
    for _, layer in quantized_layers(student):
        if layer.weight_quantizer.waiting:
            layer.weight_quantizer.calibrate_(layer.weight)


def units(unet: nn.Module) -> list[str]:
    """Names of the modules that are learned as a whole; every quantized layer is in one of them."""
    found: list[str] = []
    for name, module in unet.named_modules():
        whole = WHOLE.search(name) or hasattr(module, "to_q") or isinstance(module, QuantConv2d | QuantLinear)
        inside = any(name.startswith(f"{unit}.") for unit in found)
        if whole and not inside and next(quantized_layers(module), None) is not None:
            found.append(name)
    return found


def splits(unet: nn.Module) -> Iterator[tuple[str, int]]:
    """(name of the 1x1 conv on a shortcut in the up path, channels of h in its input [h, skip])."""
    before = unet.mid_block.resnets[-1]
    for i, block in enumerate(unet.up_blocks):
        for j, resnet in enumerate(block.resnets):
            if resnet.conv_shortcut is not None:
                yield f"up_blocks.{i}.resnets.{j}.conv_shortcut", before.out_channels
            before = resnet
