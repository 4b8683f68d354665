"""Every model type of transformers held against chain attention: small models, the check of one, and the page."""
