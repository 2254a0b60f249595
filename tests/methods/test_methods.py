"""What every entry of METHODS promises, on a tiny network."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import students
import torch
from students import ONE_BIT, OWN, REFUSED
from torch import Tensor, nn

from bdm_cli import methods, recipe, registry, student
from bdm_cli.diffusion.losses import FeatureTaps, noise_loss
from bdm_cli.diffusion.models import build_unet, estimate_noise, noise_scheduler
from bdm_cli.diffusion.sampling import times
from bdm_cli.errors import BdmError
from bdm_cli.methods import METHODS
from bdm_cli.methods.base import Batch, Forward
from bdm_cli.quant.layers import QuantAttnProcessor
from bdm_cli.quant.quantizers import EbbWeight, Lsq, SignWeight
from bdm_cli.quant.swap import begin_trajectory_, quantized_layers
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
    ("reactnet", (*ONE_BIT, "method.form=bibench")),
    ("instabnn", ONE_BIT),
    ("bidiffsr", ONE_BIT),
    ("efficientdm", (*ONE_BIT, "method.weight_bits=1")),
]
FIRST = ("fp", "lsq", "baseline", "ebb", "binarydm")
"""Methods whose quantizers are LSQ's and BinaryDM's, of which more can be said."""

CASES = [(method, OWN.get(method, ())) for method in METHODS] + VARIANTS


@dataclass
class Case:
    """A built recipe and one fixed batch."""

    spec: Recipe
    built: Built
    batch: Batch

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.batch.inputs

    def calibrate_(self) -> None:
        self.built.method.calibrate_(self.built.student, self.built.teacher, (self.inputs for _ in count()))

    def output(self, unet: nn.Module | None = None) -> Tensor:
        """As a sampler's first call, at one time."""
        unet = (unet or self.built.student).eval()
        begin_trajectory_(unet)
        with torch.no_grad():
            found = estimate_noise(unet, self.inputs[0], torch.full((4,), 500))
        begin_trajectory_(unet)
        return found

    def loss(self, step: int = 0) -> Tensor:
        """The noise loss and the method's own, as the training adds them up."""
        teacher, unet, method = self.built
        blocks = method.taps(unet)
        taps_fp, taps_bi = FeatureTaps(teacher, blocks), FeatureTaps(unet, blocks)
        with torch.no_grad():
            estimate_fp = estimate_noise(teacher, *self.inputs)
        method.before_step_(unet, self.batch)
        estimate = estimate_noise(unet, *self.inputs)
        forward = Forward(unet, step, taps_fp.take(), taps_bi.take(), self.batch, estimate, estimate_fp)
        taps_fp.remove()
        taps_bi.remove()
        return noise_loss(estimate, method.target(forward), "mse") + sum(method.losses(forward).values())

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


def name_of(case: tuple[str, tuple[str, ...]]) -> str:
    return "+".join((case[0], *(text for text in case[1] if text not in OWN.get(case[0], ())))).replace("method.", "")


@pytest.fixture(params=CASES, ids=name_of)
def case(request: pytest.FixtureRequest, tiny_recipe: Callable[..., Recipe], tiny_teacher: Path) -> Case:
    return made(request.param, tiny_recipe)


@pytest.fixture(params=[case for case in CASES if case[0] in FIRST], ids=name_of)
def first(request: pytest.FixtureRequest, tiny_recipe: Callable[..., Recipe], tiny_teacher: Path) -> Case:
    return made(request.param, tiny_recipe)


@pytest.fixture(params=[case for case in CASES if case[0] != "qdiffusion"], ids=name_of)
def trained(request: pytest.FixtureRequest, tiny_recipe: Callable[..., Recipe], tiny_teacher: Path) -> Case:
    """Of the methods that train: all but the one that works after training alone."""
    return made(request.param, tiny_recipe)


def made(case: tuple[str, tuple[str, ...]], tiny_recipe: Callable[..., Recipe]) -> Case:
    method, overrides = case
    spec = tiny_recipe("train.steps=30", *overrides, method=method)
    random = torch.Generator().manual_seed(3)
    clean, noise = (torch.randn(4, 1, 16, 16, generator=random) for _ in range(2))
    t = torch.tensor([5, 300, 600, 990])
    built = student.build(spec, seed=0)
    x = noise_scheduler(spec.scheduler).add_noise(clean, noise, t)
    if built.method.data_free:
        with torch.no_grad():
            return Case(spec, built, Batch((x, t), estimate_noise(built.teacher, x, t)))
    return Case(spec, built, Batch((x, t), noise, clean))


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


