"""BiDM (NeurIPS 2024, arXiv:2412.05926): Timestep-friendly Binary Structure (TBS), Space Patched Distillation (SPD)."""

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdm_cli.diffusion.losses import mimicking_mse, patch_relations
from bdm_cli.diffusion.models import estimate_noise, noise_scheduler
from bdm_cli.methods.base import Batch, Bits, Forward, Layer, Method, closed
from bdm_cli.quant.frames import Frame, Threshold, resized, with_bias
from bdm_cli.quant.quantizers import MeanSignWeight, Quantizer, SignActivation
from bdm_cli.quant.ste import passing, sign_poly_ste, sign_ste
from bdm_cli.quant.swap import Block, Remembering, Site, Timed, begin_trajectory_, timestep_blocks


class BinaryConvolution(Threshold):
    """Around a binary convolution of BiDM (arXiv:2412.05926; the released code's layers).

    before(x) = x + b;  after(x, z) = K z + |gamma| u,  K = filter * mean_c|x|,  z = conv(sgn(x + b), w_bi).
    K is a k x k convolution of one channel with the layer's stride and padding, of x as it comes; its filter starts at
    1 / k^2 (XNOR-Net's box) and is learned. Gradients are autograd's: of K into the filter and, through |x|, into x.
    u is x where the channels are as many, average-pooled with the layer's stride; else a real 1x1 convolution of x with
    that stride. How that one starts is not stated: at torch's default here, a draw, as a plain convolution does.

    learned: whether the filter is, or is the fixed box. filter_bias: K has a bias, drawn from U(-1/k, 1/k).
    absolute: |gamma|, else gamma. gamma: where it starts; None: there is no shortcut. thresholds: whether there is b.
    All of these off, it is XNOR-Net's K around the product.
    Shapes: x [N, C, H, W], z and y [N, K, H', W']; of linears (as 1x1 convolutions) [N, ..., C] and [N, ..., K].
    State: filter [1, 1, k, k] (parameter; buffer if fixed); where there are any: threshold [C, 1, 1], gamma [1],
    filter_bias [1], projection [K, C, 1, 1] (parameters). Of linears without the last two axes.
    """

    def __init__(
        self,
        layer: Layer,
        learned: bool,
        filter_bias: bool,
        absolute: bool,
        gamma: float | None,
        thresholds: bool = True,
    ) -> None:
        super().__init__(layer)
        if not thresholds:
            self.threshold = None
        outputs, inputs, *kernel = layer.weight.shape
        self.place = (layer.stride, layer.padding, layer.dilation) if kernel else None
        self.absolute, taps = absolute, math.prod(kernel)
        box = torch.full((1, 1, *kernel), 1 / taps)
        if learned:
            self.filter = nn.Parameter(box)
        else:
            self.register_buffer("filter", box)
        bound = taps**-0.5
        self.filter_bias = nn.Parameter(torch.empty(1).uniform_(-bound, bound)) if filter_bias else None
        self.gamma = None if gamma is None else nn.Parameter(torch.full((1,), gamma))
        self.projection = None
        if gamma is not None and inputs != outputs:
            self.projection = nn.Parameter(torch.empty(outputs, inputs, *[1] * len(kernel)))
            nn.init.kaiming_uniform_(self.projection, a=5**0.5)

    def before(self, x: Tensor) -> Tensor:
        return x if self.threshold is None else super().before(x)

    def after(self, x: Tensor, product: Tensor, bias: Tensor | None) -> Tensor:
        y = with_bias(product * self.scales(x), bias)
        if self.gamma is None:
            return y
        gamma = self.gamma.abs() if self.absolute else self.gamma
        return y + gamma * self.shortcut(x, product)

    def scales(self, x: Tensor) -> Tensor:
        """K: [N, 1, H', W'], of linears [N, ..., 1]."""
        if self.place is None:
            return F.linear(x.abs().mean(-1, keepdim=True), self.filter, self.filter_bias)
        return F.conv2d(x.abs().mean(1, keepdim=True), self.filter, self.filter_bias, *self.place)

    def shortcut(self, x: Tensor, like: Tensor) -> Tensor:
        """u, shaped as the product."""
        if self.projection is None:
            return resized(x, like)
        if self.place is None:
            return F.linear(x, self.projection)
        return resized(F.conv2d(x, self.projection, stride=self.place[0]), like)

    def operations(self, read: torch.Size, written: torch.Size) -> int:
        """Multiply-accumulates count once. Threshold and mean |x|; K; its product and the shortcut's."""
        conv = self.place is not None
        places = written.numel() // written[1 if conv else -1]
        found = read.numel() + self.filter.numel() * places + written.numel()
        found += 0 if self.threshold is None else read.numel()
        if self.gamma is None:
            return found
        found += written.numel()
        if self.projection is not None:
            return found + self.projection[0].numel() * written.numel()
        return found + (read.numel() if conv and read[2:] != written[2:] else 0)


