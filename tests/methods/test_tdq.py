"""TDQ: the step size as a function of time in float64, its gradients, its table, and the method on the tiny network."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import students
import torch
from torch import Tensor

from bdm_cli import methods, student
from bdm_cli.diffusion.models import estimate_noise
from bdm_cli.diffusion.sampling import times
from bdm_cli.errors import BdmError
from bdm_cli.methods.tdq import Tdq, TdqActivation
from bdm_cli.packed import pack
from bdm_cli.quant.layers import QuantAttnProcessor
from bdm_cli.quant.quantizers import Lsq, SignWeight
from bdm_cli.quant.swap import EDGES, quantized_layers
from bdm_cli.recipe import Recipe
from bdm_cli.student import Built

TinyRecipe = Callable[..., Recipe]


def quantizer(
    bits: int = 4, symmetric: bool = False, statistics: bool = False, dropout: float = 0.0, seed: int = 0
) -> TdqActivation:
    torch.manual_seed(seed)
    return TdqActivation(bits, 1000, 8, 6, dropout, symmetric, statistics)


def numpy_step(q: TdqActivation, t: float) -> float:
    """softplus(MLP(e_t)) in float64, e_t = sin and cos of t / 1000^(i / 4), i = 0..3."""
    phases = t / 1000 ** (np.arange(4) / 4)
    a = np.concatenate([np.sin(phases), np.cos(phases)])
    linears = [m for m in q.mlp if isinstance(m, torch.nn.Linear)]
    for index, linear in enumerate(linears):
        a = linear.weight.detach().double().numpy() @ a + linear.bias.detach().double().numpy()
        if index < len(linears) - 1:
            a = np.maximum(a, 0)
    return float(np.log1p(np.exp(a[0])))


def test_four_linear_layers_with_relus_and_dropout_before_the_last():
    kinds = [type(module).__name__ for module in quantizer(dropout=0.2).mlp]
    assert kinds == ["Linear", "ReLU", "Linear", "ReLU", "Linear", "ReLU", "Dropout", "Linear"]
    widths = [(m.in_features, m.out_features) for m in quantizer().mlp if isinstance(m, torch.nn.Linear)]
    assert widths == [(8, 6), (6, 6), (6, 6), (6, 1)]


@pytest.mark.parametrize("training", [True, False])
def test_the_step_of_a_time(training: bool):
    q = quantizer().train(training)
    q.calibrate_(torch.randn(3, 5, generator=torch.Generator().manual_seed(1)))
    t = torch.tensor([0, 999, 17, 999, 500])
    expected = [numpy_step(q, float(time)) for time in t]
    np.testing.assert_allclose(q.steps(t).detach().numpy(), expected, rtol=1e-5)
    assert len(set(q.steps(t).tolist())) == 4


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (2, False), (2, True), (8, False)])
@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (3, 7, 4), (3, 6)])
def test_values_and_gradients_by_sample(bits: int, symmetric: bool, shape: tuple[int, ...]):
    """LSQ with a step per image; ds reaches the MLP as the sum over the image, without LSQ's scaling."""
    q = quantizer(bits, symmetric)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    q.calibrate_(x)
    q.timestep = torch.tensor([3, 400, 990])
    high = 2 ** (bits - 1) - 1
    low = -high if symmetric else -high - 1
    x = x * (high + 1) * float(q.steps(torch.tensor([3]))[0].detach())
    x.view(3, -1)[0, 0] = 0.0
    x.requires_grad_()
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    y = q(x)
    y.backward(upstream)
    s = q.steps(q.timestep).detach().double().numpy().reshape(-1, *[1] * (len(shape) - 1))
    v, g = x.detach().double().numpy() / s, upstream.double().numpy()
    levels = np.clip(np.round(v), low, high)
    np.testing.assert_allclose(y.detach().numpy(), levels * s, rtol=1e-5, atol=1e-6)
    assert {low, high} <= set(np.round(levels).ravel())
    inside = (v >= low) & (v <= high)
    np.testing.assert_allclose(x.grad.numpy(), g * inside, rtol=1e-6)
    by_step = (g * (levels - np.where(inside, v, 0))).reshape(3, -1).sum(1)
    # ds/d(last bias) = 1 - exp(-s), the slope of softplus
    expected = (by_step * (1 - np.exp(-s.ravel()))).sum()
    assert float(q.mlp[-1].bias.grad) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert all(p.grad.abs().sum() > 0 for p in q.parameters())


