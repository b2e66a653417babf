"""Operations that change a model during training, and the controller that carries out operations."""
