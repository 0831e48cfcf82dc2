"""ERNIE-Image (https://huggingface.co/baidu/ERNIE-Image)."""
