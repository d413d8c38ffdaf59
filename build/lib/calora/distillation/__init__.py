"""Distil: L = L_task + alpha L_dist from the stored outputs of the uncompressed model (paper, section 3.4), and the training loop."""
