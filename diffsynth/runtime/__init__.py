"""The ground: errors, devices, random numbers, logs, images."""
