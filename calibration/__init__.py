"""latentedge.calibration: INT8 by measured trajectories. No torch."""
