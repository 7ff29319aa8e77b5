"""Runs a chain on the nodes of a cluster: what every node does, and the SLURM scripts and Kubernetes manifests that start it."""
