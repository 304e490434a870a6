"""The Wiener filter against its formula in full matrices, in float64."""

import pytest
import torch
from drawn_batches import patterns, seeded
from torch import Tensor

from anomaly_models.common import wiener
from anomaly_models.common.sizes import Size
from anomaly_models.common.wiener import EvenSample, FixedWienerFilter, WienerFilter, reduced

SIZE, SMALL = 32, 16
SIGNAL, SIGMA = 0.8, 0.07


def fitted(images: Tensor, components: int = 32, folds: int = 3, rows: Tensor | None = None) -> WienerFilter:
    found = WienerFilter(Size.square(SIZE), Size.square(SMALL))
    found.fit(images, torch.arange(len(images)) if rows is None else rows, components, folds)
    return found


def images(number: int, seed: int = 1) -> Tensor:
    return patterns(number, seed, size=SIZE)


def noisy(picture: Tensor, seed: int = 5) -> Tensor:
    small = reduced(picture, Size.square(SMALL))
    return SIGNAL * small + SIGMA * torch.randn(small.shape, generator=seeded(seed))


def dense(pictures: Tensor, seen: Tensor, components: int | None = None) -> Tensor:
    """mu + s C_xr (s^2 C_rr + v)^-1 (x_t - s mu_r), C the population covariances of pictures and reduced pictures."""
    small = reduced(pictures, Size.square(SMALL)).flatten(1).double()
    whole = pictures.flatten(1).double()
    centred, whole_centred = small - small.mean(0), whole - whole.mean(0)
    if components is not None:
        left, _, _ = torch.linalg.svd(centred, full_matrices=False)
        keep = left[:, :components] @ left[:, :components].T
        centred, whole_centred = keep @ centred, keep @ whole_centred
    covariance = centred.T @ centred / len(small)
    cross = whole_centred.T @ centred / len(small)
    matrix = SIGNAL**2 * covariance + SIGMA**2 * torch.eye(len(covariance), dtype=torch.float64)
    shift = seen.flatten(1).double() - SIGNAL * small.mean(0)
    guess = whole.mean(0) + SIGNAL * (cross @ torch.linalg.solve(matrix, shift.T)).T
    return guess.float().view(-1, *pictures.shape[1:])


@pytest.mark.parametrize("components", [None, 1, 3])
def test_the_guess_is_that_of_full_matrices(components: int | None) -> None:
    pictures, seen = images(7), noisy(images(4, seed=2))
    found = fitted(pictures, components or 32)(seen, SIGNAL, SIGMA)
    torch.testing.assert_close(found.image, dense(pictures, seen, components), atol=2e-5, rtol=0)
    centred = seen - SIGNAL * reduced(pictures.mean(0, keepdim=True), Size.square(SMALL))
    torch.testing.assert_close(found.centred, centred, atol=1e-6, rtol=0)
    known = (found.centred - found.across).flatten(1)
    assert (found.across.flatten(1) @ known.T).abs().max() < 1e-3
    torch.testing.assert_close(
        reduced(found.image - pictures.mean(0), Size.square(SMALL)).flatten(1) @ found.across.flatten(1).T,
        torch.zeros(4, 4),
        atol=1e-3,
        rtol=0,
    )


def test_each_picture_may_have_its_own_noise() -> None:
    pictures, seen = images(7), noisy(images(2, seed=2))
    signal, sigma = torch.tensor([0.8, 0.4]).view(2, 1, 1, 1), torch.tensor([0.07, 0.5]).view(2, 1, 1, 1)
    learnt = fitted(pictures)
    together = learnt(seen, signal, sigma).image
    for index in range(2):
        alone = learnt(seen[index : index + 1], float(signal[index]), float(sigma[index])).image
        torch.testing.assert_close(together[index : index + 1], alone)


def test_without_noise_it_is_the_projection() -> None:
    pictures = images(5)
    learnt = fitted(pictures)
    own = learnt(0.8 * reduced(pictures, Size.square(SMALL)), 0.8, 1e-5).image
    torch.testing.assert_close(own, pictures, atol=1e-3, rtol=0)
    other = reduced(images(3, seed=2), Size.square(SMALL))
    once = reduced(learnt(other, 1.0, 1e-5).image, Size.square(SMALL))
    twice = reduced(learnt(once, 1.0, 1e-5).image, Size.square(SMALL))
    torch.testing.assert_close(twice, once, atol=1e-3, rtol=0)
    assert ((other - once).flatten(1) @ learnt.reduced_directions[:1][0].flatten(1).T).abs().max() < (1e-3)


