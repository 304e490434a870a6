import torch

from anomaly_models.common.statistics import ChannelStatistics


def test_statistics_of_a_stream_are_those_of_all() -> None:
    # A mean of 5 with a deviation of 1e-3: mean(x^2) - mean(x)^2 in float32 would be off by half.
    features = 5 + 1e-3 * torch.randn(7, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    statistics = ChannelStatistics()
    for part in features.split([3, 1, 2, 1]):
        statistics.update(part)
    exact = features.double()
    torch.testing.assert_close(statistics.mean, exact.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(statistics.std, exact.std(dim=(0, 2, 3), correction=0))
