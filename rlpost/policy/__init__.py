"""The policy: a causal language model, its adapters, and the flat forward pass over groups."""

from transformers.utils import logging

# Its bars for loading and saving would break up ours, and tell nothing that console.py does not.
logging.disable_progress_bar()
