"""How a federation is driven: in Flower's simulation, on a SuperLink that is there, or in one process."""
