"""What users of Ray Serve name by a path under `ray.serve._private`, and nothing else."""
