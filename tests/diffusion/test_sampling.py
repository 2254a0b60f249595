"""From noise to images: independence of the images, DDIM against its formula in float64, bytes and grids."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from bdm_cli import student
from bdm_cli.diffusion.conditions import Condition
from bdm_cli.diffusion.models import noise_scheduler
from bdm_cli.diffusion.sampling import draw, grid, guided, noise_streams, of_recipe, sample, to_bytes
from bdm_cli.recipe import Recipe, Sample, Scheduler

ERMONGROUP = Scheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, set_alpha_to_one=True, steps_offset=0)
COMPVIS = Scheduler(
    beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, set_alpha_to_one=False, steps_offset=1
)
SHAPE = (1, 16, 16)


@pytest.fixture(params=["fp", "binarydm"])
def network(request: pytest.FixtureRequest, tiny_recipe: Callable[..., Recipe], tiny_teacher: Path) -> nn.Module:
    built = student.build(tiny_recipe(method=request.param), seed=0)
    random = torch.Generator().manual_seed(0)
    batch = (torch.randn(4, *SHAPE, generator=random), torch.randint(1000, (4,), generator=random))
    built.method.calibrate_(built.student, built.teacher, iter([batch]))
    return built.student.eval()


@pytest.fixture
def make(tiny_recipe: Callable[..., Recipe]) -> Callable[..., np.ndarray]:
    def images(
        network: nn.Module, indices: range, batch: int = 4, seed: int = 0, eta: float = 0.0, steps: int = 4
    ) -> np.ndarray:
        spec = tiny_recipe(f"sample.eta={eta}", f"sample.steps={steps}")
        return of_recipe(spec, network, Condition(), None, batch, seed)(indices)

    return images


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_does_not_depend_on_how_many_are_asked_nor_on_its_neighbours(
    network: nn.Module, eta: float, make: Callable[..., np.ndarray]
):
    all_four = make(network, range(4), eta=eta)
    assert all_four.shape == (4, 16, 16, 1)
    assert all_four.dtype == np.uint8
    for n in (1, 2, 3):
        assert np.array_equal(make(network, range(n), eta=eta), all_four[:n])
    shifted = make(network, range(2, 6), eta=eta)
    assert np.array_equal(shifted[:2], all_four[2:])
    assert np.array_equal(make(network, range(3, 4), eta=eta)[0], all_four[3])


def test_images_of_another_batch_size_differ_by_rounding_only(
    tiny_recipe: Callable[..., Recipe], tiny_teacher: Path, make: Callable[..., np.ndarray]
):
    """Kernels may sum in another order. Measured here: no difference in bytes; a grey level is allowed."""
    network = student.build(tiny_recipe(method="fp"), seed=0).student.eval()
    reference = make(network, range(4), batch=4).astype(int)
    for batch in (5, 8):
        assert np.abs(make(network, range(4), batch=batch) - reference).max() <= 1


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_seeds_and_indices_give_different_images_and_the_same_ones_again(
    network: nn.Module, eta: float, make: Callable[..., np.ndarray]
):
    first = make(network, range(4), seed=0, eta=eta)
    assert np.array_equal(make(network, range(4), seed=0, eta=eta), first)
    assert not np.array_equal(make(network, range(4), seed=1, eta=eta), first)
    assert len({image.tobytes() for image in first}) == 4
    if eta:
        assert not np.array_equal(make(network, range(4), seed=0, eta=0.0), first)


def test_noise_is_a_pure_function_of_seed_and_index():
    a = draw(noise_streams(3, range(5)), (2, 4, 4))
    b = draw(noise_streams(3, range(2, 4)), (2, 4, 4))
    assert a.dtype == torch.float32
    assert torch.equal(a[2:4], b)
    assert not torch.equal(a, draw(noise_streams(4, range(5)), (2, 4, 4)))
    many = draw(noise_streams(0, range(500)), (1, 8, 8))
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02


class Analytic(nn.Module):
    """A smooth noise estimate that depends on x and t; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Parameter(torch.zeros(()))
        self.times: list[list[int]] = []

    def forward(self, x: Tensor, t: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        self.times.append(t.tolist())
        return (0.6 * x + 0.1 * torch.sin(3 * x + t[:, None, None, None] / 200),)


def float64_ddim(spec: Scheduler, streams: list[np.random.Generator], steps: int, eta: float) -> np.ndarray:
    """samplers.md 2 and 5, written out: times 0, c, 2c, ... (+ offset) descending, c = 1000 // steps."""
    if spec.beta_schedule == "linear":
        betas = np.linspace(spec.beta_start, spec.beta_end, 1000)
    else:
        betas = np.linspace(spec.beta_start**0.5, spec.beta_end**0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)
    last = 1.0 if spec.set_alpha_to_one else alphas[0]
    skip = 1000 // steps
    x = np.stack([stream.standard_normal(SHAPE, dtype=np.float32) for stream in streams]).astype(np.float64)
    for t in (np.arange(steps) * skip + spec.steps_offset)[::-1]:
        e = 0.6 * x + 0.1 * np.sin(3 * x + t / 200)
        a, before = alphas[t], alphas[t - skip] if t >= skip else last
        sigma = eta * math.sqrt((1 - before) / (1 - a) * (1 - a / before))
        x0 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
        x = math.sqrt(before) * x0 + math.sqrt(1 - before - sigma**2) * e
        if eta:
            x = x + sigma * np.stack([stream.standard_normal(SHAPE, dtype=np.float32) for stream in streams])
    return x


@pytest.mark.parametrize("n", [1, 3, 4])
def test_the_network_always_runs_on_full_batches(n: int, make: Callable[..., np.ndarray]):
    """Since kernels may sum in another order at another batch size."""
    network = Analytic()
    assert len(make(network, range(n), batch=4, steps=2)) == n
    assert [len(times) for times in network.times] == [4, 4]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 20, 100])