def test_halves_and_ends_of_the_range():
    q = quantizer(4).eval()
    with torch.no_grad():
        for linear in (m for m in q.mlp if isinstance(m, torch.nn.Linear)):
            linear.weight.zero_()
            linear.bias.zero_()
        q.mlp[-1].bias.fill_(float(np.log(np.expm1(1.0))))  # s = 1 at every time
    q.timestep = torch.tensor([7])
    x = torch.tensor([[0.0, 0.5, 1.5, -0.5, 7.0, 7.25, -8.0, -8.25]], requires_grad=True)
    y = q(x)
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([[0.0, 0.0, 2.0, 0.0, 7.0, 7.0, -8.0, -8.0]]), rtol=1e-6, atol=0)
    assert x.grad.tolist() == [[1, 1, 1, 1, 1, 0, 1, 0]]


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("scale", [1e-4, 0.5, 40.0])
def test_the_last_bias_starts_so_that_its_softplus_is_s0(statistics: bool, scale: float):
    q = quantizer(statistics=statistics)
    assert q.waiting
    x = scale * (1 + torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1)))
    q.calibrate_(x)
    a = x.double().numpy()
    images = a.reshape(4, -1)
    lsq, tdq = 2 * np.abs(a).mean() / 7**0.5, (images.mean(1) + 3 * images.std(1)).mean() / 7
    assert not q.waiting
    start = torch.nn.functional.softplus(q.mlp[-1].bias.detach().double())
    assert float(start) == pytest.approx(tdq if statistics else lsq, rel=1e-3)
    assert q.steps(torch.arange(0, 1000, 100)).detach().numpy() == pytest.approx(tdq if statistics else lsq, rel=0.5)


@pytest.mark.parametrize("statistics", [False, True])
def test_silence_starts_finite(statistics: bool):
    q = quantizer(statistics=statistics)
    q.calibrate_(torch.zeros(2, 5))
    q.timestep = torch.tensor([1])
    assert q(torch.zeros(2, 5)).isfinite().all()
    assert 0 < float(q.steps(q.timestep).detach()) < 1e-6


def test_dropout_acts_in_training_alone():
    q = quantizer(dropout=0.5)
    q.calibrate_(torch.randn(3, 5))
    t = torch.full((64,), 10)
    assert len(q.steps(t).unique()) > 1
    assert len(q.eval().steps(t).unique()) == 1


def test_the_table_holds_the_very_numbers_of_single_calls():
    """Whatever the company: alone, in a list of all times, among other images."""
    q = quantizer().eval()
    q.calibrate_(torch.randn(3, 5))
    listed = [999, 3, 500, 0, 333.25]
    table = q.grid(listed).step
    for time, step in zip(listed, table, strict=True):
        q.timestep = torch.full((6,), time)
        assert torch.equal(q.grid().step, step.reshape(1))
        q.timestep = torch.tensor([time, 17, 4, time])
        assert torch.equal(q.steps(q.timestep)[[0, 3]], step.expand(2))
    assert q.grid(listed)[:3] == (4, -8, 0)


def test_no_grid_of_several_times_at_once_or_of_an_odd_number_of_levels():
    q = quantizer().eval()
    q.calibrate_(torch.randn(3, 5))
    q.timestep = torch.tensor([1, 2])
    with pytest.raises(NotImplementedError, match="a step size each, by their times"):
        q.grid()
    with pytest.raises(NotImplementedError, match="have 15 levels, not 2 to the 4"):
        quantizer(symmetric=True).grid([1])


# the method


def build(spec: Recipe) -> tuple[Built, tuple[Tensor, Tensor]]:
    built = student.build(spec, seed=0)
    inputs = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([5, 300, 600, 990])
    built.method.calibrate_(built.student, built.teacher, iter([inputs]))
    return built, inputs


@pytest.mark.parametrize("operands", [False, True])
def test_every_layer_but_the_edges_has_a_network_of_its_own(
    operands: bool, tiny_recipe: TinyRecipe, tiny_teacher: Path
):
    spec = tiny_recipe(f"method.attention_matmul={str(operands).lower()}", method="tdq")
    (_, unet, method), _ = build(spec)
    found = dict(quantized_layers(unet))
    assert set(EDGES) < set(found)
    for name, layer in found.items():
        edge = name in EDGES
        assert type(layer.weight_quantizer) is (Lsq if edge else SignWeight)
        assert type(layer.activation_quantizer) is (Lsq if edge else TdqActivation)
    networks = [m.mlp for m in unet.modules() if isinstance(m, TdqActivation)]
    processors = [m for m in unet.modules() if isinstance(m, QuantAttnProcessor)]
    assert len(processors) == 4 * operands
    assert len(networks) == len(set(networks)) == len(found) - 4 + 16 * operands
    first = networks[0]
    assert (first[0].in_features, first[0].out_features, first[-2].p) == (64, 64, 0.2)
    assert {name for name, _ in method.trainable(unet)} == {name for name, _ in unet.named_parameters()}


