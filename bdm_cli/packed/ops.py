"""Convolution and matrix product with 1-bit weights on quantized activations, as torch operators.

    y[k] = sigma[k] step sum_{c, tap} w[k, c, tap] a[c, tap] + bias[k],   w = +-1,   a = u - zero  (1 bit: a = 2 u - 1)
    u = clip(round(x / step + zero'), low, low + 2^bits - 1) - low,  zero = zero' - low  (1 bit: u = 1[x >= threshold])

The sums are exact integers on every path: `avx512`, `avx2`, `neon` (lookup tables), `planes` (portable C, Eq. 19 of
arXiv:2404.05662) and `torch` (no compiler needed). Which one runs is chosen once per process; the environment variable
BDM_KERNEL names another.
"""

import ctypes
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bdm_cli.errors import BdmError, unknown
from bdm_cli.packed import build

PATHS = ("avx512", "avx2", "neon", "planes", "torch")
"""From the fastest on; the first that the library holds and the processor can run is used."""

REAL = 32
"""Bits of activations that are not quantized."""


class Shape(NamedTuple):
    """What a layer's arranged weights depend on. A linear layer is a convolution with a 1x1 kernel.

    bits, zero: of the activations (see the module); 32 bits: real.
    """

    channels: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    bits: int = 4
    zero: int = 8

    @property
    def row_bytes(self) -> int:
        """Bytes of one output channel's weights in a file."""
        return -(-self.channels * self.kernel[0] * self.kernel[1] // 8)


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32)
        for name in ("n", "c", "h", "w", "k", "kh", "kw", "sh", "sw", "ph", "pw", "bits", "zero", "channels_last")
    ]


class _Input(ctypes.Structure):
    _fields_ = [
        ("step", ctypes.c_float),
        ("zero", ctypes.c_float),
        ("low", ctypes.c_float),
        ("threshold", ctypes.c_void_p),
        ("gain", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("silu", ctypes.c_int32),
        ("bias_per_image", ctypes.c_int32),
        ("residual", ctypes.c_void_p),
    ]


class _Path(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("usable", ctypes.CFUNCTYPE(ctypes.c_int)),
        ("arranged_size", ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.POINTER(_Shape))),
        ("arrange", ctypes.CFUNCTYPE(None, ctypes.POINTER(_Shape), ctypes.c_void_p, ctypes.c_void_p)),
        (
            "convolve",
            ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 7, ctypes.c_int),
        ),
    ]


class Library(NamedTuple):
    """The compiled library: its paths that this processor can run, two functions beside them; or why there is none."""

    paths: dict[str, _Path]
    reason: str
    group_affine: Callable[..., int] | None = None
    attention: Callable[..., int] | None = None


@functools.cache
def library() -> Library:
    """Loaded after torch, whose OpenMP it shares."""
    if not build.LIBRARY.is_file():
        return Library({}, f"there is no {build.LIBRARY.name}: it was installed without a C compiler")
    try:
        loaded = ctypes.CDLL(str(build.LIBRARY))
        first = ctypes.addressof(ctypes.c_void_p.in_dll(loaded, "bdm_paths"))
        made_of = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(loaded, "bdm_sources"))).decode()
    except (OSError, ValueError) as error:
        return Library({}, f"{build.LIBRARY.name} cannot be loaded ({error})")
    if made_of != build.fingerprint():
        return Library(
            {}, f"{build.LIBRARY.name} is not of these sources: python -m bdm_cli.packed.build makes it again"
        )
    found, number = {}, 0
    while address := ctypes.c_void_p.from_address(first + number * ctypes.sizeof(ctypes.c_void_p)).value:
        path = _Path.from_address(address)
        if path.usable():
            found[path.name.decode()] = path
        number += 1
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
    affine = loaded.bdm_group_affine
    affine.argtypes = [pointer, integer, integer, ctypes.c_int64, integer, integer, real, *[pointer] * 4, integer]
    attention = getattr(loaded, "bdm_attention_avx512", None)
    if attention:
        attention.argtypes = [*[pointer] * 3, *[integer] * 5, real, pointer, integer]
    return Library(found, "", affine, attention)


def keep_memory() -> None:
    """Let this process's allocator keep what networks free (glibc's only). Otherwise the room of a large layer's output
    goes back to the system and is taken again, page by page, with every call: a tenth of a packed step's time."""
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):
        trim_threshold, mmap_threshold, most = -1, -3, 2**30
        allocator.mallopt(mmap_threshold, most)
        allocator.mallopt(trim_threshold, most)


