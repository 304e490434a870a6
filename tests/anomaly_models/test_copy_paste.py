"""Copy-paste of defects: what is pasted, where, and that nothing else changes."""

import math

import pytest
import torch
from drawn_batches import seeded
from torch import Tensor

from anomaly_models.common import copy_paste
from anomaly_models.common.copy_paste import PROBABILITIES, connected_pieces, move_pieces, paste_defects, warped_grid
from anomaly_models.common.sizes import Size

SIDE = 32


def images(number: int, seed: int, side: int = SIDE) -> Tensor:
    return torch.rand(number, 3, side, side, generator=seeded(seed))


def rectangle(number: int, top: int, left: int, height: int, width: int, side: int = SIDE) -> Tensor:
    mask = torch.zeros(number, 1, side, side)
    mask[:, :, top : top + height, left : left + width] = 1
    return mask


def active(number: int, *names: str) -> dict[str, Tensor]:
    """Only these operations act."""
    assert set(names) <= set(PROBABILITIES)
    return {name: torch.full((number,), name in names) for name in PROBABILITIES}


# --- pasting


@pytest.mark.parametrize("feathered", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("on_part", [False, True])
def test_host_is_unchanged_outside_of_the_mask(feathered: float, on_part: bool) -> None:
    donor, host = images(40, seed=0), images(40, seed=1)
    foreground = rectangle(40, 4, 4, 24, 12) if on_part else None
    pasted = paste_defects(donor, rectangle(40, 10, 12, 7, 9), host, foreground, feathered, seeded(2))
    assert len(pasted.image) == 40  # none ended empty, so the i-th host is below the i-th defect
    assert pasted.mask.flatten(1).any(dim=1).all()
    assert set(pasted.mask.unique().tolist()) == {0, 1}
    outside = (pasted.mask == 0).expand_as(host)
    assert torch.equal(pasted.image[outside], host[outside])
    changed = (pasted.image != host).any(dim=1, keepdim=True)
    assert (changed == (pasted.mask == 1)).float().mean() > 0.99
    assert pasted.image.min() >= 0
    assert pasted.image.max() <= 1


def test_a_defect_that_is_not_moved_lies_on_the_part_by_two_thirds() -> None:
    donor, mask = images(200, seed=0), rectangle(200, 8, 8, 8, 8).bool()
    _, varied = copy_paste.vary(donor, mask, seeded(3))
    foreground = rectangle(200, 0, 0, SIDE, 13).bool()
    _, placed = copy_paste.place(donor, varied, foreground, seeded(4))
    share = (varied & foreground).sum(dim=(1, 2, 3)) / varied.sum(dim=(1, 2, 3))
    stays = share > 2 / 3
    assert 20 < stays.sum() < 180  # both cases occur
    assert torch.equal(placed[stays], varied[stays])
    moved = torch.stack([(placed[i] != varied[i]).any() for i in (~stays).nonzero().flatten()])
    assert moved.float().mean() > 0.9  # the others are empty, or too large for any place


def test_two_thirds_exactly_are_not_enough() -> None:
    mask = rectangle(2, 10, 10, 3, 1).bool()
    foreground = torch.ones_like(mask)
    foreground[0, 0, 12] = False  # 2 of 3 pixels remain
    _, placed = copy_paste.place(images(2, seed=0), mask, foreground, seeded(0))
    assert not torch.equal(placed[0], mask[0])
    assert torch.equal(placed[1], mask[1])


def test_pastes_that_end_empty_are_dropped() -> None:
    mask = rectangle(6, 10, 10, 8, 8)
    mask[[1, 4]] = 0
    host = images(6, seed=1)
    pasted = paste_defects(images(6, seed=0), mask, host, None, 0.0, seeded(0))
    assert len(pasted.image) == len(pasted.mask) == 4
    outside = (pasted.mask == 0).expand_as(pasted.image)
    assert torch.equal(pasted.image[outside], host[[0, 2, 3, 5]][outside])
    none = paste_defects(images(2, seed=0), torch.zeros(2, 1, SIDE, SIDE), host[:2], None, 0.5, seeded(0))
    assert none.image.shape == (0, 3, SIDE, SIDE)


def test_a_function_of_the_generator_alone() -> None:
    arguments = (images(8, seed=0), rectangle(8, 10, 12, 7, 9), images(8, seed=1), rectangle(8, 4, 4, 24, 6), 0.5)
    torch.manual_seed(0)
    first = paste_defects(*arguments, seeded(5))
    torch.manual_seed(1)
    again, other = paste_defects(*arguments, seeded(5)), paste_defects(*arguments, seeded(6))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.mask, other.mask)


