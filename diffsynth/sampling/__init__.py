"""From steps to sigmas, from sigmas to the next latents; nothing here knows a model."""
