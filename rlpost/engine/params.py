"""How completions are sampled."""

from dataclasses import dataclass, field


@dataclass
class Sampling:
    """How completions are sampled."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: list[str] = field(default_factory=list)
