"""The run directory: names on disk, checkpoints, resume, metrics; the only code that knows them."""
