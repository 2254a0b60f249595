"""Packed layers against the simulated ones they come from: single layers, then whole U-Nets of every kind."""

import copy
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import students
import torch
from torch import Tensor, nn
from zero_points import TimedZero, ZeroWeight

from bdm_cli import student
from bdm_cli.diffusion.sampling import times
from bdm_cli.errors import BdmError
from bdm_cli.packed import pack
from bdm_cli.packed.layers import GridActivation, PackedConv2d, PackedLinear, unpack_
from bdm_cli.packed.pack import Packed
from bdm_cli.quant.layers import Parts, QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import EbbWeight, Grid, Lsq, SignWeight
from bdm_cli.recipe import Recipe

TinyRecipe = Callable[..., Recipe]

# one layer


def unpacked(spec: Recipe, layer: nn.Module, plain: nn.Module) -> nn.Module:
    """A quantized layer through the packed form into the place of `plain`."""
    quantized, target = nn.Module(), nn.Module()
    quantized.only, target.only = layer, plain
    packed = students.packed(spec, quantized)
    unpack_(target, packed)
    return target.only.eval()


def activations(bits: int, signed: bool, zero: int, x: Tensor) -> Lsq | None:
    if bits == 32:
        return None
    quantizer = Lsq(bits, signed, zero)
    quantizer.calibrate_(x)
    with torch.no_grad():
        quantizer.scale.mul_(0.5)  # so that some are clipped
    return quantizer


INPUTS = [(4, True, 0), (8, True, 0), (2, True, 0), (4, False, 7), (4, True, 3), (8, False, 0), (32, True, 0)]
"""Bits, signed, zero point of the activations."""

LAYERS = {
    "3x3": lambda bias: nn.Conv2d(6, 10, 3, padding=1, bias=bias),
    "1x1": lambda bias: nn.Conv2d(6, 10, 1, bias=bias),
    "strided": lambda bias: nn.Conv2d(6, 10, 3, stride=2, padding=1, bias=bias),
    "oblong": lambda bias: nn.Conv2d(6, 10, (3, 1), padding=(1, 0), bias=bias),
    "linear": lambda bias: nn.Linear(6, 10, bias=bias),
}


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize(("name", "bias"), itertools.product(LAYERS, (True, False)))
@pytest.mark.parametrize("weights", [SignWeight, EbbWeight])
def test_a_layer_computes_what_it_did(
    weights: type, name: str, bias: bool, inputs: tuple[int, bool, int], kernel: str, tiny_recipe: TinyRecipe
):
    """As the layer that trains, within fp32's rounding; as the layer that draws, bit for bit."""
    torch.manual_seed(0)
    plain = LAYERS[name](bias)
    x = torch.randn(3, 7, 6) if name == "linear" else torch.randn(2, 6, 9, 7)
    kind, packed_kind = (QuantLinear, PackedLinear) if name == "linear" else (QuantConv2d, PackedConv2d)
    layer = kind(plain, Parts(weights(plain.weight), activations(*inputs, x))).eval()
    ours = unpacked(tiny_recipe(), layer, LAYERS[name](bias))
    assert type(ours) is packed_kind
    trained = layer(x).detach()
    with torch.no_grad():
        drawn, y = layer(x), ours(x)
        assert y.shape == trained.shape
        torch.testing.assert_close(y, trained, rtol=0, atol=1e-5 * float(trained.abs().max()))
        if inputs[0] < 32:
            assert torch.equal(y, drawn)
        if name != "linear":
            last = ours(x.contiguous(memory_format=torch.channels_last))
            torch.testing.assert_close(last, y, rtol=0, atol=1e-5 * float(trained.abs().max()))
            assert last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", LAYERS)
