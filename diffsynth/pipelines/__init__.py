"""The public faces of the families: the documented signatures, nothing else."""
