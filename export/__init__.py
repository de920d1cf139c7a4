"""latentedge.export: a checkpoint in, a proven bundle and engines out. Needs torch."""
