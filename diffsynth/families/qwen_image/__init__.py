"""Qwen-Image (https://huggingface.co/Qwen/Qwen-Image)."""
