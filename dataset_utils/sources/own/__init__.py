"""The user's own recordings, described by a YAML file (docs/guide/own-data.md)."""

from dataset_utils.sources.own.source import OwnData, load_source

__all__ = ["OwnData", "load_source"]