class SurrogateThreshold(SignActivation):
    """The released code's linear layers: the threshold moves the gradient alone (a slip that it has from BiBench).

    q(x) = sgn(x);  dq/dx = dq/db = 2 - 2 |x + b| if |x + b| <= 1 else 0.
    Shapes: x [N, ..., C]. State: threshold [C] (parameter); inference does not need it.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__(sign_poly_ste)
        self.threshold = nn.Parameter(torch.zeros(inputs))

    def forward(self, x: Tensor) -> Tensor:
        return passing(sign_ste(x), self.estimator(x + self.threshold))


class Connection(Timed, Remembering, nn.Module):
    """Cross-timestep connection of a timestep block (arXiv:2412.05926, Eq. 12): its output, mixed with the last call's.

    y = (1 - a) u + a u_before;  a = alpha[floor(t rows / T)] of each image's time t of this call. u_before has no
    gradient: dy/du = 1 - a, dy/da = u_before - u. The first call of a trajectory is not mixed: y = u.
    What a call without gradients puts out (y, so that sampling is recursive) is kept for the next call; one with
    gradients, a training step's own, leaves nothing behind.
    "Before" is the call before, whatever its time: the second of two calls at one time (PLMS has them) mixes with the
    first.

    Shapes: u, y [N, C, H, W]. State: alpha [rows] (parameter), not constrained; the kept tensor is none.
    Raises: ValueError if the batch changes within a trajectory.
    """

    def __init__(self, rows: int, start: float, n_timesteps: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((rows,), start))
        self.n_timesteps = n_timesteps
        self.kept: Tensor | None = None

    def forget(self) -> None:
        self.kept = None

    def forward(self, u: Tensor) -> Tensor:
        kept, y = self.kept, u
        if kept is not None:
            if kept.shape != u.shape:
                raise ValueError(f"the block puts out {tuple(u.shape)}, and put out {tuple(kept.shape)} before")
            rows = (self.timestep * len(self.alpha) // self.n_timesteps).long()
            alpha = self.alpha[rows].view(-1, 1, 1, 1)
            y = (1 - alpha) * u + alpha * kept
        self.kept = None if torch.is_grad_enabled() else y
        return y

    def operations(self, read: torch.Size, written: torch.Size) -> int:
        """As a Frame's: a product and a multiply-accumulate per number."""
        return 2 * written.numel()

    def stored(self) -> int:
        """As a Frame's."""
        return self.alpha.numel()


def connect_(block: nn.Module, connection: Connection) -> None:
    """Let a connection stand behind the module that makes a block's output.

    The hook finds the connection at the call, in the module that is called: a copy's is the copy's own.
    """
    block.connection = connection
    block.register_forward_hook(_connected)


