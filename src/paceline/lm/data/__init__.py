"""Data of language models: from rows of text to samples, packs and batches."""
