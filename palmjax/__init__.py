"""palmjax: train and evaluate PaLM-style language models with JAX.

Importing the package loads neither jax nor TensorFlow; every room is imported where it is used.
"""

__version__ = "0.1.0"