def test_feather_fades_in_along_a_border_and_spares_thin_defects() -> None:
    wide = rectangle(1, 0, 16, SIDE, 16).bool()
    weight = copy_paste.feather(wide)[0, 0, 16]
    # Columns 14 to 18 cover 3 of 5; the highest cover within two pixels of column 16 is all of them, at column 18.
    torch.testing.assert_close(weight[14:20], torch.tensor([0, 0, 0.6, 0.8, 1, 1]))
    line = rectangle(1, 0, 16, SIDE, 1).bool()
    torch.testing.assert_close(copy_paste.feather(line), line.float())


# --- how defects are varied


def test_three_of_ten_operations_with_their_probabilities() -> None:
    assert len(PROBABILITIES) == 10
    number = 40_000
    drawn = copy_paste.draw_operations(number, seeded(0))
    for name, probability in PROBABILITIES.items():
        expected = 0.3 * probability
        error = math.sqrt(expected * (1 - expected) / number)
        assert abs(drawn[name].float().mean().item() - expected) < 4 * error, name
    assert torch.stack(list(drawn.values())).sum(dim=0).max() <= 3


def test_without_an_operation_nothing_changes() -> None:
    grid = warped_grid(active(3), Size.square(SIDE), seeded(0))
    centres = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    torch.testing.assert_close(grid[..., 0], centres.expand(3, SIDE, SIDE), rtol=0, atol=1e-6)
    torch.testing.assert_close(grid[..., 1], centres[:, None].expand(3, SIDE, SIDE), rtol=0, atol=1e-6)
    image = images(3, seed=0)
    torch.testing.assert_close(copy_paste.recoloured(image, active(3), seeded(0)), image, rtol=0, atol=1e-6)


def sampled(name: str, number: int, seed: int) -> Tensor:
    """One image under a geometric operation, drawn `number` times."""
    image = images(1, seed=9).expand(number, -1, -1, -1)
    grid = warped_grid(active(number, name), Size.square(SIDE), seeded(seed))
    return torch.nn.functional.grid_sample(image, grid, mode="nearest", align_corners=False)


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("quarter_turn", lambda image: [image.rot90(k, (1, 2)) for k in range(4)]),
        ("flip", lambda image: [image.flip(1), image.flip(2), image.flip(1, 2)]),
        ("transpose", lambda image: [image.mT]),
    ],
)
def test_exact_geometry(name: str, variants: object) -> None:
    assert callable(variants)
    expected = variants(images(1, seed=9)[0])
    found = sampled(name, 40, seed=0)
    seen = {[torch.equal(image, variant) for variant in expected].index(True) for image in found}
    assert seen == set(range(len(expected)))


@pytest.mark.parametrize(
    ("name", "most"), [("lens", 1.1), ("shift_scale_turn", 1.3), ("distortion", 0.5)], ids=["lens", "affine", "warp"]
)
def test_bounded_geometry(name: str, most: float) -> None:
    still = warped_grid(active(1), Size.square(SIDE), seeded(0))
    shift = (warped_grid(active(50, name), Size.square(SIDE), seeded(1)) - still).abs()
    assert (shift.amax(dim=(1, 2, 3)) > 1e-3).float().mean() > 0.9
    assert shift.max() < most
    assert shift[:, SIDE // 2, SIDE // 2].max() < 0.45  # the middle moves least


def test_lens_of_one_doubles_and_three_quarters_of_the_corner() -> None:
    """r is 1 / sqrt(2) in a corner: 1 + k (r^2 + r^4) = 1 + 3/4 k."""
    grid = torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]]])
    found = copy_paste._through_lens(grid, torch.tensor([1.0]))
    torch.testing.assert_close(found, torch.tensor([[[[1.75, 1.75], [1 + 1 / 4 + 1 / 16, 0.0]]]]))


def test_image_and_mask_move_together() -> None:
    """An image that is its own mask stays so, where neither tone nor colour changes."""
    mask = rectangle(60, 8, 10, 11, 14)
    image, varied = copy_paste.vary(mask.expand(-1, 3, -1, -1), mask.bool(), seeded(1))
    agrees = ((image.mean(dim=1, keepdim=True) > 0.5) == varied).float().mean(dim=(1, 2, 3))
    assert agrees.median() == 1


