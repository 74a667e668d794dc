"""Moorage: an HTTP server for transformers models, their placement planned, proven and watched."""

import logging

__version__ = "0.1.0"

# transformers imports torchao where it is installed, which warns of the extensions it does without
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
