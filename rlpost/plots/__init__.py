"""Pictures of runs, for the terminal and as PNG files."""
