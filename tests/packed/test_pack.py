"""The packed file: its bits against NumPy's, whole or refused, and how large LDM-4 becomes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import students
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from zero_points import TimedZero, ZeroWeight

from bdm_cli import places, recipe, student, tensorfile
from bdm_cli.diffusion.models import build_unet
from bdm_cli.errors import BdmError
from bdm_cli.inputs import Exported
from bdm_cli.jobs import export
from bdm_cli.metrics import cost
from bdm_cli.packed import pack
from bdm_cli.packed.pack import Layer
from bdm_cli.quant.layers import Parts, QuantConv2d, QuantLinear
from bdm_cli.quant.quantizers import EbbWeight, Grid, Lsq, Quantizer, SignWeight, Term, lsq_weight
from bdm_cli.recipe import Recipe

MIB = 2**20
TinyRecipe = Callable[..., Recipe]


# bits


def numpy_bits(levels: np.ndarray, bits: int, low: int) -> np.ndarray:
    """[K, n] -> uint8 [K, ceil(n bits / 8)], least significant bit first."""
    above = (levels + 1) // 2 if bits == 1 else levels - low
    each = (above[:, :, None] >> np.arange(bits)) & 1
    return np.packbits(each.reshape(len(levels), -1).astype(np.uint8), axis=1, bitorder="little")


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 40), st.integers(-9, 9), st.integers(0, 2**32 - 1))
def test_levels_lie_as_numpy_packs_them(bits: int, k: int, n: int, zero: int, seed: int):
    random = np.random.default_rng(seed)
    low = -1 if bits == 1 else -(2 ** (bits - 1)) - zero
    values = 2 * random.integers(0, 2, (k, n)) - 1 if bits == 1 else random.integers(low, low + 2**bits, (k, n))
    found = pack._bits(Term(bits, low, torch.from_numpy(values).float(), torch.ones(k)))
    np.testing.assert_array_equal(found.numpy(), numpy_bits(values, bits, low))
    if bits > 1:
        back = pack.levels(found, Layer(shape=(k, n), bits=bits, low=low))
        np.testing.assert_array_equal(back.numpy(), values)


@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_levels_with_zero_points_lie_as_numpy_packs_them(bits: int, k: int, n: int, seed: int):
    """w = s_c (q - z_c), q = 0..2^b - 1: the file holds q and z."""
    random = np.random.default_rng(seed)
    q, zero = random.integers(0, 2**bits, (k, n)), random.integers(-300, 300, k)
    term = Term(bits, 0, torch.from_numpy(q - zero[:, None]).float(), torch.ones(k), torch.from_numpy(zero))
    found = pack._bits(term)
    np.testing.assert_array_equal(found.numpy(), numpy_bits(q, bits, 0))
    back = pack.levels(found, Layer(shape=(k, n), bits=bits, low=0), term.zero.to(torch.int32))
    np.testing.assert_array_equal(back.numpy(), q - zero[:, None])
    assert term.most == max(np.abs(0 - zero).max(), np.abs(2**bits - 1 - zero).max())


QUANTIZERS = {
    "zero points": ZeroWeight,
    "signs": SignWeight,
    "two bases": EbbWeight,
    "2 bits": lambda weight: lsq_weight(2, weight),
    "8 bits": lambda weight: lsq_weight(8, weight),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_terms_of_a_weight_add_up_to_it(name: str):
    """Bit for bit, also at 0, whose sign is +1."""
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 3, 3)
    weight[0, 0] = 0.0
    quantizer = QUANTIZERS[name](weight)
    with torch.no_grad():
        terms = quantizer.terms(weight)
        total = sum(term.levels * term.sigma.view(-1, 1, 1, 1) for term in terms)
        assert torch.equal(total, quantizer(weight))
    for term in terms:
        assert torch.equal(term.levels, term.levels.round())
        assert term.levels.abs().max() <= term.most
        assert (term.levels + (0 if term.zero is None else term.zero.view(-1, 1, 1, 1))).min() >= term.low


@pytest.mark.parametrize(
    ("bits", "signed", "zero"), [(4, True, 0), (4, False, 0), (4, False, 7), (8, False, 133), (3, True, -2)]
)
def test_the_grid_of_activations_holds_their_values(bits: int, signed: bool, zero: int):
    quantizer = Lsq(bits, signed, zero)
    quantizer.calibrate_(torch.ones(1))
    x = 1.1 * 2**bits * quantizer.scale.detach() * torch.linspace(-1, 1, 3000)
    grid = quantizer.grid()
    levels = (x / grid.step + grid.zero).round().clamp(grid.low, grid.low + 2**bits - 1) - grid.zero
    assert torch.equal(levels * grid.step, quantizer(x).detach())
    assert levels.abs().max() <= grid.most
    assert len(levels.unique()) == 2**bits


def test_the_bound_of_a_grid_with_zero_points_by_time_is_that_of_them_all():
    step = torch.ones(2)
    assert Grid(4, 0, torch.tensor([3.0, -2.0]), step).most == 17
    assert Grid(4, -8, torch.tensor([3.0, 9.0]), step).most == 17
    assert Grid(1, -1, torch.tensor([3.0, -2.5]), step).most == 1


# a student in memory and on disk


def test_nothing_is_lost_on_disk(tiny_recipe: TinyRecipe, tmp_path: Path):
    spec = tiny_recipe()
    packed = students.packed(spec, students.finished(spec))
    pack.write(tmp_path / "m.safetensors", packed)
    found = pack.read(tmp_path / "m.safetensors")
    assert found.header == packed.header
    assert found.tensors.keys() == packed.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in packed.tensors.items())
    assert all(found.tensors[name].dtype == tensor.dtype for name, tensor in packed.tensors.items())
    assert found.header.recipe == spec
    assert pack.digest(found) == pack.digest(packed)


def test_what_a_file_holds(tiny_recipe: TinyRecipe):
    """Weights by bits, sigma and bias per channel, a step per layer; norms as they are."""
    spec = tiny_recipe()
    unet = students.finished(spec)
    packed = students.packed(spec, unet)
    header, tensors = packed.header, packed.tensors
    plain = dict(build_unet(spec.unet).named_parameters())
    edges = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    for name, layer in header.layers.items():
        shape, bits = tuple(plain[f"{name}.weight"].shape), 8 if name in edges else 1
        assert (layer.shape, layer.bits, layer.bases) == (shape, bits, 1)
        assert layer.input == ((8, -128, 0) if name in edges else (4, -8, 0))
        n = int(np.prod(shape[1:]))
        assert tuple(tensors[f"{name}.weight"].shape) == (1, shape[0], (n * bits + 7) // 8)
        assert tuple(tensors[f"{name}.sigma"].shape) == (1, shape[0])
        quantized = unet.get_submodule(name)
        if bits == 1:
            signs = np.where(quantized.weight.numpy() >= 0, 1, -1).reshape(shape[0], -1)
            np.testing.assert_array_equal(tensors[f"{name}.weight"][0].numpy(), numpy_bits(signs, 1, -1))
            assert torch.equal(tensors[f"{name}.sigma"][0], quantized.weight_quantizer.sigma.flatten())
        assert torch.equal(tensors[f"{name}.step"], quantized.activation_quantizer.scale.view(1))
    left = {name for name in plain if name.rpartition(".")[0] not in header.layers}
    assert packed.rest().keys() == left
    assert all("norm" in name for name in left)


def test_bases_before_the_transition(tiny_recipe: TinyRecipe):
    spec = tiny_recipe("method.ebb_scope=2")
    early, late = (students.packed(spec, students.finished(spec, evolved)) for evolved in (False, True))
    assert {layer.bases for layer in late.header.layers.values()} == {1}
    two = [name for name, layer in early.header.layers.items() if layer.bases == 2]
    assert two
    assert all(early.tensors[f"{name}.weight"].shape[0] == 2 for name in two)
    assert early.counted_bits() - late.counted_bits() == sum(
        int(np.prod(early.header.layers[name].shape)) for name in two
    )


@pytest.mark.parametrize("name", ["tiny-w1a4", "tiny-cond"])
def test_half_rounds_all_but_bits_and_steps(name: str, tiny_recipe: TinyRecipe, tmp_path: Path):
    spec = tiny_recipe("method.attention_matmul=true", name=name)
    unet = students.finished(spec)
    whole, half = (students.packed(spec, unet, half) for half in (False, True))
    assert half.header.half
    steps = {name for name, _ in half.header.steps()}
    assert any(".processor." in name for name in steps)
    for name, tensor in half.tensors.items():
        exact = name in steps or tensor.dtype == torch.uint8
        assert torch.equal(tensor, whole.tensors[name] if exact else whole.tensors[name].half()), name
    for label, packed in (("whole", whole), ("half", half)):
        pack.write(tmp_path / label, packed)
    assert (tmp_path / "half").stat().st_size < (tmp_path / "whole").stat().st_size
    pack.read(tmp_path / "half")


def test_numbers_beyond_16_bits_are_not_halved(tiny_recipe: TinyRecipe):
    spec = tiny_recipe()
    unet = students.finished(spec)
    unet.conv_norm_out.weight[0] = 1e5
    with pytest.raises(
        BdmError, match=r"^conv_norm_out\.weight goes beyond 16-bit floats \(65504\)\.\n  leave out --half"
    ):
        students.packed(spec, unet, half=True)


# what has no packed form


def one_layer(layer: nn.Module) -> nn.Module:
    unet = nn.Module()
    unet.only = layer
    return unet


def conv(**options: object) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, **options)


def activations(scale: float = 0.1, zero: float = 0) -> Lsq:
    quantizer = Lsq(4, zero_point=zero)
    with torch.no_grad():
        quantizer.scale.fill_(scale)
    return quantizer


class Other(Quantizer):
    bits = 4

    def forward(self, x: Tensor) -> Tensor:
        return x


def quantized(layer: nn.Conv2d | nn.Linear, activation: nn.Module | None, weight: Callable = SignWeight) -> nn.Module:
    kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    return one_layer(kind(layer, Parts(weight(layer.weight), activation)))


REFUSED = {
    "groups": (lambda: quantized(conv(groups=2), activations()), "groups 2, dilation"),
    "dilation": (lambda: quantized(conv(dilation=2), activations()), r"dilation \(2, 2\)"),
    "padding": (lambda: quantized(conv(padding_mode="circular"), activations()), r"padding \(1, 1\) \(circular\)"),
    "not calibrated": (
        lambda: quantized(conv(), activations(float("nan"))),
        "the step size of its input is .nan.; was it",
    ),
    "another weight quantizer": (
        lambda: quantized(conv(), None, lambda weight: Other()),
        "Other does not say its weights in whole numbers",
    ),
    "another activation quantizer": (
        lambda: quantized(nn.Linear(3, 2), Other()),
        "Other does not say its activations in whole numbers",
    ),
    "a step per channel": (lambda: quantized(conv(), Lsq(4, scale_shape=(4, 1, 1))), "one step size per channel"),
    "1-bit weights with zero points": (
        lambda: quantized(conv(), None, lambda weight: ZeroWeight(weight, 1)),
        "its weights are of 1 bit and have zero points",
    ),
    "zero points by time under 1-bit weights": (
        lambda: quantized(conv(), TimedZero(4, (0.1, 0.2), (3.0, 7.0))),
        "its input has zero points by sampling time, and its weights are of 1 bit",
    ),
    "a zero between the levels": (
        lambda: quantized(conv(), activations(zero=0.5)),
        "zero point is 0.5, which is no integer",
    ),
    "real weights": (
        lambda: one_layer(QuantConv2d(conv(), Parts(None, activations()))),
        "its weights are not quantized, only its input",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_without_a_packed_form_are_named(name: str, tiny_recipe: TinyRecipe):
    make, reason = REFUSED[name]
    with pytest.raises(BdmError, match=rf"^layer only has no packed form: .*{reason}.*\n  draw from the run itself"):
        students.packed(tiny_recipe(), make())


def test_zero_points_are_kept_as_they_are(tiny_recipe: TinyRecipe, tmp_path: Path):
    """Of the weights' channels and of the input's times; neither is halved nor counted."""
    torch.manual_seed(0)
    unet = quantized(conv(), TimedZero(4, (0.1, 0.2), (3.0, 7.0)), ZeroWeight)
    for half in (False, True):
        path = tmp_path / f"{half}.safetensors"
        pack.write(path, students.packed(tiny_recipe(), unet, half))
        found = pack.read(path)
        zero, offset = found.tensors["only.zero"], found.tensors["only.offset"]
        assert torch.equal(zero, unet.only.weight_quantizer.zero.flatten().to(torch.int32))
        assert len(zero.unique()) > 1
        assert offset.dtype == torch.float32
        assert offset.tolist() == [3.0, 7.0]
        assert found.header.layers["only"].input == (4, 0, 0)
        assert len(found.tensors[pack.TIMES]) == 2
        assert found.rest() == {}
        assert found.counted_bits() == 4 * unet.only.weight.numel() + 32 * 4


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        ("only.zero", torch.zeros(4), r"only.zero is torch.float32 \(4,\), not torch.int32 \(4,\)"),
        ("only.zero", torch.zeros(3, dtype=torch.int32), r"only.zero is torch.int32 \(3,\)"),
        ("only.offset", torch.zeros(1), r"only.offset is torch.float32 \(1,\), not torch.float32 \(2,\)"),
    ],
)
def test_zero_points_that_are_not_as_the_header_says(
    name: str, tensor: Tensor, told: str, tiny_recipe: TinyRecipe, tmp_path: Path
):
    path = tmp_path / "m.safetensors"
    unet = quantized(conv(), TimedZero(4, (0.1, 0.2), (3.0, 7.0)), ZeroWeight)
    pack.write(path, students.packed(tiny_recipe(), unet))
    rewritten(path, lambda tensors, header: put(tensors, name, tensor))
    with pytest.raises(BdmError, match=f"(?s){told}.*nothing was loaded"):
        pack.read(path)


def test_as_many_zero_points_as_steps(tiny_recipe: TinyRecipe):
    with pytest.raises(ValueError, match="only: 1 zero points for 2 steps"):
        students.packed(tiny_recipe(), quantized(conv(), TimedZero(4, (0.1, 0.2), (3.0,)), ZeroWeight))


def test_full_precision_has_nothing_to_pack(tiny_recipe: TinyRecipe):
    spec = tiny_recipe(method="fp")
    with pytest.raises(BdmError, match=r"^method 'fp' quantizes no layer; there is nothing to pack"):
        students.packed(spec, students.finished(spec))


# files that are refused


@pytest.fixture
def file(tiny_recipe: TinyRecipe, tmp_path: Path) -> Path:
    spec = tiny_recipe()
    path = tmp_path / "m.safetensors"
    pack.write(path, students.packed(spec, students.finished(spec)))
    return path


def test_any_flipped_bit_is_noticed(file: Path):
    """In the payload, which safetensors does not check, in its header and in ours."""
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    random = np.random.default_rng(0)
    inside = random.integers(8, 8 + header, 60)
    after = random.integers(8 + header, len(content), 60)
    for at in [0, 1, 7, 8, 9, *inside, 7 + header, 8 + header, *after, len(content) - 1]:
        bit = 1 << int(random.integers(8))
        content[at] ^= bit
        file.write_bytes(content)
        with pytest.raises(BdmError, match="\n  "):
            pack.read(file)
        content[at] ^= bit
    file.write_bytes(content)
    pack.read(file)


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1000, -1])
def test_a_truncated_file(file: Path, length: int):
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(BdmError, match="is not a whole safetensors file"):
        pack.read(file)


def rewritten(file: Path, change: Callable[[dict[str, Tensor], dict], None], version: str = "1") -> None:
    """The file with other tensors or another header, and the hash that belongs to them."""
    packed = pack.read(file)
    tensors, header = dict(packed.tensors), json.loads(packed.header.text())
    change(tensors, header)
    text = json.dumps(header)
    metadata = {"format": pack.FORMAT, "version": version, "header": text, "sha256": pack._digest(text, tensors)}
    tensorfile.write(file, tensors, metadata)


def put(mapping: dict, key: str, value: object) -> None:
    mapping[key] = value


WRONG = {
    "a missing weight": (lambda t, h: t.pop("conv_in.weight"), "conv_in.weight is missing"),
    "a missing step": (lambda t, h: t.pop("conv_in.step"), "conv_in.step is missing"),
    "a misshapen weight": (
        lambda t, h: put(t, "conv_in.weight", t["conv_in.weight"][:, 1:]),
        r"conv_in.weight is torch.uint8 \(1, 7, 9\), not torch.uint8 \(1, 8, 9\)",
    ),
    "a type": (lambda t, h: put(t, "conv_in.sigma", t["conv_in.sigma"].double()), "conv_in.sigma is torch.float64"),
    "steps for no times": (
        lambda t, h: put(t, "conv_in.step", torch.ones(3)),
        r"conv_in.step is torch.float32 \(3,\), not torch.float32 \(1,\)",
    ),
    "another header": (lambda t, h: h.update(colour="blue"), "colour: Extra inputs are not permitted"),
    "a layer of 9 bits": (lambda t, h: h["layers"]["conv_in"].update(bits=9), "layers.conv_in.bits: Input should be"),
    "another recipe": (lambda t, h: h["recipe"].update(colour="blue"), "recipe.colour: Extra inputs are not permitted"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_not_what_its_header_says(name: str, file: Path):
    change, told = WRONG[name]
    rewritten(file, change)
    with pytest.raises(BdmError, match=f"(?s){told}.*nothing was loaded"):
        pack.read(file)


MISFITS = {
    "an extra tensor": (lambda t, h: put(t, "extra", torch.ones(1)), "extra"),
    "a missing norm": (lambda t, h: t.pop("conv_norm_out.weight"), "conv_norm_out.weight"),
    "a misshapen norm": (lambda t, h: put(t, "conv_norm_out.weight", torch.ones(3)), "conv_norm_out.weight"),
    "a missing bias": (lambda t, h: t.pop("conv_in.bias"), "conv_in has no bias in the file"),
    "a layer too many": (
        lambda t, h: [
            h["layers"].update(more=h["layers"]["conv_in"]),
            *(put(t, f"more.{part}", t[name].clone()) for part in pack.PARTS if (name := f"conv_in.{part}") in t),
        ],
        "more has weights .* in the file; the network has no such layer",
    ),
    "another network": (
        lambda t, h: h["recipe"]["unet"]["arguments"].update(block_out_channels=[16, 16, 16]),
        r"conv_in has weights .* in the file; the network has QuantConv2d \(16, 1, 3, 3\)\.",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_file_that_does_not_fit_its_network(name: str, file: Path):
    change, told = MISFITS[name]
    rewritten(file, change)
    with pytest.raises(BdmError, match=f"(?s)does not fit the network of its own recipe: .*{told}"):
        student.unpacked(pack.read(file), file)


def test_files_of_others(file: Path, tiny_recipe: TinyRecipe, tmp_path: Path):
    spec, other = tiny_recipe(), tmp_path / "other.safetensors"
    with pytest.raises(BdmError, match="there is no file"):
        pack.read(other)
    other.write_text("a text")
    with pytest.raises(BdmError, match="is not a whole safetensors file"):
        pack.read(other)
    safetensors.torch.save_file({"weight": torch.ones(2)}, other)
    with pytest.raises(BdmError, match=r"is not a packed model\.\n  give a file of bdm export"):
        pack.read(other)
    student.save(other, students.finished(spec), spec, 0, 6)
    with pytest.raises(BdmError, match=r"is not a packed model\.\n  it is a model of bdm, not packed yet: bdm export"):
        pack.read(other)
    rewritten(file, lambda tensors, header: None, version="2")
    with pytest.raises(BdmError, match=r"of format version 2; this bdm reads version 1\.\n  update bdm"):
        pack.read(file)


# LDM-4


@pytest.fixture(scope="module")
def ldm4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    """LDM-4 at W1A4 with 8-bit edges, random weights: the file and what `bdm export` says of it. 15 seconds, 2.3 GB."""
    path = tmp_path_factory.mktemp("ldm4") / "ldm4.safetensors"
    with places.home_at(str(path.parent)):
        table = export.run(Exported(None, recipe.load("bedrooms-w1a4")), path)
    return path, table.iloc[0].to_dict()


def test_ldm4_is_30_times_smaller_on_disk(ldm4: tuple[Path, dict[str, object]]):
    """The paper computes 29.2x (and prints 35.8 MB); ours is measured, with scales, steps, recipe and names."""
    path, told = ldm4
    size = path.stat().st_size / MIB
    assert size <= 34.8
    assert told["Size (MiB)"] == pytest.approx(size, abs=1e-3)
    assert told["FP32 file (MiB)"] / size >= 30
    assert told["FP32 file (MiB)"] == pytest.approx(1045.4, abs=0.2)
    assert int.from_bytes(path.open("rb").read(8), "little") < 150 * 1024
    network = cost.of_unet(recipe.load("bedrooms-w1a4").unet, build_unet)
    assert told["Eq. 16 (MiB)"] == pytest.approx(cost.model_size_mb(network, cost.Bits(1, 4, 8)), abs=1e-3)


MEMORY = """
import sys
from pathlib import Path
from bdm_cli import student
from bdm_cli.packed import pack

def of(what):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(what))

import torch, diffusers
from bdm_cli.diffusion.models import build_unet
from bdm_cli import recipe
with torch.device("meta"):
    build_unet(recipe.load("digits").unet)
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
before = of("VmRSS")
path = Path(sys.argv[1])
unet = student.unpacked(pack.read(path), path)
print(of("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kernel", ["torch", ""])
def test_loading_ldm4_needs_no_fp32_copy(ldm4: tuple[Path, dict[str, object]], kernel: str, monkeypatch):
    """Its weights are 1,045 MiB in fp32."""
    monkeypatch.setenv("BDM_KERNEL", kernel)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(ldm4[0])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 150
