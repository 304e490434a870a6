import numpy as np
import torch

from pipelines.data.arrays import to_image
from pipelines.pictures import images


def test_every_byte_becomes_exactly_x_over_255():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 256, 1)
    np.testing.assert_array_equal(to_image(every).numpy(), images.to_input(every.numpy()))
