"""Hugging Face's decoders: name maps of their families, and their configurations to palmjax's and back."""
