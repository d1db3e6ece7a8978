"""The user's own recordings, as a YAML file describes them (docs/datasets.md)."""

from dataset_utils.sources.own.source import OwnData, load_source

__all__ = ["OwnData", "load_source"]