def test_the_defaults():
    method = Tdq()
    assert (method.activation_bits, method.edge_bits, method.attention_matmul) == (4, 8, False)
    assert (method.encoding, method.hidden, method.dropout) == (64, 64, 0.2)
    assert (method.start, method.levels) == ("lsq", "lsq")


@pytest.mark.parametrize(
    ("field", "told"),
    [
        ("encoding=7", "multiple of 2"),
        ("dropout=1.0", "less than 1"),
        ("start=mse", "'lsq' or 'tdq'"),
        ("levels=8", ""),
    ],
)
def test_fields_are_closed(field: str, told: str, tiny_recipe: TinyRecipe):
    with pytest.raises(BdmError, match=rf"method.{field.split('=')[0]}: .*{told}"):
        methods.build(tiny_recipe(f"method.{field}", method="tdq"))


def test_real_activations_have_no_network(tiny_recipe: TinyRecipe, tiny_teacher: Path):
    built = student.build(tiny_recipe("method.activation_bits=32", method="tdq"), seed=0)
    assert not any(isinstance(module, TdqActivation) for module in built.student.modules())


def test_images_of_one_call_have_their_own_steps(tiny_recipe: TinyRecipe, tiny_teacher: Path):
    """An image at one time, alone or among images at other times."""
    (_, unet, _), (x, t) = build(tiny_recipe(method="tdq"))
    unet.eval()
    with torch.no_grad():
        together = estimate_noise(unet, x, t)
        for i in range(4):
            alone = estimate_noise(unet, x[i : i + 1], t[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=0.05 * float(alone.abs().max()))


def test_training_with_its_own_start_and_levels(tiny_recipe: TinyRecipe, tiny_teacher: Path):
    options = ("method.start=tdq", "method.levels=symmetric", "method.activation_bits=8")
    (_, unet, method), inputs = build(tiny_recipe(*options, method="tdq"))
    noise = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(9))
    optimizer = torch.optim.AdamW([p for _, p in method.trainable(unet)], lr=3e-3, weight_decay=0)
    losses = []
    for step in range(31):
        torch.manual_seed(step)
        loss = torch.nn.functional.mse_loss(estimate_noise(unet, *inputs), noise)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            zero = {name for name, p in unet.named_parameters() if p.grad is None or p.grad.abs().sum() == 0}
            assert {name for name in zero if ".to_k.bias" not in name} == set()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_a_packed_student_draws_the_same_at_every_sampling_time(tiny_recipe: TinyRecipe, tmp_path: Path):
    """One step per time and layer in the file, and nothing of the networks."""
    spec = tiny_recipe("sample.steps=4", "method.attention_matmul=true", method="tdq")
    unet = students.finished(spec)
    packed = students.packed(spec, unet)
    listed = list(dict.fromkeys(times(spec.sample.sampler, spec.scheduler, 4)))
    assert packed.tensors[pack.TIMES].tolist() == listed
    assert not any("mlp" in name for name in packed.tensors)
    steps = {name: len(packed.tensors[name]) for name, _ in packed.header.steps()}
    assert {n for name, n in steps.items() if name.removesuffix(".step") not in EDGES} == {4}
    student.save(tmp_path / "s.safetensors", unet, spec, seed=0, step=6)
    copies = [copy.deepcopy(unet), student.load(tmp_path / "s.safetensors").student]
    ours = student.unpacked(packed, Path("m"))
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        drawn = [estimate_noise(unet, x, torch.full((2,), t)) for t in listed]
        for net in [*copies, ours]:
            for t, expected in zip(listed, drawn, strict=True):
                assert torch.equal(estimate_noise(net, x, torch.full((2,), t)), expected)
    assert len({image.sum().item() for image in drawn}) == 4


def test_symmetric_levels_are_not_packed(tiny_recipe: TinyRecipe):
    spec = tiny_recipe("method.levels=symmetric", method="tdq")
    with pytest.raises(BdmError, match="has no packed form: its activations have 15 levels, not 2 to the 4"):
        students.packed(spec, students.finished(spec))
