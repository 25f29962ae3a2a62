"""Goals: sets of final tokens, value networks of them, guiding, reverse models, infilling, and their proofs."""
