"""Tokens: sequences in, batches through the model, tokens out."""
