"""What `import rlpost` offers to Python: train a recipe, read a run, generate."""
