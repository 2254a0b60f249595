"""diffusion/sampling against the original samplers (original_samplers.py) on the exact predictor of a Gaussian mixture.

"Measured" is the largest difference of the final samples, ours in float32 on a CPU, theirs in float64; their values
reach 1.7. What a wrong argument costs stands at the end: at least thirty times the tolerance of its sampler.
"""

import functools
import math
from collections.abc import Iterator

import numpy as np
import original_samplers as original
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from original_samplers import Mixture, MixtureNet

from bdm_cli import recipe
from bdm_cli.diffusion import sampling
from bdm_cli.errors import BdmError
from bdm_cli.recipe import Sample, Scheduler

N, SHAPE = 4, (3, 8, 8)
LABELS, UNCONDITIONAL = np.array([0, 1, 1, 0]), 2

ALPHAS = {
    "bedrooms": original.compvis_alphas(0.0015, 0.0195),
    "churches": original.compvis_alphas(0.0015, 0.0155),
    "cifar10": original.ermongroup_alphas(1e-4, 0.02),
}


@functools.cache
def mixture(name: str) -> Mixture:
    return Mixture.make(ALPHAS[name], SHAPE)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def scheduler(name: str) -> Scheduler:
    return recipe.load(name).scheduler


def settings(**given: object) -> Sample:
    return Sample(to_bytes="round", **given)


def streams() -> list[np.random.Generator]:
    return [np.random.default_rng([5, i]) for i in range(N)]


def drawn(of: list[np.random.Generator]) -> np.ndarray:
    return np.stack([stream.standard_normal(SHAPE, dtype=np.float32) for stream in of])


def ours(
    name: str, given: Sample, spec: Scheduler | None = None, labels: np.ndarray | None = None
) -> tuple[np.ndarray, MixtureNet]:
    """The final samples of diffusion.sampling, and the network that it called."""
    network, random = MixtureNet(mixture(name)), streams()
    noise = torch.from_numpy(drawn(random))
    told = () if labels is None else (torch.from_numpy(labels),)
    untold = () if labels is None else (torch.full((N,), UNCONDITIONAL),)
    estimate = sampling.guided(network, told, untold, given.guidance)
    result = sampling.sample(estimate, spec or scheduler(name), given, noise, random)
    assert result.shape == noise.shape
    assert result.dtype == torch.float32
    return result.numpy(), network


def theirs(name: str, given: Sample, labels: np.ndarray | None = None) -> np.ndarray:
    """The final samples of the original sampler."""
    random = streams()
    x, alphas, eps = drawn(random), ALPHAS[name], mixture(name).eps
    if labels is not None:
        eps = original.guided(eps, labels, UNCONDITIONAL, given.guidance)
    if given.sampler == "plms":
        return original.compvis_plms(eps, alphas, x, given.steps)
    if given.sampler == "dpm-solver":
        return original.dpm_solver(eps, alphas, x, given.steps)
    if name == "cifar10":
        return original.ermongroup_ddim(
            eps, alphas, x, given.steps, given.spacing, given.eta, functools.partial(drawn, random)
        )
    return original.compvis_ddim(eps, alphas, x, given.steps, given.eta, functools.partial(drawn, random))


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def visited(network: MixtureNet) -> list[float]:
    return [time for _, time, _ in network.calls]


# The oracle itself


@pytest.mark.parametrize("labels", [None, LABELS, np.full(N, UNCONDITIONAL)], ids=["none", "classes", "no class"])
@pytest.mark.parametrize("t", [0, 1, 49.95, 500, 998.5, 999])
def test_the_network_is_the_predictor(t: float, labels: np.ndarray | None):
    x = np.random.default_rng(0).standard_normal((N, *SHAPE))
    context = () if labels is None else (torch.from_numpy(labels),)
    network = MixtureNet(mixture("bedrooms"))
    (result,) = network(torch.from_numpy(x), torch.full((N,), t), *context, return_dict=False)
    np.testing.assert_allclose(result.numpy(), mixture("bedrooms").eps(x, float(np.float32(t)), labels), atol=1e-11)


