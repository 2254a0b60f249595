"""Q-Diffusion on tiny networks: its units, its data, both passes, going on after a kill, and its packed form."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import students
import torch
from torch import Tensor, distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from bdm_cli import methods, recipe, student, tensorfile
from bdm_cli.diffusion.models import build_unet, estimate_noise
from bdm_cli.errors import BdmError
from bdm_cli.jobs.train import Kept, trajectory_batches
from bdm_cli.methods.qdiffusion import QDiffusion, SplitActivation, splits, start_weights_, units
from bdm_cli.quant import reconstruction
from bdm_cli.quant.layers import QuantAttnProcessor, QuantConv2d
from bdm_cli.quant.quantizers import Quantizer
from bdm_cli.quant.reconstruction import AffineActivation, AffineWeight, affine_search, in_forward_order
from bdm_cli.quant.swap import EDGES, quantized_layers
from bdm_cli.recipe import Recipe
from bdm_cli.student import Built

SHORT = (
    "train.steps=0",
    "method.iterations=3",
    "method.activation_iterations=3",
    "method.calibration_steps=2",
    "method.calibration_images=8",
    "method.reconstruction_batch=8",
)


@pytest.fixture
def spec(tiny_recipe: Callable[..., Recipe], tiny_teacher: Path) -> Callable[..., Recipe]:
    """spec(*overrides): the tiny recipe with Q-Diffusion, a few iterations each."""
    return lambda *overrides: tiny_recipe(*SHORT, *overrides, method="qdiffusion")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches over two ranges only, where the steps that they find do not matter."""
    monkeypatch.setattr(reconstruction, "SHRINKS", 2)


def calls(spec: Recipe, built: Built) -> Iterator[tuple]:
    batches, _ = trajectory_batches(spec, 0, built.teacher)
    return (batches(n).inputs for n in itertools.count())


def calibrated(spec: Recipe) -> Built:
    built = student.build(spec, seed=0)
    built.method.calibrate_(built.student, built.teacher, calls(spec, built))
    return built


def estimate(unet: nn.Module) -> Tensor:
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return estimate_noise(unet, x, torch.tensor([5, 300, 600, 990]))


# fields


def test_the_defaults_are_the_released_scripts():
    method = QDiffusion()
    assert (method.weight_bits, method.activation_bits, method.edge_bits, method.softmax_bits) == (4, 4, 8, 8)
    assert (method.calibration_steps, method.calibration_images, method.reconstruction_batch) == (20, 256, 32)
    assert (method.iterations, method.rounding_lr, method.rounding_weight, method.rounding_free) == (
        20_000, 1e-3, 0.01, 0.2,
    )  # fmt: skip
    assert (method.activation_images, method.activation_iterations, method.activation_lr) == (64, 5000, 4e-4)
    assert (method.split_shortcuts, method.attention_matmul, method.reconstruction_images) == (False, False, 0)
    assert method.data_free


def test_faults(tiny_recipe: Callable[..., Recipe]):
    with pytest.raises(BdmError) as caught:
        methods.build(tiny_recipe("train.steps=5", "sample.steps=10", method="qdiffusion"))
    assert str(caught.value) == (
        "recipe 'tiny-w1a4' has a fault:\n"
        "  method.name: 'qdiffusion' works after training; train.steps must be 0 (given 5)\n"
        "  method.calibration_steps: the recipe's sampler calls the network 10 times (given 20).\n"
        "    give at most 10, or more sample.steps"
    )
    with pytest.raises(BdmError, match=r"method.weight_bits: .*\(given 1\)"):
        methods.build(tiny_recipe("train.steps=0", "method.weight_bits=1", method="qdiffusion"))


# structure


