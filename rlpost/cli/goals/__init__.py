"""The commands `rlpost goals …`."""
