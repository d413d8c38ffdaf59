"""Answers, scores, and how sure they are."""
