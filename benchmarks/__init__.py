"""latentedge.benchmarks: measured ratios, never asserted seconds."""
