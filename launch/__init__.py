"""Launchers: each builds argument lists and environments for `palmjax` and submits them; none imports it.

python -m launch.{local,tpu_vm,gke,slurm} [options] -- VERB FILE.gin [--gin.KEY=VALUE ...]
"""
