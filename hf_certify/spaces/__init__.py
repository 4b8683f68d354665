"""Spaces in which noise is added: each makes tensors of a pipeline's inputs, and its model a function of them."""
