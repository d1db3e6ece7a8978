"""Checks for algorithms, models and data sets, the built-in ones and anybody's, as tests of one line.

`check_algorithm(MyServer)`, `check_model(MyModel)` and `check_source(MySource, raw=folder)` raise an AssertionError
that names all that is wrong. `algorithm_checks()`, `model_checks()` and `source_checks()` give the same one by one.
"""

from fedkdx_plugin.testing.algorithms import algorithm_checks as algorithm_checks
from fedkdx_plugin.testing.algorithms import check_algorithm as check_algorithm
from fedkdx_plugin.testing.case import AlgorithmCase as AlgorithmCase
from fedkdx_plugin.testing.models import ModelCase as ModelCase
from fedkdx_plugin.testing.models import check_model as check_model
from fedkdx_plugin.testing.models import model_checks as model_checks
from fedkdx_plugin.testing.sources import SourceCase as SourceCase
from fedkdx_plugin.testing.sources import check_source as check_source
from fedkdx_plugin.testing.sources import source_checks as source_checks
