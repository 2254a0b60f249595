"""Frames and their parts against NumPy: thresholds, RPReLU, resizing, shortcuts, and what they count."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bdm_cli.quant.frames import (
    Carrying,
    Frame,
    RPReLU,
    Threshold,
    channels_shape,
    resized,
    shortcut,
    with_bias,
)
from bdm_cli.quant.layers import Parts, QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import MeanSignWeight, SignActivation
from bdm_cli.quant.ste import sign_poly_ste


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape))


def test_a_plain_frame_is_a_plain_layer():
    conv = nn.Conv2d(3, 5, 3, padding=1).double()
    x = normal(2, 3, 6, 6)
    framed = QuantConv2d(copy.deepcopy(conv), Parts(frame=Frame()))
    torch.testing.assert_close(framed(x), conv(x), rtol=1e-12, atol=1e-12)
    assert Frame().operations(x.shape, x.shape) == 0
    assert Frame().stored() == 0


def test_biases_stand_on_the_channel_axis():
    bias = normal(3)
    for shape, axis in (((2, 3, 4, 5), 1), ((2, 4, 3), 2), ((2, 3), 1)):
        product = normal(*shape, seed=1)
        expected = product.numpy() + bias.numpy().reshape([-1 if i == axis else 1 for i in range(len(shape))])
        assert np.array_equal(with_bias(product, bias).numpy(), expected)
        assert with_bias(product, None) is product


def test_channels_shape_broadcasts_against_inputs_and_outputs():
    assert channels_shape(nn.Conv2d(3, 5, 1), 5) == (5, 1, 1)
    assert channels_shape(nn.Linear(3, 5), 5) == (5,)


@pytest.mark.parametrize(
    ("layer", "shape", "axis"),
    [(nn.Conv2d(3, 5, 1), (2, 3, 4, 4), 1), (nn.Linear(3, 5), (2, 4, 3), 2), (nn.Linear(3, 5), (2, 3), 1)],
    ids=["conv", "tokens", "linear"],
)
def test_a_threshold_is_added_per_input_channel(layer: nn.Module, shape: tuple[int, ...], axis: int):
    frame = Threshold(layer)
    assert frame.threshold.shape == channels_shape(layer, 3)
    assert torch.equal(frame.threshold, torch.zeros_like(frame.threshold))
    assert frame.stored() == 3
    assert frame.operations(torch.Size(shape), torch.Size((2, 5, 4, 4))) == np.prod(shape)
    frame = frame.double()
    frame.threshold.data = normal(3).view_as(frame.threshold)
    x, g = normal(*shape, seed=1), normal(*shape, seed=2)
    moved = frame.before(x)
    place = [-1 if i == axis else 1 for i in range(len(shape))]
    np.testing.assert_array_equal(moved.detach().numpy(), x.numpy() + normal(3).numpy().reshape(place))
    moved.backward(g)
    others = tuple(i for i in range(len(shape)) if i != axis)
    np.testing.assert_allclose(frame.threshold.grad.flatten().numpy(), g.numpy().sum(others), rtol=1e-12)


def test_a_quantizer_behind_a_threshold_sees_the_sum():
    """RSign in a linear layer: sgn(x + b), whose gradient 2 - 2 |x + b| is that of the sum, at its edges too."""
    layer = QuantLinear(
        nn.Linear(4, 1, bias=False).double(),
        Parts(MeanSignWeight(), SignActivation(sign_poly_ste), Threshold(nn.Linear(4, 1)).double()),
    )
    layer.weight.data = torch.tensor([[0.5, -0.5, 0.25, 0.75]], dtype=torch.float64)
    layer.frame.threshold.data = torch.tensor([0.5, 0.5, 0.5, -1.0], dtype=torch.float64)
    x = torch.tensor([[-0.5, 0.5, -0.75, -1.0]], dtype=torch.float64, requires_grad=True)  # sums 0, 1, -0.25, -2
    y = layer(x)
    assert y.item() == 0.5 * (1 - 1 - 1 - 1)  # 0.5 = mean |w|; signs of the sums +, +, -, - and of w +, -, +, +
    y.sum().backward()
    expected = 0.5 * np.array([1, -1, 1, 1]) * np.array([2, 0, 1.5, 0])
    np.testing.assert_allclose(x.grad.numpy()[0], expected, rtol=1e-12)
    np.testing.assert_allclose(layer.frame.threshold.grad.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("shape", "axis"), [((3, 1, 1), 1), ((3,), 2)])
def test_rprelu_and_its_gradients(shape: tuple[int, ...], axis: int):
    rprelu = RPReLU(shape).double()
    start = [rprelu.move_1, rprelu.move_2, rprelu.slope]
    assert [part.unique().tolist() for part in start] == [[0], [0], [0.25]]
    c1, c2, slope = (normal(3, seed=seed) for seed in (1, 2, 3))
    for part, value in zip(start, (c1, c2, slope), strict=True):
        part.data = value.view(shape)
    y, g = normal(2, *((3, 5, 4) if axis == 1 else (5, 3)), seed=4), None
    with torch.no_grad():  # some exactly at the kink
        y[0] = torch.where(y[0] > 0.5, -c1.view(shape).expand_as(y[0]), y[0])
    y.requires_grad_()
    out = rprelu(y)
    g = normal(*out.shape, seed=5)
    out.backward(g)
    place = [-1 if i == axis else 1 for i in range(y.dim())]
    moved = y.detach().numpy() + c1.numpy().reshape(place)
    below = moved < 0
    factor = np.where(below, slope.numpy().reshape(place), 1)
    np.testing.assert_allclose(out.detach().numpy(), factor * moved + c2.numpy().reshape(place), rtol=1e-12)
    others = tuple(i for i in range(y.dim()) if i != axis)
    np.testing.assert_allclose(y.grad.numpy(), g.numpy() * factor, rtol=1e-12)
    np.testing.assert_allclose(rprelu.move_1.grad.flatten().numpy(), (g.numpy() * factor).sum(others), rtol=1e-10)
    np.testing.assert_allclose(rprelu.move_2.grad.flatten().numpy(), g.numpy().sum(others), rtol=1e-10)
    np.testing.assert_allclose(
        rprelu.slope.grad.flatten().numpy(), (g.numpy() * np.where(below, moved, 0)).sum(others), rtol=1e-10
    )
    assert rprelu.operations(out.shape) == 3 * out.numel()


def numpy_pooled(x: np.ndarray, ratio: int, side: int) -> np.ndarray:
    parts = [x[:, :, i : side * ratio : ratio, j : side * ratio : ratio] for i in range(ratio) for j in range(ratio)]
    return sum(parts) / ratio**2


@pytest.mark.parametrize(("side", "to"), [(8, 4), (9, 4), (8, 2), (33, 16), (3, 1)])
def test_larger_maps_are_pooled_in_squares(side: int, to: int):
    """9 -> 4 is a convolution of stride 2 behind diffusers' row and column of zeros: they are not averaged in."""
    x = normal(2, 3, side, side)
    found = resized(x, torch.empty(2, 7, to, to)).numpy()
    np.testing.assert_allclose(found, numpy_pooled(x.numpy(), side // to, to), rtol=1e-12)


def test_odd_sides_are_pooled_in_overlapping_squares():
    x = normal(1, 1, 7, 7)
    found = resized(x, torch.empty(1, 1, 4, 4)).numpy()[0, 0]
    assert found.shape == (4, 4)
    assert found[0, 0] == pytest.approx(x[0, 0, :2, :2].mean().item())
    assert found[3, 1] == pytest.approx(x[0, 0, 5:, 1:4].mean().item())


def test_smaller_maps_are_repeated_and_equal_ones_left():
    x = normal(2, 3, 4, 4)
    found = resized(x, torch.empty(2, 3, 8, 8)).numpy()
    assert np.array_equal(found, x.numpy().repeat(2, 2).repeat(2, 3))
    assert resized(x, torch.empty(2, 9, 4, 4)) is x
    tokens = normal(2, 5, 3)
    assert resized(tokens, torch.empty(2, 5, 7)) is tokens


def numpy_shortcut(x: np.ndarray, wanted: int) -> np.ndarray:
    given = x.shape[1]
    if given <= wanted:
        return np.stack([x[:, c % given] for c in range(wanted)], 1)
    return np.stack([x[:, c::wanted].mean(1) for c in range(wanted)], 1)


@pytest.mark.parametrize(
    ("given", "wanted"), [(4, 4), (4, 8), (4, 6), (4, 11), (8, 4), (12, 4), (7, 4), (11, 4), (3, 1)]
)
def test_a_shortcut_repeats_channels_or_averages_them(given: int, wanted: int):
    x = normal(2, given, 3, 3).requires_grad_()
    out = shortcut(x, torch.empty(2, wanted, 3, 3))
    np.testing.assert_allclose(out.detach().numpy(), numpy_shortcut(x.detach().numpy(), wanted), rtol=1e-12)
    g = normal(*out.shape, seed=1)
    out.backward(g)
    matrix = numpy_shortcut(np.eye(given)[None], wanted)[0]  # [wanted, given]: out_c = sum_j matrix_cj x_j
    np.testing.assert_allclose(x.grad.numpy(), np.einsum("ncyx,cj->njyx", g.numpy(), matrix), rtol=1e-12)


def test_a_shortcut_of_other_sides_and_channels():
    x = normal(2, 6, 8, 8)
    found = shortcut(x, torch.empty(2, 4, 4, 4)).numpy()
    np.testing.assert_allclose(found, numpy_shortcut(numpy_pooled(x.numpy(), 2, 4), 4), rtol=1e-12)


class Squared(Carrying):
    """f(y) = y^2, two operations a number (it says)."""

    def __init__(self, inside: bool, carries: bool) -> None:
        super().__init__()
        self.inside, self.carries = inside, carries

    def activation(self, y: Tensor) -> Tensor:
        return y * y

    def activation_operations(self, written: torch.Size) -> int:
        return 2 * written.numel()


def test_a_shortcut_inside_and_outside_of_the_activation():
    x, product, bias = normal(2, 4, 6, 6), normal(2, 8, 3, 3, seed=1), normal(8, seed=2)
    y, carried = product + bias.view(-1, 1, 1), shortcut(x, product)
    assert torch.equal(Squared(True, True).after(x, product, bias), (y + carried) ** 2)
    assert torch.equal(Squared(False, True).after(x, product, bias), y**2 + carried)
    for inside in (True, False):
        assert torch.equal(Squared(inside, False).after(x, product, bias), y**2)
        assert torch.equal(Squared(inside, False).after(x, product, None), product**2)


@pytest.mark.parametrize(
    ("read", "written", "operations"),
    [
        ((1, 4, 8, 8), (1, 4, 8, 8), 256),  # the addition alone
        ((1, 4, 8, 8), (1, 8, 8, 8), 512),
        ((1, 4, 8, 8), (1, 4, 4, 4), 64 + 256),  # every input is read into a mean
        ((1, 8, 8, 8), (1, 4, 8, 8), 256 + 512),
        ((1, 8, 8, 8), (1, 4, 4, 4), 64 + 512 + 128),
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_operations_of_a_shortcut(read: tuple[int, ...], written: tuple[int, ...], operations: int, inside: bool):
    sizes = torch.Size(read), torch.Size(written)
    activation = 2 * sizes[1].numel()
    assert Squared(inside, True).operations(*sizes) == operations + activation
    assert Squared(inside, False).operations(*sizes) == activation


def test_frames_are_built_on_the_meta_device():
    with torch.device("meta"):
        frame = Threshold(nn.Conv2d(3, 5, 1))
    assert frame.threshold.device.type == "meta"
    assert list(frame.state_dict()) == ["threshold"]