def test_the_sums_are_the_same_whole_numbers(name: str, kernel: str, tiny_recipe: TinyRecipe):
    """With every scale 1 and no bias, a layer gives its sums themselves."""
    torch.manual_seed(0)
    plain = LAYERS[name](False)
    x = 3 * torch.randn(5, 6) if name == "linear" else 3 * torch.randn(2, 6, 9, 7)
    quantizer, weights = Lsq(4, False, 5), SignWeight(plain.weight)
    with torch.no_grad():
        quantizer.scale.fill_(1.0)
        weights.sigma.fill_(1.0)
        layer = (QuantLinear if name == "linear" else QuantConv2d)(plain, Parts(weights, quantizer)).eval()
        y = unpacked(tiny_recipe(), layer, LAYERS[name](False))(x)
        a = (x.double() + 5).round().clamp(0, 15) - 5
        signs = torch.where(plain.weight >= 0, 1.0, -1.0).double()
        exact = a @ signs.T if name == "linear" else plain._conv_forward(a, signs, None)
        assert torch.equal(y.double(), exact)
        assert torch.equal(layer(x).double(), exact)


@pytest.mark.parametrize("bits", range(2, 9))
def test_layers_of_more_bits_are_simulated_bit_for_bit(bits: int, tiny_recipe: TinyRecipe):
    torch.manual_seed(0)
    plain, x = nn.Conv2d(6, 10, 3, padding=1), torch.randn(2, 6, 9, 7)
    quantizer = Lsq(bits, scale_shape=(10, 1, 1, 1))
    quantizer.calibrate_(plain.weight.detach())
    layer = QuantConv2d(plain, Parts(quantizer, activations(4, True, 0, x))).eval()
    ours = unpacked(tiny_recipe(), layer, nn.Conv2d(6, 10, 3, padding=1))
    assert type(ours) is QuantConv2d
    with torch.no_grad():
        assert torch.equal(ours(x), layer(x))
        torch.testing.assert_close(ours(x), layer.requires_grad_(True)(x), rtol=1e-5, atol=1e-5)


def timed(bits: int) -> TimedZero:
    """For two sampling times."""
    if bits == 1:
        return TimedZero(1, (0.3, 0.2), (0.25, -0.1))
    return TimedZero(bits, (4 / 2**bits, 2.5 / 2**bits), (2.0 ** (bits - 1), 3.0 - bits))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_layers_with_zero_points_are_simulated_bit_for_bit(bits: int, name: str, tiny_recipe: TinyRecipe):
    """Of weights by channel, of inputs by sampling time."""
    torch.manual_seed(0)
    plain = LAYERS[name](True)
    x = torch.randn(3, 7, 6) if name == "linear" else torch.randn(2, 6, 9, 7)
    kind, activation = QuantLinear if name == "linear" else QuantConv2d, timed(bits)
    layer = kind(plain, Parts(ZeroWeight(plain.weight, bits), activation)).eval()
    ours = unpacked(tiny_recipe(), layer, LAYERS[name](True))
    assert type(ours) is kind
    assert ours.activation_quantizer(x).isnan().all()
    with torch.no_grad():
        for activation.index in (1, 0):
            ours.activation_quantizer.select(activation.index)
            assert torch.equal(ours.activation_quantizer(x), activation(x))
            assert torch.equal(ours(x), layer(x))
            with torch.enable_grad():
                trained = layer(x).detach()
            torch.testing.assert_close(ours(x), trained, rtol=0, atol=1e-5 * float(trained.abs().max()))


@pytest.mark.parametrize("name", LAYERS)
def test_thresholds_by_sampling_time(name: str, kernel: str, tiny_recipe: TinyRecipe):
    """step sgn(x - threshold) with weights of 1 bit, on the threshold too."""
    torch.manual_seed(0)
    plain = LAYERS[name](True)
    x = torch.randn(3, 7, 6) if name == "linear" else torch.randn(2, 6, 9, 7)
    x.view(-1)[:2] = torch.tensor([0.25, -0.1])
    kind, activation = QuantLinear if name == "linear" else QuantConv2d, timed(1)
    layer = kind(plain, Parts(SignWeight(plain.weight), activation)).eval()
    ours = unpacked(tiny_recipe(), layer, LAYERS[name](True))
    assert type(ours) is (PackedLinear if name == "linear" else PackedConv2d)
    with torch.no_grad():
        for activation.index in (1, 0):
            ours.select(activation.index)
            assert torch.equal(ours(x), layer(x))
    assert len({*activation(x).flatten().tolist()}) == 2


