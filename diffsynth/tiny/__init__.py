"""Small complete checkpoints with random weights: to try an installation, for tests, for demos."""
