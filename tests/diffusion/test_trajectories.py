"""Calls along a teacher's sampling trajectories: a pure function of their number, in the sampler's own order."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bdm_cli import student
from bdm_cli.diffusion import conditions
from bdm_cli.diffusion.models import estimate_noise, load_teacher, noise_scheduler
from bdm_cli.diffusion.sampling import draw, noise_streams, times
from bdm_cli.diffusion.trajectories import STREAM, Call, Calls
from bdm_cli.recipe import Recipe

TinyRecipe = Callable[..., Recipe]
SETTINGS = {
    "ddim": ("tiny-ldm", ["sample.steps=4", "sample.eta=0"], 4),
    "ddim, eta 1": ("tiny-ldm", ["sample.steps=4", "sample.eta=1"], 4),
    "quad": ("tiny-ldm", ["sample.steps=4", "sample.spacing=quad", "sample.eta=0"], 4),
    "plms": ("tiny-ldm", ["sample.steps=4", "sample.sampler=plms", "sample.eta=0"], 5),
    "dpm-solver": ("tiny-ldm", ["sample.steps=4", "sample.sampler=dpm-solver", "sample.eta=0"], 4),
    "guided": ("tiny-cond", ["sample.steps=4", "sample.guidance=2.5"], 4),
}


@pytest.fixture(params=SETTINGS)
def spec(
    request: pytest.FixtureRequest, tiny_recipe: TinyRecipe, tiny_ldm_teacher: Path, tiny_cond_teacher: Path
) -> Recipe:
    name, overrides, _ = SETTINGS[request.param]
    return tiny_recipe("train.batch=2", *overrides, name=name)


def equal(a: Call, b: Call) -> bool:
    return all(torch.equal(*pair) for pair in zip((*a.inputs, a.estimate), (*b.inputs, b.estimate), strict=True))


def test_a_call_is_a_function_of_its_number(spec: Recipe):
    teacher = load_teacher(spec)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    calls = Calls(spec, teacher, seed=3)
    length = len(calls)
    in_order = [calls(n) for n in range(2 * length)]
    jumping = Calls(spec, teacher, seed=3)
    for n in (length + 1, 2, 2 * length - 1, 0, length, 1):
        torch.manual_seed(n)  # no global state is read
        assert equal(jumping(n), in_order[n])
    other = Calls(spec, teacher, seed=4)
    for n in (0, length - 1, length):
        assert not torch.equal(other(n).inputs[0], in_order[n].inputs[0])
        assert not torch.equal(in_order[0].inputs[0], in_order[length].inputs[0])
    assert not teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_the_calls_are_the_samplers_own_in_its_order(spec: Recipe, request: pytest.FixtureRequest):
    """Times as the sampler lists them (PLMS calls its second one twice); estimates are the teacher's of what it got."""
    teacher, s = load_teacher(spec), spec.sample
    calls = Calls(spec, teacher, seed=0)
    listed = times(s.sampler, spec.scheduler, s.steps, s.spacing)
    assert len(calls) == len(listed) == SETTINGS[request.node.callspec.params["spec"]][2]
    for n, t in enumerate([*listed, *listed]):
        call = calls(n)
        assert call.inputs[1].shape == (2,)
        assert call.inputs[1].tolist() == pytest.approx([t, t], rel=1e-6)
        with torch.no_grad():
            own = estimate_noise(teacher, *call.inputs)
        torch.testing.assert_close(call.estimate, own, rtol=1e-5, atol=1e-5)
    if s.sampler == "plms":
        assert listed[1] == listed[2]
        assert not torch.equal(calls(1).inputs[0], calls(2).inputs[0])
    if s.sampler == "dpm-solver":
        assert any(t % 1 for t in listed)


def test_start_noise_is_each_images_own_and_not_the_evaluations(spec: Recipe):
    calls = Calls(spec, load_teacher(spec), seed=5)
    shape = tuple(calls(0).inputs[0].shape[1:])
    for number in range(2):
        found = calls(number * len(calls)).inputs[0]
        for place, index in enumerate(range(2 * number, 2 * number + 2)):
            stream = np.random.default_rng([5, index, 0, 0, STREAM])
            np.testing.assert_array_equal(found[place].numpy(), stream.standard_normal(shape, dtype=np.float32))
        for seed in (0, 5):
            drawn = draw(noise_streams(seed, range(64)), shape)
            assert not any(torch.equal(image, other) for image in found for other in drawn)


