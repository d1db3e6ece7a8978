"""Trained models of run folders, for predictions and for export to a device."""

from fedkdx_plugin.prediction.exporting import Export, export
from fedkdx_plugin.prediction.loading import load_model
from fedkdx_plugin.prediction.predictor import Predicted, Predictor

__all__ = ["Export", "Predicted", "Predictor", "export", "load_model"]