def _connected(block: nn.Module, inputs: tuple, result: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    if isinstance(result, tuple):
        return block.connection(result[0]), *result[1:]
    return block.connection(result)


@closed
class BiDm(Method):
    """BiDM (NeurIPS 2024, arXiv:2412.05926): L = L_simple + lambda L_SPD on a network of 1-bit layers with TBS.

    Weights: mean|w| sgn(w) per output channel, the mean not learned (Eq. 9 and the released code). Activations:
    sgn(x + b), b per channel, with Bi-Real's estimator. Convolutions stand in a BinaryConvolution. Linear layers have
    the threshold alone. The last timestep blocks have a Connection.
    Training: before each step, what is kept is dropped and the student is called without gradients at t + 1 (at most
    T - 1) on the same images with the same noise; the step's own call mixes with that. So training mixes over one
    timestep, sampling over the sampler's stride (see connection_gap). Dropout, if any, draws anew in each of the two.
    The products of attentions stay real.
    The released LDM code zeroes gamma, the filter's bias and b in the second convolution of every ResBlock, where
    |gamma| can never leave 0 (gradient 0): a slip, not repeated here. Nor do filters go back to 1 / k^2 at loading.

    edge_bits: edges are in fp32, as in the released code. real_skips: so are the ResBlocks' skip convolutions.
    weight_scale: 'analytic', mean|w|; 'learned', from there on (Sec. 3.1): the baseline's binarizer.
    bias: binary layers keep their biases, added to the scaled product (released code: no).
    threshold: whether there is b; without, activations are sgn(x). estimator: of their gradient, Bi-Real's
        'polynomial' or the 'clipped' straight-through one. shortcut: whether there is gamma u. With threshold and
        shortcut off, 'clipped', filter 'box', no connections and no distillation it is the paper's "vanilla" row, which
        is its XNOR row (unverified: that the paper's ablation took all of these away).
    filter: 'learned', or the fixed 'box' of XNOR-Net (ablation).
    filter_bias: 'none', K = A * k as printed; 'uniform', a learned one that starts as a torch convolution's (released
        code).
    gamma: 'absolute', |gamma| (released LDM code); 'signed' (released CIFAR code, with gamma_start 0).
    gamma_start: 0.3 (LDM code), 0 (CIFAR code).
    attention: its projections q, k, v and output: 'conv1d', as LDM's one-dimensional convolutions, the threshold
        alone; 'conv2d', as the DDPM network's of CIFAR, 1x1 convolutions like all others.
    linear_threshold: of all other linears (the time embedding's): 'applied', sgn(x + b), as the text has it for every
        layer; 'surrogate', in the gradient alone (released code, see SurrogateThreshold).
    connections: the last so many timestep blocks are connected, of the up path at most (paper: 8, on CIFAR 2; the
        released CIFAR code mixes some attentions' outputs with another module's, which is not offered).
    connection_gap: timesteps between the two calls of a training step. 1 in the released code, with which the paper
        samples at strides of 5 and 10. As the two calls share image and noise, they tell the noise between them, the
        more the wider the gap, which no two calls of a sampler do (docs/digits.md).
    alpha_start, alpha_rows: of a Connection's table (0.3 and 100; CIFAR code: 0).
    distillation: 'spd'; 'l2', the mean squared difference of the same features (unverified: the paper's exact form);
        'none'. Features are the outputs of all timestep blocks, mixed where they are (CIFAR code: of eight modules).
    spd_patches: p, patches along a side. spd_lambda: lambda, of either distillation (paper: 1e-2, on CIFAR 3e-2).
    """

    activation_bits: Literal[1] = 1
    edge_bits: Bits = 32
    real_skips: bool = True
    weight_scale: Literal["analytic", "learned"] = "analytic"
    bias: bool = False
    threshold: bool = True
    estimator: Literal["polynomial", "clipped"] = "polynomial"
    shortcut: bool = True
    filter: Literal["learned", "box"] = "learned"
    filter_bias: Literal["none", "uniform"] = "none"
    gamma: Literal["absolute", "signed"] = "absolute"
    gamma_start: float = 0.3
    attention: Literal["conv1d", "conv2d"] = "conv1d"
    linear_threshold: Literal["applied", "surrogate"] = "applied"
    connections: Annotated[int, Field(ge=0)] = 8
    connection_gap: Annotated[int, Field(ge=1)] = 1
    alpha_start: float = 0.3
    alpha_rows: Annotated[int, Field(ge=1)] = 100
    distillation: Literal["spd", "l2", "none"] = "spd"
    spd_patches: Annotated[int, Field(ge=1)] = 4
    spd_lambda: Annotated[float, Field(ge=0)] = 1e-2

    def check(self, steps: int) -> list[str]:
        found = super().check(steps)
        if self.linear_threshold == "surrogate" and (not self.threshold or self.estimator != "polynomial"):
            found.append(
                "linear_threshold: 'surrogate' is a threshold in the polynomial estimator; it needs threshold = true "
                "and estimator = 'polynomial'"
            )
        if self.shortcut and self.gamma == "absolute" and self.gamma_start == 0:
            found.append("gamma_start: |gamma| never leaves 0 (given 0); give another start, or gamma = 'signed'")
        return found

    def keep_bias(self, site: Site) -> bool:
        return site.edge or self.bias

    def weight_quantizer(self, layer: Layer, site: Site) -> Quantizer:
        learned = site.edge or self.weight_scale == "learned"
        return super().weight_quantizer(layer, site) if learned else MeanSignWeight()

    def activation_quantizer(self, layer: Layer, site: Site) -> Quantizer:
        if site.edge:
            return super().activation_quantizer(layer, site)
        if self._surrogate(layer, site):
            return SurrogateThreshold(layer.in_features)
        return SignActivation(sign_poly_ste if self.estimator == "polynomial" else sign_ste)

    def frame(self, layer: Layer, site: Site) -> Frame | None:
        if site.edge or self._surrogate(layer, site):
            return None
        if isinstance(layer, nn.Linear) and not (site.projection and self.attention == "conv2d"):
            return Threshold(layer) if self.threshold else None
        learned, biased = self.filter == "learned", self.filter_bias == "uniform"
        gamma = self.gamma_start if self.shortcut else None
        return BinaryConvolution(layer, learned, biased, self.gamma == "absolute", gamma, self.threshold)

    def _surrogate(self, layer: Layer, site: Site) -> bool:
        plain = isinstance(layer, nn.Linear) and not site.projection
        return plain and self.linear_threshold == "surrogate"

    def quantize_(self, unet: nn.Module) -> None:
        blocks = timestep_blocks(unet)
        for block in blocks[len(blocks) - min(self.connections, len(blocks) // 2) :]:
            connection = Connection(self.alpha_rows, self.alpha_start, self.host.scheduler.n_timesteps)
            connect_(unet.get_submodule(block.output), connection)
        super().quantize_(unet)

    def taps(self, unet: nn.Module) -> list[Block]:
        return [] if self.distillation == "none" else timestep_blocks(unet)

    @torch.no_grad()
    def before_step_(self, student: nn.Module, batch: Batch) -> None:
        begin_trajectory_(student)
        if not self.connections:
            return
        _, t, *context = batch.inputs
        before = (t + self.connection_gap).clamp(max=self.host.scheduler.n_timesteps - 1)
        x = noise_scheduler(self.host.scheduler).add_noise(batch.clean, batch.noise, before)
        estimate_noise(student, x, before, *context)

    def losses(self, forward: Forward) -> dict[str, Tensor]:
        fp, bi = forward.features_fp, forward.features_bi
        if self.distillation == "none":
            return {}
        loss = mimicking_mse(fp, bi) if self.distillation == "l2" else patch_relations(fp, bi, self.spd_patches)
        return {self.distillation: self.spd_lambda * loss}
