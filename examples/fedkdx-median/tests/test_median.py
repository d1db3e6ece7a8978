"""The checks of fedkdx for every algorithm and every model."""

from fedkdx_median.algorithm import FedMedian
from fedkdx_median.model import MLP

from fedkdx_plugin.testing import check_algorithm, check_model


def test_algorithm():
    check_algorithm(FedMedian)


def test_model():
    check_model(MLP)
