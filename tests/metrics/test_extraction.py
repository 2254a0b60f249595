"""The pass over the images: the same numbers however it is cut up, broken off, shared out or repeated."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from accelerate import PartialState
from builders import Process, Watched, image_set, in_processes, noise
from builders import summary as summary_by_numpy

from bdm_cli.diffusion.data import labelled_images
from bdm_cli.errors import BdmError
from bdm_cli.images import sets
from bdm_cli.metrics import extraction, features
from bdm_cli.metrics.comparison import Comparison, Reference
from bdm_cli.metrics.extraction import extract, fingerprint, summary_of
from bdm_cli.metrics.features import FeatureNet, Shape
from bdm_cli.metrics.protocols import ADM
from bdm_cli.metrics.summary import Summary, chosen

IMAGES = noise(300, 8, 8, 1)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of 64 images."""
    monkeypatch.setattr(extraction, "SHARD", 64)


def tiny(seed: int = 0, body: str = "plain", channels: int = 1) -> FeatureNet:
    torch.manual_seed(seed)
    width = {"plain": 16, "residual": 32}[body]
    return FeatureNet(Shape("digits", channels, 8, 5, width, body)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def digits() -> tuple[FeatureNet, np.ndarray]:
    images, _ = labelled_images("digits", "")
    return features.digits(), np.random.default_rng(0).permutation(images)


def in_one_go(network: FeatureNet, images: np.ndarray) -> Summary:
    """By one call of the network and numpy."""
    found = network.extract(torch.from_numpy(images).permute(0, 3, 1, 2))
    return summary_by_numpy(**{name: part.numpy() for name, part in found.items()})


def equal(a: Summary, b: Summary) -> bool:
    """To the last bit."""
    assert a.rows.keys() == b.rows.keys()
    assert a.statistics.keys() == b.statistics.keys()
    pairs = [(a.rows[name], b.rows[name]) for name in a.rows]
    for name, own in a.statistics.items():
        other = b.statistics[name]
        assert own.n == other.n
        pairs += [(own.mu, other.mu), (own.sigma, other.sigma)]
    return a.n == b.n and all(np.array_equal(x, y) for x, y in pairs)


def scores(samples: Summary, reference: Summary) -> dict[str, float]:
    comparison = Comparison(samples, Reference(reference, "exact", torch.device("cpu")))
    return {name: ADM.functions[name](comparison) for name in ("fid", "sfid", "is", "precision", "recall")}


def shards(home: Path) -> list[Path]:
    return sorted((home / "runs" / "cache" / "features").glob("*/shard-*.safetensors"))


# ---- what comes out


@pytest.mark.parametrize("body", ["plain", "residual"])
def test_statistics_are_numpys_of_the_features_in_float64(body):
    network = tiny(body=body)
    found, wanted = summary_of(network, image_set(IMAGES), Process()), in_one_go(network, IMAGES)
    assert found.n == 300
    assert set(found.rows) == {"pool", "spatial", "logits"}
    for name, rows in wanted.rows.items():
        assert found.rows[name].dtype == np.float32
        np.testing.assert_allclose(found.rows[name], rows, rtol=1e-4, atol=1e-6)
    for name in ("pool", "spatial"):
        own = found.rows[name].astype(np.float64)
        np.testing.assert_allclose(found.statistics[name].mu, own.mean(0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(found.statistics[name].sigma, np.cov(own.T), rtol=1e-9, atol=1e-13)
        assert found.statistics[name].mu.dtype == found.statistics[name].sigma.dtype == np.float64
        assert found.statistics[name].n == 300


def test_the_features_stay_on_disk():
    found = summary_of(tiny(), image_set(IMAGES), Process())
    assert all(isinstance(rows, np.memmap) for rows in found.rows.values())


def test_a_set_of_one_image_has_no_spread():
    found = summary_of(tiny(), image_set(IMAGES[:1]), Process())
    assert found.rows["pool"].shape == (1, 16)
    np.testing.assert_allclose(found.statistics["pool"].sigma, np.zeros((16, 16)), atol=1e-12)


def test_the_digits_network_scores_one_half_of_the_digits_against_the_other(digits):
    network, images = digits
    sides = [summary_of(network, image_set(half), Process()) for half in (images[:400], images[400:800])]
    wanted = scores(*(in_one_go(network, half) for half in (images[:400], images[400:800])))
    assert scores(*sides) == pytest.approx(wanted, rel=1e-6)
    assert wanted["is"] > 8
    assert wanted["precision"] > 70


def test_grey_images_are_repeated_for_a_network_of_colours():
    network = tiny(channels=3)
    grey = summary_of(network, image_set(IMAGES), Process())
    colour = summary_of(network, image_set(IMAGES.repeat(3, axis=3)), Process())
    np.testing.assert_allclose(grey.rows["pool"], colour.rows["pool"], rtol=1e-5, atol=1e-6)


def test_the_processes_of_accelerate_serve():
    found = summary_of(tiny(), image_set(IMAGES), PartialState())
    assert np.array_equal(found.rows["pool"], summary_of(tiny(), image_set(IMAGES), Process()).rows["pool"])


def test_images_of_an_npz_file_serve(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", IMAGES)
    found = summary_of(tiny(), sets.load(tmp_path / "a.npz"), Process(), batch=7)
    np.testing.assert_allclose(found.rows["pool"], in_one_go(tiny(), IMAGES).rows["pool"], rtol=1e-4, atol=1e-6)


def test_extract_gives_the_features_of_the_images_asked_for():
    network = tiny()
    whole = in_one_go(network, IMAGES).rows
    parts = list(extract(network, IMAGES, range(10, 45), 16, torch.device("cpu")))
    assert [len(part["pool"]) for part in parts] == [16, 16, 3]
    for name in whole:
        found = torch.cat([part[name] for part in parts]).numpy()
        np.testing.assert_allclose(found, whole[name][10:45], rtol=1e-4, atol=1e-6)
    assert list(extract(network, IMAGES, range(0), 16, torch.device("cpu"))) == []


def test_extract_leaves_tf32_as_it_was(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    seen = []
    for _ in extract(tiny(), IMAGES, range(4), 2, torch.device("cpu")):
        seen.append(torch.backends.cudnn.allow_tf32)
    assert seen == [False, False]
    assert torch.backends.cudnn.allow_tf32


# ---- batches and shards


@pytest.fixture(scope="module")
def usual(digits, tmp_path_factory):
    """Scores of some digits against others, by the usual batches and shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDM_HOME", str(tmp_path_factory.mktemp("usual")))
        return scores(*_halves(digits, extraction.BATCH))


def _halves(digits: tuple[FeatureNet, np.ndarray], batch: int) -> list[Summary]:
    network, images = digits
    return [summary_of(network, image_set(half), Process(), batch=batch) for half in (images[:300], images[300:700])]


@pytest.mark.parametrize(("batch", "shard"), [(1, 64), (7, 64), (64, 64), (7, 128), (64, 2560), (5, 192), (1000, 192)])
def test_scores_do_not_depend_on_batches_or_shards(digits, usual, batch, shard, monkeypatch):
    monkeypatch.setattr(extraction, "SHARD", shard)
    found = scores(*_halves(digits, batch))
    for name in ("fid", "sfid", "is"):
        assert found[name] == pytest.approx(usual[name], rel=1e-6)
    assert (found["precision"], found["recall"]) == (usual["precision"], usual["recall"])
    assert 0 < usual["recall"] < 100


def test_a_shard_is_64_times_less_than_a_large_set(home, monkeypatch):
    monkeypatch.setattr(extraction, "BATCH", 1)
    monkeypatch.setattr(extraction, "SHARD", 2)
    monkeypatch.setattr(extraction, "SHARDS", 10)
    with pytest.raises(KeyboardInterrupt):
        summary_of(tiny(), image_set(IMAGES, fails_at=299), Process(), batch=10)
    assert _sizes(home) == [30] * 9


def _sizes(home: Path) -> list[int]:
    found = []
    for path in shards(home):
        with safetensors.safe_open(path, framework="np") as file:
            found.append(len(file.get_tensor("pool")))
    return found


def test_no_file_on_the_way_holds_the_features_of_more_than_a_shard(home):
    with pytest.raises(KeyboardInterrupt):
        summary_of(tiny(), image_set(IMAGES, fails_at=299), Process())
    assert _sizes(home) == [64] * 4
    assert not list((home / "runs").rglob("*.npy"))
    summary_of(tiny(), image_set(IMAGES), Process())
    assert not shards(home)
    assert {path.name for path in (home / "runs" / "cache" / "features").glob("*/*")} == {
        "lock",
        "logits.npy",
        "pool.npy",
        "spatial.npy",
        "summary.safetensors",
    }


def test_each_batch_is_read_once_and_no_more_than_one_ahead():
    class Ahead(Watched):
        most = 0

        def __getitem__(self, which: slice) -> np.ndarray:
            Ahead.most = max(Ahead.most, which.stop - network.seen)
            return super().__getitem__(which)

    class Counting(FeatureNet):
        seen = 0

        def extract(self, images):
            found = super().extract(images)
            self.seen += len(images)
            return found

    network = Counting(Shape("digits", 1, 8, 5, 16)).eval()
    pixels = Ahead(IMAGES)
    summary_of(network, sets.ImageSet("somewhere", pixels), Process(), batch=16)
    assert pixels.read == list(range(300))
    assert Ahead.most <= 48  # the batch just handed over, one under way, one read ahead


# ---- breaking off and going on


@pytest.mark.parametrize("at", [1, 64, 100, 200, 299])
def test_what_was_broken_off_goes_on_where_it_was(at, home, monkeypatch, tmp_path):
    broken = image_set(IMAGES, fails_at=at)
    with pytest.raises(KeyboardInterrupt):
        summary_of(tiny(), broken, Process(), batch=16)
    complete = [64 * k for k in range(6) if 64 * k <= at][-1]
    assert len(shards(home)) == complete // 64

    rest = image_set(IMAGES)
    found = summary_of(tiny(), rest, Process(), batch=16)
    assert rest.pixels.read == list(range(complete, 300))

    monkeypatch.setenv("BDM_HOME", str(tmp_path / "elsewhere"))
    assert equal(found, summary_of(tiny(), image_set(IMAGES), Process(), batch=16))


def test_shards_that_are_missing_in_the_middle_are_made_again(home, monkeypatch, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        summary_of(tiny(), image_set(IMAGES, fails_at=299), Process())
    shards(home)[1].unlink()
    rest = image_set(IMAGES)
    found = summary_of(tiny(), rest, Process())
    assert rest.pixels.read == [*range(64, 128), *range(256, 300)]
    monkeypatch.setenv("BDM_HOME", str(tmp_path / "elsewhere"))
    assert equal(found, summary_of(tiny(), image_set(IMAGES), Process()))


def test_a_kill_while_the_shards_are_put_together_costs_no_feature(home):
    wanted = summary_of(tiny(), image_set(IMAGES[:256]), Process())
    with pytest.raises(KeyboardInterrupt):
        summary_of(tiny(), image_set(IMAGES, fails_at=299), Process())
    folder = shards(home)[0].parent
    (folder / "pool.npy").write_bytes(b"half of a fi")  # as a kill leaves it
    rest = image_set(IMAGES)
    found = summary_of(tiny(), rest, Process())
    assert rest.pixels.read == list(range(256, 300))
    assert found.rows["pool"].shape == (300, 16)
    assert np.array_equal(found.rows["pool"][:256], wanted.rows["pool"])


def test_images_that_cannot_be_read_stop_it_and_are_told():
    with pytest.raises(BdmError, match="image 70 is damaged"):
        summary_of(tiny(), image_set(IMAGES, fails_at=70, error=BdmError("image 70 is damaged")), Process())


# ---- several processes


def shared_out(n: int, network: FeatureNet, images: np.ndarray, **settings: object) -> tuple[list[Summary], list[list]]:
    """What each of n processes gets, and what it reads."""
    given = [image_set(images) for _ in range(n)]
    found = in_processes(n, lambda each: summary_of(network, given[each.process_index], each, **settings))
    return found, [each.pixels.read for each in given]


@pytest.fixture
def launched(monkeypatch):
    """As threads share the environment, none of them is the first process, which alone would take the turn."""
    monkeypatch.setenv("RANK", "1")


@pytest.mark.parametrize("n", [2, 3, 7])
def test_several_processes_make_what_one_makes(n, launched, monkeypatch, tmp_path):
    alone = summary_of(tiny(), image_set(IMAGES), Process())
    monkeypatch.setenv("BDM_HOME", str(tmp_path / "elsewhere"))
    found, read = shared_out(n, tiny(), IMAGES)
    assert all(equal(alone, each) for each in found)
    assert sorted(chain(*read)) == list(range(300))
    assert sum(map(bool, read)) == min(n, 5)
    again, read = shared_out(n, tiny(), IMAGES)
    assert all(equal(alone, each) for each in again)
    assert not any(read)


def test_several_processes_go_on_with_what_one_began(launched, home):
    alone, _ = shared_out(1, tiny(1), IMAGES)
    with pytest.raises(KeyboardInterrupt):
        summary_of(tiny(1), image_set(IMAGES[::-1], fails_at=140), Process())
    found, read = shared_out(2, tiny(1), IMAGES[::-1])
    assert sorted(chain(*read)) == list(range(128, 300))
    np.testing.assert_allclose(found[1].rows["pool"], alone[0].rows["pool"][::-1], rtol=1e-5, atol=1e-6)


# ---- a choice of images


@pytest.fixture
def many(monkeypatch):
    monkeypatch.setattr(extraction, "ALL_KEPT", 100)


def test_of_a_large_set_only_the_chosen_features_are_kept_and_the_statistics_are_of_all(many, monkeypatch, tmp_path):
    kept = summary_of(tiny(), image_set(IMAGES), Process(), keep=40)
    everything = summary_of(tiny(), image_set(IMAGES), Process())
    assert {len(rows) for rows in kept.rows.values()} == {40}
    assert {len(rows) for rows in everything.rows.values()} == {300}
    which = chosen(300, 40)
    assert len(set(which.tolist())) == 40
    assert np.array_equal(which, np.sort(which))
    for name, rows in everything.rows.items():
        assert np.array_equal(kept.rows[name], rows[which])
    for name, own in everything.statistics.items():
        assert np.array_equal(kept.statistics[name].mu, own.mu)
        assert np.array_equal(kept.statistics[name].sigma, own.sigma)
        assert kept.statistics[name].n == 300
    assert kept.n == 300
    assert equal(kept.choice(40), kept)
    assert equal(everything.choice(40), kept)


def test_a_choice_is_kept_by_several_processes_too(many, launched):
    (one, other), _ = shared_out(2, tiny(), IMAGES, keep=40)
    assert equal(one, other)
    assert len(one.rows["logits"]) == 40


def test_asking_for_more_than_there_are_keeps_all(many):
    assert len(summary_of(tiny(), image_set(IMAGES), Process(), keep=1000).rows["pool"]) == 300


def test_of_a_small_set_all_features_are_kept():
    assert len(summary_of(tiny(), image_set(IMAGES), Process(), keep=40).rows["pool"]) == 300


def test_shards_of_a_large_set_hold_only_what_is_chosen(many, home):
    with pytest.raises(KeyboardInterrupt):
        summary_of(tiny(), image_set(IMAGES, fails_at=299), Process(), keep=40)
    assert _sizes(home) == [int(((chosen(300, 40) // 64) == shard).sum()) for shard in range(4)]


# ---- what was seen before


def test_images_that_were_seen_before_are_not_read_again_wherever_they_lie():
    first = summary_of(tiny(), image_set(IMAGES), Process())
    again = image_set(IMAGES.copy(), source="elsewhere")
    assert equal(first, summary_of(tiny(), again, Process()))
    assert again.pixels.read == []


def test_one_other_pixel_is_another_set():
    summary_of(tiny(), image_set(IMAGES), Process())
    other = IMAGES.copy()
    other[17, 3, 3, 0] ^= 1
    given = image_set(other)
    summary_of(tiny(), given, Process())
    assert given.pixels.read == list(range(300))


def test_another_order_is_another_set():
    summary_of(tiny(), image_set(IMAGES), Process())
    given = image_set(IMAGES[::-1])
    summary_of(tiny(), given, Process())
    assert len(given.pixels.read) == 300


@pytest.mark.parametrize("other", ["weights", "network"])
def test_other_weights_or_another_network_compute_anew(other):
    summary_of(tiny(), image_set(IMAGES), Process())
    network = tiny(seed=1)
    if other == "network":
        network = FeatureNet(Shape("other", 1, 8, 5, 16)).eval()
        network.load_state_dict(tiny().state_dict())
    given = image_set(IMAGES)
    found = summary_of(network, given, Process())
    assert len(given.pixels.read) == 300
    np.testing.assert_allclose(found.rows["pool"], in_one_go(network, IMAGES).rows["pool"], rtol=1e-4, atol=1e-6)


def test_a_fingerprint_tells_weights_apart_and_not_where_they_come_from():
    assert fingerprint(tiny()) == fingerprint(tiny())
    assert fingerprint(tiny()) != fingerprint(tiny(seed=1))
    moved = tiny()
    moved.head.weight.data[0, 0] += 1e-6
    assert fingerprint(moved) != fingerprint(tiny())


# ---- what is damaged


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_no_numbers(value, home):
    network = tiny()
    network.head.weight[2] = value
    with pytest.raises(BdmError, match=r"somewhere: the logits features of images 0 to 63 are not finite numbers"):
        summary_of(network, image_set(IMAGES), Process())
    assert not shards(home)


def test_a_cache_that_cannot_be_written_is_told(home):
    (home / "runs").write_text("in the way")
    with pytest.raises(BdmError, match="cannot write"):
        summary_of(tiny(), image_set(IMAGES), Process())


# ---- summaries


def test_asking_for_more_reference_images_than_there_are():
    given = summary_of(tiny(), image_set(IMAGES[:20]), Process())
    assert given.choice(0) is given
    assert given.choice(20) is given
    assert len(given.choice(19).rows["spatial"]) == 19
    assert given.choice(19).statistics["pool"].n == 20
    with pytest.raises(ValueError, match="there are rows of 20 images, not 50"):
        given.choice(50)


def test_stored_statistics_take_the_place_of_the_images_own_for_fid_and_sfid_alone():
    whole = summary_of(tiny(), image_set(IMAGES), Process())
    few = summary_of(tiny(), image_set(IMAGES[:40]), Process())
    samples = summary_of(tiny(), image_set(noise(50, 8, 8, 1, seed=1)), Process())
    pool, spatial = whole.statistics["pool"], whole.statistics["spatial"]
    stored = {"mu": pool.mu.astype(np.float32), "sigma": pool.sigma, "mu_s": spatial.mu, "sigma_s": spatial.sigma}
    found, own, all_of_it = (scores(samples, side) for side in (few.with_stored(stored), few, whole))
    assert found["fid"] == pytest.approx(all_of_it["fid"], rel=1e-5)
    assert found["sfid"] == all_of_it["sfid"]
    assert (found["precision"], found["recall"]) == (own["precision"], own["recall"])
    assert own["recall"] != all_of_it["recall"]
    assert few.with_stored(stored).statistics["pool"].n is None
    assert few.with_stored(stored).statistics["pool"].mu.dtype == np.float64
    assert few.with_stored({}) is few
    with pytest.raises(ValueError, match=r"stored means \(3,\), of pool features \(16,\)"):
        few.with_stored(stored | {"mu": np.zeros(3), "sigma": np.zeros((3, 3))})


# ---- a damaged cache


def kept_files(home: Path) -> Path:
    (folder,) = (home / "runs" / "cache" / "features").iterdir()
    return folder


@pytest.mark.parametrize("name", ["pool.npy", "summary.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "removed"])
def test_a_damaged_cache_is_made_again(home, name, damage):
    whole = summary_of(tiny(), image_set(IMAGES), Process())
    path = kept_files(home) / name
    if damage == "cut":
        content = path.read_bytes()
        del whole  # which maps the file
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()
    again = image_set(IMAGES)
    found = summary_of(tiny(), again, Process())
    assert len(again.pixels.read) == len(IMAGES)
    assert np.allclose(found.statistics["pool"].sigma, np.cov(found.rows["pool"].astype(np.float64).T))


def test_a_damaged_shard_is_made_again(home):
    with pytest.raises(KeyboardInterrupt):
        summary_of(tiny(), image_set(IMAGES, fails_at=200), Process())
    shards = sorted(kept_files(home).glob("shard-*"))
    assert len(shards) == 3
    shards[1].write_bytes(shards[1].read_bytes()[:-10])
    again = image_set(IMAGES)
    summary_of(tiny(), again, Process())
    assert sorted(again.pixels.read) == [*range(64, 128), *range(192, 300)]


def test_shards_that_a_kill_left_beside_the_whole_are_removed(home):
    summary_of(tiny(), image_set(IMAGES), Process())
    left = kept_files(home) / "shard-00000000-00000064.safetensors"
    left.write_bytes(b"")
    summary_of(tiny(), image_set(IMAGES), Process())
    assert not left.exists()