@functools.cache
def path() -> str:
    """The name of the path that computes: the best one, or BDM_KERNEL's. Raises: BdmError if that cannot run here."""
    able = [name for name in PATHS if name == "torch" or name in library().paths]
    given = os.environ.get("BDM_KERNEL", "")
    if given and given not in PATHS:
        raise unknown("BDM_KERNEL", given, PATHS, "unset it to let bdm choose")
    if given and given not in able:
        raise BdmError(
            f"BDM_KERNEL={given} cannot run here ({library().reason or 'not on this processor'}).\n"
            f"  allowed: {', '.join(able)}; unset it to let bdm choose"
        )
    return given or able[0]


def _shape(shape: Shape, n: int = 1, h: int = 1, w: int = 1, channels_last: bool = True) -> _Shape:
    return _Shape(
        n, shape.channels, h, w, shape.outputs, *shape.kernel, *shape.stride, *shape.padding, shape.bits, shape.zero,
        int(channels_last),
    )  # fmt: skip


def arrange(weight: Tensor, shape: Shape) -> Tensor:
    """A file's bits -> what the chosen path reads: opaque bytes, valid in this process only.

    weight: uint8 [outputs, row_bytes]; bit c * taps + tap of a row, least significant first, is 1 where w = +1.
    """
    if weight.dtype != torch.uint8 or tuple(weight.shape) != (shape.outputs, shape.row_bytes):
        raise ValueError(f"weight {weight.dtype} {tuple(weight.shape)} is not {(shape.outputs, shape.row_bytes)} bytes")
    _refuse_shape(shape.bits, shape.zero, shape.channels * shape.kernel[0] * shape.kernel[1])
    weight = weight.contiguous()
    if path() == "torch":
        return weight
    native, c_shape = library().paths[path()], _shape(shape, h=shape.kernel[0], w=shape.kernel[1])
    arranged = torch.empty(native.arranged_size(c_shape), dtype=torch.uint8)
    native.arrange(c_shape, weight.data_ptr(), arranged.data_ptr())
    return arranged


