"""Model families: one folder each, with a fixed set of files."""