def test_processes_share_the_trajectories(spec: Recipe):
    """Each of two follows every second one."""
    teacher = load_teacher(spec)
    alone = Calls(spec, teacher, seed=1)
    length = len(alone)
    for rank in range(2):
        calls = Calls(spec, teacher, seed=1, rank=rank, world=2)
        for n in (0, length - 1, length):
            number, position = divmod(n, length)
            assert equal(calls(n), alone((2 * number + rank) * length + position))


def ddim(scheduler: object, x: Tensor, e: Tensor, t: int, t_next: int) -> np.ndarray:
    """One step of DDIM without noise (arXiv:2010.02502, Eq. 12), in float64."""
    a, a_next = (float(scheduler.alphas_cumprod[at].double()) for at in (t, t_next))
    x0 = (x.double().numpy() - (1 - a) ** 0.5 * e.double().numpy()) / a**0.5
    return a_next**0.5 * x0 + (1 - a_next) ** 0.5 * e.double().numpy()


@pytest.mark.parametrize("name", ["ddim", "guided"])
def test_a_call_follows_from_the_one_before(
    name: str, tiny_recipe: TinyRecipe, tiny_ldm_teacher: Path, tiny_cond_teacher: Path
):
    """By DDIM; where guidance is on, it drives the trajectory and stands in no estimate."""
    recipe, overrides, _ = SETTINGS[name]
    spec = tiny_recipe("train.batch=3", "sample.eta=0", *overrides, name=recipe)
    teacher, scheduler = load_teacher(spec), noise_scheduler(spec.scheduler)
    calls = Calls(spec, teacher, seed=2)
    listed = times("ddim", spec.scheduler, spec.sample.steps)
    assert len(calls(0).inputs) == (3 if name == "guided" else 2)
    for n in range(3):
        (x, t, *told), e = calls(n)
        if name == "guided":
            labels = conditions.of_recipe(spec).of_images(range(3), 2)[0]
            assert torch.equal(told[0], labels)
            with torch.no_grad():
                nothing = estimate_noise(teacher, x, t, torch.full((3,), spec.unet.n_classes - 1))
            e = nothing + 2.5 * (e - nothing)
        expected = ddim(scheduler, x, e, listed[n], listed[n + 1])
        np.testing.assert_allclose(calls(n + 1).inputs[0].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_eta_draws_from_the_images_own_streams(tiny_recipe: TinyRecipe, tiny_ldm_teacher: Path):
    """An image's trajectory does not depend on who shares its batch."""
    of = {n: tiny_recipe(f"train.batch={n}", "sample.steps=4", "sample.eta=1", name="tiny-ldm") for n in (1, 2)}
    teacher = load_teacher(of[1])
    pair, single = Calls(of[2], teacher, seed=0), Calls(of[1], teacher, seed=0)
    for position in range(4):
        for index in range(2):
            alone = single(4 * index + position)
            torch.testing.assert_close(pair(position).inputs[0][index], alone.inputs[0][0], rtol=1e-4, atol=1e-4)
    without = Calls(tiny_recipe("train.batch=1", "sample.steps=4", "sample.eta=0", name="tiny-ldm"), teacher, seed=0)
    assert torch.equal(without(0).inputs[0], single(0).inputs[0])
    assert not torch.equal(without(1).inputs[0], single(1).inputs[0])


def test_a_student_can_train_on_a_call(tiny_recipe: TinyRecipe, tiny_ldm_teacher: Path):
    """Inputs and estimates are no inference tensors, which autograd refuses."""
    spec = tiny_recipe("train.batch=2", name="tiny-ldm", method="fp")
    built = student.build(spec, seed=0, random_teacher=True)
    inputs, estimate = Calls(spec, load_teacher(spec), seed=0)(0)
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in (*inputs, estimate))
    nn.functional.mse_loss(estimate_noise(built.student, *inputs), estimate).backward()
    assert all(parameter.grad is not None for parameter in built.student.parameters())