@pytest.mark.parametrize("name", ["noise", "blur", "tone", "colour"])
def test_photometry_stays_in_range_and_changes_only_where_active(name: str) -> None:
    image = images(30, seed=0)
    chosen = active(30, name)
    chosen[name] = torch.arange(30) % 3 > 0
    changed = copy_paste.recoloured(image, chosen, seeded(1))
    assert changed.min() >= 0
    assert changed.max() <= 1
    difference = (changed - image).abs().amax(dim=(1, 2, 3))
    assert difference[~chosen[name]].max() < 1e-5
    assert (difference[chosen[name]] > 1e-3).float().mean() > 0.9  # a blur of 1 x 1 is none


def test_filters_keep_the_mean_of_grey() -> None:
    """The weights of every kernel sum to one."""
    grey = torch.full((30, 3, SIDE, SIDE), 0.4)
    torch.testing.assert_close(copy_paste.recoloured(grey, active(30, "blur"), seeded(0)), grey)
    kernels = copy_paste._reliefs(torch.tensor([True, False]), torch.tensor([False, True]), seeded(0))
    torch.testing.assert_close(kernels.sum(dim=(1, 2)), torch.ones(2))


# --- where defects are placed


def test_connected_pieces_against_a_drawing() -> None:
    drawing = """
        ##....#.
        .#...#..
        ......#.
        #.###...
        #.#.#...
        #.###..#
    """
    rows = [[cell == "#" for cell in line.strip()] for line in drawing.strip().splitlines()]
    mask = torch.tensor(rows)
    pieces = connected_pieces(mask)
    assert sorted(int(piece.sum()) for piece in pieces) == [1, 3, 3, 3, 8]
    assert torch.equal(torch.stack(pieces).sum(dim=0), mask.long())
    assert connected_pieces(torch.zeros(4, 5, dtype=torch.bool)) == []


def test_pieces_are_moved_whole_onto_the_part() -> None:
    image = images(1, seed=0)[0]
    mask = (rectangle(1, 2, 2, 3, 5) + rectangle(1, 20, 25, 4, 2))[0, 0].bool()
    foreground = rectangle(1, 10, 8, 6, 8)[0, 0].bool()
    for seed in range(20):
        moved_image, moved_mask = move_pieces(image, mask, foreground, seeded(seed))
        pieces = connected_pieces(moved_mask)
        if len(pieces) == 1:
            continue  # one lies on the other
        for piece in pieces:
            height, width = (piece.any(dim=1 - axis).sum().item() for axis in (0, 1))
            top, left = piece.nonzero().amin(dim=0).tolist()
            assert (height, width) in ((3, 5), (4, 2))
            source_top, source_left = (2, 2) if height == 3 else (20, 25)
            source = image[:, source_top : source_top + height, source_left : source_left + width]
            assert torch.equal(moved_image[:, top : top + height, left : left + width], source)
            middle = piece.nonzero().float().mean(dim=0).round().long()
            assert foreground[max(middle[0] - 1, 0) : middle[0] + 2, max(middle[1] - 1, 0) : middle[1] + 2].any()


def test_places_keep_their_margin_and_are_spread() -> None:
    mask = rectangle(1, 0, 0, 6, 10)[0, 0].bool()
    everywhere = torch.ones(SIDE, SIDE, dtype=torch.bool)
    moved = [move_pieces(images(1, seed=0)[0], mask, everywhere, seeded(seed))[1] for seed in range(300)]
    assert all(int(found.sum()) == 60 for found in moved)  # nothing falls off the image
    tops = torch.stack([found.nonzero().amin(dim=0) for found in moved])
    assert tops.amin(dim=0).max() <= 2
    assert tops[:, 0].max() >= SIDE - 6 - 2
    assert tops[:, 1].max() >= SIDE - 10 - 2


def test_without_a_place_a_defect_stays_where_it_is() -> None:
    image, mask = images(1, seed=0)[0], rectangle(1, 4, 4, 8, 8)[0, 0].bool()
    corner = torch.zeros_like(mask)
    corner[0, 0] = True  # within the margin
    for foreground in (corner, torch.zeros_like(mask)):
        moved_image, moved_mask = move_pieces(image, mask, foreground, seeded(0))
        assert torch.equal(moved_image, image)
        assert torch.equal(moved_mask, mask)
