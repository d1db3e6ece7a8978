"""The interface between algorithms and the engine, and the catalog of algorithms, models and data sets.

Importing this package imports nothing else: `registry.interface` needs torch, `registry.catalog` does not.
"""

__version__ = "0.1.0"
