import pytest
import torch
from drawn_batches import seeded

from anomaly_models.common.randomness import generator_on


def test_generator_stays_where_it_is() -> None:
    generator = seeded(0)
    assert generator_on(torch.device("cpu"), generator) is generator


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generator_elsewhere_is_a_function_of_it() -> None:
    numbers = [
        torch.rand(4, device="cuda", generator=generator_on(torch.device("cuda"), seeded(seed))) for seed in (0, 0, 1)
    ]
    assert torch.equal(numbers[0], numbers[1])
    assert not torch.equal(numbers[0], numbers[2])
