"""Kernels as ops, each with a reference in plain jnp. Imports jax only; usable without palmjax."""
