"""BI-DiffSR (arXiv:2406.05723, zhengchen1999/BI-DiffSR): thresholds and activations by groups of timesteps."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Size, Tensor, nn

from bdm_cli.methods.base import Layer, MeanSignMethod, closed
from bdm_cli.quant.frames import Carrying, Frame, channels_shape
from bdm_cli.quant.swap import Site, Timed


class TimeThreshold(Timed, Frame):
    """TaR: a threshold per input channel and group of timesteps; what is quantized is x + b_g.

    g = clamp(floor(t G / T), 0, G - 1), of every image. The released code takes the first image's g for the whole
    batch, whose images all have the same t in its training. The paper numbers the groups from 1 with the same floor,
    off by one. b starts at 0. G sets are stored; one acts in each call of a sampler.
    A group that no image of a batch is of has no gradient there; since the groups are one tensor, the optimizer's
    momentum still moves it.

    Shapes: x [N, C, H, W] or [N, ..., C]; timestep [N] or [1]. State: threshold (parameter) [G, C, 1, 1] or [G, C].
    """

    def __init__(self, layer: nn.Module, groups: int, n_timesteps: int) -> None:
        super().__init__()
        self.groups, self.n_timesteps = groups, n_timesteps
        self.threshold = nn.Parameter(torch.zeros(groups, *channels_shape(layer, layer.weight.shape[1])))

    def of_group(self, parameter: Tensor, like: Tensor) -> Tensor:
        """Of a parameter [G, ...] what each image's group has, to broadcast against `like`, an input or output."""
        t = self.timestep.to(parameter.device)
        chosen = parameter[(t * self.groups / self.n_timesteps).floor().long().clamp(0, self.groups - 1)]
        return chosen.view(len(chosen), *[1] * (like.dim() - chosen.dim()), *chosen.shape[1:])

    def before(self, x: Tensor) -> Tensor:
        return x + self.of_group(self.threshold, x)

    def operations(self, read: Size, written: Size) -> int:
        return read.numel()


class TimeUnit(Carrying, TimeThreshold):
    """The unit around a convolution: y = RPReLU_g(conv(q_a(x + b_g), q_w(w)) + bias) + x (released code).

    TaA: RPReLU_g(y) = PReLU(y + c_g) + d_g, slope below 0 per channel and group; c, d start at 0, the slope at 0.25.
    x is added where the channels match, average-pooled at stride 2; elsewhere there is no shortcut.

    State: threshold [G, C, 1, 1]; move_1, move_2, slope [G, K, 1, 1] (parameters).
    """

    inside = False

    def __init__(self, layer: nn.Conv2d, groups: int, n_timesteps: int) -> None:
        super().__init__(layer, groups, n_timesteps)
        outputs, inputs = layer.weight.shape[:2]
        self.carries = outputs == inputs
        shape = (groups, *channels_shape(layer, outputs))
        self.move_1, self.move_2 = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
        self.slope = nn.Parameter(torch.full(shape, 0.25))

    def activation(self, y: Tensor) -> Tensor:
        move_1, move_2, slope = (self.of_group(part, y) for part in (self.move_1, self.move_2, self.slope))
        y = y + move_1
        return torch.where(y >= 0, y, slope * y) + move_2

    def activation_operations(self, written: Size) -> int:
        """As RPReLU's."""
        return 3 * written.numel()


@closed
class BiDiffSr(MeanSignMethod):
    """1-bit weights of analytic scale; timestep-aware thresholds (TaR) and activations (TaA); shortcuts.

    q_w(w) = mean|w| sgn(w) per output channel (MeanSignWeight). Of 1 bit, q_a(x + b_g) is the sign with Bi-Real's
    polynomial estimator; of more, LSQ as in the baseline, one step size for all groups.
    Linears (attention projections, time embedding) have thresholds alone, by group too. The original's attention and
    time embedding are real; the rows here share what is of 1 bit.

    groups: G, of the training schedule's T steps (paper: 5).
    form: 'original', TaR, TaA and shortcuts; 'threshold': TaR alone, around convolutions as well.

    Left out: the original's own U-Net, with pixel-(un)shuffling CP-Down and CP-Up and channel-shuffling CS-Fusion in
    place of the convolutions that change the width. A pretrained network's weights do not fit it.
    Unverified: how BinaryDM made it a W1A4 row. It prints one size for all W1A4 rows, so it most likely ported TaR, TaA
    and the shortcuts alone, as here, and did not count what they store.
    """

    groups: Annotated[int, Field(ge=1)] = 5
    form: Literal["original", "threshold"] = "original"

    def frame(self, layer: Layer, site: Site) -> Frame | None:
        if site.edge:
            return None
        kind = TimeUnit if isinstance(layer, nn.Conv2d) and self.form == "original" else TimeThreshold
        return kind(layer, self.groups, self.host.scheduler.n_timesteps)
