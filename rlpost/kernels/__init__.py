"""Operations in C, compiled for this machine's processor when they are first used."""
