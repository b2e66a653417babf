"""What a training step costs, beside rivals and beside what the machine can do: `mainrun bench step | gpu`."""
