"""Recipes: YAML files resolved into checked sections, before anything heavy is imported."""
