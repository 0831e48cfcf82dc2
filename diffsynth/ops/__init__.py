"""Stateless tensor maths that two families or more use."""
