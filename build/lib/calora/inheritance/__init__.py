"""Inherit: the LoRA of the uncompressed model, carried onto the compressed one (paper, section 3.2)."""
