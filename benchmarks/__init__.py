"""Measurements of this package against its peers: see README.md."""
