"""Everything that determines the numbers of a training step: kernels, dropout, optimizers and the device."""