@pytest.mark.parametrize("spec", [ERMONGROUP, COMPVIS], ids=["ermongroup", "compvis"])
def test_ddim_is_the_float64_update(spec: Scheduler, steps: int, eta: float):
    expected = float64_ddim(spec, [np.random.default_rng([5, i]) for i in range(3)], steps, eta)
    streams, network = noise_streams(5, range(3)), Analytic()
    settings = Sample(steps=steps, eta=eta, to_bytes="round")
    result = sample(guided(network, (), (), 1.0), spec, settings, draw(streams, SHAPE), streams).numpy()
    assert network.times == [
        [t] * 3 for t in range((steps - 1) * (1000 // steps) + spec.steps_offset, -1, -(1000 // steps))
    ]
    np.testing.assert_allclose(result, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("spec", [ERMONGROUP, COMPVIS], ids=["ermongroup", "compvis"])
def test_the_scheduler_says_what_the_samplers_need(spec: Scheduler):
    scheduler = noise_scheduler(spec)
    assert isinstance(scheduler, DDIMScheduler)
    config = scheduler.config
    assert (config.clip_sample, config.thresholding, config.rescale_betas_zero_snr) == (False, False, False)
    assert (config.timestep_spacing, config.prediction_type) == ("leading", "epsilon")
    assert config.num_train_timesteps == 1000
    scheduler.set_timesteps(100)
    assert scheduler.timesteps.tolist() == [t + spec.steps_offset for t in range(990, -1, -10)]
    assert float(scheduler.final_alpha_cumprod) == (
        1.0 if spec.set_alpha_to_one else float(scheduler.alphas_cumprod[0])
    )


def test_to_bytes_rounds_or_truncates():
    x = torch.tensor([-2.0, -1.0, -0.999, -0.5, 0.0, 0.002, 0.5, 0.9999, 1.0, 7.0])
    exact = [0, 0, 0.1275, 63.75, 127.5, 127.755, 191.25, 254.98725, 255, 255]
    column = x.reshape(1, 1, -1, 1)
    assert to_bytes(column, "truncate").ravel().tolist() == [int(v) for v in exact]
    assert to_bytes(column, "round").ravel().tolist() == [0, 0, 0, 64, 128, 128, 191, 255, 255, 255]


def test_to_bytes_puts_channels_last_and_undoes_itself():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3)).astype(np.uint8)
    x = torch.tensor(pictures.transpose(0, 3, 1, 2)).double() / 127.5 - 1
    result = to_bytes(x, "round")
    assert result.dtype == np.uint8
    assert np.array_equal(result, pictures)


@pytest.mark.parametrize(
    ("n", "side", "channels", "columns", "size"),
    [
        (16, 16, 1, 8, (8 * (48 + 2) + 2, 2 * (48 + 2) + 2)),
        (64, 32, 3, 8, (8 * 34 + 2, 8 * 34 + 2)),
        (5, 8, 3, 4, (4 * 50 + 2, 2 * 50 + 2)),
        (1, 256, 3, 8, (8 * 258 + 2, 258 + 2)),
    ],
)
def test_grid_has_a_tile_for_every_image(n: int, side: int, channels: int, columns: int, size: tuple[int, int]):
    pictures = np.random.default_rng(0).integers(0, 255, (n, side, side, channels)).astype(np.uint8)
    sheet = grid(pictures, columns=columns)
    assert sheet.size == size
    assert sheet.mode == ("L" if channels == 1 else "RGB")
    scale = max(1, 48 // side)
    last = n - 1
    top, left = (2 + place * (side * scale + 2) for place in divmod(last, columns))
    tile = np.asarray(sheet).reshape(*sheet.size[::-1], channels)[top : top + side * scale, left : left + side * scale]
    assert np.array_equal(tile[::scale, ::scale], pictures[last])