def signs(weight: Tensor, channels: int, kernel: tuple[int, int]) -> Tensor:
    """A file's bits [K, row_bytes] -> +-1.0 [K, channels, *kernel]."""
    bits = weight[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1
    n = channels * kernel[0] * kernel[1]
    return bits.flatten(1)[:, :n].float().mul_(2).sub_(1).view(-1, channels, *kernel)


def pack_signs(weight: Tensor) -> Tensor:
    """w [K, ...] -> uint8 [K, row_bytes], 1 where w >= 0 (every sign is +1 at 0)."""
    bits = (weight.flatten(1) >= 0).to(torch.uint8)
    bits = F.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def levels(x: Tensor, bits: int, step: float, zero: float, low: float, threshold: Tensor | None) -> Tensor:
    """The integers a (see the module) of x, as floats; channels on axis 1. x itself if bits is 32."""
    if bits == REAL:
        return x
    if bits == 1:
        least = 0.0 if threshold is None else threshold.view(-1, *[1] * (x.dim() - 2))
        return torch.where(x >= least, 1.0, -1.0)
    return (x / torch.tensor(step) + zero).round_().clamp_(low, low + 2**bits - 1).nan_to_num_(nan=low).sub_(zero)


_CONV2D = (
    "conv2d(Tensor x, Tensor weight, Tensor sigma, Tensor? bias, int[2] kernel, int[2] stride, int[2] padding, "
    "int bits, float step, float zero, float low, Tensor? threshold=None, Tensor? gain=None, Tensor? shift=None, "
    "bool silu=False, Tensor? residual=None) -> Tensor"
)
_LINEAR = (
    "linear(Tensor x, Tensor weight, Tensor sigma, Tensor? bias, int bits, float step, float zero, float low, "
    "Tensor? threshold=None, Tensor? gain=None, Tensor? shift=None, Tensor? residual=None) -> Tensor"
)
_GROUP_AFFINE = "group_affine(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)"
_ATTENTION = "attention(Tensor q, Tensor k, Tensor v, int heads, float scale) -> Tensor"
_operators = torch.library.Library("bdm", "DEF")
for _schema in (_CONV2D, _LINEAR, _GROUP_AFFINE, _ATTENTION):
    _operators.define(_schema)


def _out(size: int, kernel: int, stride: int, pad: int) -> int:
    return (size + 2 * pad - kernel) // stride + 1


def _like(x: Tensor, sigma: Tensor, kernel: list[int], stride: list[int], padding: list[int]) -> Tensor:
    """An empty output of a convolution, in the memory format of x."""
    n, _, h, w = x.shape
    size = (_out(h, kernel[0], stride[0], padding[0]), _out(w, kernel[1], stride[1], padding[1]))
    form = torch.channels_last if _is_last(x) else torch.contiguous_format
    return torch.empty((n, sigma.numel(), *size), dtype=x.dtype, device=x.device, memory_format=form)


def _is_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def conv2d(
    x: Tensor, weight: Tensor, sigma: Tensor, bias: Tensor | None, kernel: list[int], stride: list[int],
    padding: list[int], bits: int, step: float, zero: float, low: float, threshold: Tensor | None = None,
    gain: Tensor | None = None, shift: Tensor | None = None, silu: bool = False, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A convolution as the module says; NaN is quantized to the lowest level.

    Shapes: x fp32 [N, C, H, W] in either memory format, which the result has, too; weight from `arrange`; sigma fp32
    [K]; bias fp32 [K], or [N, K] for one per image; threshold fp32 [C], for 1 bit; gain, shift fp32 [N, C]: x is first
    replaced by f(gain x + shift), f = SiLU if `silu`; residual, shaped as the result, is added to it.
    """
    last = _is_last(x)
    y = _like(x, sigma, kernel, stride, padding)
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    if path() == "torch":
        x = _before(x, gain, shift, silu, 1)
        a = levels(x, bits, step, zero, low, threshold)  # integers in floats: sums are exact below 2^24
        found = F.conv2d(a, signs(weight, x.shape[1], tuple(kernel)), None, stride, padding)
        found = (found if bits == REAL else found.round_()) * (sigma * step).view(1, -1, 1, 1)
        return y.copy_(_after(found, None if bias is None else bias[..., None, None], residual))
    x = x if last else x.contiguous()
    n, c, h, w = x.shape
    shape = (n, c, h, w, sigma.numel(), *kernel, *stride, *padding, bits, int(zero - low), int(last))
    _convolve(shape, x, weight, sigma, bias, y, step, zero, low, threshold, gain, shift, silu, residual)
    return y


def linear(
    x: Tensor, weight: Tensor, sigma: Tensor, bias: Tensor | None, bits: int, step: float, zero: float, low: float,
    threshold: Tensor | None = None, gain: Tensor | None = None, shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A matrix product as the module says. Shapes: x fp32 [..., C], with gain [N, L, C]; the result is [..., K]; all
    else as in conv2d."""
    size = (*x.shape[:-1], sigma.numel())
    if path() == "torch":
        a = levels(_before(x, gain, shift, False, -1).reshape(-1, x.shape[-1]), bits, step, zero, low, threshold)
        found = (a @ signs(weight, x.shape[-1], (1, 1)).flatten(1).t()).view(size) * (sigma * step)
        return _after(found, bias, residual)
    x = x.contiguous()
    y = x.new_empty(size)
    n, rows = (1, x.numel() // max(1, x.shape[-1])) if gain is None else x.shape[:2]
    shape = (n, x.shape[-1], 1, rows, sigma.numel(), 1, 1, 1, 1, 0, 0, bits, int(zero - low), 1)
    residual = None if residual is None else residual.contiguous()
    _convolve(shape, x, weight, sigma, bias, y, step, zero, low, threshold, gain, shift, False, residual)
    return y


def _before(x: Tensor, gain: Tensor | None, shift: Tensor | None, silu: bool, axis: int) -> Tensor:
    if gain is None:
        return x
    size = [1] * x.dim()
    size[0], size[axis] = gain.shape
    x = x * gain.view(size) + shift.view(size)
    return F.silu(x) if silu else x


def _after(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = y if bias is None else y + bias
    return y if residual is None else y + residual


def group_affine(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Group normalisation of x as gain x + shift: gain = weight / sqrt(variance + eps), shift = bias - mean gain.

    Shapes: x fp32 [N, C, ...] (4 axes: in either memory format); weight, bias fp32 [C]; gain, shift [N, C].
    """
    n, c = x.shape[:2]
    last = x.dim() == 4 and _is_last(x)
    if not x.numel():
        return x.new_full((n, c), torch.nan), x.new_full((n, c), torch.nan)
    if path() == "torch":
        parts = x.reshape(n, groups, -1).double()
        by = (parts.var(2, correction=0) + eps).rsqrt().repeat_interleave(c // groups, 1)
        gain = by if weight is None else by * weight
        shift = -parts.mean(2).repeat_interleave(c // groups, 1) * gain
        return gain.float(), (shift if bias is None else shift + bias).float()
    x = x if last else x.contiguous()
    _refuse_others("x, weight and bias", x.permute(0, 2, 3, 1) if last else x, weight, bias)
    gain, shift = x.new_empty((n, c)), x.new_empty((n, c))
    arguments = (n, c, x.numel() // (n * c), groups, int(last), eps, _pointer(weight), _pointer(bias))
    failed = library().group_affine(
        x.data_ptr(), *arguments, gain.data_ptr(), shift.data_ptr(), torch.get_num_threads()
    )
    if failed:
        raise MemoryError("no memory for a normalisation's sums")
    return gain, shift


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float) -> Tensor:
    """softmax(scale Q K^T) V per head, in fp32. Shapes: q [N, L, heads * d], k and v [N, M, heads * d]; as q."""
    if path() == "avx512":
        q, k, v = (part.contiguous() for part in (q, k, v))
        _refuse_others("q, k and v", q, k, v)
        n, length, c = q.shape
        if k.shape != v.shape or (k.shape[0], k.shape[2]) != (n, c) or c % heads:
            raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} are not of {heads} heads")
        y = torch.empty_like(q)
        if not y.numel() or not k.numel():
            return y.zero_()
        arguments = (n, length, k.shape[1], heads, c // heads, scale, y.data_ptr(), torch.get_num_threads())
        if library().attention(q.data_ptr(), k.data_ptr(), v.data_ptr(), *arguments):
            raise MemoryError("no memory for the scores of an attention")
        return y
    parts = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(*parts, scale=scale).transpose(1, 2).flatten(2)


@functools.lru_cache(4096)
def _described(path: str, *values: int) -> tuple[_Shape, int]:
    """A call's shape, made once, and how many bytes its arranged weights have."""
    shape = _Shape(*values)
    _refuse_shape(shape.bits, values[12], shape.c * shape.kh * shape.kw)
    return shape, library().paths[path].arranged_size(shape)


def _refuse_shape(bits: int, zero: int, products: int) -> None:
    """Bits that there are not, and sums that int32 does not hold."""
    if not (1 <= bits <= 8 or bits == REAL):
        raise ValueError(f"activations have 1..8 bits, or {REAL}, not {bits}")
    if bits < REAL and products * (2 ** (bits + 1) + abs(zero)) >= 2**31:
        raise ValueError(f"sums of {products} products around the zero point {zero} go beyond 32 bits")


def _refuse_others(names: str, *tensors: Tensor | None) -> None:
    """C reads contiguous fp32."""
    for tensor in tensors:
        if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
            raise ValueError(f"{names} must be contiguous fp32, not {tensor.dtype} with strides {tensor.stride()}")


def _convolve(
    shape: tuple[int, ...], x: Tensor, weight: Tensor, sigma: Tensor, bias: Tensor | None, y: Tensor, step: float,
    zero: float, low: float, threshold: Tensor | None, gain: Tensor | None, shift: Tensor | None, silu: bool,
    residual: Tensor | None,
) -> None:  # fmt: skip
    if not y.numel():
        return
    if x.dtype != torch.float32:
        raise ValueError(f"x must be fp32, not {x.dtype}")
    if not x.numel():
        raise ValueError(f"x {tuple(x.shape)} holds no numbers")
    _refuse_others("sigma, bias, threshold, gain and shift", sigma, bias, threshold, gain, shift)
    n, c, k = shape[0], shape[1], shape[4]
    sizes = ((bias, (k, n * k)), (threshold, (c,)), (gain, (n * c,)), (shift, (n * c,)))
    if any(tensor is not None and tensor.numel() not in allowed for tensor, allowed in sizes):
        raise ValueError(f"bias, threshold, gain or shift is not for {n} images, {c} channels and {k} outputs")
    described, weight_bytes = _described(path(), *shape)
    if weight.dtype != torch.uint8 or weight.numel() != weight_bytes:
        raise ValueError(f"weight is {weight.numel()} of {weight.dtype}; {c} channels to {k} take {weight_bytes} bytes")
    if residual is not None and (residual.shape != y.shape or residual.dtype != torch.float32):
        raise ValueError(f"residual {residual.dtype} {tuple(residual.shape)} is not the result's fp32 {tuple(y.shape)}")
    per_image = bias is not None and bias.dim() == 2
    settings = _Input(
        step, zero, low, _pointer(threshold), _pointer(gain), _pointer(shift), silu, per_image, _pointer(residual)
    )
    failed = library().paths[path()].convolve(
        ctypes.addressof(described), ctypes.addressof(settings), x.data_ptr(), weight.data_ptr(), sigma.data_ptr(),
        _pointer(bias), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError("no memory for the packed convolution's tables")


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


for _function in (conv2d, linear, group_affine, attention):
    _operators.impl(_function.__name__, _function, "CPU")


@torch.library.register_fake("bdm::conv2d")
def _(x, weight, sigma, bias, kernel, stride, padding, *arguments, **options):
    return _like(x, sigma, kernel, stride, padding)


@torch.library.register_fake("bdm::linear")
def _(x, weight, sigma, *arguments, **options):
    return x.new_empty((*x.shape[:-1], sigma.numel()))


@torch.library.register_fake("bdm::group_affine")
def _(x, groups, weight, bias, eps):
    return x.new_empty(x.shape[:2]), x.new_empty(x.shape[:2])


@torch.library.register_fake("bdm::attention")
def _(q, k, v, heads, scale):
    return q.new_empty(q.shape)
