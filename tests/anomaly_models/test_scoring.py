import pytest
import torch
from drawn_batches import seeded
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from anomaly_models.common.scoring import GaussianBlur, resize_map
from anomaly_models.common.sizes import Size


@pytest.mark.parametrize("side", [16, 64, 100])
def test_blur_is_scipys_gaussian_filter(side: int) -> None:
    image = torch.rand(2, 1, side, side, generator=seeded(0))
    blurred = GaussianBlur(4.0)(image)
    for original, found in zip(image[:, 0], blurred[:, 0], strict=True):
        expected = torch.from_numpy(gaussian_filter(original.double().numpy(), sigma=4))
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_kernel_has_33_taps_that_sum_to_one() -> None:
    blur = GaussianBlur(4.0)
    assert blur.kernel.shape == (33,)
    torch.testing.assert_close(blur.kernel.sum(), torch.tensor(1.0))
    assert not blur.state_dict()  # derived from the settings


def test_a_constant_map_stays_constant() -> None:
    torch.testing.assert_close(GaussianBlur(2.5)(torch.full((1, 1, 64, 64), 3.0)), torch.full((1, 1, 64, 64), 3.0))


def test_torchs_reflect_padding_would_differ_at_the_border_only() -> None:
    image = torch.rand(1, 1, 64, 64, generator=seeded(0))
    blur = GaussianBlur(4.0)
    padded = F.pad(image, (16, 16, 16, 16), mode="reflect")
    other = F.conv2d(F.conv2d(padded, blur.kernel.view(1, 1, -1, 1)), blur.kernel.view(1, 1, 1, -1))
    difference = (blur(image) - other).abs()[0, 0]
    assert difference[16:-16, 16:-16].max() < 1e-6 < 1e-3 < difference.max()


def test_resize_uses_half_pixel_centres() -> None:
    ramp = torch.tensor([[[[0.0, 1.0]]]]).expand(1, 1, 2, 2)
    assert resize_map(ramp, Size.square(4))[0, 0, 0].tolist() == [0.0, 0.25, 0.75, 1.0]