@pytest.mark.parametrize("label", [0, 1, UNCONDITIONAL])
@pytest.mark.parametrize("t", [3, 200, 900])
def test_the_predictor_is_the_gradient_of_the_log_density(t: int, label: int):
    """E[eps | x_t] = -sqrt(1 - a) grad log p_t(x_t) (Tweedie), by central differences."""
    m = Mixture.make(ALPHAS["bedrooms"], (1, 2, 2))
    a = m.alphas[t]

    def log_density(x: np.ndarray) -> float:
        total = 0.0
        for k in range(2):
            v = a * m.stds[k] ** 2 + 1 - a
            weight = m.weights[k] if label == UNCONDITIONAL else label == k
            total += weight * math.exp(-np.sum((x - math.sqrt(a) * m.centres[k]) ** 2) / (2 * v)) / v ** (x.size / 2)
        return math.log(total)

    x = math.sqrt(a) * m.centres.mean(0) + 0.3 * np.random.default_rng(1).standard_normal((1, 2, 2))
    steps = 1e-5 * np.eye(4).reshape(4, 1, 2, 2)
    gradient = np.array([log_density(x + h) - log_density(x - h) for h in steps]).reshape(1, 2, 2) / 2e-5
    np.testing.assert_allclose(m.eps(x[None], t, np.array([label]))[0], -math.sqrt(1 - a) * gradient, atol=1e-7)


@pytest.mark.parametrize("steps", [300, 600, 1000])
def test_the_original_fails_where_its_list_reaches_1000(steps: int):
    with pytest.raises(IndexError):
        original.compvis_ddim(mixture("bedrooms").eps, ALPHAS["bedrooms"], np.zeros((1, *SHAPE)), steps)


# Lists of times (reference/samplers.md, 2 to 5)


@pytest.mark.parametrize(
    ("steps", "stride", "first", "calls"),
    [
        (20, 50, 951, 20),
        (50, 20, 981, 50),
        (100, 10, 991, 100),
        (200, 5, 996, 200),
        (250, 4, 997, 250),
        (150, 6, 997, 167),
        (400, 2, 999, 500),
    ],
)
def test_times_of_compvis(steps: int, stride: int, first: int, calls: int):
    listed = sampling.times("ddim", scheduler("bedrooms"), steps, "uniform")
    assert listed == list(range(first, 0, -stride)) == original.compvis_times(steps)
    assert (len(listed), listed[-1]) == (calls, 1)


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 150])
def test_times_of_plms_visit_the_second_twice(steps: int):
    listed = sampling.times("plms", scheduler("bedrooms"), steps, "uniform")
    once = sampling.times("ddim", scheduler("bedrooms"), steps, "uniform")
    assert listed == [once[0], once[1], once[1], *once[2:]] == original.compvis_plms_times(steps)
    assert steps == 150 or len(listed) == steps + 1


@pytest.mark.parametrize("steps", [10, 12, 15, 20, 50])
def test_times_of_dpm_solver_are_fractional(steps: int):
    listed = sampling.times("dpm-solver", scheduler("bedrooms"), steps, "uniform")
    assert listed == pytest.approx(original.dpm_solver_times(steps), abs=1e-6)
    assert listed == pytest.approx([999 - 999 / steps * i for i in range(steps)], abs=1e-6)
    if steps == 20:
        assert [*listed[:3], listed[-1]] == pytest.approx([999, 949.05, 899.1, 49.95], abs=1e-6)


@pytest.mark.parametrize(("steps", "first", "calls"), [(100, 990, 100), (300, 999, 334), (400, 998, 500)])
def test_times_of_ermongroup(steps: int, first: int, calls: int):
    listed = sampling.times("ddim", scheduler("cifar10"), steps, "uniform")
    assert listed == original.ermongroup_times(steps, "uniform")
    assert (listed[0], listed[-1], len(listed)) == (first, 0, calls)


