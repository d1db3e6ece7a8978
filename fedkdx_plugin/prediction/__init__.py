"""Trained models taken out of run folders: to predict with, and to export to a device."""

from fedkdx_plugin.prediction.exporting import Export, export
from fedkdx_plugin.prediction.loading import load_model
from fedkdx_plugin.prediction.predictor import Predicted, Predictor

__all__ = ["Export", "Predicted", "Predictor", "export", "load_model"]
