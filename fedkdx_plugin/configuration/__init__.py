"""Configuration of a comparison, declared and checked: options, algorithms and their hyper-parameters."""
