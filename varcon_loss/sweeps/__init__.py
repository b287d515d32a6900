"""The ways to compute the rows: by the equations, in one pass, in kernels; and what they share."""
