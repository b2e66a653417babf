"""The code that affects the results of a training step: kernels, dropout, optimizers and the device."""
