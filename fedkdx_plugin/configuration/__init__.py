"""What is to be run, declared and checked: options, algorithms and their hyper-parameters."""
