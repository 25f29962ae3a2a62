"""The policy: a causal language model, its adapters, and the flat forward pass over groups."""