def test_times_of_ermongroup_quad():
    listed = sampling.times("ddim", scheduler("cifar10"), 100, "quad")
    assert listed == original.ermongroup_times(100, "quad")
    assert listed[:3] == [800, 783, 768]
    assert listed[-8:] == [3, 2, 2, 1, 0, 0, 0, 0]
    assert (len(listed), len(set(listed))) == (100, 96)
    for steps in range(1, 1001):
        assert sampling.times("ddim", scheduler("cifar10"), steps, "quad") == original.ermongroup_times(steps, "quad")


def test_every_number_of_steps_gives_the_original_list_or_is_refused_when_the_recipe_is_loaded():
    bedrooms, cifar10 = scheduler("bedrooms"), scheduler("cifar10")
    refused = set()
    for steps in range(1, 1001):
        assert sampling.times("ddim", cifar10, steps) == original.ermongroup_times(steps, "uniform")
        try:
            recipe.load("bedrooms", [f"sample.steps={steps}"])
        except BdmError:
            refused.add(steps)
        else:
            assert sampling.times("ddim", bedrooms, steps) == original.compvis_times(steps)
            if steps > 1:  # with one step CompVis asks for the only time twice, and we once
                assert sampling.times("plms", bedrooms, steps) == original.compvis_plms_times(steps)
    assert refused == {steps for steps in range(1, 1001) if max(original.compvis_times(steps)) > 999}
    assert {300, 600, 1000} <= refused


# Final samples: measured agreement, and the calls of the network


@pytest.mark.parametrize("steps", [20, 50, 100, 200, 250, 150, 400])
@pytest.mark.parametrize("name", ["bedrooms", "churches"])
def test_ddim_is_compvis(name: str, steps: int):
    """Measured: 4e-7 (20) to 2.1e-6 (400, 500 calls)."""
    given = settings(steps=steps)
    result, network = ours(name, given)
    assert difference(result, theirs(name, given)) < 1e-5
    assert visited(network) == original.compvis_times(steps)
    assert {batch for batch, _, _ in network.calls} == {N}


@pytest.mark.parametrize(("steps", "eta"), [(100, 0.5), (20, 1.0), (100, 1.0), (200, 1.0), (150, 1.0), (400, 1.0)])
@pytest.mark.parametrize("name", ["bedrooms", "churches"])
def test_ddim_is_compvis_with_noise(name: str, steps: int, eta: float):
    """Measured: 4e-7 (20), 2.3e-6 (100), 3.1e-6 (200), 6.4e-6 (400): few digits of 1 - a / a' are left in float32."""
    given = settings(steps=steps, eta=eta)
    result, network = ours(name, given)
    assert difference(result, theirs(name, given)) < 3e-5
    assert visited(network) == original.compvis_times(steps)


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 150])
@pytest.mark.parametrize("name", ["bedrooms", "churches"])
def test_plms_is_compvis(name: str, steps: int):
    """Measured: 6e-7 to 3.7e-6 (10)."""
    given = settings(sampler="plms", steps=steps)
    result, network = ours(name, given)
    assert difference(result, theirs(name, given)) < 1e-5
    assert visited(network) == original.compvis_plms_times(steps)


@pytest.mark.parametrize("steps", [2, 10, 12, 14, 15, 20, 50])
@pytest.mark.parametrize("name", ["bedrooms", "churches"])
def test_dpm_solver_is_the_wrapper_of_compvis(name: str, steps: int):
    """Measured: 3e-7 (10) to 1.3e-6 (2, 50). Interpolating alpha in place of its logarithm costs 5e-6 with 2 steps."""
    given = settings(sampler="dpm-solver", steps=steps)
    result, network = ours(name, given)
    assert difference(result, theirs(name, given)) < 3e-6
    assert visited(network) == pytest.approx(original.dpm_solver_times(steps), abs=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("spacing", "steps", "tolerance"),
    [
        ("uniform", 20, 5e-6),
        ("uniform", 100, 5e-6),
        ("uniform", 300, 1e-5),
        ("quad", 20, 1e-5),
        ("quad", 100, 2e-5),
        ("quad", 300, 4e-5),
    ],
)
def test_ddim_is_ermongroup(spacing: str, steps: int, tolerance: float, eta: float):
    """Measured, eta 0 and 1: uniform 8e-7 and 7e-7 (100), 1.3e-6 and 2.7e-6 (300, 334 calls); quad 1.0e-6 and 4.7e-6
    (100), 1.7e-6 and 1.1e-5 (300), for the same reason."""
    given = settings(steps=steps, spacing=spacing, eta=eta)
    result, network = ours("cifar10", given)
    assert difference(result, theirs("cifar10", given)) < tolerance
    assert visited(network) == original.ermongroup_times(steps, spacing)


