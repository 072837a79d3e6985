"""tunelab: a laboratory for fine-tuning language models on a small budget."""

__version__ = "0.1.0"
