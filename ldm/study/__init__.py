"""`python -m ldm.study`: trains tokenizers and diffusion models on each, measures all alike, and reports."""