# Classifier-free guidance


@pytest.mark.parametrize("scale", [1.5, 3.0])
@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm-solver"])
def test_guidance_is_the_original(sampler: str, scale: float):
    """Measured: 5e-7 to 9e-7."""
    given = settings(sampler=sampler, steps=20, guidance=scale)
    result, network = ours("bedrooms", given, labels=LABELS)
    assert difference(result, theirs("bedrooms", given, LABELS)) < 5e-6
    assert len(network.calls) == 20 + (sampler == "plms")
    told = [UNCONDITIONAL] * N + LABELS.tolist()  # the unconditional half of the batch comes first
    assert all((batch, labels) == (2 * N, told) for batch, _, labels in network.calls)


def test_guidance_1_runs_the_network_once_on_the_batch_and_its_classes():
    given = settings(steps=20, guidance=1.0)
    result, network = ours("bedrooms", given, labels=LABELS)
    assert [(batch, labels) for batch, _, labels in network.calls] == [(N, LABELS.tolist())] * 20
    assert difference(result, theirs("bedrooms", given, LABELS)) < 1e-5
    plain, network = ours("bedrooms", given)
    assert [(batch, labels) for batch, _, labels in network.calls] == [(N, None)] * 20
    assert difference(plain, result) > 0.02


def test_guidance_0_is_unconditional():
    given = settings(steps=20, guidance=0.0)
    assert difference(ours("bedrooms", given, labels=LABELS)[0], theirs("bedrooms", settings(steps=20))) < 1e-5


# What is refused when the recipe is loaded


@pytest.mark.parametrize(
    ("name", "overrides", "key"),
    [
        ("bedrooms", ["sample.steps=300"], "sample.steps"),
        ("bedrooms", ["sample.steps=600"], "sample.steps"),
        ("bedrooms", ["sample.steps=1000"], "sample.steps"),
        ("churches", ["sample.steps=300"], "sample.steps"),
        ("bedrooms", ["sample.sampler=plms", "sample.eta=0", "sample.steps=300"], "sample.steps"),
        ("cifar10", ["sample.steps=1001"], "sample.steps"),
        ("bedrooms", ["sample.sampler=plms", "sample.eta=1.0"], "sample.eta"),
        ("bedrooms", ["sample.sampler=dpm-solver", "sample.eta=0.5"], "sample.eta"),
        ("cifar10", ["sample.sampler=plms", "sample.spacing=quad"], "sample.spacing"),
        ("cifar10", ["sample.sampler=dpm-solver", "sample.spacing=quad"], "sample.spacing"),
        ("bedrooms", ["sample.guidance=3.0"], "sample.guidance"),
        ("cifar10", ["sample.guidance=0.0"], "sample.guidance"),
        ("imagenet", ["sample.classes=[1000]"], "sample.classes"),
        ("imagenet", ["sample.classes=[3, 1001]"], "sample.classes"),
        ("imagenet", ["sample.classes=[-1]"], "sample.classes"),
        ("bedrooms", ["sample.classes=[0]"], "sample.classes"),
    ],
)
def test_a_recipe_that_no_original_could_run_is_refused(name: str, overrides: list[str], key: str):
    with pytest.raises(BdmError, match=rf"(?m)^  {key}"):
        recipe.load(name, overrides)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("cifar10", ["sample.steps=300"]),
        ("cifar10", ["sample.steps=1000"]),
        ("cifar10", ["sample.spacing=quad"]),
        ("bedrooms", ["sample.steps=150"]),
        ("churches", ["sample.steps=400"]),
        ("bedrooms", ["sample.sampler=plms", "sample.eta=0", "sample.steps=20"]),
        ("bedrooms", ["sample.sampler=dpm-solver", "sample.eta=0", "sample.steps=27"]),
        ("imagenet", ["sample.sampler=dpm-solver", "sample.guidance=1.5", "sample.classes=[0, 999]"]),
    ],
)
def test_a_recipe_that_the_original_runs_is_allowed(name: str, overrides: list[str]):
    recipe.load(name, overrides)


