"""Kernels as ops, each with a reference in plain jnp. Imports jax only; usable without palmjax.

attention/             over whole rows: TPU and Hopper kernels through Mosaic, blocks in XLA, a ring over devices
decode_attention/      a few new tokens against a key/value cache
linear_cross_entropy/  hidden states and a vocabulary's table to a loss, without the logits
aot.py                 kernels compiled for TPUs that are not at hand, and their listings; aot_gpu.py: for Hopper
schedule.py            how long a kernel takes on a chip, from its table; tune.py makes the tables

An op's `api.py` chooses an implementation loudly: a named one works or raises with every reason, "auto" can explain
itself. What a program is for (`chip`) is a value that the caller passes in.
"""
