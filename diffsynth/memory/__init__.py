"""Where weights rest, and how they reach the place of computation. Knows modules and bytes, no model."""
