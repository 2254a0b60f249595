"""What every entry of METHODS promises, on a tiny network."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bdm_cli import methods, student
from bdm_cli.diffusion.losses import FeatureTaps, noise_loss
from bdm_cli.diffusion.models import build_unet, estimate_noise
from bdm_cli.errors import BdmError
from bdm_cli.methods import METHODS
from bdm_cli.methods.base import Forward
from bdm_cli.methods.binarydm import EbbWeight
from bdm_cli.quant.layers import QuantAttnProcessor
from bdm_cli.quant.quantizers import Lsq, SignWeight
from bdm_cli.quant.swap import quantized_layers
from bdm_cli.recipe import Recipe
from bdm_cli.student import Built

EDGES = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}

# the tiny network has 13 timestep blocks; the recipe's ebb_scope = 4 takes 0-3 (0 is conv_in, an edge) and 9-12
WITHIN_SCOPE = (
    "down_blocks.0.",
    "down_blocks.1.resnets.0.",
    "down_blocks.1.attentions.0.",
    "up_blocks.1.",
    "up_blocks.2.",
)

VARIANTS = [
    ("baseline", ("method.edge_bits=32",)),
    ("baseline", ("method.activation_bits=32",)),
    ("lsq", ("method.weight_bits=4", "method.edge_bits=4")),
    ("ebb", ("method.ebb_scope=4", "method.ebb_center=true")),
    ("binarydm", ("method.attention_matmul=true", "method.activation_bits=8")),
    ("binarydm", ("method.distillation=mse",)),
]
CASES = [(method, ("method.ebb_scope=4",) if method == "ebb" else ()) for method in METHODS] + VARIANTS


@dataclass
class Case:
    """A built recipe and one fixed batch."""

    spec: Recipe
    built: Built
    inputs: tuple[Tensor, Tensor]
    noise: Tensor

    def calibrate_(self) -> None:
        self.built.method.calibrate_(self.built.student, self.built.teacher, (self.inputs for _ in count()))

    def output(self, unet: nn.Module | None = None) -> Tensor:
        with torch.no_grad():
            return estimate_noise((unet or self.built.student).eval(), *self.inputs)

    def loss(self, step: int = 0) -> Tensor:
        """The noise loss and the method's own, as the training adds them up."""
        teacher, unet, method = self.built
        blocks = method.taps(unet)
        taps_fp, taps_bi = FeatureTaps(teacher, blocks), FeatureTaps(unet, blocks)
        with torch.no_grad():
            estimate_noise(teacher, *self.inputs)
        estimate = estimate_noise(unet, *self.inputs)
        parts = method.losses(Forward(unet, step, taps_fp.take(), taps_bi.take()))
        taps_fp.remove()
        taps_bi.remove()
        return noise_loss(estimate, self.noise, self.spec.train.loss) + sum(parts.values())

    def train_(self, steps: int) -> list[float]:
        """AdamW with the recipe's budget of steps on the one batch; the losses before each step and after the last."""
        _, unet, method = self.built
        optimizer = torch.optim.AdamW([p for _, p in method.trainable(unet)], lr=3e-3, weight_decay=0)
        losses = []
        for step in range(steps):
            loss = self.loss(step)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.on_step_(unet, step + 1, self.spec.train.steps)
        return [*losses, self.loss(steps).item()]


@pytest.fixture(params=CASES, ids=lambda case: "+".join((case[0], *case[1])).replace("method.", ""))
def case(request: pytest.FixtureRequest, tiny_recipe: Callable[..., Recipe], tiny_teacher: Path) -> Case:
    method, overrides = request.param
    spec = tiny_recipe("train.steps=30", *overrides, method=method)
    random = torch.Generator().manual_seed(3)
    x = torch.randn(4, 1, 8, 8, generator=random)
    inputs = (x, torch.tensor([5, 300, 600, 990]))
    return Case(spec, student.build(spec, seed=0), inputs, torch.randn(x.shape, generator=random))


