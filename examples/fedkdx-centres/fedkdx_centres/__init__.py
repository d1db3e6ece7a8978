"""An example plug-in for fedkdx: a PyTorch Dataset for each centre as one data set."""