# What a wrong argument costs: the comparisons above would fail


@pytest.mark.parametrize(
    ("name", "given", "wrong", "cost"),
    [
        ("bedrooms", {"steps": 100}, {"set_alpha_to_one": True}, 0.01),
        ("bedrooms", {"steps": 100, "eta": 1.0}, {"set_alpha_to_one": True}, 0.03),
        ("bedrooms", {"steps": 100}, {"steps_offset": 0}, 5e-3),
        ("bedrooms", {"steps": 100, "eta": 1.0}, {"steps_offset": 0}, 0.03),
        ("bedrooms", {"steps": 100}, {"clip_sample": True}, 0.05),
        ("bedrooms", {"steps": 100}, {"beta_schedule": "linear"}, 0.05),
        ("bedrooms", {"steps": 100}, {"beta_end": 0.0155}, 5e-3),
        ("churches", {"steps": 400}, {"steps_offset": 0}, 7e-4),
        ("bedrooms", {"steps": 20, "sampler": "plms"}, {"set_alpha_to_one": True}, 0.03),
        ("bedrooms", {"steps": 20, "sampler": "plms"}, {"steps_offset": 0}, 0.03),
        ("bedrooms", {"steps": 20, "sampler": "dpm-solver"}, {"beta_schedule": "linear"}, 0.05),
        ("cifar10", {"steps": 100}, {"set_alpha_to_one": False}, 7e-4),
        ("cifar10", {"steps": 100}, {"steps_offset": 1}, 4e-4),
        ("cifar10", {"steps": 100}, {"clip_sample": True}, 0.05),
        ("cifar10", {"steps": 100}, {"beta_schedule": "scaled_linear"}, 0.05),
        ("cifar10", {"steps": 100, "spacing": "quad"}, {"set_alpha_to_one": False}, 7e-4),
    ],
)
def test_a_wrong_noise_schedule_is_noticed(name: str, given: dict, wrong: dict, cost: float):
    spec = scheduler(name).model_copy(update=wrong)
    assert spec != scheduler(name)
    assert difference(ours(name, settings(**given), spec)[0], theirs(name, settings(**given))) > cost


