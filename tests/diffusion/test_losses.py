"""BiDM's space patched distillation against NumPy (methods.md 4.3); the other losses are tested with BinaryDM."""

import numpy as np
import pytest
import torch

from bdm_cli.diffusion.losses import patch_relations


def relation(patch: np.ndarray) -> np.ndarray:
    """P P^T of every sample and channel, divided by one norm over all of them."""
    found = np.zeros((*patch.shape[:3], patch.shape[2]))
    for n, c in np.ndindex(patch.shape[:2]):
        found[n, c] = patch[n, c] @ patch[n, c].T
    return found / np.sqrt((found**2).sum())


def spd(fp: list[np.ndarray], bi: list[np.ndarray], p: int) -> float:
    """Patch by patch, with the corners at multiples of floor(W / p)."""
    losses = []
    for f, b in zip(fp, bi, strict=True):
        h, w = f.shape[2] // p, f.shape[3] // p
        found = []
        for i in range(p):
            for j in range(p):
                cut = np.s_[:, :, i * h : (i + 1) * h, j * w : (j + 1) * w]
                found.append(np.sqrt(((relation(f[cut]) - relation(b[cut])) ** 2).sum()) if h and w else 0.0)
        losses.append(sum(found) / p**2)
    return sum(losses) / len(losses)


def features(*shapes: tuple[int, ...], seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape) for shape in shapes]


SHAPES = [(2, 3, 8, 8), (2, 5, 4, 4), (3, 2, 9, 13), (1, 1, 16, 4)]


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_values_and_gradients(p: int):
    fp, bi = features(*SHAPES, seed=0), features(*SHAPES, seed=1)
    students = [torch.tensor(b, requires_grad=True) for b in bi]
    teachers = [torch.tensor(f, requires_grad=True) for f in fp]
    loss = patch_relations(teachers, students, p)
    assert loss.item() == pytest.approx(spd(fp, bi, p), rel=1e-12)
    loss.backward()
    assert all(teacher.grad is None for teacher in teachers)
    random, eps = np.random.default_rng(2), 1e-6
    for block, student in enumerate(students):
        for _ in range(6):  # central differences at random places
            place = tuple(random.integers(bi[block].shape))
            ends = []
            for sign in (1, -1):
                moved = [b.copy() for b in bi]
                moved[block][place] += sign * eps
                ends.append(spd(fp, moved, p))
            assert student.grad[place].item() == pytest.approx((ends[0] - ends[1]) / 2 / eps, abs=1e-7)


def test_what_is_left_over_at_the_borders_has_no_part():
    fp, bi = (torch.tensor(features((2, 3, 9, 10), seed=s)[0], requires_grad=True) for s in (0, 1))
    patch_relations([fp], [bi], 4).backward()
    assert bi.grad[:, :, :8, :8].ne(0).all()
    assert bi.grad[:, :, 8:].eq(0).all()
    assert bi.grad[:, :, :, 8:].eq(0).all()


def test_rows_are_related_within_patches_and_channels_alone():
    """Columns of a patch may change places, channels and samples not; each patch may have a scale of its own."""
    x = torch.tensor(features((2, 3, 4, 8), seed=0)[0])
    y = x[:, :, :, [1, 0, 3, 2, 5, 4, 7, 6]].clone()  # patches are 1 x 2
    assert patch_relations([x], [y], 4).item() < 1e-12
    y[:, :, :1, :2] *= 3
    assert patch_relations([x], [y], 4).item() < 1e-12
    assert patch_relations([x], [x.flip(1)], 4) > 0.1
    assert patch_relations([x], [x.flip(0)], 4) > 0.1


def test_a_map_narrower_than_p_counts_as_no_loss():
    fp, bi = features((2, 3, 8, 8), (2, 4, 2, 2), (2, 4, 8, 2), seed=0), features((2, 3, 8, 8), seed=1)
    wide = patch_relations([torch.tensor(fp[0])], [torch.tensor(bi[0])], 4)
    narrow = [torch.ones(2, 4, 2, 2, requires_grad=True), torch.ones(2, 4, 8, 2, requires_grad=True)]
    students = [torch.tensor(bi[0], requires_grad=True), *narrow]
    loss = patch_relations([torch.tensor(f) for f in fp], students, 4)
    assert loss.item() == pytest.approx(wide.item() / 3, rel=1e-6)
    loss.backward()
    assert all(feature.grad is None or feature.grad.eq(0).all() for feature in narrow)


def test_agreeing_and_silent_features_have_finite_gradients():
    """At equal features the norm has no derivative: 0 is taken. A patch of zeros has the relation 0."""
    x = torch.tensor(features((2, 3, 8, 8), seed=0)[0])
    same = x.clone().requires_grad_()
    loss = patch_relations([x], [same], 4)
    loss.backward()
    assert loss.item() == 0
    assert same.grad.eq(0).all()
    silent = torch.zeros_like(x, requires_grad=True)
    loss = patch_relations([x], [silent], 4)
    loss.backward()
    assert loss.item() == pytest.approx(1)
    assert silent.grad.isfinite().all()


def test_features_of_differing_count_are_refused():
    with pytest.raises(ValueError, match="zip"):
        patch_relations([torch.zeros(1, 1, 4, 4)] * 2, [torch.zeros(1, 1, 4, 4)], 4)
