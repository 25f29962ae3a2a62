"""The exact oracle: trees small enough to enumerate, on which every estimator's expected gradient can be proved."""
