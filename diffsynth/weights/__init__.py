"""Files: names, headers, lazily read tensors, hubs."""