def test_intended_sites_and_only_they_are_swapped(first: Case):
    expected = {name: kind for name in all_layers(first.spec) if (kind := intended(first.spec, name))}
    found = dict(quantized_layers(first.built.student))
    assert {name: type(layer.weight_quantizer) for name, layer in found.items()} == expected
    bits = first.spec.method.get("activation_bits", 32)
    for name, layer in found.items():
        if type(layer.weight_quantizer) is Lsq:
            assert layer.weight_quantizer.bits == weight_bits(first.spec, name)
            assert layer.weight_quantizer.scale.shape == (len(layer.weight), *[1] * (layer.weight.dim() - 1))
        if bits == 32:
            assert layer.activation_quantizer is None
        else:
            wanted = first.spec.method["edge_bits"] if name in EDGES else bits
            q = layer.activation_quantizer
            assert (type(q), q.bits, q.low, q.high) == (Lsq, wanted, -(2 ** (wanted - 1)), 2 ** (wanted - 1) - 1)
            assert q.scale.shape == ()
    processors = [m for m in first.built.student.modules() if isinstance(m, QuantAttnProcessor)]
    assert len(processors) == (4 if first.spec.method.get("attention_matmul") else 0)


def test_weights_have_the_promised_number_of_levels(first: Case):
    for name, layer in quantized_layers(first.built.student):
        weights = layer.weight_quantizer(layer.weight).detach().flatten(1)
        levels = [len(channel.unique()) for channel in weights]
        kind = intended(first.spec, name)
        if kind is Lsq:
            bits = weight_bits(first.spec, name)
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


def test_the_intended_sites_and_only_they_are_swapped_with_few_values(case: Case):
    """Every layer but edges and skip convs that are to stay real; weights and inputs take as many values as said."""
    fields, method = case.spec.method, case.built.method
    expected = {
        name for name in all_layers(case.spec)
        if not (name in EDGES and method.edge_bits == 32)
        and not (name.endswith("conv_shortcut") and method.real_skips)
    }  # fmt: skip
    found = dict(quantized_layers(case.built.student))
    assert set(found) == (set() if fields["name"] == "fp" else expected)
    case.calibrate_()
    method.on_step_(case.built.student, 30, 30)
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.activation_quantizer.register_forward_hook(lambda module, x, y, name=name: seen.__setitem__(name, y))
        for name, layer in found.items() if layer.activation_quantizer is not None
    ]  # fmt: skip
    case.output()
    for hook in hooks:
        hook.remove()
    for name, layer in found.items():
        assert not layer.weight_is_real
        assert not layer.input_is_real
        quantizer = layer.weight_quantizer
        with torch.no_grad():
            weights = quantizer(layer.weight).flatten(1)
        levels = max(len(channel.unique()) for channel in weights)
        assert levels <= 2**quantizer.bits
        if name not in EDGES:
            wanted = method.weight_bits if hasattr(method, "weight_bits") else 1
            two = fields["name"] == "highorder" or (fields["name"] == "lmb" and name.startswith(WITHIN_SCOPE))
            assert quantizer.bits == (2 if two else wanted)
        if name in seen:
            bits = layer.activation_quantizer.bits
            assert bits == (method.edge_bits if name in EDGES else method.activation_bits)
            assert len(seen[name].unique()) <= 2**bits
    assert (len(seen) == len(found)) == (method.activation_bits < 32 or not found)


def test_a_student_packs_bit_for_bit_or_says_why_not(case: Case):
    if case.spec.method["name"] == "fp":
        with pytest.raises(BdmError, match="quantizes no layer"):
            students.packed(case.spec, case.built.student)
        return
    case.calibrate_()
    if case.spec.train.steps:
        case.train_(2)
    unet = case.built.student.eval()
    case.built.method.on_step_(unet, 30, 30)
    refused = REFUSED.get(case.spec.method["name"])
    if refused:
        with pytest.raises(BdmError, match=f"has no packed form: .*{refused}"):
            students.packed(case.spec, unet)
        return
    packed = student.unpacked(students.packed(case.spec, unet), Path("m"))
    settings = case.spec.sample
    for t in times(settings.sampler, case.spec.scheduler, settings.steps):
        with torch.no_grad():
            found = [estimate_noise(net, case.inputs[0], torch.full((4,), t)) for net in (packed, unet)]
        if case.built.method.activation_bits == 32:  # sums of real numbers, in another order
            torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(*found)


