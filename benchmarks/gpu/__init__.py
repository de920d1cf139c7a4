"""Everything that has to be measured where a GPU is at hand, in one run."""
