"""Language models: their data, attention by document, and training."""