def all_layers(spec: Recipe) -> dict[str, nn.Module]:
    unet = build_unet(spec.unet)
    return {name: module for name, module in unet.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def intended(spec: Recipe, name: str) -> type | None:
    """The kind of weight quantizer that a layer should get by the method's definition; None = none."""
    fields = {"edge_bits": 8, "ebb_center": False} | spec.method
    if spec.method["name"] == "fp" or (name in EDGES and fields["edge_bits"] == 32):
        return None
    if name in EDGES or spec.method["name"] == "lsq":
        return Lsq
    chosen = name.startswith(WITHIN_SCOPE) or (fields["ebb_center"] and name.startswith("mid_block."))
    return EbbWeight if chosen and spec.method["name"] in ("ebb", "binarydm") else SignWeight


def weight_bits(spec: Recipe, name: str) -> int:
    if name in EDGES:
        return spec.method.get("edge_bits", 8)
    return spec.method.get("weight_bits", 2) if spec.method["name"] == "lsq" else 1


def test_intended_sites_and_only_they_are_swapped(case: Case):
    expected = {name: kind for name in all_layers(case.spec) if (kind := intended(case.spec, name))}
    found = dict(quantized_layers(case.built.student))
    assert {name: type(layer.weight_quantizer) for name, layer in found.items()} == expected
    bits = case.spec.method.get("activation_bits", 32)
    for name, layer in found.items():
        if type(layer.weight_quantizer) is Lsq:
            assert layer.weight_quantizer.bits == weight_bits(case.spec, name)
            assert layer.weight_quantizer.scale.shape == (len(layer.weight), *[1] * (layer.weight.dim() - 1))
        if bits == 32:
            assert layer.activation_quantizer is None
        else:
            wanted = case.spec.method["edge_bits"] if name in EDGES else bits
            q = layer.activation_quantizer
            assert (type(q), q.bits, q.low, q.high) == (Lsq, wanted, -(2 ** (wanted - 1)), 2 ** (wanted - 1) - 1)
            assert q.scale.shape == ()
    processors = [m for m in case.built.student.modules() if isinstance(m, QuantAttnProcessor)]
    assert len(processors) == (4 if case.spec.method.get("attention_matmul") else 0)


def test_weights_have_the_promised_number_of_levels(case: Case):
    for name, layer in quantized_layers(case.built.student):
        weights = layer.weight_quantizer(layer.weight).detach().flatten(1)
        levels = [len(channel.unique()) for channel in weights]
        kind = intended(case.spec, name)
        if kind is Lsq:
            bits = weight_bits(case.spec, name)
            steps = weights / layer.weight_quantizer.scale.detach().flatten(1)
            assert torch.equal(steps.round(), steps) or (steps - steps.round()).abs().max() < 1e-4
            assert steps.round().min() >= -(2 ** (bits - 1))
            assert steps.round().max() <= 2 ** (bits - 1) - 1
            assert max(levels) <= 2**bits
        else:
            promised = 4 if kind is EbbWeight else 2
            assert max(levels) == promised
            if weights.shape[1] >= 72:  # in channels of fewer weights a level may be missing
                assert set(levels) == {promised}


def test_after_training_binary_weights_have_two_levels(case: Case):
    case.built.method.on_step_(case.built.student, 30, 30)
    for name, layer in quantized_layers(case.built.student):
        if intended(case.spec, name) is not Lsq:
            assert layer.weight_quantizer.bits == 1
            weights = layer.weight_quantizer(layer.weight).detach().flatten(1)
            assert {len(channel.unique()) for channel in weights} == {2}
            assert torch.equal(weights.amax(1), -weights.amin(1))


def test_activation_quantizers_are_loud_before_and_calibrated_after_one_batch(case: Case):
    quantizers = [
        module for name, module in case.built.student.named_modules()
        if isinstance(module, Lsq) and not name.endswith("weight_quantizer")
    ]  # fmt: skip
    quantized = case.spec.method.get("activation_bits", 32) < 32
    layers = len(list(quantized_layers(case.built.student)))
    assert len(quantizers) == (quantized * (layers + 4 * 4 * case.spec.method.get("attention_matmul", False)))
    assert case.output().isnan().any() == quantized
    case.calibrate_()
    assert all(quantizer.scale.isfinite() and quantizer.scale > 0 for quantizer in quantizers)
    assert case.output().isfinite().all()
    before = {name: tensor.clone() for name, tensor in case.built.student.state_dict().items()}
    other = (3 * case.inputs[0], case.inputs[1])
    case.built.method.calibrate_(case.built.student, case.built.teacher, iter([other]))  # what is set stays
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.built.student.state_dict().items())
    hooks = [hook for module in case.built.student.modules() for hook in module._forward_pre_hooks.values()]
    assert hooks == []


def test_each_activation_quantizer_starts_from_what_reaches_it_behind_quantized_layers(case: Case):
    """A second forward, with the inputs of every quantizer recorded, gives the same starts."""
    case.calibrate_()
    seen: dict[nn.Module, Tensor] = {}
    found = [layer.activation_quantizer for _, layer in quantized_layers(case.built.student)]
    for quantizer in filter(None, found):
        quantizer.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(module, inputs[0]))
    case.built.student.train()
    with torch.no_grad():
        case.built.student(*case.inputs)
    for quantizer, x in seen.items():
        torch.testing.assert_close(quantizer.scale.detach(), 2 * x.abs().mean() / quantizer.high**0.5)