@pytest.mark.parametrize(
    ("overrides", "edge"),
    [((), 8), (("method.edge_bits=4",), 4), (("method.edge_bits=32",), None), (("method.activation_bits=32",), 8)],
)
def test_sites_and_bits(spec: Callable[..., Recipe], overrides: tuple, edge: int | None):
    built = student.build(spec("method.weight_bits=3", *overrides), seed=0)
    found = dict(quantized_layers(built.student))
    everything = {n for n, m in built.teacher.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert set(found) == everything - (set(EDGES) if edge is None else set())
    for name, layer in found.items():
        weight, activation = layer.weight_quantizer, layer.activation_quantizer
        assert (type(weight), weight.bits) == (AffineWeight, edge if name in EDGES else 3)
        if "method.activation_bits=32" in overrides:
            assert activation is None
        else:
            assert (type(activation), activation.bits) == (AffineActivation, edge if name in EDGES else 4)
    assert estimate(built.student).isnan().all()


def test_attention_operands_are_affine_and_the_softmax_has_bits_of_its_own(spec: Callable[..., Recipe]):
    built = student.build(spec("method.attention_matmul=true"), seed=0)
    processors = [m for m in built.student.modules() if isinstance(m, QuantAttnProcessor)]
    assert len(processors) == 4
    for one in processors:
        operands = (one.q_quantizer, one.k_quantizer, one.v_quantizer, one.probability_quantizer)
        assert [type(operand) for operand in operands] == [AffineActivation] * 4
        assert [operand.bits for operand in operands] == [4, 4, 4, 8]


def ordered(spec: Recipe) -> list[str]:
    """The units of a recipe's network, counted on the meta device, in the order of the forward."""
    with torch.device("meta"):
        unet = build_unet(spec.unet)
        methods.build(spec).quantize_(unet)
        return in_forward_order(build_unet(spec.unet), units(unet), student.random_inputs(spec, 1, None))


def test_units_are_blocks_attentions_and_single_layers_in_forward_order(spec: Callable[..., Recipe]):
    found = ordered(spec())
    assert found[:3] == ["time_embedding.linear_1", "time_embedding.linear_2", "conv_in"]
    assert found[3:7] == [
        "down_blocks.0.resnets.0",
        "down_blocks.0.downsamplers.0",
        "down_blocks.1.resnets.0",
        "down_blocks.1.attentions.0",
    ]
    middle = found.index("mid_block.resnets.0")
    assert found[middle : middle + 3] == [
        "mid_block.resnets.0",
        "mid_block.attentions.0",
        "mid_block.resnets.1",
    ]
    assert found[-1] == "conv_out"
    assert len(found) == 23


def test_transformer_blocks_are_units(tiny_recipe: Callable[..., Recipe]):
    found = ordered(tiny_recipe("train.steps=0", "method.calibration_steps=2", name="tiny-cond", method="qdiffusion"))
    inner = [name for name in found if ".attentions." in name]
    assert {name.split(".", 4)[4] for name in inner if not name.startswith("mid")} == {
        "proj_in", "transformer_blocks.0", "proj_out",
    }  # fmt: skip
    assert not any(".to_q" in name or ".ff." in name for name in found)


@pytest.mark.parametrize(
    ("name", "resnets", "attentions", "samplers"),
    [("bedrooms", 22, 16, 6), ("churches", 27, 21, 8), ("cifar10", 22, 6, 6)],
)
def test_the_networks_of_the_papers(name: str, resnets: int, attentions: int, samplers: int):
    found = ordered(recipe.load(name, ["train.steps=0"], "qdiffusion"))
    kinds = [".".join(unit.split(".")[-2:-1]) for unit in found]
    assert (kinds.count("resnets"), kinds.count("attentions")) == (resnets, attentions)
    assert kinds.count("downsamplers") == kinds.count("upsamplers") == samplers / 2
    assert len(found) == resnets + attentions + samplers + len(EDGES)


# split shortcuts


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_a_split_lies_between_h_and_the_skip(name: str):
    """Beyond it lies, number for number, what the down path put out."""
    loaded = recipe.load(name, [], "qdiffusion")
    unet = build_unet(loaded.unet)
    found, seen, skips = dict(splits(unet)), {}, []
    for path in found:
        unet.get_submodule(path).register_forward_pre_hook(lambda m, x, path=path: seen.__setitem__(path, x[0]))
    for path, module in unet.named_modules():
        if path == "conv_in" or (path.startswith("down_blocks.") and path.count(".") == 3):
            module.register_forward_hook(lambda m, x, y: skips.append(y))
    with torch.no_grad():
        unet(*student.random_inputs(loaded, 1, torch.Generator().manual_seed(0)))
    ups = [
        path for path, _ in unet.named_modules() if path.startswith("up_blocks.") and path.endswith(".conv_shortcut")
    ]
    assert sorted(found) == sorted(ups)
    for path, channels in found.items():
        beyond = seen[path][:, channels:]
        assert any(torch.equal(beyond, skip) for skip in skips if skip.shape == beyond.shape)


@pytest.mark.usefixtures("quick")
def test_split_layers_have_two_of_each_quantizer_and_no_packed_form(spec: Callable[..., Recipe], tmp_path: Path):
    loaded = spec("method.split_shortcuts=true", "method.iterations=0", "method.activation_iterations=0")
    built = calibrated(loaded)
    unet = built.student.eval()
    chosen = dict(splits(unet))
    for name, layer in quantized_layers(unet):
        assert isinstance(layer.activation_quantizer, SplitActivation) == (name in chosen)
        assert layer.weight_quantizer.widths == (
            [chosen[name], layer.in_channels - chosen[name]] if name in chosen else [layer.weight.shape[1]]
        )
    name, split = next(iter(chosen.items()))
    layer = unet.get_submodule(name)
    x = torch.randn(2, layer.in_channels, 3, 3, generator=torch.Generator().manual_seed(0))
    q = layer.activation_quantizer
    a, w = q(x), layer.weight_quantizer(layer.weight)
    torch.testing.assert_close(a[:, :split], q.below(x[:, :split]))
    torch.testing.assert_close(a[:, split:], q.skip(x[:, split:]))
    assert q.below.scale != q.skip.scale
    halves = [
        torch.einsum("nchw,kc->nkhw", a[:, part], w[:, part, 0, 0]) for part in (slice(split), slice(split, None))
    ]
    torch.testing.assert_close(layer(x), sum(halves) + layer.bias[:, None, None])
    with pytest.raises(BdmError, match=r"conv_shortcut has no packed form: its two ranges of input channels"):
        students.packed(loaded, unet)
    with pytest.raises(NotImplementedError, match="two channel ranges"):
        q.grid()
    student.save(tmp_path / "s.safetensors", unet, loaded, 0, 0)
    assert torch.equal(estimate(student.load(tmp_path / "s.safetensors").student), estimate(unet))


def test_real_skips_are_not_split(spec: Callable[..., Recipe]):
    unet = student.build(spec("method.split_shortcuts=true", "method.real_skips=true"), seed=0).student
    assert not any(isinstance(unet.get_submodule(name), QuantConv2d) for name, _ in splits(unet))
    assert not any(isinstance(m, SplitActivation) for m in unet.modules())


# data


def test_calibration_images_are_of_evenly_spread_calls(tiny_recipe: Callable[..., Recipe], tiny_teacher: Path):
    method = methods.build(
        tiny_recipe(
            "train.steps=0", "sample.steps=20", "method.calibration_steps=5", "method.calibration_images=6",
            method="qdiffusion",
        )
    )  # fmt: skip
    asked = []

    def numbered() -> Iterator[tuple]:
        for n in itertools.count():
            asked.append(n)
            yield torch.full((4, 1, 2, 2), n), torch.full((4,), n)

    x, t = method.calibration_calls(numbered())
    assert x.shape == (30, 1, 2, 2)
    assert torch.equal(x[:, 0, 0, 0], t)
    wanted = [n for position in (0, 4, 8, 12, 16) for n in [position] * 4 + [20 + position] * 2]
    assert t.tolist() == wanted
    assert asked == list(range(40))  # two trajectories of 20 calls
    with pytest.raises(ValueError, match="end within a trajectory of 20 calls, at call 3"):
        method.calibration_calls(iter([(torch.zeros(4, 1, 2, 2), torch.zeros(4))] * 23))


# both passes


def test_what_a_calibration_leaves(spec: Callable[..., Recipe], tmp_path: Path):
    """Rounded weights on searched grids, learned steps, no traces; saved, loaded, copied and packed bit for bit."""
    loaded = spec("method.activation_start=min-max")
    built = student.build(loaded, seed=0)
    before = {name: tensor.clone() for name, tensor in built.teacher.state_dict().items()}
    modules = dict(built.student.named_modules())
    built.method.calibrate_(built.student, built.teacher, calls(loaded, built))
    unet = built.student
    assert unet.training
    assert dict(unet.named_modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for net in built[:2] for m in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in built.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())
    rounded_up = 0
    for name, layer in quantized_layers(unet):
        q, latent = layer.weight_quantizer, before[f"{name}.weight"]
        s, z = affine_search(latent.flatten(1), q.bits)
        assert torch.equal(q.scale.flatten(), s)
        assert torch.equal(q.zero_point.flatten(), z)
        assert torch.equal(q(layer.weight), layer.weight)
        rounded_up += (q(latent) != layer.weight).sum()
        if layer.bias is not None:
            assert torch.equal(layer.bias, before[f"{name}.bias"])
        activation = layer.activation_quantizer
        assert activation.scale > 0
        assert 0 <= activation.zero_point <= activation.high
    assert rounded_up > 0

    unet.eval()
    wanted = estimate(unet)
    assert wanted.isfinite().all()
    path = tmp_path / "student.safetensors"
    student.save(path, unet, loaded, 0, 0)
    assert torch.equal(estimate(student.load(path).student), wanted)
    assert torch.equal(estimate(copy.deepcopy(unet)), wanted)
    unpacked = student.unpacked(students.packed(loaded, unet), Path("m"))
    assert torch.equal(estimate(unpacked), wanted)


class Killed(BaseException):
    pass


class Dying(Kept):
    """The run's own keeper, with a kill -9 after some writes."""

    lives = 0

    def write(self, tensors: dict[str, Tensor]) -> None:
        super().write(tensors)
        self.lives -= 1
        if not self.lives:
            raise Killed


@pytest.mark.usefixtures("quick")
def test_a_killed_calibration_goes_on_to_the_same_student(spec: Callable[..., Recipe]):
    loaded = spec("method.iterations=1", "method.activation_iterations=1", "method.reconstruction_images=12")
    wanted = calibrated(loaded)
    n = len(units(wanted.student))
    done = 0
    for lives in (2, n - 2, 1, 0):  # within the first pass, at its end, at the second's first unit; never
        keeper = Dying("some-run", "trajectories")
        keeper.path.parent.mkdir(parents=True, exist_ok=True)
        keeper.lives = lives
        built = student.build(loaded, seed=0)
        with pytest.raises(Killed) if lives else contextlib.nullcontext():
            built.method.calibrate_(built.student, built.teacher, calls(loaded, built), keeper)
        done += lives or -keeper.lives
        assert int(tensorfile.read(keeper.path)[0]["units_done"]) == done
    assert done == 2 * n
    tensors, expected = built.student.state_dict(), wanted.student.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())

    again = student.build(loaded, seed=0)  # killed before the weights were written: all is there
    again.method.calibrate_(again.student, again.teacher, calls(loaded, again), keeper)
    assert keeper.lives == 2 + (n - 2) + 1 - 2 * n
    assert torch.equal(estimate(again.student.eval()), estimate(wanted.student.eval()))


