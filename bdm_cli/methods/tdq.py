"""TDQ (NeurIPS 2023, arXiv:2306.02316): activation step sizes that a small network makes from the timestep."""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from bdm_cli.methods.base import Method, closed
from bdm_cli.quant.quantizers import Grid, Quantizer
from bdm_cli.quant.ste import lsq_ste
from bdm_cli.quant.swap import Site, Timed


class TdqActivation(Timed, Quantizer):
    """Signed activation quantizer whose step size is a function of the image's timestep (released code of TDQ).

    q(x) = s round(clip(x / s, low, high)),  s = softplus(MLP(e_t)) > 0, one per image;  gradients by x and s are LSQ's
    (arXiv:1902.08153, Eqs. 1-3) without its scaling of the one by s, as in the released code.
    MLP: linear to `hidden`, ReLU, linear, ReLU, linear, ReLU, dropout, linear to 1.
    e_t = (sin(t w_i), cos(t w_i)) with w_i = t_max^(-i / d), i = 0..d - 1, d = `width` / 2: geometric Fourier encoding,
    unverified in its constants (the released file that fills it could not be read).
    low = -2^(b-1), high = 2^(b-1) - 1; `symmetric`: low = -high.

    Every layer of the MLP starts as the framework starts it, as in the released code (the paper is said to have He's);
    the last bias so that softplus of it alone is s0; s is then within a sixth of s0 (as measured), at every time.
    s0 = 2 mean|x| / sqrt(high), LSQ's, or (`statistics`) the mean over images of (mean + 3 std) / (2^(b-1) - 1), TDQ's.
    The released code takes the latter from 100 forwards at random times; here from the one batch of `calibrate_`.

    In eval mode every time is passed through the MLP alone, in fp32, so that a table of step sizes made once for all
    times holds the very numbers: the MLP is no part of what draws images.

    Shapes: x and q(x) [N, ...]; timestep [N] or [1].
    State: mlp (parameters), whose last bias is NaN until calibrate_, so that use before is loud.
    """

    def __init__(
        self, bits: int, t_max: int, width: int, hidden: int, dropout: float, symmetric: bool, statistics: bool
    ) -> None:
        super().__init__()
        self.bits, self.symmetric, self.statistics = bits, symmetric, statistics
        self.high = 2 ** (bits - 1) - 1
        self.low = -self.high if symmetric else -self.high - 1
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden),
            nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1),
        )  # fmt: skip
        with torch.no_grad():
            self.mlp[-1].bias.fill_(torch.nan)
        self.register_buffer("frequencies", t_max ** -(torch.arange(width // 2) / (width // 2)), persistent=False)
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    @property
    def waiting(self) -> bool:
        return bool(self.mlp[-1].bias.isnan().any())

    @torch.no_grad()
    def calibrate_(self, x: Tensor) -> None:
        """Set the last bias to softplus^-1(s0) = s0 + log(1 - exp(-s0)). s0 is never 0."""
        if self.statistics:
            images = x.flatten(1).float()
            start = (images.mean(1) + 3 * images.std(1, correction=0)).mean() / self.high
        else:
            start = 2 * x.abs().mean() / self.high**0.5
        start = start.clamp_min(1e-8)
        self.mlp[-1].bias.copy_(start + torch.log(-torch.expm1(-start)))

    def steps(self, times: Tensor) -> Tensor:
        """s of times [S], [S]."""
        if self.training:
            return self._steps(times)
        found, index = times.unique(return_inverse=True)
        return torch.cat([self._steps(time) for time in found.split(1)])[index]

    def _steps(self, times: Tensor) -> Tensor:
        with torch.autocast(times.device.type, enabled=False):
            phases = times.to(self.frequencies)[:, None] * self.frequencies
            return F.softplus(self.mlp(torch.cat([phases.sin(), phases.cos()], 1))).squeeze(1)

    def forward(self, x: Tensor) -> Tensor:
        s = self.steps(self.timestep).view(-1, *[1] * (x.dim() - 1))
        return lsq_ste(x, s, self.zero, self.low, self.high)

    def grid(self, times: Sequence[float] | None = None) -> Grid:
        if self.symmetric:
            raise NotImplementedError(f"its activations have {2 * self.high + 1} levels, not 2 to the {self.bits}")
        found = self.timestep.unique() if times is None else torch.tensor(times)
        if times is None and len(found) > 1:
            raise NotImplementedError("its images have a step size each, by their times")
        return Grid(self.bits, self.low, 0, self.steps(found).detach())

    def extra_repr(self) -> str:
        return f"bits={self.bits}, range={self.low}..{self.high}"


@closed
class Tdq(Method):
    """The baseline with TDQ's activation quantizers: one MLP per quantized layer that is no edge.

    Weights stay the baseline's binary ones, as BinaryDM's row must have them (35.8 MB); TDQ's own are symmetric, per
    tensor, of 2^b - 1 levels. After SiLU the released code quantizes x + 0.2785 without sign; this is left out, since
    every row of BinaryDM has signed levels for every layer. TDQ's optional learned offset is left out for the same
    reason. Quantized operands of attentions (attention_matmul) get MLPs, too.

    encoding: width of e_t, even (unverified). hidden, dropout: of the MLP.
    start: where s0 comes from: LSQ's rule as in the baseline, so that the row differs by TDQ alone; or TDQ's own.
    levels: 'lsq', -2^(b-1)..2^(b-1) - 1 as in every row; 'symmetric', TDQ's own +-(2^(b-1) - 1), which are one level
        too few for a packed file.
    """

    encoding: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    hidden: Annotated[int, Field(ge=1)] = 64
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    start: Literal["lsq", "tdq"] = "lsq"
    levels: Literal["lsq", "symmetric"] = "lsq"

    def activation_quantizer(self, layer: nn.Module, site: Site) -> Quantizer | None:
        if site.edge or self.activation_bits == 32:
            return super().activation_quantizer(layer, site)
        return self.timed()

    def attention_quantizer(self, operand: str, site: Site) -> Quantizer:
        return self.timed()

    def timed(self) -> TdqActivation:
        symmetric, statistics = self.levels == "symmetric", self.start == "tdq"
        t_max = self.host.scheduler.n_timesteps
        return TdqActivation(
            self.activation_bits, t_max, self.encoding, self.hidden, self.dropout, symmetric, statistics
        )
