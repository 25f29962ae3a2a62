"""The stages: each a function from a checkpoint to a checkpoint that reads like its paper's algorithm box."""