def test_gradients_reach_every_trainable_parameter_and_not_the_teacher(case: Case):
    case.calibrate_()
    teacher, unet, method = case.built
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainable = dict(method.trainable(unet))
    assert set(trainable) == {name for name, _ in unet.named_parameters()}
    case.loss().backward()
    without = [name for name, p in trainable.items() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    # softmax does not see what is added to every key; rounding may drop whole gradients only there
    zero = {name for name, p in trainable.items() if p.grad.abs().sum() == 0 and ".to_k.bias" not in name}
    assert zero == set()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    case.train_(2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    own = {parameter.data_ptr() for parameter in unet.parameters()}
    assert not own & {parameter.data_ptr() for parameter in teacher.parameters()}


def test_the_loss_falls_on_one_fixed_batch(case: Case):
    case.calibrate_()
    losses = case.train_(30)
    assert len(losses) == 31
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("step", [3, 30])
def test_saved_and_loaded_and_copied_students_give_bit_equal_output(case: Case, step: int, tmp_path: Path):
    case.calibrate_()
    case.train_(2)
    unet = case.built.student
    case.built.method.on_step_(unet, step, case.spec.train.steps)
    expected = case.output()
    student.save(tmp_path / "student.safetensors", unet, case.spec, seed=4, step=step)
    loaded = student.load(tmp_path / "student.safetensors")
    assert (loaded.recipe, loaded.seed, loaded.step) == (case.spec, 4, step)
    assert not loaded.student.training
    assert not any(parameter.requires_grad for parameter in loaded.student.parameters())
    assert list(loaded.student.state_dict()) == list(unet.state_dict())
    assert torch.equal(case.output(loaded.student), expected)

    twin = copy.deepcopy(unet)
    assert torch.equal(case.output(twin), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(case.output(), expected)


def test_full_precision_is_the_teacher_itself(tiny_recipe: Callable[..., Recipe], tiny_teacher: Path):
    built = student.build(tiny_recipe(name="tiny"), seed=0)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 999])
    with torch.no_grad():
        assert torch.equal(built.student.eval()(x, t)[0], built.teacher(x, t)[0])
    assert list(built.student.state_dict()) == list(built.teacher.state_dict())


def test_a_student_without_teacher_is_initialised_by_its_seed(tiny_recipe: Callable[..., Recipe]):
    spec = tiny_recipe(name="tiny").pretraining()
    first, again, other = (student.build(spec, seed).student.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path, tiny_recipe: Callable[..., Recipe], tiny_teacher: Path):
    whole = tiny_teacher.read_bytes()
    for name, content in {"short": whole[: len(whole) // 2], "empty": b"", "text": b"not a model"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BdmError, match="not a whole safetensors file"):
            student.load(tmp_path / name)
    with pytest.raises(BdmError, match="there is no file"):
        student.load(tmp_path / "absent")
    wider = tiny_recipe("unet.arguments.block_out_channels=[16, 16, 16]")
    with pytest.raises(BdmError, match=r"does not fit the network of this recipe: .* of another shape"):
        student.build(wider, seed=0)
    deeper = tiny_recipe("unet.arguments.layers_per_block=2")
    with pytest.raises(BdmError, match=r"[0-9]+ missing \(down_blocks"):
        student.build(deeper, seed=0)


def test_a_student_is_no_teacher(tiny_recipe: Callable[..., Recipe], tiny_teacher: Path):
    spec = tiny_recipe()
    student.save(tiny_teacher, student.build(spec, 0).student, spec, seed=0, step=6)
    with pytest.raises(BdmError, match=r"holds a 'binarydm' student"):
        student.build(spec, seed=0)


@pytest.mark.parametrize(
    ("method", "fields", "text"),
    [
        ("baseline", ["activation_bits=9"], r"method.activation_bits: .*2, 3, 4, 5, 6, 7, 8 or 32.*\(given 9\)"),
        ("baseline", ["activation_bits=4.5"], r"method.activation_bits"),
        ("fp", ["activation_bits=4"], r"method.activation_bits"),
        ("lsq", ["weight_bits=1"], r"method.weight_bits"),
        ("binarydm", ["tau=-1"], r"method.tau: .*greater than or equal to 0.*\(given -1\)"),
        ("binarydm", ["lrm_kk=2"], r"method.lrm_kk: unknown key \(given 2\). Did you mean 'lrm_k'\?"),
        ("binarydm", ["lrm_k=0.5"], r"method.lrm_k"),
        ("binarydm", ["distillation=kl"], r"method.distillation: .*'lrm' or 'mse'.*\(given 'kl'\)"),
        ("binarydm", ["ebb_center=1"], r"method.ebb_center"),
        ("baseline", ["tau=0.1"], r"method.tau: unknown key"),
        ("nonsense", [], r"unknown method 'nonsense'.*\n +known: baseline, binarydm, ebb, fp, lsq"),
        ("binarydmm", [], r"Did you mean 'binarydm'\?"),
    ],
)
def test_faulty_method_tables(tiny_recipe: Callable[..., Recipe], method: str, fields: list[str], text: str):
    spec = tiny_recipe(*(f"method.{field}" for field in fields), method=method)
    with pytest.raises(BdmError, match=text):
        methods.build(spec)


def test_all_faults_of_a_method_table_come_at_once(tiny_recipe: Callable[..., Recipe]):
    spec = tiny_recipe("method.tau=-1", "method.ebb_scope=x", "method.nothing=1")
    with pytest.raises(BdmError, match="has 3 faults") as caught:
        methods.build(spec)
    assert all(f"method.{key}: " in str(caught.value) for key in ("tau", "ebb_scope", "nothing"))