def test_with_much_noise_it_is_the_mean() -> None:
    pictures = images(5)
    guess = fitted(pictures)(torch.zeros(1, 3, SMALL, SMALL), 1e-3, 1.0).image
    torch.testing.assert_close(guess, pictures.mean(0, keepdim=True), atol=1e-3, rtol=0)


def test_a_fold_s_filter_is_learnt_from_the_pictures_outside() -> None:
    pictures, rows = images(8), torch.tensor([3, 40, 5, 7, 11, 2, 30, 9])
    learnt, seen = fitted(pictures, folds=3, rows=rows), noisy(images(1, seed=2))
    assert learnt.filters_of(rows).tolist() == [1, 2, 3, 1, 2, 3, 1, 2]
    for fold in range(3):
        members = [index for index in range(8) if index % 3 != fold]
        expected = fitted(pictures[members])(seen, SIGNAL, SIGMA).image
        found = learnt(seen, SIGNAL, SIGMA, torch.tensor([1 + fold])).image
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_pictures_without_a_fold_have_the_filter_of_all() -> None:
    pictures = images(4)
    learnt = fitted(pictures, rows=torch.tensor([10, 11, 12, 13]))
    assert learnt.filters_of(torch.tensor([0, 11, 14])).tolist() == [0, 2, 0]
    unknown = WienerFilter(Size.square(SIZE), Size.square(SMALL))
    unknown.fit(pictures, None, components=2, folds=3)
    assert len(unknown.mean) == 1
    assert unknown.filters_of(torch.tensor([0, 11])).tolist() == [0, 0]
    learnt.forget_folds()
    assert learnt.filters_of(torch.tensor([0, 11])).tolist() == [0, 0]


def test_the_signs_of_eigenvectors_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = images(6)
    expected = fitted(pictures).state_dict()
    solve = torch.linalg.eigh

    def flipped(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = solve(matrix)
        return values, vectors * (-1.0) ** torch.arange(len(values))

    monkeypatch.setattr(torch.linalg, "eigh", flipped)
    found = fitted(pictures).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_directions_are_of_length_one_and_stand_upright() -> None:
    learnt = fitted(images(9), components=4)
    assert learnt.directions.shape == (4, 4, 3, SIZE, SIZE)
    for directions in learnt.reduced_directions.flatten(2):
        torch.testing.assert_close(directions @ directions.T, torch.eye(4), atol=1e-5, rtol=0)
    assert (learnt.variances.diff(dim=1) <= 0).all()


def test_pictures_need_not_be_reduced() -> None:
    pictures = images(6)
    learnt = WienerFilter(Size.square(SIZE), Size.square(SIZE))
    learnt.fit(pictures, torch.arange(6), components=5, folds=2)
    seen = 0.8 * pictures + 0.1 * torch.randn(pictures.shape, generator=seeded(3))
    centred = pictures.flatten(1).double() - pictures.flatten(1).double().mean(0)
    covariance = centred.T @ centred / 6
    matrix = 0.64 * covariance + 0.01 * torch.eye(len(covariance), dtype=torch.float64)
    shift = seen.flatten(1).double() - 0.8 * pictures.flatten(1).double().mean(0)
    expected = pictures.flatten(1).double().mean(0) + 0.8 * (covariance @ torch.linalg.solve(matrix, shift.T)).T
    found = learnt(seen, 0.8, 0.1).image.flatten(1)
    torch.testing.assert_close(found, expected.float(), atol=2e-5, rtol=0)


def test_a_single_picture_is_the_guess() -> None:
    picture = images(1)
    learnt = fitted(picture)
    assert len(learnt.mean) == 1
    guess = learnt(noisy(images(2, seed=2)), SIGNAL, SIGMA).image
    torch.testing.assert_close(guess, picture.expand(2, -1, -1, -1))


def test_of_two_pictures_each_is_the_other_s_guess() -> None:
    pictures = images(2)
    learnt = fitted(pictures, folds=8)
    guess = learnt(noisy(pictures), SIGNAL, SIGMA, learnt.filters_of(torch.arange(2))).image
    torch.testing.assert_close(guess, pictures.flip(0))
    assert learnt.squared_error(pictures, torch.arange(2), SIGNAL, SIGMA) > 0


def test_constant_pictures_have_no_direction() -> None:
    grey = torch.full((5, 3, SIZE, SIZE), 0.3)
    learnt = fitted(grey)
    assert (learnt.directions == 0).all()
    assert (learnt.variances == 0).all()
    guess = learnt(noisy(grey), SIGNAL, SIGMA).image
    torch.testing.assert_close(guess, grey)
    assert float(learnt.squared_error(grey, torch.arange(5), SIGNAL, SIGMA)) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("folds", [0, 3])
def test_the_expected_error_is_what_noise_gives_on_average(folds: int) -> None:
    pictures, rows = images(7), torch.arange(7) if folds else None
    learnt = WienerFilter(Size.square(SIZE), Size.square(SMALL))
    learnt.fit(pictures, rows, components=3, folds=folds)
    which = None if rows is None else learnt.filters_of(rows)
    errors = []
    for seed in range(200):
        guess = learnt(noisy(pictures, seed), SIGNAL, SIGMA, which).image
        errors.append(reduced(guess - pictures, Size.square(SMALL)).square().mean())
    expected = float(learnt.squared_error(pictures, rows, SIGNAL, SIGMA))
    assert expected == pytest.approx(float(torch.stack(errors).mean()), rel=0.01)


def test_pixels_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = images(6)
    expected = fitted(pictures).state_dict()
    monkeypatch.setattr(wiener, "COLUMNS", 700)
    for name, value in fitted(pictures).state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0)


