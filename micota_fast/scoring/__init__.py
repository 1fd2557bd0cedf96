"""A model's log-probabilities of answers that somebody else has written."""
