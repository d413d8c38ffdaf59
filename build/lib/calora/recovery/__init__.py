"""Recover: the low-rank non-linear bypass R(X) = sigma(XD)U (paper, section 3.3), and its closed-form start."""