def test_a_filter_takes_the_saved_shapes() -> None:
    learnt, fresh = fitted(images(6)), WienerFilter(Size.square(SIZE), Size.square(SMALL))
    fresh.load_state_dict(learnt.state_dict())
    seen = noisy(images(1, seed=2))
    assert torch.equal(fresh(seen, SIGNAL, SIGMA).image, learnt(seen, SIGNAL, SIGMA).image)
    assert torch.equal(fresh.filters_of(torch.arange(6)), learnt.filters_of(torch.arange(6)))
    with pytest.raises(RuntimeError, match="size mismatch"):
        WienerFilter(Size.square(2 * SIZE), Size.square(SMALL)).load_state_dict(learnt.state_dict())


def test_forgotten_folds_leave_the_filter_of_all() -> None:
    learnt, seen = fitted(images(6)), noisy(images(1, seed=2))
    before = learnt(seen, SIGNAL, SIGMA).image
    learnt.forget_folds()
    assert [len(value) for value in learnt.state_dict().values()] == [1, 1, 1, 0]
    assert learnt.directions.untyped_storage().nbytes() == learnt.directions.nbytes
    assert torch.equal(learnt(seen, SIGNAL, SIGMA).image, before)


def test_stored_constants_change_nothing_but_rounding() -> None:
    learnt, picture = fitted(images(6)), reduced(images(3, seed=2), Size.square(SMALL))
    noise = torch.randn(2, 1, 3, SMALL, SMALL, generator=seeded(4))
    levels = [(0.8, 0.07, noise[0]), (0.4, 0.11, noise[1])]
    for (signal, sigma, drawn), found in zip(levels, FixedWienerFilter(learnt, levels)(picture), strict=True):
        expected = learnt(signal * picture + sigma * drawn, signal, sigma)
        torch.testing.assert_close(found.centred, expected.centred, atol=1e-6, rtol=0)
        torch.testing.assert_close(found.across, expected.across, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.image, expected.image, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("number", "kept"),
    [(0, []), (1, [0]), (4, [0, 1, 2, 3]), (5, [0, 2, 4]), (9, [0, 4, 8]), (23, [0, 8, 16]), (25, [0, 8, 16, 24])],
)
def test_a_sample_is_even_and_bounded(number: int, kept: list[int]) -> None:
    sample = EvenSample(4)
    for start in range(0, number, 3):
        rows = torch.arange(start, min(start + 3, number))
        sample.add(rows.view(-1, 1).float(), 100 + rows)
    assert sample.count == number
    if kept:
        assert sample.images.flatten().tolist() == kept
        assert sample.rows is not None
        assert sample.rows.tolist() == [100 + index for index in kept]


def test_a_sample_holds_pictures_and_no_batches() -> None:
    sample, batch = EvenSample(2), torch.rand(8, 3, 4, 4)
    sample.add(batch, None)
    assert sample.rows is None
    batch.zero_()
    assert (sample.images > 0).any()
