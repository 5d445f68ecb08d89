"""Text: what completes prompts, and how likely completions are."""
