"""A model's name, turned into a checked folder on this machine. No torch at module level."""
