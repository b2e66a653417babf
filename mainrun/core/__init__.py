"""What decides the bits of a step: kernels, dropout, optimizers, the device and its processes."""