@pytest.mark.usefixtures("quick")
def test_learned_rounding_comes_nearer_to_the_teacher_in_one_pass(spec: Callable[..., Recipe]):
    """Over the whole network; of real inputs there is no second pass."""
    loaded = spec(
        "method.iterations=20", "method.activation_bits=32", "method.weight_bits=2", "method.rounding_lr=5e-2",
        "method.edge_bits=4",
    )  # fmt: skip
    nearest = student.build(loaded, seed=0).student
    start_weights_(nearest)
    built = student.build(loaded, seed=0)
    keeper = Dying("some-run", "trajectories")
    keeper.path.parent.mkdir(parents=True, exist_ok=True)
    built.method.calibrate_(built.student, built.teacher, calls(loaded, built), keeper)
    assert keeper.lives == -len(units(built.student))
    assert {type(m) for m in built.student.modules() if isinstance(m, Quantizer)} == {AffineWeight}
    wanted = estimate(built.teacher)
    errors = [(estimate(unet.eval()) - wanted).square().mean() for unet in (nearest, built.student)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.usefixtures("quick")
def test_a_class_conditional_network(tiny_recipe: Callable[..., Recipe], tiny_cond_teacher: Path):
    loaded = tiny_recipe(
        *SHORT, "method.iterations=1", "method.activation_iterations=1", "method.attention_matmul=true",
        "method.activation_start=min-max", name="tiny-cond", method="qdiffusion",
    )  # fmt: skip
    built = student.build(loaded, seed=0)
    built.method.calibrate_(built.student, built.teacher, calls(loaded, built))
    inputs = student.random_inputs(loaded, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = estimate_noise(built.student.eval(), *inputs)
    assert wanted.isfinite().all()
    unpacked = student.unpacked(students.packed(loaded, built.student), Path("m"))
    with torch.no_grad():
        assert torch.equal(estimate_noise(unpacked, *inputs), wanted)
    probabilities = [m.probability_quantizer for m in built.student.modules() if isinstance(m, QuantAttnProcessor)]
    assert {(q.bits, float(q.zero_point)) for q in probabilities} == {(8, 0.0)}


@pytest.mark.usefixtures("quick")
def test_a_student_that_is_its_own_teacher_is_only_rounded(spec: Callable[..., Recipe]):
    loaded = spec("method.iterations=20_000")
    unet = student.random_finished(loaded, seed=0)
    assert estimate(unet).isfinite().all()
    plain = student.build(loaded.model_copy(update={"model": recipe.Model(pretrained="")}), seed=0).student
    for name, layer in quantized_layers(unet):
        assert torch.equal(layer.weight, plain.get_submodule(name).weight)
    assert torch.equal(estimate(student.unpacked(students.packed(loaded, unet), Path("m"))), estimate(unet))


def test_several_processes_are_refused(spec: Callable[..., Recipe]):
    built = student.build(spec(), seed=0)
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(BdmError, match="start it as one process"):
            built.method.calibrate_(built.student, built.teacher, iter([]))
    finally:
        distributed.destroy_process_group()


@pytest.mark.usefixtures("quick")
def test_a_lost_loss_names_its_unit(spec: Callable[..., Recipe]):
    loaded = spec()
    built = student.build(loaded, seed=0)
    built.teacher.conv_in.weight.data.mul_(1e30)
    with pytest.raises(BdmError, match=r"unit conv_in: its loss is (inf|nan).*\n.*method.rounding_lr"):
        built.method.calibrate_(built.student, built.teacher, calls(loaded, built))
