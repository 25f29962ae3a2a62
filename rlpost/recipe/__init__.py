"""Recipes: YAML files resolved into dataclasses, checked before anything heavy is imported."""
