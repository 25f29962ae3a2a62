"""Goals: final texts that completions should reach or avoid, value networks, guided decoding, infilling."""