# whole networks


def inputs_of(spec: Recipe, time: float = 3, n: int = 2) -> tuple[Tensor, ...]:
    x, _, *context = student.random_inputs(spec, n, torch.Generator().manual_seed(2))
    return x, torch.full((n,), time), *context


NETWORKS = {
    "W1A4": ("tiny-w1a4", None, [], True),
    "W1A8": ("tiny-w1a4", None, ["method.activation_bits=8"], True),
    "W1A32": ("tiny-w1a4", None, ["method.activation_bits=32"], True),
    "real edges": ("tiny-w1a4", None, ["method.edge_bits=32"], True),
    "edges of 4 bits": ("tiny-w1a4", None, ["method.edge_bits=4"], True),
    "two bases": ("tiny-w1a4", None, ["method.ebb_scope=2"], False),
    "baseline": ("tiny-w1a4", "baseline", [], True),
    "W2A4": ("tiny-w1a4", "lsq", [], True),
    "W5A4": ("tiny-w1a4", "lsq", ["method.weight_bits=5"], True),
    "operands": ("tiny-w1a4", None, ["method.attention_matmul=true"], True),
    "latents": ("tiny-ldm", None, [], True),
    "classes": ("tiny-cond", None, [], True),
    "classes and operands": ("tiny-cond", None, ["method.attention_matmul=true"], True),
}


def network(name: str, tiny_recipe: TinyRecipe) -> tuple[Recipe, nn.Module, Packed]:
    recipe, method, overrides, evolved = NETWORKS[name]
    spec = tiny_recipe(*overrides, name=recipe, method=method)
    unet = students.finished(spec, evolved)
    return spec, unet, students.packed(spec, unet)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_computes_what_it_did(name: str, kernel: str, tiny_recipe: TinyRecipe, tmp_path: Path):
    """Through a file. Real activations are summed in other orders; all else is exact."""
    spec, unet, packed = network(name, tiny_recipe)
    pack.write(tmp_path / "m.safetensors", packed)
    ours = student.unpacked(pack.read(tmp_path / "m.safetensors"), tmp_path / "m.safetensors")
    one_bit = [layer for layer in packed.header.layers.values() if layer.bits == 1]
    found = [m for m in ours.modules() if isinstance(m, PackedConv2d | PackedLinear)]
    assert len(found) == len(one_bit)
    assert bool(found) == ("W2" not in name and "W5" not in name)
    with torch.inference_mode():
        for time in (0, 517):
            expected = unet(*inputs_of(spec, time))[0]
            y = ours(*inputs_of(spec, time))[0]
            if name != "W1A32":
                assert torch.equal(y, expected)
            else:
                assert float((y - expected).square().mean().sqrt() / expected.std()) < 1e-2
    assert float(expected.std()) > 0.01


def test_half_is_near(tiny_recipe: TinyRecipe):
    spec = tiny_recipe("method.activation_bits=32")
    unet = students.finished(spec)
    ours = student.unpacked(students.packed(spec, unet, half=True), Path("m"))
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    with torch.inference_mode():
        expected, y = unet(*inputs_of(spec))[0], ours(*inputs_of(spec))[0]
    assert 0 < float((y - expected).abs().max() / expected.abs().max()) < 5e-3


def test_no_parameter_is_left_without_memory(tiny_recipe: TinyRecipe):
    _, _, packed = network("classes and operands", tiny_recipe)
    ours = student.unpacked(packed, Path("m"))
    assert not any(tensor.is_meta for tensor in [*ours.parameters(), *ours.buffers()])
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not ours.training


def test_a_copy_draws_and_a_state_dict_is_refused(tiny_recipe: TinyRecipe):
    spec, _, packed = network("W1A4", tiny_recipe)
    ours = student.unpacked(packed, Path("m"))
    twin = copy.deepcopy(ours)
    with torch.inference_mode():
        assert torch.equal(ours(*inputs_of(spec))[0], twin(*inputs_of(spec))[0])
    with pytest.raises(ValueError, match="copy the packed file instead"):
        twin.state_dict()


# a step per sampling time


