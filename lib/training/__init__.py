"""Training: from examples to packed batches, log-probabilities, gradients and AdamW steps."""
