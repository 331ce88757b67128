"""One HTML file that tells the whole story of a run, or compares several: `python -m vfm_vae.report FOLDER…`."""
