"""How far workers are. In a module of its own: the actor's process imports what its class's module imports, and this needs nothing."""


class Done:
    """Samples done so far; rank 0 tells, the driver asks."""

    def __init__(self) -> None:
        self.samples = 0

    def set(self, samples: int) -> None:
        self.samples = samples

    def get(self) -> int:
        return self.samples