COMPVIS = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
DDIM = COMPVIS | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
PLMS = COMPVIS | {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
DPM = COMPVIS | {
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "timestep_spacing": "linspace",
    "final_sigmas_type": "sigma_min",
}


@pytest.mark.parametrize(
    ("kind", "right", "given", "wrong", "cost"),
    [
        (DDIMScheduler, DDIM, {"steps": 100}, {"timestep_spacing": "trailing"}, 4e-3),
        (DDIMScheduler, DDIM, {"steps": 400}, {}, 5e-3),  # 400 calls from 799, not the original's 500 from 999
        (PNDMScheduler, PLMS, {"steps": 20, "sampler": "plms"}, {"timestep_spacing": "trailing"}, 5e-3),
        (DPMSolverMultistepScheduler, DPM, {"steps": 20, "sampler": "dpm-solver"}, {"final_sigmas_type": "zero"}, 0.1),
        (
            DPMSolverMultistepScheduler,
            DPM,
            {"steps": 20, "sampler": "dpm-solver"},
            {"timestep_spacing": "leading"},
            2e-3,
        ),
        (DPMSolverMultistepScheduler, DPM, {"steps": 20, "sampler": "dpm-solver"}, {"solver_type": "heun"}, 0.05),
        (
            DPMSolverMultistepScheduler,
            DPM,
            {"steps": 20, "sampler": "dpm-solver"},
            {"solver_order": 1},
            0.01,
        ),
        (DPMSolverMultistepScheduler, DPM, {"steps": 12, "sampler": "dpm-solver"}, {"lower_order_final": False}, 0.1),
        (DPMSolverMultistepScheduler, DPM, {"steps": 12, "sampler": "dpm-solver"}, {}, 3e-4),  # its integer times
    ],
)
def test_a_wrong_argument_of_diffusers_is_noticed(kind: type, right: dict, given: dict, wrong: dict, cost: float):
    """diffusers' own loop, with one argument that samplers.md warns of (or none: what diffusers alone cannot do)."""
    rule, network = kind(**right | wrong), MixtureNet(mixture("bedrooms"))
    rule.set_timesteps(given["steps"])
    x = torch.from_numpy(drawn(streams()))
    for t in rule.timesteps:
        x = rule.step(network(x, t, return_dict=False)[0], t, x, return_dict=False)[0]
    assert difference(x.numpy(), theirs("bedrooms", settings(**given))) > cost


def test_more_calls_of_plms_are_noticed():
    """skip_prk_steps=False ends close by, since it is as exact, but starts with Runge-Kutta steps."""
    rule = PNDMScheduler(**PLMS | {"skip_prk_steps": False})
    rule.set_timesteps(20)
    assert len(rule.timesteps) > 21 == len(original.compvis_plms_times(20))


def test_other_samplers_spacings_and_scales_are_noticed():
    plain = settings(steps=20)
    assert difference(theirs("bedrooms", plain), theirs("bedrooms", settings(steps=20, sampler="plms"))) > 0.05
    assert difference(theirs("bedrooms", plain), theirs("bedrooms", settings(steps=20, sampler="dpm-solver"))) > 0.05
    uniform, quad = (theirs("cifar10", settings(steps=100, spacing=kind)) for kind in ("uniform", "quad"))
    assert difference(uniform, quad) > 0.01
    three, half = (theirs("bedrooms", settings(steps=20, guidance=s), LABELS) for s in (3.0, 1.5))
    assert difference(three, half) > 0.03
    swapped = original.guided(mixture("bedrooms").eps, LABELS, UNCONDITIONAL, 1 - 3.0)  # the conditional half first
    assert difference(three, original.compvis_ddim(swapped, ALPHAS["bedrooms"], drawn(streams()), 20)) > 0.05


def test_the_last_step_is_of_first_order_below_15_steps_not_below_10():
    """LuChengTHU's present code lowers it below 10 only."""
    x, eps, alphas = drawn(streams()), mixture("bedrooms").eps, ALPHAS["bedrooms"]
    for steps, differs in ((12, True), (14, True), (15, False), (20, False)):
        cost = difference(original.dpm_solver(eps, alphas, x, steps), original.dpm_solver(eps, alphas, x, steps, 10))
        assert (cost > 0.1) == differs


def test_the_noise_of_eta_is_each_images_own_stream_in_order():
    """Noise that is drawn once more, or not at the last step, is noticed."""
    given = settings(steps=20, eta=1.0)
    right, random = ours("bedrooms", given)[0], streams()
    x = drawn(random)
    drawn(random)
    shifted = original.compvis_ddim(
        mixture("bedrooms").eps, ALPHAS["bedrooms"], x, 20, 1.0, functools.partial(drawn, random)
    )
    assert difference(right, shifted) > 0.1
    random = streams()
    x, left = drawn(random), iter(range(20))
    quiet = original.compvis_ddim(
        mixture("bedrooms").eps,
        ALPHAS["bedrooms"],
        x,
        20,
        1.0,
        lambda: drawn(random) if next(left) < 19 else np.zeros((N, *SHAPE)),
    )
    assert difference(right, quiet) > 0.01
