"""Starting many runs of the training program: `python -m launch.sweep`."""
