"""`python -m vfm_vae app`: a page on this machine that reconstructs images and draws samples."""
