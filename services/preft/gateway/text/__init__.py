"""Text and tokens: prompts to token ids, token ids to text, stop strings."""