def test_after_training_binary_weights_have_two_levels(first: Case):
    first.built.method.on_step_(first.built.student, 30, 30)
    for name, layer in quantized_layers(first.built.student):
        if intended(first.spec, name) is not Lsq:
            assert layer.weight_quantizer.bits == 1
            weights = layer.weight_quantizer(layer.weight).detach().flatten(1)
            assert {len(channel.unique()) for channel in weights} == {2}
            assert torch.equal(weights.amax(1), -weights.amin(1))


def test_activation_quantizers_are_loud_before_and_calibrated_after_one_batch(first: Case):
    quantizers = [
        module for name, module in first.built.student.named_modules()
        if isinstance(module, Lsq) and not name.endswith("weight_quantizer")
    ]  # fmt: skip
    quantized = first.spec.method.get("activation_bits", 32) < 32
    layers = len(list(quantized_layers(first.built.student)))
    assert len(quantizers) == (quantized * (layers + 4 * 4 * first.spec.method.get("attention_matmul", False)))
    assert first.output().isnan().any() == quantized
    first.calibrate_()
    assert all(quantizer.scale.isfinite() and quantizer.scale > 0 for quantizer in quantizers)
    assert first.output().isfinite().all()
    before = {name: tensor.clone() for name, tensor in first.built.student.state_dict().items()}
    other = (3 * first.inputs[0], first.inputs[1])
    first.built.method.calibrate_(first.built.student, first.built.teacher, iter([other]))  # what is set stays
    assert all(torch.equal(tensor, before[name]) for name, tensor in first.built.student.state_dict().items())
    hooks = [hook for module in first.built.student.modules() for hook in module._forward_pre_hooks.values()]
    assert hooks == []


def test_each_activation_quantizer_starts_from_what_reaches_it_behind_quantized_layers(first: Case):
    """A second forward, with the inputs of every quantizer recorded, gives the same starts."""
    first.calibrate_()
    seen: dict[nn.Module, Tensor] = {}
    found = [layer.activation_quantizer for _, layer in quantized_layers(first.built.student)]
    for quantizer in filter(None, found):
        quantizer.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(module, inputs[0]))
    first.built.student.train()
    with torch.no_grad():
        first.built.student(*first.inputs)
    for quantizer, x in seen.items():
        torch.testing.assert_close(quantizer.scale.detach(), 2 * x.abs().mean() / quantizer.high**0.5)


def test_gradients_reach_every_trainable_parameter_and_not_the_teacher(trained: Case):
    trained.calibrate_()
    teacher, unet, method = trained.built
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainable = dict(method.trainable(unet))
    if trained.spec.method["name"] != "efficientdm":  # which trains what it adds, and no latent weight
        assert set(trainable) == {name for name, _ in unet.named_parameters()}
    if trained.spec.method["name"] == "lmb":  # its blocks that wait for their turn are real until then
        method.on_step_(unet, 30, 30)
    trained.loss().backward()
    without = [name for name, p in trainable.items() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    # softmax does not see what is added to every key; rounding may drop whole gradients only there
    # of EfficientDM, B = 0 lets nothing through to A before the first step, and only clipped inputs move zero points
    unseen = (".to_k.bias", ".to_k.frame.", "weight_quantizer.a", "activation_quantizer.zero")
    zero = {name for name, p in trainable.items() if p.grad.abs().sum() == 0 and not any(k in name for k in unseen)}
    assert zero == set()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    trained.train_(2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    own = {parameter.data_ptr() for parameter in unet.parameters()}
    assert not own & {parameter.data_ptr() for parameter in teacher.parameters()}


def test_the_loss_falls_on_one_fixed_batch(trained: Case):
    trained.calibrate_()
    losses = trained.train_(30)
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


def test_methods_without_data_are_known_to_the_recipes():
    assert {name for name in METHODS if registry.resolve("method", name, METHODS).data_free} == set(recipe.DATA_FREE)


def test_full_precision_is_the_teacher_itself(tiny_recipe: Callable[..., Recipe], tiny_teacher: Path):
    """Frozen as it is: torch multiplies in another order where a weight could have a gradient."""
    built = student.build(tiny_recipe(name="tiny"), seed=0)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 999])
    with torch.no_grad():
        assert torch.equal(built.student.eval().requires_grad_(False)(x, t)[0], built.teacher(x, t)[0])
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
        ("nonsense", [], r"unknown method 'nonsense'.*\n +known: baseline, bbcu, bidiffsr, bidm, binarydm"),
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
