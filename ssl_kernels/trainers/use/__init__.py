"""Using what a run has trained: embeddings, search, classification, probes, fine-tuning, and formats of others."""