class TimedLsq(Lsq):
    """As a method that learns a step size per sampling time would have it."""

    FACTORS = (1.0, 1.3, 0.8, 1.1)

    def grid(self, times: Sequence[float] | None = None) -> Grid:
        grid = super().grid()
        steps = [grid.step * self.FACTORS[i % 4] for i, _ in enumerate(times)]
        return grid._replace(step=torch.cat(steps))


@pytest.mark.parametrize("settings", [["sample.steps=4"], ["sample.steps=4", "sample.sampler=plms", "sample.eta=0"]])
@pytest.mark.parametrize("operands", [False, True])
def test_a_step_per_sampling_time(
    settings: list[str], operands: bool, kernel: str, tiny_recipe: TinyRecipe, tmp_path: Path
):
    spec = tiny_recipe(*settings, f"method.attention_matmul={str(operands).lower()}", name="tiny-ldm")
    unet = students.finished(spec)
    timed = [m for m in unet.modules() if isinstance(m, Lsq) and not m.scale.dim()]
    for quantizer in timed:
        quantizer.__class__ = TimedLsq
    pack.write(tmp_path / "m", students.packed(spec, unet))
    for quantizer in timed:
        quantizer.__class__ = Lsq
    packed = pack.read(tmp_path / "m")
    listed = list(dict.fromkeys(times(spec.sample.sampler, spec.scheduler, spec.sample.steps)))
    assert packed.tensors[pack.TIMES].tolist() == listed
    ours = student.unpacked(packed, Path("m"))
    twin = copy.deepcopy(ours)
    learned = [quantizer.scale.clone() for quantizer in timed]
    with torch.inference_mode():
        for index in (2, 0, 3, 1):
            for quantizer, scale in zip(timed, learned, strict=True):
                quantizer.scale = nn.Parameter(scale * TimedLsq.FACTORS[index])
            given = inputs_of(spec, listed[index])
            expected, y = unet(*given)[0], ours(*given)[0]
            assert torch.equal(y, expected)
        by_name = {"timestep": given[1], "sample": given[0]}
        assert torch.equal(twin(**by_name)[0], y)  # a copy has a hook of its own
        for time in (listed[0] + 1, torch.tensor([listed[0], listed[1]])):
            with pytest.raises(BdmError, match=r"has steps for 4 sampling times alone(?s:.*)sample with the sampler"):
                ours(given[0], time)


def test_steps_before_a_time_is_known_are_loud():
    activation = GridActivation(pack.Levels(4, -8, 0), torch.tensor([0.1, 0.2]))
    assert activation(torch.ones(3)).isnan().all()
    activation.select(1)
    torch.testing.assert_close(activation(torch.ones(3)), torch.ones(3))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bits", [(4, 4), (1, 1)])
def test_a_network_with_zero_points_by_sampling_time(
    bits: tuple[int, int], fused: bool, kernel: str, tiny_recipe: TinyRecipe
):
    """Layers and operands of attentions: at each time the student with that time's zero points."""
    torch.manual_seed(0)
    spec = tiny_recipe("method.attention_matmul=true", "method.edge_bits=32", name="tiny-ldm")
    unet = students.finished(spec)
    timed_ones = []
    for parent in list(unet.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Lsq):
                timed_ones.append(timed(bits[1]))
                setattr(parent, name, timed_ones[-1])
            elif isinstance(child, SignWeight) and bits[0] > 1:
                setattr(parent, name, ZeroWeight(parent.weight, bits[0]))
    packed = students.packed(spec, unet)
    ours = student.unpacked(packed, Path("m"), fused)
    listed = packed.tensors[pack.TIMES].tolist()
    assert len(listed) == 2
    with torch.inference_mode():
        for index in (1, 0):
            for quantizer in timed_ones:
                quantizer.index = index
            expected, y = (net(*inputs_of(spec, listed[index]))[0] for net in (unet, ours))
            assert expected.std() > 0.01
            if not fused:
                assert torch.equal(y, expected)
            else:
                torch.testing.assert_close(y, expected, rtol=0, atol=0.05 * float(expected.abs().max()))
